"""Trainable parameters: arrays by openai/CLIP's names, and what goes from there to the towers.

Flat is how they are kept, updated and saved; nested views of them are what the towers read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..checkpoint import check_tensors, towers_of
from ..clip import TOWERS, open_model
from ..config import Config, Metadata, tensor_shapes
from ..errors import InputError
from ..ops import Array, Parameters
from ..params import as_float32, nest
from . import ops

Flat: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class Freeze:
    """What is not trained.

    Of each tower a number of blocks, the lowest, and what embeds patches or tokens below them; 0
    trains all, and "all" is the whole tower.
    """

    image: int | str = 0
    text: int | str = 0
    logit_scale: bool = False

    def stages(self, tower: str, config: Config) -> int | None:
        """How many of the lowest stages (embedding, then blocks) are frozen; None: the whole tower.

        Raises InputError for a number that the tower does not have.
        """
        layers = config.vision_layers if tower == "image" else config.transformer_layers
        frozen = getattr(self, tower)
        if frozen == "all":
            return None
        if not isinstance(frozen, int) or not isinstance(layers, int) or not 0 <= frozen <= layers:
            raise InputError(f"Freeze: {tower}={frozen!r} is neither 0 .. {layers} nor 'all'")
        return frozen + 1 if frozen else 0


def from_checkpoint(
    name_or_path: str | os.PathLike[str],
    download_root: str | os.PathLike[str] | None = None,
    activation: str | None = None,
) -> tuple[Flat, Config, Metadata]:
    """The float32 parameters of any model that npclip.load reads, to start from.

    Arguments and errors are those of load(); InputError for a ResNet, or a model of one tower.
    """
    checkpoint, config = open_model(name_or_path, download_root, activation)
    check_trainable(config)
    check_tensors(checkpoint.tensors, config, TOWERS)
    params = {}
    for name in tensor_shapes(config):
        params[name] = np.array(as_float32(name, checkpoint.tensors[name]))
        checkpoint.release()
    return params, config, checkpoint.metadata


def check_trainable(config: Config) -> None:
    """Raises InputError unless there are a Vision Transformer and a text tower."""
    if tuple(towers_of(config)) != TOWERS:
        raise InputError("training needs both towers")
    if not config.is_vit:
        raise InputError("only Vision Transformers are trained, and this image tower is a ResNet")


def nested(params: Flat, config: Config, dtype: str = "float32") -> Parameters:
    """What the towers read: views, but for matrices in "float16" or "bfloat16", which are copies.

    On a CPU that multiplies bfloat16 "bfloat16" is how matrices, and what they are multiplied with,
    are rounded for that; all is stored in float32. Raises InputError for another dtype.
    """
    if dtype not in ops.STORED:
        raise InputError(f"dtype {dtype!r} is not one of: {', '.join(ops.STORED)}")
    if dtype == "bfloat16" and ops.multiplies_bfloat16(params["logit_scale"]):
        return ops.rounded(nest(params, config, TOWERS))
    stored = {k: ops.narrow(v, ops.STORED[dtype]) for k, v in params.items() if is_matrix(k, v)}
    return nest(params | stored, config, TOWERS)


def is_matrix(name: str, array: Array) -> bool:
    """Whether it is the weight of a linear: what is stored as the model's dtype."""
    return array.ndim >= 2 and "embedding" not in name


def flatten(gradients: Parameters, tower: str, config: Config) -> Flat:
    """One tower's gradients, nested as its parameters are -> by openai/CLIP's names.

    Empty dicts, of what is frozen, leave nothing.
    """
    prefix = "visual." if tower == "image" else ""
    flat = {prefix + name: array for name, array in _walk(gradients)}
    if "visual.conv1.weight" in flat:
        patch = config.vision_patch_size
        flat["visual.conv1.weight"] = flat["visual.conv1.weight"].reshape(-1, 3, patch, patch)
    return flat


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Array]]:
    """Leaves with their names, as params.nest took them apart."""
    if isinstance(node, list):
        for i, child in enumerate(node):
            yield from _walk(child, f"{path}.{i}")
        return
    if not isinstance(node, dict):
        yield path, node
        return
    if "kv_proj" in node:
        q, kv = node["q_proj"], node["kv_proj"]
        joined = {key: np.concatenate([q[key], kv[key]]) for key in q}
        node = {"in_proj": joined, "out_proj": node["out_proj"]}
    for key, child in node.items():
        if key in ("proj", "text_projection"):
            yield key, child["weight"].T
        elif key == "token_embedding":
            yield "token_embedding.weight", child
        elif key == "in_proj":
            yield from ((f"{path}.in_proj_{leaf}", array) for leaf, array in child.items())
        else:
            key = "transformer.resblocks" if key == "resblocks" else key
            yield from _walk(child, f"{path}.{key}" if path else key)
