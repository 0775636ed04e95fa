"""The shared library of C kernels, by ctypes: its functions by op, dtype and ISA.

A kernel is found by its name, `{op}_{dtype}_{isa}`: of the ISAs that the machine has, the first
whose symbol the library exports.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

from . import threads
from .errors import BackendError

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")  # worst first, as the bits of npclip_isas()
# The arguments of each op: p pointer, i int64, c int, f float.
SIGNATURES = {
    "linear": "pppppiiiccc",
    "pack": "ppii",
    "packed_size": "ii",
    "round_pack": "ppii",
    "round_pack_transposed": "ppii",
    "linear_weight_backward": "pppiii",
    "attention": "pppiiic",
    "attention_pool": "ppppiii",
    "layer_norm": "ppppiif",
    "add_layer_norm": "ppppppiif",
    "l2_normalize": "ppii",
    "patchify": "ppiiiii",
    "embed_patches": "ppppppiiif",
    "conv2d": "pppppiiiiiiiccc",
    "avg_pool2d": "ppiiiii",
    "resize": "piiiippippiiiippp",
    "similarity": "pppiiic",
    "quick_gelu": "ppi",
    "gelu": "ppi",
    "quick_gelu_backward": "pppi",
    "gelu_backward": "pppi",
    "layer_norm_backward": "pppppppiiif",
    "attention_backward": "ppppiiic",
    "attention_pool_backward": "ppppppiii",
    "embed_tokens_backward": "pppppii",
    "adamw": "ppppifffffffff",
    "square_sums": "ppii",
    "peak": "ip",
    "bandwidth": "piip",
}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "c": ctypes.c_int, "f": ctypes.c_float}


def library_path() -> str:
    """Where the shared library of kernels/ is: in the package, or at $NPCLIP_LIBRARY."""
    from importlib.resources import files  # not at import: it takes its time

    return os.environ.get("NPCLIP_LIBRARY") or str(files("npclip.kernels") / "npclip_cpu.so")


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library of kernels/. Raises OSError where it was not built or does not load."""
    lib = ctypes.CDLL(library_path())
    lib.npclip_set_num_threads(threads.get_num_threads())
    threads.on_change(lib.npclip_set_num_threads)
    return lib


def machine_isas() -> tuple[str, ...]:
    """The ISAs that this machine can run and the kernels know, best first."""
    bits = library().npclip_isas()
    return tuple(isa for i, isa in reversed(list(enumerate(ISAS))) if bits >> i & 1)


@functools.cache
def isas() -> tuple[str, ...]:
    """machine_isas() up to $NPCLIP_ISA. Raises BackendError if that is not a name of one."""
    cap = os.environ.get("NPCLIP_ISA")
    if cap is None:
        return machine_isas()
    if cap not in ISAS:
        raise BackendError(f"NPCLIP_ISA={cap} is not one of: {', '.join(ISAS)}")
    return tuple(isa for isa in machine_isas() if ISAS.index(isa) <= ISAS.index(cap))


def why_unavailable() -> str | None:
    """Why there are no C kernels to use; None if there are."""
    if os.environ.get("NPCLIP_BACKEND") == "reference":
        return "NPCLIP_BACKEND=reference"
    try:
        return None if isas() else "this machine has neither AVX2 nor AVX-512"
    except OSError as error:
        return f"the library of C kernels does not load: {error}"


@functools.cache
def kernel(op: str, dtype: str, isa: str) -> Any:
    """The C function of that name, or None."""
    name = f"{op}_{dtype}_{isa}" if dtype else f"{op}_{isa}"
    function = getattr(library(), name, None)
    if function is not None:
        function.argtypes = [TYPES[code] for code in SIGNATURES[op]]
        function.restype = ctypes.c_int64 if op == "packed_size" else None
    return function


def best(op: str, dtype: str) -> tuple[Any, str]:
    """That kernel on the best ISA that has it, and the ISA; (None, "") if none has."""
    found = ((kernel(op, dtype, isa), isa) for isa in isas())
    return next((f for f in found if f[0] is not None), (None, ""))
