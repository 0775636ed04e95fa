"""`npclip eval` and what it is made of, against plain loops, scipy and scikit-learn."""

import dataclasses
import json
import os
import sys
import threading

import numpy as np
import PIL.Image
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import npclip
from npclip.__main__ import main
from npclip.errors import BackendError, ImageError, InputError, InputTypeError
from npclip.evaluation import zero_shot as module
from npclip.evaluation.confusion_picture import _label, check_picture, write_picture
from npclip.evaluation.image_folder import ImageFolder, read_names, splits
from npclip.evaluation.zero_shot import Evaluation, embed_labelled, evaluate, rank_of, wilson

CLASSES = ["tabby_cat", "red-fox", "été", "$x^2$", "teapot", "a {brace}", "mini van"]
TEMPLATES = ["a photo of a {}.", "{}"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.save_words(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def model(path):
    return npclip.load(path, device="cpu")


def write_image(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour, noise = rng.integers(0, 200, 3), rng.integers(0, 56, (18, 20, 3))
    PIL.Image.fromarray((colour + noise).astype(np.uint8)).save(path)


def fill(root, classes=CLASSES, images=5, seed=0):
    rng = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        for i in range(images + number % 2):
            write_image(root / name / f"{i}.png", rng)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def templates(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("\n".join(TEMPLATES))
    return path


def plainly(model, root, labels):
    """(true label, scores [L]) of every image of root, in float64, one by one.

    labels: {folder: label}, in the order of the classes.
    """
    rows = []
    for name in labels.values():
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        mean = model.encode_text(prompts, normalize=True).astype(float).mean(0)
        rows.append(mean / np.linalg.norm(mean))
    truth, scores = [], []
    for number, folder in enumerate(labels):
        for image in sorted(root.joinpath(folder).rglob("*.png")):
            truth.append(number)
            embedding = model.encode_image(image, normalize=True).astype(float)
            scores.append(np.array(rows) @ embedding)
    return np.array(truth), np.array(scores)


def labels_of(root):
    folders = sorted(p.name for p in root.iterdir())
    return {name: name.replace("_", " ").replace("-", " ") for name in folders}


def test_accuracies_are_those_of_a_plain_loop(model, photos):
    labels = labels_of(photos)
    truth, scores = plainly(model, photos, labels)
    found = evaluate(model, photos, templates=TEMPLATES)
    order = np.argsort(-scores, axis=1)
    assert found.labels == list(labels.values())
    np.testing.assert_array_equal(found.truth, truth)
    np.testing.assert_array_equal(found.predicted, order[:, 0])
    assert found.images == len(truth) == 38
    assert found.top1 == np.mean(order[:, 0] == truth)
    assert found.top5 == np.mean((order[:, :5] == truth[:, None]).any(1))
    means = [(order[truth == i, 0] == i).mean() for i in range(7)]
    assert found.mean_per_class == pytest.approx(np.mean(means))
    assert 0 < found.top1 < found.top5 < 1, "such images would show nothing"
    assert found.unreadable == []


def test_accuracies_are_scikit_learns(model, photos):
    metrics = pytest.importorskip("sklearn.metrics")
    truth, scores = plainly(model, photos, labels_of(photos))
    found, every = evaluate(model, photos, templates=TEMPLATES), list(range(7))
    for k, share in ((1, found.top1), (5, found.top5)):
        assert share == metrics.top_k_accuracy_score(truth, scores, k=k, labels=every)
    confusion = metrics.confusion_matrix(truth, scores.argmax(1), labels=every)
    np.testing.assert_array_equal(found.confusion, confusion)
    balanced = metrics.balanced_accuracy_score(truth, scores.argmax(1))
    assert found.mean_per_class == pytest.approx(balanced)
    for i, result in enumerate(found.per_class):
        own = truth == i
        five = metrics.top_k_accuracy_score(truth[own], scores[own], k=5, labels=every)
        assert (result.images, result.top5) == (own.sum(), five)
        assert result.top1 == pytest.approx(confusion[i, i] / own.sum())


def test_pairs_are_as_good_as_folders(model, photos):
    labels = labels_of(photos)
    files = [(file, labels[file.parent.name]) for file in sorted(photos.rglob("*.png"))]
    wanted = evaluate(model, photos, templates=TEMPLATES)
    as_other = [lambda p: p, lambda p: p.read_bytes(), PIL.Image.open, model.preprocess]
    pairs = ((as_other[i % 4](image), name) for i, (image, name) in enumerate(files))
    found = evaluate(model, pairs, list(labels.values()), TEMPLATES)
    np.testing.assert_array_equal(found.rank, wanted.rank)
    np.testing.assert_array_equal(found.predicted, wanted.predicted)
    with pytest.raises(InputError, match="'dog' of an image is not among"):
        evaluate(model, [(files[0][0], "dog")], ["cat", "fox"], TEMPLATES)
    with pytest.raises(InputTypeError, match="labels to choose from"):
        evaluate(model, files)


def test_images_without_end_are_read_as_they_are_needed(model):
    taken, pixels = 0, np.zeros((3, 16, 16), np.float32)

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield pixels, "cat"

    names, embeddings = next(embed_labelled(model, endless(), [], normalize=True))
    assert len(names) == len(embeddings) == module.IMAGES_AT_A_TIME
    assert taken <= module.IMAGES_AT_A_TIME + 2 * npclip.get_num_threads()


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(2, 12)),
               elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_ranks_are_places_in_a_stable_order(scores, random):
    truth = np.array([random.randrange(scores.shape[1]) for _ in scores], np.int32)
    order = np.argsort(-scores, axis=1, kind="stable")
    wanted = [list(row).index(i) for row, i in zip(order, truth, strict=True)]
    assert rank_of(truth, scores).tolist() == wanted


def random_evaluation(labels=9, images=300, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, labels - 1, images).astype(np.int32)  # the last has none
    scores = rng.standard_normal((images, labels)) + 2 * np.eye(labels)[truth]
    predicted = scores.argmax(1).astype(np.int32)
    names = [f"class {i}" for i in range(labels)]
    return Evaluation(names, truth, predicted, rank_of(truth, scores))


@pytest.mark.parametrize("labels", [3, 5, 6, 30])
def test_of_every_class(labels):
    found = random_evaluation(labels)
    for i, result in enumerate(found.per_class):
        own = found.truth == i
        assert (result.label, result.images) == (f"class {i}", own.sum())
        if not own.any():
            assert result[2:] == (None, None, None, 0)
            continue
        assert result.top1 == (found.predicted[own] == i).mean()
        assert result.top5 == ((found.rank[own] < 5).mean() if labels > 5 else None)
        row = np.where(np.arange(labels) == i, 0, found.confusion[i])
        assert result.confused == row.max()
        assert result.confused_with == (f"class {row.argmax()}" if row.any() else None)
    assert found.confusion.sum() == found.images
    assert (found.top5 is None) == (found.top5_interval is None) == (labels <= 5)
    assert json.loads(json.dumps(found.as_dict()))["confusion"] == found.confusion.tolist()


def test_wilsons_interval():
    # From Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for correct, images, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert wilson(correct, images) == pytest.approx((low, high), abs=5e-5)
    assert wilson(7, 7)[1] == 1
    stats = pytest.importorskip("scipy.stats")
    for correct, images in ((0, 1), (3, 7), (999, 1000), (5, 5)):
        wanted = stats.binomtest(correct, images).proportion_ci(method="wilson")
        assert wilson(correct, images) == pytest.approx(tuple(wanted), abs=1e-9)


class Blinded(npclip.CLIP):
    def encode_image(self, x, normalize=False):
        found = super().encode_image(x, normalize)
        found[np.asarray(x).mean((1, 2, 3)) < -1] = np.nan
        return found


def test_what_is_not_finite_is_left_out(path, photos):
    model = npclip.load(path, device="cpu")
    model.__class__ = Blinded
    image = next(photos.rglob("*.png"))
    black = np.zeros((16, 16, 3), np.uint8)
    pairs = [(image, "cat"), (black, "cat"), (image, "dog")]
    found = evaluate(model, pairs, ["cat", "dog"], TEMPLATES)
    assert found.truth.tolist() == [0, 1]
    assert found.unreadable == [("image 1", "its embedding is not finite")]
    with pytest.raises(InputError, match="no image to evaluate, 1 unreadable: image 0: its embed"):
        evaluate(model, pairs[1:2], ["cat", "dog"], TEMPLATES)


@pytest.fixture
def hostile(tmp_path):
    root = fill(tmp_path / "hostile", ["cat", "dog"], 3)
    write_image(root / "dog" / "deep" / "er" / "x.png", np.random.default_rng(1))
    whole = (root / "dog" / "0.png").read_bytes()
    (root / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "empty.jpg").touch()
    (root / "dog" / "text.jpeg").write_text("no image")
    (root / "dog" / "notes.txt").write_text("no image, and called none")
    (root / "nothing in it").mkdir()
    (root / "README").write_text("beside the folders")
    write_image(root / ".hidden" / "x.png", np.random.default_rng(1))
    return root


def test_a_hostile_folder(model, hostile):
    found = evaluate(model, hostile, templates=TEMPLATES)
    assert found.labels == ["cat", "dog", "nothing in it"]
    assert found.truth.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    reasons = {os.path.basename(path): reason for path, reason in found.unreadable}
    assert set(reasons) == {"cut.png", "empty.jpg", "text.jpeg"}
    assert all(reasons.values())
    assert found.per_class[2].images == 0
    assert found.mean_per_class == np.mean([found.per_class[i].top1 for i in (0, 1)])
    assert ImageFolder(hostile).beside == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX names and links")
def test_hostile_names_and_links(model, tmp_path, capsys, path):
    root = fill(tmp_path / "photos", ["new\nline", "-_-x", "漢字"], 2)
    try:
        os.rename(root / "-_-x", os.fsencode(root) + b"/caf\xe9")
    except OSError:
        pytest.skip("a file system of UTF-8 names")
    os.symlink("nowhere.png", root / "漢字" / "dangling.png")
    os.symlink(root / "漢字", root / "linked")
    os.symlink("..", root / "漢字" / "loop")
    found = evaluate(model, root, templates=TEMPLATES)
    assert sorted(found.labels) == ["caf\ufffd", "linked", "new line", "漢字"]
    assert {os.path.basename(path) for path, _ in found.unreadable} == {"dangling.png"}
    assert [result.images for result in found.per_class] == [3, 2, 2, 2]
    assert main(["eval", str(root), "--model", str(path), "--device", "cpu"]) == 0
    assert "caf\ufffd" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["missing", "file", "empty", "flat", "no images", "one"])
def test_folders_that_are_none(model, tmp_path, trouble):
    root = tmp_path / "photos"
    if trouble == "file":
        root.touch()
    elif trouble != "missing":
        root.mkdir()
    if trouble == "flat":
        write_image(root / "x.png", np.random.default_rng(0))
    elif trouble in ("no images", "one"):
        (root / "cat").mkdir()
    if trouble == "one":
        write_image(root / "cat" / "x.png", np.random.default_rng(0))
    message = {"missing": "cannot read the folder", "file": "cannot read the folder"}
    message |= {"empty": "no folders", "flat": "no folders", "one": "one class only, 'cat'"}
    with pytest.raises(InputError, match=message.get(trouble, "no images in")):
        evaluate(model, root, templates=TEMPLATES)


def test_nothing_that_can_be_read(model, tmp_path):
    for name in "cat", "dog":
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "x.png").touch()
    with pytest.raises(InputError, match=r"no image to evaluate, 2 unreadable: .*x\.png: "):
        evaluate(model, tmp_path / "photos", templates=TEMPLATES)


@pytest.mark.parametrize("names", [("a_b", "a-b"), ("Cat", "cat"), ("x y", "x__y")])
def test_two_folders_of_one_label(tmp_path, names):
    if len({name.lower() for name in names}) < 2 and sys.platform in ("win32", "darwin"):
        pytest.skip("one folder")
    fill(tmp_path, names, 1)
    with pytest.raises(InputError, match=r"the folders '.*' and '.*' have the same label, '"):
        ImageFolder(tmp_path)
    folder = ImageFolder(tmp_path, {names[0]: ["another", "label"]})
    assert ["another", "label"] in folder.labels


def test_names_of_folders(model, tmp_path):
    fill(tmp_path / "p", ["n01", "n02", "n_03"], 1)
    for name, text in {
        "a.json": '{"n02": ["dog", "puppy"], "n01": "tabby  cat", "n99": "unused"}',
        "b.txt": "\ufeffn02\tdog\tpuppy\r\n\nn01\ttabby  cat\nn99\tunused\n",
    }.items():
        (tmp_path / name).write_text(text, "utf-8")
        folder = ImageFolder(tmp_path / "p", tmp_path / name)
        assert folder.labels == ["tabby  cat", ["dog", "puppy"], "n 03"]
        assert [name for _, name in folder] == ["tabby  cat", "dog", "dog", "n 03"]
        found = evaluate(model, tmp_path / "p", tmp_path / name, TEMPLATES)
        assert found.labels == ["tabby  cat", "dog", "n 03"]
        wanted = npclip.ZeroShot(model, folder.labels, TEMPLATES)
        images = [item.read() for item, _ in folder]
        np.testing.assert_array_equal(found.predicted, wanted.similarities(images).argmax(1))
    with pytest.raises(InputTypeError, match="must be a mapping or a file"):
        ImageFolder(tmp_path / "p", ["cat", "dog"])
    with pytest.raises(InputError, match="of the folder 'n01' is no text"):
        ImageFolder(tmp_path / "p", {"n01": []})
    with pytest.raises(InputError, match=r"no folder of .* is among the 1 .* 'cat', .* 'n01'"):
        ImageFolder(tmp_path / "p", {"cat": "dog"})
    fill(tmp_path / "q", ["_"], 1)
    with pytest.raises(InputError, match="name of the folder '_' is no label"):
        ImageFolder(tmp_path / "q")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no labels"),
        ("{", "not JSON: "),
        ("{}", "no labels"),
        ('{"a": 3}', "label of the folder 'a' is no text: 3"),
        ('{"a": ["x", ""]}', "'a' is no text"),
        ('{"a": []}', "'a' is no text"),
        ('{"a": "x", "a": "y"}', "the folder 'a' is given twice"),
        ("{" + '"a":{' * 100_000, "not JSON: "),
        ("a\tx\nb x\n", "line 2: not a folder, a tab and a label: 'b x'"),
        ("a\tx\n\ty\n", "line 2"),
        ("a\tx\na\ty\n", "the folder 'a' is given twice"),
        (b"a\t\xff", "cannot read labels"),
    ],
)
def test_bad_files_of_labels(tmp_path, text, message):
    path = tmp_path / "labels"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        read_names(path)
    with pytest.raises(InputError, match="cannot read labels from"):
        read_names(tmp_path / "none")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match=r"x\.json: a JSON object of labels by folder"):
        read_names(tmp_path / "x.json")


