"""The command line: npclip classify | convert | info | models."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from .errors import NpclipError


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

    def command(run: Any, name: str, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run, usage_error=sub.error)
        return sub

    model_help = "a name of `npclip models`, a checkpoint file or a directory"
    sub = command(_classify, "classify", "Probabilities of labels for an image.")
    sub.add_argument("image", metavar="IMAGE", help="image file")
    sub.add_argument("labels", metavar="LABEL", nargs="+", help="what may be in it")
    sub.add_argument("--model", default="ViT-B/32", help=f"{model_help} (default ViT-B/32)")
    sub.add_argument("--template", default="a photo of a {}.", help="prompt; {} is the label")
    _add_activation(sub)
    sub.add_argument("--device", help='"cpu", "cuda" or "cuda:N" (default a GPU if there is one)')
    sub.add_argument("--json", action="store_true", help="print {label: probability}")

    sub = command(_convert, "convert", "Any CLIP checkpoint to one safetensors file.")
    sub.add_argument("source", metavar="SOURCE", help=model_help)
    sub.add_argument("target", metavar="TARGET", help="safetensors file to write")
    choices = ("float32", "float16", "bfloat16")
    sub.add_argument("--dtype", choices=choices, help="cast the large weights (default: as stored)")
    _add_activation(sub)

    sub = command(_info, "info", "A model's configuration, tensors and fingerprint.")
    sub.add_argument("model", metavar="MODEL", help=model_help)
    _add_activation(sub)
    sub.add_argument("--tensors", action="store_true", help="list every tensor")
    sub.add_argument("--json", action="store_true")

    command(_models, "models", "The models that can be loaded by name.")
    return parser


def _add_activation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        help="for a checkpoint that does not record it",
    )


def _classify(args: argparse.Namespace) -> str:
    from .clip import load

    for label, count in Counter(args.labels).items():
        if count > 1:
            args.usage_error(f"the label {label!r} is given twice")
    model = load(args.model, args.device, activation=args.activation)
    probabilities = model.classify(args.image, args.labels, args.template)
    pairs = sorted(zip(args.labels, probabilities.tolist(), strict=True), key=lambda p: -p[1])
    if args.json:
        return json.dumps(dict(pairs))
    width = max(map(len, args.labels))
    rows = (f"{label:<{width}}  {p:7.2%}  {'#' * round(40 * p)}" for label, p in pairs)
    return "\n".join(row.rstrip() for row in rows)


def _convert(args: argparse.Namespace) -> str:
    from . import hub
    from .convert import convert

    named = args.source in hub.MODELS
    activation = args.activation or ("quick_gelu" if named else None)
    metadata = convert(hub.resolve(args.source), args.target, args.dtype, activation)
    return f"{args.target}: {metadata.activation}, from SHA-256 {metadata.source_sha256}"


def _info(args: argparse.Namespace) -> str:
    from .info import describe, lines

    report = describe(args.model, args.activation, tensors=args.tensors)
    return json.dumps(report, indent=2) if args.json else "\n".join(lines(report))


def _models(args: argparse.Namespace) -> str:
    from . import hub
    from .config import ARCHITECTURES, tensor_shapes

    rows = [f"{'name':<16}{'parameters':>12}{'pixels':>8}{'embedding':>11}{'download':>11}"]
    for name, file in hub.MODELS.items():
        config = ARCHITECTURES[name]
        count = sum(_size(s) for k, s in tensor_shapes(config).items() if ".running_" not in k)
        rows.append(
            f"{name:<16}{count / 1e6:>10.1f} M{config.image_resolution:>8}"
            f"{config.embed_dim:>11}{file.size_mib:>7} MiB"
        )
    return "\n".join(rows)


def _size(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)


if __name__ == "__main__":
    sys.exit(main())
