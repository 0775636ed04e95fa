#!/usr/bin/env python3
"""Time every C kernel beside NumPy and beside what this machine can do, at CLIP's shapes.

    python tools/bench_kernels.py
    python tools/bench_kernels.py linear attention --isa avx512 --rounds 15
    python tools/bench_kernels.py linear --shapes 50x768x3072,1x768x512 --json -
    python tools/bench_kernels.py --svg docs/roofline.svg --write README.md

The kernels are the symbols {op}_{dtype}_{isa} that the library exports and the machine runs; NumPy
is kernels/reference.py in float32, its BLAS on its own default threads. A round times every one of
a shape, and the machine itself (kernels/peak.c): multiply-adds of that dtype and ISA, and reading.
The roof of a round is the longer of flop / peak and bytes / read rate, bytes being what must move
at least once: arguments, weights as stored, and result. Figures are medians over the rounds, also
of the ratios, so that a machine which becomes slower meanwhile does so for both sides; of a round,
the shortest of three samples where they are short, so that other processes spoil few.

cold: weights come from memory. They are copied and rotated for that, as the layers of a model do.
warm: everything is used again and again, and the roof is the rate at which as many bytes are read
again and again, from whatever cache holds them. A kernel that writes as much as it reads cannot
reach it: a line of a cache is read before it is written.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from bench_peers import processor
from kernel_cases import OPS
from kernel_report import Row, markdown, text_table
from kernel_work import Shape, Work
from machine_rates import Machine, Timer
from parity import replace_between_markers
from roofline_svg import roofline

import npclip
from npclip import cpu, cpu_library, cpu_training, threads
from npclip.kernels import reference, reference_backward, reference_resize
from npclip.weights import to_bfloat16

START, END = "<!-- kernels -->\n", "<!-- /kernels -->\n"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "u8": ""}  # -> of a model
SETTLE_SECONDS = 0.05  # for so long BLAS's threads spin when they have nothing to do
LEAST_COLD = 1 << 20  # bytes of a weight in float32; smaller ones are not rotated, but warm


class Kernel(NamedTuple):
    """One C function; NumPy's is called Kernel(op, "f32", "")."""

    op: str
    dtype: str
    isa: str

    def __str__(self) -> str:
        """Its symbol."""
        return f"{self.op}_{self.dtype}_{self.isa}" if self.isa else "numpy"


def kernels(op: str) -> list[Kernel]:
    """Every C kernel of an op that the library exports and this machine runs, best ISA first."""
    names = (Kernel(op, dtype, isa) for dtype in DTYPES for isa in cpu_library.machine_isas())
    return [name for name in names if cpu_library.kernel(*name) is not None]


def _find(op: str, *modules: ModuleType) -> Callable[..., Any]:
    function: Callable[..., Any] = next(getattr(m, op) for m in modules if hasattr(m, op))
    return function


def numpy_calls(work: Work, kernel: Kernel, copies: int) -> list[Callable[[], Any]]:
    """The op in NumPy, with so many copies of its weight."""
    function = _find(kernel.op, reference, reference_backward, reference_resize)
    call = partial(function, **work.arguments)
    if work.weight is None:
        return [call]
    return [partial(call, weight=work.weight.copy()) for _ in range(copies)]


