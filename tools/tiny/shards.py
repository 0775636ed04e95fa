"""Rendered pictures and their captions -> Parquet shards, one folder a split, and split.json.

    shards/train/00000.parquet ...   shards/valid/   shards/style/   shards/words/   ...

Columns: id, image (WebP with alpha), text (the best name), texts (captions to draw from, in
training), description (name and keywords, for measuring), set, name, concept, group, held_out
("words", "combinations" or nothing), licence.
`npclip` reads them as they are: image and text are its usual names of columns.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from npclip.whole_file import replacing

from . import captions
from .drawings import Drawing, emoji_codes, read_annotations, read_drawings
from .selection import selected
from .sources import SOURCES, STYLE, Source
from .splits import Picture, choose_holdout, split_of, words_of

ROWS = 4096  # of a shard
ALIKE = 8  # pictures of one concept that a set may have; of the style that is measured, one
DRAWN = tuple(source for source in SOURCES if source.use != "text")
SPLITS = "train", "valid", "style", "words", "combinations"
SUMMARY = "shards/split.json"  # of a folder; what is written last


def make_shards(folder: Path, seed: int = 0) -> Counter[str]:
    """All of folder/shards from folder/sources and folder/rendered; returns what was left out."""
    (folder / SUMMARY).unlink(missing_ok=True)
    left_out: Counter[str] = Counter()
    rows = list(_rows(folder, left_out))
    pictures = [_picture(row) for row in rows]
    names = {row["concept"]: row["text"] for row in rows if row["set"] == STYLE}
    holdout = choose_holdout(pictures, names, seed)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for row, picture in zip(rows, pictures, strict=True):
        row["held_out"] = holdout.kind(picture.concept)
        split = split_of(picture, holdout, seed)
        if split == "related":
            left_out["related to a held-out concept"] += 1
        else:
            splits[split].append(row)
    _drop_copies(splits, left_out)
    for split, some in splits.items():
        random.Random(seed).shuffle(some)
        _write(folder / "shards" / split, some)
    summary = {
        "seed": seed,
        "words": {names[c]: word for c, word in sorted(holdout.words.items())},
        "combinations": {names[c]: sorted(s) for c, s in sorted(holdout.combinations.items())},
        "pictures": {split: len(some) for split, some in splits.items()},
        "left out": dict(sorted(left_out.items())),
    }
    with replacing(folder / SUMMARY) as stream:
        stream.write(json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return left_out


def _rows(folder: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Of every picture that shows something and has a caption, in the order of the sources."""
    import pyarrow.parquet as pq

    sources = folder / "sources"
    annotations, codes = read_annotations(sources), emoji_codes(sources)
    drawings = {s.name: list(selected(s, read_drawings(s, sources))) for s in DRAWN}
    shared, known = _titles_and_english(drawings, annotations)
    for source in DRAWN:
        table = pq.read_table(folder / "rendered" / f"{source.name}.parquet")
        images = dict(zip(table["name"].to_pylist(), table["image"].to_pylist(), strict=True))
        seen: Counter[str] = Counter()
        for drawing in drawings[source.name]:
            words = (
                captions.emoji_words(drawing, annotations, codes)
                if source.is_emoji
                else captions.art_words(drawing, shared, known)
                if source.registry == "debian"
                else captions.icon_words(drawing)
            )
            image = images.get(drawing.name)
            if image is None or words is None:
                left_out[f"{source.name}: no {'picture' if words else 'caption'}"] += 1
            elif seen[words.concept] >= (1 if source.use == "style" else ALIKE):
                left_out[f"{source.name}: more of what it has"] += 1
            else:
                seen[words.concept] += 1
                yield _row(source, drawing, words, image)


def _titles_and_english(
    drawings: dict[str, list[Drawing]], annotations: dict[str, tuple[str, tuple[str, ...]]]
) -> tuple[Counter[str], Counter[str]]:
    """How many drawings have a title, and a word that icons, emoji or several drawings use."""
    art = [drawing for s in DRAWN if s.registry == "debian" for drawing in drawings[s.name]]
    counts = Counter(word for drawing in art for word in set(drawing.keywords))
    known = Counter({word: count for word, count in counts.items() if count > 1})
    for name, keywords in annotations.values():
        known.update(word for text in (name, *keywords) for word in captions.words_in(text))
    icons = (d for s in DRAWN if s.registry != "debian" for d in drawings[s.name])
    known.update(word for drawing in icons for word in captions.words_in(drawing.name))
    return Counter(drawing.title for drawing in art), known


def _row(source: Source, drawing: Drawing, words: captions.Words, image: bytes) -> dict[str, Any]:
    id = f"{source.name}/{drawing.name}"
    return {
        "id": id,
        "image": image,
        "text": words.names[0],
        "texts": captions.texts_of(words, source, id),
        "description": ", ".join([words.names[0], *words.keywords[:6]]),
        "names": list(words.names),
        "keywords": list(words.keywords),
        "set": source.name,
        "name": drawing.name,
        "concept": words.concept,
        "group": drawing.category,
        "licence": source.licence,
    }


def _picture(row: dict[str, Any]) -> Picture:
    is_style = row["set"] == STYLE
    texts = (*row["names"], *row["keywords"], captions.spelled(row["name"].rpartition("/")[2]))
    group = row["group"] if is_style else ""
    return Picture(row["id"], row["set"], row["concept"], words_of(texts), group, is_style)


def look(image: bytes) -> bytes:
    """A fingerprint that copies share: 16 x 16 pixels on white, of 16 levels."""
    with Image.open(io.BytesIO(image)) as picture:
        rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    small = Image.alpha_composite(white, rgba).convert("RGB").resize((16, 16))
    return hashlib.blake2b((np.asarray(small) >> 4).tobytes(), digest_size=16).digest()


def _drop_copies(splits: dict[str, list[dict[str, Any]]], left_out: Counter[str]) -> None:
    """Training pictures that look like a measured one go, and so do second copies."""
    seen = {look(row["image"]) for split in SPLITS[2:] for row in splits[split]}
    for split in "train", "valid":
        kept = []
        for row in splits[split]:
            if (fingerprint := look(row["image"])) in seen:
                left_out["looks like another"] += 1
            else:
                seen.add(fingerprint)
                kept.append(row)
        splits[split] = kept


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    for number, start in enumerate(range(0, len(rows), ROWS)):
        table = pa.Table.from_pylist(rows[start : start + ROWS])
        with replacing(folder / f"{number:05}.parquet") as stream:
            pq.write_table(table, stream, compression="none", row_group_size=256)
