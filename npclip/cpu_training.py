"""The ops of training by the C kernels, under the names and signatures of the reference.

As cpu.py: what no kernel computes (another dtype, sequences longer than a kernel takes) goes to the
reference. Here all is float32, and so is what Rounded multiplies, after it was rounded to bfloat16;
results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from . import cpu
from .cpu import MAX_DEPTH, _aligned, _as, _empty, _fits, _pointer, _stored
from .cpu_library import best, kernel
from .kernels import reference, reference_backward
from .weights import Packed

Array = Any


class Rounded:
    """A weight [M, K] whose products are of values rounded to bfloat16, with sums in float32.

    It is packed when it is first needed, and must not change afterwards: one for each step.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, weight: Array) -> None:
        """weight: float32, K and M at most MAX_DEPTH."""
        self._weight = weight

    @staticmethod
    def is_possible(dtype: Any) -> bool:
        """Whether this machine has kernels that multiply bfloat16, for parameters of a dtype."""
        return dtype == np.float32 and best("linear_weight_backward", "bf16")[0] is not None

    @functools.cached_property
    def _forward(self) -> Packed:
        return _round_pack(self._weight)

    @functools.cached_property
    def _backward(self) -> Packed:
        return _round_pack(self._weight.T)

    def linear(self, x: Array, bias: Array = None, residual: Array = None) -> Array:
        """[N, K] -> [N, M]: x weight^T + bias + residual"""
        return cpu.linear(x, self._forward, bias, None, residual)

    def linear_backward(self, dy: Array) -> Array:
        """[N, M] -> dx [N, K]"""
        return cpu.linear(dy, self._backward)


def linear_weight_backward(x: Array, dy: Array) -> Array:
    """[N, K], [N, M] -> dweight [M, K], where a Rounded is possible: as its products."""
    (n, k), m = x.shape, dy.shape[1]
    run, dw = best("linear_weight_backward", "bf16")[0], np.zeros((m, k), np.float32)
    for i in range(0, n, MAX_DEPTH):
        rows, part = _as(dy[i : i + MAX_DEPTH], "f32"), _empty((m, k), "f32")
        packed = _round_pack(x[i : i + MAX_DEPTH].T)
        run(_pointer(rows), _pointer(packed.buffer), _pointer(part), len(rows), k, m)
        dw = part if n <= MAX_DEPTH else dw + part
    return dw


def _round_pack(weight: Array) -> Packed:
    """[M, K] in the layout of linear_bf16; the transpose of an array in C order is not copied."""
    is_transposed = not weight.flags.c_contiguous and weight.T.flags.c_contiguous
    stored = _as(weight.T if is_transposed else weight, "f32")
    op = "round_pack_transposed" if is_transposed else "round_pack"
    (m, k), (run, isa) = weight.shape, best(op, "bf16")
    buffer = _aligned(kernel("packed_size", "", isa)(m, k), np.uint16)
    run(_pointer(stored), _pointer(buffer), m, k)
    return Packed((m, k), "bf16", isa, buffer, "f32")


ROWS = 32  # of a block that layer_norm_backward adds up first


def _all_f32(*arrays: Array) -> bool:
    return all(_stored(x) == "f32" for x in arrays)


def quick_gelu(x: Array) -> Array:
    """reference.quick_gelu"""
    return _activation("quick_gelu", x)


def gelu(x: Array) -> Array:
    """reference.gelu"""
    return _activation("gelu", x)


def _activation(name: str, x: Array) -> Array:
    if not _all_f32(x):
        return reference.ACTIVATIONS[name](x)
    x, y = _as(x, "f32"), _empty(x.shape, "f32")
    best(name, "f32")[0](_pointer(x), _pointer(y), x.size)
    return y


def quick_gelu_backward(x: Array, dy: Array) -> Array:
    """reference_backward.quick_gelu_backward"""
    return _activation_backward("quick_gelu", x, dy)


def gelu_backward(x: Array, dy: Array) -> Array:
    """reference_backward.gelu_backward"""
    return _activation_backward("gelu", x, dy)


def _activation_backward(name: str, x: Array, dy: Array) -> Array:
    if not _all_f32(x, dy):
        return reference_backward.ACTIVATIONS_BACKWARD[name](x, dy)
    x, dy, dx = _as(x, "f32"), _as(dy, "f32"), _empty(x.shape, "f32")
    best(f"{name}_backward", "f32")[0](_pointer(x), _pointer(dy), _pointer(dx), x.size)
    return dx


