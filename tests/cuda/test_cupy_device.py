"""cuda_device.Device itself, on a fake CuPy with two GPUs of which the first is the current one.

CuPy allocates, launches and sets attributes on the current device, whatever the arrays' is. The
second GPU is one whose launches overlap: they go through the driver.
"""

import ctypes
import gc
import hashlib
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from cuda import fake_cupy
from cuda.fake_cublaslt import FakeCublasLt
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip import (
    cublaslt,
    cuda_device,
    cuda_driver,
    cuda_linear,
    cuda_rows,
    nvrtc,
    tensor_map,
    weights,
)  # fmt: skip
from npclip.config import Metadata
from npclip.cuda_launch import Kernel, Launch, TensorMap
from npclip.errors import BackendError
from npclip.kernels import reference

TILING = "64x64x64x4"  # with more shared memory than a kernel has without asking
BOTH = pytest.mark.parametrize("ordinal", [0, 1])


@pytest.fixture
def xp(monkeypatch, tmp_path):
    """CuPy; the compiler leaves the source as it is, for the shim."""

    def cubin(source, arch, *_):
        path = tmp_path / f"{arch}-{hashlib.sha256(source.encode()).hexdigest()}.cubin"
        path.write_text(source)
        return path

    def target(capability, *_):
        return "".join(map(str, capability))

    def missing(*_):
        raise BackendError("no cuBLASLt")

    xp = fake_cupy.module([(8, 0), (9, 0)])
    monkeypatch.setitem(sys.modules, "cupy", xp)
    monkeypatch.setattr(cuda_device, "_devices", {})
    monkeypatch.setattr(nvrtc, "cubin", cubin)
    monkeypatch.setattr(nvrtc, "target", target)
    monkeypatch.setattr(cublaslt, "CublasLt", missing)
    monkeypatch.setattr(cuda_driver, "load", lambda: xp.libcuda)
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", TILING)
    cuda_device.cupy.cache_clear()
    yield xp
    cuda_device.cupy.cache_clear()
    assert xp.gpus.device == 0
    assert xp.gpus.state.entered == []
    assert xp.gpus.state.pools == [None]
    assert [len(streams) for streams in xp.gpus.state.streams] == [1, 1]


@pytest.fixture
def lt(xp, monkeypatch):
    """Every handle of cuBLASLt that was made."""
    handles = []

    def make():
        handles.append(FakeCublasLt(xp.gpus))
        return handles[-1]

    monkeypatch.setattr(cublaslt, "CublasLt", make)
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "cublaslt")
    return handles


def relu(x):
    """A launch that changes its array."""
    return cuda_rows.activate(x, "relu")


# Which device


@BOTH
@pytest.mark.parametrize("library", [TILING, "cublaslt"])
@pytest.mark.parametrize("config", [tiny_models.VIT, tiny_models.RESNET], ids=["vit", "resnet"])
def test_a_model_lives_on_its_device(config, library, ordinal, xp, lt, monkeypatch, tmp_path):
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", library)
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(config), path, Metadata(activation="quick_gelu").to_strings())
    model = npclip.load(path, device=f"cuda:{ordinal}")
    host = npclip.load(path, device="cpu")
    rng, side = np.random.default_rng(0), config.image_resolution
    pixels = rng.standard_normal((3, 3, side, side), np.float32)
    pictures = rng.integers(0, 256, (2, 37, 53, 3), np.uint8)
    ids = np.full((3, config.context_length), config.vocab_size - 1)
    ids[:, :3] = rng.integers(0, config.vocab_size - 1, (3, 3))

    def check(found, expected):
        assert found.device.id == ordinal
        found = npclip.asnumpy(found)
        assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()

    for normalize in (False, True, True):
        check(model.encode_image(pixels, normalize), host.encode_image(pixels, normalize))
        check(model.encode_text(ids, normalize), host.encode_text(ids, normalize))
    for there in (0, 1):
        with xp.cuda.Device(there):
            images, bytes_ = xp.asarray(pixels), xp.asarray(pictures)
        check(model.encode_image(images), host.encode_image(pixels))
        check(model.encode_image(bytes_), host.encode_image(pictures))
    for found, expected in zip(model(pixels, ids), host(pixels, ids), strict=True):
        check(found, expected)
    assert model.encode_text([]).device.id == ordinal
    probabilities = [npclip.softmax(model(pixels, ids)[0])]
    encode_text = model.encode_text  # the vocabulary is too small for words
    monkeypatch.setattr(model, "encode_text", lambda _, normalize: encode_text(ids, normalize))
    probabilities += [model.classify(pixels, ["a", "b", "c"])]
    for found in probabilities:
        assert found.device.id == ordinal
        np.testing.assert_allclose(npclip.asnumpy(found).sum(-1), np.ones(3), rtol=1e-5)
    assert {launch.device for launch in xp.gpus.launches} == {ordinal}
    assert {handle.device for handle in lt} <= {ordinal}
    assert any(handle.ran for handle in lt) == (library == "cublaslt")


