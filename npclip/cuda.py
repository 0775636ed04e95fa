"""The ops of kernels/reference.py, under its names and signatures, on a GPU.

Arrays are CuPy's: float16, float32, or bfloat16 as bit patterns (uint16). What an op returns is
stored as its input is, embeddings as float32 (Matrix.result). Which kernel is launched how stands
in the cuda_*.py modules; nothing is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import cuda_attention, cuda_images, cuda_linear, cuda_rows
from .cuda_device import Device, device_of
from .cuda_launch import DTYPES, MODEL_DTYPES, ceil_div, stored
from .kernels import reference
from .weights import to_bfloat16, to_float16

Array = Any
WINDOW_VALUES = 1 << 28  # of a convolution's windows, at a time
CONVERT: dict[str, Any] = {
    "f16": to_float16, "bf16": to_bfloat16, "f32": partial(np.asarray, dtype=np.float32),
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """A weight on the device, its rows filled up with zeros to a multiple of 16 bytes."""

    shape: tuple[int, ...]  # of the weight: [M, K] or [O, k, k, C]
    array: Array  # [M, K rounded up]
    result: str  # how what the op returns is stored: f16, bf16 or f32

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclass(frozen=True)
class Levels:
    """Pixels as bytes, which patchify normalises: stands for their float [B, 3, H, W]."""

    array: Array  # uint8 RGB [B, H, W, 3]
    table: Array  # float32 [3, 256], reference_resize.normalize_table
    kind: str  # how patchify stores what it returns

    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of what it stands for."""
        batch, height, width, channels = self.array.shape
        return batch, channels, height, width

    def __len__(self) -> int:
        """B"""
        return len(self.array)

    @property
    def device(self) -> Any:
        """As CuPy's arrays have it."""
        return self.array.device

    @property
    def __cuda_array_interface__(self) -> Any:
        """Marks what lies on a GPU."""
        return self.array.__cuda_array_interface__


def place(params: Any, device: Device, dtype: str, float32_layers: tuple[str, ...]) -> Any:
    """Parameters as the ops here take them: matrices and tokens as dtype, the rest as float32.

    float32_layers: keys of the layers whose result is float32. On a GPU without our kernels all is
    float32, for kernels/reference.py. Raises CheckpointError for a weight too large for float16.
    """
    if not device.has_kernels:
        return _as_float32(params, device)
    return _place(params, "", device, DTYPES[dtype], float32_layers)


def _as_float32(node: Any, device: Device) -> Any:
    if isinstance(node, list):
        return [_as_float32(child, device) for child in node]
    if isinstance(node, dict):
        return {key: _as_float32(child, device) for key, child in node.items()}
    return device.asarray(np.asarray(node, np.float32)) if np.ndim(node) else node


def _place(node: Any, name: str, device: Device, kind: str, float32_layers: tuple[str, ...]) -> Any:
    if isinstance(node, list):
        return [_place(child, name, device, kind, float32_layers) for child in node]
    if not isinstance(node, dict):
        convert = CONVERT[kind if name == "token_embedding" else "f32"]
        return device.asarray(convert(node)) if np.ndim(node) else node
    placed = {
        key: _place(child, key, device, kind, float32_layers)
        for key, child in node.items()
        if key != "weight" or child.ndim < 2
    }
    if getattr(node.get("weight"), "ndim", 0) >= 2:
        result = "f32" if name in float32_layers else kind
        placed["weight"] = _matrix(node["weight"], device, kind, result)
    return placed


def _matrix(weight: Array, device: Device, kind: str, result: str) -> Matrix:
    rows = weight.reshape(len(weight), -1)
    short = -rows.shape[1] % cuda_linear.ALIGNMENT
    rows = np.pad(rows, ((0, 0), (0, short))) if short else rows
    return Matrix(weight.shape, device.asarray(CONVERT[kind](rows)), result)


def linear(
    x: Array,
    weight: Matrix,
    bias: Array = None,
    activation: str | None = None,
    residual: Array = None,
) -> Array:
    """reference.linear; with a residual, y is stored as that is."""
    device = device_of(x)
    if stored(x) != stored(weight.array):
        x = device.cast(device.widen(x), MODEL_DTYPES[stored(weight.array)])
    if x.shape[1] != weight.array.shape[1]:
        x = x.base  # with the zeros that fill up its rows
    result = weight.result if residual is None else stored(residual)
    y = device.empty((len(x), weight.shape[0]), result)
    if len(x):
        device.products.run(x, weight.array, bias, activation, residual, y)
    return y


