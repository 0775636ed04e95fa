"""What gpu_check.py's results are measured against: the project's targets on an H200, in float16.

A target is met only if everything that it names was measured. Its rows are found by what they are
known by, so a result that is missing is "not measured", never met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Stages = dict[str, Row]
EAGER = "torch eager"
MODES = "torch.compile default", "torch.compile reduce-overhead"  # and any other that was measured
LARGE = 256, 1024  # batches


@dataclass(frozen=True)
class Found:
    """The value that decides, in which everything counts that was measured; what is missing."""

    value: float | None
    missing: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Target:
    """One bound."""

    case: str
    what: str
    bound: float
    find: Callable[[Stages], Found]
    is_most: bool = False  # the bound is an upper one
    form: str = ".2f"

    def row(self, stages: Stages) -> Row:
        """A line of the table."""
        found = self.find(stages)
        sign = "<=" if self.is_most else ">="
        return {
            "case": self.case,
            "what": self.what,
            "target": f"{sign} {self.bound:{self.form}}",
            "measured": "" if found.value is None else f"{found.value:{self.form}} {found.note}",
            "status": self.status(found),
        }

    def status(self, found: Found) -> str:
        """Met, missed by how much, or not measured, and what is missing."""
        rest = f"not measured: {', '.join(found.missing)}" if found.missing else ""
        if found.value is None:
            return rest or "not measured"
        value, bound = found.value, self.bound
        is_met = value <= bound if self.is_most else value >= bound
        if is_met:
            return f"met so far, {rest}" if rest else "met"
        text = f"missed by {100 * abs(value - bound) / bound:.2g} %"
        return f"{text}, {rest}" if rest else text


def rows_of(stages: Stages, prefix: str) -> Iterator[Row]:
    """Of all stages whose names begin so."""
    for name, stage in stages.items():
        if name.startswith(prefix):
            yield from stage["rows"]


def _select(rows: Iterable[Row], value: str, **key: Any) -> list[Row]:
    return [
        row
        for row in rows
        if row.get(value) is not None and all(row.get(k) == v for k, v in key.items())
    ]


def _speedup(
    model: str, what: str, peers: tuple[str, ...], batches: tuple[int, ...]
) -> Callable[[Stages], Found]:
    """The smallest ratio to any of these peers (of MODES: to any torch.compile) at any batch.

    At least the first batch is needed, with all of the peers.
    """

    def find(stages: Stages) -> Found:
        rows = _select(rows_of(stages, "peers-"), "ratio", model=model, what=what)
        wanted = [r for r in rows if r["batch"] in batches and _is_one_of(r["peer"], peers)]
        known = {(r["peer"], r["batch"]) for r in wanted}
        missing = [f"{p}, batch {batches[0]}" for p in peers if (p, batches[0]) not in known]
        if not wanted:
            return Found(None, tuple(missing))
        least = min(wanted, key=lambda r: r["ratio"])
        note = f"(batch {least['batch']}, {least['peer']})"
        return Found(least["ratio"], tuple(missing), note)

    return find


def _is_one_of(peer: str, peers: tuple[str, ...]) -> bool:
    return peer.startswith("torch.compile") if peers == MODES else peer in peers


def _milliseconds(model: str) -> Callable[[Stages], Found]:
    """Of one image."""

    def find(stages: Stages) -> Found:
        key = {"model": model, "what": "image", "dtype": "float16", "batch": 1}
        rows = _select(rows_of(stages, "models"), "milliseconds", **key)
        return Found(rows[0]["milliseconds"] if rows else None)

    return find


def _of_gemm(model: str) -> Callable[[Stages], Found]:
    """The best of the large batches."""

    def find(stages: Stages) -> Found:
        key = {"model": model, "what": "image", "dtype": "float16"}
        rows = _select(rows_of(stages, "models"), "of_gemm", **key)
        rows = [row for row in rows if row["batch"] in LARGE]
        best = max(rows, key=lambda row: row["of_gemm"], default=None)
        return Found(best["of_gemm"], (), f"(batch {best['batch']})") if best else Found(None)

    return find


def _of_copy(case: str) -> Callable[[Stages], Found]:
    def find(stages: Stages) -> Found:
        rows = _select(rows_of(stages, "timings"), "of_copy", case=case, dtype="f16")
        return Found(rows[0]["of_copy"] if rows else None)

    return find


def _cosine(dtype: str) -> Callable[[Stages], Found]:
    """The smallest of all models and batches."""

    def find(stages: Stages) -> Found:
        rows = _select(rows_of(stages, "models"), "cosine", dtype=dtype)
        return Found(min((row["cosine"] for row in rows), default=None))

    return find


def _error(stages: Stages) -> Found:
    """The largest error of npclip as a multiple of torch's, of all models and batches."""
    rows = _select(rows_of(stages, "peers-"), "error_of_npclip", peer=EAGER)
    worst = max(rows, key=_relative_error, default=None)
    if worst is None:
        return Found(None)
    return Found(_relative_error(worst), (), f"({worst['model']} {worst['what']})")


def _relative_error(row: Row) -> float:
    return row["error_of_npclip"] / row["error_of_peer"]


def _speedups(
    case: str, model: str, what: str, batches: tuple[int, ...], eager: float, compiled: float
) -> list[Target]:
    return [
        Target(case, "vs torch eager", eager, _speedup(model, what, (EAGER,), batches)),
        Target(case, "vs best torch.compile", compiled, _speedup(model, what, MODES, batches)),
    ]


B32, L14, L14_336 = "ViT-B/32", "ViT-L/14", "ViT-L/14@336px"
TARGETS = [
    *_speedups("image B/32, batch >= 256", B32, "image", LARGE, 1.5, 1.15),
    *_speedups("image L/14, batch >= 128", L14, "image", LARGE, 1.35, 1.10),
    *_speedups("image L/14@336", L14_336, "image", LARGE, 1.3, 1.08),
    *_speedups("image B/32, batch 1", B32, "image", (1,), 5, 1.2),
    Target("image B/32, batch 1", "ms", 0.25, _milliseconds(B32), True, ".3f"),
    *_speedups("image L/14, batch 1", L14, "image", (1,), 3, 1.2),
    Target("image L/14, batch 1", "ms", 0.6, _milliseconds(L14), True, ".3f"),
    *_speedups("text B/32, captions, batch 256", B32, "text", (256,), 4, 3),
    Target("image B/32", "of the GEMM rate", 0.65, _of_gemm(B32), form=".0%"),
    Target("image L/14", "of the GEMM rate", 0.68, _of_gemm(L14), form=".0%"),
    *(
        Target(f"{name}, T = 50", "of the copy rate", 0.8, _of_copy(case), form=".0%")
        for name, case in (
            ("attention", "attention 256x50x12x64"),
            ("LayerNorm", "layer_norm 12800x768"),
            ("residual + LayerNorm", "add_layer_norm 12800x768"),
        )
    ),
    Target("float16", "cosine to float64", 0.9999, _cosine("float16"), form=".6f"),
    Target("bfloat16", "cosine to float64", 0.999, _cosine("bfloat16"), form=".6f"),
    Target("float16", "error / torch's own", 1, _error, True),
]


def rows(stages: Stages) -> list[Row]:
    """The table of all targets."""
    return [target.row(stages) for target in TARGETS]
