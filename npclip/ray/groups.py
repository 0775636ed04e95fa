"""Groups of items through Ray's actors: in order, bounded, and done again where one was lost."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..bulk import Embedded
from ..errors import BackendError, NpclipError
from ..sources import Item

TRIES = 3  # of a group: one that ends every worker must not end them all
QUEUED = 2  # groups that a worker has, so that it need not wait for the next
AHEAD = 8  # groups a worker that may be done before the first in order is
HAS = "CPU", "GPU"
SECONDS = 60.0  # without any worker, then the user is told


@dataclass(eq=False)
class _Group:
    items: list[Item]
    tries: int = 0
    result: Embedded | None = None


class Run:
    """Groups through workers; those that are lost are replaced."""

    def __init__(self, groups: Iterator[list[Item]], start: Callable[[], Any], count: int) -> None:
        """start: gives a worker's handle at once, though it may have to wait for a machine."""
        self._groups, self._start, self._count = groups, start, count
        self._ended = False
        self._workers: set[Any] = set()
        self._busy: dict[Any, tuple[Any, _Group | None]] = {}  # by ObjectRef; None: it loads
        self._free: deque[Any] = deque()  # each worker as often as it may have another group
        self._again: deque[_Group] = deque()
        self._in_order: deque[_Group] = deque()  # all that are not yielded yet
        self._lost_in_a_row = 0
        for _ in range(count):
            self._add_worker()

    def results(self) -> Iterator[Embedded]:
        """Of every group, in order."""
        while self._in_order or not self._ended:
            while self._free and (group := self._next()):
                worker = self._free.popleft()
                self._busy[worker.embed.remote(group.items)] = worker, group
            if self._in_order and (result := self._in_order[0].result) is not None:
                self._in_order.popleft()
                yield result
            elif self._busy:
                self._wait()

    def _next(self) -> _Group | None:
        """To be done now, if any."""
        if self._again:
            return self._again.popleft()
        if self._ended or len(self._in_order) >= AHEAD * self._count:
            return None
        items = next(self._groups, None)
        if items is None:
            self._ended = True
            return None
        self._in_order.append(_Group(items))
        return self._in_order[-1]

    def _add_worker(self) -> None:
        worker = self._start()
        self._workers.add(worker)
        self._busy[worker.load.remote()] = worker, None

    def _wait(self) -> None:
        """For anything to happen."""
        ray = import_ray()
        done, _ = ray.wait(list(self._busy), num_returns=1, timeout=SECONDS)
        if not done and all(group is None for _, group in self._busy.values()):
            has = ", ".join(f"{v:g} {k}" for k, v in ray.cluster_resources().items() if k in HAS)
            warnings.warn(f"Ray has not started a worker yet; it has {has}", stacklevel=2)
        for ref in done:
            worker, group = self._busy.pop(ref)
            try:
                result = ray.get(ref)
            except ray.exceptions.RayTaskError as error:  # raised by our code there
                raise error.cause if isinstance(error.cause, NpclipError) else error from None
            except ray.exceptions.RayError as error:
                self._lost(worker, group, error)
                continue
            if worker in self._workers:  # and has not died since
                self._free.extend([worker] * (QUEUED if group is None else 1))
            if group is not None:
                group.result, self._lost_in_a_row = result, 0

    def _lost(self, worker: Any, group: _Group | None, error: Exception) -> None:
        """Give its group to another, and replace it. Raises BackendError where that is hopeless."""
        self._lost_in_a_row += 1
        if group is not None:
            group.tries += 1
            self._again.append(group)
            if group.tries == TRIES:
                first, last = group.items[0].path, group.items[-1].path
                raise BackendError(f"{TRIES} workers died that had {first!r} to {last!r}: {error}")
        if self._lost_in_a_row > TRIES * QUEUED * self._count:
            raise BackendError(f"workers die again and again: {error}")
        if worker in self._workers:
            self._workers.remove(worker)
            import_ray().kill(worker)  # it may only be out of reach
            self._free = deque(other for other in self._free if other is not worker)
            self._add_worker()

    def end(self) -> None:
        """No worker is left."""
        for worker in self._workers:
            import_ray().kill(worker)


def import_ray() -> Any:
    """The package. Raises BackendError where it is missing."""
    try:
        import ray
    except ImportError as error:
        raise BackendError('Ray is missing: pip install "npclip[ray]"') from error
    return ray
