"""Converts any checkpoint to one .safetensors file with openai/CLIP's names, bit for bit.

The file records what shapes do not tell (activation, preprocessing, heads) and where it comes from.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .checkpoint import Checkpoint, Tensor, check_tensors, open_checkpoint, towers_of
from .config import Metadata, infer_config
from .errors import CheckpointError
from .safetensors_file import write_safetensors
from .tensor import DTYPES, Array
from .weights import to_bfloat16
from .whole_file import replacing

TARGETS = ("float32", "float16", "bfloat16")
# What openai/CLIP's convert_weights leaves in float32: norms, embeddings and the logit scale.
KEPT = re.compile(r"(^|\.)(ln_\w+|bn\d|downsample\.1)\.|_embedding\b|^logit_scale$")


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    activation: str | None = None,
) -> Metadata:
    """Write the checkpoint at source (anything that open_checkpoint reads) to target, a
    .safetensors file; return the metadata written.

    dtype "float16" or "bfloat16" casts what openai/CLIP's convert_weights casts (rounding to
    nearest even) and keeps the other tensors as stored; "float32" casts all; None keeps all.
    activation, "quick_gelu" or "gelu", overrides what the checkpoint says.

    target appears complete or not at all, replacing a regular file of that name, never anything
    else. Raises CheckpointError for a source that is not one whole CLIP model, a value that is NaN,
    infinite or too large for dtype, or a bad target; UnknownActivationError where activation is
    needed; OSError where target cannot be written.
    """
    if dtype is not None and dtype not in TARGETS:
        raise CheckpointError(f"dtype {dtype!r} is not one of: {', '.join(TARGETS)}")
    target = Path(target)
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{target}: exists and is not a regular file")
    checkpoint = open_checkpoint(source)
    if any(target.exists() and target.samefile(file.path) for file in checkpoint.files):
        raise CheckpointError(f"{target}: refusing to overwrite the source")
    metadata = dataclasses.replace(
        checkpoint.metadata,
        activation=activation or checkpoint.metadata.activation,
        source=checkpoint.path.name,
    )
    try:
        config = infer_config({k: t.shape for k, t in checkpoint.tensors.items()}, metadata)
        check_tensors(checkpoint.tensors, config, towers_of(config))
    except CheckpointError as error:
        raise type(error)(f"{checkpoint.path}: {error}") from error
    metadata = dataclasses.replace(metadata, source_sha256=checkpoint.sha256())
    _write_atomically(target, checkpoint, dtype, metadata)
    return metadata


def _target_dtype(name: str, tensor: Tensor, dtype: str | None) -> str:
    if dtype is None or (dtype != "float32" and KEPT.search(name)):
        return tensor.dtype
    return dtype


def _write_atomically(
    target: Path, checkpoint: Checkpoint, dtype: str | None, metadata: Metadata
) -> None:
    """Write a temporary file beside target, then rename it; leave nothing behind on failure."""
    try:
        with replacing(target, sync=True) as file:
            _write(file, checkpoint, dtype, metadata)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error


def _write(file: BinaryIO, checkpoint: Checkpoint, dtype: str | None, metadata: Metadata) -> None:
    """One tensor in memory at a time."""

    def read(name: str, target: str) -> Array:
        checkpoint.release()  # what was written before
        tensor = checkpoint.tensors[name]
        array = tensor.read()
        _check_finite(name, array, tensor.dtype)
        return cast(name, array, tensor.dtype, target)

    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        target = _target_dtype(name, tensor, dtype)
        tensors[name] = Tensor(tensor.shape, target, partial(read, name, target))
    write_safetensors(file, tensors, metadata.to_strings())


def _check_finite(name: str, array: Array, dtype: str) -> None:
    finite = (array & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(array)
    if bad := array.size - np.count_nonzero(finite):
        raise CheckpointError(f"tensor {name}: {bad} of {array.size} values are NaN or infinite")


def cast(name: str, array: Array, source: str, target: str) -> Array:
    """The array in another dtype, rounded to nearest even; bfloat16 is uint16 bit patterns.

    float64 goes to bfloat16 by way of float32, as in torch. Raises CheckpointError where a finite
    value becomes infinite.
    """
    if source == target:
        return array
    if source == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if target == "bfloat16":
            result = to_bfloat16(array)
            overflow = (result & 0x7FFF) == 0x7F80
        else:
            result = array.astype(DTYPES[target])
            overflow = np.isinf(result)
    if np.any(overflow & np.isfinite(array)):
        raise CheckpointError(f"tensor {name} holds values too large for {target}")
    return result
