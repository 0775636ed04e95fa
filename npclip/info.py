"""`npclip info`: a model's configuration, tensors and parity fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint, towers_of
from .clip import CLIP, load_opened, open_model
from .config import Config, tensor_shapes
from .params import as_float32

Report: TypeAlias = dict[str, Any]
PROBE_TEXT = "a photo of a cat"


def describe(name_or_path: str, activation: str | None = None, tensors: bool = False) -> Report:
    """Everything `npclip info` prints, as plain JSON types. Raises what load raises.

    The fingerprint's weights_sha256 is over the parameters in float32, so the same weights have
    the same one in every file format; image and text are the first four numbers of normalised
    embeddings, and cosine their product, for a fixed picture and text: two installations agree
    when these agree to 1e-6.
    """
    checkpoint, config = open_model(name_or_path, activation=activation)
    present = towers_of(config)
    model = load_opened(checkpoint, config, tuple(present), "cpu", "float32")
    report: Report = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "towers": present,
        "parameters": sum(prod(t.shape) for t in checkpoint.tensors.values()),
        "stored": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "config": dataclasses.asdict(config),
        "metadata": dataclasses.asdict(checkpoint.metadata),
        "fingerprint": fingerprint(checkpoint, config, model, present),
    }
    if tensors:
        report["tensors"] = {k: [t.dtype, *t.shape] for k, t in checkpoint.tensors.items()}
    return report


def fingerprint(checkpoint: Checkpoint, config: Config, model: CLIP, towers: list[str]) -> Report:
    """weights_sha256, and the probe's numbers for the towers that are there."""
    digest = hashlib.sha256()
    for name, shape in sorted(tensor_shapes(config, towers).items()):
        if name not in checkpoint.tensors:  # logit_scale, which one tower alone may lack
            continue
        digest.update(f"{name} {shape}\n".encode())
        digest.update(as_float32(name, checkpoint.tensors[name]).data)
        checkpoint.release()
    result: Report = {"weights_sha256": digest.hexdigest()}
    features = {}
    if "image" in towers:
        features["image"] = model.encode_image(probe_picture(), normalize=True)
    if "text" in towers:
        features["text"] = model.encode_text(PROBE_TEXT, normalize=True)
    result |= {tower: [round(float(v), 7) for v in f[:4]] for tower, f in features.items()}
    if len(features) == 2:
        result["cosine"] = round(float(features["image"] @ features["text"]), 7)
    return result


def probe_picture() -> NDArray[np.uint8]:
    """A fixed picture [240, 320, 3]: a ramp in each colour, in three directions."""
    y, x = np.mgrid[:240, :320]
    return np.stack([x * 4 // 5, y, (x + y) * 255 // 558], axis=-1).astype(np.uint8)


def lines(report: Report) -> Iterator[str]:
    """The report as `npclip info` prints it."""
    for section in ("path", "format", "towers", "parameters", "stored"):
        yield f"{section:<12}{_plain(report[section])}"
    for section in ("config", "metadata", "fingerprint", "tensors"):
        if section in report:
            yield f"{section}"
            yield from (f"  {key:<22}{_plain(v)}" for key, v in report[section].items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {key}" for key, count in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and value > 99999 else str(value)
