"""What a GPU and its software are, what it can do, and how the time of work on it is taken."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_journal import Journal

from npclip import cublaslt, cuda_device, nvrtc
from npclip.errors import BackendError

ROUNDS = 7
COPY_BYTES = 1 << 30
GEMM_SIDE = 8192
LEAST_SECONDS = 0.01  # of one sample


@dataclass(frozen=True)
class Rates:
    """Measured: bytes a second, read and written together, and flop a second in float16."""

    copy: float
    gemm: float

    def roof(self, flop: float, nbytes: float) -> float:
        """The seconds that this much work takes at least."""
        return max(flop / self.gemm, nbytes / self.copy)


class EventTimer:
    """Takes the time of what is on a stream, with CUDA events."""

    def __init__(self, device: Any) -> None:
        """Of one Device."""
        self.device, self.xp = device, device.xp

    def __call__(self, work: Callable[[], Any], times: int = 1) -> float:
        """Seconds of work() repeated so often, on the current stream or on its own (prepare)."""
        begin, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        stream = getattr(work, "stream", None)
        begin.record(stream)
        for _ in range(times):
            work()
        end.record(stream)
        end.synchronize()
        return float(self.xp.cuda.get_elapsed_time(begin, end)) / 1e3

    def prepare(self, calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        """All calls, as one graph: then the host's part of a launch does not count.

        Their results stay alive until the end, so that each call writes memory of its own.
        """
        captured = self.device.capture(lambda: [call() for call in calls])

        return _Replay(captured)


class _Replay:
    """Puts a graph on its stream."""

    def __init__(self, captured: Any) -> None:
        self.captured, self.stream = captured, captured.stream

    def __call__(self) -> None:
        self.captured.launch()


class HostTimer:
    """The same interface for work that is done when its function returns."""

    def __call__(self, work: Callable[[], Any], times: int = 1) -> float:
        """Seconds of work() repeated so often."""
        start = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - start

    def prepare(self, calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        """All calls, one after the other."""
        return lambda: [call() for call in calls]


def median_seconds(timer: Any, work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Of one work(): the median of rounds, each long enough to be measured."""
    work()
    once = max(timer(work), 1e-7)
    times = max(1, min(1000, round(LEAST_SECONDS / once)))
    return statistics.median(timer(work, times) / times for _ in range(rounds))


