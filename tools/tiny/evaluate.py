"""How well a model finds the held-out drawings, beside chance and beside what needs no learning.

Text-to-image and image-to-text recall over all pictures of a split, each on white, one query a
picture: its name, or (description) its name and up to six keywords. Of pictures that share a query
any one counts.

The baseline knows the same training pictures and captions: a picture is said to show what the
training pictures nearest to it show, and a query finds the pictures whose neighbours' captions have
its words (TF-IDF). Nearest by pixels, and by histograms of oriented gradients; of how many
neighbours, and by which, is what gives the baseline the best result on the measured split itself.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import npclip
from npclip.evaluation import recall

from .augment import on_white
from .captions import words_in
from .check import read

Array = NDArray[Any]
SPLITS = "style", "words", "combinations"
KS = 1, 5, 10
SIDE = 48  # pixels of what the baseline sees
CELL, BINS = 8, 9  # of the histograms of gradients, as Dalal and Triggs chose
NEIGHBOURS = 1, 3, 10, 30
WAYS = {"text_to_image": "text to image ", "image_to_text": "image to text "}
QUERIES = {"text": "name", "description": "name, keywords"}  # columns of the shards


def evaluate(folder: Path, model: npclip.CLIP) -> str:
    """A Markdown table of text-to-image and image-to-text recall, per split and query."""
    baseline = Baseline(read(folder / "shards" / "train"))
    columns = [f"{way}@{k}" for way in WAYS.values() for k in KS]
    lines = [f"| pictures | query | | {' | '.join(columns)} |", "|---|---|---|" + "---:|" * 6]
    for split in SPLITS:
        rows = read(folder / "shards" / split)
        pictures = [pixels(row) for row in rows]
        embeddings = model.encode_image(pictures, normalize=True)
        for query, name in QUERIES.items():
            texts, pairs = texts_of(rows, query)
            found = {
                "**tiny**": recall(embeddings, encode(model, texts), pairs),
                "nearest neighbour": baseline.recall(pictures, texts, pairs),
                "chance": chance(len(rows), len(texts), pairs),
            }
            for who, result in found.items():
                figures = [f"{100 * result[f'{way}@{k}']:.1f} %" for way in WAYS for k in KS]
                cells = f"{split} ({len(rows):,})", name, who, *figures
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pixels(row: dict[str, Any]) -> Image.Image:
    """A drawing of a shard as it is measured: on white, at the size that it is kept in."""
    with Image.open(io.BytesIO(row["image"])) as drawing:
        return Image.fromarray(on_white(drawing, drawing.width))


def texts_of(rows: Sequence[dict[str, Any]], query: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The different queries, and which picture has which: pairs as recall takes them."""
    numbers: dict[str, int] = {}
    pairs = [(i, numbers.setdefault(row[query], len(numbers))) for i, row in enumerate(rows)]
    return list(numbers), pairs


def encode(model: npclip.CLIP, texts: Sequence[str]) -> Array:
    """float32 [T, E] of length 1."""
    return model.encode_text(list(texts), normalize=True, truncate=True)


