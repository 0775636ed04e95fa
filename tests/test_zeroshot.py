"""ZeroShot against the same in a few plain lines."""

import threading

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip import zeroshot
from npclip.config import Metadata

TEMPLATES = ["a photo of a {}.", "{}", "one {} beside another {}"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_file(random_tensors(tiny_models.VIT), path, Metadata(activation="gelu").to_strings())
    return path


class Model(npclip.CLIP):
    """With a text tower that is told apart by its words: tiny models know few tokens."""

    encoded = 0

    def encode_text(self, texts, normalize=False):
        assert normalize
        self.encoded += len(texts)
        rows = [np.random.default_rng(list(text.encode())) for text in texts]
        found = np.stack([rng.standard_normal(self.config.embed_dim) for rng in rows])
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def model(path, monkeypatch, tmp_path):
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "cache"))
    loaded = npclip.load(path, device="cpu")
    loaded.__class__ = Model
    return loaded


@pytest.fixture
def images(model):
    side = model.config.image_resolution
    return np.random.default_rng(0).standard_normal((5, 3, side, side), np.float32)


def plain(model, labels, templates):
    """Label embeddings, in float64."""
    rows = []
    for names in ([label] if isinstance(label, str) else label for label in labels):
        prompts = [t.replace("{}", name) for name in names for t in templates]
        mean = model.encode_text(prompts, normalize=True).astype(float).mean(0)
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)


LABELS = ["cat", ("dog", "puppy", "hound"), "a {brace}", "été"]


@pytest.mark.parametrize("templates", [TEMPLATES, None, ["{}"]])
def test_labels_are_means_of_prompts(model, templates):
    found = npclip.ZeroShot(model, LABELS, templates)
    wanted = plain(model, LABELS, templates or zeroshot.built_in_templates())
    np.testing.assert_allclose(found.embeddings, wanted, atol=1e-6)
    assert found.labels == ["cat", "dog", "a {brace}", "été"]
    assert found.embeddings.dtype == np.float32


def test_many_labels_are_embedded_a_few_at_a_time(model, monkeypatch):
    labels = [f"label {i}" if i % 3 else (f"label {i}", f"also {i}") for i in range(40)]
    wanted = npclip.ZeroShot(model, labels, TEMPLATES, cache=False).embeddings
    sizes, encode = [], Model.encode_text

    def counts(self, texts, normalize):
        sizes.append(len(texts))
        return encode(self, texts, normalize)

    monkeypatch.setattr(Model, "encode_text", counts)
    for at_a_time in (1, 7, 50):
        monkeypatch.setattr(zeroshot, "PROMPTS_AT_A_TIME", at_a_time)
        sizes.clear()
        found = npclip.ZeroShot(model, labels, TEMPLATES, cache=False)
        np.testing.assert_array_equal(found.embeddings, wanted)
        assert max(sizes) < at_a_time + 2 * len(TEMPLATES)
        assert sum(sizes) == 54 * len(TEMPLATES)


def test_similarities_and_probabilities(model, images):
    found = npclip.ZeroShot(model, LABELS, TEMPLATES)
    pixels = model.encode_image(images, normalize=True).astype(float)
    cosines = pixels @ plain(model, LABELS, TEMPLATES).T
    np.testing.assert_allclose(found.similarities(images), cosines, atol=1e-5)
    scores = found.scores(images)
    logits = np.exp(float(model.logit_scale)) * cosines
    wanted = np.exp(logits - logits.max(1, keepdims=True))
    wanted /= wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(found.scores(images[0]), scores[0], atol=1e-6)
    assert found.scores(images[:0]).shape == (0, 4)


