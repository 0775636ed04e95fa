"""What gpu_check.py has found, as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import gpu_targets

Row = dict[str, Any]
Column = tuple[str, str, str]  # title, key, format
MODEL_COLUMNS: list[Column] = [
    ("model", "model", ""), ("", "what", ""), ("dtype", "dtype", ""), ("batch", "batch", "d"),
    ("ms", "milliseconds", ".3f"), ("per second", "per_second", ".0f"),
    ("of GEMM rate", "of_gemm", ".0%"), ("cosine", "cosine", ".6f"), ("error", "error", ""),
]  # fmt: skip
TIMING_COLUMNS: list[Column] = [
    ("op", "case", ""), ("dtype", "dtype", ""), ("us", "microseconds", ".1f"),
    ("GB/s", "gb_s", ".0f"), ("of copy", "of_copy", ".0%"), ("TFLOP/s", "tflop_s", ".1f"),
    ("of GEMM rate", "of_gemm", ".0%"), ("of roof", "of_roof", ".0%"), ("error", "error", ""),
]  # fmt: skip
PRODUCT_COLUMNS: list[Column] = [
    ("N x K x M", "case", ""), ("chosen, us", "chosen", ".1f"), ("of roof", "of_roof", ".0%"),
    ("best own", "own", ""), ("us", "own_microseconds", ".1f"),
    ("cuBLASLt, us", "cublaslt_microseconds", ".1f"),
]  # fmt: skip
PEER_COLUMNS: list[Column] = [
    ("model", "model", ""), ("", "what", ""), ("batch", "batch", "d"), ("peer", "peer", ""),
    ("npclip, ms", "npclip_milliseconds", ".3f"), ("peer, ms", "milliseconds", ".3f"),
    ("times faster", "ratio", ".2f"), ("cosine", "cosine", ".6f"),
    ("error of npclip", "error_of_npclip", ".1e"), ("of the peer", "error_of_peer", ".1e"),
    ("graph breaks", "graph_breaks", "d"), ("not as graphs", "cudagraph_skips", "d"),
    ("error", "error", ""),
]  # fmt: skip
TARGET_COLUMNS: list[Column] = [
    ("case", "case", ""), ("", "what", ""), ("target", "target", ""),
    ("measured", "measured", ""), ("status", "status", ""),
]  # fmt: skip
LAUNCH_COLUMNS: list[Column] = [
    ("model", "model", ""), ("batch", "batch", "d"),
    ("launch by launch, ms", "eager_milliseconds", ".3f"),
    ("as a graph, ms", "graph_milliseconds", ".3f"),
]  # fmt: skip
CELL = 120  # characters


def cell(value: Any, form: str = "") -> str:
    """A value as it stands in a table; nothing for None."""
    if value is None:
        return ""
    text = format(value, form) if form else str(value)
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= CELL else f"{text[: CELL - 3]}..."


def table(columns: list[Column], rows: Iterable[Row]) -> str:
    """A Markdown table; columns in which no row has anything are left out."""
    rows = list(rows)
    shown = [c for c in columns if any(row.get(c[1]) is not None for row in rows)]
    lines = [[title for title, _, _ in shown], ["---"] * len(shown)]
    lines += [[cell(row.get(key), form) for _, key, form in shown] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""


def failures(results: Row) -> list[str]:
    """Stages that broke off, and rows that are not right."""
    found = []
    for name, stage in results["stages"].items():
        if stage["status"] in ("failed", "timed out"):
            reason = stage["reason"].strip().splitlines()
            found.append(f"{name}: {stage['status']}: {reason[0] if reason else ''} "
                         f"{reason[-1] if len(reason) > 1 else ''}".rstrip())  # fmt: skip
        for row in stage["rows"]:
            if row.get("ok") is False:
                what = {k: v for k, v in row.items() if k not in ("ok", "report")}
                found.append(f"{name}: " + ", ".join(f"{k} {_short(v)}" for k, v in what.items()))
    return found


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else cell(value)


def best_products(rows: list[Row]) -> list[Row]:
    """One row for every shape that was timed: what npclip chose, our best, cuBLASLt's best."""
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        if "microseconds" in row:
            shapes.setdefault(row["case"], []).append(row)
    found = []
    for case, ways in shapes.items():
        ours, theirs, chosen = (
            min((w for w in ways if belongs(w["way"])), key=_microseconds, default={})
            for belongs in (_is_own, _is_cublaslt, _is_chosen)
        )
        found.append({
            "case": case.removeprefix("linear "),
            "chosen": chosen.get("microseconds"),
            "of_roof": chosen.get("of_roof"),
            "own": ours.get("way"),
            "own_microseconds": ours.get("microseconds"),
            "cublaslt_microseconds": theirs.get("microseconds"),
        })  # fmt: skip
    return found


def _microseconds(row: Row) -> float:
    return row["microseconds"]


def _is_own(way: str) -> bool:
    return not _is_cublaslt(way) and not _is_chosen(way)


def _is_cublaslt(way: str) -> bool:
    return way.startswith("cublaslt")


def _is_chosen(way: str) -> bool:
    return way == "chosen"


