"""Launches of attention.cu: which of its variants computes what.

Each function describes one call, whose result goes to the array given for it. Arrays are
contiguous; stored values of 16 bits or float32, see cuda_launch.stored.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .cuda_launch import Kernel, Launch, ceil_div, stored

Array = Any

MAX_HEAD_WIDTH = 128
SHORT_KEYS = 32, 64, 80  # variants whose block holds a whole sequence of up to so many tokens
VARIANTS = {"attention_short": 1, "attention_long": 2, "attention_plain": 3, "attention_pool": 4}
LONG_WARPS = 4  # of a block, at most
FEW_BLOCKS = 128  # which leave processors without work
PLAIN_THREADS, PLAIN_QUERIES = 256, 32  # of a block
POOL_WARPS = 4


def attention(
    qkv: Array, cu_seqlens: Array, o: Array, heads: int, longest: int, causal: bool
) -> Launch:
    """o = reference.attention(qkv, cu_seqlens, heads, causal).

    qkv [N, 3 H Dh] and o [N, H Dh] are stored alike; cu_seqlens is int32 on the device, at least
    one sequence; no sequence is longer than `longest`.
    """
    width = _head_width(o, heads)
    arrays, mask = (qkv, cu_seqlens, o), np.int32(causal)
    blocks = (cu_seqlens.shape[0] - 1) * heads
    if stored(qkv) == "f32" or width % 8:
        tiles = ceil_div(max(longest, 1), PLAIN_QUERIES)
        tiled = *arrays, np.int32(heads), np.int32(tiles), mask
        shared = 4 * _plain_floats(width)
        return _launch("attention_plain", {}, width, blocks * tiles, PLAIN_THREADS, shared, tiled)
    row = 2 * (ceil_div(width, 16) * 16 + 8)  # bytes in shared memory
    if longest <= SHORT_KEYS[-1]:
        keys = next(keys for keys in SHORT_KEYS if longest <= keys)
        whole, shared = (*arrays, np.int32(heads), mask), 3 * keys * row
        return _launch("attention_short", {"KEYS": keys}, width, blocks, 2 * keys, shared, whole)
    queries, step = (32 if width <= 64 else 16), 16  # a warp's registers have no room for more
    if width <= 64 and blocks * ceil_div(longest, queries * LONG_WARPS) < FEW_BLOCKS:
        queries, step = 16, 64  # more warps, each with less to wait for
    warps = ceil_div(longest, queries)  # of all tiles; each tile shall have as many
    tiles = ceil_div(warps, LONG_WARPS)
    warps = ceil_div(warps, tiles)
    block = 32 if width > 112 else 64  # keys
    tiled = *arrays, np.int32(heads), np.int32(tiles), mask
    defines, shared = {"QUERIES": queries, "WARPS": warps, "STEP": step}, 4 * block * row
    return _launch("attention_long", defines, width, blocks * tiles, 32 * warps, shared, tiled)


def attention_pool(
    q: Array, kv: Array, cu_seqlens: Array, o: Array, heads: int, longest: int
) -> Launch:
    """o = reference.attention_pool(q, kv, cu_seqlens, heads); 0 for an empty sequence.

    q and o [B, H Dh], kv [N, 2 H Dh]. Sequences may be of any length, whatever `longest` is.
    """
    width, blocks = _head_width(o, heads), o.shape[0] * heads
    shared = 4 * POOL_WARPS * (width + 2)
    arguments = q, kv, cu_seqlens, o, np.int32(heads)
    return _launch("attention_pool", {}, width, blocks, 32 * POOL_WARPS, shared, arguments)


def _launch(
    op: str,
    defines: dict[str, int],
    width: int,
    blocks: int,
    threads: int,
    shared: int,
    arguments: tuple[Any, ...],
) -> Launch:
    defines = {"VARIANT": VARIANTS[op], "HEAD_WIDTH": width, **defines}
    kernel = Kernel("attention", op, stored(arguments[0]), tuple(defines.items()))
    scale = np.float32(math.log2(math.e) / math.sqrt(width))
    return Launch(kernel, (blocks, 1, 1), threads, shared, (*arguments, scale))


def _head_width(o: Array, heads: int) -> int:
    width = int(o.shape[1]) // heads
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"heads of {width} values; at most {MAX_HEAD_WIDTH} are supported")
    return width


def _plain_floats(width: int) -> int:
    """Shared memory of attention_plain: PLAIN_FLOATS of attention.cu."""
    padded, columns = ceil_div(width, 4) * 4, ceil_div(width, 32) * 32
    return PLAIN_QUERIES * padded + 32 * columns + PLAIN_QUERIES * 32 + 32 * (padded + 1)