def test_with_a_background_every_label_is_judged_alone(model, images):
    background = ["a photo", "anything else"]
    found = npclip.ZeroShot(model, LABELS, TEMPLATES, background=background)
    pixels = model.encode_image(images, normalize=True).astype(float)
    scale = np.exp(float(model.logit_scale))
    label = pixels @ plain(model, LABELS, TEMPLATES).T
    other = (pixels @ plain(model, background, ["{}"]).T).max(1, keepdims=True)
    wanted = np.exp(scale * label) / (np.exp(scale * label) + np.exp(scale * other))
    np.testing.assert_allclose(found.scores(images), wanted, atol=1e-4)
    alone = npclip.ZeroShot(model, LABELS[:1], TEMPLATES, background=background)
    np.testing.assert_allclose(alone.scores(images)[:, 0], wanted[:, 0], atol=1e-4)
    for row, best in zip(label - other, found.predict(images, top=None), strict=True):
        names = [name for name, _ in best]
        assert names == [found.labels[i] for i in np.argsort(-row) if row[i] >= 0]
    built_in = npclip.ZeroShot(model, LABELS, TEMPLATES, background=True)
    assert len(built_in.background) == len(zeroshot.BACKGROUND)


def test_predictions(model, images):
    found = npclip.ZeroShot(model, LABELS, TEMPLATES)
    scores = found.scores(images)
    for top in (1, 3, 5, None):
        for row, best in zip(scores, found.predict(images, top=top), strict=True):
            assert [p for _, p in best] == sorted(map(float, row), reverse=True)[: top or 4]
    cosines = found.similarities(images)
    for row, best in zip(cosines, found.predict(images, top=3), strict=True):
        assert [name for name, _ in best] == [found.labels[i] for i in np.argsort(-row)[:3]]
    single = found.predict(images[0], top=2)
    assert [name for name, _ in single] == [n for n, _ in found.predict(images[:1], top=2)[0]]
    assert found.predict(images, threshold=1.0, top=1) == [
        [(found.labels[row.argmax()], 1.0)] if row.max() >= 1 else [] for row in scores
    ]


def test_images_without_end(model, images, monkeypatch):
    monkeypatch.setattr(zeroshot, "IMAGES_AT_A_TIME", 2)
    found, taken = npclip.ZeroShot(model, LABELS, TEMPLATES), []

    def endless():
        while True:
            taken.append(len(taken))
            yield images[len(taken) % 5]

    each = found.predict_each(endless(), top=1)
    first = [next(each) for _ in range(7)]
    assert len(taken) == 8
    for i, best in enumerate(first):
        name, probability = found.predict(images[(i + 1) % 5], top=1)[0]
        assert best[0][0] == name
        assert best[0][1] == pytest.approx(probability, abs=1e-5)


def test_the_text_tower_itself(tmp_path, monkeypatch, images):
    """One template is CLIP.classify."""
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "cache"))
    words = npclip.load(tiny_models.save_words(tmp_path), device="cpu")
    names = ["cat", "dog", "a {brace}"]
    for _ in range(2):  # from the tower, and from the cache
        found = npclip.ZeroShot(words, names, ["a photo of a {}."])
        np.testing.assert_allclose(found.scores(images), words.classify(images, names), atol=1e-5)
    assert npclip.ZeroShot(words, names).predict(images[0], top=1)[0][0] in names


# The cache


def test_the_same_labels_are_embedded_once(model, path):
    first = npclip.ZeroShot(model, LABELS, TEMPLATES)
    count = model.encoded
    again = npclip.ZeroShot(model, LABELS, TEMPLATES)
    assert model.encoded == count
    np.testing.assert_array_equal(first.embeddings, again.embeddings)
    npclip.ZeroShot(model, LABELS, TEMPLATES, cache=False)
    assert model.encoded == 2 * count
    for changed in (LABELS[::-1], [*LABELS, "more"], ["cat", "dog"]):
        before = model.encoded
        npclip.ZeroShot(model, changed, TEMPLATES)
        assert model.encoded > before
    before = model.encoded
    npclip.ZeroShot(model, LABELS, TEMPLATES[:2])
    assert model.encoded > before


