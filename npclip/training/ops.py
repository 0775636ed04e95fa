"""The ops of training: a forward as in npclip.ops, with its backward beside it.

Arrays are NumPy's or CuPy's, and what is computed stays where they lie. The forward of all but
linear is npclip.ops', by the native kernels where they exist. On the host the backward is by C
kernels too, and on GPUs by kernels/reference_backward.py. In float32 linear is the array library's
own product, because a kernel's packed weights would have to be packed anew after every step.

Matrices, and what goes from one op to the next, may be stored in float16 or as bits of bfloat16
(uint16): linear stores its result as its weight is. The residual stream, gradients of activations,
sums and everything between are float32, or float64 where all parameters are. On CPUs that multiply
bfloat16 all is stored in float32, and rounded where it is multiplied: such a weight is a Rounded.

A backward takes the layer, a dict with "weight" and perhaps "bias", and returns dx and the layer's
gradients under the same keys.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from .. import cpu_library, cpu_training, ops
from ..cpu import MAX_DEPTH
from ..cpu_training import Rounded
from ..kernels import reference, reference_backward
from ..ops import Array, Parameters, is_device_array

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def backend(x: Array, portable: ModuleType = reference_backward) -> ModuleType:
    """What computes where x lies: the C kernels, or the specification, which takes any arrays."""
    return portable if is_device_array(x) else _kernels() or portable


@functools.cache
def _kernels() -> ModuleType | None:
    return None if cpu_library.why_unavailable() else cpu_training


def multiplies_bfloat16(x: Array) -> bool:
    """Whether there are kernels for that where x lies, which is in float32."""
    return not is_device_array(x) and _kernels() is not None and Rounded.is_possible(x.dtype)


def rounded(params: Any) -> Any:
    """Nested parameters with their matrices as Rounded, but for those that are too large."""
    if isinstance(params, dict):
        return {k: _rounded_weight(v) if k == "weight" else rounded(v) for k, v in params.items()}
    return [rounded(each) for each in params] if isinstance(params, list) else params


def _rounded_weight(weight: Array) -> Array:
    return Rounded(weight) if weight.ndim == 2 and max(weight.shape) <= MAX_DEPTH else weight


def widen(x: Array) -> Array:
    """float16 and bits of bfloat16 as float32; others as they are."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32) if x.dtype == np.float16 else x


def narrow(x: Array, dtype: Any) -> Array:
    """A float array rounded to float16 (beyond it: infinite) or bits of bfloat16; NaN stays NaN.

    A weight that is float32 or float64 stands for both: x stays as it is.
    """
    if x.dtype == dtype or dtype not in (np.float16, np.uint16):
        return x
    x = widen(x)
    if dtype == np.float16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _product(a: Array, b: Array) -> Array:
    """a @ b with sums in float32: on a GPU float16 is multiplied, and returned, as it is."""
    if is_device_array(a) and a.dtype == b.dtype == np.float16:
        return widen(a @ b)
    return widen(a) @ widen(b)


def linear(
    x: Array, weight: Array, bias: Array = None, residual: Array = None, wide: bool = False
) -> Array:  # [N, K], [M, K] -> [N, M]
    """x weight^T + bias + residual, stored as the weight is; in full where there is a residual, or
    wide."""
    if isinstance(weight, Rounded):
        return weight.linear(x, bias, residual)
    y = _product(narrow(x, weight.dtype), weight.T)
    if bias is not None:
        y += bias
    if residual is not None:
        y += residual
    return y if wide or residual is not None else narrow(y, weight.dtype)


def linear_backward(x: Array, layer: Parameters, dy: Array) -> tuple[Array, Parameters]:
    """x as linear took it, dy [N, M] -> dx [N, K], gradients"""
    weight, gradients = layer["weight"], linear_weight_backward(x, layer, dy)
    if isinstance(weight, Rounded):
        return weight.linear_backward(dy), gradients
    return _product(narrow(dy, weight.dtype), weight), gradients


def linear_weight_backward(x: Array, layer: Parameters, dy: Array) -> Parameters:
    """linear_backward without dx"""
    weight = layer["weight"]
    if isinstance(weight, Rounded):
        dweight = cpu_training.linear_weight_backward(x, dy)
    else:
        dweight = _product(narrow(dy, weight.dtype).T, narrow(x, weight.dtype))
    return {"weight": dweight} | ({"bias": dy.sum(0)} if "bias" in layer else {})


def activation(x: Array, name: str) -> Array:
    """QuickGELU or GELU, stored as x is."""
    return narrow(getattr(backend(x, reference), name)(widen(x)), x.dtype)


def activation_backward(x: Array, name: str, dy: Array) -> Array:
    """dx"""
    return getattr(backend(x), f"{name}_backward")(widen(x), dy)


def layer_norm(x: Array, weight: Array, bias: Array, dtype: Any = None) -> Array:
    """npclip.ops.layer_norm of [N, D]; dtype: that of the weight of the linear that comes next."""
    return narrow(ops.layer_norm(x, weight, bias), dtype)


