"""The stages of gpu_check.py that look at single ops: right values, equal repeats, speed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_cases
import numpy as np
from gpu_cases import Case
from gpu_journal import Journal, run_process
from gpu_rates import EventTimer, Rates, known_rates, median_seconds, open_gpu, rotation

from npclip import cuda
from npclip.config import Metadata
from npclip.cuda_preprocess import normalize_table, preprocess_on_device
from npclip.kernels import reference
from npclip.preprocess import preprocess

REPEATS = 3
# |error| / |result| as vectors, and the largest error / the largest value, of what is stored so.
TOLERANCES = {
    "f16": (1e-3, 4e-3), "bf16": (8e-3, 3e-2), "f32": (1e-5, 1e-5),
    "wide": (1e-4, 1e-4),  # float32 sums of what is stored in 16 bits
}  # fmt: skip
SEED = 1
FOUND_SOMETHING = 99  # compute-sanitizer's exit status
IMAGES = (427, 640, 224), (640, 427, 224), (1536, 2048, 336), (100, 100, 224)  # H, W, R


@contextmanager
def poisoned(device: Any) -> Iterator[None]:
    """Every array that the device allocates is full of NaN."""
    empty = device.empty

    def full_of_nan(shape: tuple[int, ...], stored: str) -> Any:
        x = empty(shape, stored)
        if x.size:
            x.view(np.uint8)[...] = 0xFF
        return x

    with mock.patch.object(device, "empty", full_of_nan):
        yield


def errors(found: Any, expected: Any) -> tuple[float, float]:
    """|error| / |result| as vectors, and the largest error / the largest value; NaN stays NaN."""
    difference = found.astype(np.float64) - expected
    norm, largest = np.linalg.norm(expected), np.abs(expected).max(initial=0)
    return (
        float(np.linalg.norm(difference) / (norm or 1)),
        float(np.abs(difference).max(initial=0) / (largest or 1)),
    )


def host_values(device: Any, y: Any) -> Any:
    """float32 on the host."""
    return np.asarray(device.asnumpy(device.widen(y)))


def is_right(kind: str, relative: float, largest: float) -> bool:
    """Whether errors are what rounding explains; NaN is not."""
    return relative <= TOLERANCES[kind][0] and largest <= TOLERANCES[kind][1]


def check(device: Any, case: Case, kind: str, repeats: int = REPEATS) -> dict[str, Any]:
    """One op of npclip.cuda against float64, poisoned, several times: a row of the table."""
    arguments = case.arguments(SEED)
    expected = case.run(reference, gpu_cases.exact(arguments, kind))
    placed = gpu_cases.place(device, arguments, kind)
    seen, results = set(), []
    with poisoned(device):
        for _ in range(repeats):
            results = _as_tuple(case.run(cuda, placed))
            seen.add(b"".join(device.asnumpy(y).tobytes() for y in results))
    pairs = zip(results, _as_tuple(expected), strict=True)
    both = [errors(host_values(device, y), e) for y, e in pairs]
    relative, largest = (max_or_nan(values) for values in zip(*both, strict=True))
    return {
        "case": str(case),
        "dtype": kind,
        "relative_error": relative,
        "largest_error": largest,
        "equal_repeats": len(seen) == 1,
        "ok": len(seen) == 1 and is_right(kind, relative, largest),
    }


def max_or_nan(values: Any) -> float:
    """As NumPy's maximum, not as Python's."""
    return float(np.max(values))


def _as_tuple(y: Any) -> tuple[Any, ...]:
    return y if isinstance(y, tuple) else (y,)


def check_preprocess(device: Any, height: int, width: int, size: int) -> dict[str, Any]:
    """Resize, crop and normalise two images: to the bits of the host's."""
    images = np.random.default_rng(SEED).integers(0, 256, (2, height, width, 3), np.uint8)
    metadata = Metadata(activation="quick_gelu")
    how = metadata.mean, metadata.std, metadata.resize, metadata.interpolation
    expected = np.stack([preprocess(image, size, *how) for image in images])
    with poisoned(device):
        table = normalize_table(device, metadata)
        y = preprocess_on_device(device, device.asarray(images), size, metadata, table)
    found = np.asarray(device.asnumpy(y))
    return {
        "case": preprocess_name(height, width, size),
        "dtype": "u8",
        "different": int((found != expected).sum()),
        "ok": bool(np.array_equal(found, expected)),
    }


def preprocess_name(height: int, width: int, size: int) -> str:
    """As the rows have it."""
    return f"preprocess {height}x{width}x{size}"


def check_all(
    device: Any,
    journal: Journal,
    cases: list[Case],
    images: tuple[tuple[int, int, int], ...] = (),
    kinds: tuple[str, ...] = gpu_cases.KINDS,
) -> None:
    """All cases in all dtypes, one row each, for as long as there is time; errors are rows, too."""
    work = [(case, kind) for kind in kinds for case in cases if kind in case.dtypes()]
    calls = [(str(case), kind, partial(check, device, case, kind)) for case, kind in work]
    calls += [
        (preprocess_name(*size), "u8", partial(check_preprocess, device, *size)) for size in images
    ]
    for name, kind, call in calls:
        if journal.has(case=name, dtype=kind):
            continue
        if journal.left() < 1:
            journal.leave_out(f"{name} {kind}")
            continue
        try:
            journal.row(**call())
        except Exception as error:
            journal.row(case=name, dtype=kind, ok=False, error=_first_lines(error))


