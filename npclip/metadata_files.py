"""Reads the JSON files that other projects keep beside their weights, into Metadata.

Hugging Face: config.json and preprocessor_config.json. open_clip: open_clip_config.json. What they
say about the tensors' shapes is ignored (the tensors know better); what npclip would compute
differently is an error here, never a slightly wrong embedding later. The size of images is checked
against `resolution`, the pixels a side that the tensors take; None where they take no images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import HEAD_WIDTH, Metadata
from .errors import CheckpointError

MAX_JSON = 16 << 20  # bytes
LAYER_NORM_EPS = 1e-5
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers

# model_type -> tower -> the key of its section; None: the file is the section
HUGGING_FACE_TYPES: dict[str, dict[str, str | None]] = {
    "clip": {"vision": "vision_config", "text": "text_config"},
    "clip_vision_model": {"vision": None},
    "clip_text_model": {"text": None},
}

# open_clip options -> the values that mean CLIP as OpenAI built it, or None: any value will do.
# An option that is not listed must be absent, null, false or 0.
OPEN_CLIP_MODEL: dict[str, tuple[object, ...] | None] = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "quick_gelu": None,
    "custom_text": None,  # other names for the same tensors
    "init_logit_scale": None,  # training only, here and below
    "nonscalar_logit_scale": None,
    "output_dict": None,
    "cast_dtype": None,
}
OPEN_CLIP_VISION: dict[str, tuple[object, ...] | None] = {
    "image_size": None,
    "layers": None,
    "width": None,
    "patch_size": None,
    "head_width": None,
    "mlp_ratio": None,
    "patch_dropout": None,
    "attn_pooler_queries": None,  # used with attentional_pool only
    "attn_pooler_heads": None,
    "output_tokens": None,
    "pool_type": ("tok",),
    "pos_embed_type": ("learnable",),
    "block_type": ("default",),
}
OPEN_CLIP_TEXT: dict[str, tuple[object, ...] | None] = {
    "context_length": None,
    "vocab_size": None,
    "width": None,
    "heads": None,
    "layers": None,
    "mlp_ratio": None,
    "eos_id": None,  # used with pool_type "eos" only
    "output_tokens": None,
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "block_type": ("default",),
}
OPEN_CLIP_PREPROCESS: dict[str, tuple[object, ...] | None] = {
    "size": None,
    "mean": None,
    "std": None,
    "interpolation": None,
    "resize_mode": None,
    "fill_color": None,  # used with resize_mode "longest" only
    "mode": ("RGB",),
}


class Section:
    """An object of a JSON file, whose values are fetched with their type checked."""

    def __init__(self, path: Path, values: Any, name: str = "") -> None:
        """Raises CheckpointError unless values is a JSON object."""
        self.path, self.name = path, name
        if not isinstance(values, dict):
            raise self.error("", f"must be an object, not {json.dumps(values)[:60]}")
        self.values: dict[str, Any] = values

    def error(self, key: str, problem: str) -> CheckpointError:
        """The exception for one key, which it names with its path in the file."""
        where = ".".join(part for part in (self.name, key) if part) or "its content"
        return CheckpointError(f"{self.path}: {where} {problem}")

    def section(self, key: str) -> Section:
        """The object under key; an empty one where it is absent or null."""
        name = f"{self.name}.{key}" if self.name else key
        return Section(self.path, {} if self.values.get(key) is None else self.values[key], name)

    def get(self, key: str, kind: type, default: Any) -> Any:
        """The value under key, or default where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**53 else value
        if type(value) is not kind:
            raise self.error(key, f"must be of type {kind.__name__}, not {json.dumps(value)[:60]}")
        return value

    def positive(self, key: str, default: int | None) -> int | None:
        """The integer >= 1 under key."""
        value: int | None = self.get(key, int, default)
        if value is not None and value < 1:
            raise self.error(key, f"must be positive, not {value}")
        return value

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """The list of three numbers under key."""
        value = self.get(key, list, None)
        if value is None:
            return default
        if len(value) != 3 or not all(type(v) in (int, float) and abs(v) < 1e3 for v in value):
            raise self.error(key, f"must be three numbers, not {json.dumps(value)[:60]}")
        return tuple(float(v) for v in value)

    def require(self, key: str, wanted: object, default: object = None) -> None:
        """Raise CheckpointError unless the value (or default, where absent) is the wanted one."""
        value = self.values.get(key, default)
        if type(value) is not type(wanted) or value != wanted:
            raise self.error(key, f"is {json.dumps(value)[:60]}: not supported")

    def require_size(self, key: str, resolution: int, spellings: Iterable[object]) -> None:
        """Raise CheckpointError unless the value is absent, null or one of the spellings."""
        value = self.values.get(key)
        if value is not None and without_nulls(value) not in spellings:
            wanted = f"the tensors take images of {resolution} pixels a side"
            raise self.error(key, f"is {json.dumps(value)[:60]}: {wanted}")

    def require_known(self, known: dict[str, tuple[object, ...] | None]) -> None:
        """Raise CheckpointError for an option outside known, or a value outside known's."""
        for key, value in self.values.items():
            allowed = known.get(key, ())
            if value and allowed is not None and value not in allowed:
                raise self.error(key, f"is {json.dumps(value)[:60]}: not supported")


