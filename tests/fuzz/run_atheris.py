"""Coverage-guided fuzzing: python tests/fuzz/run_atheris.py --target pickle --runs 100000

    pip install "npclip[fuzz]"

What it keeps goes to a corpus of the target, --corpus DIR/TARGET; a finding ends it, with the input
in a file named crash-..., as libFuzzer does.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import types
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "tests"), str(ROOT / "tools")]

import fuzz_guard  # noqa: E402
import fuzz_targets  # noqa: E402


def instrument() -> int:
    """All functions of npclip, which is imported already; how many. Its imports are not hooked:
    atheris does not find a package that is installed editably."""
    functions = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "npclip":
            for value in vars(module).values():
                inside = vars(value).values() if isinstance(value, type) else [value]
                functions |= {f for f in inside if isinstance(f, types.FunctionType)}
    ours = [f for f in functions if f.__module__.startswith("npclip")]
    for function in ours:
        atheris.instrument_func(function)
    return len(ours)


def main() -> None:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=fuzz_targets.TARGETS, required=True)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    args = parser.parse_args()
    print(f"{instrument()} functions instrumented", flush=True)
    target, folder = fuzz_targets.TARGETS[args.target], args.corpus / args.target
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (folder / f"seed-{i}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        fuzz_guard.run(target.run, target.documented, data, fuzz_targets.work())

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return target.mutate(rng, data)[:max_size]

    limits = [f"-runs={args.runs}", f"-max_len={1 << 18}", "-timeout=120", "-rss_limit_mb=4096"]
    folder_of_files = fuzz_targets.work()
    if child := os.fork():  # libFuzzer ends its process at once: this one tidies up
        _, status = os.waitpid(child, 0)
        shutil.rmtree(folder_of_files)
        sys.exit(os.waitstatus_to_exitcode(status))
    atheris.Setup([sys.argv[0], *limits, str(folder)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
