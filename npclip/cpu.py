"""The ops of kernels/reference.py, under its names and signatures, by the C kernels.

What an op returns is a float32 array, or one of bfloat16 bit patterns (uint16) where the weight
that it was given says so (Packed.result). What no kernel computes (another dtype of x, weights that
were not packed, sequences longer than a kernel takes) goes to the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cpu_library import best, kernel
from .kernels import reference, reference_resize
from .weights import Packed, from_bfloat16, round_to, to_bfloat16, to_float16

Array = Any

ACTIVATIONS = {None: 0, "quick_gelu": 1, "gelu": 2, "relu": 3}
MAX_DEPTH, MAX_KEYS, MAX_HEAD_WIDTH = 24576, 1024, 128
FORMATS = {"f32": 0, "bf16": 2}  # how a kernel is told that x or y is stored
PAIRS = ("avx512_bf16", "amx")  # ISAs that multiply bfloat16, and store activations so


def pack(weight: NDArray[Any], dtype: str, result: str = "float32") -> Packed | NDArray[np.float32]:
    """A float32 or float16 weight for a model of dtype "float32", "float16" or "bfloat16".

    float16 weights stay so where that loses nothing: arithmetic is in float32 in either case.
    result: the dtype that what the op returns may be rounded to, where the ISA computes in it.
    Raises CheckpointError for a weight too large for float16.
    """
    if weight.ndim == 1:  # of a LayerNorm
        isa = best("layer_norm", "bf16")[1] if result == "bfloat16" else ""
        return Packed(weight.shape, "f32", isa, _as(weight, "f32"), "bf16") if isa else weight
    if not weight.size or weight[0].size > MAX_DEPTH:
        return round_to(weight, dtype)
    if dtype == "bfloat16":
        weight, stored = to_bfloat16(weight), "bf16"
    elif weight.dtype == np.float16:
        stored = "f16"
    elif dtype == "float16" and weight.ndim == 2:  # convolutions hold a folded BatchNorm
        weight, stored = to_float16(weight), "f16"
    else:
        stored = "f32"
    weight = np.ascontiguousarray(weight)
    m, k = len(weight), weight[0].size
    pack_kernel, isa = best("pack", stored)
    buffer = _aligned(kernel("packed_size", "", isa)(m, k), weight.dtype)
    pack_kernel(_pointer(weight), _pointer(buffer), m, k)
    rounded = result == "bfloat16" and stored == "bf16" and isa in PAIRS
    return Packed(weight.shape, stored, isa, buffer, "bf16" if rounded else "f32")


def _aligned(size: int, dtype: Any) -> NDArray[Any]:
    """An uninitialised array whose first byte lies on a cache line."""
    nbytes = size * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype)


def _pointer(x: NDArray[Any] | None) -> int | None:
    return None if x is None else x.__array_interface__["data"][0]


def _stored(x: Array) -> str | None:
    """How x is stored, if a kernel takes it so."""
    return {np.float32: "f32", np.uint16: "bf16"}.get(x.dtype.type)


def _as(x: Array, stored: str) -> NDArray[Any]:
    """x in C order, stored so."""
    if stored == "bf16":
        return np.ascontiguousarray(x if x.dtype == np.uint16 else to_bfloat16(x))
    return np.ascontiguousarray(to_float(x), np.float32)


def _empty(shape: tuple[int, ...], stored: str) -> NDArray[Any]:
    return np.empty(shape, np.uint16 if stored == "bf16" else np.float32)


def to_float(x: Array) -> Array:
    """x, widened if it is bfloat16."""
    return from_bfloat16(x) if x.dtype == np.uint16 else x


def linear(
    x: Array,
    weight: Array,
    bias: Array = None,
    activation: str | None = None,
    residual: Array = None,
) -> Array:
    """reference.linear for packed weights."""
    if not isinstance(weight, Packed):
        return reference.linear(to_float(x), weight, bias, activation, residual)
    given, result, (m, k) = _input(x, weight), weight.result, weight.shape
    x = _as(x, given)
    residual = None if residual is None else _as(residual, result)
    y = _empty((len(x), m), result)
    kernel("linear", weight.dtype, weight.isa)(
        _pointer(x), _pointer(weight.buffer), _pointer(bias), _pointer(residual), _pointer(y),
        len(x), k, m, ACTIVATIONS[activation], FORMATS[given], FORMATS[result],
    )  # fmt: skip
    return y


def _input(x: Array, weight: Packed) -> str:
    """How the product with these weights takes x."""
    return "bf16" if x.dtype == np.uint16 and weight.isa in PAIRS else "f32"


def attention(qkv: Array, cu_seqlens: Array, heads: int, causal: bool = False) -> Array:
    """reference.attention"""
    width, stored = qkv.shape[1] // 3, _stored(qkv)
    if not stored or not _fits(cu_seqlens, width // heads):
        return reference.attention(to_float(qkv), cu_seqlens, heads, causal)
    qkv, o = _as(qkv, stored), _empty((len(qkv), width), stored)
    seqs = np.ascontiguousarray(cu_seqlens, np.int32)
    best("attention", stored)[0](
        _pointer(qkv), _pointer(seqs), _pointer(o), len(seqs) - 1, heads, width // heads, causal
    )
    return o


def attention_pool(q: Array, kv: Array, cu_seqlens: Array, heads: int) -> Array:
    """reference.attention_pool"""
    width, stored = q.shape[1], _stored(q)
    if not stored or _stored(kv) != stored or not _fits(cu_seqlens, width // heads):
        return reference.attention_pool(to_float(q), to_float(kv), cu_seqlens, heads)
    q, kv, o = _as(q, stored), _as(kv, stored), _empty(q.shape, stored)
    seqs = np.ascontiguousarray(cu_seqlens, np.int32)
    best("attention_pool", stored)[0](
        _pointer(q), _pointer(kv), _pointer(seqs), _pointer(o), len(q), heads, width // heads
    )
    return o


def _fits(cu_seqlens: Array, head_width: int) -> bool:
    longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max(initial=0)
    return longest <= MAX_KEYS and head_width <= MAX_HEAD_WIDTH


def _gain(weight: Array) -> tuple[Array, str]:
    """A LayerNorm's weight, and how its result is stored."""
    return (weight.buffer, weight.result) if isinstance(weight, Packed) else (weight, "f32")


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """reference.layer_norm"""
    weight, result = _gain(weight)
    if any(_stored(a) != "f32" for a in (x, weight, bias)):
        return reference.layer_norm(to_float(x), weight, bias, eps)
    x, y, d = _as(x, "f32"), _empty(x.shape, result), x.shape[-1]
    best("layer_norm", result)[0](
        _pointer(x), _pointer(weight), _pointer(bias), _pointer(y), x.size // d, d, eps
    )
    return y


