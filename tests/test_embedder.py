"""Embedder against the model that it is made of."""

import multiprocessing
import pickle
import sys
import threading
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_models

import npclip
from npclip import embedder

PICTURE = Path(__file__).parent / "data" / "chelsea.png"
TEXTS = ["a cat", "a dog on a lawn"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.save_words(tmp_path_factory.mktemp("model"))


@pytest.fixture
def loads(monkeypatch):
    """The towers that were loaded, in their order."""
    found, load = [], embedder.load

    def note(*arguments, towers, **options):
        found.extend(towers)
        return load(*arguments, towers=towers, **options)

    monkeypatch.setattr(embedder, "load", note)
    return found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_the_models(path, normalize, dtype):
    model = npclip.load(path, device="cpu", dtype=dtype)
    one = npclip.Embedder(path, device="cpu", dtype=dtype, normalize=normalize)
    images = [PICTURE, PICTURE.read_bytes()]
    found, wanted = one.embed_images(images), model.encode_image(images, normalize=normalize)
    assert type(found) is np.ndarray
    assert (found.dtype, found.shape) == (np.float32, (2, one.dimension))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(one.embed_images(PICTURE), wanted[0])
    wanted = model.encode_text(TEXTS, normalize=normalize)
    np.testing.assert_array_equal(one.embed_texts(iter(TEXTS)), wanted)
    np.testing.assert_array_equal(one.embed_texts(TEXTS[0]), wanted[0])
    assert one.provenance() == model.provenance(normalize)


def test_pixels_ahead(path):
    one, picture = npclip.Embedder(path, device="cpu"), PICTURE.read_bytes()
    pixels = one.preprocess(picture)
    side = tiny_models.VIT.image_resolution
    assert (pixels.dtype, pixels.shape) == (np.float32, (3, side, side))
    np.testing.assert_array_equal(one.embed_images(pixels), one.embed_images(picture))
    with pytest.raises(npclip.ImageError):
        one.preprocess(b"none")


def test_another_thread_is_importing_pillow(path, monkeypatch):
    one = npclip.Embedder(path, device="cpu")
    wanted, pixels = one.embed_images(PICTURE), one.preprocess(PICTURE)
    monkeypatch.setitem(sys.modules, "PIL.Image", types.ModuleType("PIL.Image"))  # has no Image yet
    np.testing.assert_array_equal(one.embed_images(pixels), wanted)


def test_only_what_is_needed_is_loaded(path, loads):
    one = npclip.Embedder(path, device="cpu")
    assert one.dimension == tiny_models.VIT.embed_dim
    assert loads == []
    one.embed_texts("a cat")
    one.embed_texts("a dog")
    assert loads == ["text"]
    one.embed_images(PICTURE)
    one.provenance()
    assert loads == ["text", "image"]


def test_threads_load_once(path, loads):
    one, start = npclip.Embedder(path, device="cpu"), threading.Barrier(8)

    def embed(_):
        start.wait()
        return one.embed_texts(TEXTS)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(embed, range(8)))
    assert loads == ["text"]
    for embeddings in found:
        np.testing.assert_array_equal(embeddings, found[0])


def test_a_pickle_is_the_arguments(path):
    one = npclip.Embedder(path, device="cpu", dtype="bfloat16", normalize=False, activation="gelu")
    wanted = one.embed_texts(TEXTS)
    pickled = pickle.dumps(one)
    assert len(pickled) < 1000
    other = pickle.loads(pickled)
    assert repr(other) == repr(one)
    np.testing.assert_array_equal(other.embed_texts(TEXTS), wanted)


def test_other_processes_embed_the_same(path):
    one = npclip.Embedder(path, device="cpu")
    wanted = [one.embed_texts(text) for text in TEXTS]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for found, expected in zip(pool.map(one.embed_texts, TEXTS), wanted, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_how_it_is_shown():
    assert repr(npclip.Embedder()) == "Embedder('ViT-B/32')"
    shown = repr(npclip.Embedder(Path("a.pt"), dtype="float16", normalize=False))
    assert shown == "Embedder('a.pt', dtype='float16', normalize=False)"


def test_errors_are_those_of_the_model(path, tmp_path):
    missing = npclip.Embedder(tmp_path / "missing.pt", device="cpu")
    for call in (lambda: missing.dimension, lambda: missing.embed_texts("a"), missing.provenance):
        with pytest.raises(npclip.ModelNotFoundError):
            call()
    one = npclip.Embedder(path, device="cpu")
    with pytest.raises(npclip.TextTooLongError):
        one.embed_texts("word " * 100)
    assert one.embed_texts("word " * 100, truncate=True).shape == (one.dimension,)
    with pytest.raises(npclip.ImageError):
        one.embed_images(b"no image")
