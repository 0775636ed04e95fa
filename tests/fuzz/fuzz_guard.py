"""Runs one input of a target under limits, and says what came of it.

A finding is any of: an exception that the function does not document, more than CPU_SECONDS, more
memory than MORE_MEMORY, a write outside the folder that is allowed, another program started, a
connection opened, a pickle's global looked up.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CPU_SECONDS = 10.0  # of one input; almost all take milliseconds
WALL_SECONDS = 120.0  # one that waits for something; the machine may be busy
MORE_MEMORY = 512 << 20  # bytes that one input may add
FORBIDDEN = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class"),
}
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Finding(Exception):
    """What must not happen."""


class Limit(BaseException):
    """Raised in the midst of an input that takes too long; no `except Exception` stops it."""


class _Watch:
    """The audit hook, which cannot be taken off again: allowed is None while it sleeps."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args[:2]!r:.200}")
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            self._check(event, args[0])
        elif event in CHANGES:
            folder = args[-1]  # most of them have the descriptor of one, or -1
            self._check(event, args[0], folder if isinstance(folder, int) and folder > 2 else -1)

    def _check(self, event: str, path: Any, folder: int = -1) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            start = ""
            if folder >= 0:
                start = os.path.realpath(f"/proc/self/fd/{folder}")
            where = os.path.abspath(os.path.join(start, os.fsdecode(path)))
            if where != os.devnull and not (where + os.sep).startswith(f"{self.allowed}{os.sep}"):
                self.seen.append(f"{event} {where}")


_watch: _Watch | None = None


def run(target: Callable[[bytes], None], documented: Any, data: bytes, folder: Path) -> str:
    """ "accepted", or the name of the documented exception. Raises Finding.

    target works inside folder, which alone it may change.
    """
    before = _peak(reset=True)
    try:
        with _watched(folder), _timed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target(data)
        outcome = "accepted"
    except documented as error:
        outcome = type(error).__name__
    except Limit as error:
        raise Finding(f"takes too long: {error}") from error
    except (KeyboardInterrupt, Finding):
        raise
    except BaseException as error:
        raise Finding(f"undocumented {type(error).__name__}: {error!s:.300}") from error
    if _watch is not None and _watch.seen:
        raise Finding(f"forbidden: {_watch.seen[0]}")
    more = _peak() - before
    if more > MORE_MEMORY:
        raise Finding(f"takes {more >> 20} MiB more memory")
    return outcome


def _peak(reset: bool = False) -> int:
    """The largest size of the process in bytes, since the last reset where Linux allows that."""
    if reset:
        with suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    global _watch
    if _watch is None:
        _watch = _Watch()
    _watch.seen.clear()
    _watch.allowed = os.path.abspath(folder)
    try:
        yield
    finally:
        _watch.allowed = None


@contextmanager
def _timed() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Limit(signal.Signals(number).name)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
