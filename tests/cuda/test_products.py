"""How a product's kernel is chosen: by timing, once, kept on disk, or by the environment."""

import gc
import json

import numpy as np
import pytest
from cuda.fake_cublaslt import FakeCublasLt
from cuda.fake_device import XP, FakeDevice, on_device

from npclip import cublaslt, cuda_device, cuda_linear
from npclip.cuda_products import Products
from npclip.errors import BackendError
from npclip.kernels import reference

SHAPE = 5, 64, 24


class TimedDevice(FakeDevice):
    """The fastest is the one that the test names."""

    can_time = True

    def __init__(self, fastest="64x64x64x4"):
        super().__init__()
        self.fastest, self.timed = fastest, []

    def seconds(self, *functions):
        (name,) = {str(function.args[1]) for function in functions}  # after the key
        self.timed.append(name)
        return 1.0 if name == self.fastest else 2.0


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    def missing(*_):
        raise BackendError("no cuBLASLt")

    monkeypatch.setattr(cublaslt, "CublasLt", missing)
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path))
    monkeypatch.delenv("NPCLIP_CUDA_LINEAR", raising=False)
    return tmp_path / "products"


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    n, k, m = SHAPE
    x, weight = (on_device(rng.standard_normal(s).astype(np.float16)) for s in ((n, k), (m, k)))
    return x, weight, on_device(rng.standard_normal(m).astype(np.float32))


def run(device, arrays):
    """The product, checked, and the tiling that computed it."""
    x, weight, bias = arrays
    y = device.empty((SHAPE[0], SHAPE[2]), "f16")
    device.products.run(x, weight, bias, "quick_gelu", None, y)
    expected = reference.linear(*(a.get().astype(float) for a in arrays), "quick_gelu")
    assert np.abs(y.get() - expected).max() <= 2e-3 * np.abs(expected).max()
    defines = dict(device.launches[-1].kernel.defines)
    return "x".join(str(defines[name]) for name in ("TILE_N", "TILE_M", "TILE_K", "STAGES"))


def test_the_fastest_is_chosen_once_and_remembered(arrays, cache):
    device = TimedDevice()
    assert run(device, arrays) == "64x64x64x4"
    runnable = cuda_linear.worth_timing("f16", 8, (8, 0))
    assert sorted(device.timed) == sorted(map(str, runnable))
    assert run(device, arrays) == "64x64x64x4"
    assert len(device.timed) == len(runnable)
    other = TimedDevice(fastest="16x32x128x4")
    assert run(other, arrays) == "64x64x64x4"  # from the disk
    assert not other.timed
    assert list(json.loads(next(cache.glob("*.json")).read_text()).values()) == ["64x64x64x4"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_broken_file_is_timed_anew(arrays, cache, content):
    cache.mkdir()
    (cache / "fake-8-0.json").write_text(content)
    device = TimedDevice()
    assert run(device, arrays) == "64x64x64x4"
    assert device.timed


def test_the_environment_names_a_tiling(arrays, monkeypatch):
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "128x64x64x3")
    device = TimedDevice()
    assert run(device, arrays) == "128x64x64x3"
    assert not device.timed


def test_a_device_that_cannot_time_takes_the_default(arrays):
    device = FakeDevice()
    assert run(device, arrays) == str(cuda_linear.default_variant("f16", 5, 24, (8, 0)))
    assert isinstance(device.products, Products)


# cuBLASLt


class ClockedDevice(FakeDevice):
    """A kernel of ours takes 1 ms, a plan of cuBLASLt what FakeCublasLt says."""

    can_time = True


@pytest.fixture
def lt(monkeypatch):
    """cuBLASLt as it is found where it is installed."""
    lt = FakeCublasLt(XP.gpus)
    monkeypatch.setattr(cuda_device, "TIMED_RUNS", 1)  # its clock does not waver
    monkeypatch.setattr(cublaslt, "CublasLt", lambda: lt)
    return lt


