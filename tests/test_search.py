"""Search: exact neighbours of any collection, what is looked for, and `npclip search`."""

import json
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image
from safetensors.numpy import save_file

import npclip
from npclip import search
from npclip.__main__ import main
from npclip.bulk import embed
from npclip.config import Metadata
from npclip.errors import ImageError, InputError, ProvenanceError, StoreError
from npclip.provenance import Provenance
from npclip.store import Reader, Writer

SMALL = Provenance("ViT-B/32", "0" * 64, "float32", "as ever", True, 4, "0.1.0")
NAMES = ["rot.png", "grün.png", "blau.png", "<b>&\"'.png", "a b.png"]
WORDS = tiny_models.WORDS


@dataclass
class Rows:
    """What top_k reads of a Reader."""

    array: np.ndarray
    provenance: Provenance = SMALL

    @property
    def dimension(self):
        return self.array.shape[1]

    def __len__(self):
        return len(self.array)

    def blocks(self, rows):
        for first in range(0, len(self), rows):
            yield first, self.array[first : first + rows]


def by_sorting(rows, queries, k):
    """(scores, rows) of exact dot products: the definition."""
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    order = np.lexsort((np.broadcast_to(np.arange(len(rows)), scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), order


@given(
    st.integers(0, 60), st.integers(0, 4), st.integers(1, 70), st.integers(1, 80),
    st.integers(0, 2**32 - 1), st.sampled_from([np.float16, np.float32]),
)  # fmt: skip
def test_top_k_is_sorting_with_ties_by_the_lower_row(n, q, k, at_a_time, seed, dtype):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, (n, 4)).astype(dtype)  # many ties, every product exact
    queries = rng.integers(-2, 3, (q, 4)).astype(np.float32)
    scores, numbers = search.top_k(Rows(rows), queries, k, rows_at_a_time=at_a_time)
    wanted = by_sorting(rows, queries, k)
    assert scores.dtype == np.float32
    assert numbers.dtype == np.int64
    assert scores.shape == numbers.shape == (q, min(k, n))
    assert_array_equal(scores, wanted[0])
    assert_array_equal(numbers, wanted[1])


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_top_k_of_sorted_scores(sign):
    rows = sign * np.arange(500, dtype=np.float32)[:, None] / 7
    scores, numbers = search.top_k(Rows(rows), np.ones((1, 1)), 3, rows_at_a_time=50)
    assert numbers.tolist() == [[499, 498, 497] if sign > 0 else [0, 1, 2]]
    assert_array_equal(scores[0], rows[numbers[0], 0])


def test_rows_that_were_not_normalised_are_divided_by_their_lengths():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((100, 4)) * rng.integers(1, 100, (100, 1))).astype(np.float16)
    rows[17] = 0
    query = rng.standard_normal((2, 4))
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    raw = Rows(rows, replace(SMALL, normalized=False))
    scores, numbers = search.top_k(raw, query, 100, rows_at_a_time=9)
    lengths = np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
    unit = rows / np.where(lengths > 0, lengths, 1)
    cosines = (query @ unit.T)[np.arange(2)[:, None], numbers]
    np.testing.assert_allclose(scores, cosines, atol=2e-7)
    assert (np.diff(scores) <= 0).all()
    assert (scores[numbers == 17] == 0).all()


def test_blocks_are_smaller_where_there_are_many_queries(monkeypatch):
    monkeypatch.setattr(search, "SCORES_AT_A_TIME", 30)
    sizes = []

    class Watched(Rows):
        def blocks(self, rows):
            sizes.append(rows)
            yield from super().blocks(rows)

    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    search.top_k(Watched(rows), rows, 1)
    search.top_k(Watched(rows), np.tile(rows, (4, 1)), 1)
    assert sizes == [3, 1]


@pytest.mark.parametrize(
    ("queries", "k", "match"),
    [
        (np.zeros((1, 3)), 1, r"\[Q, 4\], not float64 \[1, 3\]"),
        (np.zeros(4), 1, r"not float64 \[4\]"),
        (np.zeros((1, 4), int), 1, "floating-point"),
        (np.full((1, 4), np.nan), 1, "finite"),
        (np.zeros((1, 4)), 0, "at least 1, not 0"),
    ],
)
def test_wrong_arguments_of_top_k(queries, k, match):
    with pytest.raises(InputError, match=match):
        search.top_k(Rows(np.zeros((2, 4), np.float32)), queries, k)


