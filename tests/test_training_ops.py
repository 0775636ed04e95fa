"""kernels/reference_backward.py against central differences in float64, and training's storage."""

from functools import partial

import numpy as np
import pytest

from npclip.kernels import reference, reference_backward
from npclip.training import ops

STEP = 2e-4
BOUND = 1e-9  # of a gradient's relative error: rounding / STEP + STEP^4
RAMP = 3  # keeps a row's variance and length away from 0, where differences err


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def check(function, backward, inputs, rng):
    """backward(dy) against differences of sum(function(*inputs) * dy), along random directions."""
    dy = rng.standard_normal(np.shape(function(*inputs)))
    gradients = backward(dy)
    assert [np.shape(g) for g in gradients] == [np.shape(x) for x in inputs]
    for i, gradient in enumerate(gradients):
        for _ in range(3):
            direction = rng.standard_normal(np.shape(inputs[i]))
            expected = 0
            for steps, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # of fourth order
                moved = [*inputs[:i], inputs[i] + steps * STEP * direction, *inputs[i + 1 :]]
                expected += factor * np.sum(function(*moved) * dy) / (12 * STEP)
            size = np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs(np.sum(gradient * direction) - expected) <= BOUND * max(size, 1), i


@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (5, 7, 3), (33, 17, 31)])
def test_linear(rng, n, k, m):
    x, w, b = (rng.standard_normal(s) for s in ((n, k), (m, k), m))
    backward = partial(reference_backward.linear_backward, x, w)
    check(reference.linear, backward, (x, w, b), rng)


@pytest.mark.parametrize("name", ["quick_gelu", "gelu"])
def test_activations(rng, name):
    x = rng.standard_normal((3, 11)) * 3
    backward = reference_backward.ACTIVATIONS_BACKWARD[name]
    check(reference.ACTIVATIONS[name], lambda dy: [backward(x, dy)], (x,), rng)


@pytest.mark.parametrize("name", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_far_out_are_straight(name, dtype):
    x = np.array([-1e4, -100, 100, 1e4], dtype)
    dx = reference_backward.ACTIVATIONS_BACKWARD[name](x, np.ones_like(x))
    assert dx.dtype == dtype
    np.testing.assert_allclose(dx, [0, 0, 1, 1], atol=1e-30)


@pytest.mark.parametrize(("n", "width"), [(1, 2), (1, 64), (7, 5), (31, 33)])
def test_layer_norm(rng, n, width):
    x, w, b = (rng.standard_normal(s) for s in ((n, width), width, width))
    x = rng.permuted(np.sort(x) + RAMP * np.arange(width), axis=1)  # values at least RAMP apart
    backward = partial(reference_backward.layer_norm_backward, x, w)
    check(reference.layer_norm, backward, (x, w, b), rng)


SEQUENCES = [([1], 1, 1), ([1], 2, 4), ([2, 1, 5], 1, 3), ([7, 1, 17], 3, 4), ([4, 4, 4], 2, 8)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "heads", "width"), SEQUENCES)
def test_attention(rng, lengths, heads, width, causal):
    seqs = np.cumsum([0, *lengths])
    qkv = rng.standard_normal((seqs[-1], 3 * heads * width))
    forward = partial(reference.attention, cu_seqlens=seqs, heads=heads, causal=causal)
    backward = reference_backward.attention_backward
    check(forward, lambda dy: [backward(qkv, dy, seqs, heads, causal)], (qkv,), rng)


@pytest.mark.parametrize(("lengths", "heads", "width"), SEQUENCES)
def test_attention_pool(rng, lengths, heads, width):
    seqs, d = np.cumsum([0, *lengths]), heads * width
    q, kv = rng.standard_normal((len(lengths), d)), rng.standard_normal((seqs[-1], 2 * d))
    forward = partial(reference.attention_pool, cu_seqlens=seqs, heads=heads)
    backward = reference_backward.attention_pool_backward
    check(forward, lambda dy: backward(q, kv, dy, seqs, heads), (q, kv), rng)


@pytest.mark.parametrize(("batch", "patches", "width"), [(1, 1, 3), (3, 4, 5)])
def test_embed_patches(rng, batch, patches, width):
    shapes = ((batch * patches, width), width, (patches + 1, width), width, width)
    inputs = [rng.standard_normal(s) for s in shapes]
    inputs[2] += RAMP * np.arange(width)
    backward = partial(reference_backward.embed_patches_backward, *inputs[:4])
    check(reference.embed_patches, backward, inputs, rng)


@pytest.mark.parametrize("n", [1, 9])
def test_embed_tokens(rng, n):
    ids, positions = rng.integers(0, 4, n), rng.integers(0, 5, n)  # some more than once
    tables = rng.standard_normal((4, 3)), rng.standard_normal((5, 3))

    def backward(dy):
        return reference_backward.embed_tokens_backward(ids, positions, dy, 4, 5)

    check(partial(reference.embed_tokens, ids, positions), backward, tables, rng)


