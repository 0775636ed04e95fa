"""The op vocabulary of the models: every call is checked here, then handed to a backend.

What an op returns is for the next op: how it is stored is the backend's affair (bfloat16 is uint16
bit patterns on the CPU); embeddings are float32, and on the CPU so is the residual stream.

A backend is a module with the functions of kernels/reference.py under the same names and
signatures. Kernels may then assume that what reaches them is right. Axis letters are those of
kernels/README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from . import threads
from .errors import BackendError, InputError
from .kernels import reference

Array: TypeAlias = Any  # a NumPy array, or what the backend's own ops return
Parameters: TypeAlias = dict[str, Any]

DTYPES = ("float32", "float16", "bfloat16", "int8")
CPU_DTYPES = DTYPES[:3]


def is_device_array(x: Array) -> bool:
    """Whether x lies on a GPU."""
    return hasattr(x, "__cuda_array_interface__")


@functools.cache
def _host_backend() -> ModuleType:
    """The C kernels; the NumPy reference where there are none."""
    from . import cpu, cpu_library

    return reference if cpu_library.why_unavailable() else cpu


def _backend(x: Array) -> ModuleType:
    """What computes on the device where x lies."""
    if not is_device_array(x):
        return _host_backend()
    cuda, device_of = _gpu_backend()
    return cuda if device_of(x).has_kernels else reference


@functools.cache
def _gpu_backend() -> Any:
    """The CUDA kernels, and what says on which GPU an array lies."""
    from . import cuda
    from .cuda_device import device_of

    return cuda, device_of


def resolve(device: str | None = None, dtype: str | None = None) -> tuple[str, str]:
    """The device and dtype, named in full: None is a GPU if there is one, and its default dtype.

    Raises BackendError for what is not available: what was asked for is never replaced.
    """
    dtype = None if dtype is None else _dtype_name(dtype)
    device = _default_device() if device is None else str(device)
    kind, colon, ordinal = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and ordinal.isdecimal())):
        raise BackendError(f'device {device!r} is not "cpu", "cuda" or "cuda:N"')
    allowed: tuple[str, ...] = CPU_DTYPES
    if kind == "cuda":
        opened = open_device(device)
        device, allowed = str(opened), opened.dtypes
    dtype = dtype or allowed[0]
    if dtype not in allowed:
        raise BackendError(f"dtype {dtype!r} is not available on {device}: {', '.join(allowed)}")
    return device, dtype


def _default_device() -> str:
    from . import cuda_device

    return "cpu" if cuda_device.why_unavailable() else "cuda"


def open_device(device: str) -> Any:
    """The cuda_device.Device of "cuda" or "cuda:N"."""
    from . import cuda_device

    try:
        return cuda_device.open_device(int(device.partition(":")[2] or 0))
    except BackendError as error:
        raise BackendError(f"device {device!r} is not available: {error}") from None


def keeps_float16(device: str) -> bool:
    """Whether the backend takes matrices in float16 as they are."""
    return device != "cpu" or _host_backend() is not reference


CACHE_VALUES = 6_500_000  # 13 MB in bfloat16; RN50's feature maps of 8 images
# Layers whose result is float32 in every dtype: embeddings and the residual stream.
FLOAT32_LAYERS = ("proj", "text_projection", "ln_pre", "c_proj")


def prepare(
    params: Parameters, dtype: str, release: Callable[[], None], device: str = "cpu"
) -> Parameters:
    """Parameters with every weight in the backend's layout, on the device; `params` are used up.

    dtype: of the weights and what they are multiplied with, see load(). release is called after
    each weight: what it was made from is not needed any more.
    """
    from . import cpu, weights

    if device != "cpu":
        from . import cuda

        placed = cuda.place(params, open_device(device), dtype, FLOAT32_LAYERS)
        release()
        return placed
    use_kernels = _host_backend() is cpu

    def convert(name: str, layer: Parameters) -> None:
        if use_kernels:
            result = "float32" if name in FLOAT32_LAYERS else dtype
            layer["weight"] = cpu.pack(layer["weight"], dtype, result)
        elif layer["weight"].ndim >= 2:
            layer["weight"] = weights.round_to(layer["weight"], dtype)
        release()

    threads.map_weights(lambda layer: convert(*layer), _layers(params))
    return params


def _layers(node: Any, name: str = "") -> Iterator[tuple[str, Parameters]]:
    """Every dict with a weight, and its key."""
    if isinstance(node, list):
        for child in node:
            yield from _layers(child)
    if isinstance(node, dict):
        if hasattr(node.get("weight"), "ndim"):
            yield name, node
        for key, child in node.items():
            yield from _layers(child, key)


def _dtype_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise BackendError(f"dtype {name!r} is not one of: {', '.join(DTYPES)}")
    return name


def linear(
    x: Array,
    weight: Array,
    bias: Array = None,
    activation: str | None = None,
    residual: Array = None,
) -> Array:  # [N, K], [M, K] -> [N, M]
    """activation(x weight^T + bias) + residual"""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise _mismatch("linear", x=x, weight=weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise _mismatch("linear", bias=bias, weight=weight)
    if residual is not None and residual.shape != (len(x), weight.shape[0]):
        raise _mismatch("linear", residual=residual, x=x, weight=weight)
    _check_activation("linear", activation)
    return _backend(x).linear(x, weight, bias, activation, residual)


def attention(
    qkv: Array, cu_seqlens: Array, heads: int, causal: bool = False
) -> Array:  # [N, 3D] -> [N, D]
    """softmax(q k^T / sqrt(Dh)) v, per sequence and head; causal: a token sees no later one."""
    if qkv.ndim != 2 or qkv.shape[1] % (3 * heads):
        raise InputError(f"attention: qkv {list(qkv.shape)} is not [N, 3 * {heads} heads * Dh]")
    _check_seqlens("attention", cu_seqlens, len(qkv))
    return _backend(qkv).attention(qkv, cu_seqlens, heads, causal)


def attention_pool(
    q: Array, kv: Array, cu_seqlens: Array, heads: int
) -> Array:  # [B, D], [N, 2D] -> [B, D]
    """attention with one query per sequence, which sees all of it."""
    if q.ndim != 2 or kv.ndim != 2 or kv.shape[1] != 2 * q.shape[1] or q.shape[1] % heads:
        raise _mismatch("attention_pool", q=q, kv=kv)
    _check_seqlens("attention_pool", cu_seqlens, len(kv))
    if isinstance(cu_seqlens, np.ndarray) and len(q) != len(cu_seqlens) - 1:
        raise _mismatch("attention_pool", q=q, cu_seqlens=cu_seqlens)
    return _backend(q).attention_pool(q, kv, cu_seqlens, heads)


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:  # [N, D] -> [N, D]
    """(x - mean) / sqrt(var + 1e-5) * weight + bias, over the last axis"""
    if not x.shape[-1:] == weight.shape == bias.shape:
        raise _mismatch("layer_norm", x=x, weight=weight, bias=bias)
    return _backend(x).layer_norm(x, weight, bias)


def add_layer_norm(x: Array, h: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """x + h, and its LayerNorm: [N, D], [N, D]"""
    if x.shape != h.shape or not x.shape[-1:] == weight.shape == bias.shape:
        raise _mismatch("add_layer_norm", x=x, h=h, weight=weight, bias=bias)
    return _backend(x).add_layer_norm(x, h, weight, bias)


def patchify(images: Array, patch: int) -> Array:  # [B, C, R, R] -> [B G G, C P P]
    """Each P x P patch of the images as one row."""
    if images.ndim != 4 or images.shape[2] % patch or images.shape[3] % patch:
        raise InputError(f"patchify: {list(images.shape)} does not divide into patches of {patch}")
    return _backend(images).patchify(images, patch)


def embed_patches(
    patches: Array, class_embedding: Array, positional_embedding: Array, weight: Array, bias: Array
) -> Array:  # [B G G, D] -> [B T, D]
    """layer_norm of each image's class token and patches (T = G G + 1), plus their positions"""
    tokens, width = positional_embedding.shape
    if patches.shape[1:] != (width,) or len(patches) % (tokens - 1):
        raise _mismatch("embed_patches", patches=patches, positional_embedding=positional_embedding)
    for name, vector in (("class_embedding", class_embedding), ("weight", weight), ("bias", bias)):
        if vector.shape != (width,):
            raise _mismatch("embed_patches", patches=patches, **{name: vector})
    vectors = class_embedding, positional_embedding, weight, bias
    return _backend(patches).embed_patches(patches, *vectors)