def interleaved(
    calls: dict[str, Callable[[], Any]], timer: Any, rounds: int, seconds: float = LEAST_SECONDS
) -> dict[str, float]:
    """Median seconds of each call; a round is all of them in turn, so that a drift hits all."""
    times = {}
    for name, call in calls.items():
        call()
        times[name] = max(1, min(1000, round(seconds / max(timer(call), 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timer(call, times[name]) / times[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def rotation(nbytes: float, cache_bytes: int, most: int = 64, memory: float = 8e9) -> int:
    """How many sets of buffers make up twice the cache, so that none is found there."""
    needed = -(-2 * cache_bytes // max(1, int(nbytes)))
    return max(1, min(most, needed, int(memory // max(1, nbytes)) or 1))


def measure_rates(device: Any, timer: Any = None, nbytes: int = COPY_BYTES) -> Rates:
    """Copy on the device, and a large matrix product through CuPy."""
    xp, timer = device.xp, timer or EventTimer(device)
    with device.handle:
        copy = 2 * nbytes / _copy_seconds(xp, timer, nbytes)
        a, b = (_normal(xp, seed) for seed in range(2))
        out = xp.empty_like(a)
        for _ in range(10):
            xp.matmul(a, b, out=out)
        gemm = 2 * GEMM_SIDE**3 / median_seconds(timer, lambda: xp.matmul(a, b, out=out))
    return Rates(copy, gemm)


def _copy_seconds(xp: Any, timer: Any, nbytes: int) -> float:
    source = xp.arange(nbytes, dtype=np.uint8)
    target = xp.empty_like(source)
    return median_seconds(timer, lambda: xp.copyto(target, source))


def _normal(xp: Any, seed: int) -> Any:
    """A random square matrix: an eighth of it, again and again."""
    shape = GEMM_SIDE // 8, GEMM_SIDE
    few = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return xp.tile(xp.asarray(few.astype(np.float16)), (8, 1))


def known_rates(out: Path, device: Any) -> Rates:
    """As the stage `environment` has measured them, else measured now."""
    try:
        facts = json.loads((out / "gpu_check.json").read_text())["stages"]["environment"]["facts"]
        return Rates(facts["copy_gb_s"] * 1e9, facts["gemm_tflop_s"] * 1e12)
    except (OSError, KeyError, ValueError):
        return measure_rates(device)


def open_gpu() -> Any:
    """The Device, or the reason why there is none, as text."""
    return cuda_device.why_unavailable() or cuda_device.open_device(0)


def environment(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage."""
    journal.fact(python=platform.python_version(), numpy=np.__version__, nvrtc=_compilers())
    device = open_gpu()
    if isinstance(device, str):
        return device
    runtime = device.xp.cuda.runtime
    with device.handle:
        properties = runtime.getDeviceProperties(device.ordinal)
        free, total = runtime.memGetInfo()
    journal.fact(
        device=device.name,
        capability=".".join(map(str, device.capability)),
        multiprocessors=properties["multiProcessorCount"],
        l2_mib=properties["l2CacheSize"] >> 20,
        memory_gib=round(total / 2**30, 1),
        free_gib=round(free / 2**30, 1),
        driver_cuda=_version(runtime.driverGetVersion()),
        runtime_cuda=_version(runtime.runtimeGetVersion()),
        cupy=device.xp.__version__,
        compiler=_compiler_of(device),
        cublaslt=_cublaslt_version(),
    )
    journal.fact(trouble=list(trouble(device)))
    rates = measure_rates(device)
    journal.fact(copy_gb_s=rates.copy / 1e9, gemm_tflop_s=rates.gemm / 1e12)
    journal.fact(host_to_device_gb_s=dict(_host_copies(device)))
    return None


def trouble(device: Any) -> Iterator[str]:
    """What is missing or does not work here, in words; the other stages do what they can."""
    xp = device.xp
    try:
        nvrtc.target(device.capability, device._compiler)
    except BackendError as error:
        yield f"our kernels: {error}"
    try:
        with device.handle:
            assert int((xp.arange(3) + 1).sum()) == 6
    except Exception as error:
        yield f"CuPy's own kernels do not work: {type(error).__name__}: {error}"[:500]
    try:
        cublaslt.load()
    except BackendError as error:
        yield f"no cuBLASLt: {error}"


def _compiler_of(device: Any) -> str:
    try:
        return str(device._compiler.name)
    except BackendError as error:  # an old GPU does without
        return f"none: {error}"


def _compilers() -> list[str]:
    try:
        return [f"{path.name} {nvrtc.version(path)}" for path in nvrtc.libraries()]
    except Exception as error:
        return [str(error)]


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _cublaslt_version() -> str:
    try:
        return str(cublaslt.Library(cublaslt.load()).version())
    except BackendError as error:
        return f"none: {error}"


def _host_copies(device: Any, nbytes: int = 1 << 28) -> Iterable[tuple[str, float]]:
    """GB/s from pageable and from pinned memory."""
    xp, timer = device.xp, EventTimer(device)
    with device.handle:
        target = xp.empty(nbytes, np.uint8)
        pinned = xp.cuda.alloc_pinned_memory(nbytes)
        sources = {
            "pageable": np.ones(nbytes, np.uint8),
            "pinned": np.frombuffer(pinned, np.uint8, nbytes),
        }
        for name, source in sources.items():
            source[...] = 1
            call = lambda source=source: target.set(source)  # noqa: E731
            yield name, nbytes / median_seconds(timer, call, 3) / 1e9
