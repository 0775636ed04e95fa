"""linear_probe(): how well a linear classifier does on a model's features, as CLIP's paper does it.

Logistic regression by scikit-learn's L-BFGS, at most 1,000 iterations. Its C (the inverse of the
paper's lambda) is one of 97 values from 1e-6 to 1e6, 8 a decade, chosen by the accuracy on a
validation split; then it is trained on that split too. Section A.3 of the paper
(https://arxiv.org/abs/2103.00020). Features are those of encode_image, not normalised, as in
openai/CLIP's example; the paper takes those of ViTs before their projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..clip import CLIP
from ..errors import BackendError, InputError
from .zero_shot import Evaluation, Unreadable, check_found, embed_labelled, rank_of

PER_DECADE = 8
ENDS = 6 * PER_DECADE  # C from 10**-6 to 10**6
HELD_OUT = 0.2  # of each class, where no other split is given
ROWS_AT_A_TIME = 4096

Integers: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier's result, and how it came about."""

    evaluation: Evaluation  # on the test images
    C: float  # of the final classifier
    sweep: dict[float, float]  # accuracy on the validation split by C, {} where C was given
    not_converged: list[float]  # C of those fits of the sweep that max_iter ended
    converged: bool  # whether the final fit was ended by itself
    trained: int  # images that the final classifier was trained on
    validated: int  # how many of them had chosen C


def linear_probe(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    C: float | None = None,
    seed: int = 0,
    max_iter: int = 1000,
) -> Probe:
    """Train on the one, test on the other.

    features: float [n, D]; labels: integers or str [n]. The classes are those of train_labels.
    validation: (features, labels) to choose C by; by default a fifth of each class of the training
        images, drawn with seed. C: the value itself; nothing is then held out.

    A fit that has not converged after max_iter steps is no error; Probe tells of it.

    Raises InputError for arrays of wrong shapes or with numbers that are not finite, a C that is
    not above 0, fewer than two classes, labels that no training image has, or too few images to
    hold any out; BackendError without scikit-learn.
    """
    require_sklearn()
    classes, train_y = np.unique(_labels(train_labels, "train_labels"), return_inverse=True)
    if len(classes) < 2:
        raise InputError("a linear probe needs images of at least two classes to train on")
    train_x, train_y = _checked(train_features, train_y, "train")
    test_x, test_y = _checked(test_features, _indices(test_labels, classes, "test"), "test")
    held_x, held_y = train_x[:0], train_y[:0]
    if validation is not None:
        held_y = _indices(validation[1], classes, "validation")
        held_x, held_y = _checked(validation[0], held_y, "validation")
    for x in (test_x, held_x):
        if x.shape[1] != train_x.shape[1]:
            raise InputError(f"features of {train_x.shape[1]} and of {x.shape[1]} numbers")
    if C is not None and not 0 < C < np.inf:
        raise InputError(f"C must be a number above 0, not {C}")
    if C is None and validation is None:
        held = hold_out(train_y, seed)
        held_x, held_y, train_x, train_y = (
            train_x[held], train_y[held], train_x[~held], train_y[~held]
        )  # fmt: skip
    if C is None and not len(held_y):
        raise InputError("no validation images to choose C by, nor a class of two to hold one out")
    sweep: dict[float, float] = {}
    not_converged: list[float] = []

    def accuracy(C: float) -> float:
        classifier, has_converged = _fit(train_x, train_y, C, max_iter)
        if not has_converged:
            not_converged.append(C)
        return float(np.mean(classifier.predict(held_x) == held_y))

    if C is None:
        sweep = search(accuracy)
        C = best(sweep)
    all_x, all_y = np.concatenate([train_x, held_x]), np.concatenate([train_y, held_y])
    classifier, converged = _fit(all_x, all_y, C, max_iter)
    evaluation = _evaluate(classifier, test_x, test_y, [str(name) for name in classes])
    validated = len(held_y) if sweep else 0
    return Probe(evaluation, C, sweep, not_converged, converged, len(all_y), validated)


def probe_images(
    model: CLIP, images: Mapping[str, Iterable[tuple[Any, str]]], seed: int = 0
) -> Probe:
    """linear_probe() of a model's features, float32 [n, E], which are kept in memory.

    images: (image, label) of "train", "test" and perhaps "val", which chooses C; or of "all", of
        which a fifth of each class is the test then, drawn with seed.

    Images that cannot be read are left out, and listed in evaluation.unreadable. Raises what
    linear_probe() raises, and InputError where a split has no image that can be read.
    """
    require_sklearn()
    unreadable: list[Unreadable] = []
    found = {name: _features(model, pairs, unreadable) for name, pairs in images.items()}
    if "all" in found:
        features, labels = found["all"]
        held = hold_out(labels, seed)
        if not held.any():
            raise InputError("no class has two images: none can be held out to test on")
        found = {"train": (features[~held], labels[~held]), "test": (features[held], labels[held])}
    probe = linear_probe(*found["train"], *found["test"], validation=found.get("val"), seed=seed)
    probe.evaluation.unreadable.extend(unreadable)
    return probe


