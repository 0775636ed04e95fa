"""How often images find their texts, and texts their images: recall at k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

ROWS = 512  # queries compared at a time: bounds the memory


@np.errstate(invalid="ignore")  # NaN is counted, see below
def ranks(
    queries: NDArray[Any], candidates: NDArray[Any], pairs: NDArray[np.intp]
) -> NDArray[np.intp]:
    """How many wrong candidates are at least as similar to each query as the best of its own. [Q]

    queries [Q, E] and candidates [C, E] are of length 1. pairs [P, 2]: a query and a candidate of
    its own, of every query at least one. Equal similarities, and NaN, count against the query, so
    that a model to which all is the same finds nothing.
    """
    order = np.argsort(pairs[:, 0], kind="stable")
    query, own = pairs[order].T
    found = np.empty(len(queries), np.intp)
    for first in range(0, len(queries), ROWS):
        similarity = queries[first : first + ROWS] @ candidates.T
        begin, end = np.searchsorted(query, [first, first + ROWS])
        row, column = query[begin:end] - first, own[begin:end]
        best = np.full(len(similarity), -np.inf, similarity.dtype)
        np.maximum.at(best, row, similarity[row, column])
        at_least = (~(similarity < best[:, None])).sum(1)  # not >=: that is false of NaN
        np.subtract.at(at_least, row, ~(similarity[row, column] < best[row]))
        found[first : first + ROWS] = at_least
    return found


def recall(
    images: NDArray[Any],
    texts: NDArray[Any],
    pairs: Sequence[tuple[int, int]] | NDArray[np.intp],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """{"image_to_text@1": ..., "text_to_image@1": ...} and so on, each within 0 .. 1.

    images [I, E] and texts [T, E] are of length 1. pairs [P, 2]: which image and which text belong
    together; an image may have several texts, and a text several images, of which any one counts.
    Raises InputError where there are no pairs, or an image or a text is in none.
    """
    index = np.asarray(pairs, np.intp).reshape(-1, 2)
    for name, rows, column in (("image", images, 0), ("text", texts, 1)):
        if not len(index) or set(range(len(rows))) != set(index[:, column].tolist()):
            raise InputError(f"recall: every {name}, and nothing else, must be in a pair")
    directions = {
        "image_to_text": ranks(images, texts, np.unique(index, axis=0)),
        "text_to_image": ranks(texts, images, np.unique(index[:, ::-1], axis=0)),
    }
    return {
        f"{name}@{k}": float((rank < k).mean()) for k in ks for name, rank in directions.items()
    }
