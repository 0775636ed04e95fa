"""Files written by torch, transformers and open_clip themselves load to identical parameters."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import import_openai_clip

from npclip.checkpoint import check_tensors, open_checkpoint
from npclip.config import infer_config
from npclip.convert import convert
from npclip.errors import CheckpointError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the packages deprecate at import is not our concern
    clip_model = import_openai_clip().model
BUFFERS = {"input_resolution": 64, "context_length": 77, "vocab_size": 1000}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build(kind: str, precision: str = "float32"):
    """A small official CLIP; precision "mixed" is convert_weights' float16 and float32."""
    torch.manual_seed(0)
    vision = {"vit": (2, 128, 32), "resnet": ((1, 2, 1, 1), 16, None)}[kind]
    model = clip_model.CLIP(64, 64, *vision, 77, 1000, 128, 2, 2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    if precision == "mixed":
        clip_model.convert_weights(model)
    else:
        model.to(DTYPES[precision])
    return model


def state(model) -> dict:
    return {k: v for k, v in model.state_dict().items() if "num_batches" not in k}


def assert_identical(path: Path, expected: dict, *, activation="quick_gelu"):
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(expected)
    for name, want in expected.items():
        tensor = checkpoint.tensors[name]
        assert f"torch.{tensor.dtype}" == str(want.dtype), name
        assert tensor.shape == tuple(want.shape), name
        if want.dtype == torch.bfloat16:
            want = want.view(torch.uint16)
        assert tensor.read().tobytes() == want.contiguous().numpy().tobytes(), name
    assert checkpoint.metadata.activation == activation
    if activation:
        shapes = {k: t.shape for k, t in checkpoint.tensors.items()}
        config = infer_config(shapes, checkpoint.metadata)
        check_tensors(checkpoint.tensors, config, ("image", "text"))
    return checkpoint


@pytest.mark.parametrize("precision", ["mixed", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_torch_save(tmp_path, kind, precision):
    model = build(kind, precision)
    plain, expected = model.state_dict(), state(model)
    wrapped = {f"module.{k}": v for k, v in plain.items()}
    optimizer = torch.optim.AdamW(model.parameters())
    model.logit_scale.sum().backward()
    optimizer.step()
    files = {
        "plain.pt": plain,
        "wrapped.pt": {"epoch": 3, "state_dict": wrapped, "optimizer": optimizer.state_dict()},
        "model.pth": {"model": dict(plain), "loss": 0.5, "dtype": torch.float16},
        "parameters.bin": {
            k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in plain.items()
        },
    }
    expected = {k: v.clone() for k, v in expected.items()}
    for name, value in files.items():
        torch.save(value, tmp_path / name)
        assert_identical(tmp_path / name, expected, activation=None)
    torch.save(plain, tmp_path / "protocol.pt", pickle_protocol=4)
    assert_identical(tmp_path / "protocol.pt", expected, activation=None)


def test_torch_save_without_crc(tmp_path):
    model = build("vit")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_identical(tmp_path / "m.pt", state(model), activation=None)


def test_legacy_format(tmp_path):
    torch.save({}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"written by torch < 1\.6"):
        open_checkpoint(tmp_path / "m.pt")


def test_strided_tensors(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {"t": base.permute(2, 0, 1), "step": base[::2, 1:, ::3], "row": base[1], "all": base}
    torch.save(tensors, tmp_path / "m.pt")
    assert_identical(tmp_path / "m.pt", tensors, activation=None)


def test_whole_module_is_refused(tmp_path):
    torch.save(build("vit"), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"clip\.model\.CLIP.*nothing was executed"):
        open_checkpoint(tmp_path / "m.pt")


class Dispatch(torch.nn.Module):
    """Both encoders as one traceable forward."""

    def __init__(self, model) -> None:
        super().__init__()
        for name, module in model.named_children():
            setattr(self, name, module)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name, value in BUFFERS.items():
            self.register_buffer(name, torch.tensor(value))

    forward = clip_model.CLIP.forward
    encode_image = clip_model.CLIP.encode_image
    encode_text = clip_model.CLIP.encode_text
    dtype = clip_model.CLIP.dtype


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_torchscript(tmp_path, kind, half):
    model = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = (torch.zeros(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.int32))
        traced = torch.jit.trace(Dispatch(model).eval(), inputs, check_trace=False)
        if half:
            clip_model.convert_weights(model)  # in place: the traced parameters are the same
        torch.jit.save(traced, tmp_path / "m.pt")
    checkpoint = assert_identical(tmp_path / "m.pt", state(model))
    assert checkpoint.format == "OpenAI TorchScript"
    assert checkpoint.tensors["visual.conv1.weight"].dtype == ("float16" if half else "float32")


def test_scripted_module(tmp_path):
    model = build("vit").transformer.resblocks[0].mlp
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), tmp_path / "m.pt")
    assert_identical_part(tmp_path / "m.pt", model.state_dict())


def assert_identical_part(path: Path, expected: dict) -> None:
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(expected)
    for name, want in expected.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), want.numpy())


