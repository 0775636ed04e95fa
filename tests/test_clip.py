"""The public interface on small models: every kind of input, every kind of error."""

import dataclasses
import io
import pickle
import threading

import numpy as np
import pytest
import tiny_models
from dlpack_only import DLPackOnly
from PIL import Image
from safetensors.numpy import save_file

import npclip
from npclip.errors import (
    BackendError,
    CheckpointError,
    ImageError,
    InputError,
    InputTypeError,
    TextTooLongError,
)
from npclip.inputs import text_batches


@pytest.fixture
def model(golden):
    return golden.model


@pytest.fixture
def texts(model):
    """Token ids of three texts: the golden models' vocabulary is too small for real words."""
    ids = np.zeros((3, model.context_length), np.int64)
    for row, words in zip(ids, (1, 2, 5), strict=True):
        row[: words + 2] = [98, *range(words), 99]
    return ids


def test_load_also_unpacks(golden):
    model, preprocess = npclip.load(golden.path)
    size = model.visual.input_resolution
    pixels = preprocess(Image.new("RGB", (70, 50)))
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == np.float32


def test_every_kind_of_image_gives_the_same_embedding(model, pictures):
    path = pictures / "rocket.jpg"
    picture = Image.open(path).convert("RGB")
    array = np.asarray(picture)
    expected = model.encode_image(path)
    assert expected.shape == (model.visual.output_dim,)
    kinds = [str(path), path.read_bytes(), picture, array, model.preprocess(path)]
    kinds += [model.preprocess(path).astype(np.float64)]
    for x in kinds:
        np.testing.assert_array_equal(model.encode_image(x), expected)
    for many in (kinds, tuple(kinds), iter(kinds), (x for x in kinds)):
        features = model.encode_image(many)
        assert features.shape == (len(kinds), len(expected))
        np.testing.assert_allclose(features, np.tile(expected, (len(kinds), 1)), 1e-4, 1e-5)


def test_numpys_strings_are_strings(model, pictures):
    path = pictures / "rocket.jpg"
    expected = model.encode_image(path)
    for x in (np.str_(path), np.array(str(path)), np.bytes_(path.read_bytes())):
        np.testing.assert_array_equal(model.encode_image(x), expected)
    paths = [str(path), str(path)]
    expected = model.encode_image(paths)
    for x in ([np.str_(p) for p in paths], np.array(paths), np.array([path, path], object)):
        np.testing.assert_array_equal(model.encode_image(x), expected)
    data = np.array([path.read_bytes()] * 2)
    assert data.dtype.kind == "S"
    np.testing.assert_array_equal(model.encode_image(data), expected)
    with pytest.raises(InputTypeError, match=r"^image 0: .* not list"):
        model.encode_image(np.array([paths]))


def test_numpys_strings_are_texts():
    def ids(x):
        batches, single = text_batches(x, npclip.tokenize, 77, 49408, 64)
        return np.concatenate(list(batches)).tolist(), single

    texts = ["a cat", "a dog"]
    expected = npclip.tokenize(texts).tolist()
    for x in (np.array(texts), np.array(texts, object), [np.str_(t) for t in texts]):
        assert ids(x) == (expected, False)
    for x in (np.str_("a cat"), np.array("a cat")):
        assert ids(x) == (expected[:1], True)
    with pytest.raises(InputTypeError, match="bytes"):
        ids(np.array([b"a cat"]))