def chance(images: int, texts: int, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """What a random order finds: 1 - the probability that none of its own is among the first k."""
    found = {}
    for way, column, candidates in (("text_to_image", 1, images), ("image_to_text", 0, texts)):
        own = np.bincount(np.array(pairs)[:, column])
        for k in KS:
            none = [_none(candidates, n, min(k, candidates)) for n in own]
            found[f"{way}@{k}"] = float(1 - np.mean(none))
    return found


class Baseline:
    """Training pictures and their words; see the module's docstring."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """rows: of the training shards."""
        pictures = [pixels(row) for row in rows]
        self.features = {name: _unit(f(pictures)) for name, f in FEATURES.items()}
        said = [{w for text in row["texts"] for w in words_in(text)} for row in rows]
        vocabulary = sorted(set().union(*said))
        self._number = {word: i for i, word in enumerate(vocabulary)}
        self._said = np.zeros((len(rows), len(vocabulary)), np.float32)
        for row, words in zip(self._said, said, strict=True):
            row[[self._number[word] for word in words]] = 1
        self._weights = np.log(len(rows) / self._said.sum(0))  # inverse document frequency
        self._said *= self._weights
        self._said /= np.linalg.norm(self._said, axis=1, keepdims=True)

    def recall(
        self, pictures: Sequence[Image.Image], texts: Sequence[str], pairs: list[tuple[int, int]]
    ) -> dict[str, float]:
        """The best by text_to_image@1 of all features and NEIGHBOURS."""
        queries = _unit(np.array([self._words(text) for text in texts]))
        found = [recall_of_ties(shown, queries, pairs) for shown in self._shown(pictures)]
        return max(found, key=lambda result: result["text_to_image@1"])

    def _shown(self, pictures: Sequence[Image.Image]) -> list[Array]:
        """For each feature and number of neighbours, [pictures, words] of length 1."""
        all_shown = []
        for name, features in self.features.items():
            similar = _unit(FEATURES[name](pictures)) @ features.T
            nearest = np.argsort(-similar, axis=1, kind="stable")[:, : max(NEIGHBOURS)]
            for count in NEIGHBOURS:
                shown = [self._said[some[:count]].sum(0) for some in nearest]
                all_shown.append(_unit(np.array(shown)))
        return all_shown

    def _words(self, text: str) -> Array:
        row = np.zeros(len(self._number), np.float32)
        known = [self._number[w] for w in words_in(text) if w in self._number]
        row[known] = self._weights[known]
        return row


def recall_of_ties(images: Array, texts: Array, pairs: list[tuple[int, int]]) -> dict[str, float]:
    """As npclip.evaluation.recall, but what is equally similar comes in random order: the mean.

    Many queries share no word with any picture, and many pictures have the same neighbours; such
    ties, which recall() counts against the query, would be unfair to the baseline.
    """
    similarity = texts @ images.T
    own = np.zeros(similarity.shape, bool)
    image, text = np.array(pairs).T
    own[text, image] = True
    found = {}
    ways = ("text_to_image", similarity, own), ("image_to_text", similarity.T, own.T)
    for way, scores, right in ways:
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        before = (scores > best + 1e-6).sum(1)
        equal = abs(scores - best) <= 1e-6
        all_equal, own_equal = equal.sum(1), (equal & right).sum(1)
        for k in KS:
            places = np.clip(k - before, 0, all_equal)  # of the equal ones, so many are shown
            none = [_none(n, m, p) for n, m, p in zip(all_equal, own_equal, places, strict=True)]
            found[f"{way}@{k}"] = float(1 - np.mean(none))
    return found


def _none(items: int, own: int, drawn: int) -> float:
    """The probability that none of one's own is among so many drawn of the items."""
    return float(np.prod(np.clip(1 - own / (items - np.arange(drawn)), 0, 1)))


def by_pixels(pictures: Sequence[Image.Image]) -> Array:
    """float32 [N, 16 * 16 * 3]: how far each is from white."""
    small = [np.asarray(p.resize((16, 16)), np.float32).ravel() for p in pictures]
    return 255 - np.array(small)


def by_gradients(pictures: Sequence[Image.Image]) -> Array:
    """float32 [N, ...]: histograms of oriented gradients, of grey pictures of SIDE pixels.

    Cells of CELL pixels, each histogram divided by its length in blocks of 2 x 2 cells.
    """
    small = (picture.convert("L").resize((SIDE, SIDE)) for picture in pictures)
    return np.array([_histograms(np.asarray(grey)) for grey in small])


def _histograms(grey: Array) -> Array:
    down, right = np.gradient(grey.astype(np.float32))
    strength = np.hypot(down, right)
    angle = np.arctan2(down, right) % np.pi  # a contour's direction, whichever side is darker
    bins = np.minimum((angle * (BINS / np.pi)).astype(int), BINS - 1)
    cells = SIDE // CELL
    at = np.arange(SIDE) // CELL
    index = (at[:, None] * cells + at) * BINS + bins
    counts = np.bincount(index.ravel(), strength.ravel(), cells * cells * BINS)
    grid = counts.reshape(cells, cells, BINS)
    blocks = [grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:]]
    return _unit(np.concatenate(blocks, -1)).astype(np.float32).ravel()


FEATURES: dict[str, Callable[[Sequence[Image.Image]], Array]] = {
    "pixels": by_pixels,
    "gradients": by_gradients,
}


def _unit(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1)
