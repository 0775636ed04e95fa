"""The linear probe against scikit-learn, called by hand as openai/CLIP's README does."""

import json
import re
import sys
import warnings

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import fill

import npclip
from npclip.__main__ import main
from npclip.errors import BackendError, InputError
from npclip.evaluation import probe as module
from npclip.evaluation.probe import hold_out, linear_probe, search

threadpoolctl = pytest.importorskip("threadpoolctl")
linear_model = pytest.importorskip("sklearn.linear_model")
NAMES = np.array(["cat", "dog", "fox", "owl", "teapot", "van"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More would wait for each other in products as small as these."""
    with threadpoolctl.threadpool_limits(1):
        yield


def blobs(images, seed, classes=6, noise=2.5):
    """Features of classes that overlap, so that C matters."""
    centres = np.random.default_rng(7).standard_normal((classes, 12))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, images)
    x = centres[y] + noise * rng.standard_normal((images, 12))
    return x.astype(np.float32), NAMES[y]


def by_hand(C, x, y, max_iter=1000):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return linear_model.LogisticRegression(random_state=0, C=C, max_iter=max_iter).fit(x, y)


@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("given", [True, False], ids=["val given", "val drawn"])
def test_it_is_scikit_learns(classes, given):
    metrics = pytest.importorskip("sklearn.metrics")
    (x, y), (vx, vy), (tx, ty) = (blobs(n, n, classes) for n in (150, 81, 120))
    found = linear_probe(x, y, tx, ty, validation=(vx, vy) if given else None, seed=3)
    if given:
        fit_x, fit_y, all_x, all_y = x, y, np.concatenate([x, vx]), np.concatenate([y, vy])
    else:
        held = hold_out(y, 3)
        fit_x, fit_y, vx, vy = x[~held], y[~held], x[held], y[held]
        all_x, all_y = np.concatenate([fit_x, vx]), np.concatenate([fit_y, vy])
    for C, accuracy in found.sweep.items():
        assert accuracy == by_hand(C, fit_x, fit_y).score(vx, vy), C
    best = max(found.sweep.values())
    assert min(C for C, accuracy in found.sweep.items() if accuracy == best) == found.C
    classifier = by_hand(found.C, all_x, all_y)
    evaluation = found.evaluation
    assert evaluation.labels == list(classifier.classes_) == list(NAMES[:classes])
    predicted = np.array(evaluation.labels)[evaluation.predicted]
    np.testing.assert_array_equal(predicted, classifier.predict(tx))
    assert evaluation.top1 == classifier.score(tx, ty)
    if classes > 5:
        scores = classifier.decision_function(tx)
        top5 = metrics.top_k_accuracy_score(ty, scores, k=5, labels=classifier.classes_)
        assert evaluation.top5 == top5
    assert (found.trained, found.validated) == (len(all_x), len(vx))
    assert found.converged


def test_a_given_C_is_used_with_all_images():
    (x, y), (tx, ty) = blobs(150, 1), blobs(120, 2)
    found = linear_probe(x, y, tx, ty, C=0.316)  # as in openai/CLIP's README
    assert (found.C, found.sweep, found.trained, found.validated) == (0.316, {}, 150, 0)
    assert found.evaluation.top1 == by_hand(0.316, x, y).score(tx, ty)


@given(st.integers(-48, 48), st.floats(0.01, 1), st.floats(0.01, 1))
def test_the_search_finds_the_peak(peak, left, right):
    grid = 10.0 ** (np.arange(-48, 49) / 8)
    tried = []

    def accuracy(C):
        step = int(np.abs(np.log(grid / C)).argmin())
        assert grid[step] == pytest.approx(C)
        tried.append(step - 48)
        return -max(left * (peak - step + 48), right * (step - 48 - peak))

    # A peak that lies between two points of a lopsided slope may be nearer the wrong one.
    found = search(accuracy)
    assert len(tried) == len(set(tried)) == len(found) <= 15
    assert {-48, -32, -16, 0, 16, 32, 48} <= set(tried)
    best = max(found, key=found.get)
    if left == right:
        assert best == pytest.approx(grid[peak + 48])
    assert list(found) == sorted(found)


def test_the_search_goes_as_the_paper_says():
    """Around a peak at 10**0.5, halving from 2 decades to an eighth of one."""
    found = search(lambda C: -abs(np.log10(C) - 0.5))
    wanted = [-6, -4, -2, 0, 2, 4, 6, 1, -1, 0.5, -0.5, 0.25, 0.75, 0.375, 0.625]
    np.testing.assert_allclose(sorted(np.log10(list(found))), sorted(wanted), atol=1e-12)
    assert 1e-6 in found and 1e6 in found


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 9))
def test_a_fifth_of_each_class_is_held_out(labels, seed):
    held = hold_out(labels, seed)
    assert (held == hold_out(labels, seed)).all()
    for name in set(labels):
        own = held[np.array(labels) == name]
        assert own.sum() == (max(1, round(len(own) / 5)) if len(own) > 1 else 0)


def test_fits_that_do_not_converge_are_told_of():
    (x, y), (tx, ty) = blobs(90, 1), blobs(60, 2)
    found = linear_probe(x, y, tx, ty, max_iter=1)
    assert not found.converged
    assert set(found.not_converged) <= set(found.sweep)
    assert len(found.not_converged) > 5
    order = np.concatenate([np.flatnonzero(~hold_out(y, 0)), np.flatnonzero(hold_out(y, 0))])
    classifier = by_hand(found.C, x[order], y[order], max_iter=1)
    assert found.evaluation.top1 == classifier.score(tx, ty)


def test_other_warnings_are_not_swallowed(monkeypatch):
    fit = linear_model.LogisticRegression.fit

    def warns(self, *arguments):
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
        return fit(self, *arguments)

    monkeypatch.setattr(linear_model.LogisticRegression, "fit", warns)
    (x, y), (tx, ty) = blobs(90, 1), blobs(60, 2)
    with pytest.warns(RuntimeWarning, match="something else"):
        linear_probe(x, y, tx, ty, C=1.0)


def test_wrong_arrays():
    (x, y), (tx, ty) = blobs(90, 1), blobs(60, 2)
    infinite = np.where(np.arange(12) == 3, np.inf, tx)
    for arguments, message in (
        ((x[:, :5], y, tx, ty), "features of 5 and of 12 numbers"),
        ((x[:-1], y, tx, ty), r"train_features must be floats \[n, D\] with n = 90"),
        ((x.astype(int), y, tx, ty), "train_features must be floats"),
        ((x, y, infinite, ty), "test_features have numbers that are not finite"),
        ((x, y, tx[:0], ty[:0]), "no images to test on"),
        ((x, y[None], tx, ty), "train_labels must be integers or str"),
        ((x, np.where(y == "cat", "cat", "cat"), tx, ty), "at least two classes"),
        ((x, y, tx, np.where(ty == "cat", "zebra", ty)), "no training images for 1 .*: zebra"),
        ((x, y, tx, np.zeros(60, int)), "test_labels are int64, train_labels <U"),
        ((x[:2], ["cat", "dog"], tx[:1], ["cat"]), "no validation images .* hold one out"),
    ):
        with pytest.raises(InputError, match=message):
            linear_probe(*arguments)
    with pytest.raises(InputError, match="no validation images"):
        linear_probe(x, y, tx, ty, validation=(x[:0], y[:0]))
    with pytest.raises(InputError, match="features of 12 and of 7 numbers"):
        linear_probe(x, y, tx, ty, validation=(x[:, :7], y))
    for C in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="C must be a number above 0"):
            linear_probe(x, y, tx, ty, C=C)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(BackendError, match=r"scikit-learn: pip install 'npclip\[eval\]'"):
        linear_probe([[1.0]], [1], [[1.0]], [1])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.save_words(tmp_path_factory.mktemp("model"))


def features(path, root):
    model, x, y = npclip.load(path, device="cpu", towers=("image",)), [], []
    for folder in sorted(root.iterdir()):
        for image in sorted(folder.glob("*.png")):
            x.append(model.encode_image(image))
            y.append(folder.name)
    return np.array(x), np.array(y)


def eval_command(*arguments):
    return main(["eval", "--device", "cpu", "--linear-probe", *map(str, arguments)])


CLASSES = ["cat", "dog", "fox"]


@pytest.mark.parametrize("layout", ["train and test", "train, val and test", "--train", "one"])
def test_the_command(path, tmp_path, layout, capsys):
    parts = {"one": ["all"], "train, val and test": ["train", "val", "test"]}
    parts = parts.get(layout, ["train", "test"])
    root = tmp_path / "photos"
    folders = [root] if layout == "one" else [root / name for name in parts]
    for seed, folder in enumerate(folders):
        fill(folder, CLASSES, 10, seed)
    (folders[-1] / "cat" / "broken.png").touch()
    x = dict(zip(parts, (features(path, f) for f in _without_broken(folders)), strict=True))
    if layout == "one":
        images, labels = x["all"]
        held = hold_out(labels, 5)
        x = {"train": (images[~held], labels[~held]), "test": (images[held], labels[held])}
    wanted = linear_probe(*x["train"], *x["test"], validation=x.get("val"), seed=5)
    (folders[-1] / "cat" / "broken.png").touch()
    test = root / "test" if layout == "--train" else root
    options = ["--train", root / "train"] if layout == "--train" else []
    assert eval_command(test, "--model", path, *options, "--seed", 5, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err.startswith("npclip: unreadable: ")
    for key, value in wanted.evaluation.as_dict().items():
        if key != "unreadable":
            assert found[key] == json.loads(json.dumps(value)), key
    assert len(found["unreadable"]) == 1
    assert (found["method"], found["C"], found["seed"]) == ("linear probe", wanted.C, 5)
    assert [row["C"] for row in found["sweep"]] == list(wanted.sweep)
    assert (found["trained"], found["validated"]) == (wanted.trained, wanted.validated)
    assert found["provenance"]["normalized"] is False
    assert eval_command(test, "--model", path, *options, "--seed", 5) == 0
    out = capsys.readouterr().out
    assert f"C = {wanted.C:.3g}, the best of {len(wanted.sweep)}" in out
    assert ("a fifth of" in out) == (layout != "train, val and test")
    assert ("seed 5" in out) == (layout != "train, val and test")
    assert f"{wanted.evaluation.images} images, 3 classes" in out
    assert "not converged" not in out


def _without_broken(folders):
    (folders[-1] / "cat" / "broken.png").unlink()
    return folders


def test_the_command_says_what_has_not_converged(path, tmp_path, capsys, monkeypatch):
    fill(tmp_path, CLASSES, 6)
    fit = module._fit
    monkeypatch.setattr(module, "_fit", lambda x, y, C, max_iter: fit(x, y, C, 1))
    assert eval_command(tmp_path, "--model", path) == 0
    out, err = capsys.readouterr()
    assert "not converged after the largest number of steps: the final fit" in out
    assert "fits of the search for C" in out
    assert err == ""


def test_folders_that_a_probe_cannot_use(path, tmp_path, capsys):
    fill(tmp_path / "few" / "train", ["cat", "dog"], 1)
    fill(tmp_path / "few" / "test", ["cat", "zebra"], 1)
    fill(tmp_path / "single", ["cat"], 3)
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "x.png").touch()
    fill(tmp_path / "broken", ["dog"], 3)
    for folder, message in (
        ("few", r"1 folders of .*test are not in .*train, among them 'zebra'"),
        ("single", "one class only in"),
        ("broken", "at least two classes"),
    ):
        assert eval_command(tmp_path / folder, "--model", path) == 1
        assert re.search(message, capsys.readouterr().err)
