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


def is_good(row: dict[str, Any]) -> bool:
    """Whether a row needs no second try."""
    return row.get("ok") is not False and "error" not in row


def good_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that need no second try, and none of a case of which another row does."""
    bad = {(r["case"], r["dtype"]) for r in rows if "case" in r and not is_good(r)}
    return [r for r in rows if is_good(r) and (r.get("case"), r.get("dtype")) not in bad]


class Journal:
    """What one stage has found so far, and how much of its time is left.

    facts["left_out"] lists what there was no time for: such a stage ends as "incomplete".
    """

    def __init__(self, path: Path, seconds: float, earlier: dict[str, Any] | None = None) -> None:
        """Write to path at every step; seconds from now on are the stage's.

        earlier: what the same stage found in another run. Its good rows are kept.
        """
        self.path, self.end = path, time.monotonic() + seconds
        self.status, self.reason = "running", ""
        self.earlier_facts: dict[str, Any] = earlier["facts"] if earlier else {}
        self.facts: dict[str, Any] = {}
        self.rows = good_rows(earlier["rows"]) if earlier else []
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

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def leave_out(self, *what: str) -> None:
        """Note what there was no time for."""
        self.fact(left_out=[*self.facts.get("left_out", []), *what])

    def close(self, status: str, reason: str = "") -> None:
        """Say how it ended."""
        if status == "done" and self.facts.get("left_out"):
            status = "incomplete"
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
