"""The ops of CLIP in NumPy: the specification that every native kernel is tested against.

Axes: B batch, T tokens of one sequence, N all tokens of the batch, D width, H heads, Dh head width,
F hidden width of the MLP, E embedding; images are B H W C inside the ResNets. Sequences are packed:
the rows of sequence b are cu_seqlens[b] .. cu_seqlens[b+1]. Each function computes in the dtype of
its input, so the same text in float64 is the ground truth and in float32 the portable backend;
`like=` makes it run on any arrays that know NumPy's functions, such as CuPy's.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def linear(x, weight, bias=None, activation=None, residual=None):  # [N, K], [M, K] -> [N, M]
    """y = activation(x weight^T + bias) + residual"""
    y = x @ weight.T
    if bias is not None:
        y += bias
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if residual is not None:
        y += residual
    return y


def attention(qkv, cu_seqlens, heads, causal=False):  # [N, 3D] -> [N, D]
    """o = softmax(q k^T / sqrt(Dh)) v, per sequence and head; causal: a token sees no later one."""
    q, k, v = split_heads(qkv, 3, heads)  # [H, N, Dh] each
    q = q * scale_of(q)
    o = np.empty(q.shape[1:2] + q.shape[::2], qkv.dtype, like=qkv)  # [N, H, Dh]
    for i, j in pairwise(cu_seqlens):
        s = q[:, i:j] @ k[:, i:j].transpose(0, 2, 1)  # [H, T, T]
        if causal:
            s += np.triu(np.full((j - i, j - i), -np.inf, s.dtype, like=s), 1)
        o[i:j] = (softmax(s) @ v[:, i:j]).transpose(1, 0, 2)
    return o.reshape(len(qkv), -1)


def attention_pool(q, kv, cu_seqlens, heads):  # [B, D], [N, 2D] -> [B, D]
    """o = softmax(q k^T / sqrt(Dh)) v with one query per sequence, which sees all of it."""
    k, v = split_heads(kv, 2, heads)  # [H, N, Dh] each
    (q,) = split_heads(q, 1, heads)  # [H, B, Dh]
    q = q * scale_of(q)
    o = np.empty(q.shape[1:2] + q.shape[::2], kv.dtype, like=kv)  # [B, H, Dh]
    for b, (i, j) in enumerate(pairwise(cu_seqlens)):
        s = q[:, b : b + 1] @ k[:, i:j].transpose(0, 2, 1)  # [H, 1, T]
        o[b] = (softmax(s) @ v[:, i:j])[:, 0]
    return o.reshape(o.shape[0], -1)


def split_heads(x, parts, heads):  # [N, parts * D] -> parts of [H, N, Dh]
    """Views of x, one head after another."""
    n, width = x.shape
    return x.reshape(n, parts, heads, width // (parts * heads)).transpose(1, 2, 0, 3)


def scale_of(q):
    """1 / sqrt(Dh), in the dtype of q [..., Dh]"""
    return q.dtype.type(q.shape[-1] ** -0.5)


def softmax(x):
    """exp(x) / sum exp(x) along the last axis"""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, weight, bias, eps=1e-5):  # [N, D] -> [N, D]
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the last axis"""
    y = x - x.mean(-1, keepdims=True)
    y /= np.sqrt(np.square(y).mean(-1, keepdims=True) + x.dtype.type(eps))
    y *= weight
    y += bias
    return y


def add_layer_norm(x, h, weight, bias, eps=1e-5):  # [N, D] -> [N, D], [N, D]
    """x + h, and its LayerNorm"""
    x = x + h
    return x, layer_norm(x, weight, bias, eps)


def quick_gelu(x):
    """y = x sigmoid(1.702 x)"""
    y = x * x.dtype.type(-1.702)
    with np.errstate(over="ignore"):  # exp -> inf gives the right limit, -0
        np.exp(y, out=y)
    y += 1
    return np.divide(x, y, out=y)


def gelu(x):
    """y = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2"""
    return x * (1 + erf(x * x.dtype.type(0.5**0.5))) * x.dtype.type(0.5)


def relu(x):
    """y = max(x, 0)"""
    return np.maximum(x, 0)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "relu": relu}

# erf(x) = x T(x^2) / U(x^2) for |x| <= 1, else 1 - exp(-x^2) P(|x|) / Q(|x|): the rational
# approximations of Cephes' ndtr.c (S. Moshier), highest power first, right to 4e-16.
_T = (9.60497373987051638749e0, 9.00260197203842689217e1, 2.23200534594684319226e3,
      7.00332514112805075473e3, 5.55923013010394962768e4)  # fmt: skip
