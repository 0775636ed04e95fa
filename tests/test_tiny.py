"""The model that comes with npclip, on the drawings of the repository: no stand-ins, no network."""

import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest

import npclip
from npclip.__main__ import main
from npclip.hub import BUNDLED

DRAWINGS = Path(__file__).parents[1] / "examples" / "drawings"
PATHS = sorted(DRAWINGS.glob("*.png"))
NAMES = [path.stem.replace("-", " ") for path in PATHS]
TEMPLATES = ["{}", "a drawing of a {}"]


@pytest.fixture(scope="module")
def model():
    return npclip.load("tiny", device="cpu")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_it_is_small_and_whole(model):
    assert os.path.getsize(BUNDLED["tiny"]) <= 8_000_000
    assert "tiny" in npclip.available_models()
    assert (model.visual.input_resolution, model.visual.output_dim) == (48, 128)
    assert (model.context_length, model.vocab_size) == (32, 4610)
    assert model.provenance().model == "tiny"


def test_it_knows_drawings_that_it_was_not_trained_on(model):
    zeroshot = npclip.ZeroShot(model, NAMES, TEMPLATES, cache=False)
    best = [found[0][0] for found in zeroshot.predict_each(PATHS, top=1)]
    right = [name for name, label in zip(NAMES, best, strict=True) if name == label]
    assert len(right) >= 16, sorted(set(NAMES) - set(right))  # chance: 1 of 19


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_give_nearly_the_same(model, dtype):
    other = npclip.load("tiny", device="cpu", dtype=dtype)
    for name, inputs in (("encode_image", PATHS), ("encode_text", NAMES)):
        exact, found = (getattr(m, name)(inputs, normalize=True) for m in (model, other))
        assert (exact * found).sum(1).min() > 0.999
        if dtype == "float16":
            assert np.array_equal(exact, found)  # it is stored so


def test_it_works_in_a_pipeline(model):
    embedder = pickle.loads(pickle.dumps(npclip.Embedder("tiny")))
    assert np.array_equal(embedder.embed_texts(NAMES), model.encode_text(NAMES, normalize=True))
    assert embedder.dimension == 128


def test_the_commands_of_its_page(tmp_path, capsys):
    fox = str(DRAWINGS / "fox.png")
    assert main(["classify", fox, "fox", "octopus", "light bulb", "taxi", "--model", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("fox ")
    pytest.importorskip("pyarrow")
    collection = str(tmp_path / "drawings")
    assert main(["embed", str(DRAWINGS), "-o", collection, "--model", "tiny"]) == 0
    capsys.readouterr()
    for query, name in (
        ("a fish", "fish.png"),
        ("castle", "castle.png"),
        ("apple", "red-apple.png"),
    ):
        assert main(["search", collection, query, "--top", "1"]) == 0
        assert capsys.readouterr().out.strip().endswith(name), query


def test_a_word_that_its_vocabulary_lacks_is_spelled(model):
    texts = ["octopus", "zyzzyva", "ünïcödé 🙂"]
    assert np.isfinite(model.encode_text(texts)).all()
    with pytest.raises(npclip.TextTooLongError):
        model.encode_text("word " * 40)


def test_it_can_be_trained_further(model):
    from npclip.training import AdamW, State, from_checkpoint, train_step

    params, config, _ = from_checkpoint("tiny")
    state, before = State.start(params), params["visual.proj"].copy()
    images = np.stack([model.preprocess(path) for path in PATHS])
    ids = npclip.tokenize(NAMES, config.context_length, vocab_size=config.vocab_size)
    optimizer = AdamW(steps=10, learning_rate=1e-4)
    losses = [train_step(state, images, ids, config, optimizer).loss for _ in range(5)]
    assert losses[0] < np.log(len(NAMES)) / 2  # it knows them
    assert losses[-1] < losses[0]
    assert not np.array_equal(state.params["visual.proj"], before)
