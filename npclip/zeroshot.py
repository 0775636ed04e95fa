"""Zero-shot classification: labels become embeddings once, images are compared with them.

    zeroshot = npclip.ZeroShot(model, ["cat", "dog"])
    zeroshot.predict("photo.jpg", top=1)      # [("cat", 0.98)]

A label's embedding is the mean of its prompts' normalised embeddings, one prompt for each template,
normalised again (CLIP's "prompt ensembling", section 3.1.4 of the paper).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from . import hub
from .clip import CLIP, Float32, asnumpy, softmax
from .errors import InputError, InputTypeError, NpclipError
from .whole_file import replacing

Label: TypeAlias = "str | Sequence[str]"
Prediction: TypeAlias = "list[tuple[str, float]]"  # most probable first

PROMPTS_AT_A_TIME = 4096
IMAGES_AT_A_TIME = 256
BACKGROUND = ("a photo.", "a picture of something.", "an image.", "a photo of something else.")
VERSION = 1  # of how the embeddings are made: another one finds nothing in the cache


class ZeroShot:
    """Labels of one model. Its methods change nothing, so threads may share it."""

    def __init__(
        self,
        model: CLIP,
        labels: Iterable[Label],
        templates: str | os.PathLike[str] | Sequence[str] | None = None,
        *,
        background: Sequence[str] | bool | None = None,
        cache: bool = True,
    ) -> None:
        """Embed the labels, or find them in the cache.

        labels: any number; a label is a str, or a sequence of synonyms, whose prompts all count
            and of which the first is the name.
        templates: prompts in which {} stands for the label: a sequence of them, the path of a file
            with one a line, or None for the built-in ones, npclip.zeroshot.built_in_templates().
        background: None: an image has exactly one of the labels, and probabilities add up to 1.
            Prompts of what an image shows otherwise, or True for BACKGROUND: it may have any number
            of labels, and each has a probability of its own, see scores().
        cache: keep the embeddings in "labels" of the cache directory ($NPCLIP_CACHE).

        Raises InputTypeError for labels or templates that are no str, InputError for no label, the
        same name twice, an empty one, or a template without {}.
        """
        self.model = model
        self.templates = as_templates(templates)
        synonyms = _synonyms(labels)
        self.labels = [names[0] for names in synonyms]
        self.embeddings = self._embed(synonyms, self.templates, cache)
        self.background: Float32 | None = None
        if background:
            prompts = BACKGROUND if background is True else _strings(background, "background")
            self.background = self._embed([[prompt] for prompt in prompts], ["{}"], cache)

    def __repr__(self) -> str:
        """One line: how many labels and templates, of which model."""
        kind = "one label an image" if self.background is None else "any number of labels an image"
        counts = f"{len(self.labels)} labels x {len(self.templates)} templates"
        return f"ZeroShot({counts}, {kind}, {self.model!r})"

    def similarities(self, images: Any) -> Float32:
        """Cosines with the labels: float32 [L] for one image, [B, L] for several.

        images: as CLIP.encode_image takes them; iterators are consumed in batches.
        """
        return self._of_images(images) @ self.embeddings.T

    def scores(self, images: Any) -> Float32:
        """Probabilities of the labels: float32 [L] for one image, [B, L] for several.

        With s = exp(logit_scale) and the cosines c of an image: softmax(s c) over the labels; with
        a background, 1 / (1 + exp(s (b - c))) for each label, b being the image's largest cosine
        with a background prompt. That is how the model would choose between the two alone: 0.5
        where they are equally near. It is not calibrated: choose a threshold on images like yours.
        """
        return self._both(images)[1]

    def predict(self, images: Any, top: int | None = 5, threshold: float | None = None) -> Any:
        """The most probable labels of an image, [(label, probability), ...]; of several, a list.

        The order is that of the cosines, which tells labels apart whose probability is 1.

        top: at most so many; None: all. threshold: only those at least so probable; by default
        0.5 with a background, else 0. A list may be empty.

        Raises InputError for a top below 1 or a threshold outside 0 .. 1.
        """
        top, threshold = self._limits(top, threshold)
        both = self._both(images)
        if both[0].ndim == 1:
            return self._best(*both, top, threshold)
        return [self._best(*rows, top, threshold) for rows in zip(*both, strict=True)]

    def predict_each(
        self, images: Iterable[Any], top: int | None = 5, threshold: float | None = None
    ) -> Iterator[Prediction]:
        """predict() of any number of images, one after the other, in bounded memory."""
        top, threshold = self._limits(top, threshold)
        rest = iter(images)
        while some := list(islice(rest, IMAGES_AT_A_TIME)):
            for rows in zip(*self._both(some), strict=True):
                yield self._best(*rows, top, threshold)

    def _of_images(self, images: Any) -> Float32:
        return np.asarray(asnumpy(self.model.encode_image(images, normalize=True)), np.float32)

    def _both(self, images: Any) -> tuple[Float32, Float32]:
        """Cosines and probabilities."""
        embeddings, scale = self._of_images(images), np.exp(self.model.logit_scale)
        cosines = embeddings @ self.embeddings.T
        if self.background is None:
            return cosines, softmax(scale * cosines)
        nearest = (embeddings @ self.background.T).max(-1, keepdims=True)
        with np.errstate(over="ignore"):  # to infinity: a probability of 0
            found = 1 / (1 + np.exp(scale * (nearest - cosines)))
        return cosines, np.asarray(found, np.float32)

    def _limits(self, top: int | None, threshold: float | None) -> tuple[int, float]:
        top = len(self.labels) if top is None else top
        if top < 1:
            raise InputError(f"top must be at least 1, not {top}")
        if threshold is None:
            threshold = 0.0 if self.background is None else 0.5
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold must be within 0 and 1, not {threshold}")
        return top, threshold

    def _best(self, cosines: Float32, scores: Float32, top: int, threshold: float) -> Prediction:
        order = np.argsort(-cosines, kind="stable")[:top]
        return [(self.labels[i], float(scores[i])) for i in order if scores[i] >= threshold]

    def _embed(self, labels: list[list[str]], templates: Sequence[str], cache: bool) -> Float32:
        """[L, E], from the cache or the text tower."""
        shape = len(labels), self.model.config.embed_dim
        file = self._file(labels, templates) if cache else None
        if file and (known := _read(file, shape)) is not None:
            return known
        found = np.empty(shape, np.float32)
        for first, count in _portions(labels, len(templates)):
            some = labels[first : first + count]
            prompts = [t.replace("{}", name) for names in some for name in names for t in templates]
            each = asnumpy(self.model.encode_text(prompts, normalize=True))
            ends = np.cumsum([len(names) * len(templates) for names in some])[:-1]
            for i, of_label in enumerate(np.split(each, ends)):
                mean = of_label.mean(0, dtype=np.float64)
                found[first + i] = mean / np.linalg.norm(mean)
        if file:
            _write(file, found)
        return found

    def _file(self, labels: list[list[str]], templates: Sequence[str]) -> Path | None:
        """Where the cache has them; None where it cannot."""
        with suppress(NpclipError, OSError):  # no home directory, no file that the model is of
            model = self.model.weights_sha256, self.model.dtype, self.model.metadata.activation
            key = json.dumps([VERSION, *model, labels, list(templates)])
            name = hashlib.sha256(key.encode()).hexdigest()
            return hub.cache_directory() / "labels" / f"{name}.npy"
        return None


def built_in_templates() -> list[str]:
    """The prompts that ZeroShot uses where none are given: 40, of many kinds of pictures."""
    return _lines((files("npclip") / "templates.txt").read_text("utf-8"))


def as_templates(templates: str | os.PathLike[str] | Sequence[str] | None) -> list[str]:
    """Prompts as ZeroShot takes them. Raises what it does for those that are none."""
    if templates is None:
        return built_in_templates()
    if isinstance(templates, (str, os.PathLike)):
        try:
            found = _lines(Path(templates).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read templates from {templates}: {error}") from error
    else:
        found = _strings(templates, "templates")
    if not found:
        raise InputError("no template")
    for template in found:
        if "{}" not in template:
            raise InputError(f"the template {template!r} has no {{}} for the label")
    return found


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.lstrip("\ufeff").splitlines() if line.strip()]


def _strings(values: Sequence[str], what: str) -> list[str]:
    is_sequence = isinstance(values, Iterable) and not isinstance(values, str)
    found = list(values) if is_sequence else [None]
    if not all(isinstance(value, str) for value in found):
        raise InputTypeError(f"{what} must be a sequence of str, not {values!r:.80}")
    return cast("list[str]", found)


def _synonyms(labels: Iterable[Label]) -> list[list[str]]:
    if isinstance(labels, str):
        raise InputTypeError(f"labels must be a sequence of labels, not the str {labels!r:.80}")
    found = [[label] if isinstance(label, str) else _strings(label, "a label") for label in labels]
    if not found:
        raise InputError("no label")
    names = set()
    for label in found:
        if not label or not all(name.strip() for name in label):
            raise InputError(f"an empty label: {label!r}")
        if label[0] in names:
            raise InputError(f"the label {label[0]!r} is given twice")
        names.add(label[0])
    return found


def _portions(labels: list[list[str]], templates: int) -> Iterator[tuple[int, int]]:
    """(first, count) of labels with about PROMPTS_AT_A_TIME prompts together."""
    first = prompts = 0
    for i, names in enumerate(labels):
        prompts += len(names) * templates
        if prompts >= PROMPTS_AT_A_TIME:
            yield first, i + 1 - first
            first, prompts = i + 1, 0
    if first < len(labels):
        yield first, len(labels) - first


def _read(file: Path, shape: tuple[int, int]) -> Float32 | None:
    """What was written there, if it is whole."""
    try:
        found: NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all():
        return None
    return found


def _write(file: Path, embeddings: Float32) -> None:
    """All of it or nothing; a cache that cannot be written is done without."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.save(stream, embeddings)