def search(accuracy: Callable[[float], float]) -> dict[float, float]:
    """The paper's parametric binary search: {C: accuracy} of the at most 15 C that it tries.

    1e-6, 1e-4, ..., 1e6 first; then, 4 times, at both sides of the best, halving the distance.
    """
    tried = {step: accuracy(_at(step)) for step in range(-ENDS, ENDS + 1, 2 * PER_DECADE)}
    distance = PER_DECADE
    while distance:
        middle = best(tried)
        for step in (middle - distance, middle + distance):
            if -ENDS <= step <= ENDS and step not in tried:
                tried[step] = accuracy(_at(step))
        distance //= 2
    return {_at(step): tried[step] for step in sorted(tried)}


def best(tried: dict[Any, float]) -> Any:
    """The most accurate; of several the smallest, which regularises most."""
    return min(tried, key=lambda key: (-tried[key], key))


def hold_out(labels: ArrayLike, seed: int) -> NDArray[np.bool_]:
    """[n]: which images to hold out: a fifth of each class, at least one, but never all of it.

    Scikit-learn's train_test_split(stratify=) refuses classes of one image, and more classes than
    a fifth of the images.
    """
    _, y, counts = np.unique(labels, return_inverse=True, return_counts=True)
    held = np.zeros(len(y), bool)
    rng = np.random.default_rng(seed)
    for of_class in np.split(np.argsort(y, kind="stable"), np.cumsum(counts)[:-1]):
        members = rng.permutation(of_class)
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held[members[:count]] = True
    return held


def require_sklearn() -> None:
    """Raises BackendError without scikit-learn."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"a linear probe needs scikit-learn: pip install 'npclip[eval]' ({error})"
        ) from error


def _features(
    model: CLIP, images: Iterable[tuple[Any, str]], unreadable: list[Unreadable]
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    before, parts, labels = len(unreadable), [], []
    for names, embeddings in embed_labelled(model, images, unreadable, normalize=False):
        parts.append(embeddings)
        labels += names
    check_found(len(labels), unreadable[before:])
    return np.concatenate(parts), np.array(labels)


def _at(step: int) -> float:
    return 10.0 ** (step / PER_DECADE)


def _fit(x: NDArray[Any], y: Integers, C: float, max_iter: int) -> tuple[Any, bool]:
    """A classifier, and whether it has converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(random_state=0, C=C, max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(x, y)
    failed = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    for other in caught:
        if other not in failed:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return classifier, not failed


def _evaluate(classifier: Any, x: NDArray[Any], y: Integers, labels: list[str]) -> Evaluation:
    truth, predicted, ranks = y.astype(np.int32), [], []
    for first in range(0, len(x), ROWS_AT_A_TIME):
        part = slice(first, first + ROWS_AT_A_TIME)
        scores = classifier.decision_function(x[part])
        if scores.ndim == 1:  # of two classes: one number, above 0 for the second
            scores = np.stack([-scores, scores], 1)
        predicted.append(scores.argmax(1).astype(np.int32))
        ranks.append(rank_of(truth[part], scores))
    return Evaluation(labels, truth, np.concatenate(predicted), np.concatenate(ranks))


def _labels(labels: ArrayLike, what: str) -> NDArray[Any]:
    found = np.asarray(labels)
    if found.ndim != 1 or found.dtype.kind not in "iuU":
        raise InputError(f"{what} must be integers or str [n], not {found.dtype} {found.shape}")
    return found


def _indices(labels: ArrayLike, classes: NDArray[Any], what: str) -> Integers:
    found = _labels(labels, f"{what}_labels")
    if found.dtype.kind != classes.dtype.kind and "U" in found.dtype.kind + classes.dtype.kind:
        raise InputError(f"{what}_labels are {found.dtype}, train_labels {classes.dtype}")
    if len(unknown := np.setdiff1d(found, classes)):
        names = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise InputError(f"no training images for {len(unknown)} classes of {what}: {names}")
    return np.searchsorted(classes, found)


def _checked(features: ArrayLike, labels: Integers, what: str) -> tuple[NDArray[Any], Integers]:
    x = np.asarray(features)
    if x.ndim != 2 or x.dtype.kind != "f" or len(x) != len(labels):
        raise InputError(
            f"{what}_features must be floats [n, D] with n = {len(labels)} labels, "
            f"not {x.dtype} {list(x.shape)}"
        )
    if what == "test" and not len(x):
        raise InputError("no images to test on")
    if not np.isfinite(x).all():
        raise InputError(f"{what}_features have numbers that are not finite")
    return x, labels
