"""A picture of an evaluation's confusion matrix, by matplotlib."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import numpy as np

from ..errors import BackendError, InputError
from .zero_shot import Evaluation

DOTS_PER_INCH = 150
CELL = 0.32  # inches, where the picture then is no larger than
LARGEST = 22.0  # of the matrix; 1000 classes have 3.3 dots each
SMALLEST = 2.4
BAR = 5.0  # inches, the longest scale of colours
LABEL_POINTS = 6.5, 9.0  # the smallest type that labels are set in, and the largest
LABEL_LENGTH = 28
NUMBERS_UP_TO = 20  # classes: their shares are written into the cells


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raises what write_picture() would, before the work: BackendError without matplotlib,
    InputError for a format that it does not write or a folder that does not exist."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise BackendError(
            f"a picture needs matplotlib: pip install 'npclip[eval]' ({error})"
        ) from error
    folder, name = os.path.split(os.path.abspath(path))
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if os.path.splitext(name)[1][1:].lower() not in formats:
        raise InputError(f"a picture's name must end in one of {', '.join(formats)}, not {name}")
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder} to write {name} to")


def write_picture(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Rows: the classes; columns: what they were taken for; colours: shares of the row.

    path: its suffix is the format, any of matplotlib's. Where classes are too many for every label
    to be legible, every second, third, ... has one. Raises as check_picture() does, and OSError.
    """
    check_picture(path)
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(evaluation.labels)
    images = evaluation.confusion.sum(1, keepdims=True)
    shares = np.ma.masked_invalid(evaluation.confusion / np.where(images, images, np.nan))
    side = min(max(CELL * count, SMALLEST), LARGEST)
    figure = Figure(figsize=(side, side), dpi=DOTS_PER_INCH)
    axes = figure.add_axes((0, 0, 1, 1))
    colours = colormaps["Blues"].with_extremes(bad="0.9")
    # A square root, or what is rarely mistaken would be as white as what never is.
    drawn = axes.imshow(shares, colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    _label(axes, evaluation.labels, 72 * side / count)
    if count <= NUMBERS_UP_TO:
        for (row, column), share in np.ndenumerate(shares.filled(0)):
            if share:
                colour = "white" if share > 0.4 else "black"
                text = f"{share:.0%}"[:-1]
                axes.text(column, row, text, color=colour, size=7, ha="center", va="center")
    axes.set_ylabel("class")
    axes.set_xlabel("taken for")
    height = min(1, BAR / side)
    beside = figure.add_axes((1 + 0.15 / side, 1 - height, 0.15 / side, height))
    bar = figure.colorbar(drawn, beside, ticks=[0, 0.05, 0.2, 0.5, 1], format="{x:.0%}")
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # no font has every script's
        figure.savefig(path, bbox_inches="tight", pad_inches=0.1)


def _label(axes: Any, labels: list[str], points: float) -> None:
    """The names beside rows and below columns that are so many points high."""
    smallest, largest = LABEL_POINTS
    every = math.ceil(smallest / points)
    shown = range(0, len(labels), every)
    size = min(largest, max(smallest, 0.8 * points * every))
    names = [_short(labels[i]) for i in shown]
    axes.set_yticks(shown, names, size=size)
    axes.set_xticks(shown, names, size=size, rotation=90)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    axes.tick_params(length=0 if every == 1 else 2)
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)


def _short(label: str) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in label)
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"
