"""Models with device="cuda" on a fake device: all of the host's code, the kernels on the shim."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cuda.fake_device import FakeArray, FakeDevice, on_device

import npclip
from npclip import cuda_device, cuda_towers, ops
from npclip.cuda_towers import fill_up_tokens

# How far embeddings may be off, of the largest. The small random models magnify rounding: scores of
# keys are in the hundreds, and two of them change places where all is bfloat16.
DTYPES = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 0.15}


@pytest.fixture
def device(monkeypatch, golden):
    """Graphs replay launches; ResNets compute some things with CuPy itself, so theirs run again."""
    device = FakeDevice(records_launches="vit" in golden.path.name)
    monkeypatch.setattr(cuda_device, "_devices", {0: device})
    return device


@pytest.fixture(params=DTYPES)
def model(request, golden, device):
    return npclip.load(golden.path, device="cuda", dtype=request.param)


def assert_close(found, expected, dtype):
    assert isinstance(found, FakeArray)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    a, b = npclip.asnumpy(found).astype(float), np.asarray(expected, float)
    assert np.abs(a - b).max() <= DTYPES[dtype] * np.abs(b).max()


def test_embeddings_equal_those_of_openai_clip(model, golden):
    images, ids = golden.arrays["images"], golden.arrays["ids"]
    assert str(model.device) == "cuda:0"
    for _ in range(2):  # the second time replays graphs
        assert_close(model.encode_image(images), golden.arrays["quick_gelu/image"], model.dtype)
        assert_close(model.encode_text(ids), golden.arrays["quick_gelu/text"], model.dtype)


def test_a_graph_computes_what_it_is_given(model, golden):
    images = golden.arrays["images"]
    forward, backward = model.encode_image(images), model.encode_image(images[::-1])
    np.testing.assert_array_equal(forward[::-1], backward)
    alone = np.stack([model.encode_image(image) for image in images])
    assert np.abs(alone - forward).max() <= DTYPES[model.dtype] * np.abs(forward).max()
    ids = golden.arrays["ids"]
    texts = model.encode_text(ids)
    np.testing.assert_array_equal(model.encode_text(ids[::-1])[::-1], texts)


def test_large_batches_need_no_graph(model, golden, monkeypatch):
    monkeypatch.setattr(cuda_towers, "LARGEST_GRAPH", 1)
    images, ids = golden.arrays["images"], golden.arrays["ids"]
    assert_close(model.encode_image(images), golden.arrays["quick_gelu/image"], model.dtype)
    assert_close(model.encode_text(ids), golden.arrays["quick_gelu/text"], model.dtype)


def test_inputs_from_the_device(golden, device):
    model = npclip.load(golden.path, device="cuda:0")
    host = npclip.load(golden.path, device="cpu")
    pixels = golden.arrays["images"].astype(np.float32)
    expected = model.encode_image(pixels)
    np.testing.assert_array_equal(model.encode_image(on_device(pixels)), expected)
    assert_close(model.encode_image(on_device(pixels[0])), expected[0], "float16")
    picture = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), np.uint8)
    found = model.encode_image(on_device(picture))
    assert_close(found, host.encode_image(picture), "float16")
    assert_close(model.encode_image(on_device(picture[1])), found[1], "float16")
    for wrong in (pixels[:, :2], pixels[..., :3], picture[..., :2]):
        with pytest.raises(npclip.InputError, match="on a GPU"):
            model.encode_image(on_device(wrong))


def test_results_go_on_as_on_the_host(golden, device):
    model, host = (npclip.load(golden.path, device=d, dtype="float32") for d in ("cuda", "cpu"))
    images, ids = golden.arrays["images"], golden.arrays["ids"]
    for found, expected in zip(model(images, ids), host(images, ids), strict=True):
        np.testing.assert_allclose(npclip.asnumpy(found), expected, rtol=1e-4, atol=1e-4)
    unit = model.encode_image(images, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(npclip.asnumpy(unit), axis=1), 1, rtol=1e-6)
    assert model.encode_image([]).shape == (0, host.config.embed_dim)
    assert model.encode_text([]).shape == (0, host.config.embed_dim)
    assert isinstance(model.encode_text([]), FakeArray)


def test_devices_and_dtypes(device):
    assert ops.resolve("cuda") == ("cuda:0", "float16")
    assert ops.resolve("cuda:0", "float32") == ("cuda:0", "float32")
    assert ops.resolve("cpu") == ("cpu", "float32")
    with pytest.raises(npclip.BackendError, match="int8"):
        ops.resolve("cuda", "int8")
    for wrong in ("cuda:", "cuda:x", "cpu:0", "cuda:-1", "gpu"):
        with pytest.raises(npclip.BackendError, match=wrong):
            ops.resolve(wrong)


def test_an_old_card_computes_with_cupy(golden, monkeypatch):
    device = FakeDevice(capability=(7, 0), records_launches=False)
    monkeypatch.setattr(cuda_device, "_devices", {0: device})
    assert ops.resolve("cuda") == ("cuda:0", "float32")
    with pytest.raises(npclip.BackendError, match=r"float16.*not available on cuda:0: float32"):
        ops.resolve("cuda", "float16")
    model = npclip.load(golden.path, device="cuda")
    found = model.encode_image(golden.arrays["images"])
    assert_close(found, golden.arrays["quick_gelu/image"], "float32")
    found = model.encode_text(golden.arrays["ids"])
    assert_close(found, golden.arrays["quick_gelu/text"], "float32")
    assert not device.launches


def fake_cupy(count=1, version="14.0.1", capability=(9, 0), error=None):
    class CUDARuntimeError(RuntimeError):
        pass

    def get_device_count():
        if error:
            raise CUDARuntimeError(error)
        return count

    properties = {"name": b"old card", "major": capability[0], "minor": capability[1]}
    runtime = SimpleNamespace(
        getDeviceCount=get_device_count,
        CUDARuntimeError=CUDARuntimeError,
        getDeviceProperties=lambda _: properties,
    )
    device = type("Device", (), {"__init__": lambda s, _: None, "__enter__": lambda s: s,
                                 "__exit__": lambda s, *_: None})  # fmt: skip
    return SimpleNamespace(
        __version__=version, cuda=SimpleNamespace(runtime=runtime, Device=device)
    )


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (None, r"no GPU without CuPy .*pip install 'npclip\[cuda12\]'"),
        (fake_cupy(version="13.6.0"), r"CuPy 13.6.0 is too old, 14 is needed"),
        (fake_cupy(error="cudaErrorInsufficientDriver"), "cudaErrorInsufficientDriver"),
        (fake_cupy(count=0), "no GPU"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, cupy, message):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda_device, "_devices", {})
    cuda_device.cupy.cache_clear()
    try:
        with pytest.raises(npclip.BackendError, match=message):
            ops.resolve("cuda")
        assert ops.resolve(None)[0] == "cpu"
        assert npclip.show_config("dicts")["cuda backend"].startswith("none: ")
    finally:
        cuda_device.cupy.cache_clear()


def test_a_number_without_a_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(cuda_device, "_devices", {})
    cuda_device.cupy.cache_clear()
    with pytest.raises(npclip.BackendError, match=r"no cuda:3: CuPy finds 1 GPU"):
        ops.resolve("cuda:3")
    cuda_device.cupy.cache_clear()


@pytest.mark.parametrize("lengths", [[1], [7, 3], [77], [77] * 64, [1] * 64, [5] * 33])
def test_filled_up_texts_have_shapes_of_powers_of_two(lengths):
    seqs = np.append(0, np.cumsum(lengths)).astype(np.int32)
    tokens = np.arange(1, seqs[-1] + 1, dtype=np.int32)
    filled = list(fill_up_tokens(tokens, tokens - 1, seqs, seqs[1:] - 1, 77))
    more_tokens, positions, more_seqs, last = filled
    total, texts = len(more_tokens), len(last)
    assert total & (total - 1) == texts & (texts - 1) == 0
    assert len(positions) == total
    np.testing.assert_array_equal(more_tokens[: len(tokens)], tokens)
    np.testing.assert_array_equal(more_seqs[: len(seqs)], seqs)
    np.testing.assert_array_equal(last[: len(lengths)], seqs[1:] - 1)
    steps = np.diff(more_seqs)
    assert steps.min() >= 0
    assert steps.max() <= 77
    assert more_seqs[-1] == total
    assert positions.max() <= max(76, tokens[-1] - 1)
    assert all(a.dtype == np.int32 for a in filled)
