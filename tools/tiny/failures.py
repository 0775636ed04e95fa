"""A page of what a model gets wrong: a query, the picture that was meant, those that it found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import npclip

from .check import read
from .evaluate import encode, pixels, texts_of

SIDE, GAP, LABEL = 72, 4, 150
FOUND = 5  # pictures that are shown of a query's
COLUMNS, ROWS = 2, 12
MEANT = "#1a7f37"  # the frame of the picture that was meant


def failures(folder: Path, model: npclip.CLIP) -> Image.Image:
    """COLUMNS * ROWS of the style's names that do not find their picture first, evenly from them.

    Of each the name, and at which place its picture comes; that picture, in a frame; the first
    FOUND of all pictures of the style.
    """
    rows = read(folder / "shards" / "style")
    pictures = [pixels(row) for row in rows]
    names, pairs = texts_of(rows, "text")
    similarity = encode(model, names) @ model.encode_image(pictures, normalize=True).T
    order = np.argsort(-similarity, axis=1, kind="stable")
    own = np.zeros(similarity.shape, bool)
    image, text = np.array(pairs).T
    own[text, image] = True
    place = np.take_along_axis(own, order, 1).argmax(1)  # from 0
    wrong = sorted(np.flatnonzero(place > 0), key=lambda i: names[i])
    count = COLUMNS * ROWS
    chosen = [wrong[i * len(wrong) // count] for i in range(min(count, len(wrong)))]
    width, height = LABEL + (1 + FOUND) * (SIDE + GAP) + 3 * GAP, SIDE + 2 * GAP
    page = Image.new("RGB", (COLUMNS * width, ROWS * height), "white")
    for number, i in enumerate(chosen):
        x, y = number // ROWS * width, number % ROWS * height
        meant = pictures[order[i, place[i]]]
        found = [pictures[j] for j in order[i, :FOUND]]
        _draw(page, x, y, f"{names[i]}\n(place {place[i] + 1:,})", [meant, *found])
    return page


def _draw(page: Image.Image, x: int, y: int, label: str, pictures: list[Image.Image]) -> None:
    """The first picture is the one that was meant."""
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    draw.multiline_text((x + GAP, y + GAP), _wrapped(label, 22), "black", font)
    for number, picture in enumerate(pictures):
        left = x + LABEL + number * (SIDE + GAP) + (2 * GAP if number else 0)
        page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, y + GAP))
    corners = (x + LABEL - 2, y + GAP - 2, x + LABEL + SIDE + 1, y + GAP + SIDE + 1)
    draw.rectangle(corners, outline=MEANT, width=2)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, width))
