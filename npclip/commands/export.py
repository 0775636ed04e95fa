"""npclip export."""

from __future__ import annotations

import argparse

from ..search.faiss_export import export
from ..store import Reader

ABOUT = "A collection as an index of FAISS, for approximate search."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("index", metavar="INDEX", help="folder that `npclip embed` wrote")
    about = "FAISS index to write; OUT.jsonl will have the ids and paths of its rows"
    parser.add_argument("out", metavar="OUT", help=about)


def run(args: argparse.Namespace) -> str:
    """What was written."""
    with Reader(args.index) as reader:
        kind = export(reader, args.out)
        return f"{args.out}: {kind} of {len(reader)} rows; their names are in {args.out}.jsonl"