_U = (1.0, 3.35617141647503099647e1, 5.21357949780152679795e2, 4.59432382970980127987e3,
      2.26290000613890934246e4, 4.92673942608635921086e4)  # fmt: skip
_P = (2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687e0,
      4.86371970985681366614e1, 1.96520832956077098242e2, 5.26445194995477358631e2,
      9.34528527171957607540e2, 1.02755188689515710272e3, 5.57535335369399327526e2)  # fmt: skip
_Q = (1.0, 1.32281951154744992508e1, 8.67072140885989742329e1, 3.54937778887819891062e2,
      9.75708501743205489753e2, 1.82390916687909736289e3, 2.24633760818710981792e3,
      1.65666309194161350182e3, 5.57535340817727675546e2)  # fmt: skip


def erf(x):
    """erf(x) = 2 / sqrt(pi) * integral of exp(-t^2) from 0 to x"""
    small = np.clip(x, -1, 1)
    inner = small * _polynomial(_T, small * small) / _polynomial(_U, small * small)
    large = np.clip(np.abs(x), 1, 6)  # erf(6) is 1 in float64
    outer = 1 - np.exp(-large * large) * _polynomial(_P, large) / _polynomial(_Q, large)
    return np.where(np.abs(x) <= 1, inner, np.copysign(outer, x))


def _polynomial(coefficients, x):  # Horner's rule
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + x.dtype.type(c)
    return y


def patchify(images, patch):  # [B, C, R, R] -> [B G G, C P P]
    """Each P x P patch as one row, so that the patch convolution is a linear."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch * patch)


def embed_patches(patches, class_embedding, positional_embedding, weight, bias, eps=1e-5):
    """layer_norm of the class token before the patches of each image (T = G G + 1), plus positions.

    patches [B G G, D], class_embedding, weight, bias [D], positional_embedding [T, D] -> [B T, D]
    """
    x = join_patches(patches, class_embedding, positional_embedding)
    return layer_norm(x, weight, bias, eps)


def join_patches(patches, class_embedding, positional_embedding):
    """The class token before each image's patches, plus positions: what embed_patches norms."""
    tokens, width = positional_embedding.shape
    shape = len(patches) // (tokens - 1), tokens, width
    x = np.empty(shape, patches.dtype, like=patches)
    x[:, 0] = class_embedding
    x[:, 1:] = patches.reshape(-1, tokens - 1, width)
    x += positional_embedding
    return x.reshape(-1, width)


def embed_tokens(ids, positions, token_embedding, positional_embedding):  # [N], [N] -> [N, D]
    """Each token's vector plus that of its position."""
    return token_embedding[ids] + positional_embedding[positions]


def conv2d(x, weight, bias, stride=1, activation=None, residual=None):
    """y = activation(x * weight + bias + residual), padding k // 2: a linear over k x k windows.

    x [B, H, W, C], weight [O, k, k, C], residual and y [B, H / stride, W / stride, O]
    """
    outputs, kernel = weight.shape[:2]
    weight, pad = weight.reshape(outputs, -1), kernel // 2
    size = [(n - 1) // stride + 1 for n in x.shape[1:3]]
    y = np.empty((len(x), *size, outputs), x.dtype, like=x)
    for b, image in enumerate(x):
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        windows = sliding_window_view(image, (kernel, kernel), axis=(0, 1))[::stride, ::stride]
        rows = windows.transpose(0, 1, 3, 4, 2).reshape(-1, weight.shape[1])  # [H W, k k C]
        r = None if residual is None else residual[b].reshape(-1, outputs)
        y[b] = linear(rows, weight, bias, None, r).reshape(y[b].shape)
    return y if activation is None else ACTIVATIONS[activation](y)


def avg_pool2d(x, k):  # [B, H, W, C] -> [B, H / k, W / k, C]
    """The mean of each k x k cell."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // k, k, width // k, k, channels).mean((2, 4))


def take(x, rows):  # [N, D], [B] -> [B, D]
    """These rows of x."""
    return x[rows]


def to_float(x):
    """x: here everything is a floating-point number already."""
    return x


def l2_normalize(x):
    """x / |x| along the last axis"""
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True))


def similarity(queries, rows, cosine=False):  # [Q, D], [N, D] -> [Q, N]
    """queries rows^T; cosine: over the length of the row, and 0 where that is 0.

    rows may be stored in a narrower dtype: it is computed in that of queries.
    """
    rows = rows.astype(queries.dtype)
    s = queries @ rows.T
    if cosine:
        lengths = np.sqrt(np.square(rows).sum(-1))
        s *= np.divide(1, lengths, np.zeros_like(lengths), where=lengths > 0)
    return s
