"""What tells the embeddings of two models apart."""

import dataclasses
import hashlib
import json

import pytest
import tiny_models
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip.config import Metadata
from npclip.convert import convert
from npclip.provenance import CALLED, Provenance, preprocessing

ONE = Provenance("ViT-B/32", "ab" * 32, "float32", "224 px", True, 512, "0.1.0")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(random_tensors(tiny_models.VIT), path, Metadata(activation="gelu").to_strings())
    return path


def test_of_a_model(path):
    model = npclip.load(path, device="cpu", dtype="float16")
    found = model.provenance(normalized=False)
    assert found == Provenance(
        model="tiny.safetensors",
        weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        dtype="float16",
        preprocessing=preprocessing(model.config.image_resolution, model.metadata),
        normalized=False,
        dimension=model.config.embed_dim,
        npclip=npclip.__version__,
    )
    assert model.provenance() == dataclasses.replace(found, normalized=True)


def test_a_converted_checkpoint_is_its_source(path, tmp_path):
    convert(path, tmp_path / "converted.safetensors")
    models = [npclip.load(p, device="cpu") for p in (path, tmp_path / "converted.safetensors")]
    one, other = (model.provenance() for model in models)
    assert one.model != other.model
    assert one.differences(other) == []
    one.check(other, "a collection")


def test_a_relative_path_is_where_it_was(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = npclip.load(path.name, device="cpu")
    monkeypatch.chdir("/")
    assert model.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_has_changed_since(path):
    model, other = npclip.load(path, device="cpu"), npclip.load(path, device="cpu")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(npclip.CheckpointError, match="has changed since it was loaded"):
        model.provenance()
    path.unlink()
    with pytest.raises(npclip.CheckpointError, match="No such file"):
        other.provenance()


def test_a_model_that_is_no_file():
    loaded = npclip.CLIP(tiny_models.VIT, Metadata(activation="gelu"), {})
    with pytest.raises(npclip.InputError, match="not loaded from a file"):
        loaded.provenance()


@pytest.mark.parametrize("field", CALLED)
def test_what_is_told_apart(field):
    value = getattr(ONE, field)
    changed = {str: f"{value}!", bool: not value, int: 640}[type(value)]
    other = dataclasses.replace(ONE, **{field: changed}, model="other")
    first, second = ONE.differences(other)
    assert first == "model: ViT-B/32 here, other there"
    assert second == f"{CALLED[field]}: {value} here, {changed} there"
    with pytest.raises(npclip.ProvenanceError, match=r"^the index has other embeddings: model: "):
        ONE.check(other, "the index")


def test_names_alone_are_no_difference():
    assert ONE.differences(dataclasses.replace(ONE, model="copy.pt", npclip="9.9")) == []


def test_as_json():
    assert Provenance.from_dict(json.loads(json.dumps(ONE.as_dict()))) == ONE
    assert Provenance.from_dict({**ONE.as_dict(), "more": 1}) == ONE


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Provenance)])
@pytest.mark.parametrize("value", [None, 1.5, [], "missing"])
def test_what_is_no_provenance(field, value):
    values = ONE.as_dict()
    if value == "missing":
        del values[field]
    else:
        values[field] = value
    with pytest.raises(npclip.ProvenanceError, match=f"without {field}"):
        Provenance.from_dict(values)


def test_preprocessing_tells_pixels_apart():
    base = Metadata()
    others = [
        Metadata(resize="squash"), Metadata(interpolation="bilinear"), Metadata(mean=(0.5,) * 3),
        Metadata(std=(0.5,) * 3), Metadata(std=(0.26862954, 0.26130258, 0.27577712)),
    ]  # fmt: skip
    texts = {preprocessing(224, base), preprocessing(336, base)}
    texts |= {preprocessing(224, other) for other in others}
    assert len(texts) == 2 + len(others)
    same = dataclasses.replace(base, activation="gelu", source="x", vision_heads=3)
    assert preprocessing(224, base) == preprocessing(224, same)
