"""npclip info."""

from __future__ import annotations

import argparse
import json

from ..info import describe, lines
from . import MODEL, add_activation

ABOUT = "A model's configuration, tensors and fingerprint."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_activation(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> str:
    """The description, in lines or as JSON."""
    report = describe(args.model, args.activation, tensors=args.tensors)
    return json.dumps(report, indent=2) if args.json else "\n".join(lines(report))
