"""npclip models."""

from __future__ import annotations

import argparse
from math import prod

from .. import hub
from ..clip import open_model
from ..config import ARCHITECTURES, Config, tensor_shapes

ABOUT = "The models that can be loaded by name."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> str:
    """A table."""
    rows = [f"{'name':<16}{'parameters':>12}{'pixels':>8}{'embedding':>11}{'download':>11}"]
    rows += [_row(n, ARCHITECTURES[n], f"{file.size_mib} MiB") for n, file in hub.MODELS.items()]
    rows += [_row(name, open_model(name)[1], "none") for name in hub.BUNDLED]
    return "\n".join(rows)


def _row(name: str, config: Config, download: str) -> str:
    count = sum(prod(s) for k, s in tensor_shapes(config).items() if ".running_" not in k)
    return (
        f"{name:<16}{count / 1e6:>10.1f} M{config.image_resolution:>8}"
        f"{config.embed_dim:>11}{download:>11}"
    )
