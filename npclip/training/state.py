"""All that a run of training changes, and its checkpoints: a run goes on from one bit for bit.

A checkpoint is a folder: model.safetensors, which npclip.load takes (as it does the folder), and
training.safetensors with the optimiser's moments, the step, the loss scale and the random state.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, Metadata, infer_config, tensor_shapes
from ..errors import CheckpointError, TrainingError
from ..ops import is_device_array, open_device
from ..safetensors_file import read_safetensors, write_safetensors
from ..tensor import MappedFile, Tensor
from ..whole_file import new_folder
from .parameters import Flat, check_trainable

MODEL, TRAINING = "model.safetensors", "training.safetensors"
FIRST_LOSS_SCALE = 2.0**16


@dataclass
class State:
    """Parameters by openai/CLIP's names (float32; float64 works), and where training stands.

    m and v are AdamW's moments. step counts the updates made. rng is for whatever the run draws,
    such as the order of data. loss_scale and steady_steps (since it last changed) are float16's.
    """

    params: Flat
    m: Flat
    v: Flat
    step: int = 0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    loss_scale: float = FIRST_LOSS_SCALE
    steady_steps: int = 0

    @classmethod
    def start(cls, params: Flat, seed: int = 0) -> State:
        """Before the first step, with copies of the parameters, in C order as restore() has them:
        products of others have other bits."""
        params = {
            k: x.copy() if is_device_array(x) else np.array(x, order="C") for k, x in params.items()
        }
        m, v = ({k: np.zeros_like(x) for k, x in params.items()} for _ in range(2))
        return cls(params, m, v, rng=np.random.default_rng(seed))

    def to(self, device: str) -> State:
        """The same on "cpu", "cuda" or "cuda:N". Raises BackendError for a GPU that is missing."""
        move = _host if device == "cpu" else open_device(device).asarray
        arrays = (self.params, self.m, self.v)
        params, m, v = ({name: move(x) for name, x in flat.items()} for flat in arrays)
        return dataclasses.replace(self, params=params, m=m, v=v)


def _host(x: Any) -> Any:
    return x.get() if is_device_array(x) else x


def save(state: State, folder: str | Path, config: Config, metadata: Metadata) -> None:
    """Write a checkpoint as a new folder, which appears complete or not at all.

    metadata: of preprocessing; what config knows is added to it. Raises TrainingError if the folder
    exists or a parameter is NaN or infinite, OSError where it cannot be written.
    """
    folder, params = Path(folder), {k: _host(x) for k, x in state.params.items()}
    if folder.exists():
        raise TrainingError(f"{folder} exists already")
    if bad := [name for name, x in params.items() if not np.isfinite(x).all()]:
        raise TrainingError(f"{len(bad)} parameters are NaN or infinite, {bad[0]} among them")
    metadata = dataclasses.replace(
        metadata,
        activation=config.activation,
        vision_heads=config.vision_heads,
        text_heads=config.transformer_heads,
    )
    moments = {
        f"{kind}/{name}": _host(x)
        for kind, arrays in (("m", state.m), ("v", state.v))
        for name, x in arrays.items()
    }
    with new_folder(folder) as place:
        _write(params, place / MODEL, metadata.to_strings())
        _write(moments, place / TRAINING, {"state": json.dumps(_progress(state))})


def _write(arrays: Flat, path: Path, strings: dict[str, str]) -> None:
    tensors = {k: Tensor(x.shape, x.dtype.name, partial(np.asarray, x)) for k, x in arrays.items()}
    with open(path, "xb") as stream:
        write_safetensors(stream, tensors, strings)


def restore(folder: str | Path) -> tuple[State, Config, Metadata]:
    """What save() wrote. Raises CheckpointError or TrainingError where it is broken."""
    folder = Path(folder)
    params, strings = _read(folder / MODEL)
    metadata = Metadata.from_strings(strings)
    config = infer_config({name: x.shape for name, x in params.items()}, metadata)
    check_trainable(config)
    wanted = tensor_shapes(config)
    moments, progress = _read(folder / TRAINING)
    m, v = ({k[2:]: x for k, x in moments.items() if k.startswith(f"{kind}/")} for kind in "mv")
    for arrays in (params, m, v):
        if {name: x.shape for name, x in arrays.items()} != wanted:
            raise TrainingError(f"{folder}: {MODEL} and {TRAINING} do not fit together")
    state = State(params, m, v)
    try:
        values = json.loads(progress["state"])
        state.rng = np.random.default_rng()
        state.rng.bit_generator.state = values.pop("rng")
        state = dataclasses.replace(state, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{folder / TRAINING}: the state cannot be read: {error}") from error
    return state, config, metadata


def _progress(state: State) -> dict[str, Any]:
    fields = ("step", "loss_scale", "steady_steps")
    return {k: getattr(state, k) for k in fields} | {"rng": state.rng.bit_generator.state}


def _read(path: Path) -> tuple[Flat, dict[str, str]]:
    try:
        tensors, strings = read_safetensors(MappedFile(path))
        return {name: np.array(tensor.read()) for name, tensor in tensors.items()}, strings
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