def layer_norm_backward(
    x: Array, weight: Array, dy: Array, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """reference_backward.layer_norm_backward"""
    if not _all_f32(x, weight, dy):
        return reference_backward.layer_norm_backward(x, weight, dy, eps)
    x, weight, dy, (n, d) = _as(x, "f32"), _as(weight, "f32"), _as(dy, "f32"), x.shape
    shapes = (n, d), (d,), (d,), (-(-n // ROWS), 2, d)
    dx, dweight, dbias, sums = (_empty(shape, "f32") for shape in shapes)
    best("layer_norm_backward", "f32")[0](
        *map(_pointer, (x, weight, dy, dx, dweight, dbias, sums)), n, d, ROWS, eps
    )
    return dx, dweight, dbias


def attention_backward(
    qkv: Array, dy: Array, cu_seqlens: Array, heads: int, causal: bool = False
) -> Array:
    """reference_backward.attention_backward"""
    width = dy.shape[1]
    if not _all_f32(qkv, dy) or not _fits(cu_seqlens, width // heads):
        return reference_backward.attention_backward(qkv, dy, cu_seqlens, heads, causal)
    qkv, dy, dqkv = _as(qkv, "f32"), _as(dy, "f32"), _empty(qkv.shape, "f32")
    seqs = np.ascontiguousarray(cu_seqlens, np.int32)
    best("attention_backward", "f32")[0](
        _pointer(qkv), _pointer(dy), _pointer(seqs), _pointer(dqkv), len(seqs) - 1, heads,
        width // heads, causal,
    )  # fmt: skip
    return dqkv


def attention_pool_backward(
    q: Array, kv: Array, dy: Array, cu_seqlens: Array, heads: int
) -> tuple[Array, Array]:
    """reference_backward.attention_pool_backward"""
    width = q.shape[1]
    if not _all_f32(q, kv, dy) or not _fits(cu_seqlens, width // heads):
        return reference_backward.attention_pool_backward(q, kv, dy, cu_seqlens, heads)
    q, kv, dy = (_as(x, "f32") for x in (q, kv, dy))
    dq, dkv = _empty(q.shape, "f32"), _empty(kv.shape, "f32")
    seqs = np.ascontiguousarray(cu_seqlens, np.int32)
    best("attention_pool_backward", "f32")[0](
        _pointer(q), _pointer(kv), _pointer(dy), _pointer(seqs), _pointer(dq), _pointer(dkv),
        len(q), heads, width // heads,
    )  # fmt: skip
    return dq, dkv


def embed_patches_backward(
    patches: Array,
    class_embedding: Array,
    positional_embedding: Array,
    weight: Array,
    dy: Array,
    eps: float = 1e-5,
) -> tuple[Array, ...]:
    """reference_backward.embed_patches_backward"""
    x = reference.join_patches(patches, class_embedding, positional_embedding)
    dx, dweight, dbias = layer_norm_backward(x, weight, dy, eps)
    joined = reference_backward.join_patches_backward(dx, len(positional_embedding))
    return *joined, dweight, dbias


def embed_tokens_backward(
    ids: Array, positions: Array, dy: Array, vocabulary: int, context: int
) -> tuple[Array, ...]:
    """reference_backward.embed_tokens_backward"""
    if not _all_f32(dy):
        return reference_backward.embed_tokens_backward(ids, positions, dy, vocabulary, context)
    dy, width = _as(dy, "f32"), dy.shape[1]
    indices = [np.ascontiguousarray(index, np.int64) for index in (ids, positions)]
    tables = [np.zeros((rows, width), np.float32) for rows in (vocabulary, context)]
    best("embed_tokens_backward", "f32")[0](*map(_pointer, (*indices, dy, *tables)), len(dy), width)
    return tuple(tables)


def square_sums(x: Array) -> Array:
    """reference_backward.square_sums"""
    if not _all_f32(x):
        return reference_backward.square_sums(x)
    x, block = _as(x, "f32"), reference_backward.BLOCK
    sums = np.empty(-(-x.size // block))
    best("square_sums", "f32")[0](_pointer(x), _pointer(sums), x.size, block)
    return sums


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    factor: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    keep: float,
    scale: float,
    eps: float,
    rate: float,
) -> tuple[Array, Array, Array]:
    """reference_backward.adamw, with its bits"""
    coefficients = factor, beta1, rest1, beta2, rest2, keep, scale, eps, rate
    if not _all_f32(p, g, m, v) or not all(x.flags.c_contiguous for x in (p, m, v)):
        return reference_backward.adamw(p, g, m, v, *coefficients)
    g = _as(g, "f32")
    best("adamw", "f32")[0](*map(_pointer, (p, g, m, v)), p.size, *coefficients)
    return p, m, v
