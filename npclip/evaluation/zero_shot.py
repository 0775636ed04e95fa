"""How often a model is right: evaluate() on images whose labels are known.

    from npclip.evaluation import evaluate

    evaluate(model, "photos")      # photos/cat/1.jpg, photos/dog/2.jpg, ...

probe.py does the same for a classifier that is trained on the model's features.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..clip import CLIP, Float32, asnumpy
from ..errors import ImageError, InputError, InputTypeError
from ..inputs import as_pixels, in_threads
from ..sources import Item
from ..zeroshot import Label, ZeroShot
from .image_folder import ImageFolder, Names, splits

Int32: TypeAlias = NDArray[np.int32]
Interval: TypeAlias = tuple[float, float]
IMAGES_AT_A_TIME = 64
Z_95 = 1.959963984540054  # the normal distribution has 95 % within so many deviations


class Unreadable(NamedTuple):
    """An image that was left out."""

    path: str  # or its number among the images
    reason: str


class ClassResult(NamedTuple):
    """Of the images of one class."""

    label: str
    images: int
    top1: float | None  # None without images
    top5: float | None  # nor with 5 classes or fewer
    confused_with: str | None  # what its images are most often taken for, wrongly
    confused: int  # how many of them


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was predicted for n images of L classes. All accuracies are within 0 .. 1."""

    labels: list[str]  # [L]
    truth: Int32  # [n], of labels
    predicted: Int32  # [n], the most probable label
    rank: Int32  # [n]: how many labels were more probable than the true one
    unreadable: list[Unreadable] = field(default_factory=list)  # in none of the figures

    @property
    def images(self) -> int:
        """How many were evaluated."""
        return len(self.truth)

    @property
    def top1(self) -> float:
        """The share of images whose most probable label is the true one."""
        return float((self.rank < 1).mean())

    @property
    def top5(self) -> float | None:
        """The share whose true label is among the 5 most probable; None with 5 or fewer."""
        return float((self.rank < 5).mean()) if len(self.labels) > 5 else None

    @property
    def top1_interval(self) -> Interval:
        """Wilson's 95 % interval of top1."""
        return wilson(int((self.rank < 1).sum()), self.images)

    @property
    def top5_interval(self) -> Interval | None:
        """Wilson's 95 % interval of top5."""
        if self.top5 is None:
            return None
        return wilson(int((self.rank < 5).sum()), self.images)

    @property
    def mean_per_class(self) -> float:
        """The mean of the classes' top1, each counting the same, without those of no image."""
        return float(np.mean([c.top1 for c in self.per_class if c.top1 is not None]))

    @cached_property
    def per_class(self) -> list[ClassResult]:
        """[L], in the order of labels."""
        count = len(self.labels)
        images, top1, top5 = (
            np.bincount(self.truth[self.rank < k], minlength=count) for k in (count, 1, 5)
        )
        wrong = np.flatnonzero(self.truth != self.predicted)
        pairs = self.truth[wrong].astype(np.int64) * count + self.predicted[wrong]
        worst: dict[int, tuple[int, int]] = {}
        for pair, times in zip(*np.unique(pairs, return_counts=True), strict=True):
            true, taken_for = divmod(int(pair), count)
            if times > worst.get(true, (0, 0))[1]:
                worst[true] = taken_for, int(times)
        found = []
        for i, label in enumerate(self.labels):
            n, (other, times) = int(images[i]), worst.get(i, (-1, 0))
            one, five = (int(top[i]) / n if n else None for top in (top1, top5))
            five = five if count > 5 else None
            found.append(
                ClassResult(label, n, one, five, self.labels[other] if times else None, times)
            )
        return found

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """[L, L]: how many images of the row's class were taken for the column's."""
        found = np.zeros((len(self.labels),) * 2, np.int64)
        np.add.at(found, (self.truth, self.predicted), 1)
        return found

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "images": self.images,
            "classes": len(self.labels),
            "top1": self.top1,
            "top1_interval": self.top1_interval,
            "top5": self.top5,
            "top5_interval": self.top5_interval,
            "mean_per_class": self.mean_per_class,
            "per_class": [result._asdict() for result in self.per_class],
            "labels": self.labels,
            "confusion": self.confusion.tolist(),
            "unreadable": [image._asdict() for image in self.unreadable],
        }


