#!/usr/bin/env python3
"""Time exact search of a large collection: npclip beside NumPy and FAISS, on the same rows.

    python tools/bench_search.py [--rows 10000000] [--dimension 512] [--write README.md]

The collection is npclip's own, float16 in .npy shards that are mapped into memory: 10 GB by
default, made in a temporary folder (--folder says where) and deleted afterwards. What is timed is
one query, and --queries of them at once, for the 10 nearest rows, by

    npclip        npclip.search.top_k
    NumPy         float32 @ of the same blocks, converted, then the same selection
    FAISS         its exact search of float16, IndexScalarQuantizer(QT_fp16), all of it in memory
    read          what reading the mapped rows takes at least: npclip's own bandwidth kernel

The peers search the first --peer-rows rows, and their times are scaled to all: they are linear.

warm: the files are in the page cache. cold: they were dropped from it before (posix_fadvise), so
this is the disk's figure. Rounds are interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from bench_peers import processor
from numpy.typing import NDArray
from parity import write_or_print

import npclip
from npclip import cpu, cpu_library, ops, search, threads
from npclip.kernels import reference
from npclip.provenance import Provenance
from npclip.store import Reader, Writer

START, END = "<!-- search -->\n", "<!-- /search -->\n"
SHARD = 1 << 20  # rows
NEAREST = 10
PEERS = ("NumPy", "FAISS")
MADE_BY = ("random", "0" * 64, "float32", "none", True)


def make(folder: Path, rows: int, dimension: int) -> None:
    """Shards of random directions, of length 1 up to the rounding of float16.

    One shard of them is made, the others are it with the columns rotated: as hard to search, and
    written as fast as the disk takes it.
    """
    with Writer(folder, Provenance(*MADE_BY, dimension, npclip.__version__), "image", format="npy"):
        pass  # what is below are its shards, without 10 million appends
    shard = np.random.default_rng(0).standard_normal((min(rows, SHARD), dimension), np.float32)
    shard /= np.linalg.norm(shard, axis=1, keepdims=True)
    shard = shard.astype(np.float16)
    for number, first in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - first)
        np.save(folder / f"part-{number:05d}.npy", np.roll(shard[:count], number, axis=1))
        lines = (f'{{"id": "{i}", "path": "{i}"}}\n' for i in range(first, first + count))
        (folder / f"part-{number:05d}.ids.jsonl").write_text("".join(lines))


def by_numpy(reader: Reader | First, queries: NDArray, k: int) -> tuple[NDArray, NDArray]:
    """top_k with NumPy's own matrix product."""
    with mock.patch.object(ops, "_host_backend", lambda: reference):
        return search.top_k(reader, queries, k, rows_at_a_time=16384)  # float32: 32 MB


class First:
    """The first rows of a collection, as a Reader of them."""

    def __init__(self, reader: Reader, rows: int) -> None:
        """So many of them."""
        self._reader, self._rows = reader, rows
        self.provenance, self.dimension = reader.provenance, reader.dimension

    def __len__(self) -> int:
        """Rows."""
        return self._rows

    def blocks(self, max_rows: int = 65536) -> Iterator[tuple[int, NDArray]]:
        """As Reader.blocks."""
        for first, block in self._reader.blocks(max_rows):
            if first >= self._rows:
                return
            yield first, block[: self._rows - first]