def test_arrays_that_know_dlpack(model, texts):
    size = model.visual.input_resolution
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, size, size)).astype(np.float32)
    pictures = rng.integers(0, 256, (2, 37, 53, 3), np.uint8)
    for images in (pixels, pictures):
        for x, expected in ((DLPackOnly(images), images), (DLPackOnly(images[0]), images[0])):
            np.testing.assert_array_equal(model.encode_image(x), model.encode_image(expected))
        found = model.encode_image([DLPackOnly(image) for image in images])
        np.testing.assert_array_equal(found, model.encode_image(list(images)))
    expected = model.encode_text(texts)
    for x in (DLPackOnly(texts), [DLPackOnly(row) for row in texts]):
        np.testing.assert_array_equal(model.encode_text(x), expected)
    elsewhere = DLPackOnly(pixels, (8, 0))  # Metal
    for encode in (model.encode_image, model.encode_text):
        with pytest.raises(InputTypeError, match="cannot read DLPackOnly by DLPack"):
            encode(elsewhere)
    with pytest.raises(InputTypeError, match="image 0: cannot read DLPackOnly"):
        model.encode_image([elsewhere])


def test_a_pil_image_is_not_copied(model, monkeypatch):
    """Its __array_interface__ would decode it and copy it whole."""
    sizes, original = [], Image.Image.__array_interface__

    def spy(image):
        sizes.append(image.size)
        return original.fget(image)

    monkeypatch.setattr(Image.Image, "__array_interface__", property(spy))
    picture = Image.new("RGB", (170, 150))
    model.encode_image(picture)
    model.encode_image([picture, picture])
    assert (170, 150) not in sizes


