"""The towers against openai/CLIP's outputs in float64, stored in tests/data/golden_*.npz."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import npclip
from npclip import cpu_library, ops
from npclip.checkpoint import open_checkpoint
from npclip.config import Metadata, infer_config
from npclip.convert import convert
from npclip.errors import CheckpointError
from npclip.kernels import reference
from npclip.model import encode_image, encode_text
from npclip.params import load_parameters


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def to_float64(node):
    if isinstance(node, dict):
        return {key: to_float64(value) for key, value in node.items()}
    if isinstance(node, list):
        return [to_float64(value) for value in node]
    return node.astype(np.float64)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_float32_features_equal_openai_clip(golden, activation, monkeypatch):
    """To 1e-6, or, where a small random model magnifies rounding, by the rule of the kernels: twice
    the error of the reference in float32, plus two roundings."""
    model = npclip.load(golden.path, activation=activation)
    features = model.encode_image(golden.arrays["images"]), model.encode_text(golden.arrays["ids"])
    monkeypatch.setattr(ops, "_host_backend", lambda: reference)
    model = npclip.load(golden.path, activation=activation)
    baseline = model.encode_image(golden.arrays["images"]), model.encode_text(golden.arrays["ids"])
    for found, plain, name in zip(features, baseline, ("image", "text"), strict=True):
        assert found.dtype == np.float32
        expected = golden.arrays[f"{activation}/{name}"]
        tiny = 2 * np.finfo(np.float32).eps
        bound = 2 * np.abs(unit(plain) - unit(expected)).max() + tiny
        assert np.abs(unit(found) - unit(expected)).max() <= max(1e-6, bound)
        assert np.abs(unit(plain) - unit(expected)).max() <= 1e-6
        np.testing.assert_allclose(found, expected, rtol=0, atol=6e-6 * np.abs(expected).max())


def test_the_same_text_in_float64_equals_openai_clip_in_float64(golden):
    """Not rounding but the formulas: with float64 parameters the models agree to 1e-7.

    What remains is the rounding of the folded BatchNorm weights to float32.
    """
    checkpoint = open_checkpoint(golden.path)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    config = infer_config(shapes, checkpoint.metadata)
    params = to_float64(load_parameters(checkpoint, config, ("image", "text")))
    image = encode_image(golden.arrays["images"].astype(np.float64), params["image"], config)
    text = encode_text(golden.arrays["ids"], params["text"], config)
    bound = 1e-12 if config.is_vit else 1e-7
    assert np.abs(unit(image) - unit(golden.arrays["quick_gelu/image"])).max() <= bound
    assert np.abs(unit(text) - unit(golden.arrays["quick_gelu/text"])).max() <= 1e-12


def test_the_two_activations_differ(golden):
    """So the tests above would notice a swap."""
    text = (golden.arrays[f"{name}/text"] for name in ("quick_gelu", "gelu"))
    assert np.abs(np.subtract(*map(unit, text))).max() > 1e-4


def test_what_follows_the_end_of_a_text_changes_nothing(golden):
    ids = golden.arrays["ids"].copy()
    noisy = ids.copy()
    for row in noisy:
        end = row.argmax()
        row[end + 1 :] = np.arange(len(row) - end - 1) % 50
    assert (golden.model.encode_text(ids) == golden.model.encode_text(noisy)).all()


def test_batches_and_single_inputs_agree(golden):
    images, ids, model = golden.arrays["images"], golden.arrays["ids"], golden.model
    together = model.encode_image(images)
    for image, features in zip(images, together, strict=True):
        np.testing.assert_allclose(model.encode_image(image), features, rtol=1e-4, atol=1e-5)
    together = model.encode_text(ids)
    for row, features in zip(ids, together, strict=True):
        np.testing.assert_allclose(model.encode_text(row), features, rtol=1e-4, atol=1e-5)


@pytest.fixture
def as_many_threads_afterwards():
    before = npclip.get_num_threads()
    yield
    npclip.set_num_threads(before)


@pytest.mark.skipif(
    cpu_library.why_unavailable() is not None, reason="BLAS orders its sums as it likes"
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_embedding_has_the_same_bits_in_every_batch(golden, dtype, as_many_threads_afterwards):
    model = npclip.load(golden.path, dtype=dtype)
    rng = np.random.default_rng()
    resolution = model.visual.input_resolution
    images = rng.standard_normal((256, 3, resolution, resolution), dtype=np.float32)
    ids = np.zeros((256, model.context_length), np.int32)
    for row in ids:
        end = int(rng.integers(1, model.context_length))
        row[:end], row[end] = rng.integers(0, 50, end), model.vocab_size - 1
    for encode, inputs in ((model.encode_image, images), (model.encode_text, ids)):
        npclip.set_num_threads(1)
        one_by_one = np.concatenate([encode(x[None]) for x in inputs[:7]])
        for threads in (1, 2, 3):
            npclip.set_num_threads(threads)
            np.testing.assert_array_equal(encode(inputs[:7]), one_by_one)
            np.testing.assert_array_equal(encode(inputs)[:7], one_by_one)


def test_float16_gives_the_bits_of_float32_where_that_is_what_is_stored(golden, tmp_path):
    convert(golden.path, tmp_path / "half.safetensors", dtype="float16")
    exact, half = (npclip.load(tmp_path / "half.safetensors", dtype=d) for d in (None, "float16"))
    assert half.dtype == "float16"
    for inputs, method in (("images", "encode_image"), ("ids", "encode_text")):
        x = golden.arrays[inputs]
        np.testing.assert_array_equal(getattr(half, method)(x), getattr(exact, method)(x))


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-6), ("bfloat16", 3e-3)])
def test_narrow_weights_stay_close_to_float32(golden, dtype, bound):
    model = npclip.load(golden.path, dtype=dtype)
    for inputs, method in (("images", "encode_image"), ("ids", "encode_text")):
        x = golden.arrays[inputs]
        narrow, exact = (unit(getattr(m, method)(x)) for m in (model, golden.model))
        assert 1 - (narrow * exact).sum(-1).min() <= bound
        assert (narrow != exact).any() or dtype == "float16"


def test_a_weight_too_large_for_float16_is_an_error(golden, tmp_path):
    weights = {k: v.astype(np.float32) for k, v in golden.weights.items()}
    name = next(k for k in weights if k.endswith("text_projection"))
    weights[name][0, 0] = 1e6
    metadata = Metadata(activation="quick_gelu").to_strings()
    save_file(weights, tmp_path / "large.safetensors", metadata)
    with pytest.raises(CheckpointError, match="too large for float16"):
        npclip.load(tmp_path / "large.safetensors", dtype="float16")
    npclip.load(tmp_path / "large.safetensors", dtype="bfloat16")
