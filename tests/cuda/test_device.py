"""Models with device="cuda" on a fake device: all of the host's code, the kernels on the shim."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from cuda.fake_device import XP, FakeArray, FakeDevice, on_device
from dlpack_only import DLPackOnly
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip import asnumpy as on_host
from npclip import cuda_device, cuda_towers, ops
from npclip.config import Metadata
from npclip.cuda_towers import KEPT_GRAPHS, Graphs, fill_up_tokens, graph_size

# How far embeddings may be off, of the largest. The small random models magnify rounding: scores of
# keys are in the hundreds, and two of them change places where all is bfloat16.
DTYPES = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 0.15}
# The least cosine with float32 of a model that is initialised as CLIP is.
TAME = (
    tiny_models.VIT,
    replace(tiny_models.RESNET, image_resolution=64, vision_width=16, vision_heads=8),
)
COSINES = {"float32": 0.999999, "float16": 0.9999, "bfloat16": 0.9998}


@pytest.fixture
def device(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(cuda_device, "_devices", {0: device})
    return device


@pytest.fixture(params=DTYPES)
def model(request, golden, device):
    return npclip.load(golden.path, device="cuda", dtype=request.param)


def assert_close(found, expected, dtype):
    assert isinstance(found, FakeArray)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    a, b = (on_host(x).astype(float) for x in (found, expected))
    assert np.abs(a - b).max() <= DTYPES[dtype] * np.abs(b).max()


def test_embeddings_equal_those_of_openai_clip(model, golden):
    images, ids = golden.arrays["images"], golden.arrays["ids"]
    assert str(model.device) == "cuda:0"
    for _ in range(2):  # the second time replays graphs
        assert_close(model.encode_image(images), golden.arrays["quick_gelu/image"], model.dtype)
        assert_close(model.encode_text(ids), golden.arrays["quick_gelu/text"], model.dtype)


@pytest.mark.parametrize("dtype", COSINES)
@pytest.mark.parametrize("config", TAME, ids=["vit", "resnet"])
def test_embeddings_of_a_tame_model_keep_their_direction(config, dtype, device, tmp_path):
    path = tmp_path / "tame.safetensors"
    save_file(random_tensors(config), path, Metadata(activation="quick_gelu").to_strings())
    model, host = npclip.load(path, device="cuda", dtype=dtype), npclip.load(path, device="cpu")
    rng, side = np.random.default_rng(0), config.image_resolution
    pixels = rng.standard_normal((5, 3, side, side), np.float32)
    pixels += 2 * rng.standard_normal((5, 3, 1, 1), np.float32)  # or they look the same
    ids = rng.integers(1, config.vocab_size - 1, (5, config.context_length))
    ids[range(5), [2, 3, 4, 5, 6]] = config.vocab_size - 1  # the end of text
    for found, expected in (
        (model.encode_image(pixels, True), host.encode_image(pixels, True)),
        (model.encode_text(ids, True), host.encode_text(ids, True)),
    ):
        cosines = (on_host(found).astype(float) * expected).sum(1)
        assert cosines.min() >= COSINES[dtype]
        between = expected @ expected.T - np.eye(len(expected))
        assert between.max() < 0.998  # a wrong image or text would be seen


def test_a_graph_computes_what_it_is_given(model, golden):
    images = golden.arrays["images"]
    forward, backward = (on_host(model.encode_image(x)) for x in (images, images[::-1]))
    np.testing.assert_array_equal(forward[::-1], backward)
    alone = np.stack([on_host(model.encode_image(image)) for image in images])
    assert np.abs(alone - forward).max() <= DTYPES[model.dtype] * np.abs(forward).max()
    ids = golden.arrays["ids"]
    texts = on_host(model.encode_text(ids))
    np.testing.assert_array_equal(on_host(model.encode_text(ids[::-1]))[::-1], texts)


def test_large_batches_need_no_graph(model, golden, monkeypatch):
    monkeypatch.setattr(cuda_towers, "GRAPH_TOKENS", 0)
    images, ids = golden.arrays["images"], golden.arrays["ids"]
    assert_close(model.encode_image(images), golden.arrays["quick_gelu/image"], model.dtype)
    assert_close(model.encode_text(ids), golden.arrays["quick_gelu/text"], model.dtype)


def test_a_large_batch_of_short_texts_takes_the_kernel_for_short_ones(golden, device, monkeypatch):
    monkeypatch.setattr(cuda_towers, "GRAPH_TOKENS", 0)
    model = npclip.load(golden.path, device="cuda", towers=("text",))
    end = model.vocab_size - 1
    lengths = {}
    for length in (5, model.context_length):
        device.launches.clear()
        model.encode_text(np.array([[1] * (length - 1) + [end]] * 2))
        (kernel,) = {x.kernel for x in device.launches if x.kernel.op == "attention_short"}
        lengths[length] = dict(kernel.defines)["KEYS"]
    assert lengths[5] < lengths[model.context_length]


@pytest.mark.parametrize("length", [3, 40, None])
def test_what_is_added_to_texts_has_positions(length, golden, device, monkeypatch):
    """Every number of texts, as long as the model takes and shorter."""
    model, added = npclip.load(golden.path, device="cuda", towers=("text",)), []

    def spy(*packed):
        filled = list(fill_up_tokens(*packed))
        added.append(filled)
        return filled

    monkeypatch.setattr(cuda_towers, "fill_up_tokens", spy)
    length = min(length or model.context_length, model.context_length)
    for count in (1, 3, 21):
        model.encode_text(np.array([[1] * (length - 1) + [model.vocab_size - 1]] * count))
    assert len(added) == 3
    for _, positions, seqs, _ in added:
        assert positions.max() < model.context_length
        assert np.diff(seqs).max() <= model.context_length


def test_inputs_from_the_device(golden, device):
    model = npclip.load(golden.path, device="cuda:0")
    host = npclip.load(golden.path, device="cpu")
    pixels = golden.arrays["images"].astype(np.float32)
    expected = model.encode_image(pixels)
    found = model.encode_image(on_device(pixels))
    np.testing.assert_array_equal(on_host(found), on_host(expected))
    assert_close(model.encode_image(on_device(pixels[0])), expected[0], "float16")
    picture = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), np.uint8)
    found = model.encode_image(on_device(picture))
    assert_close(found, host.encode_image(picture), "float16")
    assert_close(model.encode_image(on_device(picture[1])), found[1], "float16")
    for wrong in (pixels[:, :2], pixels[..., :3], picture[..., :2]):
        with pytest.raises(npclip.InputError, match="on a GPU"):
            model.encode_image(on_device(wrong))


class InterfaceOnly:
    """One that knows __cuda_array_interface__ and nothing else."""

    def __init__(self, array):
        self.array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__


KINDS = {"cupy": lambda x: x, "dlpack": DLPackOnly, "interface": InterfaceOnly}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_inputs_from_the_device_of_any_library(where, kind, golden, device):
    """Alone, in lists, and for a model on the CPU."""
    if kind != "cupy" and "resnet" in golden.path.name:
        pytest.skip("what was read is the same for both towers")
    model, wrap = npclip.load(golden.path, device=where, dtype="float32"), KINDS[kind]
    ids, pixels = golden.arrays["ids"], golden.arrays["images"].astype(np.float32)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), np.uint8)

    def check(encode, given, same_on_host):
        expected = on_host(encode(same_on_host))
        np.testing.assert_allclose(on_host(encode(given)), expected, 0, 1e-5 * abs(expected).max())

    def placed(x):
        return wrap(on_device(x))

    for images in (pixels, pictures):
        for x in (images, images[0]):
            check(model.encode_image, placed(x), x)
        check(model.encode_image, [placed(x) for x in images], list(images))
        check(model.encode_image, (placed(x) for x in images), list(images))
        check(model.encode_image, [placed(images[0]), images[1]], list(images[:2]))
    for dtype in (np.int32, np.int64, np.uint8):
        check(model.encode_text, placed(ids.astype(dtype)), ids)
        check(model.encode_text, placed(ids[0].astype(dtype)), ids[0])
    check(model.encode_text, [placed(row) for row in ids], ids)
    check(model.encode_text, [placed(ids[0]), ids[1]], ids[:2])
    check(model.encode_text, [placed(token) for token in ids[0]], ids[0])
    with pytest.raises(npclip.InputError, match="integers"):
        model.encode_text(placed(pixels[0, 0]))
    with pytest.raises(npclip.InputTypeError, match="token ids expected"):
        model.encode_text([placed(pixels[0, 0])])


def test_lists_from_the_device_are_read_on_the_callers_stream(golden, device):
    """Which computes what is in them; the threads that decode images have streams of their own."""
    arrays = [on_device(x) for x in golden.arrays["images"].astype(np.float32)]
    with XP.cuda.Stream() as stream:
        XP.gpus.reads.clear()
        golden.model.encode_image(arrays)
    assert XP.gpus.reads == [stream] * len(arrays)


def test_an_array_on_a_gpu_without_cupy(golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cuda_device, "_devices", {})
    cuda_device.cupy.cache_clear()
    for x in (on_device(golden.arrays["ids"]), [on_device(golden.arrays["ids"][0])]):
        with pytest.raises(npclip.BackendError, match="no GPU without CuPy"):
            golden.model.encode_text(x)
        with pytest.raises(npclip.BackendError, match="no GPU without CuPy"):
            golden.model.encode_image(x)


def test_bytes_of_the_right_size_are_normalised_inside(golden, device):
    """uint8 [B, R, R, 3] goes to patchify as it is; pixels have the bits of preprocess."""
    model = npclip.load(golden.path, device="cuda", dtype="float32")
    side = model.visual.input_resolution
    picture = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), np.uint8)
    expected = model.encode_image(np.stack([model.preprocess(image) for image in picture]))
    device.launches.clear()
    for given in (on_device(picture), on_device(picture[:, :, ::-1])[:, :, ::-1]):
        np.testing.assert_array_equal(model.encode_image(given).get(), expected.get())
    assert {"patchify_u8"} == {x.kernel.op for x in device.launches if "patch" in x.kernel.op} - {
        "embed_patches"
    }


def test_results_go_on_as_on_the_host(golden, device):
    model, host = (npclip.load(golden.path, device=d, dtype="float32") for d in ("cuda", "cpu"))
    images, ids = golden.arrays["images"], golden.arrays["ids"]
    for found, expected in zip(model(images, ids), host(images, ids), strict=True):
        np.testing.assert_allclose(on_host(found), expected, rtol=1e-4, atol=1e-4)
    unit = model.encode_image(images, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(on_host(unit), axis=1), 1, rtol=1e-6)
    assert model.encode_image([]).shape == (0, host.config.embed_dim)
    assert model.encode_text([]).shape == (0, host.config.embed_dim)
    assert isinstance(model.encode_text([]), FakeArray)


def test_devices_and_dtypes(device):
    assert ops.resolve("cuda") == ("cuda:0", "float16")
    assert ops.resolve("cuda:0", "float32") == ("cuda:0", "float32")
    assert ops.resolve("cpu") == ("cpu", "float32")
    assert ops.resolve("cuda", "bfloat16")[1] == "bfloat16"
    with pytest.raises(npclip.BackendError, match="int8"):
        ops.resolve("cuda", "int8")
    for wrong in ("cuda:", "cuda:x", "cpu:0", "cuda:-1", "gpu"):
        with pytest.raises(npclip.BackendError, match=wrong):
            ops.resolve(wrong)


def test_turing_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(cuda_device, "_devices", {0: FakeDevice(capability=(7, 5))})
    assert ops.resolve("cuda") == ("cuda:0", "float16")
    with pytest.raises(npclip.BackendError, match=r"bfloat16.*cuda:0: float16, float32"):
        ops.resolve("cuda", "bfloat16")


def test_an_old_card_computes_with_cupy(golden, monkeypatch):
    device = FakeDevice(capability=(7, 0))
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


def test_sizes_of_graphs():
    sizes = sorted({graph_size(n) for n in range(1, 4097)})
    assert sizes[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16]
    assert len(sizes) < 50
    for n in range(1, 4097):
        assert n <= graph_size(n) <= max(n, 1.25 * n)
        assert graph_size(graph_size(n)) == graph_size(n)


def test_old_graphs_are_forgotten(device):
    graphs = Graphs(device, lambda x: device.copy(x))
    for n in range(1, KEPT_GRAPHS + 10):
        graphs(on_device(np.arange(n, dtype=np.float32)))
    assert len(graphs._graphs) == KEPT_GRAPHS
    found = graphs(on_device(np.ones(1, np.float32)))
    np.testing.assert_array_equal(on_host(found), np.ones(1, np.float32))


@pytest.mark.parametrize("lengths", [[1], [7, 3], [77], [77] * 64, [1] * 64, [5] * 33])
def test_filled_up_texts_have_few_shapes(lengths):
    seqs = np.append(0, np.cumsum(lengths)).astype(np.int32)
    tokens = np.arange(1, seqs[-1] + 1, dtype=np.int32)
    filled = list(fill_up_tokens(tokens, tokens - 1, seqs, seqs[1:] - 1, 77))
    more_tokens, positions, more_seqs, last = filled
    total, texts = len(more_tokens), len(last)
    assert total == graph_size(total) and texts == graph_size(texts)
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
