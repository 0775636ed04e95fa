"""npclip classify."""

from __future__ import annotations

import argparse
import json
from collections import Counter

from ..clip import load
from . import add_model

ABOUT = "Probabilities of labels for an image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("labels", metavar="LABEL", nargs="+", help="what may be in it")
    add_model(parser)
    parser.add_argument("--template", default="a photo of a {}.", help="prompt; {} is the label")
    parser.add_argument("--json", action="store_true", help="print {label: probability}")


def run(args: argparse.Namespace) -> str:
    """A line for each label, the most probable first."""
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
