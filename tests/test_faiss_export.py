"""`npclip export`: what FAISS reads, and how much of the exact result it finds."""

import json
import sys

import numpy as np
import pytest

from npclip import search
from npclip.__main__ import main
from npclip.errors import BackendError, InputError
from npclip.provenance import Provenance
from npclip.search import faiss_export
from npclip.store import Reader, Writer

# SWIG's types, in Python 3.12
pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
MADE_BY = Provenance("ViT-B/32", "0" * 64, "float32", "as ever", False, 64, "0.1.0")
ROWS = 3000


@pytest.fixture(scope="module")
def faiss():
    return pytest.importorskip("faiss")


def clustered(rng, count, centres):
    """As embeddings are: around some directions, of any length."""
    rows = centres[rng.integers(0, len(centres), count)] + 0.5 * rng.standard_normal((count, 64))
    return rows * rng.uniform(1, 20, (count, 1))


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """The folder, and queries of length 1."""
    folder = tmp_path_factory.mktemp("export") / "index"
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, 64))
    with Writer(folder, MADE_BY, "image", format="npy", shard_rows=1300) as writer:
        for first in range(0, ROWS, 1000):
            ids = [f"id {i} \udcff" for i in range(first, first + 1000)]
            writer.append(ids, [f"{id}.jpg" for id in ids], clustered(rng, 1000, centres))
    queries = clustered(rng, 100, centres)
    return folder, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def recall(found, wanted):
    return np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, wanted, strict=True)])


@pytest.mark.parametrize(("hnsw_rows", "kind"), [(ROWS, "HNSW32,SQfp16"), (0, "IVF220,SQfp16")])
def test_faiss_finds_what_exact_search_finds(faiss, collection, tmp_path, hnsw_rows, kind):
    folder, queries = collection
    out = tmp_path / "index.faiss"
    with Reader(folder) as reader:
        assert faiss_export.export(reader, out, hnsw_rows=hnsw_rows) == kind
        wanted = search.top_k(reader, queries, 10)
    index = faiss.read_index(str(out))
    assert index.ntotal == ROWS
    scores, rows = index.search(queries.astype(np.float32), 10)
    assert recall(rows, wanted[1]) >= 0.95
    same = rows[:, 0] == wanted[1][:, 0]
    assert same.mean() >= 0.95
    np.testing.assert_allclose(scores[same, 0], wanted[0][same, 0], atol=2e-3)  # float16


def test_the_command_writes_the_names_and_where_they_came_from(
    faiss, collection, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(faiss_export, "ROWS_AT_A_TIME", 700)
    out = tmp_path / "index.faiss"
    assert main(["export", str(collection[0]), str(out)]) == 0
    assert f"HNSW32,SQfp16 of {ROWS} rows" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "index.faiss.jsonl").read_text().splitlines()]
    assert lines == [{"id": f"id {i} \udcff", "path": f"id {i} \udcff.jpg"} for i in range(ROWS)]
    about = json.loads((tmp_path / "index.faiss.json").read_text())
    assert Provenance.from_dict(about["provenance"]) == MADE_BY
    assert (about["kind"], about["rows"]) == ("image", ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.faiss", "index.faiss.json", "index.faiss.jsonl"
    ]  # fmt: skip


def test_the_sample_that_an_inverted_file_is_trained_on(collection):
    with Reader(collection[0]) as reader:
        for count in (1, 7, 100, ROWS, 10 * ROWS):
            sample = faiss_export._sample(reader, count)
            assert min(count, ROWS) <= len(sample) < 2 * min(count, ROWS) + 1
            np.testing.assert_allclose(np.linalg.norm(sample, axis=1), 1, atol=1e-6)


def test_zero_rows_stay_zero():
    rows = np.array([[0, 0], [3, 4]], np.float16)
    np.testing.assert_allclose(faiss_export._unit(rows), [[0, 0], [0.6, 0.8]], rtol=1e-6)


def test_a_collection_without_rows(faiss, tmp_path):
    with Writer(tmp_path / "index", MADE_BY, "image", format="npy"):
        pass
    with Reader(tmp_path / "index") as reader, pytest.raises(InputError, match="no embeddings"):
        faiss_export.export(reader, tmp_path / "out")


def test_without_faiss_the_error_says_what_to_install(collection, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with (
        Reader(collection[0]) as reader,
        pytest.raises(BackendError, match=r'pip install "npclip\[faiss\]"'),
    ):
        faiss_export.export(reader, tmp_path / "out")
    assert main(["export", str(collection[0]), str(tmp_path / "out")]) == 1
    assert not list(tmp_path.iterdir())
