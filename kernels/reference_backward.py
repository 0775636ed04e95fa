"""The backward passes of the ops in NumPy: the specification, as reference.py is of the forward.

{op}_backward takes what the op took, as far as it matters, and dy, the gradient of the loss by what
the op returned; it returns the gradients by the op's inputs, in their order. What the forward
computed on its way (mean and variance, P of attention) is computed again. Axes and packing are
those of reference.py.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .reference import erf, join_patches, scale_of, softmax, split_heads


def linear_backward(x, weight, dy):  # [N, K], [M, K], [N, M] -> [N, K], [M, K], [M]
    """y = x weight^T + bias: dx, dweight, dbias"""
    return dy @ weight, linear_weight_backward(x, dy), dy.sum(0)


def linear_weight_backward(x, dy):  # [N, K], [N, M] -> [M, K]
    """y = x weight^T: dweight"""
    return dy.T @ x


def quick_gelu_backward(x, dy):
    """y = x s, s = sigmoid(1.702 x): dx = dy s (1 + 1.702 x (1 - s))"""
    z = x * x.dtype.type(1.702)
    with np.errstate(over="ignore"):  # exp -> inf gives the right limit, 0
        s = 1 / (1 + np.exp(-z))
    return dy * (s * (1 + z * (1 - s)))


def gelu_backward(x, dy):
    """y = x Phi(x): dx = dy (Phi(x) + x phi(x)), phi the density of the normal distribution"""
    cdf = (1 + erf(x * x.dtype.type(0.5**0.5))) * x.dtype.type(0.5)
    density = np.exp(x * x * x.dtype.type(-0.5)) * x.dtype.type((2 * np.pi) ** -0.5)
    return dy * (cdf + x * density)


ACTIVATIONS_BACKWARD = {"quick_gelu": quick_gelu_backward, "gelu": gelu_backward}


def layer_norm_backward(x, weight, dy, eps=1e-5):  # [N, D], [D], [N, D] -> [N, D], [D], [D]
    """y = z weight + bias, z = (x - mean) / sqrt(var + eps): dx, dweight, dbias

    With g = dy weight: dx = (g - mean(g) - z mean(g z)) / sqrt(var + eps).
    """
    z = x - x.mean(-1, keepdims=True)
    std = np.sqrt(np.square(z).mean(-1, keepdims=True) + x.dtype.type(eps))
    z /= std
    g = dy * weight
    dx = (g - g.mean(-1, keepdims=True) - z * (g * z).mean(-1, keepdims=True)) / std
    return dx, (dy * z).sum(0), dy.sum(0)


def attention_backward(qkv, dy, cu_seqlens, heads, causal=False):  # [N, 3D], [N, D] -> [N, 3D]
    """o = P v, P = softmax(q k^T / sqrt(Dh)): dqkv, per sequence and head

    dv = P^T do, dP = do v^T, dS = P (dP - sum(P dP)), dq = dS k / sqrt(Dh), dk = dS^T q / sqrt(Dh)
    """
    q, k, v = split_heads(qkv, 3, heads)  # [H, N, Dh] each
    (do,) = split_heads(dy, 1, heads)
    q = q * scale_of(q)
    dqkv = np.empty((len(qkv), 3, heads, q.shape[-1]), qkv.dtype, like=qkv)
    for i, j in pairwise(cu_seqlens):
        s = q[:, i:j] @ k[:, i:j].transpose(0, 2, 1)  # [H, T, T]
        if causal:
            s += np.triu(np.full((j - i, j - i), -np.inf, s.dtype, like=s), 1)
        p = softmax(s)
        ds = _softmax_backward(p, do[:, i:j] @ v[:, i:j].transpose(0, 2, 1))
        dqkv[i:j, 0] = (ds @ k[:, i:j] * scale_of(q)).transpose(1, 0, 2)
        dqkv[i:j, 1] = (ds.transpose(0, 2, 1) @ q[:, i:j]).transpose(1, 0, 2)
        dqkv[i:j, 2] = (p.transpose(0, 2, 1) @ do[:, i:j]).transpose(1, 0, 2)
    return dqkv.reshape(qkv.shape)


def attention_pool_backward(q, kv, dy, cu_seqlens, heads):  # [B, D], [N, 2D], [B, D] -> as q and kv
    """The same with one query per sequence: dq, dkv"""
    k, v = split_heads(kv, 2, heads)  # [H, N, Dh] each
    (scaled,), (do,) = split_heads(q, 1, heads), split_heads(dy, 1, heads)  # [H, B, Dh]
    scaled = scaled * scale_of(k)
    dq = np.empty((len(q), heads, k.shape[-1]), q.dtype, like=q)
    dkv = np.empty((len(kv), 2, heads, k.shape[-1]), kv.dtype, like=kv)
    for b, (i, j) in enumerate(pairwise(cu_seqlens)):
        p = softmax(scaled[:, b : b + 1] @ k[:, i:j].transpose(0, 2, 1))  # [H, 1, T]
        ds = _softmax_backward(p, do[:, b : b + 1] @ v[:, i:j].transpose(0, 2, 1))
        dq[b] = (ds @ k[:, i:j])[:, 0] * scale_of(k)
        dkv[i:j, 0] = (ds.transpose(0, 2, 1) * scaled[:, b : b + 1]).transpose(1, 0, 2)
        dkv[i:j, 1] = (p.transpose(0, 2, 1) * do[:, b : b + 1]).transpose(1, 0, 2)
    return dq.reshape(q.shape), dkv.reshape(kv.shape)


def _softmax_backward(p, dp):
    return p * (dp - (p * dp).sum(-1, keepdims=True))


def embed_patches_backward(patches, class_embedding, positional_embedding, weight, dy, eps=1e-5):
    """dpatches, dclass_embedding, dpositional_embedding, dweight, dbias

    patches [B G G, D], positional_embedding [T, D], the other vectors [D], dy [B T, D]
    """
    x = join_patches(patches, class_embedding, positional_embedding)
    dx, dweight, dbias = layer_norm_backward(x, weight, dy, eps)
    return *join_patches_backward(dx, len(positional_embedding)), dweight, dbias


def join_patches_backward(dx, tokens):  # [B T, D] -> [B G G, D], [D], [T, D]
    """dpatches, dclass_embedding, dpositional_embedding"""
    dx = dx.reshape(-1, tokens, dx.shape[1])
    dpositions = dx.sum(0)
    return dx[:, 1:].reshape(-1, dx.shape[2]), dpositions[0], dpositions


def embed_tokens_backward(ids, positions, dy, vocabulary, context):  # [N], [N], [N, D]
    """dtoken_embedding [vocabulary, D], dpositional_embedding [context, D]: sums of rows of dy"""
    tables = []
    for index, rows in ((ids, vocabulary), (positions, context)):
        table = np.zeros((rows, dy.shape[1]), dy.dtype, like=dy)
        np.add.at(table, index, dy)
        tables.append(table)
    return tuple(tables)


def take_backward(rows, dy, n):  # [B], [B, D] -> [n, D]
    """dx: dy at these rows, which differ, and 0 elsewhere"""
    dx = np.zeros((n, dy.shape[1]), dy.dtype, like=dy)
    dx[rows] = dy
    return dx


def l2_normalize_backward(x, dy):
    """y = x / |x|: dx = (dy - y sum(y dy)) / |x|"""
    length = np.sqrt(np.square(x).sum(-1, keepdims=True))
    y = x / length
    return (dy - y * (y * dy).sum(-1, keepdims=True)) / length


def contrastive_loss(images, texts, logit_scale):  # [B, E], [B, E], [] -> [], [B, E], [B, E], []
    """CLIP's loss, the symmetric InfoNCE, and its gradients by all three.

    With L = exp(logit_scale) images texts^T: the mean of the cross entropies of L's rows and of its
    columns, the right answer being the diagonal. images and texts are normalised.
    """
    scale = np.exp(logit_scale)
    logits = scale * (images @ texts.T)  # [B, B]
    by_image, by_text = _log_softmax(logits), _log_softmax(logits.T).T
    loss = -(by_image.diagonal() + by_text.diagonal()).mean() / 2
    d = (np.exp(by_image) + np.exp(by_text)) / (2 * len(logits))
    d -= np.eye(len(logits), dtype=d.dtype, like=d) / len(logits)
    return loss, scale * (d @ texts), scale * (d.T @ images), (d * logits).sum()


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def adamw(p, g, m, v, factor, beta1, rest1, beta2, rest2, keep, scale, eps, rate):
    """One step of AdamW, which changes p, m and v in place and returns them; all have g's shape.

    g is multiplied by factor; m and v are running means of g and g^2, rest = 1 - beta;
    p = keep p - rate m / (scale sqrt(v) + eps), keep being what weight decay leaves.
    """
    g = g * factor
    m *= beta1
    m += rest1 * g
    g *= g
    v *= beta2
    v += rest2 * g
    p *= keep
    step = np.sqrt(v)
    step *= scale
    step += eps
    np.divide(m, step, out=step)
    step *= rate
    p -= step
    return p, m, v


BLOCK = 1 << 16


def square_sums(x):
    """[blocks] float64: the sum of squares of every BLOCK values of x"""
    x = x.reshape(-1)
    blocks = [x[i : i + BLOCK] for i in range(0, len(x), BLOCK)]
    return np.array([np.square(block, dtype=np.float64).sum() for block in blocks])
