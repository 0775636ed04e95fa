"""What training sees: every training picture some times over, each time augmented anew.

    views/00.parquet ...     columns id, image (PNG, RGB), text; no picture is twice in a file

Augmenting takes longer than a step of so small a model, and a picture that is seen again after some
epochs teaches nearly as much as a new one (Choi et al., "Faster Neural Network Training with Data
Echoing", 2019). So it is done once, and `npclip train` reads the result as any other Parquet.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from npclip.whole_file import replacing

from .augment import augment
from .check import read
from .sources import SOURCES

SIDE = 48  # pixels, as train.toml's image_resolution
FILES = 16  # views of an emoji; other pictures, which are seen half as often, have half as many
LAST = f"views/{FILES - 1:02}.parquet"  # of a folder; what is written last
TASK = 512  # pictures that a process is given at a time
EMOJI = {source.name for source in SOURCES if source.is_emoji}


def make_views(folder: Path, jobs: int, seed: int = 0) -> int:
    """All of folder/views, from folder/shards/train; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / LAST).unlink(missing_ok=True)
    rows = read(folder / "shards" / "train")
    target = folder / "views"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.parquet"):
        old.unlink()
    made = 0
    with ProcessPoolExecutor(jobs) as pool:
        for number in range(FILES):
            chosen = [row for row in rows if row["set"] in EMOJI or number % 2 == 0]
            tasks = [chosen[start : start + TASK] for start in range(0, len(chosen), TASK)]
            found = pool.map(partial(_views, seed=(seed, number)), range(len(tasks)), tasks)
            table = pa.Table.from_pylist([view for some in found for view in some])
            with replacing(target / f"{number:02}.parquet") as stream:
                pq.write_table(table, stream, compression="none", row_group_size=256)
            made += len(table)
    return made


def _views(
    task: int, rows: Sequence[dict[str, Any]], seed: tuple[int, int]
) -> list[dict[str, Any]]:
    """A view of each of the rows of a task."""
    rng, found = np.random.default_rng([*seed, task]), []
    for row in rows:
        text = row["texts"][rng.integers(len(row["texts"]))]
        with Image.open(io.BytesIO(row["image"])) as drawing:
            pixels = augment(drawing, text, SIDE, rng)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        found.append({"id": row["id"], "image": stream.getvalue(), "text": text})
    return found
