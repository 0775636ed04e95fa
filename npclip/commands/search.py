"""npclip search."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from ..errors import InputError
from ..search import gallery, is_image, load_model, search
from ..store import Reader
from . import MODEL, add_activation, add_device, printable

ABOUT = "The images or texts of a collection that are nearest to a text, an image, or several."
LOOKS_LIKE_A_FILE = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("index", metavar="INDEX", help="folder that `npclip embed` wrote")
    about = "an image, if it is a file, or a text; several are added"
    parser.add_argument("queries", metavar="QUERY", nargs="+", help=about)
    about = f"{MODEL} (default: the name of the one that made INDEX)"
    parser.add_argument("--model", help=about)
    add_activation(parser)
    add_device(parser)
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many (default 10)")
    parser.add_argument("--json", action="store_true", help="print [{score, id, path}]")
    parser.add_argument("--html", metavar="FILE", help="also write a page with thumbnails")


def run(args: argparse.Namespace) -> str:
    """A line for each row that was found, the best first."""
    if args.top < 1:
        args.usage_error(f"--top must be at least 1, not {args.top}")
    for query in args.queries:
        if query.lower().endswith(LOOKS_LIKE_A_FILE) and not is_image(query):
            _say(f"{query!r} is no file, so it is a text")
    with Reader(args.index) as reader:
        if pending := reader.pending:
            _say(f"{args.index} has {pending} more rows, not searched: `npclip embed` is at work, "
                 "or was stopped; run it again to finish them")  # fmt: skip
        if not len(reader):
            raise InputError(f"{args.index} has no embeddings")
        model = load_model(reader, args.queries, args.model, args.device, args.activation)
        hits = search(reader, model, args.queries, args.top)
        if args.html:
            gallery.write(args.html, args.queries, hits, reader.kind, os.fspath(args.index))
    if args.json:
        return json.dumps([asdict(hit) for hit in hits])
    names = [hit.path if reader.kind == "image" else hit.id for hit in hits]
    if sys.stdout is not None and sys.stdout.isatty():
        names = [printable(name) for name in names]
    return "\n".join(f"{h.score:.4f}  {name}" for h, name in zip(hits, names, strict=True))


def _say(message: str) -> None:
    text = f"npclip: {message}"
    print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)
