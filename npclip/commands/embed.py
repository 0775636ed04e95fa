"""npclip embed."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from typing import Any

from ..bulk import Report, embed, let_pillow_open
from ..clip import load
from ..errors import NpclipError
from ..sources import Item, Kind, open_sources
from . import add_model

ABOUT = "Embed images or texts, any number of them, into a collection on disk."
LINES_EVERY = 10.0  # seconds, where there is no terminal
READ_TO_COUNT = re.compile(r"\.(parquet|tar\.gz|tgz)::", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    about = "file, folder, glob, @list, webdataset .tar, .parquet, or - for lines of stdin"
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help=about)
    parser.add_argument(
        "-o", "--out", metavar="OUT", required=True, help="folder; goes on if there"
    )
    add_model(parser)
    parser.add_argument("--text", action="store_true", help="the sources are texts, not images")
    about = "of the arithmetic: float32, float16, bfloat16 (default: as npclip.load)"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=about)
    choices = ("float16", "float32")
    parser.add_argument("--store", choices=choices, default="float16", help="of the embeddings")
    parser.add_argument("--format", choices=("parquet", "npy"), default="parquet")
    about = "leave embeddings as the model gives them, not of length 1"
    parser.add_argument("--no-normalize", dest="normalize", action="store_false", help=about)
    parser.add_argument("--batch", type=int, metavar="N", help="items a call of the encoder")
    about = "threads that read and decode; with Ray, processes with a model each"
    parser.add_argument("--workers", type=int, metavar="N", help=about)
    parser.add_argument("--column", help="of Parquet, CSV and JSONL (default: found by its name)")
    parser.add_argument("--id-column", help="of Parquet: the ids (default: file and row number)")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="refuse larger images (default: Pillow's limit)"
    )
    about = "decode large JPEGs at a reduced size: not quite openai/CLIP's embeddings"
    parser.add_argument("--fast-decode", action="store_true", help=about)
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    about = "local: this process; ray: many, on one machine or many (default local)"
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=about)
    about = 'of a Ray cluster, such as "auto" (default: one of this machine, for this run)'
    parser.add_argument("--address", help=about)
    parser.add_argument("--cpus-per-worker", type=int, metavar="N", help="with Ray: its threads")


def run(args: argparse.Namespace) -> str:
    """What was done; progress goes to stderr."""
    kind: Kind = "text" if args.text else "image"
    if args.engine == "local" and (args.address or args.cpus_per_worker):
        args.usage_error("--address and --cpus-per-worker are for --engine ray")
    columns = {"column": args.column, "id_column": args.id_column}
    items = open_sources(args.sources, kind, **columns)  # raises before a model is read
    let_pillow_open(args.max_pixels)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that can be read none the less
    # standard input can be read only once, and a list may name it
    is_countable = not any(source == "-" or source.startswith("@") for source in args.sources)
    progress = _Progress(items if is_countable else None, sys.stderr.isatty())
    engine = _by_ray if args.engine == "ray" else _here
    try:
        report = engine(
            args,
            kind,
            dtype=args.store,
            format=args.format,
            normalize=args.normalize,
            batch=args.batch,
            workers=args.workers,
            **columns,
            max_pixels=args.max_pixels,
            fast_decode=args.fast_decode,
            truncate=args.truncate,
            on_progress=progress,
        )
    finally:
        progress.close()
    failed = f", see {os.path.join(args.out, 'errors.jsonl')}" if report.failed else ""
    return f"{args.out}: {_line(report)}{failed}"


def _here(args: argparse.Namespace, kind: Kind, **options: Any) -> Report:
    model = load(args.model, args.device, args.dtype, towers=(kind,), activation=args.activation)
    return embed(args.sources, args.out, model, kind, **options)


def _by_ray(args: argparse.Namespace, kind: Kind, **options: Any) -> Report:
    from ..ray import engine as ray_engine

    with redirect_stdout(sys.stderr):  # Ray prints there when a worker dies
        return ray_engine.embed(
            args.sources,
            args.out,
            args.model,
            kind,
            address=args.address,
            cpus_per_worker=args.cpus_per_worker,
            device=args.device,
            model_dtype=args.dtype,
            activation=args.activation,
            **options,
        )


def _line(report: Report) -> str:
    rate = report.embedded / report.seconds if report.seconds else 0.0
    parts = [f"{report.embedded} embedded in {report.seconds:.1f} s, {rate:.1f} a second"]
    if report.skipped:
        parts.append(f"{report.skipped} were there already")
    if report.failed:
        parts.append(f"{report.failed} failed")
    return ", ".join(parts)


class _Progress:
    """A bar on a terminal, else a line now and then."""

    def __init__(self, items: Iterator[Item] | None, is_terminal: bool) -> None:
        """items: all there are, which the bar counts meanwhile."""
        self._bar: Any = None
        self._next = time.monotonic() + LINES_EVERY
        if is_terminal:
            from tqdm import tqdm

            self._bar = tqdm(unit=" items", smoothing=0.05)
            if items is not None:
                threading.Thread(target=self._count, args=(items,), daemon=True).start()

    def __call__(self, report: Report) -> None:
        if self._bar is not None:
            self._bar.update(report.seen - self._bar.n)
            self._bar.set_postfix(failed=report.failed, refresh=False)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LINES_EVERY
            print(_line(report), file=sys.stderr, flush=True)

    def _count(self, items: Iterator[Item]) -> None:
        """The bar's total, where it is known without reading what is to be embedded."""
        total = 0
        with suppress(NpclipError):  # embed() says so
            for item in items:
                if READ_TO_COUNT.search(item.path):
                    return
                total += 1
            self._bar.total = total

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
