"""python tools/tiny FOLDER: from download to weights and their card; or only the steps named.

python tools/tiny ~/tiny-data                    all; what takes long, and is there already, stays
python tools/tiny ~/tiny-data shards check       again, after a change of captions.py
python tools/tiny ~/tiny-data evaluate --model tiny
                                                 the table of docs/tiny.md
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import card, check, contact_sheet, download, render, shards, train, views

STEPS = "download", "render", "shards", "check", "sheets", "views", "train", "evaluate"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 where check finds a leak, and does no step after it."""
    parser = argparse.ArgumentParser(
        prog="python tools/tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="for all that is downloaded and made")
    parser.add_argument("steps", nargs="*", metavar="step", help=", ".join(STEPS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and views (%(default)s)")
    about = f"to evaluate (default: FOLDER/{train.WEIGHTS}; tiny: the one in npclip)"
    parser.add_argument("--model", help=about)
    about = "put what is evaluated, and the results, into this checkout"
    parser.add_argument("--write", action="store_true", help=about)
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    options.folder = options.folder.resolve()
    named = [step for step in STEPS if step in options.steps]
    for step in named or missing(options.folder):
        started = time.perf_counter()
        if step == "check" and check.check(options.folder):
            return 1
        run(step, options)
        print(f"{step}: {time.perf_counter() - started:.1f} s", flush=True)
    return 0


def missing(folder: Path) -> list[str]:
    """STEPS, but for shards and views that are there: the others find out by themselves."""
    made = {"shards": folder / shards.SUMMARY, "views": folder / views.LAST}
    return [step for step in STEPS if step not in made or not made[step].exists()]


def run(step: str, options: argparse.Namespace) -> None:
    """One of STEPS but for check."""
    folder = options.folder
    if step == "download":
        download.download(folder)
    elif step == "render":
        for source in shards.DRAWN:
            print(source.name, dict(render.render_source(source, folder, options.jobs)))
    elif step == "shards":
        shards.make_shards(folder, options.seed)
    elif step == "sheets":
        print(*contact_sheet.write_sheets(folder), sep="\n")
    elif step == "views":
        print(views.make_views(folder, options.jobs, options.seed))
    elif step == "train":
        print(train.train(folder))
    elif step == "evaluate":
        model = options.model or str(folder / train.WEIGHTS)
        print(card.results(folder, model, options.write), end="")


if __name__ == "__main__":
    sys.exit(main())
