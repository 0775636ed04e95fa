"""The cases of bench_kernels.py for the ops of training, one a step of ViT-B/32 with 32 pairs."""

from __future__ import annotations

import numpy as np
from kernel_work import Op, Work, normal

from npclip.ops import equal_seqlens

IMAGES, TEXTS = "training, 32 images", "training, 32 texts of 12 tokens"


def activation(n: int, d: int) -> Work:
    """Of the exponential and its like 20 flop are counted a value."""
    return Work(20 * n * d, {"x": normal(n, d)})


def activation_backward(n: int, d: int) -> Work:
    """25 flop a value."""
    return Work(25 * n * d, {"x": normal(n, d), "dy": normal(n, d)})


def layer_norm_backward(n: int, d: int) -> Work:
    """20 flop a value."""
    return Work(20 * n * d, {"x": normal(n, d), "weight": normal(d), "dy": normal(n, d)})


def linear_weight_backward(n: int, k: int, m: int) -> Work:
    """Of x that was packed before."""
    return Work(2 * n * k * m, {"x": normal(n, k), "dy": normal(n, m)})


def attention_backward(batch: int, tokens: int, heads: int, head_width: int) -> Work:
    """Five products; the exponentials are not counted."""
    width = heads * head_width
    arguments = {
        "qkv": normal(batch * tokens, 3 * width),
        "dy": normal(batch * tokens, width),
        "cu_seqlens": equal_seqlens(batch, tokens),
        "heads": heads,
    }
    return Work(10 * batch * heads * tokens**2 * head_width, arguments)


def attention_pool_backward(batch: int, tokens: int, heads: int, head_width: int) -> Work:
    """Five products of a row or column."""
    width = heads * head_width
    arguments = {
        "q": normal(batch, width),
        "kv": normal(batch * tokens, 2 * width),
        "dy": normal(batch, width),
        "cu_seqlens": equal_seqlens(batch, tokens),
        "heads": heads,
    }
    return Work(10 * batch * tokens * width, arguments)


def embed_tokens_backward(n: int, d: int, vocabulary: int) -> Work:
    """Two additions a value; the positions are 12. Of the tables only rows that occur move."""
    rng = np.random.default_rng(0)
    ids, positions, dy = rng.integers(0, vocabulary, n), np.arange(n) % 12, normal(n, d)
    arguments = {"ids": ids, "positions": positions, "dy": dy}
    arguments |= {"vocabulary": vocabulary, "context": 77}
    rows = len(np.unique(ids)) + len(np.unique(positions))
    nbytes = ids.nbytes + positions.nbytes + dy.nbytes + 4 * rows * d
    return Work(2 * n * d, arguments, nbytes=nbytes)


def adamw(n: int) -> Work:
    """14 flop a value. NumPy and the kernels change arrays of their own."""
    arguments = {
        "factor": 1.0, "beta1": 0.9, "rest1": 0.1, "beta2": 0.98, "rest2": 0.02, "keep": 0.9999,
        "scale": 1.2, "eps": 1e-6, "rate": 1e-4, "p": normal(n), "g": normal(n), "m": normal(n),
        "v": np.square(normal(n)),
    }  # fmt: skip
    own = {k: x.copy() if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
    return Work(14 * n, arguments, kernel_arguments=own)


def square_sums(n: int) -> Work:
    """2 flop a value."""
    return Work(2 * n, {"x": normal(n)})


MLP = {(1600, 3072): IMAGES, (384, 2048): TEXTS}
WEIGHTS = {(2304 * 768,): "ViT-B/32, in_proj"}
OPS = {
    "quick_gelu": Op("NxF", activation, MLP),
    "gelu": Op("NxF", activation, MLP),
    "quick_gelu_backward": Op("NxF", activation_backward, MLP),
    "gelu_backward": Op("NxF", activation_backward, MLP),
    "linear_weight_backward": Op("NxKxM", linear_weight_backward, {
        (1600, 768, 3072): f"{IMAGES}, c_fc", (384, 512, 2048): f"{TEXTS}, c_fc",
    }),
    "layer_norm_backward": Op("NxD", layer_norm_backward, {(1600, 768): IMAGES, (384, 512): TEXTS}),
    "attention_backward": Op("BxTxHxDh", attention_backward, {
        (32, 50, 12, 64): IMAGES, (32, 257, 16, 64): "ViT-L/14, batch 32",
    }),
    "attention_pool_backward": Op("BxTxHxDh", attention_pool_backward, {
        (32, 50, 12, 64): IMAGES, (32, 12, 8, 64): TEXTS,
    }),
    "embed_tokens_backward": Op("NxDxV", embed_tokens_backward, {(384, 512, 49408): TEXTS}),
    "adamw": Op("N", adamw, WEIGHTS),
    "square_sums": Op("N", square_sums, WEIGHTS),
}  # fmt: skip
