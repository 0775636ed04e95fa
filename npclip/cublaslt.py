"""y = x w^T + bias + residual by NVIDIA's cuBLASLt, called through ctypes.

Addresses are plain numbers, the workspace is the caller's, and nothing is allocated on the device
or waited for, so run() may be captured in a CUDA graph.

cuBLASLt counts matrices by columns. A row-major array is the transpose of a column-major one, so

    y [n, m] = x [n, k] w [m, k]^T    is    D (m x n) = A^T B    with A (k x m) = w, B (k x n) = x

and a bias of every row of D is one of every column of y.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from .errors import BackendError

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for its newest architectures
ALIGNMENT_BYTES = 16  # of every address and of every row that run() is given
INSTALL = "pip install 'npclip[cuda12]' (CUDA 12) or 'npclip[cuda13]' (CUDA 13) brings it"

# Numbers from cublasLt.h, cublas_api.h and library_types.h, under their names there.
CUDA_R_32F = 0
CUDA_R_16F = 2
CUDA_R_16BF = 14
CUBLAS_COMPUTE_32F = 68
CUBLAS_OP_N = 0
CUBLAS_OP_T = 1
CUBLAS_STATUS_SUCCESS = 0
CUBLAS_STATUS_NOT_SUPPORTED = 15
CUBLASLT_EPILOGUE_DEFAULT = 1
CUBLASLT_EPILOGUE_BIAS = 4
CUBLASLT_MATMUL_DESC_TRANSA = 3
CUBLASLT_MATMUL_DESC_TRANSB = 4
CUBLASLT_MATMUL_DESC_EPILOGUE = 7
CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8
CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1
CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3
CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8

DATA_TYPES = {"f16": CUDA_R_16F, "bf16": CUDA_R_16BF, "f32": CUDA_R_32F}
ALIGNMENTS = (
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
)


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algo", Algorithm),
        ("workspaceSize", c_size_t),
        ("state", c_int),
        ("wavesCount", c_float),
        ("reserved", c_int * 4),
    )


# Every function used, with its arguments; all return a status.
_P = c_void_p
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_P,),
    "cublasLtDestroy": (_P,),
    "cublasLtMatmulDescCreate": (_P, c_int, c_int),
    "cublasLtMatmulDescDestroy": (_P,),
    "cublasLtMatmulDescSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatrixLayoutCreate": (_P, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (_P,),
    "cublasLtMatmulPreferenceCreate": (_P,),
    "cublasLtMatmulPreferenceDestroy": (_P,),
    "cublasLtMatmulPreferenceSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (_P, _P, _P, _P, _P, _P, _P, c_int, _P, _P),
    "cublasLtMatmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, c_size_t, _P),
}


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to compute one product."""

    product: Product
    algorithm: Algorithm
    workspace_bytes: int  # at most WORKSPACE_BYTES
    waves: float  # how often it fills the GPU


class CublasLt:
    """cuBLASLt on the GPU that is current at the time of creation.

    Any thread may call it; products that share a workspace must be on one stream.
    """

    def __init__(self, library: Any = None) -> None:
        """library: the loaded library, for tests.

        Raises BackendError where it is not installed or finds no GPU.
        """
        self._lt = Library(library or load())
        self._handle = c_void_p()
        self._lt("cublasLtCreate", byref(self._handle))
        self._end = _at_end(self, self._lt, [("cublasLtDestroy", self._handle)])

    @property
    def version(self) -> int:
        """cuBLASLt's own, as 120905."""
        return self._lt.version()

    def close(self) -> None:
        """Free what it has. Done by itself when nobody refers to it any more."""
        self._end()

    def plan(
        self,
        n: int,
        k: int,
        m: int,
        kind: str,
        result_kind: str,
        ldx: int,
        ldw: int,
        ldy: int,
        bias: bool,
        residual: bool,
        count: int,
    ) -> list[Plan]:
        """At most count ways to compute y [n, m] = x [n, k] w [m, k]^T (+ bias) (+ residual).

        They come in the order in which cuBLASLt expects them to be fast; none means that it cannot
        do it. Sums are float32, those of f32 exact float32 too (no TF32).

        kind: f16, bf16 or f32, of x and w; result_kind: the same or f32, of y, residual and, as
        cuBLASLt wants it, of bias. Biases are float32 arrays: convert them where y is not.
        ldx, ldw, ldy: values from one row to the next; residual has y's.
        """
        product = Product(
            self._lt, n, k, m, kind, result_kind, ldx, ldw, ldy, bias=bias, residual=residual
        )
        preference = c_void_p()
        self._lt("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            workspace = c_uint64(WORKSPACE_BYTES)
            self._prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace)
            in_float32 = c_uint32(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
            self._prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, in_float32)
            for attribute in ALIGNMENTS:
                self._prefer(preference, attribute, c_uint32(ALIGNMENT_BYTES))
            results, found = (HeuristicResult * count)(), c_int()
            status = self._lt.status(
                "cublasLtMatmulAlgoGetHeuristic",
                self._handle,
                product.operation,
                *product.layouts,
                preference,
                count,
                byref(results),
                byref(found),
            )
        finally:
            self._lt.status("cublasLtMatmulPreferenceDestroy", preference)
        if status == CUBLAS_STATUS_NOT_SUPPORTED:
            return []
        self._lt.check("cublasLtMatmulAlgoGetHeuristic", status)
        return [
            Plan(product, Algorithm.from_buffer_copy(r.algo), r.workspaceSize, r.wavesCount)
            for r in results[: found.value]
            if r.state == CUBLAS_STATUS_SUCCESS
        ]

    def run(
        self,
        plan: Plan,
        x: int,
        w: int,
        bias: int | None,
        residual: int | None,
        y: int,
        workspace: int,
        stream: int,
    ) -> None:
        """Put a product on a stream. All are addresses, multiples of ALIGNMENT_BYTES.

        bias, residual: None exactly where the plan has none; residual may be y.
        workspace: of plan.workspace_bytes.
        """
        product = plan.product
        if (bias is not None) != product.has_bias or (residual is not None) != product.has_residual:
            raise ValueError("a plan with a bias or residual needs one, another takes none")
        with product.lock:
            if bias is not None:
                product.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c_void_p(bias))
            w_layout, x_layout, c_layout, y_layout = product.layouts
            self._lt(
                "cublasLtMatmul",
                self._handle,
                product.operation,
                byref(c_float(1)),
                w,
                w_layout,
                x,
                x_layout,
                byref(c_float(product.has_residual)),
                y if residual is None else residual,
                c_layout,
                y,
                y_layout,
                byref(plan.algorithm),
                workspace,
                plan.workspace_bytes,
                stream,
            )

    def _prefer(self, preference: c_void_p, attribute: int, x: Any) -> None:
        arguments = preference, attribute, byref(x), ctypes.sizeof(x)
        self._lt("cublasLtMatmulPreferenceSetAttribute", *arguments)


