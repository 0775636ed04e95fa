"""The C kernels, bound by ctypes, under the names and signatures of kernels/reference.py.

A kernel is found by its name, `{op}_{dtype}_{isa}`: of the ISAs that the machine has, the first
whose symbol the library exports. What no kernel computes (another dtype of x, weights that were not
packed, sequences longer than a kernel takes) goes to the reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import threads
from .errors import BackendError
from .kernels import reference, reference_resize
from .weights import Packed, round_to, to_bfloat16, to_float16

Array = Any

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")  # worst first, as the bits of npclip_isas()
ACTIVATIONS = {None: 0, "quick_gelu": 1, "gelu": 2, "relu": 3}
MAX_DEPTH, MAX_KEYS, MAX_HEAD_WIDTH = 24576, 1024, 128
# The arguments of each op: p pointer, i int64, c int, f float.
SIGNATURES = {
    "linear": "pppppiiic",
    "pack": "ppii",
    "packed_size": "ii",
    "attention": "pppiiic",
    "attention_pool": "ppppiii",
    "layer_norm": "ppppiif",
    "add_layer_norm": "ppppppiif",
    "patchify": "ppiiiii",
    "embed_patches": "ppppiii",
    "conv2d": "pppppiiiiiiic",
    "avg_pool2d": "ppiiiii",
    "resize": "piiiippippiiiippp",
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


def _best(op: str, dtype: str) -> tuple[Any, str]:
    return next((k, isa) for isa in isas() if (k := kernel(op, dtype, isa)) is not None)


def pack(weight: NDArray[Any], dtype: str) -> Packed | NDArray[np.float32]:
    """A float32 or float16 weight for a model of dtype "float32", "float16" or "bfloat16".

    float16 weights stay so where that loses nothing: arithmetic is in float32 in either case.
    Raises CheckpointError for a weight too large for float16.
    """
    if not weight.size or weight[0].size > MAX_DEPTH:
        return round_to(weight, dtype)
    if dtype == "bfloat16":
        weight, stored = to_bfloat16(weight), "bf16"
    elif weight.dtype == np.float16:
        stored = "f16"
    elif dtype == "float16" and weight.ndim == 2:  # convolutions hold a folded BatchNorm
        weight, stored = to_float16(weight), "f16"
    else:
        stored = "f32"
    weight = np.ascontiguousarray(weight)
    m, k = len(weight), weight[0].size
    pack_kernel, isa = _best("pack", stored)
    buffer = _aligned(kernel("packed_size", "", isa)(m, k), weight.dtype)
    pack_kernel(_pointer(weight), _pointer(buffer), m, k)
    return Packed(weight.shape, stored, isa, buffer)


def _aligned(size: int, dtype: Any) -> NDArray[Any]:
    """An uninitialised array whose first byte lies on a cache line."""
    nbytes = size * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype)


def _pointer(x: NDArray[Any] | None) -> int | None:
    return None if x is None else x.__array_interface__["data"][0]


def _f32(x: Array) -> NDArray[np.float32]:
    return np.ascontiguousarray(x, np.float32)


def _is_f32(*arrays: Array) -> bool:
    return all(a is None or a.dtype == np.float32 for a in arrays)


def linear(
    x: Array,
    weight: Array,
    bias: Array = None,
    activation: str | None = None,
    residual: Array = None,
) -> Array:
    """reference.linear for packed weights."""
    if not isinstance(weight, Packed):
        return reference.linear(x, weight, bias, activation, residual)
    x, (m, k) = _f32(x), weight.shape
    residual = None if residual is None else _f32(residual)
    y = np.empty((len(x), m), np.float32)
    kernel("linear", weight.dtype, weight.isa)(
        _pointer(x), _pointer(weight.buffer), _pointer(bias), _pointer(residual), _pointer(y),
        len(x), k, m, ACTIVATIONS[activation],
    )  # fmt: skip
    return y


def attention(qkv: Array, cu_seqlens: Array, heads: int, causal: bool = False) -> Array:
    """reference.attention"""
    width = qkv.shape[1] // 3
    if not _is_f32(qkv) or not _fits(cu_seqlens, width // heads):
        return reference.attention(qkv, cu_seqlens, heads, causal)
    qkv, o = _f32(qkv), np.empty((len(qkv), width), np.float32)
    seqs = np.ascontiguousarray(cu_seqlens, np.int32)
    _best("attention", "f32")[0](
        _pointer(qkv), _pointer(seqs), _pointer(o), len(seqs) - 1, heads, width // heads, causal
    )
    return o


def attention_pool(q: Array, kv: Array, cu_seqlens: Array, heads: int) -> Array:
    """reference.attention_pool"""
    width = q.shape[1]
    if not _is_f32(q, kv) or not _fits(cu_seqlens, width // heads):
        return reference.attention_pool(q, kv, cu_seqlens, heads)
    q, kv, o = _f32(q), _f32(kv), np.empty(q.shape, np.float32)
    seqs = np.ascontiguousarray(cu_seqlens, np.int32)
    _best("attention_pool", "f32")[0](
        _pointer(q), _pointer(kv), _pointer(seqs), _pointer(o), len(q), heads, width // heads
    )
    return o


def _fits(cu_seqlens: Array, head_width: int) -> bool:
    longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max(initial=0)
    return longest <= MAX_KEYS and head_width <= MAX_HEAD_WIDTH


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """reference.layer_norm"""
    if not _is_f32(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    x, y = _f32(x), np.empty(x.shape, np.float32)
    d = x.shape[-1]
    _best("layer_norm", "f32")[0](
        _pointer(x), _pointer(weight), _pointer(bias), _pointer(y), x.size // d, d, eps
    )
    return y


def add_layer_norm(
    x: Array, h: Array, weight: Array, bias: Array, eps: float = 1e-5
) -> tuple[Array, Array]:
    """reference.add_layer_norm"""
    if not _is_f32(x, h, weight, bias):
        return reference.add_layer_norm(x, h, weight, bias, eps)
    x, h = _f32(x), _f32(h)
    total, y = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    d = x.shape[-1]
    _best("add_layer_norm", "f32")[0](
        _pointer(x), _pointer(h), _pointer(weight), _pointer(bias), _pointer(total), _pointer(y),
        x.size // d, d, eps,
    )  # fmt: skip
    return total, y


def patchify(images: Array, patch: int) -> Array:
    """reference.patchify"""
    if not _is_f32(images):
        return reference.patchify(images, patch)
    images, (batch, channels, height, width) = _f32(images), images.shape
    shape = (batch * (height // patch) * (width // patch), channels * patch * patch)
    rows = np.empty(shape, np.float32)
    _best("patchify", "f32")[0](
        _pointer(images), _pointer(rows), batch, channels, height, width, patch
    )
    return rows


def embed_patches(patches: Array, class_embedding: Array, positional_embedding: Array) -> Array:
    """reference.embed_patches"""
    if not _is_f32(patches, class_embedding, positional_embedding):
        return reference.embed_patches(patches, class_embedding, positional_embedding)
    patches, (tokens, width) = _f32(patches), positional_embedding.shape
    batch = len(patches) // (tokens - 1)
    x = np.empty((batch * tokens, width), np.float32)
    _best("embed_patches", "f32")[0](
        _pointer(patches), _pointer(class_embedding), _pointer(positional_embedding), _pointer(x),
        batch, tokens, width,
    )  # fmt: skip
    return x


def conv2d(
    x: Array,
    weight: Array,
    bias: Array,
    stride: int = 1,
    activation: str | None = None,
    residual: Array = None,
) -> Array:
    """reference.conv2d for packed weights."""
    if not isinstance(weight, Packed):
        return reference.conv2d(x, weight, bias, stride, activation, residual)
    x, (outputs, k, _, channels) = _f32(x), weight.shape
    batch, height, width, _ = x.shape
    residual = None if residual is None else _f32(residual)
    y = np.empty((batch, *((n - 1) // stride + 1 for n in (height, width)), outputs), np.float32)
    kernel("conv2d", weight.dtype, weight.isa)(
        _pointer(x), _pointer(weight.buffer), _pointer(bias), _pointer(residual), _pointer(y),
        batch, height, width, channels, outputs, k, stride, ACTIVATIONS[activation],
    )  # fmt: skip
    return y


def avg_pool2d(x: Array, k: int) -> Array:
    """reference.avg_pool2d"""
    if not _is_f32(x):
        return reference.avg_pool2d(x, k)
    x, (batch, height, width, channels) = _f32(x), x.shape
    y = np.empty((batch, height // k, width // k, channels), np.float32)
    _best("avg_pool2d", "f32")[0](_pointer(x), _pointer(y), batch, height, width, channels, k)
    return y


def resize(
    image: Array,
    x: tuple[Array, Array],
    y: tuple[Array, Array],
    begin: int,
    end: int,
    table: Array,
    out: Array,
) -> None:
    """Rows begin .. end of out [3, size, size], as reference_resize.resize computes them.

    image: uint8 [H, W, 3 or 4] with contiguous rows. x, y: axis_tables, counting from its first
    column and row. table: normalize_table.
    """
    (x_first, x_packed), (y_first, y_packed) = x, y
    height, width, channels = image.shape
    scratch = np.empty(reference_resize.scratch_bytes(x, y), np.uint8)
    _best("resize", "u8")[0](
        _pointer(image), image.strides[0], channels, height, width,
        _pointer(x_first), _pointer(x_packed), x_packed.shape[1],
        _pointer(y_first), _pointer(y_packed), y_packed.shape[1],
        len(y_first), begin, end, _pointer(table), _pointer(scratch), _pointer(out),
    )  # fmt: skip


embed_tokens = reference.embed_tokens
l2_normalize = reference.l2_normalize
softmax = reference.softmax
