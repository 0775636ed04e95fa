"""openai/CLIP's initialisation (CLIP.initialize_parameters and torch's defaults below it)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..config import Config, tensor_shapes
from .loss import INITIAL_LOGIT_SCALE
from .parameters import Flat, check_trainable


def initialize(config: Config, seed: int = 0) -> Flat:
    """float32 parameters of a new model. The same seed gives the same bits.

    Raises InputError for a ResNet, or a config without both towers.
    """
    check_trainable(config)
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(config)
    return {
        name: np.asarray(_values(rng, name, shape, config), np.float32)
        for name, shape in shapes.items()
    }


def _values(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], config: Config
) -> float | NDArray[np.float64]:
    if name == "logit_scale":
        return INITIAL_LOGIT_SCALE
    if ".ln_" in name or name.startswith("ln_"):
        return np.full(shape, float(name.endswith("weight")))
    if name.endswith(("in_proj_bias", "out_proj.bias")):
        return np.zeros(shape)
    if (bound := _bound(name, shape)) is not None:
        return rng.uniform(-bound, bound, shape)
    return rng.standard_normal(shape) * _deviation(name, config)


def _bound(name: str, shape: tuple[int, ...]) -> float | None:
    """Of a uniform distribution: what torch's layers start with, where openai/CLIP leaves it."""
    if name.endswith(("c_fc.bias", "c_proj.bias")):  # 1 / sqrt(inputs), 4 or 1/4 of the outputs
        return float((shape[0] / 4 if "c_fc" in name else shape[0] * 4) ** -0.5)
    if not name.startswith("visual.") or name.endswith(("embedding", "visual.proj")):
        return None
    if name.endswith("in_proj_weight"):  # Xavier
        return float((6 / sum(shape)) ** 0.5)
    return float(np.prod(shape[1:]) ** -0.5)


def _deviation(name: str, config: Config) -> float:
    """Of a normal distribution."""
    if name.startswith("visual."):
        return float(config.vision_width**-0.5)
    width, layers = config.transformer_width, config.transformer_layers
    deviations = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
        "attn.in_proj_weight": width**-0.5,
        "attn.out_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "mlp.c_fc.weight": (2 * width) ** -0.5,
        "mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
    }
    return float(next(value for key, value in deviations.items() if name.endswith(key)))
