"""Training on the shards as train.toml says, and the weights in the form that npclip has them."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import npclip
from npclip.commands.train import Progress
from npclip.errors import InputError
from npclip.safetensors_file import write_safetensors
from npclip.tensor import Tensor
from npclip.training import from_checkpoint, ops
from npclip.training.run import run
from npclip.training.settings import ModelSettings, TrainSettings, read_settings
from npclip.whole_file import replacing

from .start import write_start

SETTINGS = Path(__file__).with_name("train.toml")
WEIGHTS = "tiny.safetensors"


def train(folder: Path) -> Path:
    """Trains, or goes on with a training that was broken off, and exports folder/WEIGHTS.

    In float32 on a CPU that does not multiply bfloat16. Raises InputError where folder holds a
    training of another [model], and what run() raises.
    """
    settings = read_settings(SETTINGS)
    data, output, config = settings.data, settings.output, settings.model.config()
    assert config is not None
    sources, validation = (
        tuple(str(folder / path) for path in some) for some in (data.sources, data.validation)
    )
    start, training = folder / "start", folder / output.folder
    if not training.exists():
        write_start(folder / "views" / "00.parquet", start, config)
    elif from_checkpoint(start)[1] != config:
        raise InputError(f"{training} is of another [model] than {SETTINGS}: remove it")
    settings = replace(
        settings,
        model=ModelSettings(checkpoint=str(start)),
        train=replace(settings.train, dtype=_dtype(settings.train)),
        data=replace(data, sources=sources, validation=validation),
        output=replace(output, folder=str(training)),
    )
    progress = Progress(sys.stderr.isatty())
    try:
        result = run(settings, resume=True, listener=progress)
    finally:
        progress.close()
    return export(result.checkpoint, folder / WEIGHTS)


def _dtype(settings: TrainSettings) -> str:
    device, dtype = npclip.ops.resolve(settings.device, settings.dtype)
    multiplies = ops.multiplies_bfloat16(np.zeros((), np.float32))
    return "float32" if device == "cpu" and not multiplies else dtype


def export(checkpoint: Path, target: Path) -> Path:
    """Matrices, the tokens' embeddings among them, in float16; the rest stays as it is."""
    params, _, metadata = from_checkpoint(checkpoint)
    tensors = {}
    for name, x in params.items():
        stored = x.astype(np.float16) if x.ndim > 1 else x
        tensors[name] = Tensor(stored.shape, stored.dtype.name, partial(np.asarray, stored))
    with replacing(target) as stream:
        write_safetensors(stream, tensors, metadata.to_strings())
    return target
