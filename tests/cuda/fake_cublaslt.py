"""cublaslt.CublasLt in NumPy, on the memory of fake_cupy."""

from dataclasses import dataclass

import numpy as np
from cuda.fake_cupy import GpuError

from npclip import cublaslt
from npclip.cuda_device import NUMPY_DTYPES
from npclip.weights import to_bfloat16


@dataclass(frozen=True)
class Plan:
    """One way to compute a product, and how long it takes."""

    n: int
    k: int
    m: int
    kind: str
    result_kind: str
    ldx: int
    ldw: int
    ldy: int
    bias: bool
    residual: bool
    milliseconds: float
    workspace_bytes: int = 4096


class FakeCublasLt:
    """A handle of the device that is current when it is made."""

    def __init__(self, gpus, milliseconds=(3.0, 0.5)):
        self.gpus, self.device, self.milliseconds = gpus, gpus.device, milliseconds
        self.asked, self.ran = [], []

    version = 120905

    def plan(self, *product_and_count):
        *product, count = product_and_count
        self._check_device()
        self.asked.append(tuple(product))
        return [Plan(*product, t) for t in self.milliseconds[:count]]

    def run(self, plan, x, w, bias, residual, y, workspace, stream):
        self._check_device()
        if (bias is not None, residual is not None) != (plan.bias, plan.residual):
            raise ValueError("a plan with a bias or residual needs one, another takes none")
        if stream != self.gpus.stream.ptr:
            raise GpuError("a stream of another device")
        if self.gpus.at(workspace).bytes.size < plan.workspace_bytes:
            raise GpuError("the workspace is too small")
        p = plan
        x = self._matrix(x, (p.n, p.k), p.ldx, p.kind)
        w = self._matrix(w, (p.m, p.k), p.ldw, p.kind)
        y = self._matrix(y, (p.n, p.m), p.ldy, p.result_kind)
        vector = bias and self._matrix(bias, (1, p.m), p.m, p.result_kind)
        added = residual and self._matrix(residual, (p.n, p.m), p.ldy, p.result_kind)

        def work():
            total = x.floats() @ w.floats().T
            for term in (vector, added):
                total = total + term.floats() if term else total
            y.write(total)

        arrays = [a for a in (x, w, y, vector, added, self._matrix(workspace)) if a]
        self.gpus.put(work, arrays, plan.milliseconds)
        self.ran.append(plan)

    def _check_device(self):
        if self.gpus.device != self.device:
            raise GpuError(f"the handle is of device {self.device}, not {self.gpus.device}")

    def _matrix(self, address, shape=(1, 1), stride=1, kind="u8"):
        if address % cublaslt.ALIGNMENT_BYTES:
            raise GpuError("an address that is not aligned")
        memory, dtype = self.gpus.at(address), np.dtype(NUMPY_DTYPES[kind])
        strides = stride * dtype.itemsize, dtype.itemsize
        offset = address - memory.address  # NumPy checks that all of it lies in the memory
        return _Matrix(np.ndarray(shape, dtype, memory.bytes, offset, strides), memory)


class _Matrix:
    def __init__(self, values, memory):
        self.values, self.memory = values, memory

    def floats(self):
        if self.values.dtype == np.uint16:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        return self.values.astype(np.float32)

    def write(self, floats):
        is_bfloat16 = self.values.dtype == np.uint16
        self.values[...] = to_bfloat16(floats) if is_bfloat16 else floats
