"""Pillow's antialiased 8-bit resize in NumPy, to the bit: the specification of resize.c.

An output pixel is a weighted sum of the input pixels under a filter, which is as much wider than
Pillow's bicubic or bilinear one as the image becomes smaller. The weights are rounded to multiples
of 2^-22, and the sums, along x and then along y, to whole levels. See Resample.c in Pillow, which
does tall images the other way round (is_x_first).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

PRECISION = 22  # bits after the point of a coefficient


def resize(image, table, width, height, left, top, size, interpolation="bicubic"):
    """Resized to width x height, cropped, normalised: uint8 [H, W, 3] -> float32 [3, size, size]"""
    for axis, resized, start in ((1, width, left), (0, height, top)):
        first, k = coefficients(image.shape[axis], resized, start, size, interpolation)
        lines = np.moveaxis(image, axis, 0).astype(np.int32)
        sums = [
            np.tensordot(row, lines[i : i + len(row)], 1) for i, row in zip(first, k, strict=True)
        ]
        levels = (np.stack(sums) + (1 << PRECISION - 1)) >> PRECISION
        image = np.moveaxis(levels.clip(0, 255).astype(np.uint8), 0, axis)
    return np.stack([table[c][image[..., c]] for c in range(3)])


def is_x_first(old, new):
    """Whether Pillow, of any version, gives what resize gives; old and new are (width, height).

    Pillow 13 begins with y where that takes away over twice as many lines as x does, and 12 may
    where the height is over 100 widths. The levels in between are rounded, so the order shows.
    """
    (old_width, old_height), (new_width, new_height) = old, new
    if old_width == new_width or old_height <= new_height:
        return True
    lines, columns = old_height - new_height, old_width - new_width
    return lines <= 2 * columns and old_height <= 100 * old_width


def normalize_table(mean, std):  # -> float32 [3, 256]
    """(level / 255 - mean) / std of each channel, for every level"""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    return (levels - np.float32(mean)[:, None]) / np.float32(std)[:, None]


def coefficients(old, new, start, size, interpolation):  # -> int64 [size], int32 [size, taps]
    """The first input of outputs start .. start + size, and the weights of it and the next ones.

    old and new are the lengths of the axis before and after. All outputs have as many weights, with
    zeros around their own, and none reaches past the last input. In C's doubles and in Pillow's
    order, so that every weight rounds as there.
    """
    if old == new:  # Pillow skips the pass
        return np.arange(start, start + size), np.full((size, 1), 1 << PRECISION, np.int32)
    support, kernel = FILTERS[interpolation]
    scale = float(np.float32(old)) / new
    stretch = max(scale, 1.0)
    center = (np.arange(start, start + size) + 0.5) * scale
    begin = np.maximum((center - support * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((center + support * stretch + 0.5).astype(np.int64), old)

    taps = (end - begin).max()
    first = np.minimum(begin, old - taps)
    index = first[:, None] + np.arange(taps)
    weights = kernel(np.abs((index - center[:, None] + 0.5) * (1.0 / stretch)))
    weights[(index < begin[:, None]) | (index >= end[:, None])] = 0
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]  # a sum from left to right, unlike np.sum
    weights *= 1 << PRECISION
    return first, (weights + np.copysign(0.5, weights)).astype(np.int32)


def _bilinear(x):
    return np.where(x < 1, 1 - x, 0.0)


def _bicubic(x):
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


FILTERS = {"bilinear": (1.0, _bilinear), "bicubic": (2.0, _bicubic)}  # of |x|, 0 from support on


@lru_cache(maxsize=128)
def axis_tables(old, new, start, size, interpolation):  # -> int32 [size], int32 [size, pairs, 2]
    """The coefficients as resize.c reads them: for pairs of inputs, from an even one on.

    first counts pairs; a coefficient is low + 2^16 high, both int16, and the two of a pair lie in
    one int32, the lows before the highs.
    """
    first, k = coefficients(old, new, start, size, interpolation)
    pairs = k.shape[1] // 2 + 1 if old > k.shape[1] else (old + 1) // 2
    first_pair = np.minimum(first // 2, (old + 1) // 2 - pairs)
    padded = np.zeros((size, 2 * pairs), np.int32)
    column = (first - 2 * first_pair)[:, None] + np.arange(k.shape[1])
    padded[np.arange(size)[:, None], column] = k
    packed = np.stack([_words(padded), _words((padded + (1 << 15)) >> 16)], axis=2)
    tables = first_pair.astype(np.int32), packed
    for table in tables:
        table.flags.writeable = False  # they are shared by all callers
    return tables


def _words(k):  # the lower 16 bits of each two, the first below the second
    return (k[:, ::2] & 0xFFFF) | (k[:, 1::2] << 16)


def scratch_bytes(x_tables, y_tables):
    """The scratch that resize.c needs for two axes' tables, on any ISA."""
    (x_first, x_packed), (_, y_packed) = x_tables, y_tables
    row = -(-16 * len(x_first) // 256) * 256
    ring_rows = 1 << int(y_packed.shape[1] + 3).bit_length()  # at least pairs + 4
    columns = int(x_first[-1] - x_first[0]) + x_packed.shape[1]
    return 63 + row * (1 + ring_rows) + 128 * columns
