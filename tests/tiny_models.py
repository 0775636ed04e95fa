"""Tiny CLIP models with random weights, in openai/CLIP's names: what the checkpoint tests save."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

from npclip.config import Config, Metadata, tensor_shapes

VIT = Config(
    embed_dim=16,
    image_resolution=16,
    vision_layers=2,
    vision_width=64,
    vision_patch_size=8,
    vision_heads=1,
    vision_mlp=256,
    context_length=7,
    vocab_size=11,
    transformer_width=64,
    transformer_heads=1,
    transformer_layers=2,
    transformer_mlp=256,
)
RESNET = Config(
    embed_dim=16,
    image_resolution=32,
    vision_layers=(1, 2, 1, 1),
    vision_width=4,
    vision_patch_size=0,
    vision_heads=2,
    vision_mlp=16,
    context_length=7,
    vocab_size=11,
    transformer_width=64,
    transformer_heads=1,
    transformer_layers=1,
    transformer_mlp=256,
)
WORDS = dataclasses.replace(VIT, context_length=77, vocab_size=49408)


def weights(
    config: Config, dtype: str = "float32", towers: tuple[str, ...] = ("image", "text")
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(config, towers)
    return {name: np.asarray(rng.normal(size=s)).astype(dtype) for name, s in shapes.items()}


def save_words(folder: Path) -> Path:
    """A checkpoint of VIT with random weights that knows every text."""
    path = folder / "words.safetensors"
    save_file(random_tensors(WORDS), path, Metadata(activation="gelu").to_strings())
    return path


def to_hugging_face(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers.CLIPModel's names and layout, written independently of npclip.key_names."""
    result = {}
    for name, array in arrays.items():
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        rest = name.removeprefix("visual.")
        if rest.startswith("transformer.resblocks."):
            layer, rest = rest.removeprefix("transformer.resblocks.").split(".", 1)
            block = f"{tower}.encoder.layers.{layer}."
            kind = rest.rsplit("_" if "in_proj" in rest else ".", 1)[1]
            if "in_proj" in rest:
                third = len(array) // 3
                result[f"{block}self_attn.q_proj.{kind}"] = array[:third].copy()
                result[f"{block}self_attn.k_proj.{kind}"] = array[third : 2 * third].copy()
                result[f"{block}self_attn.v_proj.{kind}"] = array[2 * third :].copy()
                continue
            module = {
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }[rest.removesuffix(f".{kind}")]
            result[f"{block}{module}.{kind}"] = array
            continue
        if name in ("visual.proj", "text_projection"):
            key = "visual_projection" if tower == "vision_model" else "text_projection"
            result[f"{key}.weight"] = np.ascontiguousarray(array.T)
            continue
        if name == "logit_scale":
            result[name] = array
            continue
        result[
            {
                "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
                "positional_embedding": "text_model.embeddings.position_embedding.weight",
                "ln_final.weight": "text_model.final_layer_norm.weight",
                "ln_final.bias": "text_model.final_layer_norm.bias",
                "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
                "visual.class_embedding": "vision_model.embeddings.class_embedding",
                "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
                "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
                "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
                "visual.ln_post.weight": "vision_model.post_layernorm.weight",
                "visual.ln_post.bias": "vision_model.post_layernorm.bias",
            }[name]
        ] = array
    return result


def bfloat16_file(arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors file of the upper halves of float32 arrays."""
    header, data = {}, b""
    for name, array in arrays.items():
        halves = (array.view("u4") >> 16).astype("u2").tobytes()
        offsets = [len(data), len(data) + len(halves)]
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": offsets}
        data += halves
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def assert_same(tensors: dict, arrays: dict[str, np.ndarray]) -> None:
    """Every tensor is there, and bit for bit the same."""
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        read = tensors[name].read()
        assert tensors[name].shape == read.shape == array.shape, name
        assert read.dtype == array.dtype, name
        assert read.tobytes() == array.tobytes(), name