def _first_lines(error: Exception) -> str:
    return "\n".join(f"{type(error).__name__}: {error}".splitlines()[:6])


def check_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage `kernels`."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    device.can_time = False  # the choice among products: all of them are checked by another stage
    cases = gpu_cases.ALL_CASES
    check_all(device, journal, [*cases.tiny, *cases.clip, *cases.awkward], IMAGES)
    return None


def tiny_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """What compute-sanitizer looks at, without a memory pool: so every array has its bounds."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    device.xp.cuda.set_allocator(None)
    device.can_time = False
    check_all(device, journal, gpu_cases.ALL_CASES.tiny, ((37, 53, 16),))
    return None


def open_kernel_gpu() -> Any:
    """The Device, or the reason why there is none that runs the kernels, as text."""
    device = open_gpu()
    if not isinstance(device, str) and not getattr(device, "has_kernels", True):
        return f"{device.name} is too old for the kernels"
    return device


def toolkit_folders() -> list[str]:
    """Where a CUDA toolkit has its programs."""
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    return [f"{root}/bin" for root in dict.fromkeys([*roots, "/usr/local/cuda"]) if root]


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    folders = os.environ.get("PATH", ""), *toolkit_folders()
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage: memcheck and racecheck; that compute-sanitizer refuses is no failure."""
    program = find_sanitizer()
    if program is None:
        return f"no compute-sanitizer in {', '.join(toolkit_folders())} or on PATH"
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    run_here = [sys.executable, str(Path(__file__).with_name("gpu_check.py")), "--run", "tiny"]
    for tool, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        if journal.has(tool=tool):
            continue
        seconds, folder = journal.left() * share, work / tool
        folder.mkdir()
        options = ["--tool", tool, "--error-exitcode", str(FOUND_SOMETHING)]
        folders = ["--budget", str(seconds), "--out", str(folder), "--work", str(folder)]
        row = sanitize([program, *options, *run_here, *folders], tool, seconds, folder)
        journal.row(**row)
    return None


def sanitize(command: list[str], tool: str, seconds: float, folder: Path) -> dict[str, Any]:
    """A row: what the tool has found in how many cases, or that it did not work here.

    The command leaves the journal of the stage `tiny` in the folder.
    """
    log, journal = folder / "log", folder / "tiny.json"
    code = run_process(command, seconds, log)
    lines = log.read_text(errors="replace").splitlines()
    summary = [line for line in lines if "SUMMARY" in line]
    rows = json.loads(journal.read_text())["rows"] if journal.exists() else []
    row = {"tool": tool, "cases": len(rows), "ok": code != FOUND_SOMETHING}
    if code is None:
        return row | {"result": f"took more than {seconds:.0f} s"}
    if not summary or code not in (0, FOUND_SOMETHING):
        return row | {"result": f"refused, {code}: {' / '.join(lines[-3:])}"}
    if failed := [r for r in rows if r["ok"] is False]:
        return row | {"result": f"{failed[0]['case']} does not run under it", "ok": False}
    result = summary[-1].strip("= ") if rows else "no kernel ran"
    row |= {"result": result, "ok": bool(rows) and not code}
    return row | ({"report": lines[:40]} if code else {})


def timing(
    device: Any, case: Case, kind: str, rates: Rates, timer: Any, cache_bytes: int
) -> dict[str, Any]:
    """One op on rotated buffers that together exceed the cache: a row of the table."""
    placed = gpu_cases.place(device, case.arguments(), kind)
    moved = *gpu_cases.device_arrays(placed), *gpu_cases.device_arrays(case.run(cuda, placed))
    nbytes = sum(x.nbytes for x in moved)
    copies = rotation(nbytes, cache_bytes)
    sets = [placed, *(gpu_cases.copied(device, placed) for _ in range(copies - 1))]
    work = timer.prepare([partial(case.run, cuda, arguments) for arguments in sets])
    seconds = median_seconds(timer, work) / copies
    flop = case.flop()
    return {
        "case": str(case),
        "dtype": kind,
        "microseconds": seconds * 1e6,
        "gb_s": nbytes / seconds / 1e9,
        "tflop_s": flop / seconds / 1e12,
        "of_copy": nbytes / seconds / rates.copy,
        "of_gemm": flop / seconds / rates.gemm,
        "of_roof": rates.roof(flop, nbytes) / seconds,
        "buffers": copies,
    }


def timing_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage `timings`."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    rates, timer = known_rates(out, device), EventTimer(device)
    cache = device.xp.cuda.runtime.getDeviceProperties(device.ordinal)["l2CacheSize"]
    for case in gpu_cases.TIMED:
        kind = "f32" if case.op in gpu_cases.FLOAT32_OPS else "f16"
        if journal.has(case=str(case), dtype=kind):
            continue
        if journal.left() < 2:
            journal.leave_out(str(case))
            continue
        try:
            journal.row(**timing(device, case, kind, rates, timer, cache))
        except Exception as error:
            journal.row(case=str(case), dtype=kind, ok=False, error=_first_lines(error))
    return None
