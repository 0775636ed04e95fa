"""A Device on the CPU: its kernels run on the shim, its arrays are NumPy's with CuPy's marks.

Everything above Device is the real thing: placing weights, choosing kernels, packing arguments,
graphs (which here replay a list of launches), dispatch.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from cuda import shim

from npclip import cuda_device
from npclip.cuda_device import Captured, Device


class FakeArray(np.ndarray):
    """What CuPy's arrays have that npclip looks at."""

    device = SimpleNamespace(id=0)

    @property
    def __cuda_array_interface__(self):
        return self.__array_interface__

    def get(self):
        return np.array(self)


def on_device(x):
    """A copy in memory of its own, aligned as GPU memory is."""
    x = np.ascontiguousarray(x)
    memory = np.full(x.nbytes + 256, 0xFF, np.uint8)
    start = -memory.ctypes.data % 256
    array = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    array[...] = x
    return array.view(FakeArray)


class FakeDevice(Device):
    """Device 0."""

    can_time = False

    def __init__(self, capability=(8, 0), records_launches=True):
        self.ordinal, self.xp, self.handle = 0, SimpleNamespace(zeros=self._zeros), nullcontext()
        self.name, self.capability, self.records_launches = "fake", capability, records_launches
        self._start()
        self.recording, self.launches = None, []

    @staticmethod
    def _zeros(shape, dtype):
        return on_device(np.zeros(shape, dtype))

    def empty(self, shape, stored):
        dtype = np.dtype(cuda_device.NUMPY_DTYPES[stored])
        poison = np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8)
        return on_device(poison.view(dtype).reshape(shape))

    def asarray(self, x):
        if isinstance(x, FakeArray):
            return x if x.flags.c_contiguous else on_device(x)
        return on_device(x)

    take_over = asarray

    def copy(self, x):
        return on_device(x)

    def cast(self, x, dtype):
        return on_device(super().cast(x, dtype))

    def widen(self, x):
        return on_device(super().widen(x))

    def asnumpy(self, x):
        return np.array(x)

    def run(self, launch):
        arguments = (
            a.view(np.ndarray) if isinstance(a, FakeArray) else a for a in launch.arguments
        )
        bare = replace(launch, arguments=tuple(arguments))
        self.launches.append(launch)
        if self.recording is not None:
            self.recording.append(bare)
        else:
            shim.run(bare)

    def capture(self, function):
        function()
        if not self.records_launches:
            return Captured(function, None, None, ())
        self.recording = []
        try:
            result, graph = function(), self.recording
        finally:
            self.recording = None
        return Captured(graph, None, result, ())

    def replay(self, captured, buffers, inputs):
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer[...] = x
        if not self.records_launches:
            return captured.graph()
        for launch in captured.graph:
            shim.run(launch)
        return on_device(captured.result)
