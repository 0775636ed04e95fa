"""convert(): bit-exact, correctly rounded, atomic, and refusing what is not one whole model."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import RESNET, VIT, assert_same, bfloat16_file, to_hugging_face, weights
from torch_writer import TorchWriter, save, script_module

from npclip import convert as convert_module
from npclip.checkpoint import open_checkpoint
from npclip.config import Metadata
from npclip.convert import cast, convert
from npclip.errors import CheckpointError, UnknownActivationError

EXACT = {"float32", "float16", "float64"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(weights(VIT), path)
    return path


def torchscript(tmp_path, arrays):
    writer = TorchWriter()
    return save(tmp_path / "clip.pt", writer.archive(script_module(writer, arrays)))


@pytest.mark.parametrize("dtype", sorted(EXACT))
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_round_trip_is_exact(tmp_path, config, dtype):
    arrays = weights(config, dtype)
    path, target = torchscript(tmp_path, arrays), tmp_path / "out.safetensors"
    metadata = convert(path, target)
    assert metadata == Metadata(
        activation="quick_gelu",
        source="clip.pt",
        source_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    checkpoint = open_checkpoint(target)
    assert (checkpoint.format, checkpoint.metadata) == ("npclip safetensors", metadata)
    assert_same(checkpoint.tensors, arrays)
    again = tmp_path / "again.safetensors"
    convert(target, again)
    assert_same(open_checkpoint(again).tensors, arrays)
    for name, array in load_file(target).items():  # the safetensors library agrees
        assert array.tobytes() == arrays[name].tobytes()


def test_mixed_dtypes_are_aligned(tmp_path):
    arrays = weights(VIT)
    for i, name in enumerate(arrays):
        arrays[name] = arrays[name].astype(["f2", "f4", "f8"][i % 3])
    convert(torchscript(tmp_path, arrays), tmp_path / "out")
    assert_same(open_checkpoint(tmp_path / "out").tensors, arrays)
    data = (tmp_path / "out").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % arrays[name].itemsize == 0


def test_hugging_face_to_openai(tmp_path):
    save_file(to_hugging_face(weights(VIT)), tmp_path / "model.safetensors")
    heads = {"num_attention_heads": 4}
    config = json.dumps({"text_config": heads, "vision_config": heads})
    (tmp_path / "config.json").write_text(config)
    metadata = convert(tmp_path, tmp_path / "out.safetensors")
    assert (metadata.source, metadata.text_heads) == ("model.safetensors", 4)
    assert_same(open_checkpoint(tmp_path / "out.safetensors").tensors, weights(VIT))


KEPT_EXAMPLES = [
    "ln_final.weight",
    "logit_scale",
    "positional_embedding",
    "token_embedding.weight",
    "transformer.resblocks.0.ln_2.bias",
    "visual.attnpool.positional_embedding",
    "visual.bn1.running_var",
    "visual.layer1.0.bn3.weight",
    "visual.layer1.0.downsample.1.bias",
]
CAST_EXAMPLES = [
    "text_projection",
    "transformer.resblocks.0.attn.in_proj_bias",
    "transformer.resblocks.0.attn.out_proj.weight",
    "transformer.resblocks.0.mlp.c_fc.bias",
    "visual.attnpool.c_proj.bias",
    "visual.conv1.weight",
    "visual.layer1.0.conv3.weight",
    "visual.layer1.0.downsample.0.weight",
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_precision_casts_what_openai_casts(tmp_path, dtype):
    path = torchscript(tmp_path, weights(RESNET))
    convert(path, tmp_path / "out", dtype=dtype)
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert {tensors[name].dtype for name in KEPT_EXAMPLES} == {"float32"}
    assert {tensors[name].dtype for name in CAST_EXAMPLES} == {dtype}
    vit = tmp_path / "vit"
    vit.mkdir()
    convert(torchscript(vit, weights(VIT)), tmp_path / "vit_out", dtype=dtype)
    tensors = open_checkpoint(tmp_path / "vit_out").tensors
    assert tensors["visual.class_embedding"].dtype == "float32"
    assert tensors["visual.ln_pre.weight"].dtype == "float32"
    assert tensors["visual.proj"].dtype == dtype


@pytest.mark.parametrize("stored", ["float16", "float64", "float32"])
def test_float32_casts_all(tmp_path, stored):
    arrays = weights(VIT, stored)
    convert(torchscript(tmp_path, arrays), tmp_path / "out", dtype="float32")
    expected = {k: v.astype("float32") for k, v in arrays.items()}
    assert_same(open_checkpoint(tmp_path / "out").tensors, expected)


def test_bfloat16_to_float32_and_back(tmp_path):
    path = torchscript(tmp_path, weights(VIT))
    convert(path, tmp_path / "bf16", dtype="bfloat16")
    convert(tmp_path / "bf16", tmp_path / "f32", dtype="float32")
    convert(tmp_path / "f32", tmp_path / "again", dtype="bfloat16")
    first, last = (open_checkpoint(tmp_path / n).tensors for n in ("bf16", "again"))
    for name in first:
        assert first[name].read().tobytes() == last[name].read().tobytes()


def nearest_bfloat16(x: float) -> int:
    """By search: the nearest bit pattern, of two the even one."""
    low = int(np.float32(abs(x)).view(np.uint32)) >> 16
    candidates = np.array([low, low + 1], np.uint32)
    values = (candidates << 16).view(np.float32).astype(np.float64)
    errors = np.abs(values - abs(x))
    best = low if errors[0] < errors[1] else low + 1
    if errors[0] == errors[1]:
        best = low + (low & 1)
    return best | (0x8000 if np.signbit(x) else 0)


@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
def test_bfloat16_rounds_to_nearest_even(x):
    (bits,) = cast("x", np.array([x], "f4"), "float32", "bfloat16")
    assert int(bits) == nearest_bfloat16(x)


def test_bfloat16_special_values():
    x = np.array([np.inf, -np.inf, np.nan, 1.00390625, 1.01171875, -0.0], "f4")
    x = np.append(x, np.array([0x7F800001, 0xFFFFFFFF], "u4").view("f4"))  # NaNs with odd payloads
    bits = cast("x", x, "float32", "bfloat16")
    assert bits[:2].tolist() == [0x7F80, 0xFF80]
    back = (bits.astype("u4") << 16).view("f4")
    np.testing.assert_array_equal(np.isnan(back), np.isnan(x))
    assert bits[3:6].tolist() == [0x3F80, 0x3F82, 0x8000]  # two ties go to even


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [
        (65520.0, "float32", "float16"),
        (-1e5, "float64", "float16"),
        (3.4e38, "float32", "bfloat16"),
        (1e39, "float64", "bfloat16"),
        (1e39, "float64", "float32"),
    ],
)
def test_overflow(value, source, target):
    x = np.array([0.0, value], source)
    with pytest.raises(CheckpointError, match=rf"visual\.proj holds values too large for {target}"):
        cast("visual.proj", x, source, target)
    cast("visual.proj", np.array([np.inf], source), source, target)  # was infinite before


def test_overflow_leaves_nothing_behind(tmp_path):
    arrays = weights(VIT)
    arrays["visual.proj"][3, 3] = 1e6
    path = torchscript(tmp_path, arrays)
    target = save(tmp_path / "out", b"precious")
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        convert(path, target, dtype="float16")
    assert target.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.pt", "out"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["float16", "float32", "float64", "bfloat16"])
def test_values_that_are_not_finite(tmp_path, stored, value):
    arrays = weights(VIT, stored.replace("bfloat16", "float32"))
    arrays["visual.proj"][3, 3:5] = value
    path = torchscript(tmp_path, arrays)
    if stored == "bfloat16":
        path = save(tmp_path / "clip.pt", bfloat16_file(arrays))
    with pytest.raises(CheckpointError, match=r"visual\.proj: 2 of 1024 values are NaN or inf"):
        convert(path, tmp_path / "out", activation="gelu")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing_behind(tmp_path, source, monkeypatch, failure):
    def fail(*_args):
        raise failure

    monkeypatch.setattr(convert_module, "cast", fail)
    with pytest.raises(failure):
        convert(source, tmp_path / "out", activation="gelu")
    assert list(tmp_path.iterdir()) == [source]


def test_activation(tmp_path, source):
    with pytest.raises(UnknownActivationError, match=r"source\.safetensors"):
        convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="relu"):
        convert(source, tmp_path / "out", activation="relu")
    assert list(tmp_path.iterdir()) == [source]
    assert convert(source, tmp_path / "out", activation="gelu").activation == "gelu"
    assert open_checkpoint(tmp_path / "out").metadata.activation == "gelu"
    assert convert(tmp_path / "out", tmp_path / "b", activation="quick_gelu").source == "out"


def test_unknown_dtype(tmp_path, source):
    with pytest.raises(CheckpointError, match="dtype 'int8' is not one of"):
        convert(source, tmp_path / "out", dtype="int8")


def test_refuses_to_overwrite_the_source(tmp_path, source):
    before = source.read_bytes()
    targets = [source, source.parent / "." / source.name]
    if hasattr(os, "symlink"):
        (tmp_path / "link").symlink_to(source)
        targets.append(tmp_path / "link")
    for target in targets:
        with pytest.raises(CheckpointError, match="refusing to overwrite"):
            convert(source, target, activation="gelu")
    assert source.read_bytes() == before


@pytest.mark.parametrize("target", ["", ".", "/", "..", "folder"])
def test_a_target_that_is_a_directory(tmp_path, source, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(convert_module, "open_checkpoint", lambda _: pytest.fail("read first"))
    with pytest.raises(CheckpointError, match=r"^\S+: exists and is not a regular file"):
        convert(source, target, activation="gelu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", source.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX special files")
def test_a_target_that_is_special(tmp_path, source):
    """In a folder of its own: a wrong convert must not harm the machine's /dev."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to(fifo)
    for target in (fifo, tmp_path / "link"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            convert(source, target, activation="gelu")
    assert fifo.is_fifo() and (tmp_path / "link").is_symlink()


def test_errors_of_the_system_name_the_target(tmp_path, source, monkeypatch):
    for target in (tmp_path / "no" / "out", source / "out", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=r"\[Errno \d+\]") as error:
            convert(source, target, activation="gelu")
        assert (error.value.filename, error.value.filename2) == (str(target), None)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        convert(source, tmp_path / "out", activation="gelu")
    assert error.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.ln_pre.bias": None}, r"missing: visual\.ln_pre\.bias"),
        ({"extra": np.zeros(2, "f4")}, "do not belong to CLIP: extra"),
        ({"ln_final.bias": np.zeros(65, "f4")}, r"\[65\] where \[64\] is wanted"),
        ({"visual.proj": None}, "image tower is neither"),
    ],
)
def test_incomplete_models(tmp_path, change, message):
    arrays = {k: v for k, v in (weights(VIT) | change).items() if v is not None}
    path = tmp_path / "bad.safetensors"
    save_file(arrays, path)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(path, tmp_path / "out", activation="gelu")
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_is_plain_safetensors(tmp_path, source):
    convert(source, tmp_path / "out", activation="gelu")
    with safe_open(tmp_path / "out", framework="np") as file:
        assert file.metadata()["format"] == "npclip"
        assert file.metadata()["source"] == "source.safetensors"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_follow_the_umask(tmp_path, source):
    old = os.umask(0o027)
    try:
        convert(source, tmp_path / "out", activation="gelu")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640