@pytest.mark.parametrize("residual", [None, "first", "last"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "result"),
    [("float16", "f16"), ("float16", "f32"), ("bfloat16", "bf16"), ("float32", "f32")],
)
def test_cublaslt_computes_the_product(
    dtype, result, has_bias, activation, residual, lt, monkeypatch
):
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "cublaslt")
    device, rng, (n, k, m) = ClockedDevice(), np.random.default_rng(0), SHAPE
    x, w = (device.cast(on_device(rng.standard_normal(s)), dtype) for s in ((n, k), (m, k)))
    bias = on_device(rng.standard_normal(m).astype(np.float32)) if has_bias else None
    y = device.empty((n, m), result)
    stored = {"f32": "float32"}.get(result, dtype)
    r = device.cast(on_device(10 * rng.standard_normal((n, m))), stored) if residual else None
    device.products.run(x, w, bias, activation, r, y, residual == "first")

    x, w, r = (None if a is None else device.widen(a).get().astype(float) for a in (x, w, r))
    bias = bias.get() if has_bias else None
    expected = reference.linear(x, w, bias, None, r if residual == "first" else None)
    expected = reference.ACTIVATIONS[activation](expected) if activation else expected
    expected = expected + r if residual == "last" else expected
    found = device.widen(y).get()
    tolerance = {"f16": 2e-3, "bf16": 2e-2, "f32": 1e-5}[result]
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    too_late = activation and residual == "last"  # to add: the activation comes after it
    assert len(lt.ran) == (0 if too_late else 1)
    others = {"linear"} if too_late else {"activate"} if activation else set()
    assert {launch.kernel.op for launch in device.launches} == others


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [((3.0, 0.5), "cublaslt 1"), ((0.5, 3.0), "cublaslt 0"), ((1.5, 1.5), None), ((), None)],
)
def test_the_faster_of_both_is_chosen(milliseconds, expected, lt, cache):
    lt.milliseconds = milliseconds
    device = ClockedDevice()
    x, w = on_device(np.ones((5, 64), np.float16)), on_device(np.ones((24, 64), np.float16))
    y = device.empty((5, 24), "f16")
    device.products.run(x, w, None, None, None, y)
    chosen = next(iter(json.loads(next(cache.glob("*.json")).read_text()).values()))
    assert chosen == (expected or str(cuda_linear.default_variant("f16", 5, 24, (8, 0))))
    assert (y.get() == 64).all()
    lt.ran.clear()
    device.products.run(x, w, None, None, None, y)
    assert [p.milliseconds for p in lt.ran] == ([0.5] if expected else [])


def test_the_activation_counts_in_the_time(lt, arrays, cache):
    lt.milliseconds = (0.5,)  # and 1 for the activation, which our kernels have inside
    run(ClockedDevice(), arrays)
    assert "cublaslt" not in next(cache.glob("*.json")).read_text()


def test_a_choice_that_is_not_there_any_more_is_made_anew(lt, arrays, cache, monkeypatch):
    lt.milliseconds = (0.1,)
    x, w, bias = arrays
    device = ClockedDevice()
    y = device.empty((5, 24), "f16")
    device.products.run(x, w, bias, None, None, y)
    assert "cublaslt 0" in next(cache.glob("*.json")).read_text()

    def missing():
        raise BackendError("no cuBLASLt")

    monkeypatch.setattr(cublaslt, "CublasLt", missing)
    device = ClockedDevice()
    device.products.run(x, w, bias, None, None, y)
    without, _ = sorted(cache.glob("*.json"), key=lambda path: "cublaslt" in path.name)
    assert "cublaslt" not in without.read_text()


def test_cublaslt_that_cannot_plan_is_not_used(lt, arrays, monkeypatch):
    def failing(*_):
        raise BackendError("CUBLAS_STATUS_INTERNAL_ERROR")

    monkeypatch.setattr(lt, "plan", failing)
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "cublaslt")
    try:
        run(ClockedDevice(), arrays)
    except BackendError as error:
        pytest.fail(str(error))
    assert not lt.ran


def test_fewer_plans_for_another_number_of_rows(lt):
    """The choice is for up to eight rows; each number of rows has plans of its own."""
    device = ClockedDevice()
    w = on_device(np.ones((24, 64), np.float16))
    for n, milliseconds in ((8, (3.0, 0.5)), (5, (0.7,))):
        lt.milliseconds = milliseconds
        x, y = on_device(np.ones((n, 64), np.float16)), device.empty((n, 24), "f16")
        device.products.run(x, w, None, None, None, y)
        assert lt.ran[-1].n == n
        assert (y.get() == 64).all()