def attention(qkv: Array, cu_seqlens: Array, heads: int, causal: bool = False) -> Array:
    """reference.attention"""
    device = device_of(qkv)
    o = device.empty((len(qkv), qkv.shape[1] // 3), stored(qkv))
    seqs, longest = device.sequences(cu_seqlens)
    device.run(cuda_attention.attention(qkv, seqs, o, heads, longest, causal))
    return o


def attention_pool(q: Array, kv: Array, cu_seqlens: Array, heads: int) -> Array:
    """reference.attention_pool"""
    device = device_of(q)
    o = device.empty(q.shape, stored(q))
    seqs, longest = device.sequences(cu_seqlens)
    device.run(cuda_attention.attention_pool(q, kv, seqs, o, heads, longest))
    return o


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """reference.layer_norm"""
    device = device_of(x)
    y = device.empty(x.shape, stored(x))
    device.run(cuda_rows.layer_norm(x, weight, bias, y, eps))
    return y


def add_layer_norm(
    x: Array, h: Array, weight: Array, bias: Array, eps: float = 1e-5
) -> tuple[Array, Array]:
    """reference.add_layer_norm"""
    device = device_of(x)
    total, y = device.empty(x.shape, stored(x)), device.empty(x.shape, stored(x))
    device.run(cuda_rows.add_layer_norm(x, h, weight, bias, total, y, eps))
    return total, y


def patchify(images: Array | Levels, patch: int) -> Array:
    """reference.patchify; rows are filled up with zeros as Matrix is."""
    device = device_of(images)
    from_bytes = isinstance(images, Levels)
    batch, channels, height, width = images.shape
    k = channels * patch * patch
    padded = ceil_div(k, cuda_linear.ALIGNMENT) * cuda_linear.ALIGNMENT
    kind = images.kind if from_bytes else stored(images)
    rows = device.empty((batch * (height // patch) * (width // patch), padded), kind)
    if from_bytes:
        device.run(cuda_rows.patchify_u8(images.array, patch, images.table, rows))
    else:
        device.run(cuda_rows.patchify(images, patch, rows))
    return rows[:, :k]


def embed_patches(
    patches: Array,
    class_embedding: Array,
    positional_embedding: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
) -> Array:
    """reference.embed_patches"""
    device, (tokens, width) = device_of(patches), positional_embedding.shape
    x = device.empty((len(patches) // (tokens - 1) * tokens, width), stored(patches))
    vectors = class_embedding, positional_embedding, weight, bias
    device.run(cuda_rows.embed_patches(patches, *vectors, x, eps))
    return x


def embed_tokens(
    ids: Array, positions: Array, token_embedding: Array, positional_embedding: Array
) -> Array:
    """reference.embed_tokens; ids and positions lie on the host or the device."""
    device = device_of(token_embedding)
    x = device.empty((len(ids), token_embedding.shape[1]), stored(token_embedding))
    ids, positions = (device.index(a) for a in (ids, positions))
    device.run(cuda_rows.embed_tokens(ids, positions, token_embedding, positional_embedding, x))
    return x


def conv2d(
    x: Array,
    weight: Matrix,
    bias: Array,
    stride: int = 1,
    activation: str | None = None,
    residual: Array = None,
) -> Array:
    """reference.conv2d: the k x k windows of x as rows, a few images at a time, then linear."""
    device, (outputs, kernel, _, channels) = device_of(x), weight.shape
    x = device.asarray(x)  # pixels from patchify lie apart
    batch, height, width = x.shape[0], *((n - 1) // stride + 1 for n in x.shape[1:3])
    y = device.empty((batch, height, width, outputs), stored(x))
    flat, k = y.reshape(-1, outputs), weight.array.shape[1]
    pixels = height * width
    direct = kernel == stride == 1 and channels == k
    some = batch if direct else max(1, min(batch, WINDOW_VALUES // (pixels * k)))
    rows = None if direct else device.empty((some * pixels, k), stored(x))
    for first in range(0, batch, some):
        count = min(some, batch - first)
        part = slice(first * pixels, (first + count) * pixels)
        if direct:
            windows = x.reshape(-1, channels)
        else:
            windows = rows[: count * pixels]  # type: ignore[index]
            device.run(cuda_images.windows(x[first : first + count], kernel, stride, windows))
        r = None if residual is None else residual.reshape(-1, outputs)[part]
        device.products.run(windows, weight.array, bias, activation, r, flat[part], True)
    return y


def avg_pool2d(x: Array, k: int) -> Array:
    """reference.avg_pool2d"""
    device, (batch, height, width, channels) = device_of(x), x.shape
    y = device.empty((batch, height // k, width // k, channels), stored(x))
    device.run(cuda_images.avg_pool2d(x, k, y))
    return y


def take(x: Array, rows: Array) -> Array:
    """ops.take; rows lie on the host or the device."""
    device = device_of(x)
    y = device.empty((len(rows), x.shape[1]), stored(x))
    device.run(cuda_rows.take(x, device.index(rows), y))
    return y


def to_float(x: Array) -> Array:
    """x as float32"""
    device = device_of(x)
    return device.widen(x)


softmax = reference.softmax  # NumPy's functions of CuPy's arrays are CuPy's


def l2_normalize(x: Array) -> Array:
    """reference.l2_normalize of float32 rows"""
    device = device_of(x)
    y = device.empty(x.shape, "f32")
    device.run(cuda_rows.l2_normalize(x, y))
    return y
