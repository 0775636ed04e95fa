"""A whole run of training: what `npclip train` does.

from npclip.training.run import run
from npclip.training.settings import read_settings

run(read_settings("config.toml"), resume=True)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from functools import partial

from .. import ops
from ..config import Config, Metadata
from ..errors import InputError, TextTooLongError
from ..evaluation.image_folder import ImageFolder
from ..sources import open_pairs
from ..tokenizer import encode, tokenize
from ..zeroshot import Label, as_templates
from .augment import Augmentation, augment
from .curves import check_curves
from .data import Loader
from .index import FAILED, Index, build_index
from .initialize import initialize
from .loop import Listener, Model, Result, Training
from .optim import AdamW
from .parameters import Freeze, check_trainable, from_checkpoint
from .run_folder import PAIRS, RunFolder
from .settings import DataSettings, Settings
from .state import State, restore
from .validation import Validation

__all__ = ["Listener", "Result", "run"]


def run(
    settings: Settings,
    resume: bool = False,
    listener: Listener | None = None,
    augmentation: Augmentation | None = None,
) -> Result:
    """Train as the settings say, into settings.output.folder.

    resume: go on from the last checkpoint there; where there is none, begin. On one machine and
    number of threads, on the CPU, a run that was killed at any moments gives the bits of an
    unbroken one.
    augmentation: instead of what [augment] says, which then is for held-out images alone: called,
    in threads, with a decoded PIL image, its text, a size and a random generator; returns uint8
    [size, size, 3].

    Raises InputError for settings that do not fit the data, the model or the folder's run, before
    anything is trained; TrainingError where the loss or a gradient is NaN or infinite, or the loss
    rises back to chance, and names the last good checkpoint; KeyboardInterrupt, after a checkpoint,
    for an interrupt from the keyboard or SIGTERM; OSError where the folder cannot be written; what
    from_checkpoint, open_pairs, resolve, train_step and augmentation raise.
    """
    listener = listener or Listener()
    device, _ = ops.resolve(settings.train.device, settings.train.dtype)
    curves = check_curves(settings.output.curves)
    with RunFolder(settings.output.folder) as folder:
        goes_on = folder.check(settings, resume)
        state, config, metadata = _start(settings, folder, goes_on)
        loader = _loader(settings, folder, config, metadata, augmentation, listener)
        validation = _validation(settings, folder, config, listener)
        steps = settings.train.steps or (settings.train.epochs or 0) * loader.steps_per_epoch
        train = settings.train
        if train.warmup > steps:
            raise InputError(f"train.warmup {train.warmup} is more than the run's {steps} steps")
        names = "learning_rate", "warmup", "weight_decay", "betas", "eps", "max_norm"
        optimizer = AdamW(steps, **{name: getattr(train, name) for name in names})
        freeze = Freeze(**vars(train.freeze))
        for tower in ("image", "text"):
            freeze.stages(tower, config)
        folder.begin(settings)
        model = Model(state.to(device), config, metadata, device)
        training = Training(
            settings, folder, model, loader, optimizer, freeze, validation, listener, curves
        )
        return training.run(steps)


def _start(settings: Settings, folder: RunFolder, goes_on: bool) -> tuple[State, Config, Metadata]:
    """From the last checkpoint, or from the beginning."""
    if goes_on and (steps := folder.steps()):
        return restore(folder.checkpoint(steps[-1]))
    seed = settings.train.seed
    if (config := settings.model.config()) is not None:
        metadata = Metadata(activation=config.activation)
        return State.start(initialize(config, seed), seed), config, metadata
    name = settings.model.checkpoint or ""
    params, config, metadata = from_checkpoint(name, activation=settings.model.activation)
    # What is trained further has other weights than its source.
    metadata = dataclasses.replace(metadata, source=None, source_sha256=None)
    return State.start(params, seed), config, metadata


def _loader(
    settings: Settings,
    folder: RunFolder,
    config: Config,
    metadata: Metadata,
    augmentation: Augmentation | None,
    listener: Listener,
) -> Loader:
    check_trainable(config)
    if augmentation is None:
        interpolation = metadata.interpolation
        augmentation = partial(augment, settings=settings.augment, interpolation=interpolation)
    data, train = settings.data, settings.train
    index = _index("train", data.sources, data, folder, listener)
    return Loader(
        index,
        config,
        metadata,
        augmentation,
        train.batch,
        seed=train.seed,
        workers=data.workers,
        max_pixels=data.max_pixels,
    )


def _index(
    name: str,
    sources: tuple[str, ...],
    data: DataSettings,
    folder: RunFolder,
    listener: Listener,
    most: int | None = None,
) -> Index:
    """Of an earlier start, or a new one."""
    options = {k: getattr(data, k) for k in ("image_column", "text_column", "images")}
    key = json.dumps([sources, options, most])
    path = folder.path / PAIRS / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if path.exists():
        return Index(path)
    pairs = open_pairs(sources, **options)
    index = build_index(pairs, path, lambda count: listener.on_index(name, count), most)
    if index.failed:
        listener.on_note(f"{index.failed} of {name} are no pairs: see {path / FAILED}")
    return index


def _validation(
    settings: Settings, folder: RunFolder, config: Config, listener: Listener
) -> Validation | None:
    data = settings.data
    pairs = classes = None
    if data.validation:
        most = data.validation_pairs
        pairs = _index("validation", data.validation, data, folder, listener, most)
    if data.zero_shot is not None:
        classes = ImageFolder(data.zero_shot, data.labels)
        _check_prompts(classes.labels, data.templates, config)
    if pairs is None and classes is None:
        return None
    return Validation(
        pairs,
        classes,
        batch=settings.train.batch,
        templates=data.templates,
        background=settings.augment.background,
        workers=data.workers,
        max_pixels=data.max_pixels,
    )


def _check_prompts(labels: Iterable[Label], templates: str | None, config: Config) -> None:
    """Raises InputError where the longest is too long for the model, which the first evaluation
    would say after everything else."""
    names = [name for label in labels for name in ([label] if isinstance(label, str) else label)]
    vocab = config.vocab_size
    name, template = (
        max(texts, key=lambda text: len(encode(text, vocab_size=vocab)))
        for texts in (names, as_templates(templates))
    )
    try:
        tokenize(template.replace("{}", name), config.context_length, vocab_size=vocab)
    except TextTooLongError as error:
        raise InputError(f"{error}; data.templates can name a file of shorter prompts") from None
