"""How the weights of linear and conv2d are kept: rounded, and in the layout of a kernel. A leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of a kernel of one ISA (kernels/linear.c; a LayerNorm's as it is)."""

    shape: tuple[int, ...]  # of the weight: [M, K], [O, k, k, C] or [D]
    dtype: str  # as stored: f32, f16 or bf16
    isa: str
    buffer: NDArray[Any]
    result: str  # how what the op returns is stored: f32 or bf16

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


def round_to(weight: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A weight as a model of this dtype uses it, in float32: what a kernel's storage stands for."""
    if dtype == "bfloat16":
        return from_bfloat16(to_bfloat16(weight))
    if dtype == "float16" and weight.ndim == 2:  # convolutions hold a folded BatchNorm
        weight = to_float16(weight)
    return weight.astype(np.float32, copy=False)


def to_float16(x: NDArray[Any]) -> NDArray[np.float16]:
    """Rounded to float16. Raises CheckpointError where a value is too large."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        raise CheckpointError("a weight is too large for float16: use float32 or bfloat16")
    return half


def to_bfloat16(x: NDArray[Any]) -> NDArray[np.uint16]:
    """float32 (or float16) -> bfloat16 bit patterns, rounded to nearest even; NaN stays NaN.

    Adding half of the last place kept, less one where it is even, carries into it exactly where
    rounding goes up.
    """
    x = np.ascontiguousarray(x, np.float32).reshape(x.shape)
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bit patterns -> the same values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