def without_nulls(value: Any) -> Any:
    """A JSON object without the keys that are null; any other value as it is."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def read_json(path: Path) -> Section:
    """The JSON object in the file. Raises CheckpointError where there is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise CheckpointError(f"{path}: longer than {MAX_JSON} bytes")
        values = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    return Section(path, values)


def hugging_face_metadata(directory: Path, resolution: int | None) -> Metadata:
    """Metadata from config.json and preprocessor_config.json, as far as they exist."""
    values: dict[str, Any] = {}
    if (path := directory / "config.json").exists():
        values |= _hugging_face_model(read_json(path))
    if (path := directory / "preprocessor_config.json").exists():
        values |= _hugging_face_images(read_json(path), resolution)
    elif (path := directory / "processor_config.json").exists():
        values |= _hugging_face_images(read_json(path).section("image_processor"), resolution)
    return Metadata(**values)


def _hugging_face_model(config: Section) -> dict[str, Any]:
    model_type = config.get("model_type", str, "clip")
    if model_type not in HUGGING_FACE_TYPES:
        raise config.error("model_type", f"is {model_type!r}, which is not CLIP")
    values: dict[str, Any] = {}
    acts = {}
    for tower, key in HUGGING_FACE_TYPES[model_type].items():
        section = config
        if key is not None:  # transformers lets the older <key>_dict override
            section = config.section(key)
            section.values = section.values | config.section(key + "_dict").values
        if (eps := section.get("layer_norm_eps", float, LAYER_NORM_EPS)) != LAYER_NORM_EPS:
            raise section.error("layer_norm_eps", f"is {eps}: only {LAYER_NORM_EPS} is supported")
        acts[tower] = section.get("hidden_act", str, "quick_gelu")
        if acts[tower] not in ("quick_gelu", "gelu"):
            raise section.error("hidden_act", f"is {acts[tower]!r}: not supported")
        heads = section.positive("num_attention_heads", {"vision": 12, "text": 8}[tower])
        values[f"{tower}_heads"] = heads
        if tower == "text":
            _check_pooling(section)
    if len(set(acts.values())) > 1:
        raise config.error("hidden_act", f"differs between the towers: {acts}")
    return values | {"activation": next(iter(acts.values()))}


def _check_pooling(section: Section) -> None:
    """A text is read at its highest token id, which must be the end-of-text token's.

    Old configs say eos_token_id 2, by mistake; transformers then takes the highest id, too.
    """
    eos, vocabulary = section.values.get("eos_token_id"), section.positive("vocab_size", 49408)
    if isinstance(eos, int) and eos != 2 and vocabulary is not None and eos < vocabulary - 1:
        raise section.error("eos_token_id", f"is {eos}, not the last of {vocabulary} tokens")


def _hugging_face_images(config: Section, resolution: int | None) -> dict[str, Any]:
    if resolution is None:
        return {}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        config.require(key, True, default=True)
    defaults = Metadata()
    factor = config.get("rescale_factor", float, 1 / 255)
    if not abs(factor * 255 - 1) < 1e-6:  # NaN, too
        raise config.error("rescale_factor", f"is {factor}: only 1/255 is supported")
    square = {"height": resolution, "width": resolution}
    spellings = (resolution, {"shortest_edge": resolution}, square)
    config.require_size("size", resolution, spellings)
    squash = without_nulls(config.values.get("size")) == square
    if not squash:
        config.require("do_center_crop", True, default=True)
    if config.values.get("do_center_crop", True):
        config.require_size("crop_size", resolution, spellings)
    resample = config.get("resample", int, 3)
    if resample not in RESAMPLE:
        raise config.error("resample", f"is {resample}: not supported")
    return {
        "mean": config.numbers("image_mean", defaults.mean),
        "std": config.numbers("image_std", defaults.std),
        "resize": "squash" if squash else "shortest",
        "interpolation": RESAMPLE[resample],
    }


def open_clip_metadata(path: Path, resolution: int | None) -> Metadata:
    """Metadata from an open_clip_config.json."""
    config = read_json(path)
    model, images = config.section("model_cfg"), config.section("preprocess_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    for section, known in (
        (vision, OPEN_CLIP_VISION),
        (text, OPEN_CLIP_TEXT),
        (model, OPEN_CLIP_MODEL),
        (images, OPEN_CLIP_PREPROCESS),
    ):
        section.require_known(known)
    if resolution is not None:
        images.require_size("size", resolution, (resolution, [resolution, resolution]))
    defaults = Metadata()
    width, head_width = vision.positive("width", 768), vision.positive("head_width", HEAD_WIDTH)
    assert width is not None and head_width is not None  # they have defaults
    if isinstance(vision.values.get("layers"), list):  # ResNet: only its pooling has heads
        width *= 32
    return Metadata(
        activation="quick_gelu" if model.get("quick_gelu", bool, False) else "gelu",
        mean=images.numbers("mean", defaults.mean),
        std=images.numbers("std", defaults.std),
        resize=images.get("resize_mode", str, "shortest"),
        interpolation=images.get("interpolation", str, "bicubic"),
        vision_heads=max(1, width // head_width),
        text_heads=text.positive("heads", 8),
    )
