"""CLIP's two transformers: pure functions of (inputs, parameters, config).

Parameters are nested dicts with the keys of openai/CLIP's state_dict (params.py builds them).
Tokens are packed: x [N, D] holds all tokens of the batch, sequence b is the rows
seqs[b] .. seqs[b+1]. Axes: B batch, N tokens, T tokens a sequence, D width, E embedding.
"""

from __future__ import annotations

from . import ops
from .config import Config
from .ops import Array, Parameters
from .resnet import encode_image_resnet


def encode_image(images: Array, p: Parameters, config: Config) -> Array:  # [B, 3, R, R] -> [B, E]
    """The image tower: preprocessed images to embeddings, not normalised."""
    return (encode_image_vit if config.is_vit else encode_image_resnet)(images, p, config)


def encode_image_vit(images: Array, p: Parameters, config: Config) -> Array:
    """The Vision Transformer; an image is its class token and G x G patches."""
    x = ops.patchify(images, config.vision_patch_size)  # [B G G, 3 P P]
    x = ops.linear(x, **p["conv1"])  # [B G G, D]
    embeddings = p["class_embedding"], p["positional_embedding"]
    x = ops.embed_patches(x, *embeddings, **p["ln_pre"])  # [N, D]
    seqs = ops.equal_seqlens(len(images), config.grid**2 + 1)
    x = transformer(x, p, seqs, seqs[:-1], config.vision_heads, False, config.activation)  # [B, D]
    x = ops.layer_norm(x, **p["ln_post"])
    return ops.linear(x, **p["proj"])  # [B, E]


def encode_text(ids: Array, p: Parameters, config: Config) -> Array:  # [B, L] -> [B, E]
    """The text tower: token ids to embeddings, not normalised.

    A text ends at its largest id, the end-of-text token. No earlier token sees what follows, so
    only the tokens up to it are computed.
    """
    return encode_tokens(*ops.pack_tokens(ids), p, config)


def encode_tokens(
    tokens: Array, positions: Array, seqs: Array, last: Array, p: Parameters, config: Config
) -> Array:
    """[N], [N], [B + 1], [B] -> [B, E]"""
    x = ops.embed_tokens(tokens, positions, p["token_embedding"], p["positional_embedding"])
    heads = config.transformer_heads
    x = transformer(x, p, seqs, last, heads, True, config.activation)  # [B, D]
    x = ops.layer_norm(x, **p["ln_final"])
    return ops.linear(x, **p["text_projection"])  # [B, E]


def transformer(
    x: Array, p: Parameters, seqs: Array, rows: Array, heads: int, causal: bool, activation: str
) -> Array:  # [N, D] -> [B, D]
    """All blocks; the last one only for the row of each sequence that is read afterwards."""
    *blocks, last = p["resblocks"]
    for block in blocks:
        x = residual_block(x, block, seqs, heads, causal, activation)
    return final_block(x, last, seqs, rows, heads, activation)


def residual_block(
    x: Array, p: Parameters, seqs: Array, heads: int, causal: bool, activation: str
) -> Array:  # [N, D] -> [N, D]
    """x += attention(ln_1 x); x += mlp(ln_2 x)"""
    h = ops.layer_norm(x, **p["ln_1"])
    h = ops.linear(h, **p["attn"]["in_proj"])  # [N, 3D]
    h = ops.attention(h, seqs, heads, causal)  # [N, D]
    return attention_output_and_mlp(x, h, p, activation)


def final_block(
    x: Array, p: Parameters, seqs: Array, rows: Array, heads: int, activation: str
) -> Array:  # [N, D] -> [B, D]
    """residual_block for one row of each sequence, which sees all of its sequence.

    That holds for the class token (nothing is masked) and for the end-of-text token (it is last).
    """
    h = ops.layer_norm(x, **p["ln_1"])
    kv = ops.linear(h, **p["attn"]["kv_proj"])  # [N, 2D]
    q = ops.linear(ops.take(h, rows), **p["attn"]["q_proj"])  # [B, D]
    h = ops.attention_pool(q, kv, seqs, heads)  # [B, D]
    return attention_output_and_mlp(ops.take(x, rows), h, p, activation)


def attention_output_and_mlp(
    x: Array, h: Array, p: Parameters, activation: str
) -> Array:  # [N, D] -> [N, D]
    """The rest of a block after the heads: out_proj, residual, MLP, residual."""
    h = ops.linear(h, **p["attn"]["out_proj"])
    x, h = ops.add_layer_norm(x, h, **p["ln_2"])
    h = ops.linear(h, **p["mlp"]["c_fc"], activation=activation)  # [N, F]
    return ops.linear(h, **p["mlp"]["c_proj"], residual=x)
