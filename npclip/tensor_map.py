"""Tensor maps for Hopper's TMA, from the CUDA driver through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from . import cuda_driver
from .errors import BackendError

BYTES = 128
UINT16, SWIZZLE_128B, PROMOTE_TO_256B = 1, 3, 3  # of cuda.h; the kernel knows what the bits mean


def encode(
    address: int, shape: tuple[int, int], row_bytes: int, box: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """The map of a matrix of 16-bit values, as CuPy passes it by value: an array of one element.

    shape and box: rows, columns; row_bytes: from one row to the next. See cuda_launch.TensorMap.
    """
    memory = np.zeros(2 * BYTES, np.uint8)
    start = -memory.ctypes.data % BYTES  # it must lie at a multiple of 64
    target = memory[start : start + BYTES]
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(target.ctypes.data), UINT16, 2, ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(*shape[::-1]), (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)(*box[::-1]), (ctypes.c_uint32 * 2)(1, 1),
        0, SWIZZLE_128B, PROMOTE_TO_256B, 0,
    )  # fmt: skip
    if code:
        raise BackendError(f"cuTensorMapEncodeTiled: error {code} for {shape} in boxes of {box}")
    return target.view(f"V{BYTES}").reshape(())


@cache
def _driver() -> Any:
    try:
        driver = cuda_driver.load()
        driver.cuTensorMapEncodeTiled  # noqa: B018 - from CUDA 12.0 on
    except (OSError, AttributeError) as error:
        raise BackendError(f"the CUDA driver makes no tensor maps: {error}") from None
    return driver