def test_shared_memory_is_asked_for_on_the_device_of_the_launch(xp):
    variant = next(v for v in cuda_linear.variants("f16") if str(v) == TILING)
    for ordinal in (1, 0):
        device = cuda_device.open_device(ordinal)
        x, w = (device.asarray(np.ones((n, 64), np.float16)) for n in (16, 24))
        y = device.empty((16, 24), "f32")
        launch = cuda_linear.linear(x, w, None, None, None, y, variant)
        assert launch.shared > cuda_device.SHARED_BYTES
        for _ in range(2):
            device.run(launch)
        np.testing.assert_array_equal(device.asnumpy(y), 64)
    symbol = launch.kernel.symbol
    assert xp.gpus.attributes == [(1, symbol, launch.shared), (0, symbol, launch.shared)]


@BOTH
@pytest.mark.parametrize("library", [TILING, "cublaslt"])
def test_products_are_computed_on_their_device(library, ordinal, xp, lt, monkeypatch):
    """Without a graph, which would make its device the current one."""
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", library)
    device = cuda_device.open_device(ordinal)
    x, w = (device.asarray(np.ones((n, 64), np.float16)) for n in (16, 24))
    bias, y = device.asarray(np.ones(24, np.float32)), device.empty((16, 24), "f16")
    device.products.run(x, w, bias, "relu", None, y)
    np.testing.assert_array_equal(device.asnumpy(y), 65)
    assert {launch.device for launch in xp.gpus.launches} == {ordinal}
    assert [handle.device for handle in lt] == [ordinal] * (library == "cublaslt")


@BOTH
def test_new_arrays(ordinal, xp):
    device = cuda_device.open_device(ordinal)
    assert str(device) == f"cuda:{ordinal}"
    assert device.name == f"fake GPU {ordinal}"
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = device.asarray(host)
    made = [x, device.empty((2,), "bf16"), device.copy(x), device.index([0, 1])]
    made += [device.fill_up(x, 5), *(device.cast(x, d) for d in ("float16", "bfloat16"))]
    made += [device.widen(a) for a in made[-2:]]
    assert {a.device.id for a in made} == {ordinal}
    for x in made[-2:]:
        np.testing.assert_array_equal(device.asnumpy(x), host)
    np.testing.assert_array_equal(device.asnumpy(made[4])[:2], host)
    np.testing.assert_array_equal(device.asnumpy(made[4])[2:], np.zeros((3, 3)))


@BOTH
def test_arrays_are_copied_to_the_host_in_the_order_of_their_device(ordinal, xp):
    device, x = cuda_device.open_device(ordinal), np.arange(6).reshape(2, 3).T
    array = device.asarray(x)
    with xp.cuda.Stream():  # of device 0
        np.testing.assert_array_equal(device.asnumpy(array), x)
        np.testing.assert_array_equal(npclip.asnumpy(array), x)


