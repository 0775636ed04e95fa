"""What bench_kernels.py times: of every op, the shapes that CLIP calls it with, and its work.

An op is named here once, with a function that makes its arguments from the sizes of a shape. Which
C kernels there are is not written here: the library's own symbols say (bench_kernels.py).
"""

from __future__ import annotations

import numpy as np
import training_cases
from kernel_work import Op, Work, normal

from npclip.config import OPENAI_MEAN, OPENAI_STD
from npclip.kernels import reference_resize
from npclip.ops import equal_seqlens

B1, B32 = "ViT-B/32, batch 1", "ViT-B/32, batch 32"


def linear(n: int, k: int, m: int) -> Work:
    """With a bias."""
    return Work(
        2 * n * k * m, {"x": normal(n, k), "bias": normal(m)}, normal(m, k), activations=("x",)
    )


def attention(batch: int, tokens: int, heads: int, head_width: int) -> Work:
    """The exponentials, one for 4 Dh flop, are not counted."""
    qkv = normal(batch * tokens, 3 * heads * head_width)
    arguments = {"qkv": qkv, "cu_seqlens": equal_seqlens(batch, tokens), "heads": heads}
    return Work(4 * batch * heads * tokens**2 * head_width, arguments, activations=("qkv",))


def attention_pool(batch: int, tokens: int, heads: int, head_width: int) -> Work:
    """One query a sequence."""
    width = heads * head_width
    arguments = {
        "q": normal(batch, width),
        "kv": normal(batch * tokens, 2 * width),
        "cu_seqlens": equal_seqlens(batch, tokens),
        "heads": heads,
    }
    return Work(4 * batch * tokens * width, arguments, activations=("q", "kv"))


def layer_norm(n: int, d: int) -> Work:
    """7 flop a value."""
    return Work(7 * n * d, {"x": normal(n, d), "weight": normal(d), "bias": normal(d)})


def add_layer_norm(n: int, d: int) -> Work:
    """8 flop a value."""
    work = layer_norm(n, d)
    return Work(8 * n * d, {**work.arguments, "h": normal(n, d)}, activations=("h",))


def l2_normalize(n: int, d: int) -> Work:
    """3 flop a value."""
    return Work(3 * n * d, {"x": normal(n, d)})


def similarity(queries: int, n: int, d: int) -> Work:
    """Dot products."""
    arguments = {"queries": normal(queries, d), "rows": normal(n, d)}
    return Work(2 * queries * n * d, arguments, stored=("rows",))


def patchify(batch: int, resolution: int, patch: int) -> Work:
    """No flop: it moves values."""
    _check(resolution % patch == 0, "R is no multiple of P")
    return Work(0, {"images": normal(batch, 3, resolution, resolution), "patch": patch})


def embed_patches(batch: int, tokens: int, width: int) -> Work:
    """An addition and LayerNorm's 7 flop a value."""
    _check(tokens > 1, "T counts the class token and at least one patch")
    arguments = {
        "patches": normal(batch * (tokens - 1), width),
        "class_embedding": normal(width),
        "positional_embedding": normal(tokens, width),
        "weight": normal(width),
        "bias": normal(width),
    }
    return Work(8 * batch * tokens * width, arguments, activations=("patches",))


