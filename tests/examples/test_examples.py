"""The examples as their headers say, each in a process of its own, and what they promise."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npclip

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments, cwd):
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_lists_every_example():
    table = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"^\| \[(\w+\.py)\]\(\1\)", table, re.MULTILINE))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_headers_say_what_to_install_and_run(path):
    header = path.read_text().split('"""')[1]
    assert re.search(r"^    pip install npclip", header, re.MULTILINE)
    assert path.stem in header


def test_scikit_learn(model, photos, tmp_path):
    pytest.importorskip("sklearn")
    printed = run("scikit_learn_pipeline.py", photos, model, cwd=tmp_path)
    assert "accuracy 1.000 +- 0.000 in 3 folds" in printed
    assert re.search(r"best C [\d.]+, accuracy 1.000", printed)
    assert {path.name for path in tmp_path.iterdir()} == {".clip-cache"}


def test_scikit_learns_rules(model, photos, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    base = pytest.importorskip("sklearn.base")
    from scikit_learn_pipeline import ClipEmbedder, pipeline
    from sklearn.exceptions import NotFittedError
    from sklearn.model_selection import cross_val_score

    one = ClipEmbedder(model, device="cpu")
    copy = base.clone(one)
    assert copy is not one and copy.get_params() == one.get_params()
    with pytest.raises(NotFittedError):
        one.transform(["a cat"])
    paths = sorted(map(str, photos.glob("*/*")))
    wanted = npclip.Embedder(model, device="cpu").embed_images(paths)
    found = one.fit(paths).transform(paths)
    np.testing.assert_array_equal(found, wanted)
    assert found.shape == (24, len(one.get_feature_names_out()))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(one)).transform(paths), wanted)
    texts = ClipEmbedder(model, kind="text").set_output(transform="default")
    assert texts.fit_transform(["a cat", "a dog"]).shape == (2, found.shape[1])
    with pytest.raises(ValueError, match="kind"):
        ClipEmbedder(model, kind="sound").fit([])
    labels = [path.rpartition("/")[0] for path in paths]
    scores = [cross_val_score(pipeline(model), paths, labels, cv=3, n_jobs=n) for n in (1, 2)]
    np.testing.assert_array_equal(*scores)


def test_faiss(model, photos, tmp_path):
    pytest.importorskip("faiss")
    (photos / "broken.jpg").write_bytes(b"none")
    query = photos / "dark" / "3.png"
    printed = run(
        "faiss_search.py", photos, "a cat", query, "--top", 3, "--model", model, cwd=tmp_path
    )
    (photos / "broken.jpg").unlink()
    assert "left out: " in printed and "broken.jpg" in printed
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(str(query)))
    assert lines[at + 1].split()[-2:] == ["1.000", str(query)]
    assert len(lines) - at == 4  # a header and the three best
    words = [float(line.split()[-2]) for line in lines[at - 3 : at]]
    embedder = npclip.Embedder(model)
    images = embedder.embed_images(sorted(photos.glob("*/*")))
    best = np.sort(images @ embedder.embed_texts("a cat"))[::-1][:3]
    np.testing.assert_allclose(words, best, atol=6e-4)


def test_words_find_drawings(tmp_path):
    pytest.importorskip("faiss")
    arguments = EXAMPLES / "drawings", "a fish", "castle", "red apple", "--top", 1
    printed = run("faiss_search.py", *arguments, "--model", "tiny", cwd=tmp_path)
    found = re.findall(r"(\S+)\.png$", printed, re.MULTILINE)
    assert [Path(path).name for path in found] == ["fish", "castle", "red-apple"]


def test_duplicates(model, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"{i}.png")
        if i < 2:
            picture.save(tmp_path / f"copy of {i}.jpg", quality=90)
    (tmp_path / "notes.txt").write_text("no picture")
    printed = run("find_duplicates.py", tmp_path, "--model", model, "--threshold", 0.998, cwd="/")
    groups = [set(group.splitlines()) for group in printed.strip().split("\n\n")]
    wanted = [{str(tmp_path / f"{i}.png"), str(tmp_path / f"copy of {i}.jpg")} for i in range(2)]
    assert sorted(groups, key=sorted) == sorted(wanted, key=sorted)
    assert printed.startswith(str(tmp_path / "0.png"))  # the larger file