def test_other_weights_have_other_embeddings(model, tmp_path):
    npclip.ZeroShot(model, LABELS, TEMPLATES)
    path = tmp_path / "other.safetensors"
    tensors = random_tensors(tiny_models.VIT)
    tensors["logit_scale"] = np.asarray(tensors["logit_scale"] + 1)
    save_file(tensors, path, Metadata(activation="gelu").to_strings())
    other = npclip.load(path, device="cpu")
    other.__class__ = Model
    npclip.ZeroShot(other, LABELS, TEMPLATES)
    assert other.encoded


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "half", "shape", "nan"])
def test_a_damaged_file_is_made_anew(model, tmp_path, damage):
    wanted = npclip.ZeroShot(model, LABELS, TEMPLATES).embeddings
    (file,) = (tmp_path / "cache" / "labels").iterdir()
    if damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "shape":
        np.save(file, wanted[:2])
    elif damage == "nan":
        np.save(file, wanted * np.float32("nan"))
    else:
        file.write_bytes(damage)
    found = npclip.ZeroShot(model, LABELS, TEMPLATES).embeddings
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.load(file), wanted)


def test_a_cache_that_cannot_be_written_is_no_error(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "file"))
    assert len(npclip.ZeroShot(model, LABELS, TEMPLATES).embeddings) == 4


def test_threads_that_embed_the_same(model, tmp_path):
    wanted, found = plain(model, LABELS, TEMPLATES), []

    def work():
        found.append(npclip.ZeroShot(model, LABELS, TEMPLATES).embeddings)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for embeddings in found:
        np.testing.assert_allclose(embeddings, wanted, atol=1e-6)
    assert [file.suffix for file in (tmp_path / "cache" / "labels").iterdir()] == [".npy"]


# What is refused


@pytest.mark.parametrize(
    ("labels", "templates", "error", "message"),
    [
        ([], None, npclip.InputError, "no label"),
        ("cat", None, npclip.InputTypeError, "not the str 'cat'"),
        (["cat", 3], None, npclip.InputTypeError, "a label must be a sequence of str, not 3"),
        (["cat", ["dog", 3]], None, npclip.InputTypeError, "a label must be a sequence of str"),
        (["cat", "dog", "cat"], None, npclip.InputError, "'cat' is given twice"),
        (["cat", ["cat", "kitten"]], None, npclip.InputError, "'cat' is given twice"),
        (["cat", " "], None, npclip.InputError, "an empty label"),
        (["cat", []], None, npclip.InputError, "an empty label"),
        (["cat"], [], npclip.InputError, "no template"),
        (["cat"], ["a photo"], npclip.InputError, "has no {} for the label"),
        (["cat"], ["{}", 3], npclip.InputTypeError, "templates must be a sequence of str"),
        (["cat"], "missing.txt", npclip.InputError, "cannot read templates from missing.txt"),
    ],
)
def test_what_is_no_label_or_template(model, labels, templates, error, message):
    with pytest.raises(error, match=message.replace("{", r"\{").replace("}", r"\}")):
        npclip.ZeroShot(model, labels, templates)


@pytest.mark.parametrize("limits", [{"top": 0}, {"top": -1}, {"threshold": 1.1}, {"threshold": -1}])
def test_limits_that_mean_nothing(model, images, limits):
    found = npclip.ZeroShot(model, LABELS, TEMPLATES)
    for predict in (found.predict, lambda *a, **k: list(found.predict_each(*a, **k))):
        with pytest.raises(npclip.InputError, match=next(iter(limits))):
            predict(images, **limits)


# Templates


def test_the_built_in_templates():
    found = zeroshot.built_in_templates()
    assert len(found) == len(set(found)) == 40
    assert all(template.count("{}") == 1 for template in found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])), min_size=1),
       st.sampled_from(["\n", "\r\n"]), st.booleans())  # fmt: skip
def test_files_of_templates(tmp_path_factory, lines, end, has_mark):
    templates = [f"{line}{{}}".strip() for line in lines]
    file = tmp_path_factory.mktemp("templates") / "templates.txt"
    text = ("\ufeff" if has_mark else "") + end.join(["", *templates, "  "])
    file.write_bytes(text.encode())
    assert zeroshot.as_templates(file) == [t for t in templates if t]


def test_a_file_that_is_no_text(model, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    with pytest.raises(npclip.InputError, match="cannot read templates"):
        npclip.ZeroShot(model, LABELS, tmp_path / "bytes")
