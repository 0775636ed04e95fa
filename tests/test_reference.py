"""kernels/reference.py, the specification, against slow loops written from the definitions."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npclip.kernels import reference

rng = np.random.default_rng(7)


def randn(*shape, dtype=np.float64):
    return rng.standard_normal(shape).astype(dtype)


def assert_close(actual, expected, rtol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol)


def slow_softmax(row):
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


def slow_attention_row(q, k, v):
    """One query over the keys it sees, one head."""
    p = slow_softmax([sum(a * b for a, b in zip(q, row, strict=True)) / len(q) ** 0.5 for row in k])
    return [sum(w * row[d] for w, row in zip(p, v, strict=True)) for d in range(len(q))]


@pytest.mark.parametrize("activation", [None, "quick_gelu", "gelu", "relu"])
def test_linear(activation):
    x, w, b, r = randn(5, 7), randn(3, 7), randn(3), randn(5, 3)
    scalar = {
        None: lambda v: v,
        "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
        "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
        "relu": lambda v: max(v, 0),
    }[activation]
    expected = [[scalar(sum(x[n] * w[m]) + b[m]) + r[n, m] for m in range(3)] for n in range(5)]
    assert_close(reference.linear(x, w, b, activation, r), expected)


def test_linear_leaves_its_inputs_alone():
    x, w, b, r = randn(2, 3), randn(4, 3), randn(4), randn(2, 4)
    before = [a.copy() for a in (x, w, b, r)]
    reference.linear(x, w, b, "quick_gelu", r)
    assert all((a == c).all() for a, c in zip((x, w, b, r), before, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "heads", "width"), [([1], 1, 4), ([3, 1, 5], 2, 6)])
def test_attention(lengths, heads, width, causal):
    cu = np.cumsum([0, *lengths])
    qkv = randn(cu[-1], 3 * heads * width)
    parts = qkv.reshape(-1, 3, heads, width)
    expected = np.empty((cu[-1], heads, width))
    for i, j in pairwise(cu):
        for t in range(i, j):
            end = t + 1 if causal else j
            for h in range(heads):
                q, k, v = parts[t, 0, h], parts[i:end, 1, h], parts[i:end, 2, h]
                expected[t, h] = slow_attention_row(q, k, v)
    actual = reference.attention(qkv, cu, heads, causal)
    assert_close(actual, expected.reshape(cu[-1], -1))


def test_attention_pool_is_the_row_of_attention_that_sees_everything():
    cu, heads = np.array([0, 4, 5, 11]), 3
    qkv = randn(11, 3 * 12)
    whole = reference.attention(qkv, cu, heads, causal=True)
    last = cu[1:] - 1
    pooled = reference.attention_pool(qkv[last, :12], qkv[:, 12:], cu, heads)
    assert_close(pooled, whole[last])


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_softmax_sums_to_one_and_survives_large_values(n, seed):
    x = np.random.default_rng(seed).standard_normal((2, n)) * 1e4
    y = reference.softmax(x)
    assert_close(y.sum(-1), 1)
    assert_close(y[0], slow_softmax(list(x[0])))


def test_layer_norm():
    x, w, b = randn(4, 9) * 3 + 100, randn(9), randn(9)
    for row, y in zip(x, reference.layer_norm(x, w, b), strict=True):
        mean = sum(row) / 9
        var = sum((v - mean) ** 2 for v in row) / 9
        assert_close(y, (row - mean) / math.sqrt(var + 1e-5) * w + b, 1e-10)


def test_add_layer_norm():
    x, h, w, b = randn(4, 9), randn(4, 9), randn(9), randn(9)
    total, normed = reference.add_layer_norm(x, h, w, b)
    assert (total == x + h).all()
    assert (normed == reference.layer_norm(x + h, w, b)).all()


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 4e-16), (np.float32, 3e-7)])
def test_erf_equals_math_erf(dtype, rtol):
    edges = [0, -0.0, 1, -1, 6, -6, 30, -30, 1e-30, np.inf, -np.inf]
    x = np.concatenate([np.linspace(-7, 7, 20001), edges]).astype(dtype)
    expected = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(reference.erf(x), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", ["quick_gelu", "gelu"])
def test_activations_at_the_extremes(name):
    x = np.array([-1e4, -100, 0, 100, 1e4], np.float32)
    y = reference.ACTIVATIONS[name](x)
    assert y.dtype == np.float32
    assert_close(y, [0, 0, 0, 100, 1e4])


@pytest.mark.parametrize(
    ("stride", "kernel", "size"), [(1, 1, (4, 5)), (1, 3, (5, 4)), (2, 3, (6, 7))]
)
def test_conv2d(stride, kernel, size):
    x, w, b = randn(2, *size, 3), randn(4, kernel, kernel, 3), randn(4)
    pad = kernel // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n + 2 * pad - kernel) // stride + 1 for n in size)
    expected = np.empty((2, rows, columns, 4))
    for n, i, j, o in np.ndindex(expected.shape):
        window = padded[n, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        expected[n, i, j, o] = (window * w[o]).sum() + b[o]
    r = randn(*expected.shape)
    assert_close(reference.conv2d(x, w, b, stride), expected)
    assert_close(reference.conv2d(x, w, b, stride, "relu", r), np.maximum(expected + r, 0))


def test_avg_pool2d():
    x = randn(2, 4, 6, 3)
    y = reference.avg_pool2d(x, 2)
    assert y.shape == (2, 2, 3, 3)
    assert_close(y[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)))


def test_patchify_rows_are_the_patches_in_reading_order():
    x = randn(2, 3, 4, 6)
    rows = reference.patchify(x, 2)
    assert rows.shape == (2 * 2 * 3, 3 * 2 * 2)
    assert (rows[6 + 4] == x[1, :, 2:4, 2:4].reshape(-1)).all()


def test_embed_patches():
    patches, cls, positions, norm = randn(2 * 4, 3), randn(3), randn(5, 3), (randn(3), randn(3))
    x = reference.embed_patches(patches, cls, positions, *norm).reshape(2, 5, 3)
    expected = reference.layer_norm(cls + positions[0], *norm)
    assert_close(x[:, 0], np.tile(expected, (2, 1)))
    assert_close(x[1, 3], reference.layer_norm(patches[4 + 2] + positions[3], *norm))


def test_embed_tokens():
    table, positions = randn(10, 3), randn(5, 3)
    x = reference.embed_tokens(np.array([9, 0, 9]), np.array([0, 1, 4]), table, positions)
    assert_close(x, [table[9] + positions[0], table[0] + positions[1], table[9] + positions[4]])


def test_l2_normalize():
    x = randn(3, 5)
    assert_close(np.linalg.norm(reference.l2_normalize(x), axis=-1), 1)
    assert_close(reference.l2_normalize(x) * np.linalg.norm(x, axis=-1, keepdims=True), x)


@pytest.mark.parametrize("cosine", [False, True])
def test_similarity(cosine):
    queries, rows = randn(3, 5), randn(4, 5)
    rows[2] = 0
    lengths = [math.hypot(*row) or 1 for row in rows] if cosine else [1] * 4
    expected = [[math.fsum(q * rows[i]) / lengths[i] for i in range(len(rows))] for q in queries]
    assert_close(reference.similarity(queries, rows, cosine), expected)


def test_similarity_widens_what_is_stored():
    queries, rows = randn(3, 5), randn(4, 5).astype(np.float16)
    assert_close(reference.similarity(queries, rows), queries @ rows.astype(float).T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_op_keeps_its_dtype(dtype):
    x, w, b = randn(6, 12, dtype=dtype), randn(12, 12, dtype=dtype), randn(12, dtype=dtype)
    cu = np.array([0, 2, 6], np.int32)
    image = randn(1, 4, 4, 3, dtype=dtype)
    results = [
        *(reference.linear(x, w, b, a, x) for a in (None, *reference.ACTIVATIONS)),
        reference.attention(x, cu, 2, True),
        reference.attention_pool(x[:2, :4], x[:, :8], cu, 2),
        reference.layer_norm(x, b, b),
        *reference.add_layer_norm(x, x, b, b),
        reference.softmax(x),
        reference.conv2d(image, randn(2, 3, 3, 3, dtype=dtype), randn(2, dtype=dtype)),
        reference.avg_pool2d(image, 2),
        reference.l2_normalize(x),
        reference.similarity(x, x.astype(np.float16), True),
        reference.embed_patches(x[:4], b, randn(3, 12, dtype=dtype), b, b),
        reference.embed_tokens(np.array([1]), np.array([0]), x, x),
    ]
    assert {r.dtype for r in results} == {np.dtype(dtype)}