@BOTH
@pytest.mark.parametrize("there", [0, 1])
def test_arrays_of_other_libraries(there, ordinal, xp):
    class DLPackOnly:
        def __init__(self, array):
            self.array, self.streams = array, []

        def __dlpack__(self, *, stream, **options):
            self.streams.append(stream)
            return self.array.__dlpack__(stream=stream, **options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    class InterfaceOnly:
        def __init__(self, array):
            self.array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__

    device, host = cuda_device.open_device(ordinal), np.arange(12.0).reshape(3, 4)
    with xp.cuda.Device(there):
        array = xp.asarray(host)
    for x in (array, DLPackOnly(array), InterfaceOnly(array)):
        taken = device.asarray(device.take_over(x))
        assert taken.device.id == ordinal
        assert (taken.data.ptr == array.data.ptr) == (there == ordinal)  # shared, not copied
        np.testing.assert_array_equal(device.asnumpy(taken), host)
        assert getattr(x, "streams", [1])[0] > 0  # which CuPy waits for
    apart = device.asarray(device.take_over(array[:, ::2]))
    assert apart.flags.c_contiguous
    np.testing.assert_array_equal(device.asnumpy(apart), host[:, ::2])


def test_bfloat16_is_rounded_as_on_the_host(xp):
    device = cuda_device.open_device(0)
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    special = np.array(
        [0, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000]
    )
    x = np.append(bits, special.astype(np.uint32)).view(np.float32)
    x = x[~np.isnan(x)]
    expected = weights.to_bfloat16(x)
    found = device.cast(device.asarray(x), "bfloat16")
    np.testing.assert_array_equal(device.asnumpy(found), expected)
    np.testing.assert_array_equal(
        device.asnumpy(device.widen(found)), weights.from_bfloat16(expected)
    )


# Graphs


@BOTH
def test_a_graph_replays_kernels_and_cupys_own_work(ordinal, xp):
    device = cuda_device.open_device(ordinal)
    buffer = device.asarray(np.full(256, -7, np.float32))

    def work():
        y = device.empty((256,), "f32")
        y[...] = buffer
        device.run(relu(y))
        return y + 1

    captured = device.capture(work)
    assert [launch.captured for launch in xp.gpus.launches] == [False, True]
    gc.collect()
    results = []
    for value in (3, -3, 5):
        x = device.asarray(np.full(256, value, np.float32))
        results.append(device.replay(captured, [buffer], (x,)))
    assert [device.asnumpy(r)[0] for r in results] == [4, 1, 6]  # each a copy
    assert len(xp.gpus.launches) == 2


@BOTH
def test_a_graph_and_the_callers_stream_wait_for_each_other(ordinal, xp):
    device = cuda_device.open_device(ordinal)
    with xp.cuda.Device(ordinal):
        callers = xp.cuda.Stream()
    buffer = device.asarray(np.ones(8, np.float32))
    with xp.cuda.Device(ordinal), callers:
        captured = device.capture(lambda: device.copy(buffer))
        assert xp.gpus.waits == [(captured.stream, callers)]
        xp.gpus.waits.clear()
        device.replay(captured, [buffer], (device.copy(buffer),))
    assert captured.stream.non_blocking
    assert xp.gpus.waits == [(captured.stream, callers), (callers, captured.stream)]


def test_the_arrays_of_a_graph_are_its_own(xp):
    """What it captured stays when the indices are forgotten and nobody else keeps anything."""
    device = cuda_device.open_device(0)
    x = device.asarray(np.arange(24, dtype=np.float32).reshape(3, 8))

    def take():
        y = device.empty((2, 8), "f32")
        device.run(cuda_rows.take(x, device.index(np.array([2, 0])), y))
        return y

    captured = device.capture(take)
    for i in range(cuda_device.KEPT_INDICES + 1):
        device.index([i])
    assert len(device._indices) == cuda_device.KEPT_INDICES
    gc.collect()
    found = device.asnumpy(device.replay(captured, [], ()))
    np.testing.assert_array_equal(found, device.asnumpy(x)[[2, 0]])
    assert captured.result.memory.pool is not None


def test_a_capture_that_fails_leaves_all_as_it_was(xp):
    device = cuda_device.open_device(0)
    with pytest.raises(RuntimeError, match="H2D transfers are disallowed"):
        device.capture(lambda: device.asarray(np.ones(3)))
    buffer = device.asarray(np.ones(8, np.float32))
    assert device.capture(lambda: device.copy(buffer)).result.shape == (8,)  # and the fixture looks


def test_indices_from_the_host_are_copied_once(xp):
    device = cuda_device.open_device(0)
    first = device.index(np.array([1, 2]))
    assert first.dtype == np.int32
    assert device.index([1, 2]) is first
    assert device.index(np.array([[1, 2]])) is not first
    assert device.index(first) is first
    array, longest = device.sequences(np.array([0, 3, 10, 12]))
    assert (array.shape, longest) == ((4,), 7)


# Launches through the driver


def test_launches_overlap_where_the_gpu_can(xp):
    for ordinal, through_driver in ((0, False), (1, True)):
        device = cuda_device.open_device(ordinal)
        x = device.asarray(np.array([-1, 2] * 32, np.float32))
        device.run(relu(x))
        np.testing.assert_array_equal(device.asnumpy(x), [0, 2] * 32)
        assert bool(xp.libcuda.cuLaunchKernelEx.attributes) == through_driver
    assert set(xp.libcuda.cuLaunchKernelEx.attributes) == {(6, 1)}


def test_every_thread_makes_the_device_current_before_it_launches(xp):
    device = cuda_device.open_device(1)
    arrays = [device.asarray(np.full(64, -1, np.float32)) for _ in range(8)]
    threads = [threading.Thread(target=device.run, args=(relu(x),)) for x in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in arrays:
        assert not device.asnumpy(x).any()


def test_arguments_of_every_type_reach_the_kernel(xp):
    """Addresses within an allocation, null pointers, int32, int64 and float32, in any order."""
    device = cuda_device.open_device(1)
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float16) for shape in ((50, 72), (40, 72)))
    whole = device.asarray(np.concatenate([x, x]))
    for bias in (None, rng.standard_normal(40).astype(np.float32)):
        y = device.empty((50, 40), "f16")
        placed = None if bias is None else device.asarray(bias)
        variant = next(v for v in cuda_linear.variants("f16") if str(v) == TILING)
        device.run(
            cuda_linear.linear(whole[50:], device.asarray(w), placed, None, None, y, variant)
        )
        expected = reference.linear(x.astype(np.float64), w.astype(np.float64), bias)
        np.testing.assert_allclose(device.asnumpy(y), expected, atol=2e-2)
    gain, bias, eps = np.ones(72, np.float32), np.zeros(72, np.float32), 0.5
    y = device.empty((50, 72), "f16")
    vectors = device.asarray(gain), device.asarray(bias)
    device.run(cuda_rows.layer_norm(whole[50:], *vectors, y, eps))
    expected = reference.layer_norm(x.astype(np.float64), gain, bias, eps)
    np.testing.assert_allclose(device.asnumpy(y), expected, atol=2e-3)