def add_layer_norm(
    x: Array, h: Array, weight: Array, bias: Array, eps: float = 1e-5
) -> tuple[Array, Array]:
    """reference.add_layer_norm"""
    weight, result = _gain(weight)
    if any(_stored(a) != "f32" for a in (x, weight, bias)) or not _stored(h):
        return reference.add_layer_norm(x, to_float(h), weight, bias, eps)
    x, h, d = _as(x, "f32"), _as(h, result), x.shape[-1]
    total, y = _empty(x.shape, "f32"), _empty(x.shape, result)
    best("add_layer_norm", result)[0](
        _pointer(x), _pointer(h), _pointer(weight), _pointer(bias), _pointer(total), _pointer(y),
        x.size // d, d, eps,
    )  # fmt: skip
    return total, y


def patchify(images: Array, patch: int) -> Array:
    """reference.patchify"""
    if _stored(images) != "f32":
        return reference.patchify(images, patch)
    images, (batch, channels, height, width) = _as(images, "f32"), images.shape
    shape = (batch * (height // patch) * (width // patch), channels * patch * patch)
    rows = _empty(shape, "f32")
    best("patchify", "f32")[0](
        _pointer(images), _pointer(rows), batch, channels, height, width, patch
    )
    return rows


def embed_patches(
    patches: Array,
    class_embedding: Array,
    positional_embedding: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
) -> Array:
    """reference.embed_patches"""
    vectors, stored = (class_embedding, positional_embedding, weight, bias), _stored(patches)
    if not stored or any(_stored(a) != "f32" for a in vectors):
        return reference.embed_patches(to_float(patches), *vectors, eps)
    patches, (tokens, width) = _as(patches, stored), positional_embedding.shape
    batch = len(patches) // (tokens - 1)
    x = _empty((batch * tokens, width), "f32")
    best("embed_patches", stored)[0](
        _pointer(patches), *map(_pointer, vectors), _pointer(x), batch, tokens, width, eps
    )
    return x


def conv2d(
    x: Array,
    weight: Array,
    bias: Array,
    stride: int = 1,
    activation: str | None = None,
    residual: Array = None,
) -> Array:
    """reference.conv2d for packed weights."""
    if not isinstance(weight, Packed):
        residual = None if residual is None else to_float(residual)
        return reference.conv2d(to_float(x), weight, bias, stride, activation, residual)
    given, result, (outputs, k, _, channels) = _input(x, weight), weight.result, weight.shape
    x = _as(x, given)
    batch, height, width, _ = x.shape
    residual = None if residual is None else _as(residual, result)
    y = _empty((batch, *((n - 1) // stride + 1 for n in (height, width)), outputs), result)
    kernel("conv2d", weight.dtype, weight.isa)(
        _pointer(x), _pointer(weight.buffer), _pointer(bias), _pointer(residual), _pointer(y),
        batch, height, width, channels, outputs, k, stride, ACTIVATIONS[activation],
        FORMATS[given], FORMATS[result],
    )  # fmt: skip
    return y


def avg_pool2d(x: Array, k: int) -> Array:
    """reference.avg_pool2d"""
    stored = _stored(x)
    if not stored:
        return reference.avg_pool2d(x, k)
    x, (batch, height, width, channels) = _as(x, stored), x.shape
    y = _empty((batch, height // k, width // k, channels), stored)
    best("avg_pool2d", stored)[0](_pointer(x), _pointer(y), batch, height, width, channels, k)
    return y


def l2_normalize(x: Array) -> Array:
    """reference.l2_normalize"""
    if _stored(x) != "f32" or not x.size:
        return reference.l2_normalize(x)
    x, y, d = _as(x, "f32"), _empty(x.shape, "f32"), x.shape[-1]
    best("l2_normalize", "f32")[0](_pointer(x), _pointer(y), x.size // d, d)
    return y


def similarity(queries: Array, rows: Array, cosine: bool = False) -> Array:
    """reference.similarity"""
    stored = {np.float16: "f16", np.float32: "f32"}.get(rows.dtype.type)
    if not stored or queries.dtype != np.float32:
        return reference.similarity(queries, rows, cosine)
    queries, rows = _as(queries, "f32"), np.ascontiguousarray(rows)
    s = np.empty((len(queries), len(rows)), np.float32)
    best("similarity", stored)[0](
        _pointer(queries), _pointer(rows), _pointer(s), *s.shape, rows.shape[1], cosine
    )
    return s


def resize(
    image: Array,
    x: tuple[Array, Array],
    y: tuple[Array, Array],
    begin: int,
    end: int,
    table: Array,
    out: Array,
) -> None:
    """Rows begin .. end of out [3, size, size], as reference_resize.resize computes them.

    image: uint8 [H, W, 3 or 4] with contiguous rows. x, y: axis_tables, counting from its first
    column and row. table: normalize_table.
    """
    (x_first, x_packed), (y_first, y_packed) = x, y
    height, width, channels = image.shape
    scratch = np.empty(reference_resize.scratch_bytes(x, y), np.uint8)
    best("resize", "u8")[0](
        _pointer(image), image.strides[0], channels, height, width,
        _pointer(x_first), _pointer(x_packed), x_packed.shape[1],
        _pointer(y_first), _pointer(y_packed), y_packed.shape[1],
        len(y_first), begin, end, _pointer(table), _pointer(scratch), _pointer(out),
    )  # fmt: skip


embed_tokens = reference.embed_tokens
take = reference.take
softmax = reference.softmax
