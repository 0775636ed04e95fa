"""The configuration of npclip train: every key and type, what contradicts, what may change."""

import dataclasses
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npclip.config import ARCHITECTURES
from npclip.errors import InputError
from npclip.training.checked import build, flat, to_toml
from npclip.training.settings import Settings, check, differences, read_settings

FULL = {
    "model": {"checkpoint": "ViT-B/32"},
    "data": {"sources": ["a.tar", "b"], "validation": "c.tar"},
    "augment": {"scale": [0.5, 1], "flip": 0.5, "background": "random"},
    "train": {"batch": 8, "steps": 100, "freeze": {"image": "all", "text": 1}},
    "output": {"folder": "run"},
}
NUMBERS = {
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 1,
    "vision_width": 128,
    "vision_patch_size": 8,
    "transformer_width": 64,
    "transformer_layers": 1,
}


def changed(path, value, table=FULL):
    key, _, rest = path.partition(".")
    new = changed(rest, value, table.get(key, {})) if rest else value
    return {**table, key: new}


def made(table=FULL):
    return check(build(Settings, table))


KEYS = [name for name, _ in flat(made())]


def test_values_are_what_the_file_says(tmp_path):
    found = made()
    assert found.data.sources == ("a.tar", "b")
    assert found.data.validation == ("c.tar",)
    assert found.augment.scale == (0.5, 1.0)
    assert (found.train.freeze.image, found.train.freeze.text) == ("all", 1)
    assert found.train.learning_rate == 5e-4 and found.train.micro_batch is None


def test_a_run_stores_what_it_was_told(tmp_path):
    table = changed("data.sources", ['a "quoted" \\ path\x7f', "ü€\U0001f600"])
    for found in (made(), made(table), made(changed("model", NUMBERS))):
        (tmp_path / "c.toml").write_text(to_toml(found), "utf-8")
        assert read_settings(tmp_path / "c.toml") == found


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_is_good_or_one_clear_error(key, value):
    try:
        found = made(changed(key, value))
    except InputError as error:
        text = str(error)
        assert key.split(".")[0] in text and "\n" not in text
        return
    kept = dict(flat(found))[key]
    if not isinstance(kept, tuple):
        assert kept == value and isinstance(kept, bool) == isinstance(value, bool)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(KEYS), st.text(min_size=1, max_size=12))
def test_unknown_keys_are_named(key, name):
    table = key.rpartition(".")[0]
    if f"{table}.{name}" in KEYS or (table, name) == ("train", "freeze") or "." in name:
        return
    with pytest.raises(InputError, match=re.escape(f"{table}.{name}: no such key")):
        made(changed(f"{table}.{name}", 1))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.bacth", 1, r"train.bacth: no such key; did you mean train.batch\?"),
        ("trian", {}, r"trian: no such key; did you mean train\?"),
        ("train.freeze.images", 1, r"did you mean train.freeze.image\?"),
        ("train.qqqq", 1, r"no such key \(known: train.batch, train.steps"),
        ("train.batch", 1, "train.batch must be at least 2, not 1"),
        ("train.batch", 8.0, "train.batch must be an integer, not 8.0"),
        ("train.batch", True, "train.batch must be an integer, not true"),
        ("train.steps", "many", 'train.steps must be an integer, not "many"'),
        ("train", 3, "train must be a table, not 3"),
        ("train.betas", [0.9], "train.betas must be a list of 2 numbers"),
        ("train.betas", [0.9, 1.0], "train.betas must be at most 0.99999"),
        ("train.learning_rate", float("nan"), "train.learning_rate must be a number"),
        ("train.dtype", "int8", "train.dtype must be one of float32, float16, bfloat16"),
        ("train.freeze.image", "some", "train.freeze.image must be one of all"),
        ("train.freeze.image", -1, "train.freeze.image must be at least 0"),
        ("train.epochs", 2, "one of steps and epochs"),
        ("train.micro_batch", 9, "train.micro_batch must be at most train.batch"),
        ("train.warmup", 101, "train.warmup must be at most train.steps"),
        ("train.freeze", {"image": "all", "text": "all", "logit_scale": True}, "nothing to train"),
        ("data.sources", [], "data.sources has no source"),
        ("data.sources", [1], "data.sources must be a string or a list of them"),
        ("data.sources", "a\udcff", "data.sources must be Unicode, not "),
        ("data.labels", "x", "data.labels is for data.zero_shot"),
        ("augment.scale", [1, 0.5], "augment.scale must rise"),
        ("augment.scale", [0, 0.5], "augment.scale must be above 0"),
        ("augment.background", "no colour", 'must be "random" or a colour'),
        ("model.architecture", "ViT-B/32", "not checkpoint and architecture"),
        ("model", {}, "model: one of checkpoint, architecture, or the numbers"),
        ("model", {"architecture": "ViT"}, "model.architecture must be one of ViT-B/32"),
        ("model", {"embed_dim": 4}, "model.image_resolution is missing"),
        ("model", {**NUMBERS, "vision_patch_size": 7}, "32 is no multiple of 7"),
        ("model", {**NUMBERS, "vision_heads": 3}, "must be a multiple of model.vision_heads"),
        ("model.activation", "relu", "model.activation must be one of quick_gelu, gelu"),
        ("output", {}, "output.folder is missing: a string"),
        ("output.curves", "../c.svg", "output.curves must be a file name"),
    ],
)
def test_what_is_wrong_is_said(key, value, message):
    with pytest.raises(InputError, match=message):
        made(changed(key, value))


def test_architectures():
    assert made().model.config() is None
    named = made(changed("model", {"architecture": "ViT-B/16"})).model.config()
    assert named == ARCHITECTURES["ViT-B/16"]
    config = made(changed("model", {**NUMBERS, "activation": "gelu"})).model.config()
    assert (config.vision_heads, config.vision_mlp, config.transformer_heads) == (2, 512, 1)
    assert (config.context_length, config.vocab_size, config.activation) == (77, 49408, "gelu")


def test_changes_on_the_command_line(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(to_toml(made()))
    changes = ["train.steps=7", "output.folder=other/run", "train.freeze.image=0", "augment.flip=1"]
    found = read_settings(path, changes)
    assert (found.train.steps, found.output.folder) == (7, "other/run")
    assert (found.train.freeze.image, found.augment.flip) == (0, 1.0)
    for change, message in {
        "train.steps": "not of the form",
        "steps=7": "not of the form",
        "train.steps=x": 'train.steps must be an integer, not "x"',
        "train.batch.x=1": "batch is no table",
        "train.stps=1": r"did you mean train.steps\?",
    }.items():
        with pytest.raises(InputError, match=f"c.toml: .*{message}"):
            read_settings(path, [change])


def test_files_that_are_no_toml(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_settings(tmp_path / "missing.toml")
    for data in (b"[train", b"\xff\xfe", b"a = 1\na = 2"):
        (tmp_path / "bad.toml").write_bytes(data)
        with pytest.raises(InputError, match=r"bad\.toml: "):
            read_settings(tmp_path / "bad.toml")


def test_what_a_run_may_go_on_with():
    old = made()
    assert differences(old, old) == []
    longer = dataclasses.replace(old.train, steps=200, micro_batch=2, learning_rate=1.0)
    assert differences(old, dataclasses.replace(old, train=longer)) == [
        "train.learning_rate: 0.0005 -> 1.0"
    ]