def conv2d(batch: int, side: int, channels: int, outputs: int, kernel: int, stride: int) -> Work:
    """With a bias and ReLU."""
    _check(kernel % 2 == 1, "k is even")
    pixels = batch * ((side - 1) // stride + 1) ** 2
    arguments = {
        "x": normal(batch, side, side, channels),
        "bias": normal(outputs),
        "stride": stride,
        "activation": "relu",
    }
    weight = normal(outputs, kernel, kernel, channels)
    return Work(2 * pixels * weight.size, arguments, weight, activations=("x",))


def avg_pool2d(batch: int, side: int, channels: int, k: int) -> Work:
    """One addition a value."""
    _check(side % k == 0, "R is no multiple of k")
    arguments = {"x": normal(batch, side, side, channels), "k": k}
    return Work(batch * side**2 * channels, arguments, activations=("x",))


def resize(height: int, width: int, size: int) -> Work:
    """preprocess.py's bicubic resize of the shorter side and crop; 2 flop a weight, 3 channels."""
    old = width, height
    new = tuple(size * side // min(old) for side in old)
    _check(reference_resize.is_x_first(old, new), "Pillow begins with y here")
    left, top = (round((side - size) / 2) for side in new)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    table = reference_resize.normalize_table(OPENAI_MEAN, OPENAI_STD)
    (x_first, x_packed), (y_first, y_packed) = (
        reference_resize.axis_tables(old, new, start, size, "bicubic")
        for old, new, start in ((width, new[0], left), (height, new[1], top))
    )
    rows, columns = (
        slice(2 * first[0], 2 * (first[-1] + packed.shape[1]))
        for first, packed in ((y_first, y_packed), (x_first, x_packed))
    )
    x_taps, y_taps = (
        reference_resize.coefficients(*lengths, size, "bicubic")[1].shape[1]
        for lengths in ((width, new[0], left), (height, new[1], top))
    )
    seen = image[rows, columns]  # what the crop reads
    kernel_arguments = {
        "image": seen,
        "x": (x_first - x_first[0], x_packed),
        "y": (y_first - y_first[0], y_packed),
        "begin": 0,
        "end": size,
        "table": table,
        "out": np.empty((3, size, size), np.float32),
    }
    arguments = {
        "image": image,
        "table": table,
        **dict(zip(("width", "height"), new, strict=True)),
        **{"left": left, "top": top, "size": size},
    }
    flop = 2 * 3 * size * (len(seen) * x_taps + size * y_taps)
    return Work(flop, arguments, kernel_arguments=kernel_arguments)


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


OPS = {
    "linear": Op("NxKxM", linear, {
        (50, 768, 3072): f"{B1}, c_fc",
        (50, 3072, 768): f"{B1}, c_proj",
        (1600, 768, 3072): f"{B32}, c_fc",
        (1600, 3072, 768): f"{B32}, c_proj",
        (257, 1024, 4096): "ViT-L/14, batch 1, c_fc",
        (10, 512, 2048): "text, one caption, c_fc",
        (1, 768, 512): f"{B1}, proj",
    }),
    "attention": Op("BxTxHxDh", attention, {
        (1, 50, 12, 64): B1,
        (32, 50, 12, 64): B32,
        (1, 257, 16, 64): "ViT-L/14, batch 1",
        (32, 12, 8, 64): "text, 32 captions",
    }),
    "attention_pool": Op("BxTxHxDh", attention_pool, {
        (1, 50, 12, 64): B1, (32, 50, 12, 64): B32, (1, 50, 32, 64): "RN50, batch 1",
    }),
    "layer_norm": Op("NxD", layer_norm, {
        (50, 768): B1, (1600, 768): B32, (257, 1024): "ViT-L/14, batch 1",
    }),
    "add_layer_norm": Op("NxD", add_layer_norm, {
        (50, 768): B1, (1600, 768): B32, (257, 1024): "ViT-L/14, batch 1",
    }),
    "l2_normalize": Op("NxD", l2_normalize, {(1, 512): B1, (32, 512): B32}),
    "similarity": Op("QxNxD", similarity, {
        (1, 65536, 512): "a query, a block of rows", (16, 65536, 512): "16 queries",
    }),
    "patchify": Op("BxRxP", patchify, {
        (1, 224, 32): B1, (32, 224, 32): B32, (1, 224, 14): "ViT-L/14, batch 1",
    }),
    "embed_patches": Op("BxTxD", embed_patches, {
        (1, 50, 768): B1, (32, 50, 768): B32, (1, 257, 1024): "ViT-L/14, batch 1",
    }),
    "conv2d": Op("BxRxCxOxkxs", conv2d, {
        (1, 224, 3, 32, 3, 2): "RN50, batch 1, conv1",
        (1, 56, 64, 64, 3, 1): "RN50, batch 1, layer1 conv2",
        (1, 14, 1024, 256, 1, 1): "RN50, batch 1, layer3 conv1",
        (1, 7, 512, 512, 3, 1): "RN50, batch 1, layer4 conv2",
        (8, 28, 128, 128, 3, 1): "RN50, batch 8, layer2 conv2",
    }),
    "avg_pool2d": Op("BxRxCxk", avg_pool2d, {
        (1, 112, 64, 2): "RN50, batch 1, stem", (8, 56, 256, 2): "RN50, batch 8, layer2",
    }),
    "resize": Op("HxWxR", resize, {
        (427, 640, 224): "a photo", (1536, 2048, 224): "a photo of 3 megapixels",
    }),
    **training_cases.OPS,
}  # fmt: skip
README_CASES = (
    f"{B1}, c_fc", f"{B32}, c_fc", f"{B1}, proj", B1, B32, "RN50, batch 1, layer1 conv2",
    "RN50, batch 1, layer4 conv2", "RN50, batch 1, stem", "a photo", "a query, a block of rows",
)  # fmt: skip
