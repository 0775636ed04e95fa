"""The model card, docs/tiny.md: its tables are written here, between their markers."""

from __future__ import annotations

import shutil
from pathlib import Path

from parity import replace_between_markers

import npclip
from npclip.hub import BUNDLED

from .check import licences, read
from .evaluate import evaluate
from .failures import failures

DOCS = Path(__file__).resolve().parents[2] / "docs"
CARD, FAILURES = DOCS / "tiny.md", DOCS / "tiny-failures.png"


def results(folder: Path, weights: str, write: bool = False) -> str:
    """The table of results of a model: a file, or a name of npclip's.

    write: into the card of this checkout, with the table of sources and the picture of failures;
    a file is then also put in the place of npclip's own weights.
    """
    model = npclip.load(weights)
    table = evaluate(folder, model)
    if write:
        about = f"Of the weights with the SHA-256 `{model.provenance().weights_sha256}`:\n\n"
        replace_between_markers(CARD, about + table, *_markers("results"))
        sources = licences(read(folder / "shards" / "train")) + "\n"
        replace_between_markers(CARD, sources, *_markers("sources"))
        failures(folder, model).quantize(128).save(FAILURES, optimize=True)
        if weights not in BUNDLED:
            shutil.copyfile(weights, BUNDLED["tiny"])
    return table


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