def test_broken_pil_images(model, pictures):
    data = (pictures / "chelsea.png").read_bytes()
    closed = Image.open(io.BytesIO(data))
    closed.close()
    for broken in (Image.open(io.BytesIO(data[: len(data) // 2])), closed):
        with pytest.raises(ImageError):
            model.encode_image(broken)
        with pytest.raises(ImageError, match=r"^image 1: "):
            model.encode_image([Image.new("RGB", (9, 9)), broken])


def test_batches_of_arrays(model):
    size = model.visual.input_resolution
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size))
    assert model.encode_image(pixels).shape == (2, 48)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model.encode_image(pictures), model.encode_image(list(pictures)))


def test_one_text_and_many(model, texts):
    many = model.encode_text(texts)
    assert many.shape == (3, 48)
    assert model.encode_text(texts[0]).shape == (48,)
    np.testing.assert_array_equal(model.encode_text(texts.tolist()), many)
    np.testing.assert_array_equal(model.encode_text(texts.astype(np.uint16)), many)


def test_nothing_gives_no_rows(model):
    size = model.visual.input_resolution
    for x in ([], (), iter([]), np.empty((0, 3, size, size), np.float32)):
        assert model.encode_image(x).shape == (0, 48)
    for x in ([], (), iter([]), np.empty((0, 77), int)):
        assert model.encode_text(x).shape == (0, 48)
    logits, transposed = model([], [])
    assert logits.shape == transposed.shape == (0, 0)


def test_normalize(model, texts):
    features = model.encode_text(texts, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)
    raw = model.encode_text(texts)
    np.testing.assert_allclose(features, raw / np.linalg.norm(raw, axis=-1, keepdims=True), 1e-5)


def test_logits_are_scaled_cosines(model, texts, pictures):
    path = pictures / "rocket.jpg"
    image, text = model.encode_image([path], True), model.encode_text(texts, True)
    logits, transposed = model(path, texts)
    assert logits.shape == (1, 3)
    np.testing.assert_allclose(logits, 100 * image @ text.T, rtol=1e-5)
    np.testing.assert_array_equal(transposed, logits.T)
    assert model.logit_scale == np.float32(np.log(100))


def test_long_inputs_are_streamed(model, monkeypatch):
    """However many images there are, at most a batch, and those being decoded, exist at a time."""
    alive, most = 0, 0
    size = model.visual.input_resolution
    batch = 32 * 224 * 224 // size**2

    class Picture(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def pictures():
        nonlocal alive, most
        for _ in range(2 * batch + 1):
            alive += 1
            most = max(most, alive)
            yield np.zeros((3, size, size), np.float32).view(Picture)

    assert len(model.encode_image(pictures())) == 2 * batch + 1
    assert most <= batch + 2 * npclip.get_num_threads() + 2


IMAGE_ERRORS = {
    "missing file": ("no/such/file.jpg", ImageError),
    "not an image": (b"hello", ImageError),
    "no bytes": (b"", ImageError),
    "one number": (3, InputTypeError),
    "None": (None, InputTypeError),
    "a list with None": ([None], InputTypeError),
    "float picture": (np.zeros((30, 40, 3)), InputError),
    "wrong resolution": (np.zeros((1, 3, 31, 31), np.float32), InputError),
    "channels last": (np.zeros((2, 64, 64, 3), np.float32), InputError),
    "zero-size picture": (np.zeros((0, 10, 3), np.uint8), ImageError),
    "channels first": (np.zeros((3, 30, 40), np.uint8), ImageError),
    "int64 picture": (np.zeros((30, 40, 3), int), ImageError),
    "0-d array": (np.zeros((), np.float32), InputError),
    "5-d array": (np.zeros((1, 1, 3, 64, 64), np.uint8), ImageError),
}


@pytest.mark.parametrize(("x", "error"), IMAGE_ERRORS.values(), ids=IMAGE_ERRORS)
def test_what_is_no_image_is_an_error(model, x, error):
    with pytest.raises(error):
        model.encode_image(x)


def test_an_error_in_a_list_names_its_place(model, pictures):
    with pytest.raises(ImageError, match=r"^image 1: .*missing\.jpg"):
        model.encode_image([pictures / "rocket.jpg", "missing.jpg"])


TEXT_ERRORS = {
    "number": (3, InputTypeError),
    "None": (None, InputTypeError),
    "bytes": (b"a cat", InputTypeError),
    "list with None": (["a", None], InputTypeError),
    "list of None": ([None], InputTypeError),
    "floats": (np.zeros((1, 77)), InputError),
    "too long": (np.zeros((1, 78), int), InputError),
    "empty rows": (np.zeros((2, 0), int), InputError),
    "3-d": (np.zeros((1, 1, 77), int), InputError),
    "negative id": (np.full((1, 77), -1), InputError),
    "id beyond the vocabulary": (np.full((1, 77), 100), InputError),
    "ragged ids": ([[1, 2], [3]], InputTypeError),
}


@pytest.mark.parametrize(("x", "error"), TEXT_ERRORS.values(), ids=TEXT_ERRORS)
def test_what_is_no_text_is_an_error(model, x, error):
    with pytest.raises(error):
        model.encode_text(x)


@pytest.mark.parametrize(
    ("text", "error"), [("word " * 100, TextTooLongError), (None, InputTypeError)]
)
def test_an_error_in_a_long_list_of_texts_names_its_place(text, error):
    batches, _ = text_batches(["a"] * 70 + [text], npclip.tokenize, 77, 49408, 64)
    with pytest.raises(error, match=r"^text 70 "):
        list(batches)


def test_a_model_of_fewer_tokens_tokenizes_by_itself(tmp_path):
    config = dataclasses.replace(tiny_models.VIT, context_length=20, vocab_size=600)
    path = tmp_path / "small.safetensors"
    tensors = tiny_models.weights(config)
    save_file(tensors, path, npclip.config.Metadata(activation="gelu").to_strings())
    model = npclip.load(path, device="cpu")
    texts = ["a cat", "naïve"]
    ids = npclip.tokenize(texts, 20, vocab_size=600)
    assert ids.max() == 599
    np.testing.assert_array_equal(model.encode_text(texts), model.encode_text(ids))
    with pytest.raises(TextTooLongError, match="text 0 has 22 tokens"):
        model.encode_text("z" * 20)


def test_too_few_tokens_for_texts_is_an_error(model):
    with pytest.raises(InputError, match=r"vocab_size must be at least 514.*: 100"):
        model.encode_text(["a cat"])


def test_one_tower_alone(golden, texts):
    text = npclip.load(golden.path, towers=("text",))
    np.testing.assert_array_equal(text.encode_text(texts), golden.model.encode_text(texts))
    with pytest.raises(InputError, match="image tower was not loaded"):
        text.encode_image(golden.arrays["images"])
    image = npclip.load(golden.path, towers="image")
    assert image.encode_image(golden.arrays["images"]).shape == (3, 48)
    with pytest.raises(InputError, match="text tower was not loaded"):
        image.encode_text(texts)


@pytest.mark.parametrize("towers", [(), ("audio",), ("image", "audio"), ""])
def test_unknown_towers(golden, towers):
    with pytest.raises(InputError, match="towers"):
        npclip.load(golden.path, towers=towers)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "int8"}, {"dtype": "half"}])
