#!/usr/bin/env python3
"""Check and time npclip on this machine's GPU, in one command and a given time.

    python tools/gpu_check.py --budget 540 --out results
    python tools/gpu_check.py --budget 120 --out results --stages kernels,timings
    python tools/gpu_check.py --budget 540 --out more --resume results/gpu_check.json

npclip must be installed; where there is no network:
`pip install --no-build-isolation --no-index --no-deps .` What else is missing is said first.

Every stage runs in a process of its own and has its own time limit: a share of what is left, so
that what one stage does not need goes to the later ones. A stage that fails or takes too long is
recorded with its error, and with what it had found until then, and the others go on. After each
stage results/gpu_check.json is written anew, and at the end results/gpu_check.md, which is printed.
A second run with the same --out, or with --resume, goes on where the first one ended: what was
measured on the same GPU with the same code is kept, so several short runs make one whole one;
the earlier file stays as gpu_check.earlier.json.

    environment   the GPU, versions, measured rates: copies, an 8192^3 matrix product
    goldens       what single instructions compute, into results/goldens.npz (tests/cuda)
    compile       the kernels of all matrix products, on all cores; they are kept on disk
    kernels       every op, dtype and shape against float64: outputs poisoned, three equal repeats
    sanitizer     compute-sanitizer's memcheck and racecheck, of tiny shapes
    timings       every op: GB/s and TFLOP/s, and how much that is of the measured rates
    peers-*       towers of random models beside torch (eager, compiled), ONNX Runtime, TensorRT
    products      matrix products: every way to compute them, right for every epilogue; by shape
    launches      what a launch costs, alone and in a graph; three threads, each on its stream
    models        the towers alone, batches 1 to 1024

Without a GPU every stage that needs one is recorded as skipped. The exit status is 1 if a stage
failed, took too long, or found a wrong result.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import platform
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_report
from gpu_journal import Journal, is_good, run_process, write_json, write_whole

RESERVE = 2.0  # seconds for the report
MARGIN = 0.9  # of its time limit, a stage plans with so much
LOG_LINES = 15  # of what a stage that broke off has printed
RESULTS, EARLIER_RESULTS = "gpu_check.json", "gpu_check.earlier.json"
EARLIER = ".earlier.json"  # what a stage found, as its process is told
INSTALL = "pip install --no-build-isolation --no-index --no-deps ."
SOURCES = (".py", ".cu", ".cuh", ".c", ".h")
ROOT = Path(__file__).parents[1]
NEEDED = {  # module -> what there is not without it
    "cupy": "all that needs a GPU",
    "torch": "all peers",
    "transformers": "the first choice of a peer (open_clip and clip are others)",
    "triton": "torch.compile",
    "onnxruntime": "ONNX Runtime and TensorRT as peers",
}


@dataclass(frozen=True)
class Stage:
    """A function of a module beside this file, called with a Journal, a folder and options."""

    module: str
    function: str
    share: float  # of the time: in seconds, where the whole is 600
    options: tuple[Any, ...] = ()
    is_default: bool = True
    is_repeated: bool = False  # in every run: it is short, or leaves something on the machine


STAGES = {
    "environment": Stage("gpu_rates", "environment", 25, is_repeated=True),
    "goldens": Stage("gpu_goldens", "golden_stage", 20, is_repeated=True),
    "compile": Stage("gpu_products", "compile_stage", 25, is_repeated=True),
    "kernels": Stage("gpu_kernels", "check_stage", 70),
    "sanitizer": Stage("gpu_kernels", "sanitizer_stage", 45),
    "timings": Stage("gpu_kernels", "timing_stage", 40),
    "peers-B/32": Stage("gpu_peers", "peer_stage", 80, ("ViT-B/32", "image")),
    "peers-L/14": Stage("gpu_peers", "peer_stage", 70, ("ViT-L/14", "image")),
    "peers-text": Stage("gpu_peers", "peer_stage", 35, ("ViT-B/32", "text")),
    "peers-L/14@336": Stage("gpu_peers", "peer_stage", 30, ("ViT-L/14@336px", "image")),
    "peers-B/16": Stage("gpu_peers", "peer_stage", 25, ("ViT-B/16", "image")),
    "products": Stage("gpu_products", "product_stage", 40),
    "launches": Stage("gpu_models", "launch_stage", 25),
    "models": Stage("gpu_models", "model_stage", 105),
    "tiny": Stage("gpu_kernels", "tiny_stage", 30, is_default=False),  # for compute-sanitizer
}


def allowance(left: float, names: list[str]) -> float:
    """Seconds for the first of the stages that are still to be run."""
    shares = [STAGES[name].share for name in names]
    return max(0.0, left) * shares[0] / sum(shares)


def chosen_stages(text: str | None) -> list[str]:
    """Names of stages, in the order of STAGES; "peers" stands for all that begin so.

    The environment is always among them: it says which GPU this is.
    """
    if text is None:
        return [name for name, stage in STAGES.items() if stage.is_default]
    words = text.split(",")
    for word in words:
        if not any(name == word or name.startswith(f"{word}-") for name in STAGES):
            raise ValueError(f"no stage {word!r}, but: {', '.join(STAGES)}")
    words += [name for name in STAGES if name == "environment"]
    return [n for n in STAGES if any(n == w or n.startswith(f"{w}-") for w in words)]


def missing_here() -> list[str]:
    """What is not installed, and what cannot be done without it."""
    found = []
    for module, loss in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            found.append(f"{module}: {loss}")
    return found


def code_key(folders: tuple[Path, ...] = (ROOT / "npclip", ROOT / "kernels")) -> str:
    """Of the sources that are measured."""
    files = (f for folder in folders for f in folder.rglob("*") if f.suffix in SOURCES)
    key = hashlib.sha256()
    for file in sorted(files):
        key.update(f"{file.name}\0".encode() + file.read_bytes())
    return key.hexdigest()[:12]


def is_complete(stage: dict[str, Any]) -> bool:
    """Whether there is nothing left of it for another run."""
    return stage["status"] == "done" and all(map(is_good, stage["rows"]))


def run_stage(
    name: str, seconds: float, out: Path, work: Path, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run a stage in a process of its own; what it found, whatever happened to it.

    earlier: what it found in another run.
    """
    slug = name.replace("/", "-")
    path, log = work / f"{slug}.json", work / f"{slug}.log"
    if earlier:
        write_json(work / f"{slug}{EARLIER}", earlier)
    folders = ["--out", str(out), "--work", str(work)]
    command = [sys.executable, __file__, "--run", name, "--budget", str(seconds), *folders]
    start = time.monotonic()
    code = run_process(command, seconds, log)
    empty = {"status": "running", "reason": "", "facts": {}, "rows": []}
    result = json.loads(path.read_text()) if path.exists() else empty
    if result["status"] == "running":
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        how = f"took more than {seconds:.0f} s" if code is None else f"ended with status {code}"
        result["status"] = "timed out" if code is None else "failed"
        result["reason"] = f"{how}\n{tail}".strip()
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def run_here(name: str, seconds: float, out: Path, work: Path) -> None:
    """Run a stage in this process."""
    stage, slug = STAGES[name], name.replace("/", "-")
    known = work / f"{slug}{EARLIER}"
    earlier = json.loads(known.read_text()) if known.exists() else None
    journal = Journal(work / f"{slug}.json", MARGIN * seconds, earlier)
    try:
        function = getattr(importlib.import_module(stage.module), stage.function)
        reason = function(journal, out, work, *stage.options)
    except Exception:
        traceback.print_exc()
        journal.close("failed", traceback.format_exc(limit=-4))
    else:
        journal.close("skipped" if reason else "done", reason or "")


