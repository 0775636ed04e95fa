"""The folder of a run: its checkpoints, its log, its settings. A kill at any moment leaves it such
that the run goes on from its last checkpoint.

config.toml                 the settings, all of them
step-1000/                  checkpoints, of training.state.save
latest, best                links to two of them; files with their names where there are no links
log.jsonl                   a line a step, and a line an evaluation
failed.jsonl                pairs that were left out, and why, each once
pairs/                      indexes of the pairs, of training.index
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import Config, Metadata
from ..errors import InputError, TrainingError
from ..whole_file import SUFFIX, replacing
from .checked import to_toml
from .index import json_line
from .settings import Settings, differences, read_settings
from .state import State, save

CONFIG, LOG, FAILED, LATEST, BEST, PAIRS, LOCK = (
    *("config.toml", "log.jsonl", "failed.jsonl"),
    *("latest", "best", "pairs", ".lock"),
)
LEFT_BY_NO_RUN = {PAIRS, LOCK}  # of one that failed before it began
UNFINISHED = ".*.tmp", f".*{SUFFIX}"
CHECKPOINT = re.compile(r"step-(\d+)")


class RunFolder:
    """One run's, which has no other writer while it is open: a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """The folder need not exist."""
        self.path = Path(path)
        self._lock: Any = None

    def __enter__(self) -> RunFolder:
        """Raises TrainingError where another process writes there, OSError where none can."""
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(f"{self.path} is being written by another process") from None
        return self

    def __exit__(self, *error: object) -> None:
        """Let others write."""
        self._lock.release()

    def check(self, settings: Settings, resume: bool) -> bool:
        """Whether there is a run already, which goes on with these settings.

        Raises InputError where it may not: it is another one's, resume is False, or the folder has
        something else.
        """
        if not (self.path / CONFIG).exists():
            unfinished = {entry.name for entry in self.path.glob(f".{CONFIG}.*{SUFFIX}")}
            others = {entry.name for entry in self.path.iterdir()} - LEFT_BY_NO_RUN - unfinished
            if others:
                raise InputError(f"{self.path} is not empty, and has no run: {min(others)}")
            shutil.rmtree(self.path / PAIRS, ignore_errors=True)
            self._remove_unfinished()
            return False
        if not resume:
            raise InputError(f"{self.path} has a run already: --resume goes on with it")
        if different := differences(read_settings(self.path / CONFIG), settings):
            raise InputError(f"{self.path} has a run with other settings: {'; '.join(different)}")
        self._remove_unfinished()
        return True

    def _remove_unfinished(self) -> None:
        """What was being written or removed when a run was killed."""
        for folder in (self.path, self.path / PAIRS):
            for entry in (e for pattern in UNFINISHED for e in folder.glob(pattern)):
                _remove(entry)

    def begin(self, settings: Settings) -> None:
        """Store the settings: from now on there is a run."""
        with replacing(self.path / CONFIG, sync=True) as stream:
            stream.write(to_toml(settings).encode())

    def steps(self) -> list[int]:
        """Of the checkpoints, rising."""
        found = (CHECKPOINT.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def checkpoint(self, step: int) -> Path:
        """The folder of one."""
        return self.path / f"step-{step}"

    def last_good(self, until: int | None = None) -> str:
        """Words about the last checkpoint, of those up to a step, for who has to stop."""
        saved = self.steps()
        if good := [step for step in saved if until is None or step <= until]:
            return f"the last good checkpoint is {self.checkpoint(good[-1])}"
        return f"there is no {'good checkpoint' if saved else 'checkpoint yet'} in {self.path}"

    def save(self, state: State, config: Config, metadata: Metadata) -> None:
        """A checkpoint, unless the step has one."""
        if not self.checkpoint(state.step).exists():
            save(state, self.checkpoint(state.step), config, metadata)

    def keep(self, count: int, best: int | None) -> None:
        """Point to the latest checkpoint and to that of the best step, and remove all but that and
        so many of the last."""
        steps = self.steps()
        self._point(LATEST, steps[-1])
        kept = set(steps[-count:])
        if best is not None:
            kept.add(best)
            self._point(BEST, best)
        for step in set(steps) - kept:
            # By its name a folder is complete: what is removed has another one first.
            removed = self.path / f".step-{step}.{secrets.token_hex(4)}.tmp"
            self.checkpoint(step).rename(removed)
            _remove(removed)

    def _point(self, name: str, step: int) -> None:
        target = self.checkpoint(step).name
        link = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            link.symlink_to(target, target_is_directory=True)
        except (OSError, NotImplementedError):
            link.write_text(target + "\n", "utf-8")
        os.replace(link, self.path / name)


def _remove(path: Path) -> None:
    """As far as it goes."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class Log:
    """Rows of JSON, a line each."""

    def __init__(self, path: Path, step: int) -> None:
        """Goes on with it after a step; rows after that, of a run that was killed, are removed."""
        self.evaluations: list[dict[str, Any]] = []
        with replacing(path) as stream:
            for row in read_rows(path) if step else ():
                if row["step"] <= step:
                    stream.write(json_line(row))
                    self.evaluations += [row] if "evaluation" in row else []
        self._stream = open(path, "ab")  # noqa: SIM115 - until close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one."""
        self._stream.write(json_line(row))
        self._stream.flush()
        if "evaluation" in row:
            self.evaluations.append(row)

    def close(self) -> None:
        """No more rows."""
        self._stream.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Of a log, up to one that is cut off; none where there is no log."""
    with suppress(FileNotFoundError), open(path, "rb") as stream:
        for line in stream:
            try:
                yield json.loads(line)
            except ValueError:
                return


def cut_partial_line(path: Path) -> None:
    """Off the end of a file, where a kill or a full disk left it; more lines may follow then."""
    with suppress(FileNotFoundError), open(path, "rb+") as stream:
        stream.truncate(sum(len(line) for line in stream if line.endswith(b"\n")))
