"""Every layout of files and names that a CLIP model comes in, and everything that may be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import serialize
from safetensors.numpy import save_file
from tiny_models import RESNET, VIT, assert_same, bfloat16_file, to_hugging_face, weights
from torch_writer import TorchWriter, save, script_module, state_dict

from npclip import hub
from npclip.checkpoint import Checkpoint, Tensor, check_tensors, open_checkpoint
from npclip.config import Metadata, infer_config
from npclip.errors import CheckpointError, UnknownActivationError

HF_TOWER = {"hidden_act": "gelu", "num_attention_heads": 4, "layer_norm_eps": 1e-05}
HF_CONFIG = {"model_type": "clip", "text_config": HF_TOWER, "vision_config": HF_TOWER}
OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"width": 64, "head_width": 16, "layers": 2, "patch_size": 8},
        "text_cfg": {"width": 64, "heads": 2, "layers": 2, "context_length": 7},
    },
    "preprocess_cfg": {
        "size": 16,
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [1, 0.5, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "fill_color": 0,
    },
}


def write_json(path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def with_change(value: dict, path: str, new) -> dict:
    """A deep copy of value with the entry at the dotted path replaced."""
    value = json.loads(json.dumps(value))
    *keys, last = path.split(".")
    node = value
    for key in keys:
        node = node[key]
    node[last] = new
    return value


def hugging_face(tmp_path, config=HF_CONFIG, preprocessor=None, towers=("image", "text")):
    arrays = to_hugging_face(weights(VIT, towers=towers))
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    write_json(tmp_path / "config.json", config)
    if preprocessor is not None:
        write_json(tmp_path / "preprocessor_config.json", preprocessor)
    return tmp_path


def open_clip(tmp_path, config=OPEN_CLIP_CONFIG):
    save_file(weights(VIT), tmp_path / "open_clip_model.safetensors")
    write_json(tmp_path / "open_clip_config.json", config)
    return tmp_path


# --- containers ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_every_container(tmp_path, config, dtype):
    arrays = weights(config, dtype)
    save_file(arrays, tmp_path / "a.safetensors")
    writer = TorchWriter()
    save(tmp_path / "b.bin", writer.archive(state_dict(writer, arrays)))
    writer = TorchWriter()
    extras = {name: np.array(7) for name in ("input_resolution", "context_length", "vocab_size")}
    root = script_module(writer, arrays | extras)
    save(tmp_path / "c.safetensors", writer.archive(root))  # the name does not matter
    writer = TorchWriter()
    wrapped = state_dict(writer, {f"module.{k}": v for k, v in arrays.items()})
    save(tmp_path / "d", writer.archive({"epoch": 1, "state_dict": wrapped}))
    for name, kind, activation in [
        ("a.safetensors", "OpenAI safetensors", None),
        ("b.bin", "OpenAI state_dict", None),
        ("c.safetensors", "OpenAI TorchScript", "quick_gelu"),
        ("d", "OpenAI state_dict", None),
    ]:
        checkpoint = open_checkpoint(str(tmp_path / name))
        assert (checkpoint.path, checkpoint.format) == (tmp_path / name, kind)
        assert checkpoint.metadata == Metadata(activation=activation)
        assert_same(checkpoint.tensors, arrays)
        metadata = dataclasses.replace(checkpoint.metadata, activation="quick_gelu")
        inferred = infer_config({k: t.shape for k, t in checkpoint.tensors.items()}, metadata)
        check_tensors(checkpoint.tensors, inferred, ("image", "text"))


def test_bfloat16(tmp_path):
    arrays = weights(VIT)
    checkpoint = open_checkpoint(save(tmp_path / "m", bfloat16_file(arrays)))
    for name, array in arrays.items():
        assert checkpoint.tensors[name].dtype == "bfloat16"
        bits = checkpoint.tensors[name].read()
        np.testing.assert_array_equal(bits, array.view("u4") >> 16)
    assert bits.dtype == np.uint16


def test_release_keeps_values(tmp_path):
    arrays = weights(VIT)
    save_file(arrays, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    view = checkpoint.tensors["visual.proj"].read()
    assert not view.flags.writeable
    checkpoint.release()
    np.testing.assert_array_equal(view, arrays["visual.proj"])
    assert_same(checkpoint.tensors, arrays)


# --- names ---


def test_hugging_face(tmp_path):
    path = hugging_face(tmp_path)
    arrays = weights(VIT)
    for name in ("text", "vision"):  # old files hold buffers
        key = f"{name}_model.embeddings.position_ids"
        save_file(
            to_hugging_face(arrays) | {key: np.arange(7)[None]}, tmp_path / "model.safetensors"
        )
    for source in (path, path / "model.safetensors"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.format == "Hugging Face safetensors"
        assert_same(checkpoint.tensors, arrays)
        heads = {"vision_heads": 4, "text_heads": 4}
        assert checkpoint.metadata == Metadata(activation="gelu", **heads)


def test_hugging_face_views(tmp_path):
    """Transposes are views of the file; only q, k, v must be copied together."""
    tensors = open_checkpoint(hugging_face(tmp_path)).tensors
    assert tensors["text_projection"].read().flags.f_contiguous
    assert not tensors["text_projection"].read().flags.owndata


@pytest.mark.parametrize(
    ("tower", "model_type"), [("image", "clip_vision_model"), ("text", "clip_text_model")]
)
def test_hugging_face_single_tower(tmp_path, tower, model_type):
    arrays = weights(VIT, towers=(tower,))
    del arrays["logit_scale"]
    save_file(to_hugging_face(arrays), tmp_path / "model.safetensors")
    config = {"model_type": model_type, "num_attention_heads": 2, "hidden_act": "gelu"}
    write_json(tmp_path / "config.json", config)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint.tensors, arrays)
    heads = {f"{'vision' if tower == 'image' else tower}_heads": 2}
    assert checkpoint.metadata == Metadata(activation="gelu", **heads)
    config = infer_config({k: t.shape for k, t in checkpoint.tensors.items()}, checkpoint.metadata)
    check_tensors(checkpoint.tensors, config, [tower])
    other = "text" if tower == "image" else "image"
    with pytest.raises(CheckpointError, match=f"no {other} tower"):
        check_tensors(checkpoint.tensors, config, ["image", "text"])


def test_open_clip(tmp_path):
    checkpoint = open_checkpoint(open_clip(tmp_path))
    assert checkpoint.format == "open_clip safetensors"
    assert_same(checkpoint.tensors, weights(VIT))
    assert checkpoint.metadata == Metadata(
        activation="quick_gelu",
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 0.5, 0.25),
        resize="squash",
        interpolation="bilinear",
        vision_heads=4,
        text_heads=2,
    )


def test_open_clip_custom_text_and_1d_logit_scale(tmp_path):
    arrays = weights(VIT)
    custom = {
        k if k.startswith(("visual.", "logit_scale")) else f"text.{k}": v for k, v in arrays.items()
    }
    custom["logit_scale"] = custom["logit_scale"].reshape(1)
    custom["text.attn_mask"] = np.zeros((7, 7), "f4")
    save_file(custom, tmp_path / "open_clip_model.safetensors")
    assert_same(open_checkpoint(tmp_path).tensors, arrays)


def test_open_clip_defaults_and_resnet(tmp_path):
    config = with_change(OPEN_CLIP_CONFIG, "model_cfg.quick_gelu", False)
    config = with_change(config, "preprocess_cfg", None)
    config = with_change(config, "model_cfg.vision_cfg", {"width": 4, "layers": [1, 2, 1, 1]})
    metadata = open_checkpoint(open_clip(tmp_path, config)).metadata
    assert metadata == Metadata(activation="gelu", vision_heads=2, text_heads=2)


def test_names_collide(tmp_path):
    arrays = weights(VIT) | {"text.text_projection": np.zeros((2, 2), "f4")}
    save_file(arrays, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"two tensors would be called text_projection"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "logit_bias",
        "visual.trunk.norm.weight",
        "text_decoder.ln_final.weight",
        "text.transformer.embeddings.x",
        "vision_model.head.probe",
        "visual.attn_pool.query",
    ],
)
def test_other_architectures(tmp_path, name):
    save_file(weights(VIT) | {name: np.zeros(1, "f4")}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"not CLIP's architecture: {name}"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_hugging_face_qkv_misfit(tmp_path, change):
    arrays = to_hugging_face(weights(VIT))
    key = "text_model.encoder.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        del arrays[key]
    else:
        arrays[key] = np.zeros((64, 65), "f4") if change == "shape" else arrays[key].astype("f2")
    save_file(arrays, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer\.resblocks\.1\.attn\.k_proj\.weight"):
        open_checkpoint(tmp_path / "m.safetensors")


# --- config files ---


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "siglip", "model_type is 'siglip', which is not CLIP"),
        ("model_type", 3, "model_type must be of type str"),
        ("text_config", [], "text_config must be an object"),
        ("text_config.hidden_act", "quick_gelu", "hidden_act differs between the towers"),
        ("vision_config.hidden_act", "gelu_new", "vision_config.hidden_act is 'gelu_new'"),
        ("vision_config.layer_norm_eps", 1e-6, "vision_config.layer_norm_eps is 1e-06"),
        ("vision_config.layer_norm_eps", "1e-5", "layer_norm_eps must be of type float"),
        ("text_config.num_attention_heads", 0, "num_attention_heads must be positive"),
        ("text_config.num_attention_heads", True, "num_attention_heads must be of type int"),
        ("text_config.eos_token_id", 7, "text_config.eos_token_id is 7, not the last"),
        ("text_config_dict", {"hidden_act": "quick_gelu"}, "differs between the towers"),
    ],
)
def test_hugging_face_config_errors(tmp_path, key, value, message):
    path = hugging_face(tmp_path, with_change(HF_CONFIG, key, value))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path / "config.json") in str(error.value)


def test_hugging_face_config_defaults(tmp_path):
    metadata = open_checkpoint(hugging_face(tmp_path, {"model_type": "clip"})).metadata
    assert metadata == Metadata(activation="quick_gelu", vision_heads=12, text_heads=8)


def test_hugging_face_without_config(tmp_path):
    (hugging_face(tmp_path) / "config.json").unlink()
    metadata = open_checkpoint(tmp_path).metadata
    assert metadata.activation is None
    with pytest.raises(UnknownActivationError):
        infer_config({k: v.shape for k, v in weights(VIT).items()}, metadata)


IMAGES = {
    "image_mean": [0.5, 0.5, 0.25],
    "image_std": [1, 1, 0.5],
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "resample": 3,
    "do_center_crop": True,
}


@pytest.mark.parametrize(
    ("change", "resize", "interpolation"),
    [
        ({}, "shortest", "bicubic"),
        ({"size": 16, "resample": 2}, "shortest", "bilinear"),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False}, "squash", "bicubic"),
        ({"size": {"height": 16, "width": 16, "shortest_edge": None}}, "squash", "bicubic"),
        ({"size": {"shortest_edge": 16, "height": None}, "crop_size": 16}, "shortest", "bicubic"),
        ({"size": None, "crop_size": None, "rescale_factor": None}, "shortest", "bicubic"),
        ({"rescale_factor": 0.003921568859368563}, "shortest", "bicubic"),  # in float32
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_preprocessor_config(tmp_path, change, resize, interpolation, nested):
    path = hugging_face(tmp_path)
    if nested:
        write_json(path / "processor_config.json", {"image_processor": IMAGES | change})
    else:
        write_json(path / "preprocessor_config.json", IMAGES | change)
    metadata = open_checkpoint(path).metadata
    assert (metadata.mean, metadata.std) == ((0.5, 0.5, 0.25), (1.0, 1.0, 0.5))
    assert (metadata.resize, metadata.interpolation) == (resize, interpolation)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5]),
        ("image_mean", "abc"),
        ("image_std", [1, True, 1]),
        ("image_std", [1, 1, 1e999]),
        ("image_std", [1, 1, 0]),
        ("resample", 1),
        ("do_normalize", False),
        ("do_rescale", False),
        ("do_resize", 0),
        ("do_center_crop", False),
    ],
)
def test_preprocessor_config_errors(tmp_path, key, value):
    path = hugging_face(tmp_path, preprocessor=IMAGES | {key: value})
    with pytest.raises(CheckpointError, match=key.removeprefix("image_")):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 17),
        ("size", {"shortest_edge": 17}),
        ("size", {"height": 16, "width": 17}),
        ("size", {"longest_edge": 16}),
        ("size", {}),
        ("size", "16"),
        ("crop_size", 8),
        ("crop_size", {"height": 8, "width": 8}),
        ("rescale_factor", 1 / 127.5),
        ("rescale_factor", 0.00392),
        ("rescale_factor", float("nan")),
        ("rescale_factor", "1/255"),
    ],
)
def test_images_of_another_size_or_range(tmp_path, key, value):
    path = hugging_face(tmp_path, preprocessor=IMAGES | {key: value})
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {key} "):
        open_checkpoint(path)


def test_a_text_tower_takes_no_images(tmp_path):
    path = hugging_face(tmp_path, preprocessor=IMAGES | {"size": 17}, towers=("text",))
    assert open_checkpoint(path).metadata.mean == Metadata().mean


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_cfg.vision_cfg.timm_model_name", "vit_base"),
        ("model_cfg.vision_cfg.attentional_pool", True),
        ("model_cfg.vision_cfg.no_ln_pre", True),
        ("model_cfg.vision_cfg.final_ln_after_pool", True),
        ("model_cfg.vision_cfg.pool_type", "avg"),
        ("model_cfg.vision_cfg.act_kwargs", {"approximate": "tanh"}),
        ("model_cfg.vision_cfg.norm_kwargs", {"eps": 1e-6}),
        ("model_cfg.vision_cfg.ls_init_value", 1e-5),
        ("model_cfg.vision_cfg.head_width", "64"),
        ("model_cfg.vision_cfg.head_width", -1),
        ("model_cfg.vision_cfg", 7),
        ("model_cfg.text_cfg.hf_model_name", "roberta-base"),
        ("model_cfg.text_cfg.hf_tokenizer_name", "some/tokenizer"),
        ("model_cfg.text_cfg.tokenizer_kwargs", {"clean": "canonicalize"}),
        ("model_cfg.text_cfg.pool_type", "last"),
        ("model_cfg.text_cfg.no_causal_mask", True),
        ("model_cfg.text_cfg.proj_bias", True),
        ("model_cfg.text_cfg.embed_cls", True),
        ("model_cfg.text_cfg.heads", 0),
        ("model_cfg.init_logit_bias", -10),
        ("model_cfg.multimodal_cfg", {"width": 64}),
        ("model_cfg.quick_gelu", "yes"),
        ("model_cfg", "ViT-B-32"),
        ("preprocess_cfg.resize_mode", "longest"),
        ("preprocess_cfg.interpolation", "random"),
        ("preprocess_cfg.mean", [0, 0]),
        ("preprocess_cfg.mode", "L"),
    ],
)
def test_open_clip_config_errors(tmp_path, key, value):
    path = open_clip(tmp_path, with_change(OPEN_CLIP_CONFIG, key, value))
    last = key.rpartition(".")[2].removesuffix("_mode")
    with pytest.raises(CheckpointError, match=last) as error:
        open_checkpoint(path)
    assert "open_clip_" in str(error.value)


@pytest.mark.parametrize("size", [17, [16, 17], {"shortest_edge": 16}])
def test_open_clip_images_of_another_size(tmp_path, size):
    path = open_clip(tmp_path, with_change(OPEN_CLIP_CONFIG, "preprocess_cfg.size", size))
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json: preprocess_cfg\.size is "):
        open_checkpoint(path)


def test_open_clip_sizes_that_are_right(tmp_path):
    for size in (16, [16, 16], None):
        open_checkpoint(
            open_clip(tmp_path, with_change(OPEN_CLIP_CONFIG, "preprocess_cfg.size", size))
        )


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", '{"a": ' * 100_000], ids=len)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_config_is_not_json(tmp_path, name, text):
    (hugging_face(tmp_path) / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path)


def test_npclip_metadata_wins(tmp_path):
    open_clip(tmp_path)
    metadata = Metadata(activation="gelu", mean=(0.1, 0.2, 0.3), resize="squash", source="x.pt")
    save_file(weights(VIT), tmp_path / "open_clip_model.safetensors", metadata.to_strings())
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.metadata) == ("npclip safetensors", metadata)


def test_openai_download_is_known_by_its_hash(tmp_path, monkeypatch):
    writer = TorchWriter()
    data = writer.archive(state_dict(writer, weights(VIT)))
    name, model = next(iter(hub.MODELS.items()))
    path = save(tmp_path / model.filename, data)
    assert open_checkpoint(path).metadata.activation is None
    ours = dataclasses.replace(model, sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(hub, "MODELS", {name: ours})
    assert open_checkpoint(path).metadata.activation == "quick_gelu"


# --- shards ---


def shards(tmp_path, rename=lambda name: name):
    arrays = to_hugging_face(weights(VIT))
    weight_map = {k: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, k in enumerate(arrays)}
    for name in sorted(set(weight_map.values())):
        part = {k: arrays[k] for k in arrays if weight_map[k] == name}
        save_file(part, tmp_path / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: rename(v) for k, v in weight_map.items()}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    write_json(tmp_path / "config.json", HF_CONFIG)
    return tmp_path


def test_shards(tmp_path):
    checkpoint = open_checkpoint(shards(tmp_path))
    assert checkpoint.path.name == "model.safetensors.index.json"
    assert len(checkpoint.files) == 2
    assert_same(checkpoint.tensors, weights(VIT))
    content = b"".join(file.path.read_bytes() for file in checkpoint.files)
    assert checkpoint.sha256() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/b", "..", ".", "", "C:\\x", "..\\x", "a\0b", 7, None],
)
def test_shards_cannot_leave_the_directory(tmp_path, name):
    path = shards(tmp_path, lambda _: name)
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(path)


def test_shard_missing(tmp_path):
    (shards(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*No such file"):
        open_checkpoint(tmp_path)


def test_shards_overlap(tmp_path):
    path = shards(tmp_path)
    first = (path / "model-00001-of-00002.safetensors").read_bytes()
    (path / "model-00002-of-00002.safetensors").write_bytes(first)
    with pytest.raises(CheckpointError, match="also in another shard"):
        open_checkpoint(tmp_path)


def test_index_of_a_name_that_no_file_has(tmp_path):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "\ud800"}})
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, []])
def test_index_errors(tmp_path, index):
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


# --- files that are no checkpoint ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\n <?xml version='1.0'?>", "HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", r"written by torch < 1\.6"),
        (b"\x80\x04N.", "bare pickle"),
        (b"\x89PNG\r\n\x1a\n", "neither a safetensors nor a torch file"),
        (b"x", "neither"),
        (b"PK\3\4", "damaged or truncated ZIP"),
        (b"\xff" * 8 + b"{", "not a valid safetensors"),
        (b"\x02" + b"\0" * 7 + b"{}", "not a CLIP model"),
    ],
)
def test_wrong_content(tmp_path, content, message):
    path = save(tmp_path / "ViT.pt", content)
    with pytest.raises(CheckpointError, match=message) as error:
        shapes = {k: t.shape for k, t in open_checkpoint(path).tensors.items()}
        infer_config(shapes, Metadata())
    assert str(path) in str(error.value) or "not a CLIP" in message


def test_missing_path_and_empty_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pt: cannot be read"):
        open_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"looked for .*model\.safetensors.*pytorch_model"):
        open_checkpoint(tmp_path)


def test_unsupported_dtype(tmp_path):
    spec = {"x": {"dtype": "uint32", "shape": [1], "data": bytes(4)}}
    try:
        data = serialize(spec)
    except TypeError:  # the library's interface changed; its file format did not
        header = b'{"x":{"dtype":"U32","shape":[1],"data_offsets":[0,4]}}'
        data = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(CheckpointError, match="tensor x has dtype U32"):
        open_checkpoint(save(tmp_path / "m", data))


def safetensors_bytes() -> bytes:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "F16", "shape": [], "data_offsets": [24, 26]},
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + bytes(range(26))


FILE = safetensors_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[2, 3]", b"[2, 4]"),
        (b"[2, 3]", b"[2,-3]"),
        (b"[0, 24]", b"[0, 99]"),
        (b"[0, 24]", b"[4, 24]"),
        (b"[24, 26]", b"[23, 25]"),
        (b"F32", b"F64"),
        (b"F32", b"X32"),
        (b'"a"', b'"b"'),
        (b"}}", b"}]"),
        (b'"pt"', b"1234"),
    ],
)
def test_header_lies(tmp_path, old, new):
    assert old in FILE
    with pytest.raises(CheckpointError, match="m: not a valid safetensors file"):
        open_checkpoint(save(tmp_path / "m", FILE.replace(old, new)))


quick = settings(max_examples=300, deadline=2000, suppress_health_check=list(HealthCheck))


@quick
@given(cut=st.integers(0, len(FILE) - 1))
def test_truncated_safetensors(tmp_path, cut):
    with pytest.raises(CheckpointError):
        open_checkpoint(save(tmp_path / "m", FILE[:cut]))


@quick
@given(at=st.integers(0, len(FILE) - 27), bits=st.integers(1, 255))
def test_any_byte_of_the_header_changed(tmp_path, at, bits):
    """safetensors has no checksum: names and shapes may change, but nothing else may happen."""
    data = bytearray(FILE)
    data[at] ^= bits
    try:
        tensors = open_checkpoint(save(tmp_path / "m", bytes(data))).tensors
    except CheckpointError:
        return
    for tensor in tensors.values():
        assert tensor.read().shape == tensor.shape


# --- check_tensors ---


def tensors_of(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: Tensor(v.shape, v.dtype.name, lambda v=v: v) for k, v in arrays.items()}


def test_check_tensors():
    arrays = weights(VIT)
    check_tensors(tensors_of(arrays), VIT, ["image"])  # the text tower is not unexpected
    check_tensors(tensors_of(arrays), VIT, ("image", "text"))
    for change, message in [
        ({"visual.ln_post.bias": None}, r"1 tensors are missing: visual\.ln_post\.bias"),
        ({"logit_scale": None}, "missing: logit_scale"),
        ({"extra.x": np.zeros(1)}, r"1 tensors do not belong to CLIP: extra\.x"),
        (
            {"visual.proj": np.zeros((64, 17))},
            r"visual\.proj has shape \[64, 17\] where \[64, 16\] is wanted",
        ),
        ({"ln_final.bias": np.zeros(64, int)}, r"ln_final\.bias holds int64"),
    ]:
        changed = {k: v for k, v in (arrays | change).items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            check_tensors(tensors_of(changed), VIT, ("image", "text"))


def test_checkpoint_has_the_documented_fields():
    names = [field.name for field in dataclasses.fields(Checkpoint)]
    assert names == ["path", "format", "tensors", "metadata", "files"]
