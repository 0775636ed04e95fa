"""Both towers of npclip/model.py with what their backward needs, and that backward.

A forward returns its result and a tape, what it computed on its way; the backward takes the
gradient of the result and the tape, and returns gradients nested as the parameters are. `frozen`
counts the lowest stages of a tower that are not trained, for which nothing is computed: the first
is what embeds patches or tokens, the others are the blocks. Axes are those of npclip/model.py.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from ..config import Config
from ..errors import InputError
from ..ops import Array, Parameters, equal_seqlens, pack_tokens
from . import ops

Tape: TypeAlias = dict[str, Any]


def encode_image(
    images: Array, p: Parameters, config: Config, kept: Array | None = None
) -> tuple[Array, Tape]:
    """The Vision Transformer: [B, 3, R, R] -> [B, E], not normalised.

    kept [B, t], integers of the host: which tokens of each image go on after their embedding, by
    their numbers in the image, the class token's, 0, first; None: all. Raises InputError for the
    config of a ResNet.
    """
    if not config.is_vit:
        raise InputError("only Vision Transformers are trained, and this image tower is a ResNet")
    rows = ops.patchify(images, config.vision_patch_size)  # [B G G, 3 P P]
    patches = ops.linear(rows, **p["conv1"], wide=True)  # [B G G, D]
    x = ops.embed_patches(patches, p)  # [N, D]
    tokens = config.grid**2 + 1
    if kept is not None:
        kept = (kept + tokens * np.arange(len(kept))[:, None]).reshape(-1)
        x, tokens = ops.take(x, kept), len(kept) // len(images)
    seqs = equal_seqlens(len(images), tokens)
    x, blocks = transformer(
        x, p["resblocks"], seqs, seqs[:-1], config.vision_heads, False, config.activation
    )  # [B, D]
    h = ops.layer_norm(x, **p["ln_post"])
    tape = {"rows": rows, "patches": patches, "kept": kept, "blocks": blocks, "x": x, "h": h}
    return ops.linear(h, **p["proj"], wide=True), tape


def encode_image_backward(
    dy: Array, tape: Tape, p: Parameters, config: Config, frozen: int = 0
) -> Parameters:
    """dy [B, E] -> gradients"""
    g: Parameters = {}
    dh, g["proj"] = ops.linear_backward(tape["h"], p["proj"], dy)
    dx, g["ln_post"] = ops.layer_norm_backward(tape["x"], p["ln_post"], dh)
    blocks, heads = tape["blocks"], config.vision_heads
    dx, g["resblocks"] = transformer_backward(
        dx, blocks, p["resblocks"], heads, False, config.activation, frozen
    )
    if frozen:
        return g
    if tape["kept"] is not None:
        n = len(tape["patches"]) // config.grid**2 * (config.grid**2 + 1)
        dx = ops.take_backward(tape["kept"], dx, n)
    dpatches, embeddings = ops.embed_patches_backward(tape["patches"], p, dx)
    weight = ops.linear_weight_backward(tape["rows"], p["conv1"], dpatches)
    return g | embeddings | {"conv1": weight}


def encode_text(ids: Array, p: Parameters, config: Config) -> tuple[Array, Tape]:
    """[B, L], on the host -> [B, E], not normalised; only the tokens up to each text's end are
    computed."""
    tokens, positions, seqs, last = pack_tokens(ids)
    x = ops.embed_tokens(tokens, positions, p)  # [N, D]
    heads = config.transformer_heads
    x, blocks = transformer(x, p["resblocks"], seqs, last, heads, True, config.activation)  # [B, D]
    h = ops.layer_norm(x, **p["ln_final"])
    tape = {"tokens": tokens, "positions": positions, "blocks": blocks, "x": x, "h": h}
    return ops.linear(h, **p["text_projection"], wide=True), tape


def encode_text_backward(
    dy: Array, tape: Tape, p: Parameters, config: Config, frozen: int = 0
) -> Parameters:
    """dy [B, E] -> gradients"""
    g: Parameters = {}
    dh, g["text_projection"] = ops.linear_backward(tape["h"], p["text_projection"], dy)
    dx, g["ln_final"] = ops.layer_norm_backward(tape["x"], p["ln_final"], dh)
    blocks, heads = tape["blocks"], config.transformer_heads
    dx, g["resblocks"] = transformer_backward(
        dx, blocks, p["resblocks"], heads, True, config.activation, frozen
    )
    if frozen:
        return g
    return g | ops.embed_tokens_backward(tape["tokens"], tape["positions"], p, dx)


def transformer(
    x: Array,
    blocks: list[Parameters],
    seqs: Array,
    rows: Array,
    heads: int,
    causal: bool,
    activation: str,
) -> tuple[Array, list[Tape]]:  # [N, D] -> [B, D]
    """All blocks; the last one only for the row of each sequence that is read afterwards."""
    tapes = []
    for block in blocks[:-1]:
        x, tape = residual_block(x, block, seqs, heads, causal, activation)
        tapes.append(tape)
    x, tape = final_block(x, blocks[-1], seqs, rows, heads, activation)
    return x, [*tapes, tape]


def transformer_backward(
    dx: Array,
    tapes: list[Tape],
    blocks: list[Parameters],
    heads: int,
    causal: bool,
    activation: str,
    frozen: int,
) -> tuple[Array, list[Parameters]]:  # [B, D] -> [N, D]
    """Gradients of the blocks; a frozen one's are empty."""
    gradients: list[Parameters] = [{} for _ in blocks]
    last = len(blocks) - 1
    if frozen <= last + 1:
        dx, gradients[last] = final_block_backward(dx, tapes[last], blocks[last], heads, activation)
    for i in reversed(range(max(frozen - 1, 0), last)):
        dx, gradients[i] = residual_block_backward(
            dx, tapes[i], blocks[i], heads, causal, activation
        )
    return dx, gradients


