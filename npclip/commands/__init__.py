"""The subcommands of npclip, a module each: ABOUT, add_arguments(parser), run(args) -> its output.

run() raises errors of npclip.errors, and calls args.usage_error(message) for wrong usage.
"""

from __future__ import annotations

import argparse

MODEL = "a name of `npclip models`, a checkpoint file or a directory"


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of npclip.load()."""
    parser.add_argument("--model", default="ViT-B/32", help=f"{MODEL} (default ViT-B/32)")
    add_activation(parser)
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    about = '"cpu", "cuda" or "cuda:N" (default a GPU if there is one)'
    parser.add_argument("--device", help=about)


def printable(text: str) -> str:
    """Without what would move a terminal's cursor, or give it commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def add_activation(parser: argparse.ArgumentParser) -> None:
    """--activation."""
    parser.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        help="for a checkpoint that does not record it",
    )
