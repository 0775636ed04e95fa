"""npclip convert."""

from __future__ import annotations

import argparse

from .. import hub
from ..convert import convert
from . import MODEL, add_activation

ABOUT = "Any CLIP checkpoint to one safetensors file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("source", metavar="SOURCE", help=MODEL)
    parser.add_argument("target", metavar="TARGET", help="safetensors file to write")
    choices = ("float32", "float16", "bfloat16")
    about = "cast the large weights (default: as stored)"
    parser.add_argument("--dtype", choices=choices, help=about)
    add_activation(parser)


def run(args: argparse.Namespace) -> str:
    """What was written, and of what."""
    named = args.source in hub.MODELS
    activation = args.activation or ("quick_gelu" if named else None)
    metadata = convert(hub.resolve(args.source), args.target, args.dtype, activation)
    return f"{args.target}: {metadata.activation}, from SHA-256 {metadata.source_sha256}"
