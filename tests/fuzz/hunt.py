"""A long hunt in several processes: python tests/fuzz/hunt.py --inputs 1000000 --record hunt.json

Mutations of the seeds, each from a number of its own: the same inputs whenever the numbers are the
same. Findings go to --findings, an input and a text each; what ends or hangs a process is one, too.
--record adds to what the file has: inputs, seconds and outcomes of every target.
--write docs/fuzzing.md writes the table of that record.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
import zlib
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools"), str(Path(__file__).resolve().parent)]

import fuzz_guard  # noqa: E402
from fuzz_targets import TARGETS, work  # noqa: E402

PART = 500  # inputs between two reports of a process
ADDRESS_SPACE = 8 << 30  # bytes
STALLED = 300.0  # seconds without a report after which a process is ended
MARK = "<!-- hunt -->", "<!-- /hunt -->"


def one_input(name: str, number: int, seeds: list[bytes]) -> bytes:
    """The input of that number: up to three mutations of a seed."""
    rng = random.Random(f"{name} {number}")
    data = rng.choice(seeds)
    if number < len(seeds):
        return seeds[number]
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = TARGETS[name].mutate(rng, data)
    return data


def hunt(name: str, first: int, count: int, findings: Path) -> dict[str, Any]:
    """The inputs first, first + 1, ...: how many, seconds, outcomes."""
    target, outcomes, start = TARGETS[name], Counter[str](), time.process_time()
    seeds = list(target.seeds())
    current = os.open(findings / f"current-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
    for number in range(first, first + count):
        data = one_input(name, number, seeds)
        os.pwrite(current, f"{name} {number:<12}\n".encode(), 0)  # what a process died of
        try:
            outcomes[fuzz_guard.run(target.run, target.documented, data, work())] += 1
        except fuzz_guard.Finding:
            outcomes["FINDING"] += 1
            _keep(findings, name, number, data)
    os.close(current)
    os.unlink(findings / f"current-{os.getpid()}")
    seconds = time.process_time() - start
    return {"inputs": count, "seconds": seconds, "outcomes": dict(outcomes)}


def _keep(findings: Path, name: str, number: int, data: bytes) -> None:
    """An input, and where it led; of one place, the first only."""
    text = traceback.format_exc()
    where = [line for line in text.splitlines() if line.startswith("  File") and "fuzz" not in line]
    key = f"{zlib.crc32((where[-1] if where else text[-80:]).encode('utf-8', 'replace')):08x}"
    if not (findings / f"{name}-{key}.txt").exists():
        (findings / f"{name}-{key}.txt").write_text(
            f"input {number}\n{text}", "utf-8", "backslashreplace"
        )
        (findings / f"{name}-{key}.bin").write_bytes(data)


def _start() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    os.environ["NPCLIP_NUM_THREADS"] = "1"


def _work(tasks: Any, results: Any, findings: Path) -> None:
    _start()
    while (task := tasks.get()) is not None:
        results.put((task[0], hunt(*task, findings)))


def run(counts: dict[str, int], first: int, processes: int, findings: Path, seconds: float) -> Any:
    """All of it; (name, result) as they come. A process that dies is a finding, and replaced."""
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    parts = [
        (name, first + at, min(PART, count - at))
        for name, count in counts.items()
        for at in range(0, count, PART)
    ]
    random.Random(0).shuffle(parts)
    for task in [*parts, *[None] * processes]:
        tasks.put(task)
    workers = [_spawn(context, tasks, results, findings) for _ in range(processes)]
    end, last = time.monotonic() + seconds, time.monotonic()
    while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
        try:
            yield results.get(timeout=1)
            last = time.monotonic()
        except Exception:  # queue.Empty
            pass
        stalled = time.monotonic() - last > STALLED
        for i, worker in enumerate(workers):
            if worker.exitcode not in (None, 0) or (stalled and worker.is_alive()):
                worker.kill()
                current = findings / f"current-{worker.pid}"
                if current.exists():
                    current.rename(findings / f"died-{worker.exitcode}-{worker.pid}")
                yield "died", {"inputs": 0, "seconds": 0.0, "outcomes": {"FINDING": 1}}
                workers[i], last = _spawn(context, tasks, results, findings), time.monotonic()
    while not results.empty():
        yield results.get()
    for worker in workers:
        worker.kill()


def _spawn(context: Any, tasks: Any, results: Any, findings: Path) -> Any:
    worker = context.Process(target=_work, args=(tasks, results, findings))
    worker.start()
    return worker


def add(record: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """To the record of all hunts."""
    entry = record.setdefault(name, {"inputs": 0, "seconds": 0.0, "outcomes": {}})
    entry["inputs"] += found["inputs"]
    entry["seconds"] += found["seconds"]
    entry["outcomes"] = dict(Counter(entry["outcomes"]) + Counter(found["outcomes"]))


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| target | inputs | accepted | documented errors | findings | seconds |"]
    rows.append("|---|---|---|---|---|---|")
    for name in TARGETS:
        if not (entry := record.get(name)):
            continue
        outcomes = dict(entry["outcomes"])
        accepted, findings = outcomes.pop("accepted", 0), outcomes.pop("FINDING", 0)
        listed = ", ".join(f"{key} {count:,}" for key, count in sorted(outcomes.items()))
        cells = name, f"{entry['inputs']:,}", f"{accepted:,}", listed, f"{findings:,}"
        rows.append(f"| {' | '.join(cells)} | {entry['seconds']:,.0f} |")
    inputs, seconds = (sum(entry[k] for entry in record.values()) for k in ("inputs", "seconds"))
    died = record.get("died", {"outcomes": {"FINDING": 0}})["outcomes"]["FINDING"]
    total = f"{inputs:,} inputs in {seconds:,.0f} seconds of a CPU; {died} processes ended."
    return "\n".join([f"Until {date.today()}: {total}", "", *rows])


def write(path: Path, record: dict[str, Any]) -> None:
    """The table into the file, between its marks."""
    before, _, rest = path.read_text().partition(MARK[0])
    after = rest.partition(MARK[1])[2]
    path.write_text(f"{before}{MARK[0]}\n{table(record)}\n{MARK[1]}{after}")


def main() -> None:
    """Hunt, record, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=0, help="of all targets, by their shares")
    parser.add_argument("--target", choices=TARGETS, help="this one alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after that")
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--record", type=Path, help="JSON")
    parser.add_argument("--write", type=Path, help="Markdown")
    args = parser.parse_args()
    record = json.loads(args.record.read_text()) if args.record and args.record.exists() else {}
    names = [args.target] if args.target else list(TARGETS)
    total = sum(TARGETS[name].share for name in names)
    counts = {name: args.inputs * TARGETS[name].share // total for name in names}
    args.findings.mkdir(exist_ok=True)
    findings = args.findings.resolve()
    last = time.monotonic()
    os.environ["NPCLIP_FUZZ_FOLDER"] = str(work())  # what killed processes leave is in it, too
    for name, found in run(counts, args.first, args.processes, findings, args.seconds):
        add(record, name, found)
        if args.record:
            args.record.write_text(json.dumps(record, indent=1))
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(sum(entry["inputs"] for entry in record.values()), flush=True)
    if args.write:
        write(args.write, record)
    print(table(record))


if __name__ == "__main__":
    main()