def environment(facts: Row) -> str:
    """One paragraph."""
    if "device" not in facts:
        return f"Python {facts.get('python', '?')}, NVRTC: {', '.join(facts.get('nvrtc', []))}.\n"
    rates = ""
    if "gemm_tflop_s" in facts:
        rates = (f" Measured: copies {facts['copy_gb_s']:.0f} GB/s (read and written), "
                 f"an 8192^3 float16 product {facts['gemm_tflop_s']:.0f} TFLOP/s.")  # fmt: skip
    return (
        f"{facts['device']}, compute capability {facts['capability']}, {facts['memory_gib']} GiB, "
        f"{facts['l2_mib']} MiB of L2, driver for CUDA {facts['driver_cuda']}; CuPy "
        f"{facts['cupy']} with CUDA {facts['runtime_cuda']}, {', '.join(facts['nvrtc'])} "
        f"(used: {facts.get('compiler')}), cuBLASLt {facts['cublaslt']}.{rates}\n"
    )


def _checked(stage: Row) -> str:
    wrong = sum(row.get("ok") is False for row in stage["rows"])
    left_out = len(stage["facts"].get("left_out", []))
    return f"{len(stage['rows'])} checked, {wrong} wrong, {left_out} not reached.\n"


def _launches(stage: Row) -> str:
    facts = stage["facts"]
    text = ""
    if "launch_microseconds" in facts:
        text = f"One launch costs the host {facts['launch_microseconds']:.1f} us.\n\n"
    text += table(LAUNCH_COLUMNS, [row for row in stage["rows"] if "batch" in row])
    threads = [row for row in stage["rows"] if "threads" in row]
    words = (f"{row['threads']} {'equal' if row['ok'] else 'DIFFERENT'}" for row in threads)
    return text + (f"\nThreads at once: {', '.join(words)}.\n" if threads else "")


SECTIONS: dict[str, Callable[[Row], str]] = {
    "environment": lambda stage: environment(stage["facts"]),
    "goldens": _checked,
    "compile": lambda stage: f"{stage['facts'].get('compiled', 0)} kernels of products.\n",
    "kernels": _checked,
    "sanitizer": lambda stage: table([("tool", "tool", ""), ("", "result", "")], stage["rows"]),
    "timings": lambda stage: table(TIMING_COLUMNS, stage["rows"]),
    "products": lambda stage: table(PRODUCT_COLUMNS, best_products(stage["rows"])),
    "launches": _launches,
    "models": lambda stage: table(MODEL_COLUMNS, stage["rows"]),
}


def _peers(stage: Row) -> str:
    text, facts = table(PEER_COLUMNS, stage["rows"]), stage["facts"]
    lines = [f"{name}: {reason}" for name, reason in facts.get("missing", {}).items()]
    lines += [f"{what}: no time left" for what in facts.get("left_out", [])]
    return text + (f"\nNot measured: {'; '.join(lines)}.\n" if lines else "")


def end_to_end(stages: Row) -> str:
    """Milliseconds of npclip and of all peers, a line for every model and batch."""
    lines: dict[tuple[str, str, int], Row] = {}
    for row in gpu_targets.rows_of(stages, "models"):
        if row.get("dtype") == "float16" and "milliseconds" in row:
            _line(lines, row)["npclip"] = row["milliseconds"]
    peers: dict[str, None] = {}
    for row in gpu_targets.rows_of(stages, "peers-"):
        if "milliseconds" in row:
            peers[row["peer"]] = None
            line = _line(lines, row)
            line.setdefault("npclip", row["npclip_milliseconds"])
            line[row["peer"]] = f"{row['milliseconds']:.3f} ({row['ratio']:.2f}x)"
    columns: list[Column] = [("model", "model", ""), ("", "what", ""), ("batch", "batch", "d"),
                             ("npclip", "npclip", ".3f")]  # fmt: skip
    return table([*columns, *((peer, peer, "") for peer in peers)], lines.values())


def _line(lines: dict[tuple[str, str, int], Row], row: Row) -> Row:
    key = {name: row[name] for name in ("model", "what", "batch")}
    return lines.setdefault(tuple(key.values()), dict(key))


def markdown(results: Row) -> str:
    """The whole report, most detailed first, so that its end is what matters most."""
    text = f"# GPU check, {results['date']}\n"
    for name, stage in results["stages"].items():
        section = SECTIONS.get(name, _peers)
        if stage["rows"] or stage["facts"]:
            text += f"\n## {name}\n\n{section(stage)}"
    if overview := end_to_end(results["stages"]):
        text += f"\n## end to end\n\nMilliseconds; in brackets: times npclip's.\n\n{overview}"
    columns: list[Column] = [("stage", "name", ""), ("status", "status", ""),
                             ("s", "seconds", ".0f"), ("left out", "count", "d"),
                             ("GPU", "device", ""), ("code", "code", ""),
                             ("reason", "reason", "")]  # fmt: skip
    rows = [{"name": name, **stage, "count": len(stage["facts"].get("left_out", []))}
            for name, stage in results["stages"].items()]  # fmt: skip
    text += f"\n## stages\n\n{table(columns, rows)}"
    device = results["stages"].get("environment", {}).get("facts", {}).get("device", "no GPU")
    goals = table(TARGET_COLUMNS, gpu_targets.rows(results["stages"]))
    text += f"\n## targets\n\nThey are for an NVIDIA H200. Measured: {device}.\n\n{goals}"
    trouble = results["stages"].get("environment", {}).get("facts", {}).get("trouble", [])
    missing = [f"not installed: {line}" for line in results.get("missing", [])] + trouble
    if missing:
        text += "\n## missing here\n\n" + "".join(f"- {line}\n" for line in missing)
    wrong = failures(results)
    text += f"\n{len(wrong)} failures\n" + "".join(f"- {line}\n" for line in wrong)
    return text