def test_what_the_driver_refuses_is_an_error(xp):
    device = cuda_device.open_device(1)
    x = device.asarray(np.ones(64, np.float32))
    xp.libcuda.cuLaunchKernelEx.error = 719
    with pytest.raises(BackendError, match="activate_f32 failed: CUDA error 719"):
        device.run(relu(x))


@pytest.mark.parametrize("old", ["driver", "library"])
def test_without_such_launches_cupy_launches(old, xp, monkeypatch):
    def missing():
        raise OSError("no libcuda")

    if old == "driver":
        monkeypatch.setattr(xp.cuda.runtime, "driverGetVersion", lambda: 12020)
    else:
        monkeypatch.setattr(cuda_driver, "load", missing)
    device = cuda_device.open_device(1)
    x = device.asarray(np.full(64, -1, np.float32))
    device.run(relu(x))
    assert not device.asnumpy(x).any()
    assert not xp.libcuda.cuLaunchKernelEx.attributes


# Tensor maps, and kernels whose blocks stay


def test_tensor_maps_are_passed_by_value_and_made_once(xp, monkeypatch):
    made, launches = [], []
    value = np.zeros((), "V128")
    monkeypatch.setattr(tensor_map, "encode", lambda *key: made.append(key) or value)
    monkeypatch.setattr(fake_cupy.shim, "run", launches.append)
    device = cuda_device.open_device(0)
    x = device.empty((40, 24), "f16")
    kernel = relu(x).kernel
    for array in (x, x[:, :8], x):
        arguments = TensorMap(array, (16, 64)), None
        device.run(Launch(kernel, (10, 1, 1), 32, 0, arguments, stays=2))
    assert made == [(x.data.ptr, (40, width), 48, (16, 64)) for width in (24, 8)]
    assert [launch.grid for launch in launches] == [(6, 1, 1)] * 3  # of 7 processors, pairs
    assert all(launch.arguments == (value, None) for launch in launches)
    device.run(Launch(kernel, (4, 1, 1), 32, 0, arguments, stays=2))
    assert launches[-1].grid == (4, 1, 1)