def test_rows_that_are_not_finite_are_an_error():
    for bad in (np.nan, np.inf):
        rows = np.ones((5, 4), np.float32)
        rows[3, 2] = bad
        with pytest.raises(StoreError, match="not finite"):
            search.top_k(Rows(rows), np.ones((1, 4)), 5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny model's checkpoint."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    arrays = tiny_models.weights(WORDS)
    save_file(arrays, path, Metadata(activation="gelu").to_strings())
    return path


@pytest.fixture(scope="module")
def model(path):
    return npclip.load(path, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of one colour each."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for name in NAMES:
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(folder / name)
    return folder


def make_index(folder, model, photos, format="npy", normalized=True, shard_rows=2):
    paths = [str(photos / name) for name in NAMES]
    provenance = model.provenance(normalized)
    with Writer(
        folder, provenance, "image", dtype="float32", format=format, shard_rows=shard_rows
    ) as writer:
        writer.append(NAMES, paths, model.encode_image(paths, normalize=normalized))
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory, model, photos):
    return make_index(tmp_path_factory.mktemp("index") / "index", model, photos)


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("normalized", [True, False])
def test_an_image_finds_itself_first(tmp_path, model, photos, format, normalized):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    folder = make_index(tmp_path / "index", model, photos, format, normalized)
    with Reader(folder) as reader:
        for name in NAMES:
            hits = search.search(reader, model, [str(photos / name)], top=3)
            assert len(hits) == 3
            assert (hits[0].id, hits[0].path) == (name, str(photos / name))
            assert hits[0].score == pytest.approx(1, abs=1e-6)


def test_several_queries_are_added(index, model, photos):
    queries = ["a word", str(photos / NAMES[1]), "another"]
    texts = model.encode_text([queries[0], queries[2]], normalize=True).astype(float)
    total = texts.sum(0) + model.encode_image(queries[1], normalize=True)
    query = search.embed_query(model, queries)
    np.testing.assert_allclose(query, total / np.linalg.norm(total), atol=1e-6)
    rows = model.encode_image([photos / name for name in NAMES], normalize=True)
    with Reader(index) as reader:
        found = search.search(reader, model, queries, top=99)
    assert [hit.id for hit in found] == [NAMES[i] for i in np.argsort(-(rows @ query))]
    np.testing.assert_allclose([h.score for h in found], np.sort(rows @ query)[::-1], atol=1e-6)


@pytest.mark.parametrize(("queries", "match"), [([], "no query"), (["a", " "], "an empty query")])
def test_queries_that_say_nothing(model, queries, match):
    with pytest.raises(InputError, match=match):
        search.embed_query(model, queries)


def test_queries_that_cancel_out(model, monkeypatch):
    signs = {"for": 1, "against": -1}
    monkeypatch.setattr(
        npclip.CLIP, "encode_text", lambda self, text, normalize: np.full(4, 0.5) * signs[text]
    )
    with pytest.raises(InputError, match="cancel out"):
        search.embed_query(model, ["for", "against"])


def test_only_the_towers_that_are_needed_are_read(index, path, photos):
    image = str(photos / NAMES[0])
    with Reader(index) as reader:
        for queries, towers in ((["x"], "text"), ([image], "image"), (["x", image], "image+text")):
            assert f"CLIP({towers}," in repr(search.load_model(reader, queries, path, "cpu"))


def test_another_model_is_refused_before_anything_is_embedded(index, tmp_path, path, monkeypatch):
    monkeypatch.setattr(search, "embed_query", lambda *_: pytest.fail("embedded"))
    other = tmp_path / "other.safetensors"
    arrays = {k: np.asarray(v + np.float32(0.01)) for k, v in tiny_models.weights(WORDS).items()}
    save_file(arrays, other, Metadata(activation="gelu").to_strings())
    with Reader(index) as reader, pytest.raises(ProvenanceError, match=r"index has.*SHA-256"):
        search.load_model(reader, ["x"], other, "cpu")
    assert main(["search", str(index), "x", "--model", str(other)]) == 1


def test_the_model_is_loaded_in_the_dtype_of_the_collection(tmp_path, path, photos):
    model = npclip.load(path, "cpu", "bfloat16")
    with Reader(make_index(tmp_path / "index", model, photos)) as reader:
        assert search.load_model(reader, ["x"], path, "cpu").dtype == "bfloat16"


def test_a_collection_that_was_decoded_fast_is_searched(capsys, tmp_path, path, photos):
    embed(photos, tmp_path / "fast", npclip.load(path, "cpu"), fast_decode=True)
    code, out, _ = command(capsys, tmp_path / "fast", photos / NAMES[0], "--model", path)
    assert (code, out.splitlines()[0]) == (0, f"1.0000  {photos / NAMES[0]}")


def command(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = main(["search", *map(str, arguments), "--device", "cpu"])
    return code, *capsys.readouterr()


def test_the_command_prints_scores_and_paths(capsys, index, path, photos):
    query = photos / NAMES[2]
    code, out, err = command(capsys, index, query, "--model", path, "--top", 2)
    assert (code, err) == (0, "")
    lines = [line.split("  ", 1) for line in out.splitlines()]
    assert lines[0] == ["1.0000", str(query)]
    assert len(lines) == 2
    assert float(lines[0][0]) >= float(lines[1][0])


def test_json(capsys, index, path, photos):
    code, out, _ = command(capsys, index, "a word", "--model", path, "--json")
    assert code == 0
    hits = json.loads(out)
    assert sorted(hit["id"] for hit in hits) == sorted(NAMES)
    assert all(set(hit) == {"score", "id", "path"} for hit in hits)
    assert [hit["path"] for hit in hits] == [str(photos / hit["id"]) for hit in hits]
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)


def test_texts_are_named_by_their_ids(capsys, tmp_path, path, model):
    texts = ["a\udcff\ttext", "another", "x" * 100]
    rows = np.eye(3, 16)
    rows[1] = model.encode_text("two", normalize=True)
    provenance = model.provenance()
    with Writer(tmp_path / "texts", provenance, "text", dtype="float32", format="npy") as writer:
        writer.append(texts, ["there"] * 3, rows)
    code, out, _ = command(capsys, tmp_path / "texts", "two", "--model", path)
    assert code == 0
    assert out.splitlines()[0] == "1.0000  another"
    page = tmp_path / "page.html"
    code, _, err = command(capsys, tmp_path / "texts", "two", "--model", path, "--html", page)
    assert (code, err) == (0, "")
    assert "another" in page.read_text()


def test_a_model_that_has_no_name_must_be_given(capsys, index):
    code, _, err = command(capsys, index, "x")
    assert code == 1
    assert "made by 'tiny.safetensors'" in err
    assert "--model" in err


def test_a_known_name_is_the_default(tmp_path, monkeypatch):
    with Writer(tmp_path / "index", SMALL, "image", format="npy") as writer:
        writer.append(["a"], ["a"], np.eye(1, 4))
    given = []
    monkeypatch.setattr(search, "load", lambda *a, **options: given.append(a) or pytest.skip())
    with Reader(tmp_path / "index") as reader, pytest.raises(pytest.skip.Exception):
        search.load_model(reader, ["x"])
    assert given == [("ViT-B/32", None, "float32")]


def test_wrong_usage(capsys, tmp_path, index):
    with pytest.raises(SystemExit) as exit:
        main(["search", str(index), "x", "--top", "0"])
    assert exit.value.code == 2
    assert "--top must be at least 1, not 0" in capsys.readouterr().err
    code, _, err = command(capsys, tmp_path, "x")
    assert code == 1
    assert "not a collection" in err
    code, _, err = command(capsys, tmp_path / "nowhere", "x")
    assert code == 1
    assert "nowhere" in err


def test_an_empty_collection(capsys, tmp_path, path, model):
    with Writer(tmp_path / "empty", model.provenance(), "image", format="npy"):
        pass
    code, _, err = command(capsys, tmp_path / "empty", "x", "--model", path)
    assert code == 1
    assert "empty has no embeddings" in err


def test_rows_that_are_not_searched_are_said(capsys, tmp_path, path, model, photos):
    folder = make_index(tmp_path / "index", model, photos)
    with Writer(folder, model.provenance(), "image", dtype="float32", format="npy") as writer:
        writer.append(["new"], ["new"], np.eye(1, 16))
        code, out, err = command(capsys, folder, "x", "--model", path)
        assert code == 0
        assert len(out.splitlines()) == len(NAMES)
        assert "1 more rows, not searched" in err


def test_a_path_that_is_no_file_is_a_text_and_that_is_said(capsys, index, path):
    code, out, err = command(capsys, index, "nowhere.JPG", "--model", path)
    assert code == 0
    assert "'nowhere.JPG' is no file, so it is a text" in err
    assert out


def test_a_broken_query_image_is_one_line(capsys, index, path, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    code, _, err = command(capsys, index, tmp_path / "broken.jpg", "--model", path)
    assert code == 1
    assert "broken.jpg" in err
    assert len(err.splitlines()) == 1
    with pytest.raises(ImageError):
        search.embed_query(npclip.load(path, "cpu"), [str(tmp_path / "broken.jpg")])


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16")
def test_names_that_are_not_utf_8(capsys, tmp_path, path, model, photos):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes((photos / NAMES[0]).read_bytes())
    there = str(tmp_path / name)
    with Writer(tmp_path / "index", model.provenance(), "image", format="npy") as writer:
        writer.append([name], [there], model.encode_image([there], normalize=True))
    page = tmp_path / "page.html"
    code, out, err = command(
        capsys, tmp_path / "index", there, "--model", path, "--json", "--html", page
    )
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["path"] == there
    assert "caf\\udce9.png" in page.read_text("utf-8")