def test_splits_of_a_data_set(model, tmp_path):
    for names, wanted in {
        ("train", "test"): {"train": "train", "test": "test"},
        ("train", "val", "test"): {"train": "train", "val": "val", "test": "test"},
        ("train", "val"): {"train": "train", "test": "val"},
        ("train",): {},
        ("test", "val"): {},
        ("train", "test", "cat"): {},
    }.items():
        root = tmp_path / "-".join(names)
        for i, name in enumerate(names):
            fill(root / name, ["cat", "dog"], 1 + i)
        assert splits(root) == {k: str(root / v) for k, v in wanted.items()}
    found = evaluate(model, tmp_path / "train-val", templates=TEMPLATES)
    assert (found.labels, found.images) == (["cat", "dog"], 5)


def eval_command(*arguments):
    return main(["eval", "--device", "cpu", *map(str, arguments)])


def test_the_command(path, model, photos, templates, capsys):
    wanted = evaluate(model, photos, templates=TEMPLATES)
    options = "--model", path, "--templates", templates
    assert eval_command(photos, *options, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert {key: found[key] for key in wanted.as_dict()} == json.loads(json.dumps(wanted.as_dict()))
    assert (found["method"], err) == ("zero-shot", "")
    assert npclip.Provenance.from_dict(found["provenance"]) == model.provenance()
    assert eval_command(photos, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "38 images, 7 classes" in lines
    summary = dict(line.split("  ", 1) for line in lines if line.startswith(("top", "mean")))
    assert summary["top-1"].split()[0] == f"{wanted.top1:.2%}"
    assert summary["top-5"].split()[0] == f"{wanted.top5:.2%}"
    assert summary["mean of classes"].split()[0] == f"{wanted.mean_per_class:.2%}"
    head = next(i for i, line in enumerate(lines) if line.startswith("class "))
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[head + 1 :]]
    assert len(shares) == 7 and shares == sorted(shares)


def test_the_command_on_a_hostile_folder(path, hostile, templates, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    write_image(hostile / ("x" * 60) / "x.png", rng)
    write_image(hostile / ("漢" * 12) / "x.png", rng)
    for i in range(25):
        (hostile / "cat" / f"{i:03}.png").touch()
    monkeypatch.setenv("COLUMNS", "70")
    assert eval_command(hostile, "--model", path, "--templates", templates) == 0
    out, err = capsys.readouterr()
    assert "10 images, 5 classes, 1 of them without images" in out
    assert "28 unreadable images are in no figure" in out
    assert "top-5" not in out
    table = out[out.index("\nclass ") :]
    assert max(sum(1 + (c == "漢") for c in line) for line in table.splitlines()) <= 70
    assert "…" in table
    assert err.count("unreadable: ") == 21
    assert "npclip: 8 more unreadable: see --json" in err
    assert "1 files beside the folders" in err


def test_wrong_usage_of_the_command(path, photos, templates, tmp_path, capsys):
    for options, message in (
        (["--train", photos], "--train is for --linear-probe"),
        (["--linear-probe", "--templates", templates], "--templates are not for"),
    ):
        with pytest.raises(SystemExit) as exit:
            eval_command(photos, "--model", path, *options)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    for options in (["--labels", tmp_path / "none"], ["--templates", tmp_path / "none"]):
        assert eval_command(photos, "--model", path, *options) == 1
        assert "npclip: error: cannot read" in capsys.readouterr().err
    assert eval_command(tmp_path / "none", "--model", path) == 1
    assert "cannot read the folder" in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 20, 40])
