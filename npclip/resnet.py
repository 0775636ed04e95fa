"""CLIP's ModifiedResNet image encoder, in the same style as model.py.

Three changes to a ResNet: a stem of three 3 x 3 convolutions, an average pool in place of every
stride, and attention in place of the global average. Feature maps are [B, H, W, C]; BatchNorm is
folded into the convolutions (params.py), so each is one op with bias, ReLU and residual.
"""

from __future__ import annotations

from . import ops
from .config import Config
from .ops import Array, Parameters


def encode_image_resnet(images: Array, p: Parameters, config: Config) -> Array:
    """[B, 3, R, R] -> [B, E]"""
    largest = (
        config.image_resolution // 2
    ) ** 2 * config.vision_width  # of an image's feature maps
    return ops.in_batches(lambda some: encode_batch(some, p, config), images, largest)


def encode_batch(images: Array, p: Parameters, config: Config) -> Array:
    """[B, 3, R, R] -> [B, E]"""
    batch, channels, side, _ = images.shape
    x = ops.patchify(images, 1).reshape(batch, side, side, channels)  # [B, R, R, 3]
    x = ops.conv2d(x, **p["conv1"], stride=2, activation="relu")  # [B, R/2, R/2, D/2]
    x = ops.conv2d(x, **p["conv2"], activation="relu")
    x = ops.conv2d(x, **p["conv3"], activation="relu")  # [B, R/2, R/2, D]
    x = ops.avg_pool2d(x, 2)  # [B, R/4, R/4, D]
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for i, block in enumerate(p[stage]):
            x = bottleneck(x, block, stride=2 if i == 0 and stage != "layer1" else 1)
    return attention_pool2d(x, p["attnpool"], config.vision_heads)  # x was [B, R/32, R/32, 32D]


def bottleneck(x: Array, p: Parameters, stride: int) -> Array:  # [B, H, W, C] -> [B, H/s, W/s, 4D]
    """1 x 1 -> 3 x 3 -> pool -> 1 x 1, plus x, which the first block of a stage projects."""
    h = ops.conv2d(x, **p["conv1"], activation="relu")
    h = ops.conv2d(h, **p["conv2"], activation="relu")
    if stride > 1:
        h, x = ops.avg_pool2d(h, stride), ops.avg_pool2d(x, stride)
    if "downsample" in p:
        x = ops.conv2d(x, **p["downsample"])
    return ops.conv2d(h, **p["conv3"], activation="relu", residual=x)


def attention_pool2d(x: Array, p: Parameters, heads: int) -> Array:  # [B, G, G, D] -> [B, E]
    """Multi-head attention whose one query is the mean of the feature map."""
    batch, width = x.shape[0], x.shape[-1]
    x = ops.to_float(x).reshape(batch, -1, width)
    mean = x.mean(1)  # [B, D]
    position = p["positional_embedding"]  # [G G + 1, D], the mean's first
    x = ops.concatenate([mean[:, None], x]) + position  # [B, T, D]
    seqs = ops.equal_seqlens(batch, x.shape[1])
    q = ops.linear(x[:, 0], **p["q_proj"])  # [B, D]
    kv = ops.linear(x.reshape(-1, width), **p["kv_proj"])  # [N, 2D]
    return ops.linear(ops.attention_pool(q, kv, seqs, heads), **p["c_proj"])
