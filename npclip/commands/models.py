"""npclip models."""

from __future__ import annotations

import argparse
from math import prod

from .. import hub
from ..config import ARCHITECTURES, tensor_shapes

ABOUT = "The models that can be loaded by name."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> str:
    """A table."""
    rows = [f"{'name':<16}{'parameters':>12}{'pixels':>8}{'embedding':>11}{'download':>11}"]
    for name, file in hub.MODELS.items():
        config = ARCHITECTURES[name]
        count = sum(prod(s) for k, s in tensor_shapes(config).items() if ".running_" not in k)
        rows.append(
            f"{name:<16}{count / 1e6:>10.1f} M{config.image_resolution:>8}"
            f"{config.embed_dim:>11}{file.size_mib:>7} MiB"
        )
    return "\n".join(rows)