def residual_block(
    x: Array, p: Parameters, seqs: Array, heads: int, causal: bool, activation: str
) -> tuple[Array, Tape]:  # [N, D] -> [N, D]
    """x += attention(ln_1 x); x += mlp(ln_2 x)"""
    h = ops.layer_norm(x, **p["ln_1"], dtype=stored(p))
    qkv = ops.linear(h, **p["attn"]["in_proj"])  # [N, 3D]
    o = ops.attention(qkv, seqs, heads, causal)  # [N, D]
    y, rest = attention_output_and_mlp(x, o, p, activation)
    return y, {"x": x, "h": h, "qkv": qkv, "seqs": seqs, "rest": rest}


def residual_block_backward(
    dy: Array, tape: Tape, p: Parameters, heads: int, causal: bool, activation: str
) -> tuple[Array, Parameters]:  # [N, D] -> [N, D]
    """dx, gradients"""
    dx, do, g = attention_output_and_mlp_backward(dy, tape["rest"], p, activation)
    dqkv = ops.attention_backward(tape["qkv"], do, tape["seqs"], heads, causal)
    dh, g["attn"]["in_proj"] = ops.linear_backward(tape["h"], p["attn"]["in_proj"], dqkv)
    dh, g["ln_1"] = ops.layer_norm_backward(tape["x"], p["ln_1"], dh)
    dx += dh
    return dx, g


def final_block(
    x: Array, p: Parameters, seqs: Array, rows: Array, heads: int, activation: str
) -> tuple[Array, Tape]:  # [N, D] -> [B, D]
    """residual_block for one row of each sequence, which sees all of its sequence."""
    h = ops.layer_norm(x, **p["ln_1"], dtype=stored(p))
    kv = ops.linear(h, **p["attn"]["kv_proj"])  # [N, 2D]
    of_rows = ops.take(h, rows)
    q = ops.linear(of_rows, **p["attn"]["q_proj"])  # [B, D]
    o = ops.attention_pool(q, kv, seqs, heads)  # [B, D]
    y, rest = attention_output_and_mlp(ops.take(x, rows), o, p, activation)
    kept = {"x": x, "h": h, "of_rows": of_rows, "q": q, "kv": kv, "seqs": seqs, "rows": rows}
    return y, kept | {"rest": rest}


def final_block_backward(
    dy: Array, tape: Tape, p: Parameters, heads: int, activation: str
) -> tuple[Array, Parameters]:  # [B, D] -> [N, D]
    """dx, gradients"""
    dx, do, g = attention_output_and_mlp_backward(dy, tape["rest"], p, activation)
    dq, dkv = ops.attention_pool_backward(tape["q"], tape["kv"], do, tape["seqs"], heads)
    attn, rows, n = p["attn"], tape["rows"], len(tape["x"])
    dh, g["attn"]["kv_proj"] = ops.linear_backward(tape["h"], attn["kv_proj"], dkv)
    dh_rows, g["attn"]["q_proj"] = ops.linear_backward(tape["of_rows"], attn["q_proj"], dq)
    dh += ops.take_backward(rows, dh_rows, n)
    dh, g["ln_1"] = ops.layer_norm_backward(tape["x"], p["ln_1"], dh)
    dh += ops.take_backward(rows, dx, n)
    return dh, g


def attention_output_and_mlp(
    x: Array, o: Array, p: Parameters, activation: str
) -> tuple[Array, Tape]:  # [N, D] -> [N, D]
    """The rest of a block after the heads: out_proj, residual, MLP, residual."""
    x = ops.linear(o, **p["attn"]["out_proj"], residual=x)
    h = ops.layer_norm(x, **p["ln_2"], dtype=stored(p))
    f = ops.linear(h, **p["mlp"]["c_fc"])  # [N, F]
    a = ops.activation(f, activation)
    y = ops.linear(a, **p["mlp"]["c_proj"], residual=x)
    return y, {"o": o, "x": x, "h": h, "f": f, "a": a}


def attention_output_and_mlp_backward(
    dy: Array, tape: Tape, p: Parameters, activation: str
) -> tuple[Array, Array, Parameters]:  # [N, D] -> [N, D], [N, D]
    """dx, do, gradients"""
    g: Parameters = {"attn": {}, "mlp": {}}
    da, g["mlp"]["c_proj"] = ops.linear_backward(tape["a"], p["mlp"]["c_proj"], dy)
    df = ops.activation_backward(tape["f"], activation, da)
    dh, g["mlp"]["c_fc"] = ops.linear_backward(tape["h"], p["mlp"]["c_fc"], df)
    dx, g["ln_2"] = ops.layer_norm_backward(tape["x"], p["ln_2"], dh)
    dx += dy
    do, g["attn"]["out_proj"] = ops.linear_backward(tape["o"], p["attn"]["out_proj"], dx)
    return dx, do, g


def stored(block: Parameters) -> Any:
    """The dtype of a block's matrices."""
    return block["mlp"]["c_fc"]["weight"].dtype
