"""What a case of bench_kernels.py is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """One call of an op: float32 arguments by name, of reference.py's function and of cpu.py's."""

    flop: float
    arguments: dict[str, Any]
    weight: NDArray[np.float32] | None = None  # what is packed for a kernel, if anything
    kernel_arguments: dict[str, Any] | None = None  # where they are others
    activations: tuple[str, ...] = ()  # arguments that come from another op, so may be bfloat16
    stored: tuple[str, ...] = ()  # arguments that a kernel for float16 takes in float16
    nbytes: int | None = None  # that move beside the weight, where it is not all of the arrays


@dataclass(frozen=True)
class Op:
    """axes: of a shape, as it is written. cases: shape -> where CLIP has it."""

    axes: str
    work: Callable[..., Work]  # of the sizes; ValueError where they do not fit
    cases: dict[Shape, str]


def normal(*shape: int) -> NDArray[np.float32]:
    """Values of a normal distribution, the same for every call."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