def run_all(
    names: list[str], budget: float, out: Path, old: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run stages one after the other within the budget; write and return all their results.

    old: the results of an earlier run. Those of the same code on the same GPU are kept.
    """
    end = time.monotonic() + budget - RESERVE
    known = old["stages"] if old else {}
    found: dict[str, Any] = {}
    mine: dict[str, Any] = {"code": code_key(), "device": None}
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "budget": budget,
        "python": platform.python_version(),
        "missing": missing_here(),
        "stages": found,
    }
    for line in results["missing"]:
        print(f"not installed: {line}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:
        for i, name in enumerate(names):
            todo = [n for n in names[i:] if not is_kept(n, known.get(n), mine)]
            if name not in todo:
                found[name] = known[name]
                continue
            seconds = allowance(end - time.monotonic(), todo)
            print(f"{name}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
            earlier = None if STAGES[name].is_repeated else fitting(known.get(name), mine)
            stage = run_stage(name, seconds, out, Path(work), earlier)
            mine["device"] = stage["facts"].get("device", mine["device"])
            found[name] = {**stage, **mine}
            print(f"{name}: {stage['status']} {stage['reason']}", file=sys.stderr, flush=True)
            for line in stage["facts"].get("trouble", []):
                print(f"here: {line}", file=sys.stderr, flush=True)
            write_results(out, results, known, mine)
    write_results(out, results, known, mine)
    return results


def fitting(stage: dict[str, Any] | None, mine: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier stage, if it was run with this code on this GPU."""
    return stage if stage and all(stage.get(k) == v for k, v in mine.items()) else None


def is_kept(name: str, stage: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
    """Whether an earlier stage needs no other run."""
    stage = fitting(stage, mine)
    return bool(stage and is_complete(stage) and not STAGES[name].is_repeated)


def write_results(
    out: Path, results: dict[str, Any], known: dict[str, Any], mine: dict[str, Any]
) -> None:
    """With those of the earlier run that still hold, in the order of STAGES."""
    found = results["stages"]
    for name in STAGES:
        if name in found or fitting(known.get(name), mine):
            found[name] = found.pop(name, known.get(name))
    write_json(out / RESULTS, results)
    write_whole(out / "gpu_check.md", gpu_report.markdown(results))


def read_results(path: Path, keep_as: Path) -> dict[str, Any] | None:
    """Of an earlier run, if there was one. It is copied: what does not hold any more is dropped."""
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    write_json(keep_as, results)
    return results


def parser() -> argparse.ArgumentParser:
    """The command line; --run and --work are for the processes that this program starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    known = ", ".join(name for name in STAGES if STAGES[name].is_default)
    parser.add_argument("--stages", metavar="LIST", help=f"of: {known}")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help=f"go on from there, not from DIR/{RESULTS}"
    )
    parser.add_argument("--anew", action="store_true", help="measure everything again")
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, print the tables."""
    line = parser()
    args = line.parse_args(arguments)
    try:
        importlib.import_module("npclip")
    except ImportError as error:
        line.error(f"npclip does not load ({error}): {INSTALL}")
    if args.resume and not args.resume.exists():
        line.error(f"there is no {args.resume}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.run:
        run_here(args.run, args.budget, args.out, args.work or args.out)
        return 0
    try:
        names = chosen_stages(args.stages)
    except ValueError as error:
        line.error(str(error))
    earlier = args.resume or args.out / RESULTS
    old = None if args.anew else read_results(earlier, args.out / EARLIER_RESULTS)
    results = run_all(names, args.budget, args.out, old)
    print(gpu_report.markdown(results), end="")
    return 1 if gpu_report.failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
