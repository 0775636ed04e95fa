"""What `npclip train` is told: the tables of its TOML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ACTIVATIONS, ARCHITECTURES, HEAD_WIDTH, Config
from ..errors import BackendError, InputError
from .checked import build, flat, option

ARCHITECTURE = (  # what a model of its own shape must say
    *("embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size"),
    *("transformer_width", "transformer_layers"),
)
DERIVED = ("vision_heads", "vision_mlp", "transformer_heads", "transformer_mlp")


@dataclass(frozen=True)
class ModelSettings:
    """[model]: a checkpoint to start from, or an architecture to start with random weights.

    The latter by a name of config.ARCHITECTURES, or by the numbers of config.Config; heads are
    width / 64 by default, and MLPs 4 * width.
    """

    checkpoint: str | None = None  # a name of `npclip models`, or a path
    architecture: str | None = None
    activation: str | None = option(None, one_of=ACTIVATIONS)
    embed_dim: int | None = option(None, at_least=1)
    image_resolution: int | None = option(None, at_least=1)
    vision_layers: int | None = option(None, at_least=1)
    vision_width: int | None = option(None, at_least=1)
    vision_patch_size: int | None = option(None, at_least=1)
    vision_heads: int | None = option(None, at_least=1)
    vision_mlp: int | None = option(None, at_least=1)
    context_length: int | None = option(None, at_least=3)
    vocab_size: int | None = option(None, at_least=514)
    transformer_width: int | None = option(None, at_least=1)
    transformer_layers: int | None = option(None, at_least=1)
    transformer_heads: int | None = option(None, at_least=1)
    transformer_mlp: int | None = option(None, at_least=1)

    def config(self) -> Config | None:
        """Of a model with random weights; None where it starts from a checkpoint.

        Raises InputError for what is missing or contradicts itself.
        """
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, int)}
        ways = [name for name in ("checkpoint", "architecture") if getattr(self, name) is not None]
        ways += ["numbers of an architecture"] if numbers else []
        if len(ways) != 1:
            found = f", not {' and '.join(ways)}" if ways else ""
            raise InputError(
                "model: one of checkpoint, architecture, or the numbers of an architecture" + found
            )
        if self.checkpoint is not None:
            return None
        activation = self.activation or "quick_gelu"
        if self.architecture is not None:
            if self.architecture not in ARCHITECTURES:
                names = ", ".join(name for name, c in ARCHITECTURES.items() if c.is_vit)
                raise InputError(f"model.architecture must be one of {names}")
            return Config(**{**vars(ARCHITECTURES[self.architecture]), "activation": activation})
        for name in ARCHITECTURE:
            if name not in numbers:
                raise InputError(f"model.{name} is missing: an integer")
        numbers = {"context_length": 77, "vocab_size": 49408} | numbers
        for tower in ("vision", "transformer"):
            width = numbers[f"{tower}_width"]
            numbers.setdefault(f"{tower}_heads", max(1, width // HEAD_WIDTH))
            numbers.setdefault(f"{tower}_mlp", 4 * width)
        config = Config(**numbers, activation=activation)
        _check_divides("vision_patch_size", "image_resolution", config)
        _check_divides("vision_heads", "vision_width", config)
        _check_divides("transformer_heads", "transformer_width", config)
        return config


def _check_divides(part: str, whole: str, config: Config) -> None:
    if getattr(config, whole) % getattr(config, part):
        found = f"{getattr(config, whole)} is no multiple of {getattr(config, part)}"
        raise InputError(f"model.{whole} must be a multiple of model.{part}: {found}")


@dataclass(frozen=True)
class DataSettings:
    """[data]: sources as of sources.open_pairs, and how they are read."""

    sources: tuple[str, ...] = option()
    validation: tuple[str, ...] = ()  # likewise, of what is held out
    validation_pairs: int = option(5000, at_least=1)  # of those, the first so many
    image_column: str | None = None
    text_column: str | None = None
    images: str | None = None  # the folder where the paths in tables begin
    zero_shot: str | None = None  # a folder with a folder of images for each class
    labels: str | None = None  # what those folders are called, as for `npclip eval`
    templates: str | None = None  # prompts, likewise
    workers: int | None = option(None, at_least=1)  # threads that read and decode
    max_pixels: int | None = option(None, at_least=1)


@dataclass(frozen=True)
class AugmentSettings:
    """[augment]: of the images that are trained on."""

    scale: tuple[float, float] = option((0.9, 1.0), above=0, at_most=1)
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), above=0)
    flip: float = option(0.0, at_least=0, at_most=1)
    brightness: float = option(0.0, at_least=0)
    contrast: float = option(0.0, at_least=0)
    saturation: float = option(0.0, at_least=0)
    background: str | None = None  # "random", or a colour


@dataclass(frozen=True)
class FreezeSettings:
    """[train.freeze]: as training.Freeze."""

    image: int | str = option(0, at_least=0, one_of=("all",))
    text: int | str = option(0, at_least=0, one_of=("all",))
    logit_scale: bool = False


@dataclass(frozen=True)
class TrainSettings:
    """[train]: one of steps and epochs is needed."""

    batch: int = option(at_least=2)
    steps: int | None = option(None, at_least=1)
    epochs: int | None = option(None, at_least=1)
    micro_batch: int | None = option(None, at_least=1)
    learning_rate: float = option(5e-4, at_least=0)
    warmup: int = option(0, at_least=0)
    weight_decay: float = option(0.2, at_least=0)
    betas: tuple[float, float] = option((0.9, 0.98), at_least=0, at_most=0.99999)
    eps: float = option(1e-6, above=0)
    max_norm: float | None = option(None, above=0)
    patch_dropout: float = option(0.0, at_least=0, at_most=0.95)
    seed: int = option(0, at_least=0)
    dtype: str = option("float32", one_of=("float32", "float16", "bfloat16"))
    device: str | None = None
    freeze: FreezeSettings = FreezeSettings()


@dataclass(frozen=True)
class OutputSettings:
    """[output]: where the run is kept, and how often what is written; all in steps."""

    folder: str = option()
    save_every: int = option(1000, at_least=1)
    evaluate_every: int = option(1000, at_least=1)
    keep: int = option(3, at_least=1)
    curves: str | None = None  # a picture's file name; by default curves.svg, with matplotlib


@dataclass(frozen=True)
class Settings:
    """All of a file."""

    model: ModelSettings
    data: DataSettings
    augment: AugmentSettings
    train: TrainSettings
    output: OutputSettings


CHANGEABLE = (  # with which a run may go on
    *("data.validation", "data.validation_pairs", "data.zero_shot", "data.labels"),
    *("data.templates", "data.workers"),
    *("train.steps", "train.epochs", "train.micro_batch", "train.device"),
    *("output.folder", "output.save_every", "output.evaluate_every", "output.keep"),
    "output.curves",
)


def read_settings(path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Settings:
    """The settings in a TOML file, with changes such as "train.steps=100", whose values are TOML's,
    or else strings.

    Raises InputError, with the key's path, for what is wrong in it, and where it cannot be read;
    BackendError on Python 3.10 without tomli.
    """
    toml = _toml()
    try:
        table = toml.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{os.fspath(path)}: {reason}") from error
    try:
        for change in changes:
            _apply(change, table, toml)
        return check(build(Settings, table))
    except InputError as error:
        raise InputError(f"{os.fspath(path)}: {error}") from None


def _toml() -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli
        except ImportError as error:
            raise BackendError('Python 3.10 needs tomli: pip install "npclip[train]"') from error
        return tomli
    return tomllib


def _apply(change: str, table: dict[str, Any], toml: Any) -> None:
    name, equals, text = change.partition("=")
    *path, key = [part.strip() for part in name.split(".")]
    if not equals or not path or not all([*path, key]):
        raise InputError(f"{change!r} is not of the form table.key=value")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"{name}: {part} is no table")
    try:
        table[key] = toml.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        table[key] = text.strip()


def check(settings: Settings) -> Settings:
    """The settings. Raises InputError where two of them contradict each other."""
    settings.model.config()
    data, augment, train = settings.data, settings.augment, settings.train
    if not data.sources:
        raise InputError("data.sources has no source")
    for key in ("labels", "templates"):
        if getattr(data, key) is not None and data.zero_shot is None:
            raise InputError(f"data.{key} is for data.zero_shot, which is not given")
    for key in ("scale", "ratio"):
        low, high = getattr(augment, key)
        if low > high:
            raise InputError(f"augment.{key} must rise, not [{low}, {high}]")
    if augment.background not in (None, "random"):
        _check_colour(augment.background)
    if (train.steps is None) == (train.epochs is None):
        raise InputError("train: one of steps and epochs is needed, not both")
    if train.micro_batch is not None and train.micro_batch > train.batch:
        raise InputError("train.micro_batch must be at most train.batch")
    if train.steps is not None and train.warmup > train.steps:
        raise InputError("train.warmup must be at most train.steps")
    freeze = train.freeze
    if freeze.image == freeze.text == "all" and freeze.logit_scale:
        raise InputError("train.freeze leaves nothing to train")
    curves = settings.output.curves
    if curves is not None and (os.path.basename(curves) != curves or not curves):
        raise InputError(f"output.curves must be a file name in output.folder, not {curves!r}")
    return settings


def _check_colour(name: str) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise InputError(
            f'augment.background must be "random" or a colour such as "#ffffff", not {name!r:.60}'
        ) from None


def differences(old: Settings, new: Settings) -> list[str]:
    """What keeps a run with old settings from going on with new ones: "key: old -> new"."""
    before = dict(flat(old))
    return [
        f"{key}: {before[key]!r} -> {value!r}"
        for key, value in flat(new)
        if key not in CHANGEABLE and before[key] != value
    ]
