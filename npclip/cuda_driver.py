"""Launches that overlap: a kernel begins while the one before it on the stream still runs.

It waits by itself, with wait_for_previous() of common.cuh, so that what a launch costs the GPU is
hidden behind the work before it: programmatic dependent launch, of GPUs from 9.0 on. CuPy has no
word for it; cuLaunchKernelEx of the driver has.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from ctypes import byref, c_int, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cuda_launch import Kernel, Launch
from .errors import BackendError

MIN_CAPABILITY = 9, 0
MIN_DRIVER = 12040  # CUDA 12.4: such launches may become part of a graph
CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
FORMATS: dict[type, str] = {np.int32: "i", np.int64: "q", np.float32: "f"}  # else an address


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is an int here."""

    _fields_ = (("id", c_int), ("padding", c_int), ("value", c_int), ("rest", c_int * 15))


class Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("count", c_uint),
    )


@dataclass(frozen=True)
class Parameters:
    """Where the arguments of a kernel lie in memory, and how they are written there."""

    kernel: Any  # CuPy's, whose module stays loaded as long
    function: int  # CUfunction
    format: struct.Struct
    memory: Any
    pointers: Any  # to each argument


class Driver:
    """Puts kernels on streams. Threads may share it."""

    def __init__(self, library: Any = None) -> None:
        """library: libcuda, loaded; for tests. Raises BackendError where it is missing."""
        try:
            self._launch = (library or load()).cuLaunchKernelEx
        except (OSError, AttributeError) as error:
            raise BackendError(f"the CUDA driver cannot launch kernels: {error}") from None
        self._launch.argtypes = c_void_p, c_void_p, c_void_p, c_void_p
        self._attribute = Attribute(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._config = Config(attributes=ctypes.addressof(self._attribute), count=1)
        self._parameters: dict[Kernel, Parameters] = {}
        self._lock = threading.Lock()

    def run(self, function: Any, launch: Launch, stream: int) -> None:
        """Put a kernel on a stream of the current device. function: CuPy's RawKernel."""
        kernel, grid, block, shared, arguments, _ = launch
        values = [_value(argument) for argument in arguments]
        with self._lock:
            parameters = self._parameters.get(kernel) or self._add(function, launch)
            parameters.format.pack_into(parameters.memory, 0, *values)
            config = self._config
            config.grid[:], config.block[:] = grid, (block, 1, 1)
            config.shared, config.stream = shared, stream
            status = self._launch(
                byref(config), parameters.function, byref(parameters.pointers), None
            )
        if status:
            raise BackendError(f"cuLaunchKernelEx of {kernel.symbol} failed: CUDA error {status}")

    def _add(self, function: Any, launch: Launch) -> Parameters:
        codes = [_format(argument) for argument in launch.arguments]
        packed = struct.Struct("".join(codes))
        memory = ctypes.create_string_buffer(packed.size)
        ends = [struct.calcsize("".join(codes[: i + 1])) for i in range(len(codes))]
        first = ctypes.addressof(memory)
        places = [
            first + end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)
        ]
        pointers = (c_void_p * len(places))(*places)
        found = Parameters(function, function.kernel.ptr, packed, memory, pointers)
        self._parameters[launch.kernel] = found
        return found


def _format(argument: Any) -> str:
    if isinstance(argument, np.ndarray):  # a tensor map
        return f"{argument.nbytes}s"
    return FORMATS.get(type(argument), "P")


def _value(argument: Any) -> Any:
    """What is written into memory: an address, a number, or a tensor map's bytes."""
    if argument is None:
        return 0
    if type(argument) in FORMATS:
        return argument
    return argument.tobytes() if type(argument) is np.ndarray else argument.data.ptr


def load() -> Any:
    """libcuda, which CuPy has loaded already. Raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