def hugging_face_model(transformers, precision: str, act: str = "quick_gelu"):
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 128}
    common |= {"intermediate_size": 512, "hidden_act": act, "projection_dim": 64}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(
        text_config=common | {"vocab_size": 1000, "eos_token_id": 999},
        vision_config=common | {"image_size": 64, "patch_size": 32},
        projection_dim=64,
    )
    return transformers.CLIPModel(config).to(DTYPES[precision]).eval()


def official_from_hugging_face(model) -> dict:
    """The official model's state_dict, copied module by module, not by names."""
    official = clip_model.CLIP(64, 64, 2, 128, 32, 77, 1000, 128, 2, 2).to(model.dtype)

    def copy(target, source) -> None:
        assert target.shape == source.shape
        target.data.copy_(source.data)

    def module(target, source) -> None:
        copy(target.weight, source.weight)
        if getattr(source, "bias", None) is not None:
            copy(target.bias, source.bias)

    def blocks(target, source) -> None:
        for ours, theirs in zip(target.resblocks, source.layers, strict=True):
            attention = theirs.self_attn
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            copy(ours.attn.in_proj_weight, torch.cat([m.weight for m in qkv]))
            copy(ours.attn.in_proj_bias, torch.cat([m.bias for m in qkv]))
            module(ours.attn.out_proj, attention.out_proj)
            module(ours.ln_1, theirs.layer_norm1)
            module(ours.ln_2, theirs.layer_norm2)
            module(ours.mlp.c_fc, theirs.mlp.fc1)
            module(ours.mlp.c_proj, theirs.mlp.fc2)

    text, vision = model.text_model, model.vision_model
    module(official.token_embedding, text.embeddings.token_embedding)
    copy(official.positional_embedding, text.embeddings.position_embedding.weight)
    blocks(official.transformer, text.encoder)
    module(official.ln_final, text.final_layer_norm)
    copy(official.text_projection, model.text_projection.weight.T)
    module(official.visual.conv1, vision.embeddings.patch_embedding)
    copy(official.visual.class_embedding, vision.embeddings.class_embedding)
    copy(official.visual.positional_embedding, vision.embeddings.position_embedding.weight)
    module(official.visual.ln_pre, vision.pre_layrnorm)
    blocks(official.visual.transformer, vision.encoder)
    module(official.visual.ln_post, vision.post_layernorm)
    copy(official.visual.proj, model.visual_projection.weight.T)
    copy(official.logit_scale, model.logit_scale)
    quick_gelu = model.config.text_config.hidden_act == "quick_gelu"
    if model.dtype == torch.float32 and quick_gelu:  # they agree, so the copy is right
        ids = torch.randint(0, 999, (2, 77))
        ids[:, 50] = 999
        pixels = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            theirs = model(input_ids=ids, pixel_values=pixels).logits_per_image
            torch.testing.assert_close(official(pixels, ids)[0], theirs, rtol=1e-4, atol=1e-4)
    return official.state_dict()


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_hugging_face(tmp_path, precision):
    transformers = pytest.importorskip("transformers")
    model = hugging_face_model(transformers, precision)
    expected = official_from_hugging_face(model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for directory in ("one", "shards"):
        checkpoint = assert_identical(tmp_path / directory, expected)
        assert checkpoint.format == "Hugging Face safetensors"
        assert (checkpoint.metadata.vision_heads, checkpoint.metadata.text_heads) == (2, 2)
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    config = (tmp_path / "one" / "config.json").read_text()
    (tmp_path / "bin" / "config.json").write_text(config)
    assert_identical(tmp_path / "bin", expected)


def test_hugging_face_gelu_and_preprocessor(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = hugging_face_model(transformers, "float32", "gelu")
    model.save_pretrained(tmp_path)
    processor_class = getattr(transformers, "CLIPImageProcessorPil", None)
    processor_class = processor_class or transformers.CLIPImageProcessor
    sizes = {"size": {"shortest_edge": 64}, "crop_size": 64}
    processor_class(image_mean=[0.1, 0.2, 0.3], resample=2, **sizes).save_pretrained(tmp_path)
    metadata = assert_identical(
        tmp_path, official_from_hugging_face(model), activation="gelu"
    ).metadata
    assert metadata.mean == (0.1, 0.2, 0.3)
    assert (metadata.resize, metadata.interpolation) == ("shortest", "bilinear")


@pytest.mark.parametrize("tower", ["Text", "Vision"])
def test_hugging_face_single_tower(tmp_path, tower):
    transformers = pytest.importorskip("transformers")
    whole = hugging_face_model(transformers, "float32", "gelu")
    expected = official_from_hugging_face(whole)
    vision = tower == "Vision"
    config = whole.config.vision_config if vision else whole.config.text_config
    model = getattr(transformers, f"CLIP{tower}ModelWithProjection")(config)
    model.load_state_dict(whole.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.metadata.activation == "gelu"
    names = {k for k in expected if k.startswith("visual.") == vision} - {"logit_scale"}
    assert set(checkpoint.tensors) == names
    for name in names:
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), expected[name].numpy())


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip(tmp_path, precision, custom_text, quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    vision = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 32, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 1000, "width": 128, "heads": 2, "layers": 2}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    torch.manual_seed(2)
    cls = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = cls(**config).to(DTYPES[precision])
    state_dict = model.state_dict()
    tensors = {k: v.contiguous() for k, v in state_dict.items()}
    (tmp_path / "sf").mkdir()
    (tmp_path / "bin").mkdir()
    safetensors_torch.save_file(tensors, tmp_path / "sf" / "open_clip_model.safetensors")
    torch.save({"state_dict": state_dict}, tmp_path / "bin" / "open_clip_pytorch_model.bin")
    content = {"model_cfg": config | {"custom_text": custom_text}, "preprocess_cfg": {}}
    expected = {k.removeprefix("text."): v for k, v in state_dict.items() if "attn_mask" not in k}
    for directory in ("sf", "bin"):
        (tmp_path / directory / "open_clip_config.json").write_text(json.dumps(content))
        activation = "quick_gelu" if quick_gelu else "gelu"
        checkpoint = assert_identical(tmp_path / directory, expected, activation=activation)
        assert (checkpoint.metadata.vision_heads, checkpoint.metadata.text_heads) == (4, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_casts_like_torch(tmp_path, dtype):
    model = build("resnet")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors", dtype=dtype, activation="quick_gelu")
    reference = build("resnet")
    clip_model.convert_weights(reference)
    tensors = open_checkpoint(tmp_path / "m.safetensors").tensors
    for name, value in state(model).items():
        if state(reference)[name].dtype == torch.float16:  # cast by the official code
            value = value.to(DTYPES[dtype])
        assert f"torch.{tensors[name].dtype}" == str(value.dtype), name
        value = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
        assert tensors[name].read().tobytes() == value.contiguous().numpy().tobytes(), name


READ_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # any import of torch fails from here on
from npclip.checkpoint import open_checkpoint
from npclip.convert import convert
total = sum(float(t.read().sum()) for t in open_checkpoint(sys.argv[1]).tensors.values())
convert(sys.argv[1], sys.argv[2], activation="quick_gelu")
print(total)
"""


def test_torch_is_never_imported(tmp_path):
    model = build("vit")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    command = [sys.executable, "-c", READ_WITHOUT_TORCH, tmp_path / "m.pt", tmp_path / "out"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    total = sum(float(v.numpy().sum()) for v in state(model).values())
    assert float(output) == pytest.approx(total, rel=1e-6)
    assert_identical(tmp_path / "out", state(model))
