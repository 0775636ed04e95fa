"""How a product's kernel is chosen: by timing, once, kept on disk, or by the environment."""

import json

import numpy as np
import pytest
from cuda.fake_device import FakeDevice, on_device

from npclip import cublaslt, cuda_linear
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

    def seconds(self, function):
        name = str(function.args[1])  # after the key
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
    expected = reference.linear(*(np.asarray(a, float) for a in arrays), "quick_gelu")
    assert np.abs(np.asarray(y, float) - expected).max() <= 2e-3 * np.abs(expected).max()
    defines = dict(device.launches[-1].kernel.defines)
    return "x".join(str(defines[name]) for name in ("TILE_N", "TILE_M", "TILE_K", "STAGES"))


def test_the_fastest_is_chosen_once_and_remembered(arrays, cache):
    device = TimedDevice()
    assert run(device, arrays) == "64x64x64x4"
    runnable = [v for v in cuda_linear.variants("f16") if v.runs_on((8, 0))]
    assert sorted(device.timed) == sorted(map(str, runnable))
    assert run(device, arrays) == "64x64x64x4"
    assert len(device.timed) == len(runnable)
    other = TimedDevice(fastest="128x128x32x4")
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
