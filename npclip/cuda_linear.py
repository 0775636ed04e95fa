"""Launches of linear: kernels/linear.cu on every GPU, kernels/linear_hopper.cu on Hopper.

A variant is a way to cut the result into tiles. Which is fastest depends on the GPU and the shape:
variants() are those worth timing, and linear() has a guess where nothing was timed.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from . import cuda_rows
from .cuda_launch import Kernel, Launch, TensorMap, ceil_div, stored

Array = Any

ACTIVATIONS = dict[str | None, int](cuda_rows.ACTIVATIONS) | {None: 0}
HEADERS = "common.cuh", "linear.cuh"
ALIGNMENT = 8  # values that the length and the stride of a row are a multiple of


@dataclass(frozen=True)
class Variant:
    """One tiling: tile_n rows x tile_m columns of y in a block, tile_k of K at a time."""

    tile_n: int
    tile_m: int
    tile_k: int
    stages: int  # tiles of x and w in shared memory
    warps: tuple[int, int, int] = (1, 1, 1)  # of a block along N, M and K
    capability: tuple[int, int] = (8, 0)  # of a GPU, at least; a variant of one arch: exactly
    arch: str = ""  # the only one it compiles for, if there is only one
    cluster: tuple[int, int] = (1, 1)  # blocks along N and M that share their tiles of w and x

    def __str__(self) -> str:
        """128x128x32x4: tile_n, tile_m, tile_k, stages; of a cluster, its size, too"""
        tile = f"{self.tile_n}x{self.tile_m}x{self.tile_k}x{self.stages}"
        return f"{tile} {self.cluster[0]}x{self.cluster[1]} sm_{self.arch}" if self.arch else tile

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability runs it."""
        if self.arch:
            return capability == self.capability
        return capability >= self.capability


_HALF = (
    Variant(16, 32, 128, 4, (1, 1, 4)),
    Variant(32, 32, 128, 3, (1, 1, 4)),
    Variant(64, 64, 64, 4, (2, 2, 1)),
    Variant(128, 64, 64, 3, (2, 2, 1)),
    Variant(128, 128, 32, 4, (2, 2, 1)),
    Variant(128, 128, 64, 3, (2, 2, 1)),
)
_TURING = (  # 64 KB of shared memory, and copies that are not asynchronous
    Variant(16, 32, 128, 2, (1, 1, 4), (7, 5)),
    Variant(64, 64, 64, 2, (2, 2, 1), (7, 5)),
    Variant(128, 128, 32, 2, (2, 2, 1), (7, 5)),
)
_HOPPER = (
    Variant(128, 128, 64, 7, (4, 1, 1), (9, 0), "90a", (2, 1)),
    Variant(64, 256, 64, 5, (4, 1, 1), (9, 0), "90a", (2, 1)),
)
_FLOAT = (Variant(64, 64, 16, 3, (4, 2, 1), (7, 5)),)


def variants(dtype: str) -> tuple[Variant, ...]:
    """Those worth timing for this dtype (f16, bf16 or f32), of all GPUs: see Variant.runs_on."""
    if dtype == "f32":
        return _FLOAT
    return (*(_TURING if dtype == "f16" else ()), *_HALF, *_HOPPER)


def worth_timing(dtype: str, n: int, capability: tuple[int, int]) -> list[Variant]:
    """Those that may be the fastest for n rows on a GPU of that capability."""
    found = [variant for variant in variants(dtype) if variant.runs_on(capability)]
    if dtype == "f32" or capability < (8, 0):
        return found
    found = [variant for variant in found if variant not in _TURING]
    has_hopper = any(variant.arch for variant in found)

    def fits(variant: Variant) -> bool:
        if variant.tile_n >= 128 or variant.arch:
            return n > 64 and (bool(variant.arch) or not has_hopper)
        if variant.tile_m < 64:
            return n <= 256
        return n <= 512 or not has_hopper

    return [variant for variant in found if fits(variant)]


