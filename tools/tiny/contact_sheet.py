"""Pictures of pictures: a page of drawings with their captions, to see what went wrong."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .augment import augment, on_white

SIDE, LABEL, COLUMNS = 112, 26, 12
GREY = "#e8e8e8"


def sheet(rows: Sequence[dict[str, Any]], seed: int | None = None) -> Image.Image:
    """A page of rows of a shard, text below image, on white or, with a seed, as training sees."""
    lines = -(-len(rows) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * SIDE, max(1, lines) * (SIDE + LABEL)), GREY)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for number, row in enumerate(rows):
        x, y = number % COLUMNS * SIDE, number // COLUMNS * (SIDE + LABEL)
        rgba = Image.open(io.BytesIO(row["image"])).convert("RGBA")
        if seed is None:
            pixels = on_white(rgba, SIDE - 4)
        else:
            rng = np.random.default_rng((seed, number))
            pixels = augment(rgba, row["text"], SIDE - 4, rng)
        page.paste(Image.fromarray(pixels), (x + 2, y + 2))
        for line, start in enumerate((0, 20)):
            label = row["text"][start : start + 20]
            draw.text((x + 3, y + SIDE - 1 + 12 * line), label, "black", font)
    return page


def write_sheets(folder: Path, count: int = 96) -> list[Path]:
    """folder/sheets/NAME.png of every set and split, and train-augmented.png: what training sees.

    count: drawings on a page, evenly from all that a set or split has.
    """
    import pyarrow.parquet as pq

    columns = ["image", "text", "set", "id"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for split in sorted((folder / "shards").iterdir()):
        if split.is_dir():
            rows = pq.read_table(split, columns=columns).to_pylist()
            groups[split.name] = rows
            for row in rows:
                groups.setdefault(f"set-{row['set']}", []).append(row)
    pages = {name: sheet(_evenly(rows, count)) for name, rows in groups.items()}
    pages["train-augmented"] = sheet(_evenly(groups["train"], count), seed=0)
    (folder / "sheets").mkdir(exist_ok=True)
    paths = []
    for name, page in sorted(pages.items()):
        paths.append(folder / "sheets" / f"{name}.png")
        page.save(paths[-1])
    return paths


def _evenly(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    ordered = sorted(rows, key=lambda row: row["id"])
    return ordered[:: max(1, len(ordered) // count)][:count]
