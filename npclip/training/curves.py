"""The curves of a run as a picture: loss, and how much of the held-out set is found."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendError, InputError
from ..whole_file import replacing
from .run_folder import read_rows

POINTS = 1000  # of a curve: means of as many steps as make no more
SIZE = 11.0, 4.0  # inches
SHARES = {  # and how they are drawn
    "image_to_text@1": {"color": "C0"},
    "text_to_image@1": {"color": "C1"},
    "image_to_text@5": {"color": "C0", "linestyle": "--"},
    "text_to_image@5": {"color": "C1", "linestyle": "--"},
    "zero_shot@1": {"color": "C2"},
}


def check_curves(name: str | None) -> str | None:
    """The picture's file name; None is curves.svg, or no picture where matplotlib is missing.

    Raises BackendError without matplotlib, InputError for a format that it does not write.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        if name is None:
            return None
        raise BackendError(
            f'output.curves needs matplotlib: pip install "npclip[train]" ({error})'
        ) from error
    name = name or "curves.svg"
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if os.path.splitext(name)[1][1:].lower() not in formats:
        raise InputError(f"output.curves must end in one of {', '.join(formats)}, not {name!r}")
    return name


def write_curves(log: Path, picture: Path) -> None:
    """Of a run's log, in bounded memory; the picture's suffix is its format. Raises OSError."""
    from matplotlib.figure import Figure

    losses, evaluations = _thinned(read_rows(log))
    figure = Figure(figsize=SIZE, dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, means = np.array(losses).reshape(-1, 2).T
    left.plot(steps, means, color="0.6", linewidth=1, label="training")
    for key, style in {"loss": {"color": "C0"}, **SHARES}.items():
        found = [row for row in evaluations if key in row["evaluation"]]
        if found:
            points = [(row["step"], row["evaluation"][key]) for row in found]
            label = "held out" if key == "loss" else key.replace("_", " ").replace("@", ", top ")
            axes = left if key == "loss" else right
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                clip_on=False,
                label=label,
                **style,
            )
    left.set_title("loss", size=10)
    right.set_title("found in the held-out set", size=10)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(color="0.9", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            place = {} if axes is left else {"loc": "upper left", "bbox_to_anchor": (1, 1)}
            axes.legend(frameon=False, fontsize=8, **place)
    with replacing(picture) as stream:
        figure.savefig(stream, format=picture.suffix[1:].lower())


def _thinned(
    rows: Iterable[dict[str, Any]],
) -> tuple[list[tuple[float, float]], list[dict[str, Any]]]:
    """At most 2 POINTS (step, loss), each a mean of as many steps, and the evaluations."""
    losses: list[tuple[float, float]] = []
    evaluations: list[dict[str, Any]] = []
    every, waiting = 1, list[tuple[float, float]]()
    for row in rows:
        if "evaluation" in row:
            evaluations.append(row)
            continue
        waiting.append((row["step"], row["loss"]))
        if len(waiting) == every:
            losses.append(_mean(waiting))
            waiting = []
        if len(losses) == 2 * POINTS:
            losses = [_mean(losses[i : i + 2]) for i in range(0, len(losses), 2)]
            every *= 2
    return losses, evaluations


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    steps, losses = zip(*points, strict=True)
    return sum(steps) / len(points), sum(losses) / len(points)
