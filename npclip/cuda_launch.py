"""What a CUDA kernel is and how it is launched, as data that device, tests and benchmarks read.

A leaf: nothing here needs a GPU, CuPy or a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}  # of a model -> of a symbol
MODEL_DTYPES = {kind: dtype for dtype, kind in DTYPES.items()}
_STORED = {np.dtype(np.float16): "f16", np.dtype(np.uint16): "bf16", np.dtype(np.float32): "f32"}


@dataclass(frozen=True)
class Kernel:
    """One compiled variant of a kernel: kernels/{file}.cu with these `#define`s before it."""

    file: str
    op: str
    dtype: str  # f16, bf16 or f32
    defines: tuple[tuple[str, int], ...] = ()
    headers: tuple[str, ...] = ("common.cuh",)
    arch: str = ""  # the only one it compiles for, if there is only one: "90a"

    def __hash__(self) -> int:
        """Reckoned once: every launch looks its kernel up."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.file, self.op, self.dtype, self.defines, self.headers, self.arch))

    @property
    def symbol(self) -> str:
        """Its name in the compiled module: {op}_{dtype}."""
        return f"{self.op}_{self.dtype}"

    @cached_property
    def source(self) -> str:
        """The one string that is compiled."""
        folder = files("npclip.kernels")
        names = {"DTYPE": self.dtype.upper(), **dict(self.defines)}
        return "".join(
            [
                *(f"#define {name} {value}\n" for name, value in names.items()),
                *((folder / header).read_text() for header in self.headers),
                (folder / f"{self.file}.cu").read_text(),
            ]
        )


@cache
def kernel(file: str, op: str, dtype: str, *defines: tuple[str, int]) -> Kernel:
    """The one Kernel of these fields: made and hashed once, it costs a launch next to nothing."""
    return Kernel(file, op, dtype, defines)


@dataclass(frozen=True, eq=False)
class TensorMap:
    """What Hopper's TMA must know of a matrix, to fetch boxes of it into shared memory.

    Values of 16 bits; a row of a box is 128 bytes, which are swizzled; zeros outside of the matrix.
    """

    array: Any  # its rows at multiples of 16 bytes
    box: tuple[int, int]  # rows, columns


class Launch(NamedTuple):
    """A call of a kernel.

    arguments: in the kernel's order; an array (its address is passed), None (a null pointer),
    np.int32, np.int64 or np.float32 by value, a TensorMap by value.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int  # threads, in one dimension
    shared: int  # bytes of dynamic shared memory
    arguments: tuple[Any, ...]
    stays: int = 0  # where not 0: a multiple of so many blocks, however few, does all the work


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def stored(x: Any) -> str:
    """How an array's values are stored: f16, bf16 (uint16 bit patterns) or f32."""
    return _STORED[x.dtype]
