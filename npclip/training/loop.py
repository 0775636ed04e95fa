"""The loop of a run: steps, and what is due after them."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config, Metadata
from ..errors import TrainingError
from .curves import write_curves
from .data import Batch, Loader
from .index import Record, json_line
from .optim import AdamW
from .parameters import Freeze
from .run_folder import FAILED, LOG, Log, RunFolder, cut_partial_line, read_rows
from .settings import Settings
from .state import State
from .step import train_step
from .validation import Validation, as_model

SMOOTHING = 0.98  # of the loss that is watched: a mean over about 50 steps
WATCHED_AFTER = 50  # steps


class Listener:
    """What happens in a run. Its methods do nothing: override what is of interest."""

    def on_note(self, text: str) -> None:
        """Something that a person should know."""

    def on_index(self, name: str, pairs: int) -> None:
        """So many pairs of a source were found so far."""

    def on_start(self, step: int, steps: int, batch: int) -> None:
        """Training begins, or goes on, after a step."""

    def on_step(self, row: dict[str, Any]) -> None:
        """A step was made; row: as in the log."""

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """row: as in the log."""


@dataclass(frozen=True)
class Result:
    """Where a run ended."""

    step: int
    checkpoint: Path
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one
    failed: int = 0  # pairs that were left out because they could not be read


@dataclass
class Model:
    """What is trained, and where."""

    state: State
    config: Config
    metadata: Metadata
    device: str


@dataclass
class Training:
    """The loop, and what it needs."""

    settings: Settings
    folder: RunFolder
    model: Model
    loader: Loader
    optimizer: AdamW
    freeze: Freeze
    validation: Validation | None
    listener: Listener
    curves: str | None

    def run(self, steps: int) -> Result:
        """All steps that are not made yet. Raises what run.run() does."""
        state = self.model.state
        log = Log(self.folder.path / LOG, state.step)
        cut_partial_line(self.folder.path / FAILED)
        self.failed = {row["id"] for row in read_rows(self.folder.path / FAILED)}
        self.listener.on_start(state.step, steps, self.loader.batch)
        watch = Watch(self.loader.batch)
        batches = self.loader.batches(state.step)
        with closing(log), closing(batches), _interrupts() as interrupted:
            self._catch_up(log, steps)
            while state.step < steps:
                row = self._step(batches)
                log.write(row)
                self.listener.on_step(row)
                if watch(row["loss"]):
                    text = f"step {state.step}: the loss is back at chance"
                    raise self._error(text, state.step - watch.since_lowest)
                self._after(log, steps, interrupted)
                if interrupted:
                    saved = self.folder.checkpoint(state.step)
                    self.listener.on_note(f"{saved} is saved, and --resume goes on from it")
                    raise KeyboardInterrupt
            evaluation = log.evaluations[-1]["evaluation"] if log.evaluations else {}
        checkpoint = self.folder.checkpoint(state.step)
        return Result(state.step, checkpoint, evaluation, len(self.failed))

    def _step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One step; its row of the log."""
        began, (model, train) = time.monotonic(), (self.model, self.settings.train)
        try:
            batch = next(batches)
            self._note_failed(batch.failed)
            step = train_step(
                model.state,
                batch.images,
                batch.ids,
                model.config,
                self.optimizer,
                micro_batch=train.micro_batch,
                freeze=self.freeze,
                dtype=train.dtype,
                patch_dropout=train.patch_dropout,
            )
        except TrainingError as error:
            raise self._error(f"step {model.state.step + 1}: {error}") from error
        seconds = round(time.monotonic() - began, 4)
        about = {"pairs": len(batch.ids), "seconds": seconds}
        return {"step": model.state.step, **dataclasses.asdict(step), **about}

    def _catch_up(self, log: Log, steps: int) -> None:
        """What is due at the start, or was after the last checkpoint when the run was stopped."""
        step = self.model.state.step
        is_evaluated = any(row["step"] == step for row in log.evaluations)
        if self._is_evaluation_due(steps) and not is_evaluated:
            self._evaluate(log)
        if step:
            self._tidy(log)

    def _after(self, log: Log, steps: int, interrupted: list[int]) -> None:
        """What is due after a step: an evaluation, a checkpoint, a picture."""
        step, is_best = self.model.state.step, False
        if self._is_evaluation_due(steps) and not interrupted:
            self._evaluate(log)
            is_best = self._best(log, step) == step
        is_due = step == steps or step % self.settings.output.save_every == 0
        if not (is_due or is_best or interrupted):
            return
        try:
            self.folder.save(self.model.state, self.model.config, self.model.metadata)
        except TrainingError as error:
            raise self._error(str(error)) from error
        self._tidy(log)

    def _is_evaluation_due(self, steps: int) -> bool:
        step = self.model.state.step
        return step in (0, steps) or step % self.settings.output.evaluate_every == 0

    def _tidy(self, log: Log) -> None:
        """As many checkpoints as are wanted, the links to them, and the picture."""
        self.folder.keep(self.settings.output.keep, self._best(log))
        if self.curves:
            write_curves(self.folder.path / LOG, self.folder.path / self.curves)

    def _evaluate(self, log: Log) -> None:
        if self.validation is None:
            return
        model = self.model
        began = time.monotonic()
        found = self.validation(as_model(model.state, model.config, model.metadata, model.device))
        seconds = round(time.monotonic() - began, 4)
        row = {"step": model.state.step, "evaluation": found, "seconds": seconds}
        log.write(row)
        self.listener.on_evaluation(row)

    def _best(self, log: Log, about_to_save: int | None = None) -> int | None:
        """The best step that is saved, or is about to be; of equals the first."""
        saved = {*self.folder.steps(), about_to_save}
        found = [row for row in log.evaluations if row["step"] in saved]
        best = max(found, key=lambda row: merit(row["evaluation"]), default=None)
        return None if best is None else best["step"]

    def _note_failed(self, failed: list[tuple[Record, str]]) -> None:
        """Each once."""
        new = [(record, reason) for record, reason in failed if record.id not in self.failed]
        if not new:
            return
        if not self.failed:
            path = self.folder.path / FAILED
            self.listener.on_note(f"{new[0][0].id} is left out: {new[0][1]}; all are in {path}")
        self.failed.update(record.id for record, _ in new)
        with open(self.folder.path / FAILED, "ab") as stream:
            for record, reason in new:
                stream.write(json_line({"id": record.id, "reason": reason}))

    def _error(self, text: str, until: int | None = None) -> TrainingError:
        return TrainingError(f"{text}; {self.folder.last_good(until)}")


