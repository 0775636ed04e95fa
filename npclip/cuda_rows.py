"""Launches of the kernels that work on rows: LayerNorm, embeddings, patches, activations.

Each function describes one call of a kernel of layer_norm.cu, rows.cu or patchify.cu, whose results
go to the arrays given for them. Arrays are contiguous; stored values of 16 bits or float32, see
cuda_launch.stored.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .cuda_launch import Launch, ceil_div, kernel, stored

Array = Any

WARPS = 4  # of a block; a warp takes one row or more
MAX_KEPT_WIDTH = 2048  # values of a row that LayerNorm keeps in registers
KEPT_ROWS = 2  # rows that a warp keeps at once
THREADS, DEPTH = 256, 2  # of a block of the other kernels; chunks of a thread of activate
ACTIVATIONS = {"quick_gelu": 1, "gelu": 2, "relu": 3}


def layer_norm(x: Array, weight: Array, bias: Array, y: Array, eps: float) -> Launch:
    """y = reference.layer_norm(x, weight, bias, eps)"""
    return _layer_norm("layer_norm", (x, weight, bias, y), y, (), eps)


def add_layer_norm(
    x: Array, h: Array, weight: Array, bias: Array, total: Array, y: Array, eps: float
) -> Launch:
    """total, y = reference.add_layer_norm(x, h, weight, bias, eps); y is of the rounded total."""
    return _layer_norm("add_layer_norm", (x, h, weight, bias, total, y), y, (), eps)


def embed_patches(
    patches: Array,
    class_embedding: Array,
    positional_embedding: Array,
    weight: Array,
    bias: Array,
    x: Array,
    eps: float,
) -> Launch:
    """x = reference.embed_patches(patches, ..., eps)"""
    arrays = patches, class_embedding, positional_embedding, weight, bias, x
    return _layer_norm("embed_patches", arrays, x, positional_embedding.shape[:1], eps)


def _layer_norm(
    op: str, arrays: tuple[Array, ...], y: Array, tokens: tuple[int, ...], eps: float
) -> Launch:
    n, d = y.shape
    step = _step(y)
    kept = ceil_div(d, 32 * step) if step > 1 and d <= MAX_KEPT_WIDTH else 0
    which = kernel("layer_norm", op, stored(y), ("STEP", step), ("KEPT", kept))
    sizes = map(np.int32, (n, *tokens, d))
    rows = WARPS * (KEPT_ROWS if kept else 1)
    return Launch(which, _grid(n, rows), 32 * WARPS, 0, (*arrays, *sizes, np.float32(eps)))


def embed_tokens(
    ids: Array, positions: Array, token_embedding: Array, positional_embedding: Array, x: Array
) -> Launch:
    """x = reference.embed_tokens(ids, positions, ...); ids and positions are int32."""
    return _rows("embed_tokens", (ids, positions, token_embedding, positional_embedding, x), x)


def take(x: Array, rows: Array, y: Array) -> Launch:
    """y = x[rows]; rows are int32."""
    return _rows("take", (x, rows, y), y)


def l2_normalize(x: Array, y: Array) -> Launch:
    """y = reference.l2_normalize(x), float32 both"""
    return _rows("l2_normalize", (x, y), y)


def _rows(op: str, arrays: tuple[Array, ...], y: Array) -> Launch:
    n, d = y.shape
    which = kernel("rows", op, stored(y), ("STEP", _step(y)))
    return Launch(which, _grid(n, WARPS), 32 * WARPS, 0, (*arrays, np.int32(n), np.int32(d)))


def activate(x: Array, activation: str) -> Launch:
    """x = activation(x), in place, whatever its shape; see reference.ACTIVATIONS."""
    which = kernel("rows", "activate", stored(x), ("ACTIVATION", ACTIVATIONS[activation]))
    count = math.prod(x.shape)
    grid = _grid(count, THREADS * DEPTH * _chunk(x))
    return Launch(which, grid, THREADS, 0, (x, np.int64(count)))


def patchify(images: Array, patch: int, rows: Array) -> Launch:
    """rows = reference.patchify(images, patch), each filled up with zeros."""
    _, channels, height, width = images.shape
    whole = patch % _chunk(rows) == 0 and width % _chunk(rows) == 0
    return _patchify("patchify", (images, rows), patch, whole, rows, (channels, height, width))


def patchify_u8(images: Array, patch: int, table: Array, rows: Array) -> Launch:
    """The same of bytes [B, H, W, 3], as table[channel, byte]; table: float32 [3, 256]."""
    arrays = images, table, rows
    return _patchify("patchify_u8", arrays, patch, False, rows, images.shape[1:3])


def _patchify(
    op: str,
    arrays: tuple[Array, ...],
    patch: int,
    whole: bool,
    rows: Array,
    sizes: tuple[int, ...],
) -> Launch:
    n, padded = rows.shape
    which = kernel("patchify", op, stored(rows), ("PATCH", patch), ("WHOLE", int(whole)))
    grid = _grid(n * (padded // _chunk(rows)), THREADS)
    integers = map(np.int32, (n, padded, *sizes))
    return Launch(which, grid, THREADS, 0, (*arrays, *integers))


def _chunk(x: Array) -> int:
    """Values of 16 bytes."""
    return 16 // int(x.dtype.itemsize)


def _step(x: Array) -> int:
    """Values of a row that a lane reads at once."""
    return _chunk(x) if x.shape[-1] % _chunk(x) == 0 else 1


def _grid(work: int, per_block: int) -> tuple[int, int, int]:
    return max(1, ceil_div(work, per_block)), 1, 1
