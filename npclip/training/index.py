"""All pairs of a run, in a folder of its own: any of them is read at once, and in any order.

pairs.jsonl has a line for each: its id, its texts, and where its image lies. offsets.npy has where
the lines begin. images.bin has the images that cannot be read at their place, those of Parquet and
of compressed tars; others stay where they are. failed.jsonl lists what is no pair, and why. All
but 8 bytes a pair stays on the disk.
"""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, TrainingError
from ..sources import Pair
from ..sources.items import read_file
from ..whole_file import new_folder

PAIRS, OFFSETS, IMAGES, FAILED, ABOUT = (
    *("pairs.jsonl", "offsets.npy", "images.bin"),
    *("failed.jsonl", "index.json"),
)
VERSION = 1
REMEDY = "remove that folder, and --resume makes it again"


@dataclass(frozen=True)
class Record:
    """A pair of an Index; its image is size bytes of the file at path, from start on, or all."""

    id: str
    texts: tuple[str, ...]
    path: str
    start: int
    size: int | None


class Index:
    """The pairs that build_index() wrote. Threads may share it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens it. Raises TrainingError where it is broken, InputError where a file that has
        images inside it is gone, or has another size than then."""
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / ABOUT).read_text("utf-8"))
            self.failed: int = about["failed"]
            self._offsets = np.load(self.folder / OFFSETS, mmap_mode="r", allow_pickle=False)
            with open(self.folder / PAIRS, "rb") as lines:
                self._lines = mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)
            is_whole = about["version"] == VERSION and self._offsets[-1] == len(self._lines)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"the index cannot be read: {error}; {REMEDY}"
            raise TrainingError(f"{self.folder}: {reason}") from error
        if not is_whole:
            reason = f"the index is broken, or of another version; {REMEDY}"
            raise TrainingError(f"{self.folder}: {reason}")
        for path, size in about["files"].items():
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise InputError(f"{path} is not what it was when the run began")

    def __len__(self) -> int:
        """How many pairs."""
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Record:
        """One of them, 0 <= i < len."""
        begin, end = self._offsets[i : i + 2].tolist()
        record = json.loads(self._lines[begin:end])
        texts = tuple(record.pop("texts"))
        return Record(texts=texts, **record)

    def read(self, record: Record) -> bytes:
        """Its encoded image. Raises ImageError, saying why it cannot be read."""
        path = record.path or str(self.folder / IMAGES)
        return read_file(path, "image", record.start, record.size)


def build_index(
    pairs: Iterable[Pair],
    folder: str | os.PathLike[str],
    on_progress: Callable[[int], None] | None = None,
    most: int | None = None,
) -> Index:
    """Write the index of the pairs, of the first `most` of them, and open it.

    folder: it appears complete or not at all. on_progress: called with the number of pairs now and
    then. Raises InputError where there is no pair, with the first reason; OSError.
    """
    with new_folder(Path(folder)) as place:
        _write(pairs, place, on_progress, most)
    return Index(folder)


def _write(
    pairs: Iterable[Pair], folder: Path, on_progress: Callable[[int], None] | None, most: int | None
) -> None:
    offsets, files, failed, reason = array("q", [0]), dict[str, int](), 0, "there are none"
    with (
        open(folder / PAIRS, "wb") as lines,
        open(folder / IMAGES, "wb") as images,
        open(folder / FAILED, "wb") as failures,
    ):
        for pair in pairs:
            if pair.reason:
                reason = reason if failed else f"{pair.id}: {pair.reason}"
                failed += 1
                failures.write(json_line({"id": pair.id, "reason": pair.reason}))
                continue
            if pair.data is not None:
                start = images.tell()
                images.write(pair.data)
                pair = replace(pair, path="", start=start, size=len(pair.data))
            elif pair.size is not None and pair.path not in files:
                files[pair.path] = os.path.getsize(pair.path)
            record = Record(pair.id, pair.texts, pair.path, pair.start, pair.size)
            lines.write(json_line(asdict(record)))
            offsets.append(lines.tell())
            if on_progress and len(offsets) % 1024 == 0:
                on_progress(len(offsets) - 1)
            if len(offsets) - 1 == most:
                break
    if len(offsets) == 1:
        raise InputError(f"no pair of an image and a text: {reason}")
    np.save(folder / OFFSETS, np.frombuffer(offsets, np.int64))
    about = {"version": VERSION, "pairs": len(offsets) - 1, "failed": failed, "files": files}
    (folder / ABOUT).write_text(json.dumps(about), "utf-8")


def json_line(value: dict[str, Any]) -> bytes:
    """With its end; ASCII, so that paths of any bytes survive."""
    return json.dumps(value).encode() + b"\n"