def test_pictures(tmp_path, count):
    pytest.importorskip("matplotlib")
    evaluation = random_evaluation(count, 20 * count)
    names = ["$a_b^", "漢字", "new\nline", "x" * 99, "\udce9"]
    labels = [names[i % 5] + " " * (i // 5) for i in range(count)]
    file = tmp_path / "confusion.png"
    write_picture(dataclasses.replace(evaluation, labels=labels), file)
    with PIL.Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert max(pixels.shape) < 4000
    blues = pixels[(pixels[..., 2] - pixels[..., 0]) > 60]
    assert len(blues) > 0.001 * pixels[..., 0].size, "no matrix to be seen"


def test_labels_of_pictures_are_thinned_out():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    for points, every, size in ((3, 3, 7.2), (7, 1, 6.5), (30, 1, 9)):
        axes = figure.add_axes((0, 0, 1, 1))
        _label(axes, ["x" * 40] * 20, points)
        labels = axes.get_yticklabels()
        assert axes.get_yticks().tolist() == list(range(0, 20, every))
        assert {text.get_text() for text in labels} == {"x" * 27 + "…"}
        assert [text.get_size() for text in labels] == pytest.approx([size] * len(labels))


def test_pictures_that_cannot_be(tmp_path, path, photos, capsys, monkeypatch):
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "matplotlib.backend_bases", None)
        with pytest.raises(BackendError, match=r"matplotlib: pip install 'npclip\[eval\]'"):
            check_picture(tmp_path / "x.png")
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=r"end in one of .*png.*, not x\.doc"):
        check_picture(tmp_path / "x.doc")
    options = "--model", path, "--confusion", tmp_path / "none" / "x.png"
    assert eval_command(photos, *options) == 1
    assert "no folder" in capsys.readouterr().err


def test_the_commands_picture(tmp_path, path, photos, templates, capsys):
    pytest.importorskip("matplotlib")
    options = "--model", path, "--templates", templates, "--confusion", tmp_path / "x.png"
    assert eval_command(photos, *options) == 0
    with PIL.Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 300


def test_errors_of_reading_threads_end(model, photos):
    """An iterable that fails is the caller's error, and leaves no thread behind."""

    def failing():
        yield next(photos.rglob("*.png")), "cat"
        raise ImageError("the caller's own")

    before = threading.active_count()
    with pytest.raises(ImageError, match="the caller's own"):
        evaluate(model, failing(), ["cat", "dog"], TEMPLATES)
    assert threading.active_count() == before
