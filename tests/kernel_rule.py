"""The rule of the tests of kernels, and their inputs.

err(kernel) <= 2 err(reference in float32) + tiny, where err is the largest absolute difference from
the reference in float64, and tiny is two roundings of the largest sum of magnitudes: two orders of
summation differ by that even where terms cancel.
"""

import numpy as np
import pytest


def new_rng():
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


def normal(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def sequences(rng, total):
    """cu_seqlens of sequences of many lengths."""
    lengths = [*rng.integers(1, 20, 6), total]
    return np.append(0, np.cumsum(lengths)).astype(np.int32)


def widened(arrays):
    """float32 arrays as float64, others as they are."""
    return [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]


def assert_close(kernel, wanted, baseline, magnitude=0.0):
    """The rule. wanted is float64; baseline the reference's float32; magnitude the largest sum of
    the magnitudes of what was added up."""
    assert kernel.shape == wanted.shape
    assert kernel.dtype == np.float32
    assert np.isfinite(kernel).all()
    tiny = 2 * np.finfo(np.float32).eps * max(np.abs(wanted).max(initial=0), magnitude)
    bound = 2 * np.abs(baseline - wanted).max(initial=0) + tiny
    error = np.abs(kernel - wanted)
    if error.max(initial=0) > bound:
        worst = np.unravel_index(error.argmax(), error.shape)
        pytest.fail(
            f"worst at {worst}: {kernel[worst]!r}, expected {wanted[worst]!r}, "
            f"error {error[worst]:.3g}, bound {bound:.3g}"
        )
