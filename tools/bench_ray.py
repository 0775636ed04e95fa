#!/usr/bin/env python3
"""Time picture files to embeddings by Ray's workers, beside the engine of one process.

    python tools/bench_ray.py [--model ViT-B/32] [--dtype float32] [--files 400] [--write README.md]

Random weights, JPEGs of 333x500 to 1920x1080, one local cluster. The clock runs from the first
worker that has its model to the last embedding. Rounds are interleaved; the figure is the median.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from bench_embed import write_pictures
from parity import write_or_print

import npclip
from npclip import bulk
from npclip.config import ARCHITECTURES
from npclip.ray.engine import Engine, Task
from npclip.sources.items import file_item

GROUP = bulk.default_batch("image", "cpu")
START, END = "<!-- ray -->\n", "<!-- /ray -->\n"
LAYOUTS = [(1, 1), (2, 1), (1, 2)]  # workers, CPUs of each


class Clocked:
    """Items; start is when the second group is asked for, which is when there is a worker."""

    def __init__(self, paths: list[Path]) -> None:
        """One a file."""
        self._paths, self.start = paths, time.perf_counter()

    def __iter__(self) -> Iterator[bulk.Item]:
        """In order."""
        for i, path in enumerate(self._paths):
            if i == GROUP:
                self.start = time.perf_counter()
            yield file_item(str(path), "image")


def bench(name: str, dtype: str, files: int, rounds: int, threads: int) -> str:
    """A Markdown table."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, pictures = Path(folder) / "random.safetensors", Path(folder) / "pictures"
        pictures.mkdir(exist_ok=True)
        write_pictures(pictures, files)
        paths = sorted(pictures.iterdir())
        tool = Path(__file__).with_name("random_checkpoint.py")
        subprocess.run([sys.executable, tool, name, checkpoint], check=True, capture_output=True)
        load = partial(npclip.load, checkpoint, "cpu", dtype, towers=("image",))
        model, options = load(), bulk.Options()
        task = Task(load, options, model.provenance(), os.getcwd())
        label = f"one process, {threads} threads"
        engines: dict[str, bulk.Engine] = {
            label: partial(bulk.embedded, model=model, options=options)
        }
        for workers, cpus in LAYOUTS:
            words = f"Ray, {workers} workers" if workers > 1 else "Ray, 1 worker"
            engines[f"{words} x {cpus} CPUs" if cpus > 1 else f"{words} x 1 CPU"] = Engine(
                task, GROUP, workers=workers, cpus=cpus
            )
        quiet = {"include_dashboard": False, "log_to_driver": False}
        ray.init(address="local", num_cpus=threads, logging_level=logging.ERROR, **quiet)
        rates: dict[str, list[float]] = {engine: [] for engine in engines}
        for _ in range(rounds):
            for called, engine in engines.items():
                items = Clocked(paths)
                start = time.perf_counter()
                embeddings = np.concatenate([some.embeddings for some in engine(iter(items))])
                start = start if called == label else items.start
                rates[called].append(files / (time.perf_counter() - start))
                assert len(embeddings) == files
                print(f"{called:30s} {rates[called][-1]:6.1f} images/s", file=sys.stderr)
        ray.shutdown()
    first = float(np.median(rates[label]))
    rows = [
        f"| {called} | {np.median(r):.1f} | {np.median(r) / first:.2f}x | "
        f"{min(r):.1f} to {max(r):.1f} |"
        for called, r in rates.items()
    ]
    load_average = os.getloadavg()[1]
    return "\n".join(
        [
            f"{files} JPEGs to {name} embeddings in {dtype}, {rounds} rounds, load average "
            f"{load_average:.1f}, Ray {ray.__version__}:\n",
            "| | images/s | | rounds |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="ViT-B/32", metavar="MODEL")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of one process; Ray's CPUs in all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the result into this file")
    args = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    npclip.set_num_threads(args.threads)
    text = bench(args.model, args.dtype, args.files, args.rounds, args.threads) + "\n"
    write_or_print(args.write, text, START, END)


if __name__ == "__main__":
    main()
