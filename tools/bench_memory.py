#!/usr/bin/env python3
"""Plot the memory of long runs of npclip.bulk.embed: it must not grow with what was embedded.

    pip install matplotlib && python tools/bench_memory.py [--write docs/performance.md]

Embeds 5,000 JPEGs and 100,000 texts by ViT-B/32 in bfloat16, each in a process of its own,
and notes the resident memory after every batch. The plot goes to docs/memory.svg; the bound that
it shows is 1.2 times the memory after the first 100.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_embed import write_pictures
from parity import write_or_print
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip import bulk
from npclip.config import ARCHITECTURES, Metadata

COUNTS = {"image": 5_000, "text": 100_000}
FIRST, BOUND = 100, 1.2
START, END = "<!-- memory -->\n", "<!-- /memory -->\n"
PLOT = Path(__file__).parents[1] / "docs" / "memory.svg"
Samples = list[tuple[int, float]]  # (embedded, resident MiB) after every batch


def resident_mib() -> float:
    """Of this process, now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_texts(path: Path, count: int) -> None:
    """Captions of 3 to 20 words, all different."""
    rng = np.random.default_rng(0)
    words = [word for line in npclip.zeroshot.built_in_templates() for word in line.split()]
    with open(path, "w") as file:
        for i in range(count):
            some = rng.choice(words, int(rng.integers(3, 20)))
            print(i, *some, file=file)


def run(kind: str, checkpoint: str, source: str, out: str) -> None:
    """In the process that is measured: prints the samples as JSON."""
    samples: Samples = []
    model = npclip.load(checkpoint, device="cpu", dtype="bfloat16", towers=(kind,))

    def note(report: bulk.Report) -> None:
        samples.append((report.embedded, resident_mib()))

    report = bulk.embed(source, out, model, kind, on_progress=note)
    assert report.embedded == COUNTS[kind] and not report.failed, report
    print(json.dumps(samples))


def measure(kind: str, folder: Path) -> Samples:
    """Make the input and run it in another process."""
    checkpoint, source = folder / "model.safetensors", folder / f"{kind}s"
    if not checkpoint.exists():
        tensors = random_tensors(ARCHITECTURES["ViT-B/32"])
        save_file(tensors, checkpoint, Metadata(activation="quick_gelu").to_strings())
    if kind == "image":
        source.mkdir()
        write_pictures(source, COUNTS[kind])
    else:
        source = source.with_suffix(".txt")
        write_texts(source, COUNTS[kind])
    command = [sys.executable, __file__, "--run", kind, checkpoint, source, folder / f"out-{kind}"]
    done = subprocess.run(map(str, command), check=True, stdout=subprocess.PIPE, text=True)
    return [(count, mib) for count, mib in json.loads(done.stdout)]


def plot(samples: dict[str, Samples]) -> str:
    """Writes docs/memory.svg; returns the sentences that go with it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "npclip"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(samples), figsize=(9, 3.2), layout="constrained")
    sentences = []
    for one, (kind, values) in zip(axes, samples.items(), strict=True):
        counts, mib = np.array(values).T
        first = mib[np.argmax(counts >= FIRST)]
        one.plot(counts, mib, linewidth=1.2, label="resident memory")
        one.axhline(
            BOUND * first, color="tab:red", linestyle="--", label=f"{BOUND} x the first {FIRST}"
        )
        one.set(xlabel=f"{kind}s embedded", ylabel="MiB", ylim=(0, 1.35 * BOUND * first))
        one.legend(loc="lower right", frameon=False)
        one.spines[["top", "right"]].set_visible(False)
        largest = mib.max() / first
        sentences.append(
            f"{COUNTS[kind]:,} {kind}s: {first:.0f} MiB after the first {FIRST}, "
            f"at most {mib.max():.0f} MiB after, {largest:.3f} times that (bound {BOUND})."
        )
    figure.savefig(PLOT, metadata={"Date": None})
    return "\n".join(sentences) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the result into this file")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run)
        return
    with tempfile.TemporaryDirectory() as folder:
        samples = {kind: measure(kind, Path(folder)) for kind in COUNTS}
    text = plot(samples)
    write_or_print(args.write, text, START, END)


if __name__ == "__main__":
    main()