def test_take(rng):
    x, rows = rng.standard_normal((6, 3)), np.array([4, 0, 3])
    forward = partial(reference.take, rows=rows)
    check(forward, lambda dy: [reference_backward.take_backward(rows, dy, 6)], (x,), rng)


@pytest.mark.parametrize("shape", [(1, 2), (5, 7)])
def test_l2_normalize(rng, shape):
    x = rng.standard_normal(shape) + RAMP
    backward = reference_backward.l2_normalize_backward
    check(reference.l2_normalize, lambda dy: [backward(x, dy)], (x,), rng)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_contrastive_loss(rng, batch):
    images, texts = (reference.l2_normalize(rng.standard_normal((batch, 5))) for _ in range(2))
    inputs = images, texts, np.array(1.7)

    def forward(*inputs):
        return reference_backward.contrastive_loss(*inputs)[0]

    def backward(dy):
        return [dy * g for g in reference_backward.contrastive_loss(*inputs)[1:]]

    check(forward, backward, inputs, rng)


def test_contrastive_loss_is_the_mean_of_two_cross_entropies(rng):
    images, texts = (reference.l2_normalize(rng.standard_normal((4, 5))) for _ in range(2))
    logits = np.exp(2.0) * images @ texts.T
    p, q = reference.softmax(logits), reference.softmax(logits.T)
    expected = -np.mean([np.log(p[i, i]) / 2 + np.log(q[i, i]) / 2 for i in range(4)])
    found = reference_backward.contrastive_loss(images, texts, np.array(2.0))[0]
    assert abs(found - expected) < 1e-12


def test_a_backward_leaves_its_inputs_alone_and_keeps_the_dtype(rng):
    seqs = np.array([0, 2, 5])
    x, w, dy, qkv, q, kv = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((5, 4), 4, (5, 4), (5, 12), (2, 4), (5, 8))
    )
    inputs = x, w, dy, qkv, q, kv
    before = [a.copy() for a in inputs]
    r = reference_backward
    results = [
        *r.layer_norm_backward(x, w, dy),
        r.attention_backward(qkv, dy, seqs, 2, True),
        *r.attention_pool_backward(q, kv, dy[:2], seqs, 2),
        r.quick_gelu_backward(x, dy),
        r.gelu_backward(x, dy),
        r.l2_normalize_backward(x, dy),
        *r.linear_backward(x, x, dy @ x.T),
        *r.embed_tokens_backward(np.arange(5), np.arange(5), dy, 9, 9),
        r.take_backward(np.arange(2), dy[:2], 5),
    ]
    assert {a.dtype for a in results} == {np.dtype(np.float32)}
    assert all((a == b).all() for a, b in zip(inputs, before, strict=True))


def test_narrow_rounds_to_nearest_even_and_keeps_what_is_not_finite():
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e38, np.inf, -np.inf, np.nan], np.float32)
    bits = ops.narrow(x, np.uint16)
    assert bits.dtype == np.uint16
    expected = np.array([1, 1, 1 + 2**-6, -0.0, x[4], np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_allclose(ops.widen(bits), expected, rtol=2**-8)
    assert (ops.widen(bits)[:3] == expected[:3]).all()
    half = ops.narrow(x, np.float16)
    assert half.dtype == np.float16
    assert np.isposinf(half[4:6]).all() and np.isneginf(half[6]) and np.isnan(half[7])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_narrow_leaves_full_precision_alone(dtype):
    x = np.ones(3, dtype)
    assert ops.narrow(x, np.float32) is x and ops.widen(x) is x


@pytest.mark.parametrize(("dtype", "epsilon"), [(np.float16, 2**-11), (np.uint16, 2**-8)])
def test_linear_stores_its_result_as_the_weight_is(rng, dtype, epsilon):
    x, w, dy, r = (
        rng.standard_normal(s).astype(np.float32) for s in ((5, 8), (3, 8), (5, 3), (5, 3))
    )
    small, xs = ops.narrow(w, dtype), ops.narrow(x, dtype)
    y = ops.linear(xs, small, np.ones(3, np.float32))
    assert y.dtype == dtype
    full = reference.linear(*(ops.widen(a) for a in (xs, small)), np.ones(3, np.float32))
    np.testing.assert_allclose(ops.widen(y), full, rtol=epsilon)
    assert ops.linear(xs, small, residual=r).dtype == np.float32
    dx, g = ops.linear_backward(xs, {"weight": small, "bias": r[0]}, dy)
    assert {a.dtype for a in (dx, *g.values())} == {np.dtype(np.float32)}
    exact = reference_backward.linear_backward(x, w, dy)
    for found, expected in zip((dx, g["weight"], g["bias"]), exact, strict=True):
        assert np.linalg.norm(found - expected) <= 4 * epsilon * np.linalg.norm(expected)
