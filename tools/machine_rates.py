"""What this machine can do, measured: multiply-adds and bytes a second (kernels/peak.c)."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np

from npclip import cpu_library, threads

MIN_SECONDS = 2e-3  # of one sample
LONG_SECONDS = 20e-3  # of one sample that is enough
SAMPLES = 3  # in a round: another process that runs meanwhile spoils some of them
LEAST_READ = 1 << 17  # bytes a thread, to measure a rate: less lies in L1


class Timer:
    """Repeats calls, each in turn, for as long as a measurement takes."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        """Run some calls, to bring in their pages and to see how long one takes undisturbed."""
        self.calls, self.repeats = cycle(calls), 1
        self.repeats = max(1, min(10000, math.ceil(MIN_SECONDS / self.seconds())))

    def seconds(self) -> float:
        """Of one call: the shortest of SAMPLES means. A long call is timed once."""
        if self.repeats > 1:
            next(self.calls)()  # fills the caches
        shortest = self._sample()
        for _ in range(SAMPLES - 1 if shortest * self.repeats < LONG_SECONDS else 0):
            shortest = min(shortest, self._sample())
        return shortest

    def _sample(self) -> float:
        calls = [next(self.calls) for _ in range(self.repeats)]
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / self.repeats


class Machine:
    """What this machine can do, measured anew in every round."""

    def __init__(self) -> None:
        """Find the sizes of its caches, and fill the memory that is read."""
        self.l2, self.last_cache = _cache_bytes(2, 1 << 20), _cache_bytes(3, 32 << 20)
        self.memory = 4 * self.last_cache
        self.data = np.zeros(self.memory // 4, np.float32)
        self.data += 1  # every page its own
        self.timers: dict[str, tuple[Timer, float]] = {}

    def peak(self, dtype: str, isa: str) -> float:
        """Flop a second of a dtype on an ISA, "" for the best; of float32, if it widens to that."""
        isas = (isa,) if isa else cpu_library.machine_isas()
        names = (("peak", d, i) for d in (dtype, "f32") for i in isas)
        name = next(name for name in names if cpu_library.kernel(*name))
        key = "_".join(name[1:])
        if key not in self.timers:
            function, flop = cpu_library.kernel(*name), ctypes.c_double()
            timer, _ = _long_timer(lambda n: partial(function, n, ctypes.addressof(flop)), flop)
            self.timers[key] = timer, flop.value
        return self._measure(key)

    def read(self, nbytes: int | None = None) -> float:
        """Bytes a second, of so many that are read again and again; None: from memory."""
        size = max(nbytes or self.memory, LEAST_READ * threads.get_num_threads())
        step = 1 << size.bit_length() - 3  # rounded up by a quarter at most
        size = min(-(-size // step) * step, self.memory)
        key = "memory" if size == self.memory else f"{size >> 10} KiB"
        if key not in self.timers:
            function = next(
                k
                for i in cpu_library.machine_isas()
                if (k := cpu_library.kernel("bandwidth", "f32", i))
            )
            out = ctypes.c_float()
            call = partial(function, self.data.ctypes.data, size // 4)
            timer, passes = _long_timer(lambda n: partial(call, n, ctypes.addressof(out)), out)
            self.timers[key] = timer, size * passes
        return self._measure(key)

    def _measure(self, key: str) -> float:
        timer, amount = self.timers[key]
        return amount / timer.seconds()

    def peaks(self, rounds: int) -> dict[str, float]:
        """All that was measured so far, anew and in turn: medians, 1e9 flop or bytes a second."""
        measured = [{key: self._measure(key) for key in self.timers} for _ in range(rounds)]
        return {key: float(np.median([m[key] for m in measured])) / 1e9 for key in self.timers}


def _cache_bytes(level: int, otherwise: int) -> int:
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_text()) == level:
                return int((index / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return otherwise


def _long_timer(call: Callable[[int], Any], out: Any) -> tuple[Timer, int]:
    """Of call(n), and n: so large that the start of the threads does not count."""
    for n in (1 << i for i in count()):
        once = call(n)
        once.out = out  # what it writes to lives as long
        timer = Timer([once])
        if timer.repeats == 1:
            return timer, n
    raise AssertionError