def test_what_is_not_available_is_an_error_before_anything_is_read(options):
    with pytest.raises(BackendError):
        npclip.load("ViT-B/32", **options)


def test_a_wrong_activation_name(golden):
    with pytest.raises(CheckpointError, match="relu"):
        npclip.load(golden.path, activation="relu")


def test_classify(golden, monkeypatch, pictures, texts):
    """Probabilities of templates; the small vocabulary needs a tokenizer of its own."""
    model = golden.model
    seen = []

    def tokenize(prompts, **_):
        seen.extend(prompts)
        return texts[: len(prompts)]

    monkeypatch.setattr("npclip.clip.tokenize", tokenize)
    path = pictures / "rocket.jpg"
    probabilities = model.classify(path, ["cat", "dog", "{}"], template="one {}!")
    assert seen == ["one cat!", "one dog!", "one {}!"]
    assert probabilities.shape == (3,)
    np.testing.assert_allclose(probabilities, npclip.softmax(model(path, texts)[0])[0], rtol=1e-5)
    assert model.classify([path, path], ["cat"]).tolist() == [[1], [1]]
    labels = (label for label in ("cat", "dog"))
    np.testing.assert_array_equal(
        model.classify(path, labels), model.classify(path, ["cat", "dog"])
    )
    assert model.classify([], ["cat", "dog"]).shape == (0, 2)
    with pytest.raises(InputError, match="template"):
        model.classify(path, ["cat"], template="a cat")
    for labels in ("cat", [], iter([])):
        with pytest.raises(InputError, match="labels"):
            model.classify(path, labels)
    for labels, template in ((3, "{}"), (["cat", 3], "{}"), ([b"cat"], "{}"), (["cat"], 3)):
        with pytest.raises(InputTypeError, match=r"label|template"):
            model.classify(path, labels, template)


def test_threads_share_a_model(model):
    images = np.random.default_rng(0).standard_normal(
        (8, 3, model.visual.input_resolution, model.visual.input_resolution), dtype=np.float32
    )
    expected = model.encode_image(images)
    results = [None] * 4

    def run(i):
        results[i] = model.encode_image(images)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_a_model_can_be_pickled(model, texts):
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.encode_text(texts), model.encode_text(texts))


def test_repr(model):
    assert repr(model) == "CLIP(image+text, embed_dim=48, float32, cpu)"


def test_softmax():
    np.testing.assert_allclose(npclip.softmax([[0, 0], [1, 1]]), [[0.5, 0.5]] * 2)
    assert npclip.softmax([1, 2]).dtype == np.float32
    assert npclip.softmax(np.empty((0, 2))).shape == (0, 2)
    for x in ([], 3, np.empty((2, 0))):
        with pytest.raises(InputError, match="at least one"):
            npclip.softmax(x)


def test_show_config(capsys, monkeypatch):
    npclip.show_config()
    assert "cpu backend:" in capsys.readouterr().out
    monkeypatch.setenv("NPCLIP_BACKEND", "reference")
    assert "NPCLIP_BACKEND=reference" in npclip.show_config("dicts")["cpu backend"]
    assert npclip.show_config("dicts")["npclip"] == npclip.__version__
    with pytest.raises(InputError, match="mode"):
        npclip.show_config("json")
