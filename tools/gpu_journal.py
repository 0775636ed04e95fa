"""What the stages of gpu_check.py write, files that are whole at any time, and their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file under another name first, so that nobody ever sees half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(text.encode() if isinstance(text, str) else text)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """With NumPy's numbers as numbers."""
    write_whole(path, json.dumps(value, indent=1, default=lambda x: x.item()) + "\n")


class Journal:
    """What one stage has found so far, and how much of its time is left."""

    def __init__(self, path: Path, seconds: float) -> None:
        """Write to path at every step; seconds from now on are the stage's."""
        self.path, self.end = path, time.monotonic() + seconds
        self.status, self.reason = "running", ""
        self.facts: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.write()

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def fact(self, **facts: Any) -> None:
        """Note something of the stage as a whole."""
        self.facts.update(facts)
        self.write()

    def row(self, **row: Any) -> None:
        """Add a line of the stage's table."""
        self.rows.append(row)
        self.write()

    def close(self, status: str, reason: str = "") -> None:
        """Say how it ended."""
        self.status, self.reason = status, reason
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        result = {"status": self.status, "reason": self.reason}
        write_json(self.path, {**result, "facts": self.facts, "rows": self.rows})


def run_process(command: list[str], seconds: float, log: Path) -> int | None:
    """The exit status; None if it took too long. All that the process started ends with it."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