class Driver:
    """libcuda, as far as it makes tensor maps."""

    def __init__(self, code):
        self.code = code

    def cuTensorMapEncodeTiled(self, target, *arguments):
        assert target.value % 128 == 0
        ctypes.memset(target, 7, 128)
        lists = [[*a] if isinstance(a, ctypes.Array) else a for a in arguments]
        lists[2] = lists[2].value
        self.arguments = lists
        return self.code


def test_what_the_driver_is_told_of_a_tensor_map(monkeypatch):
    driver = Driver(0)
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    made = tensor_map.encode(4096, (40, 24), 64, (16, 64))
    assert (made.size, made.tobytes()) == (1, b"\7" * 128)
    assert driver.arguments == [1, 2, 4096, [24, 40], [64], [64, 16], [1, 1], 0, 3, 3, 0]
    driver.code = 1
    with pytest.raises(BackendError, match="cuTensorMapEncodeTiled: error 1"):
        tensor_map.encode(4096, (40, 24), 64, (16, 64))


def test_a_machine_whose_driver_makes_no_tensor_maps(monkeypatch):
    def missing(name):
        raise OSError(f"no {name}")

    tensor_map._driver.cache_clear()
    monkeypatch.setattr(tensor_map.ctypes, "CDLL", missing)
    with pytest.raises(BackendError, match="makes no tensor maps: no "):
        tensor_map.encode(4096, (40, 24), 64, (16, 64))


def test_timing_leaves_nothing_in_the_memory_of_a_graph(xp, monkeypatch):
    monkeypatch.delenv("NPCLIP_CUDA_LINEAR")
    device = cuda_device.open_device(0)
    monkeypatch.setitem(vars(device), "cache_bytes", 1 << 18)  # so there are copies of w
    x, w = (device.asarray(np.ones((n, 64), np.float16)) for n in (8, 512))
    y = device.empty((8, 512), "f16")
    captured = device.capture(lambda: device.products.run(x, w, None, None, None, y))
    pool, *_ = captured.kept
    assert sum(memory.bytes.size for memory in pool.blocks) < w.nbytes


# Times, and what compiles


@BOTH
def test_times_are_of_the_device(ordinal, xp):
    device = cuda_device.open_device(ordinal)
    x = device.asarray(np.ones(64, np.float32))

    def three():
        for _ in range(3):
            device.run(relu(x))

    assert device.seconds(three) == pytest.approx(3e-3)


def test_kernels_are_compiled_for_each_device_once(xp, monkeypatch):
    compiled, cubin = [], nvrtc.cubin
    monkeypatch.setattr(nvrtc, "cubin", lambda s, a, *_: compiled.append(a) or cubin(s, a))
    for ordinal in (0, 1, 0):
        device = cuda_device.open_device(ordinal)
        device.run(relu(device.asarray(np.ones(64, np.float32))))
    assert compiled == ["sm_80", "sm_90"]
    assert [ordinal for ordinal, _ in xp.gpus.loaded] == [0, 1]
    gelu = Kernel("rows", "activate", "f32", (("ACTIVATION", 2),), arch="90a")
    cuda_device.open_device(1)._function(gelu)
    assert compiled[-1] == "sm_90a"
    assert xp.gpus.loaded[-1] == (1, gelu.symbol)


def test_the_compiler_is_of_cupys_cuda_version(xp, monkeypatch):
    versions = {Path("newer"): (13, 0), Path("right"): (12, 9), Path("older"): (12, 4)}
    monkeypatch.setattr(nvrtc, "libraries", lambda: list(versions))
    monkeypatch.setattr(nvrtc, "cuda_version", versions.__getitem__)
    assert cuda_device.open_device(0)._compiler == Path("right")


def test_a_device_that_is_not_there(xp):
    with pytest.raises(BackendError, match=r"no cuda:2: CuPy finds 2 GPU"):
        cuda_device.open_device(2)
