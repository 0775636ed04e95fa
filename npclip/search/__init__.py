"""Exact search: the rows of a collection that are nearest to a text, an image, or several of them.

    with Reader("photos") as reader:
        model = search.load_model(reader, ["a red car"])
        for hit in search.search(reader, model, ["a red car"], top=10):
            print(hit.score, hit.path)

Every row is compared, a block at a time: memory does not grow with the collection.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import hub, ops
from ..clip import CLIP, Float32, asnumpy, load
from ..errors import InputError, StoreError
from ..store import Reader

ROWS_AT_A_TIME = 65536
SCORES_AT_A_TIME = 1 << 24  # of all queries: 64 MiB


@dataclass(frozen=True)
class Hit:
    """A row that was found. score: its cosine with the query."""

    score: float
    id: str
    path: str


def top_k(
    reader: Reader, queries: ArrayLike, k: int, *, rows_at_a_time: int = ROWS_AT_A_TIME
) -> tuple[Float32, NDArray[np.int64]]:
    """The k rows with the largest dot products with each query, best first: scores and numbers.

    queries: float32 [Q, D]. Rows count with length 1, those of zeros with 0: of queries of length 1
        the scores are cosines.
    rows_at_a_time: how many are compared at once, fewer where there are many queries.

    Returns float32 [Q, k'] and int64 [Q, k'], k' = min(k, rows). Of equal scores the lower row
    comes first.

    Raises InputError for a k or rows_at_a_time below 1, or queries of another shape or that are not
    finite, StoreError where the collection is broken.
    """
    if min(k, rows_at_a_time) < 1:
        raise InputError(f"k and rows_at_a_time must be at least 1, not {k} and {rows_at_a_time}")
    wanted = _checked(queries, reader.dimension)
    best = [_Best(k) for _ in wanted]
    rows_at_a_time = min(rows_at_a_time, max(1, SCORES_AT_A_TIME // max(1, len(wanted))))
    for first, block in reader.blocks(rows_at_a_time):
        scores = ops.similarity(wanted, block, cosine=not reader.provenance.normalized)  # [Q, n]
        for each, of_query in zip(best, scores, strict=True):
            each.add(first, of_query)
    shape = len(wanted), min(k, len(reader))
    found, rows = np.empty(shape, np.float32), np.empty(shape, np.int64)
    for i, each in enumerate(best):
        if len(each.rows) != shape[1] or not np.isfinite(each.scores).all():
            raise StoreError("the collection has embeddings that are not finite")
        order = np.argsort(-each.scores, kind="stable")
        found[i], rows[i] = each.scores[order], each.rows[order]
    return found, rows


class _Best:
    """The k best of the scores that were added, in the order of their rows."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._least = np.float32(-np.inf)  # what a score must exceed
        self.scores, self.rows = np.empty(0, np.float32), np.empty(0, np.int64)

    def add(self, first: int, scores: Float32) -> None:
        """Those of the rows from `first` on."""
        better = np.flatnonzero(scores > self._least)
        if not better.size:
            return
        self.scores = np.concatenate([self.scores, scores[better]])
        self.rows = np.concatenate([self.rows, better + first])
        if len(self.scores) > self._k:
            keep = _largest(self.scores, self._k)
            self.scores, self.rows = self.scores[keep], self.rows[keep]
        if len(self.scores) == self._k:
            self._least = self.scores.min()


def _largest(scores: Float32, k: int) -> NDArray[np.int64]:
    """Where the k largest are, in ascending order; of equal ones the first."""
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > kth)
    equal = np.flatnonzero(scores == kth)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _checked(queries: ArrayLike, dimension: int) -> Float32:
    found: NDArray[Any] = np.asarray(queries)
    if found.dtype.kind != "f" or found.ndim != 2 or found.shape[1] != dimension:
        raise InputError(
            f"queries must be floating-point [Q, {dimension}], "
            f"not {found.dtype} {list(found.shape)}"
        )
    if not np.isfinite(found).all():
        raise InputError("queries must be finite")
    return np.ascontiguousarray(found, np.float32)


def is_image(query: str) -> bool:
    """Whether a query is an image: the path of a file. Otherwise it is a text."""
    return os.path.isfile(query)


def load_model(
    reader: Reader,
    queries: Sequence[str],
    name: str | os.PathLike[str] | None = None,
    device: str | None = None,
    activation: str | None = None,
) -> CLIP:
    """The model that made the collection, with the towers that the queries need.

    name: as load() takes it; needed where the collection's is no name of available_models().
        device, activation: likewise.

    Raises InputError where it is needed and not given, ProvenanceError for another model than that
    of the collection, and what load() raises.
    """
    theirs = reader.provenance
    if name is None and theirs.model not in hub.available_models():
        raise InputError(
            f"{reader.folder} was made by {theirs.model!r}, which is no name of `npclip models`: "
            f"say where that checkpoint is, --model PATH"
        )
    towers = {"image" if is_image(query) else "text" for query in queries}
    model = load(
        name if name is not None else theirs.model,
        device,
        theirs.dtype,
        towers=tuple(sorted(towers)),
        activation=activation,
    )
    # a query that is an image is decoded at its full size, also where theirs were not
    model.provenance(theirs.normalized, theirs.fast_decode).check(theirs, os.fspath(reader.folder))
    return model


def embed_query(model: CLIP, queries: Sequence[str]) -> Float32:
    """What to look for, float32 [D] of length 1: the sum of the queries' normalised embeddings.

    queries: texts, and paths of image files, see is_image(). Raises InputError for no query, an
    empty text, or embeddings that cancel out, and what encode_image and encode_text raise.
    """
    if not queries or not all(query.strip() for query in queries):
        raise InputError("an empty query" if queries else "no query")
    each = [
        asnumpy((model.encode_image if is_image(query) else model.encode_text)(query, True))
        for query in queries
    ]
    total = np.sum(each, 0, dtype=np.float64)
    length = np.linalg.norm(total)
    if not length > 0:
        raise InputError("the embeddings of the queries cancel out")
    return np.asarray(total / length, np.float32)


def search(reader: Reader, model: CLIP, queries: Sequence[str], top: int = 10) -> list[Hit]:
    """The nearest rows to all queries together, best first.

    Raises InputError for a top below 1 or a collection without rows, and what top_k and embed_query
    raise. The model must be load_model()'s.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, not {top}")
    if not len(reader):
        raise InputError(f"{reader.folder} has no embeddings")
    scores, rows = top_k(reader, embed_query(model, queries)[None], top)
    names = reader.rows(rows[0])
    found = zip(scores[0].tolist(), names, strict=True)
    # rows of length 1 are a little longer or shorter once they are rounded to float16
    return [Hit(max(-1.0, min(1.0, score)), id, path) for score, (id, path) in found]
