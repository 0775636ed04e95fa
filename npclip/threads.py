"""How many threads the C kernels use. A leaf."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path
from typing import TypeVar

from .errors import InputError

T = TypeVar("T")
U = TypeVar("U")
MOST_LOADERS = 8  # threads that convert weights: each holds one in memory

_chosen: int | None = None
_listeners: list[Callable[[int], None]] = []


def get_num_threads() -> int:
    """The number of threads: set_num_threads(), else NPCLIP_NUM_THREADS, else available_cpus()."""
    return _chosen or _from_environment() or available_cpus()


def set_num_threads(n: int) -> None:
    """Use n threads from now on. Results do not depend on it. Raises InputError unless n >= 1."""
    global _chosen
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"the number of threads must be a positive int, not {n!r}")
    _chosen = n
    for listener in _listeners:
        listener(n)


def on_change(listener: Callable[[int], None]) -> None:
    """Call listener with every number that set_num_threads is given."""
    _listeners.append(listener)


def map_weights(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """[function(item) for item in items], in some threads."""
    from concurrent.futures import ThreadPoolExecutor  # not at import: it takes its time

    with ThreadPoolExecutor(min(MOST_LOADERS, get_num_threads())) as pool:
        return list(pool.map(function, items))


def available_cpus() -> int:
    """CPUs that this process may use: its affinity mask, capped by its cgroup's CPU quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cpus = os.cpu_count() or 1
    return max(1, min([cpus, *map(ceil, cgroup_quotas())]))


def cgroup_quotas(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[float]:
    """CPU quotas, in CPUs, of this process's cgroup and of those that it lies in (v2 and v1)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            quotas += _quota(level)
            if level == base:
                break
    return quotas


def _quota(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):  # "max", or not there
        return []


def _from_environment() -> int | None:
    text = os.environ.get("NPCLIP_NUM_THREADS", "")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"NPCLIP_NUM_THREADS must be a positive number, not {text!r}")
    return int(text)
