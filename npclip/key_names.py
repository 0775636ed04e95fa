"""Renames the tensors of every known CLIP layout to openai/CLIP's state_dict names.

Layouts: OpenAI's own; open_clip's, which prefixes the text tower with "text." in some models; and
Hugging Face's CLIPModel, which keeps q, k, v apart and both projections transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from .errors import CheckpointError
from .tensor import Array, Tensor

# Last parts of names that are in some files but are no parameters.
NOT_PARAMETERS = {
    "attn_mask",
    "context_length",
    "input_resolution",
    "num_batches_tracked",
    "position_ids",
    "vocab_size",
}
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile

# How the names of other architectures begin -> what they are.
OTHER_ARCHITECTURES = {
    "logit_bias": "SigLIP's sigmoid loss",
    "vision_model.head.": "SigLIP's pooling head",
    "visual.trunk.": "a timm image tower",
    "visual.attn_pool.": "CoCa's attentional pooling",
    "text_decoder.": "CoCa's text decoder",
    "text.transformer.embeddings.": "a Hugging Face text tower",
    "text.cls_emb": "CoCa's text tower",
}

HUGGING_FACE = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # sic
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.post_layernorm": "visual.ln_post",
}
HUGGING_FACE_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
HUGGING_FACE_TRANSPOSED = {
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}
Q_PROJ = re.compile(r"(.*\.attn\.)q_proj\.(weight|bias)")


def is_hugging_face(tensors: Mapping[str, Tensor]) -> bool:
    """True where the names are those of transformers.CLIPModel or of one of its towers."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in tensors)


def strip_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that training wrappers put before every name."""
    while tensors:
        for prefix in WRAPPER_PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
                break
        else:
            break
    return tensors


def to_openai(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under openai/CLIP's names; names that no layout knows stay as they are.

    Raises CheckpointError for the tensors of another architecture, or two of one name.
    """
    tensors = {k: t for k, t in tensors.items() if k.rpartition(".")[2] not in NOT_PARAMETERS}
    for name in tensors:
        for prefix, what in OTHER_ARCHITECTURES.items():
            if name.startswith(prefix):
                raise CheckpointError(f"not CLIP's architecture: {name} belongs to {what}")
    if is_hugging_face(tensors):
        tensors = _join_qkv(_rename(tensors, _from_hugging_face))
        for key in HUGGING_FACE_TRANSPOSED.values():
            if key in tensors:
                tensors[key] = _transpose(tensors[key])
    else:
        tensors = _rename(tensors, lambda name: name.removeprefix("text."))
    if (scale := tensors.get("logit_scale")) is not None and scale.shape == (1,):
        tensors["logit_scale"] = Tensor((), scale.dtype, lambda: scale.read().reshape(()))
    return tensors


def _rename(tensors: Mapping[str, Tensor], rule: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (new := rule(name)) in renamed:
            raise CheckpointError(f"two tensors would be called {new}; one of them is {name}")
        renamed[new] = tensor
    return renamed


def _from_hugging_face(name: str) -> str:
    if name in HUGGING_FACE_TRANSPOSED:
        return HUGGING_FACE_TRANSPOSED[name]
    for theirs, ours in HUGGING_FACE.items():
        if name == theirs or name.startswith(theirs + "."):
            name = ours + name.removeprefix(theirs)
            break
    prefix, resblocks, rest = name.partition("transformer.resblocks.")
    layer, dot, rest = rest.partition(".")
    for theirs, ours in HUGGING_FACE_BLOCK.items():
        if rest.startswith(theirs + "."):
            return f"{prefix}{resblocks}{layer}{dot}{ours}{rest.removeprefix(theirs)}"
    return name


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The separate q, k, v projections of every block, stacked in that order into in_proj."""
    joined = dict(tensors)
    for name in tensors:
        if not (match := Q_PROJ.fullmatch(name)):
            continue
        block, kind = match.groups()
        names = [f"{block}{letter}_proj.{kind}" for letter in "qkv"]
        if missing := [n for n in names if n not in tensors]:
            raise CheckpointError(f"tensor {missing[0]} is missing although {name} is there")
        joined[f"{block}in_proj_{kind}"] = _concatenate(names, [joined.pop(n) for n in names])
    return joined


def _concatenate(names: list[str], parts: list[Tensor]) -> Tensor:
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        if not part.shape or (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"tensor {name} is {part.dtype} {list(part.shape)}, "
                f"but {names[0]} is {first.dtype} {list(first.shape)}"
            )
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    return Tensor(shape, first.dtype, lambda: np.concatenate([part.read() for part in parts]))


def _transpose(tensor: Tensor) -> Tensor:
    def read() -> Array:
        return tensor.read().T

    return replace(tensor, shape=tensor.shape[::-1], read=read)