def fingerprint() -> str:
    """Of all that the variants are compiled from: where it is the same, so is their speed."""
    names = "linear.cu", "linear_hopper.cu", *HEADERS
    sources = [(files("npclip.kernels") / name).read_text() for name in names]
    text = "".join([*sources, repr((_HALF, _TURING, _HOPPER, _FLOAT))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def default_variant(
    dtype: str, n: int, m: int, capability: tuple[int, int] | None = None
) -> Variant:
    """A good one for y [n, m] where none was timed, on a GPU of that capability.

    Few rows get low tiles. Otherwise it is the largest tile of which there are about as many as an
    A100 or H100 has processors. Without a capability, one that runs on all GPUs.
    """
    if dtype == "f32":
        return _FLOAT[0]
    if dtype == "f16" and (capability is None or capability < (8, 0)):
        low, medium, high = _TURING
    else:
        low, medium, high = _HALF[0 if n <= 16 else 1], _HALF[2], _HALF[4]
    if n <= 32:
        return low
    return high if ceil_div(n, high.tile_n) * ceil_div(m, high.tile_m) >= 96 else medium


def linear(
    x: Array,
    weight: Array,
    bias: Array,
    activation: str | None,
    residual: Array,
    y: Array,
    variant: Variant | None = None,
    residual_first: bool = False,
) -> Launch:
    """y = reference.linear(x, weight, bias, activation, residual)

    x [N, K], weight [M, K] with a stride of their rows, all multiples of 16 bytes; y [N, M] of x's
    dtype or float32, and residual likewise. residual_first: it is added before the activation.
    """
    (n, k), m, dtype = x.shape, weight.shape[0], stored(x)
    variant = variant or default_variant(dtype, n, m)
    first = residual_first and residual is not None
    kernel = _kernel(variant, dtype, stored(y), activation, first)
    shared, size = _shared_bytes(variant, dtype), map(np.int32, (n, m, k))
    along_n, along_m = variant.cluster
    tiles = ceil_div(n, variant.tile_n * along_n) * ceil_div(m, variant.tile_m * along_m)
    if variant.arch:
        x_map = TensorMap(x, (variant.tile_n // along_m, variant.tile_k))
        w_map = TensorMap(weight, (variant.tile_m // along_n, variant.tile_k))
        arguments = x_map, w_map, bias, residual, y, *size
        cluster = along_n * along_m
        return Launch(kernel, (tiles * cluster, 1, 1), 384, shared, arguments, stays=cluster)
    strides = (np.int64(a.strides[0] // a.dtype.itemsize) for a in (x, weight))
    arguments = x, weight, bias, residual, y, *size, *strides
    return Launch(kernel, (tiles, 1, 1), 32 * math.prod(variant.warps), shared, arguments)


@cache
def _kernel(
    variant: Variant, dtype: str, result: str, activation: str | None, residual_first: bool
) -> Kernel:
    defines = {
        "TILE_N": variant.tile_n,
        "TILE_M": variant.tile_m,
        "TILE_K": variant.tile_k,
        "STAGES": variant.stages,
        "ACTIVATION": ACTIVATIONS[activation],
        "RESIDUAL_FIRST": int(residual_first),
        "RESULT_F32": int(result == "f32"),
    }
    if variant.arch:
        along_n, along_m = variant.cluster
        defines |= {"CLUSTER_N": along_n, "CLUSTER_M": along_m}
    elif dtype != "f32":
        defines |= zip(("WARPS_N", "WARPS_M", "WARPS_K"), variant.warps, strict=True)
    file = "linear_hopper" if variant.arch else "linear"
    return Kernel(file, "linear", dtype, tuple(defines.items()), HEADERS, variant.arch)


def _shared_bytes(variant: Variant, dtype: str) -> int:
    values = variant.stages * (variant.tile_n + variant.tile_m) * variant.tile_k
    if dtype == "f32":
        return values * 4
    ring = values * 2
    if variant.arch:
        return ring + 1024  # to begin at a multiple of that
    along_n, along_m, along_k = variant.warps
    sums = 16 * (variant.tile_m // along_m + 8) * 4 * along_n * along_m * along_k
    return max(ring, sums)