def embed_tokens(
    ids: Array, positions: Array, token_embedding: Array, positional_embedding: Array
) -> Array:  # [N], [N] -> [N, D]
    """Each token's vector plus that of its position."""
    for name, index, table in (
        ("ids", ids, token_embedding),
        ("positions", positions, positional_embedding),
    ):
        if is_device_array(index) or not index.size:
            continue
        if not 0 <= index.min() <= index.max() < len(table):
            raise InputError(
                f"embed_tokens: {name} {index.min()} .. {index.max()} are not all in "
                f"0 .. {len(table) - 1}"
            )
    embed = _backend(token_embedding).embed_tokens
    return embed(ids, positions, token_embedding, positional_embedding)


def conv2d(
    x: Array,
    weight: Array,
    bias: Array = None,
    stride: int = 1,
    activation: str | None = None,
    residual: Array = None,
) -> Array:  # [B, H, W, C], [O, k, k, C] -> [B, H / stride, W / stride, O]
    """activation(convolution + bias + residual), padding k // 2"""
    if x.ndim != 4 or weight.ndim != 4 or x.shape[3] != weight.shape[3]:
        raise _mismatch("conv2d", x=x, weight=weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise _mismatch("conv2d", bias=bias, weight=weight)
    height, width = ((n - 1) // stride + 1 for n in x.shape[1:3])
    if residual is not None and residual.shape != (len(x), height, width, weight.shape[0]):
        raise _mismatch("conv2d", residual=residual, x=x, weight=weight)
    _check_activation("conv2d", activation)
    return _backend(x).conv2d(x, weight, bias, stride, activation, residual)


def avg_pool2d(x: Array, k: int) -> Array:  # [B, H, W, C] -> [B, H / k, W / k, C]
    """The mean of each k x k cell."""
    if x.ndim != 4 or x.shape[1] % k or x.shape[2] % k:
        raise InputError(f"avg_pool2d: {list(x.shape)} does not divide into cells of {k} x {k}")
    return _backend(x).avg_pool2d(x, k)


def l2_normalize(x: Array) -> Array:
    """x / |x| along the last axis"""
    return _backend(x).l2_normalize(x)


def similarity(
    queries: Array, rows: Array, cosine: bool = False
) -> Array:  # [Q, D], [N, D] -> [Q, N]
    """queries rows^T, of float32 with float16 or float32; cosine: over the lengths of the rows"""
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise _mismatch("similarity", queries=queries, rows=rows)
    return _host_backend().similarity(queries, rows, cosine)


def softmax(x: Array) -> Array:
    """exp(x) / sum exp(x) along the last axis"""
    return _backend(x).softmax(x)


def in_batches(function: Callable[[Array], Array], x: Array, values: int) -> Array:
    """function of x, as many rows at a time as fit the last cache; values: of a row, inside it."""
    if is_device_array(x):
        return function(x)
    rows = max(1, CACHE_VALUES // values)
    return np.concatenate([function(x[i : i + rows]) for i in range(0, max(1, len(x)), rows)])


def equal_seqlens(batch: int, length: int) -> Array:  # int32 [B + 1]
    """cu_seqlens of a batch whose sequences are all of one length."""
    return np.arange(batch + 1, dtype=np.int32) * np.int32(length)


def pack_tokens(ids: Array) -> tuple[Array, Array, Array, Array]:
    """Token ids up to each row's largest (end of text), their positions, cu_seqlens, last rows.

    [B, L] -> [N], [N], [B + 1], [B]
    """
    lengths = ids.argmax(-1) + 1  # [B]
    row, position = np.nonzero(np.arange(ids.shape[1]) < lengths[:, None])
    seqs = np.append(0, lengths.cumsum()).astype(np.int32)
    return ids[row, position], position, seqs, seqs[1:] - 1


def to_float(x: Array) -> Array:
    """x as floating-point numbers, where the backend stores activations in another way."""
    return _backend(x).to_float(x)


def take(x: Array, rows: Array) -> Array:  # [N, D], [B] -> [B, D]
    """These rows of x."""
    return _backend(x).take(x, rows)


def concatenate(arrays: list[Array]) -> Array:
    """Joined along axis 1."""
    return np.concatenate(arrays, axis=1)


def _check_seqlens(op: str, cu_seqlens: Array, rows: int) -> None:
    if not isinstance(cu_seqlens, np.ndarray):
        return  # on a device, where they cannot be looked at without waiting for it
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != rows or (cu_seqlens[1:] <= cu_seqlens[:-1]).any():
        raise InputError(f"{op}: cu_seqlens do not rise from 0 to N = {rows}")


def _check_activation(op: str, activation: str | None) -> None:
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise InputError(f"{op}: unknown activation {activation!r}")


def _mismatch(op: str, **arrays: Array) -> InputError:
    shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in arrays.items())
    return InputError(f"{op}: shapes do not fit: {shapes}")