def test_rows_that_lie_apart(lt, monkeypatch):
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "cublaslt")
    device = ClockedDevice()
    x, w = on_device(np.ones((5, 128), np.float16)), on_device(np.ones((24, 96), np.float16))
    y = device.empty((5, 24), "f16")
    device.products.run(x[:, :64], w[:, :64], None, None, None, y)
    assert lt.asked == [(5, 64, 24, "f16", "f16", 128, 96, 24, False, False)]
    assert (y.get() == 64).all()


def test_a_way_that_fails_is_not_chosen(lt, arrays, cache, monkeypatch):
    def failing(*_):
        raise BackendError("CUBLAS_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(lt, "run", failing)
    lt.milliseconds = (0.1,)
    run(ClockedDevice(), arrays)
    assert "cublaslt" not in next(cache.glob("*.json")).read_text()


def test_no_plan_for_another_number_of_rows(lt):
    device = ClockedDevice()
    w = on_device(np.ones((24, 64), np.float16))
    for n, milliseconds in ((8, (0.5,)), (5, ())):
        lt.milliseconds = milliseconds
        x, y = on_device(np.ones((n, 64), np.float16)), device.empty((n, 24), "f16")
        device.products.run(x, w, None, None, None, y)
        assert (y.get() == 64).all()
    assert device.launches[-1].kernel.op == "linear"


def test_what_is_kept_is_bounded(lt, monkeypatch):
    monkeypatch.setattr("npclip.cuda_products.KEPT_PLANS", 3)
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "cublaslt")
    device = ClockedDevice()
    w = on_device(np.ones((24, 64), np.float16))
    bias = on_device(np.ones(24, np.float32))
    for n in range(1, 9):
        x, y = on_device(np.ones((n, 64), np.float16)), device.empty((n, 24), "f16")
        device.products.run(x, w, bias, None, None, y)
    assert len(device.products._plans) == 3
    assert len(device.products._biases) == 1
    del bias
    gc.collect()
    assert not device.products._biases


def test_a_bias_is_converted_once_and_not_mistaken(lt, monkeypatch):
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "cublaslt")
    device = ClockedDevice()
    x, w = on_device(np.ones((5, 64), np.float16)), on_device(np.zeros((24, 64), np.float16))
    y = device.empty((5, 24), "f16")
    casts = []
    monkeypatch.setattr(device, "cast", lambda a, d: casts.append(d) or a.astype(d))
    for value in range(20):
        bias = on_device(np.full(24, value, np.float32))  # at the place of the one before, maybe
        for _ in range(2):
            device.products.run(x, w, bias, None, None, y)
            assert (y.get() == value).all()
        del bias
        gc.collect()
    assert casts == ["float16"] * 20


def test_cublaslt_in_a_graph(lt, arrays, monkeypatch):
    """Its workspace and its converted bias live as long as the graph."""
    monkeypatch.setenv("NPCLIP_CUDA_LINEAR", "cublaslt")
    device, (x, w, bias) = ClockedDevice(), arrays
    buffer = device.copy(x)

    def product():
        y = device.empty((5, 24), "f16")
        device.products.run(buffer, w, bias, "relu", None, y)
        return y

    captured = device.capture(product)
    gc.collect()
    for factor in (1, -1):
        given = on_device(factor * x.get())
        found = device.replay(captured, [buffer], (given,)).get()
        values = (a.get().astype(float) for a in (given, w, bias))
        expected = reference.linear(*values, "relu")
        assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_few_rows_are_timed_with_weights_that_are_not_in_the_cache():
    counts = []

    class Device(TimedDevice):
        cache_bytes = 64 * 64 * 2

        def seconds(self, *functions):
            counts.append(len(functions))
            return 1.0

    device, rng = Device(), np.random.default_rng(0)
    for n, copies in ((50, 3), (1024, 1)):
        x, w = (on_device(rng.standard_normal((k, 64)).astype(np.float16)) for k in (n, 64))
        device.products.run(x, w, None, None, None, device.empty((n, 64), "f16"))
        assert set(counts) == {copies}
        counts.clear()


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_some_variants_are_worth_timing_for_any_number_of_rows(dtype, capability):
    if dtype == "bf16" and capability < (8, 0):
        return
    for n in (2**i for i in range(18)):
        found = cuda_linear.worth_timing(dtype, n, capability)
        assert 1 <= len(found) <= 10
        assert all(variant.runs_on(capability) for variant in found)
        default = cuda_linear.default_variant(dtype, n, 768, capability)
        assert default in found or n > 64
    assert any(v.arch for v in cuda_linear.worth_timing("f16", 4096, (9, 0)))