def merit(evaluation: dict[str, float]) -> float:
    """How good: the mean of the accuracies at 1 that there are."""
    found = [value for name, value in evaluation.items() if name.endswith("@1")]
    return math.fsum(found) / len(found) if found else -math.inf


class Watch:
    """Whether training has diverged without a NaN: the loss, smoothed, is twice what it was at its
    lowest, and close to chance, which is the logarithm of the batch."""

    def __init__(self, batch: int) -> None:
        """Nothing seen yet."""
        self.chance = math.log(batch)
        self.smooth, self.lowest, self.seen = 0.0, math.inf, 0
        self.since_lowest = 0  # steps

    def __call__(self, loss: float) -> bool:
        """The next step's loss."""
        self.seen += 1
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        if self.seen < WATCHED_AFTER:
            return False
        mean = self.smooth / (1 - SMOOTHING**self.seen)
        self.since_lowest = 0 if mean <= self.lowest else self.since_lowest + 1
        self.lowest = min(self.lowest, mean)
        return mean > 2 * self.lowest and mean > 0.95 * self.chance


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Signals that ask for an end; the second raises at once. Only the main thread has any.

    One that is ignored stays so, as SIGINT is for what a script runs with &, whose terminal's
    Ctrl-C is for others.
    """
    found: list[int] = []

    def note(number: int, frame: object) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    try:
        for number in before:
            signal.signal(number, note)
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
