"""What the shards hold, and whether anything measured leaks into training.

Reads the files as a trainer does, and shares nothing with what wrote them but the definitions of
holds_word and holds_all in splits.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npclip.tokenizer import encode

from .captions import may_flip
from .shards import SPLITS, look
from .sources import SOURCES, STYLE
from .splits import holds_all, holds_word, words_of

MERGES = 1024, 2048, 3072, 4096, 6144, 7678, 48894


def check(folder: Path) -> list[str]:
    """Prints the report, and returns the leaks, a line each: there should be none."""
    rows = {split: read(folder / "shards" / split) for split in SPLITS}
    summary = json.loads((folder / "shards" / "split.json").read_text("utf-8"))
    _print_counts(rows)
    print("\nleft out:")
    for reason, count in summary["left out"].items():
        print(f"  {count:6,}  {reason}")
    print("\nheld-out words:", ", ".join(summary["words"]))
    print("held-out combinations:", ", ".join(summary["combinations"]))
    _print_lengths([text for row in rows["train"] for text in row["texts"]])
    print("\n" + licences(rows["train"]))
    found = list(leaks(rows, summary))
    print(f"\n{len(found)} leaks", *found[:20], sep="\n  ")
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows of a split."""
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def leaks(rows: dict[str, list[dict[str, Any]]], summary: dict[str, Any]) -> Iterator[str]:
    """Of concepts, ids, pictures, the style, and words, in what is trained on or tuned by."""
    measured = [row for split in SPLITS[2:] for row in rows[split]]
    ids = {row["id"] for row in measured}
    pictures = {look(row["image"]) for row in measured}
    held_out = {row["concept"] for s in ("words", "combinations") for row in rows[s]}
    words = summary["words"].values()
    combinations = [frozenset(parts) for parts in summary["combinations"].values()]
    for row in (*rows["train"], *rows["valid"]):
        if row["set"] == STYLE:
            yield f"{row['id']}: the style that is measured"
        if row["id"] in ids or row["concept"] in held_out or row["held_out"]:
            yield f"{row['id']}: a picture or concept that is measured"
        if look(row["image"]) in pictures:
            yield f"{row['id']}: looks like a measured one"
        said = words_of([*row["texts"], *row["names"], *row["keywords"], row["description"]])
        yield from (f"{row['id']}: {word}" for word in words if holds_word(said, word))
        yield from (f"{row['id']}: {' + '.join(c)}" for c in combinations if holds_all(said, c))
    trained = {row["id"] for row in rows["train"]}
    yield from (f"{row['id']}: in train and valid" for row in rows["valid"] if row["id"] in trained)


def _print_counts(rows: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'':28}" + "".join(f"{split:>14}" for split in SPLITS))
    counts = {split: Counter(row["set"] for row in some) for split, some in rows.items()}
    for source in SOURCES:
        line = [counts[split][source.name] for split in SPLITS]
        if any(line):
            print(f"{source.name:28}" + "".join(f"{count:14,}" for count in line))
    print(f"{'pictures':28}" + "".join(f"{len(rows[split]):14,}" for split in SPLITS))
    concepts = (len({row["concept"] for row in rows[split]}) for split in SPLITS)
    print(f"{'concepts':28}" + "".join(f"{count:14,}" for count in concepts))
    size = (sum(len(row["image"]) for row in rows[split]) / 1e6 for split in SPLITS)
    print(f"{'MB of pictures':28}" + "".join(f"{mb:14.1f}" for mb in size))
    flips = (np.mean([may_flip(row["text"]) for row in rows[split]] or 0) for split in SPLITS)
    print(f"{'share that may be flipped':28}" + "".join(f"{share:14.2f}" for share in flips))


def _print_lengths(texts: Sequence[str]) -> None:
    """Of different captions in tokens, SOT and EOT included, by the size of the vocabulary."""
    different = sorted(set(texts))
    print(f"\n{len(texts):,} captions, {len(different):,} different; tokens of these:")
    print(
        f"  {'ids':>6} {'mean':>6} {'50 %':>5} {'95 %':>5} {'99 %':>5} {'max':>5} {'ids used':>9}"
    )
    for merges in MERGES:
        size = 514 + merges
        ids = [encode(text, vocab_size=size) for text in different]
        lengths = np.array([len(some) + 2 for some in ids])
        middle, most, nearly_all = np.percentile(lengths, [50, 95, 99]).astype(int)
        used = len(set().union(*ids))
        print(
            f"  {size:6} {lengths.mean():6.2f} {middle:5} {most:5} {nearly_all:5} "
            f"{lengths.max():5} {used:9,}"
        )


def licences(rows: Sequence[dict[str, Any]]) -> str:
    """The attribution for the model card, as a Markdown table."""
    counts = Counter(row["set"] for row in rows)
    lines = ["| source | pictures | licence | author | package |", "|---|---:|---|---|---|"]
    for s in SOURCES:
        use = {"train": f"{counts[s.name]:,}", "style": "evaluation only", "text": "words"}[s.use]
        package = f"{s.registry}: `{s.package}` {s.version}"
        lines.append(f"| [{s.name}]({s.url}) | {use} | {s.licence} | {s.author} | {package} |")
    return "\n".join(lines)