def evaluate(
    model: CLIP,
    images: str | os.PathLike[str] | ImageFolder | Iterable[tuple[Any, str]],
    labels: Iterable[Label] | Names | None = None,
    templates: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    cache: bool = True,
) -> Evaluation:
    """Zero-shot classification of images whose labels are known, in bounded memory.

    images: a folder with a folder of images for each class (of one with train/ and test/, test/ is
        used), or any number of (image, name of its label), images as CLIP.encode_image takes them.
    labels: of a folder: what its folders are called, see ImageFolder. Of pairs: all labels to
        choose from, as ZeroShot takes them.
    templates, cache: as ZeroShot takes them.

    Images that cannot be read or embedded are left out, and listed in `unreadable`.

    Raises InputError for fewer than two classes, a label that is not one of labels, or no image
    that can be read; also what ImageFolder and ZeroShot raise.
    """
    if isinstance(images, (str, os.PathLike)):
        images = ImageFolder(splits(images).get("test", images), labels)  # type: ignore[arg-type]
    candidates = images.labels if isinstance(images, ImageFolder) else labels
    if candidates is None or isinstance(candidates, (str, os.PathLike)):
        raise InputTypeError("labels must be a sequence of the labels to choose from")
    zeroshot = ZeroShot(model, candidates, templates, cache=cache)
    if len(zeroshot.labels) < 2:
        raise InputError(f"one class only, {zeroshot.labels[0]!r}: nothing to tell it from")
    index = {name: i for i, name in enumerate(zeroshot.labels)}
    unreadable: list[Unreadable] = []
    truth, best, ranks = [], [], []
    for names, embeddings in embed_labelled(model, images, unreadable, normalize=True):
        if unknown := set(names) - set(index):
            raise InputError(f"the label {min(unknown)!r} of an image is not among the labels")
        truth.append(np.array([index[name] for name in names], np.int32))
        similarities = embeddings @ zeroshot.embeddings.T
        best.append(similarities.argmax(1).astype(np.int32))
        ranks.append(rank_of(truth[-1], similarities))
    check_found(sum(map(len, truth)), unreadable)
    true, predicted, rank = map(np.concatenate, (truth, best, ranks))
    return Evaluation(zeroshot.labels, true, predicted, rank, unreadable)


def embed_labelled(
    model: CLIP, images: Iterable[tuple[Any, str]], unreadable: list[Unreadable], normalize: bool
) -> Iterator[tuple[list[str], Float32]]:
    """(names of labels, embeddings [b, E]) of (image, name), some at a time, in their order.

    What cannot be read, or whose embedding is not finite, is added to unreadable instead.
    """
    decoded = in_threads(enumerate(images), partial(_decoded, model))
    while some := list(islice(decoded, IMAGES_AT_A_TIME)):
        unreadable += [image for image in some if isinstance(image, Unreadable)]
        good = [image for image in some if not isinstance(image, Unreadable)]
        if not good:
            continue
        paths, names, pixels = zip(*good, strict=True)
        embeddings = model.encode_image(np.stack(pixels), normalize=normalize)
        embeddings = np.asarray(asnumpy(embeddings), np.float32)
        finite = np.logical_and.reduce(np.isfinite(embeddings), axis=1)
        unreadable += [
            Unreadable(path, "its embedding is not finite")
            for path, is_finite in zip(paths, finite, strict=True)
            if not is_finite
        ]
        yield [name for name, yes in zip(names, finite, strict=True) if yes], embeddings[finite]


def rank_of(truth: Int32, scores: NDArray[Any]) -> Int32:
    """[n]: how many of a row's scores [n, L] come before that of the true label [n].

    Of equal scores the first comes first, as in ZeroShot.predict.
    """
    own = np.take_along_axis(scores, truth[:, None].astype(np.int64), 1)
    is_before = np.arange(scores.shape[1]) < truth[:, None]
    ahead = (scores > own) | ((scores == own) & is_before)
    return ahead.sum(1, dtype=np.int32)


def wilson(correct: int, images: int) -> Interval:
    """The 95 % interval of a share by Wilson's score, for images > 0."""
    share, z2 = correct / images, Z_95**2 / images
    middle = share + z2 / 2
    half = Z_95 * math.sqrt(share * (1 - share) / images + z2 / (4 * images))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def check_found(images: int, unreadable: list[Unreadable]) -> None:
    """Raises InputError where there is no image to evaluate."""
    if not images:
        first = f": {unreadable[0].path}: {unreadable[0].reason}" if unreadable else ""
        raise InputError(f"no image to evaluate, {len(unreadable)} unreadable{first}")


def _decoded(model: CLIP, numbered: tuple[int, tuple[Any, str]]) -> Any:
    """(path, name of the label, pixels), or Unreadable."""
    number, (image, name) = numbered
    path = f"image {number}"
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
    elif isinstance(image, Item):
        path = image.path
    try:
        if isinstance(image, Item):
            image = image.read()
        return path, name, as_pixels(image, model.preprocess, model.config.image_resolution)
    except (ImageError, InputError) as error:
        return Unreadable(path, str(error).removeprefix(f"{path}: "))
