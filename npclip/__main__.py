"""The command line. Each subcommand is a module of npclip/commands."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

from .errors import NpclipError

COMMANDS = "classify", "convert", "embed", "eval", "export", "info", "models", "search", "train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return _print(args.run(args))
    except NpclipError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("npclip: interrupted", file=sys.stderr)
        return 130


def _print(text: str) -> int:
    """Write a command's output; returns the exit code."""
    if sys.stdout is None:  # closed, as by `>&-`
        return 0
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError):  # or the interpreter would fail to flush it again
            sys.stdout.close()
        if isinstance(error, BrokenPipeError):  # its reader has left, as `| head` does
            return 1
        return _fail(f"standard output: {error.strerror}")
    return 0


def _fail(message: str) -> int:
    print("npclip: error:", " ".join(message.split()), file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog="npclip", description="CLIP on NumPy.")
    parser.add_argument("--version", action="version", version=f"npclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f".commands.{name}", __package__)
        sub = commands.add_parser(name, help=command.ABOUT, description=command.ABOUT)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, usage_error=sub.error)
    return parser


if __name__ == "__main__":
    sys.exit(main())