class Product:
    """cuBLASLt's descriptors of one product, freed with this object. See CublasLt.plan."""

    def __init__(
        self,
        lt: Library,
        n: int,
        k: int,
        m: int,
        kind: str,
        result_kind: str,
        ldx: int,
        ldw: int,
        ldy: int,
        *,
        bias: bool,
        residual: bool,
    ) -> None:
        """Create them."""
        self._lt, self.has_bias, self.has_residual = lt, bias, residual
        self.lock = threading.Lock()  # from setting the bias to reading it
        made: list[tuple[str, c_void_p]] = []
        _at_end(self, lt, made)

        self.operation = c_void_p()
        lt("cublasLtMatmulDescCreate", byref(self.operation), CUBLAS_COMPUTE_32F, CUDA_R_32F)
        made.append(("cublasLtMatmulDescDestroy", self.operation))
        self.set(CUBLASLT_MATMUL_DESC_TRANSA, c_int32(CUBLAS_OP_T))
        self.set(CUBLASLT_MATMUL_DESC_TRANSB, c_int32(CUBLAS_OP_N))
        if bias:
            self.set(CUBLASLT_MATMUL_DESC_EPILOGUE, c_uint32(CUBLASLT_EPILOGUE_BIAS))
            # The choice of algorithms looks at the alignment of the address only.
            self.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c_void_p(ALIGNMENT_BYTES))
        else:
            self.set(CUBLASLT_MATMUL_DESC_EPILOGUE, c_uint32(CUBLASLT_EPILOGUE_DEFAULT))

        self.layouts: list[c_void_p] = []  # of A, B, C and D
        data, result = DATA_TYPES[kind], DATA_TYPES[result_kind]
        matrices = (data, k, m, ldw), (data, k, n, ldx), (result, m, n, ldy), (result, m, n, ldy)
        for matrix in matrices:
            layout = c_void_p()
            lt("cublasLtMatrixLayoutCreate", byref(layout), *matrix)
            made.append(("cublasLtMatrixLayoutDestroy", layout))
            self.layouts.append(layout)

    def set(self, attribute: int, x: Any) -> None:
        """Set an attribute of the operation."""
        arguments = self.operation, attribute, byref(x), ctypes.sizeof(x)
        self._lt("cublasLtMatmulDescSetAttribute", *arguments)


class Library:
    """The functions of the loaded library, with their types."""

    def __init__(self, c: Any) -> None:
        """Raises BackendError if one is missing."""
        self._c = c
        try:
            for name, types in SIGNATURES.items():
                getattr(c, name).argtypes = types
            c.cublasLtGetStatusName.argtypes = (c_int,)
            c.cublasLtGetStatusName.restype = ctypes.c_char_p
            c.cublasLtGetVersion.restype = c_size_t
        except AttributeError as error:
            raise BackendError(f"this cuBLASLt is too old: {error}. {INSTALL}") from None

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function. Raises BackendError, with the name of its status, if it fails."""
        self.check(function, self.status(function, *arguments))

    def version(self) -> int:
        """What cublasLtGetVersion returns."""
        return int(self._c.cublasLtGetVersion())

    def status(self, function: str, *arguments: Any) -> int:
        """Call a function for its status."""
        return getattr(self._c, function)(*arguments)

    def check(self, function: str, status: int) -> None:
        """Raises BackendError if it is one of failure."""
        if status != CUBLAS_STATUS_SUCCESS:
            name = self._c.cublasLtGetStatusName(status)
            raise BackendError(f"{function} failed: {name.decode()}")


def load() -> Any:
    """The library: $NPCLIP_CUBLASLT, or what cuda.pathfinder finds, or what the loader does.

    Raises BackendError where there is none.
    """
    errors = []
    for name in _names():
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
    raise BackendError(f"cuBLASLt is not installed ({errors[0]}). {INSTALL}")


def _names() -> Iterator[str]:
    if named := os.environ.get("NPCLIP_CUBLASLT"):
        yield named
        return
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
    except Exception:  # its own error types, of which not all versions have the same
        path = None
    if path:
        yield path
    for major in (13, 12):
        yield f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"


def _at_end(owner: Any, lt: Library, made: list[tuple[str, c_void_p]]) -> Any:
    """Frees these, the last one first, when owner goes; not at exit, which frees them anyway."""

    def free() -> None:
        while made:
            lt.status(*made.pop())

    end = weakref.finalize(owner, free)
    end.atexit = False
    return end