def read_all(reader: Reader) -> None:
    """Every byte, by the kernel that measures bandwidth."""
    kernel, _ = cpu_library.best("bandwidth", "f32")
    total = np.empty(1, np.float32)
    for _, block in reader.blocks(search.ROWS_AT_A_TIME):
        kernel(cpu._pointer(block), block.nbytes // 4, 1, cpu._pointer(total))


def drop(folder: Path) -> None:
    """Take its files out of the page cache."""
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def faiss_search(reader: First) -> Callable[[NDArray], NDArray] | None:
    """What finds the nearest of the rows; None where there is no FAISS."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads.get_num_threads())
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexScalarQuantizer(reader.dimension, kind, faiss.METRIC_INNER_PRODUCT)
    for _, block in reader.blocks():
        index.add(block.astype(np.float32))
    return lambda queries: index.search(queries, NEAREST)[1]


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench(folder: Path, args: argparse.Namespace) -> str:
    """The table."""
    make(folder, args.rows, args.dimension)
    rng, times = np.random.default_rng(1), {}
    with Reader(folder) as reader:
        some_rows = First(reader, min(args.peer_rows, len(reader)))
        faiss = faiss_search(some_rows)
        shape = args.queries, reader.dimension
        many = rng.standard_normal(shape).astype(np.float32)
        many /= np.linalg.norm(many, axis=1, keepdims=True)
        calls: dict[str, Callable[[], object]] = {"read": lambda: read_all(reader)}
        for count in (1, args.queries):
            some = many[:count]
            calls[f"npclip {count}"] = lambda q=some: search.top_k(reader, q, NEAREST)
            calls[f"NumPy {count}"] = lambda q=some: by_numpy(some_rows, q, NEAREST)
            if faiss:
                calls[f"FAISS {count}"] = lambda q=some: faiss(q)
        _compare(some_rows, many, faiss)
        for _ in range(args.rounds):
            for name, call in calls.items():
                times.setdefault(name, []).append(seconds(call))
                print(f"{name:12s} {times[name][-1]:8.2f} s", file=sys.stderr, flush=True)
        cold = []
        for _ in range(args.cold_rounds):
            drop(folder)
            cold.append(seconds(calls["npclip 1"]))
            print(f"cold         {cold[-1]:8.2f} s", file=sys.stderr, flush=True)
    found = {name: float(np.median(each)) for name, each in times.items()}
    for name in found:
        if name.startswith(PEERS):
            found[name] *= args.rows / len(some_rows)
    return _table(args, found, float(np.median(cold)) if cold else None, len(some_rows))


def _compare(reader: First, queries: NDArray, faiss: Callable[[NDArray], NDArray] | None) -> None:
    """All find the same rows, but where scores are as near as rounding."""
    scores, found = search.top_k(reader, queries, NEAREST)
    by_peer, _ = by_numpy(reader, queries, NEAREST)
    np.testing.assert_allclose(scores, by_peer, atol=1e-6)
    if faiss:
        theirs = faiss(queries)
        for mine, others in zip(found, theirs, strict=True):
            if missing := {*mine.tolist()} - {*others.tolist()}:
                raise SystemExit(f"FAISS does not find {missing}")


def _table(
    args: argparse.Namespace, found: dict[str, float], cold: float | None, peer_rows: int
) -> str:
    gigabytes = 2e-9 * args.rows * args.dimension
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    lines = [
        f"The {NEAREST} nearest of {args.rows / 1e6:g} million x {args.dimension} float16 "
        f"({gigabytes:.1f} GB of .npy shards in the page cache), exact, seconds; "
        f"{threads.get_num_threads()} threads of {processor()}, median of {args.rounds} "
        f"interleaved rounds. Reading the rows alone takes {found['read']:.2f} s "
        f"({gigabytes / found['read']:.1f} GB/s). NumPy and FAISS searched {peer_rows / 1e6:g} "
        f"million rows; their times are scaled.\n",
        f"| | 1 query | {args.queries} queries |",
        "|---|---|---|",
    ]
    for name in ("npclip", *PEERS):
        if f"{name} 1" in found:
            cells = []
            for count in (1, args.queries):
                times = found[f"{name} {count}"] / found[f"npclip {count}"]
                ratio = "" if name == "npclip" else f" ({times:.1f}x)"
                cells.append(f"{found[f'{name} {count}']:.2f}{ratio}")
            note = {"FAISS": ", fp16 scalar quantizer, in memory"}.get(name, "")
            lines.append(f"| {name}{note} | {cells[0]} | {cells[1]} |")
    if cold is not None:
        lines.append(f"\nFrom this machine's disk, nothing in the page cache: {cold:.1f} s.")
    print(f"largest resident size, mapped pages included: {memory} MiB", file=sys.stderr)
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--peer-rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=threads.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to make the collection")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file")
    args = parser.parse_args()
    npclip.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        text = bench(Path(folder) / "collection", args)
    write_or_print(args.write, text, START, END)


if __name__ == "__main__":
    main()
