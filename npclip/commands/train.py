"""npclip train."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import deque
from typing import Any

from ..training.run import Listener, Result
from ..training.run import run as train
from ..training.settings import read_settings

ABOUT = "Train a model on images and their texts, or fine-tune one."
LINES_EVERY = 10.0  # seconds, where there is no terminal
RATE_OVER = 50  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    about = "what to train on what: see docs/training.md and examples/train_shapes.toml"
    parser.add_argument("config", metavar="CONFIG.toml", help=about)
    about = "go on from the last checkpoint in output.folder, if there is one"
    parser.add_argument("--resume", action="store_true", help=about)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="changes",
        help="instead of what the file says, such as train.steps=100; may be repeated",
    )


def run(args: argparse.Namespace) -> str:
    """Where the result is, and how good; progress goes to stderr."""
    for change in args.changes:
        key, equals, _ = change.partition("=")
        if not equals or "." not in key:
            args.usage_error(f"--set takes table.key=value, not {change!r}")
    settings = read_settings(args.config, args.changes)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that can be read none the less
    progress = Progress(sys.stderr.isatty())
    try:
        result = train(settings, args.resume, progress)
    finally:
        progress.close()
    return _line(result)


def _line(result: Result) -> str:
    text = f"{result.checkpoint}: {result.step} steps"
    if result.failed:
        text += f", {result.failed} unreadable pairs left out"
    return f"{text}, {_evaluated(result.evaluation)}" if result.evaluation else text


def _evaluated(found: dict[str, float]) -> str:
    """The figures that fit in a line."""
    parts = [f"held-out loss {found['loss']:.3f}"] if "loss" in found else []
    for name in ("image_to_text@1", "text_to_image@1", "zero_shot@1"):
        if name in found:
            parts.append(f"{name.replace('_', ' ').replace('@', ', top ')} {found[name]:.1%}")
    return "; ".join(parts)


class Progress(Listener):
    """A bar on a terminal, else a line now and then."""

    def __init__(self, is_terminal: bool) -> None:
        """Nothing is shown yet."""
        self._is_terminal = is_terminal
        self._bar: Any = None
        self._next = time.monotonic() + LINES_EVERY
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_OVER)  # when, pairs
        self._steps = 0

    def on_note(self, text: str) -> None:
        """A line."""
        self._say(f"npclip: {text}")

    def on_index(self, name: str, pairs: int) -> None:
        """A line now and then."""
        if self._is_due():
            self._say(f"{name}: {pairs} pairs found")

    def on_start(self, step: int, steps: int, batch: int) -> None:
        """Begin to show."""
        self._steps = steps
        if self._is_terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit=" steps", smoothing=0.05)
        elif step:
            self._say(f"on from step {step} of {steps}")

    def on_step(self, row: dict[str, Any]) -> None:
        """Loss, pairs a second, and how long it takes yet."""
        self._recent.append((time.monotonic(), row["pairs"]))
        if self._bar is not None:
            self._bar.update()
            rate = f"{self._rate():.0f}/s"
            self._bar.set_postfix(loss=f"{row['loss']:.3f}", pairs=rate, refresh=False)
        elif self._is_due():
            left = self._left(row["step"])
            about = f"loss {row['loss']:.3f}, {self._rate():.0f} pairs a second"
            self._say(f"step {row['step']} of {self._steps}: {about}{left}")

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """A line."""
        self._say(f"step {row['step']}: {_evaluated(row['evaluation'])}")

    def close(self) -> None:
        """The bar is done."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _is_due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + LINES_EVERY
        return True

    def _rate(self) -> float:
        """Pairs a second, of the last steps."""
        seconds = self._recent[-1][0] - self._recent[0][0]
        pairs = sum(pairs for _, pairs in list(self._recent)[1:])
        return pairs / seconds if seconds else 0.0

    def _left(self, step: int) -> str:
        seconds = self._recent[-1][0] - self._recent[0][0]
        if len(self._recent) < 2:
            return ""
        minutes, left = divmod(round(seconds / (len(self._recent) - 1) * (self._steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f", {hours}:{minutes:02}:{left:02} left"
