"""Stored tensors -> float32 parameters: exact, checked, and not more memory than they need."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.numpy import save_file

import npclip
from npclip.config import Metadata
from npclip.errors import CheckpointError
from npclip.params import as_float32
from npclip.tensor import Tensor


def tensor(array, dtype=None):
    return Tensor(array.shape, dtype or array.dtype.name, lambda: array)


def test_every_finite_float16_converts_exactly():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    result = as_float32("x", tensor(np.tile(finite, 3)))  # more than one block
    expected = np.tile(finite.astype(np.float32), 3)
    np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))


def test_every_finite_bfloat16_converts_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(values)
    result = as_float32("x", tensor(bits[finite], "bfloat16"))
    np.testing.assert_array_equal(result.view(np.uint32), values[finite].view(np.uint32))


def test_float64_is_rounded():
    x = np.random.default_rng(0).standard_normal((3, 5))
    np.testing.assert_array_equal(as_float32("x", tensor(x)), x.astype(np.float32))


def test_float32_is_not_copied():
    x = np.zeros((3, 5), np.float32)
    assert np.shares_memory(as_float32("x", tensor(x)), x)


def test_strided_tensors_come_out_contiguous():
    x = np.arange(12, dtype=np.float16).reshape(3, 4).T
    result = as_float32("x", tensor(x))
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_not_finite_is_an_error_that_names_the_tensor(dtype, value):
    x = np.zeros(100_000, np.float32)
    x[[5, 99_999]] = value
    stored = (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.astype(dtype)
    with pytest.raises(CheckpointError, match="tensor bad: 2 of 100000 values"):
        as_float32("bad", tensor(stored, dtype))


def test_a_float64_that_overflows_float32_is_an_error():
    with pytest.raises(CheckpointError, match="1 of 1"):
        as_float32("x", tensor(np.array([1e300])))


def test_integers_are_no_parameters():
    with pytest.raises(CheckpointError, match="int64"):
        as_float32("x", tensor(np.zeros(3, np.int64)))


def save_with(golden, path, name, change):
    """The golden model's checkpoint with one tensor changed."""
    weights = golden.weights | {name: change(golden.weights[name].copy())}
    save_file(weights, path, Metadata(activation="gelu").to_strings())


def test_a_model_with_nan_does_not_load(golden, tmp_path):
    def spoil(array):
        array.reshape(-1)[3] = np.nan
        return array

    for key in {"visual.conv1.weight", "visual.bn1.running_var"} & set(golden.weights):
        save_with(golden, tmp_path / "nan.safetensors", key, spoil)
        with pytest.raises(CheckpointError, match=rf"nan\.safetensors.*{key}: 1 of"):
            npclip.load(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("golden", ["resnet"], indirect=True)
def test_a_negative_variance_is_an_error(golden, tmp_path):
    path = tmp_path / "negative.safetensors"
    save_with(golden, path, "visual.bn1.running_var", np.negative)
    with pytest.raises(CheckpointError, match=r"bn1\.running_var: a variance is negative"):
        npclip.load(path)


PEAK = textwrap.dedent("""
    import sys, npclip
    def status(key):
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
    base = status("VmRSS")
    model = npclip.load(sys.argv[1])
    print(status("VmHWM") - base)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_at_most_a_tenth_more_than_the_weights(vit_b_32):
    """As in float32, though the file holds float16."""
    command = [sys.executable, "-c", PEAK, str(vit_b_32)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak <= 1.1 * 4 * 151_277_313
