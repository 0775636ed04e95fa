"""What bench_kernels.py has measured, as text and as the README's table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernel_cases import OPS, README_CASES


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: medians over the rounds."""

    op: str
    shape: str
    case: str
    kernel: str  # the symbol, or numpy
    dtype: str
    isa: str
    state: str  # cold or warm
    seconds: float
    gflops: float  # a second, as gbytes
    gbytes: float
    intensity: float  # flop a byte
    roof: float  # fraction of it that is reached
    numpy: float  # how many times NumPy's speed


def named_peaks(peaks: dict[str, float]) -> list[tuple[str, float, str]]:
    """(label, value, unit): the peaks, the rate of memory, and the fastest of the caches' rates."""
    rates = [(value, f"caches, {key}") for key, value in peaks.items() if "KiB" in key]
    named = [
        (key.replace("_", " ", 1), value, "GFLOP/s") for key, value in peaks.items() if "_" in key
    ]
    named += [(key, value, "GB/s") for key, value in peaks.items() if key == "memory"]
    return named + [(label, value, "GB/s") for value, label in sorted(rates)[-1:]]


def text_table(rows: list[Row]) -> Iterator[str]:
    """The lines that are printed for one shape."""
    first = rows[0]
    yield f"\n{first.op} {OPS[first.op].axes} = {first.shape}  {first.case}".rstrip()
    yield f"{'':26}         ms  GFLOP/s    GB/s  % of roof  x NumPy"
    for row in rows:
        yield (
            f"  {row.kernel:24} {row.seconds * 1e3:10.4f} {row.gflops:8.1f} {row.gbytes:7.2f} "
            f"{row.roof:9.0%} {row.numpy:8.2f}  {row.state}"
        )


def markdown(machine: dict[str, Any], rows: list[Row]) -> str:
    """The README's table: of every op and dtype, the kernel that the model takes here."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:  # the best ISA comes first
        if row.isa and row.case in README_CASES:
            best.setdefault((row.op, row.shape, row.dtype), row)
    peaks = [f"{label} {value:.0f} {unit}" for label, value, unit in named_peaks(machine["peaks"])]
    note = (
        f"{machine['threads']} threads of {machine['processor']}. % of roof: of what this "
        "machine's own peaks allow, measured in the same rounds. NumPy is `reference.py` in "
        f"float32 (NumPy {machine['versions']['numpy']}, BLAS {machine['versions']['blas']}).\n\n"
        f"Peaks: {', '.join(peaks)}.\n"
    )
    lines = [
        note,
        "| kernel | shape | | ms | GFLOP/s | GB/s | % of roof | x NumPy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in best.values():
        lines.append(
            f"| `{row.kernel}` | {row.shape} | {row.case} | {row.seconds * 1e3:.3f} | "
            f"{row.gflops:.1f} | {row.gbytes:.1f} | {row.roof:.0%} | {row.numpy:.1f} |"
        )
    return "\n".join(lines) + "\n"