def layer_norm_backward(x: Array, layer: Parameters, dy: Array) -> tuple[Array, Parameters]:
    """dx, gradients"""
    dx, weight, bias = backend(x).layer_norm_backward(x, layer["weight"], dy)
    return dx, {"weight": weight, "bias": bias}


def attention(qkv: Array, seqs: Array, heads: int, causal: bool) -> Array:  # [N, 3D] -> [N, D]
    """npclip.ops.attention, stored as qkv is."""
    return narrow(ops.attention(_as_the_kernels_take(qkv), seqs, heads, causal), qkv.dtype)


def attention_backward(qkv: Array, dy: Array, seqs: Array, heads: int, causal: bool) -> Array:
    """dqkv [N, 3D]"""
    return backend(qkv).attention_backward(widen(qkv), dy, seqs, heads, causal)


def attention_pool(q: Array, kv: Array, seqs: Array, heads: int) -> Array:
    """npclip.ops.attention_pool, stored as q is."""
    inputs = _as_the_kernels_take(q), _as_the_kernels_take(kv)
    return narrow(ops.attention_pool(*inputs, seqs, heads), q.dtype)


def attention_pool_backward(
    q: Array, kv: Array, dy: Array, seqs: Array, heads: int
) -> tuple[Array, Array]:
    """dq [B, D], dkv [N, 2D]"""
    return backend(q).attention_pool_backward(widen(q), widen(kv), dy, seqs, heads)


def _as_the_kernels_take(x: Array) -> Array:
    """On a GPU as it is; on the host in float32, since not every CPU computes in the others."""
    return x if is_device_array(x) else widen(x)


def patchify(images: Array, patch: int) -> Array:  # [B, 3, R, R] -> [B G G, 3 P P]
    """npclip.ops.patchify. It has no backward: pixels are not trained."""
    return ops.patchify(images, patch)


def embed_patches(patches: Array, p: Parameters) -> Array:  # [B G G, D] -> [B T, D]
    """npclip.ops.embed_patches with the image tower's parameters."""
    vectors = p["class_embedding"], p["positional_embedding"]
    return ops.embed_patches(patches, *vectors, **p["ln_pre"])


def embed_patches_backward(patches: Array, p: Parameters, dy: Array) -> tuple[Array, Parameters]:
    """dpatches, gradients by the image tower's keys"""
    vectors = p["class_embedding"], p["positional_embedding"], p["ln_pre"]["weight"]
    gradients = backend(patches).embed_patches_backward(patches, *vectors, dy)
    dx, class_embedding, positional_embedding, weight, bias = gradients
    return dx, {
        "class_embedding": class_embedding.copy(),  # a row of the next
        "positional_embedding": positional_embedding,
        "ln_pre": {"weight": weight, "bias": bias},
    }


def embed_tokens(ids: Array, positions: Array, p: Parameters) -> Array:  # [N], [N] -> [N, D]
    """npclip.ops.embed_tokens with the text tower's parameters; ids lie on the host."""
    return ops.embed_tokens(ids, positions, p["token_embedding"], p["positional_embedding"])


def embed_tokens_backward(ids: Array, positions: Array, p: Parameters, dy: Array) -> Parameters:
    """Gradients by the text tower's keys. On a GPU the order of the sums is not fixed."""
    names = "token_embedding", "positional_embedding"
    rows = [len(p[name]) for name in names]
    if not is_device_array(dy):
        tables = backend(dy).embed_tokens_backward(ids, positions, dy, *rows)
        return dict(zip(names, tables, strict=True))
    gradients = {name: np.zeros_like(p[name]) for name in names}
    for name, index in zip(names, (ids, positions), strict=True):
        _device_of(dy).xp.add.at(gradients[name], like(index, dy), dy)
    return gradients


def take(x: Array, rows: Array) -> Array:  # [N, D], [B] -> [B, D]
    """These rows of x, a new array."""
    return x[like(rows, x)]


def take_backward(rows: Array, dy: Array, n: int) -> Array:  # [B], [B, D] -> [n, D]
    """dx"""
    return reference_backward.take_backward(like(rows, dy), dy, n)


def l2_normalize(x: Array) -> Array:
    """npclip.ops.l2_normalize"""
    return ops.l2_normalize(x)


def l2_normalize_backward(x: Array, dy: Array) -> Array:
    """dx"""
    return reference_backward.l2_normalize_backward(x, dy)


def like(x: Array, other: Array) -> Array:
    """x where other lies: an array of the host goes to its GPU."""
    return _device_of(other).asarray(x) if is_device_array(other) else x


def on_device_of(x: Array) -> AbstractContextManager[Any]:
    """A context in which the GPU where x lies is the current one."""
    return _device_of(x).handle if is_device_array(x) else nullcontext()


def _device_of(x: Array) -> Any:
    from ..cuda_device import device_of

    return device_of(x)
