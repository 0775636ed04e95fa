"""The stage of gpu_check.py about matrix products: every way to compute one, by shape."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_cases
import numpy as np
from gpu_cases import Case
from gpu_journal import Journal
from gpu_kernels import errors, host_values, is_right, open_kernel_gpu
from gpu_rates import EventTimer, Rates, known_rates, median_seconds, rotation

from npclip import cuda_linear, nvrtc
from npclip.cuda_device import NUMPY_DTYPES
from npclip.cuda_launch import Kernel
from npclip.cuda_products import Key, round_up_to_power
from npclip.kernels import reference

CHOSEN = "chosen"  # by npclip, of the ways
CHECKED_ROWS = 48  # at both ends of the result
B, L = (768, 3072), (1024, 4096)
SHAPES = [  # N x K x M and what follows the product, most important first
    *(Case("linear", (n, d, f), "quick_gelu") for n, (d, f) in ((12800, B), (16448, L), (50, B))),
    *(Case("linear", (n, f, d), "residual") for n, (d, f) in ((12800, B), (16448, L), (50, B))),
    *(Case("linear", (n, d, 3 * d)) for n, (d, _) in ((12800, B), (16448, L), (50, B))),
    *(Case("linear", (n, d, d)) for n, (d, _) in ((12800, B), (16448, L), (50, B))),
    *(Case("linear", (257, d, f), "quick_gelu") for d, f in (L,)),
    *(Case("linear", (257, f, d), "residual") for d, f in (L,)),
    Case("linear", (3072, 512, 2048), "quick_gelu"), Case("linear", (12, 512, 2048), "quick_gelu"),
    Case("linear", (256, 768, 512)), Case("linear", (1, 768, 512)),
    Case("linear", (197, 768, 3072), "quick_gelu"), Case("linear", (577, 1024, 4096), "quick_gelu"),
]  # fmt: skip
AWKWARD = [
    Case("linear", (1, 8, 8)), Case("linear", (129, 72, 136), "quick_gelu"),
    Case("linear", (63, 1032, 264), "gelu residual"), Case("linear", (257, 520, 8), "relu"),
]  # fmt: skip


class Epilogue(NamedTuple):
    """What follows a product, as models have it; result: how y is stored, "" as x is."""

    bias: bool
    residual: bool = False
    activation: str | None = None
    residual_first: bool = False  # before the activation, as in ResNets
    result: str = ""
    in_place: bool = False  # y is the residual

    def how(self) -> str:
        """In the words of a Case, and some more: what is different from a bias alone."""
        words = "" if self.bias else "unbiased", "residual" if self.residual else ""
        more = "first" if self.residual_first else "", "in_place" if self.in_place else ""
        return " ".join(filter(None, (*words, *more, self.activation, self.result)))


EPILOGUE_SHAPES = (63, 1032, 264), (257, 768, 512), (1, 512, 768)
EPILOGUES = [
    Epilogue(False), Epilogue(True), Epilogue(False, True), Epilogue(True, True),
    Epilogue(True, True, in_place=True), Epilogue(True, activation="quick_gelu"),
    Epilogue(True, activation="gelu"), Epilogue(True, True, "relu", True),
    Epilogue(False, result="f32"), Epilogue(True, True, result="f32"),
]  # fmt: skip


class Operands(NamedTuple):
    """Of one product; None where there is none."""

    x: Any
    weight: Any
    bias: Any
    residual: Any
    y: Any


Way = Callable[..., None]  # of x, weight, bias, residual, y


def ways(
    device: Any, case: Case, kind: str, arrays: Operands, everything: bool = True
) -> dict[str, Way]:
    """Ways by name: our variants that run here, cuBLASLt's plans, and what is chosen.

    everything: not only what may be the fastest.
    """
    products, activation = device.products, case.activation()
    n, k, m = case.shape
    has = arrays.bias is not None, arrays.residual is not None
    key = Key(kind, kind, round_up_to_power(n), k, m, activation, *has, False)
    names = products._names(key, *arrays, everything=everything)
    found = {name: products._way(key, name) for name in names}
    return {**found, CHOSEN: lambda x, w, bias, r, y: products.run(x, w, bias, activation, r, y)}


def operands(device: Any, arguments: dict[str, Any], kind: str) -> Operands:
    """On the device, y full of NaN."""
    placed = gpu_cases.place(device, arguments, kind)
    y = device.empty((len(arguments["x"]), len(arguments["weight"])), kind)
    poison(y)
    weight = placed["weight"].array
    return Operands(placed["x"], weight, placed.get("bias"), placed.get("residual"), y)


def poison(y: Any) -> None:
    """Fill an array with NaN."""
    y.view(np.uint8)[...] = 0xFF


def expected_rows(arguments: dict[str, Any], kind: str) -> tuple[Any, Any]:
    """Which rows of the result are checked, and what they are in float64."""
    n = len(arguments["x"])
    rows = np.unique(np.r_[: min(n, CHECKED_ROWS), max(0, n - CHECKED_ROWS) : n])
    some = {k: v[rows] if k in ("x", "residual") else v for k, v in arguments.items()}
    return rows, reference.linear(**gpu_cases.exact(some, kind))


def compare(
    device: Any, case: Case, kind: str, rates: Rates | None, timer: Any, cache_bytes: int = 0
) -> Iterator[dict[str, Any]]:
    """A row for every way: whether it is right and, with rates, how fast it is."""
    arguments = case.arguments()
    rows, expected = expected_rows(arguments, kind)
    first = operands(device, arguments, kind)
    sets, nbytes = [first], sum(a.nbytes for a in first if a is not None)
    for _ in range(1, rotation(nbytes, cache_bytes, most=16) if rates else 1):
        sets.append(Operands(*(None if a is None else device.copy(a) for a in first)))
    for name, way in ways(device, case, kind, first, everything=not rates).items():
        row: dict[str, Any] = {"case": str(case), "dtype": kind, "way": name}
        poison(first.y)
        try:
            way(*first)
            found = host_values(device, first.y)[rows]
            relative, largest = errors(found, expected)
            row |= {"relative_error": relative, "ok": is_right(kind, relative, largest)}
            if rates:
                work = timer.prepare([partial(way, *arrays) for arrays in sets])
                seconds = median_seconds(timer, work, 5) / len(sets)
                rate = case.flop() / seconds
                row |= {"microseconds": seconds * 1e6, "tflop_s": rate / 1e12}
                row |= {"of_roof": rates.roof(case.flop(), nbytes) / seconds}
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        yield row


def check_epilogue(
    device: Any, case: Case, kind: str, wanted: Epilogue
) -> Iterator[dict[str, Any]]:
    """A row for every way to compute a product with what follows it, cuBLASLt's among them."""
    (n, k, m), products, result = case.shape, device.products, wanted.result or kind
    arguments = Case("linear", case.shape, "residual" if wanted.residual else "").arguments()
    if not wanted.bias:
        del arguments["bias"]
    exact = gpu_cases.exact(arguments, kind)
    arrays = operands(device, arguments, kind)._replace(y=device.empty((n, m), result))
    if wanted.residual and result == "f32":
        exact["residual"] = arguments["residual"].astype(np.float64)
        arrays = arrays._replace(residual=device.asarray(arguments["residual"]))
    if wanted.residual_first:
        expected = reference.ACTIVATIONS[wanted.activation](reference.linear(**exact))
    else:
        expected = reference.linear(**exact, activation=wanted.activation)
    has = wanted.bias, wanted.residual, wanted.residual_first
    key = Key(kind, result, round_up_to_power(n), k, m, wanted.activation, *has)
    for name in products._names(key, *arrays, everything=True):
        row: dict[str, Any] = {"case": str(case), "dtype": kind, "way": name}
        given = arrays
        if wanted.in_place:
            copy = device.copy(arrays.residual)
            given = arrays._replace(y=copy, residual=copy)
        else:
            poison(arrays.y)
        try:
            products._way(key, name)(*given)
            relative, largest = errors(host_values(device, given.y), expected)
            stored = kind if result == kind else "wide"
            row |= {"relative_error": relative, "ok": is_right(stored, relative, largest)}
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        yield row


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Of all our variants that run there, for every case here and in gpu_cases.py."""
    found: dict[Kernel, None] = {}
    linears = [case for case in gpu_cases.ALL_CASES.clip if case.op == "linear"]
    work = [(case, "f16") for case in [*SHAPES, *linears]]
    work += [(case, kind) for kind in gpu_cases.KINDS for case in AWKWARD]
    for case, kind in work:
        n, k, m = case.shape
        dtype = NUMPY_DTYPES[kind]
        x, w, y = (np.empty(shape, dtype) for shape in ((n, k), (m, k), (n, m)))
        for variant in cuda_linear.variants(kind):
            if variant.runs_on(capability):
                launch = cuda_linear.linear(x, w, None, case.activation(), None, y, variant)
                found[launch.kernel] = None
    for wanted in EPILOGUES:
        for kind in gpu_cases.KINDS:
            for kernel in epilogue_kernels(capability, kind, wanted):
                found[kernel] = None
    return list(found)


def epilogue_kernels(capability: tuple[int, int], kind: str, wanted: Epilogue) -> Iterator[Kernel]:
    """Of all our variants that run there; the shape does not matter."""
    x, y = (
        np.empty((8, 8), NUMPY_DTYPES[kind]),
        np.empty((8, 8), NUMPY_DTYPES[wanted.result or kind]),
    )
    residual = y if wanted.residual else None
    for variant in cuda_linear.variants(kind):
        if variant.runs_on(capability):
            how = wanted.activation, residual, y, variant, wanted.residual_first
            yield cuda_linear.linear(x, x, None, *how).kernel


def compile_kernel(kernel: Kernel, arch: str, compiler: Path | None) -> None:
    """Into the cache on disk."""
    nvrtc.cubin(kernel.source, f"sm_{arch}", compiler)


def compile_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage: one process for each core, because a compiler works on one kernel at a time."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    compiler = device._compiler  # of CuPy's CUDA, as for all kernels of the device
    arch, wanted = nvrtc.target(device.capability, compiler), kernels(device.capability)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        started = {pool.submit(compile_kernel, k, k.arch or arch, compiler): k for k in wanted}
        for done, future in enumerate(as_completed(started), 1):
            if error := future.exception():
                kernel = started[future]
                journal.row(kernel=f"{kernel.symbol} {kernel.defines}", ok=False, error=str(error))
            journal.fact(compiled=done, of=len(wanted))
    return None


def product_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage: values of all epilogues in all dtypes, then the times at CLIP's shapes."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    rates, timer = known_rates(out, device), EventTimer(device)
    cache = device.xp.cuda.runtime.getDeviceProperties(device.ordinal)["l2CacheSize"]
    journal.fact(has_cublaslt=device.products._library is not None)
    checked: list[tuple[str, str, Callable[[], Iterator[dict[str, Any]]]]] = []
    for kind in gpu_cases.KINDS:
        checks = [(case, partial(compare, device, case, kind, None, timer)) for case in AWKWARD]
        for epilogue in EPILOGUES:
            for case in (Case("linear", shape, epilogue.how()) for shape in EPILOGUE_SHAPES):
                checks.append((case, partial(check_epilogue, device, case, kind, epilogue)))
        checked += [(str(case), kind, check) for case, check in checks]
    timed = [
        (str(case), "f16", partial(compare, device, case, "f16", rates, timer, cache))
        for case in SHAPES
    ]
    first = [item for item in checked if item[1] == "f16"]
    for name, kind, call in [*first, *timed, *(item for item in checked if item[1] != "f16")]:
        if journal.has(case=name, dtype=kind):
            continue
        if journal.left() < 2:
            journal.leave_out(f"{name} {kind}")
            continue
        for row in list(call()):  # all ways or none: a run that goes on looks at the case only
            journal.row(**row)
    return None