def kernel_calls(work: Work, kernel: Kernel, copies: int) -> list[Callable[[], Any]]:
    """The C function with the arguments that cpu.py gives it; every call has the same result array.

    ValueError where cpu.py leaves such a shape to NumPy.
    """
    recorded, kept, find, pointer = [], [], cpu_library.kernel, cpu._pointer

    def record(op: str, dtype: str, isa: str) -> Any:
        function = find(op, dtype, isa)
        if op != kernel.op:  # packs
            return function
        return function and (lambda *arguments: recorded.append(arguments))

    def keep(x: Any) -> int | None:
        kept.append(x)  # what a pointer points to must live as long as the calls
        return pointer(x)

    arguments, packed = dict(work.kernel_arguments or work.arguments), []
    in_pairs, dtype = kernel.dtype == "bf16" and kernel.isa in cpu.PAIRS, DTYPES[kernel.dtype]
    for name in work.activations if in_pairs else ():
        arguments[name] = to_bfloat16(arguments[name])
    for name in work.stored if kernel.dtype == "f16" else ():
        arguments[name] = arguments[name].astype(np.float16)
    with mock.patch.object(cpu_library, "isas", lambda: (kernel.isa,)):
        if work.weight is not None:
            stored = work.weight.astype(np.float16) if kernel.dtype == "f16" else work.weight
            packed = [cpu.pack(stored, dtype, dtype) for _ in range(copies)]
            arguments["weight"] = packed[0]
        elif in_pairs and kernel.op in ("layer_norm", "add_layer_norm"):
            arguments["weight"] = cpu.pack(arguments["weight"], dtype, dtype)
        with (
            mock.patch.object(cpu_library, "kernel", record),
            mock.patch.multiple(cpu, kernel=record, _pointer=keep),
            mock.patch.object(cpu_training, "_pointer", keep),
        ):
            _find(kernel.op, cpu_training, cpu)(**arguments)
    if len(recorded) != 1 or not all(isinstance(p, cpu.Packed) for p in packed):
        raise ValueError("no C kernel takes it")
    buffers = [pointer(p.buffer) for p in packed] or [None]
    moved = {pointer(a): a.nbytes for a in kept if a is not None and pointer(a) in recorded[0]}
    nbytes = sum(size for at, size in moved.items() if at != buffers[0])
    kept += packed
    calls = []
    for buffer in buffers:  # in place of the first one's
        arguments = [buffer if buffer and a == buffers[0] else a for a in recorded[0]]
        calls.append(partial(find(*kernel), *arguments))
        calls[-1].kept, calls[-1].nbytes = (
            kept,
            nbytes,
        )  # all that it reads and writes but the weight
    return calls


def bench(machine: Machine, shape: Shape, chosen: list[Kernel], rounds: int) -> list[Row]:
    """NumPy and these kernels of one op at one shape. ValueError for a shape they do not take."""
    op = chosen[0].op
    work = OPS[op].work(*shape)
    numpy = Kernel(op, "u8" if chosen[0].dtype == "u8" else "f32", "")
    everyone = [*chosen, numpy]
    timers, nbytes, states = {}, {}, {}
    for kernel in everyone:
        stored, copies = 0, 1
        if work.weight is not None:
            stored = work.weight.size * (4 if kernel.dtype == "f32" else 2)
            if work.weight.nbytes >= LEAST_COLD:
                copies = math.ceil(2 * machine.last_cache / stored)
        calls = (kernel_calls if kernel.isa else numpy_calls)(work, kernel, copies)
        timers[kernel] = Timer(calls)
        moved = work.nbytes or (calls[0].nbytes if kernel.isa else _nbytes(work, numpy))
        nbytes[kernel] = stored + moved
        is_cold = copies * stored >= 2 * machine.last_cache
        states[kernel] = "cold" if is_cold else "warm"
    seconds: dict[Kernel, list[float]] = {kernel: [] for kernel in everyone}
    roofs: dict[Kernel, list[float]] = {kernel: [] for kernel in everyone}
    for _ in range(rounds):
        for kernel in everyone:
            peak = machine.peak(kernel.dtype, kernel.isa) if work.flop else math.inf
            rate = machine.read(nbytes[kernel] if states[kernel] == "warm" else None)
            roofs[kernel].append(max(work.flop / peak, nbytes[kernel] / rate))
            seconds[kernel].append(timers[kernel].seconds())
        time.sleep(SETTLE_SECONDS)  # NumPy was last
    rows = []
    for kernel in (numpy, *chosen):
        median = float(np.median(seconds[kernel]))
        row = Row(
            op=op,
            shape="x".join(map(str, shape)),
            case=OPS[op].cases.get(shape, ""),
            kernel=str(kernel),
            dtype=kernel.dtype,
            isa=kernel.isa,
            state=states[kernel],
            seconds=median,
            gflops=work.flop / median / 1e9,
            gbytes=nbytes[kernel] / median / 1e9,
            intensity=work.flop / nbytes[kernel],
            roof=float(np.median(np.divide(roofs[kernel], seconds[kernel]))),
            numpy=float(np.median(np.divide(seconds[numpy], seconds[kernel]))),
        )
        rows.append(row)
    return rows


