"""A short hunt by hypothesis: pytest tests/fuzz. hunt.py and run_atheris.py are for long ones."""

import os
import random
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
if os.name == "nt":
    pytest.skip("signals and descriptors of POSIX", allow_module_level=True)

import fuzz_guard
import fuzz_mutate
import hunt
from fuzz_targets import TARGETS, work
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npclip.errors import ImageError
from npclip.sources import read_path

EXAMPLES = 2000  # of all targets together, by their shares, and some more of each
bounded = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name):
    target = TARGETS[name]
    seeds = list(target.seeds())

    @settings(bounded, max_examples=30 + EXAMPLES * target.share // 1000)
    @given(st.integers(len(seeds), 2**32))
    def each(number):
        data = hunt.one_input(name, number, seeds)
        fuzz_guard.run(target.run, target.documented, data, work())

    each()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name):
    target = TARGETS[name]

    @settings(bounded, max_examples=20)
    @given(st.binary(max_size=200))
    def each(data):
        fuzz_guard.run(target.run, target.documented, data, work())

    each()


FOUND = sorted((Path(__file__).parent / "findings").iterdir())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_earlier_findings(path):
    """Inputs whose target is the first word of the name."""
    target = TARGETS[path.name.partition("-")[0]]
    fuzz_guard.run(target.run, target.documented, path.read_bytes(), work())


def test_a_parquet_footer_that_counts_rows_which_are_not_there(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes((FOUND[0].parent / "parquet-footer-counts-other-rows.bin").read_bytes())
    messages = []
    for row in range(20):
        try:
            read_path(f"{path}::{row}")
        except ImageError as error:
            messages.append(str(error))
    assert any("fewer rows than its footer says" in message for message in messages), messages


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_sound(name):
    """At least one of the seeds is accepted: else the target tries nothing but its first check."""
    target = TARGETS[name]
    outcomes = [
        fuzz_guard.run(target.run, target.documented, seed, work()) for seed in target.seeds()
    ]
    assert "accepted" in outcomes


def _writes_outside(data):
    os.mkdir(os.path.join(os.path.dirname(work()), "npclip-fuzz-outside", data.decode()))


def _starts_a_program(data):
    os.system("true")


def _takes_for_ever(data):
    while True:
        pass


def _takes_memory(data):
    bytearray(b"x") * (fuzz_guard.MORE_MEMORY + (8 << 20))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_writes_outside, "os.mkdir"),
        (_starts_a_program, "os.system"),
        (_takes_for_ever, "too long"),
        (_takes_memory, "MiB more memory"),
        (lambda data: {}["x"], "undocumented KeyError"),
    ],
)
def test_the_guard_finds(function, message, monkeypatch):
    monkeypatch.setattr(fuzz_guard, "CPU_SECONDS", 1.0)
    monkeypatch.setattr(fuzz_guard, "MORE_MEMORY", 64 << 20)
    with pytest.raises(fuzz_guard.Finding, match=message):
        fuzz_guard.run(function, (OSError,), b"x", work())


def test_a_packed_folder_comes_back():
    files = {"a.json": b"{}", "\udcff": b"", "b": bytes(300)}
    assert fuzz_mutate.unpack(fuzz_mutate.pack(files)) == files
    rng = random.Random(0)
    for _ in range(300):
        for name in fuzz_mutate.unpack(rng.randbytes(rng.randrange(200))):
            assert name not in ("", ".", "..") and "/" not in name
