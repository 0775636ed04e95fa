"""The launches of the ops on images: windows of feature maps, pools, and Pillow's resize."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda_launch import Kernel, Launch, ceil_div, stored
from .kernels.reference_resize import coefficients

Array = Any

BLOCK = 256  # threads of windows and avg_pool2d
RESIZE_BLOCK = 128
CHUNK_BYTES = 16
TILE_COLUMNS = 6144  # that a block of resize_x has in shared memory, 4 bytes each: 9 blocks fit
MAX_COLUMNS = 16384  # 64 KiB, what every architecture has
MAX_ROWS = 65535  # of blocks in a grid's y


def windows(x: Array, kernel: int, stride: int, rows: Array) -> Launch:
    """The windows of reference.conv2d: x [B, H, W, C] -> rows [B Ho Wo, at least k k C].

    A row has zeros after its k k C values, and is as wide as a multiple of 16 bytes.
    """
    (batch, height, width, channels), row_width = x.shape, rows.shape[1]
    out_height, out_width = ((n - 1) // stride + 1 for n in (height, width))
    chunks = out_width * (row_width * x.dtype.itemsize // CHUNK_BYTES)
    return Launch(
        _kernel("windows", x),
        (ceil_div(chunks, BLOCK), out_height, batch),
        BLOCK,
        0,
        (x, rows, *_int32(height, width, channels, kernel, stride, out_width, row_width)),
    )


def avg_pool2d(x: Array, k: int, y: Array) -> Launch:
    """reference.avg_pool2d: x [B, H, W, C] -> y [B, H / k, W / k, C]"""
    (batch, height, width, channels), (out_height, out_width) = x.shape, y.shape[1:3]
    steps = out_width * channels // _step(x)
    return Launch(
        _kernel("avg_pool2d", x),
        (ceil_div(steps, BLOCK), out_height, batch),
        BLOCK,
        0,
        (x, y, *_int32(height, width, channels, k, out_width), np.float32(1 / (k * k))),
    )


@dataclass(frozen=True, eq=False)
class Resize:
    """What images of one size need to be resized and cropped (resize_plan)."""

    x_axis: NDArray[np.int32]  # [1 + taps, size]: the first input, and the coefficients from it on
    y_axis: NDArray[np.int32]  # likewise, counted from top
    top: int  # the first input row that the crop needs
    rows: int  # how many of them
    tile: int  # outputs of a block of resize_x
    columns: int  # inputs that a tile has at most

    @property
    def size(self) -> int:
        """Of the result, in x and in y."""
        return self.x_axis.shape[1]

    def scratch_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of the uint8 array between the two passes."""
        return batch, self.rows, self.size, 4


@lru_cache(maxsize=128)
def resize_plan(
    old: tuple[int, int],
    new: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    interpolation: str = "bicubic",
) -> Resize:
    """Images of old (width, height), resized to new, of which size x size from corner on remain.

    For images that Pillow resizes in x first (reference_resize.is_x_first), up to 16384 on a
    side. Raises ValueError for larger ones that do not fit.
    """
    x_axis, y_axis = (
        _axis(*lengths, size, interpolation) for lengths in zip(old, new, corner, strict=True)
    )
    top, taps = int(y_axis[0, 0]), len(y_axis) - 1
    rows = int(y_axis[0, -1]) + taps - top
    y_axis[0] -= top
    tile = RESIZE_BLOCK
    while (columns := _tile_columns(x_axis, tile)) > TILE_COLUMNS and tile > 1:
        tile //= 2
    if columns > MAX_COLUMNS or rows > MAX_ROWS:
        raise ValueError(f"an image of {old[0]} x {old[1]} pixels is too large to resize here")
    for axis in (x_axis, y_axis):
        axis.flags.writeable = False  # all callers share them
    return Resize(x_axis, y_axis, top, rows, tile, columns)


def resize(
    images: Array,
    plan: Resize,
    x_axis: Array,
    y_axis: Array,
    table: Array,
    scratch: Array,
    out: Array,
) -> tuple[Launch, Launch]:
    """reference_resize.resize of images of one size, in two launches.

    images: uint8 [B, H, W, 3] or [B, H, W, 4], whose last channel is not looked at.
    x_axis, y_axis: the plan's, where the kernels can read them.
    table: float32 [3, 256], reference_resize.normalize_table.
    scratch: uint8, plan.scratch_shape(B).
    out: [B, 3, size, size], of any dtype of a model.
    """
    (batch, height, width, channels), size = images.shape, plan.size
    x_taps, y_taps = x_axis.shape[0] - 1, y_axis.shape[0] - 1
    x_sizes = _int32(height, width, channels, plan.top, x_taps, size, plan.tile)
    x_pass = Launch(
        Kernel("resize", "resize_x", stored(out)),
        (ceil_div(size, plan.tile), plan.rows, batch),
        RESIZE_BLOCK,
        4 * plan.columns,
        (images, x_axis, scratch, *x_sizes),
    )
    y_pass = Launch(
        Kernel("resize", "resize_y", stored(out)),
        (ceil_div(size, RESIZE_BLOCK), size, batch),
        RESIZE_BLOCK,
        0,
        (scratch, y_axis, table, out, *_int32(plan.rows, y_taps, size)),
    )
    return x_pass, y_pass


def _axis(old: int, new: int, start: int, size: int, interpolation: str) -> NDArray[np.int32]:
    first, k = coefficients(old, new, start, size, interpolation)
    return np.vstack([first, k.T]).astype(np.int32)


def _tile_columns(axis: NDArray[np.int32], tile: int) -> int:
    """The most inputs between the first and the last one that any tile reads."""
    first, taps = axis[0], len(axis) - 1
    last = np.minimum(np.arange(tile - 1, len(first) + tile - 1, tile), len(first) - 1)
    return int((first[last] - first[::tile]).max()) + taps


def _kernel(op: str, x: Array) -> Kernel:
    return Kernel("windows", op, stored(x), (("STEP", _step(x)),))


def _step(x: Array) -> int:
    """Values that are read at once: 16 bytes if the channels are a multiple, else one."""
    chunk: int = CHUNK_BYTES // x.dtype.itemsize
    return 1 if x.shape[-1] % chunk else chunk


def _int32(*numbers: int) -> tuple[np.int32, ...]:
    return tuple(map(np.int32, numbers))