def _nbytes(work: Work, numpy: Kernel) -> int:
    """Of all arrays that a call reads and writes, but the weight."""
    moved = work.kernel_arguments
    if moved is None:
        result = numpy_calls(work, numpy, 1)[0]()
        results = result if isinstance(result, tuple) else (result,)
        moved = {**work.arguments, **dict(enumerate(results))}
    return sum(a.nbytes for a in moved.values() if isinstance(a, np.ndarray))


def describe(machine: Machine, rounds: int) -> dict[str, Any]:
    """The machine, versions and peaks, as --json writes them."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "processor": processor(),
        "isas": cpu_library.machine_isas(),
        "threads": threads.get_num_threads(),
        "cpus": threads.available_cpus(),
        "l2_bytes": machine.l2,
        "last_cache_bytes": machine.last_cache,
        "versions": {
            "npclip": npclip.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "blas": f"{blas['name']} {blas['version']}",
        },
        "peaks": machine.peaks(rounds),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(OPS))
    parser.add_argument("--dtype", type=_list, metavar="LIST", help=f"of: {', '.join(DTYPES)}")
    parser.add_argument(
        "--isa", type=_list, metavar="LIST", help=f"of: {', '.join(cpu_library.ISAS)}"
    )
    axes = ", ".join(f"{name} {op.axes}" for name, op in OPS.items())
    parser.add_argument("--shapes", type=_shapes, metavar="LIST", help=f"not CLIP's: {axes}")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="of the kernels, not of BLAS"
    )
    parser.add_argument("--rounds", type=_positive, default=7, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write everything; - is standard output")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a roofline plot")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the README's table into it"
    )
    return parser


def _list(text: str) -> list[str]:
    return text.split(",")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _shapes(text: str) -> list[Shape]:
    return [tuple(map(_positive, shape.split("x"))) for shape in text.split(",")]


def choose(args: argparse.Namespace) -> list[tuple[Shape, list[Kernel]]]:
    """What is timed together: a shape, and kernels of one op. ValueError says what is wrong."""
    ops, isas = args.ops or list(OPS), cpu_library.machine_isas()
    for name, given, known in (
        ("op", ops, OPS), ("dtype", args.dtype or [], DTYPES), ("isa", args.isa or [], isas),
    ):  # fmt: skip
        if unknown := [text for text in given if text not in known]:
            raise ValueError(f"no {name} {', '.join(unknown)} here, but: {', '.join(known)}")
    chosen = []
    for op in ops:
        found = [
            kernel
            for kernel in kernels(op)
            if kernel.dtype in (args.dtype or DTYPES) and kernel.isa in (args.isa or isas)
        ]
        if args.ops and not found:
            raise ValueError(f"{op} has no kernel of that dtype and ISA")
        shapes = [s for s in args.shapes or OPS[op].cases if len(s) == len(OPS[op].axes.split("x"))]
        if found and not shapes:
            raise ValueError(f"no shape given is one of {op}: {OPS[op].axes}")
        chosen += [(shape, found) for shape in shapes if found]
    if not chosen:
        raise ValueError("no kernel is of that dtype and ISA")
    for shape in set(args.shapes or []) - {shape for shape, _ in chosen}:
        raise ValueError(f"{'x'.join(map(str, shape))} is a shape of none of these ops")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Measure, print as each shape is done, write what was asked for."""
    line = parser()
    args = line.parse_args(arguments)
    try:
        work = choose(args)
    except OSError as error:
        print(f"the library of C kernels does not load: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        line.error(str(error))
    if args.threads:
        threads.set_num_threads(args.threads)
    out = sys.stderr if args.json == "-" else sys.stdout
    machine, rows = Machine(), []
    for shape, chosen in work:
        try:
            of_shape = bench(machine, shape, chosen, args.rounds)
        except ValueError as error:
            line.error(f"{chosen[0].op} {'x'.join(map(str, shape))}: {error}")
        rows += of_shape
        print(*text_table(of_shape), sep="\n", file=out, flush=True)
    described = describe(machine, args.rounds)
    print("\npeaks", described["peaks"], file=out)
    if args.json:
        text = json.dumps({**described, "rows": [asdict(row) for row in rows]}, indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n")
    if args.svg:
        args.svg.write_text(roofline(described, rows))
    if args.write:
        replace_between_markers(args.write, markdown(described, rows), START, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
