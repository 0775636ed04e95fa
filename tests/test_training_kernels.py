"""The C kernels of training on every ISA of this machine against their specification in float64."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
from kernel_rule import assert_close, new_rng, normal, sequences, widened

from npclip import cpu, cpu_library, cpu_training, threads, weights
from npclip.kernels import reference, reference_backward

if reason := cpu_library.why_unavailable():
    pytest.skip(f"no C kernels: {reason}", allow_module_level=True)

ISAS = [isa for isa in cpu_library.machine_isas() if isa in ("avx512", "avx2")]
LENGTHS = [1, 2, 15, 17, 33, 50, 60, 61, 77, 197, 257]  # 60 queries are a block
ACTIVATIONS = ["quick_gelu", "gelu"]
COEFFICIENTS = 0.7, 0.9, 1 - 0.9, 0.98, 1 - 0.98, 1 - 1e-4, 1.3, 1e-6, 1e-3


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Makes the kernels of this ISA those that are used."""
    monkeypatch.setattr(cpu_library, "isas", lambda: (request.param,))
    return request.param


@pytest.fixture
def rng():
    return new_rng()


def specification(op):
    return getattr(reference_backward, op, None) or getattr(reference, op)


def each(results):
    return results if isinstance(results, tuple) else (results,)


def check(op, *arrays, magnitudes=(0.0,), **options):
    """One op on float32 arrays against its specification; a magnitude for each result."""
    results = each(getattr(cpu_training, op)(*arrays, **options))
    wanted = each(specification(op)(*widened(arrays), **options))
    baselines = each(specification(op)(*arrays, **options))
    for outcome in zip(results, wanted, baselines, magnitudes, strict=True):
        assert_close(*outcome)


SHAPES = [(1,), (7, 15), (50, 3072), (16385,), (33, 97)]  # 16384 values are a task


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations(isa, rng, shape, name):
    x, dy = normal(rng, *shape, scale=3), normal(rng, *shape)
    check(name, x, magnitudes=(np.abs(x).max(),))  # 1 + erf(x / sqrt(2)) cancels below 0
    check(f"{name}_backward", x, dy, magnitudes=(1.2 * np.abs(dy).max(),))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_straight_far_out_and_keep_nan(isa, name):
    x = np.array([-np.inf, -1e30, -1e4, -100, 100, 1e4, 1e30, np.inf, np.nan, 1], np.float32)
    dx = getattr(cpu_training, f"{name}_backward")(x, np.ones_like(x))
    np.testing.assert_allclose(dx[:9], [0, 0, 0, 0, 1, 1, 1, 1, np.nan], atol=1e-30)
    dx = getattr(cpu_training, f"{name}_backward")(np.ones(2, np.float32), x[-3:-1])
    np.testing.assert_array_equal(dx, [np.inf, np.nan])


@pytest.mark.parametrize("rows", [1, 7, 32, 97])  # 32 are a block
@pytest.mark.parametrize("width", [1, 7, 16, 33, 97, 512, 768, 1024, 1280])
def test_layer_norm_backward(isa, rng, rows, width):
    x, weight = normal(rng, rows, width, scale=5) + np.float32(3), normal(rng, width)
    dy = normal(rng, rows, width)
    wide = x.astype(float)
    std = np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    z, g = np.abs(wide - wide.mean(-1, keepdims=True)) / std, np.abs(dy * weight)
    dx = (g + g.mean(-1, keepdims=True) + z * (g * z).mean(-1, keepdims=True)) / std
    sums = ((np.abs(dy) * z).sum(0), np.abs(dy).sum(0))
    magnitudes = [a.max() for a in (dx, *sums)]
    check("layer_norm_backward", x, weight, dy, magnitudes=magnitudes)


def attention_magnitude(q, kv, dy, cu_seqlens, heads, causal=False):
    """The largest sum of magnitudes in dq, dk and dv, times how far a score can be moved by its own
    rounding. q and dy have a row for each of kv, or one for each sequence."""
    largest = 0.0
    for b, (i, j) in enumerate(pairwise(cu_seqlens)):
        rows = slice(i, j) if len(q) == len(kv) else slice(b, b + 1)
        for head in range(heads):
            d = q.shape[1] // heads
            qh, dyh = (a[rows].reshape(-1, heads, d)[:, head].astype(float) for a in (q, dy))
            k, v = kv[i:j].reshape(-1, 2, heads, d)[:, :, head].astype(float).transpose(1, 0, 2)
            s = qh @ k.T * d**-0.5
            if causal:
                s += np.triu(np.full(s.shape, -np.inf), 1)
            p, dp = reference.softmax(s), np.abs(dyh) @ np.abs(v).T
            ds = p * (dp + (p * dp).sum(-1, keepdims=True))
            moved = 1 + (np.abs(qh) @ np.abs(k).T).max() * d**-0.5
            dq, dk = ds @ np.abs(k) * d**-0.5, ds.T @ np.abs(qh) * d**-0.5
            largest = max(largest, moved * max(a.max() for a in (dq, dk, p.T @ np.abs(dyh))))
    return largest


def check_attention(qkv, dy, seqs, heads, causal):
    width = dy.shape[1]
    q, kv = qkv[:, :width], qkv[:, width:]
    magnitude = attention_magnitude(q, kv, dy, seqs, heads, causal)
    options = {"heads": heads, "causal": causal}
    check("attention_backward", qkv, dy, seqs, magnitudes=[magnitude], **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_width", [1, 33, 64, 80, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_backward(isa, rng, length, head_width, causal):
    seqs, heads = sequences(rng, length), 2 if length < 200 else 1
    width = heads * head_width
    qkv, dy = normal(rng, seqs[-1], 3 * width), normal(rng, seqs[-1], width)
    check_attention(qkv, dy, seqs, heads, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_backward_with_scores_as_large_as_a_trained_models(isa, rng, causal):
    seqs = sequences(rng, 50)
    qkv, dy = normal(rng, seqs[-1], 3 * 128, scale=6), normal(rng, seqs[-1], 128)
    check_attention(qkv, dy, seqs, 2, causal)


def test_attention_backward_of_the_longest_sequence_and_the_widest_head(isa, rng):
    seqs = np.array([0, cpu.MAX_KEYS], np.int32)
    qkv, dy = (normal(rng, cpu.MAX_KEYS, n * cpu.MAX_HEAD_WIDTH) for n in (3, 1))
    check_attention(qkv, dy, seqs, 1, True)


@pytest.mark.parametrize("head_width", [1, 33, 64, 104])
@pytest.mark.parametrize("length", [1, 16, 33, 50, 257])
def test_attention_pool_backward(isa, rng, length, head_width):
    seqs, width = sequences(rng, length), 3 * head_width
    q, kv, dy = (normal(rng, *s) for s in ((7, width), (seqs[-1], 2 * width), (7, width)))
    magnitude = attention_magnitude(q, kv, dy, seqs, 3)
    check("attention_pool_backward", q, kv, dy, seqs, magnitudes=[magnitude] * 2, heads=3)


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 7, 33), (2, 50, 768)], ids=str)
def test_embed_patches_backward(isa, rng, shape):
    batch, tokens, width = shape
    patches, position = normal(rng, batch * (tokens - 1), width), normal(rng, tokens, width)
    vectors, dy = [normal(rng, width) for _ in range(2)], normal(rng, batch * tokens, width)
    arrays = patches, vectors[0], position, vectors[1], dy
    check("embed_patches_backward", *arrays, magnitudes=[10 * batch * tokens] * 5)


@pytest.mark.parametrize("width", [1, 33, 64, 65, 512])
def test_embed_tokens_backward_adds_in_the_order_of_the_tokens(isa, rng, width):
    ids, positions = rng.integers(0, 9, 100), rng.integers(0, 5, 100)
    arrays = ids, positions, normal(rng, 100, width), 11, 7
    expected = reference_backward.embed_tokens_backward(*arrays)
    for table, other in zip(cpu_training.embed_tokens_backward(*arrays), expected, strict=True):
        np.testing.assert_array_equal(table, other)


def moments(rng, shape):
    p, g, m, v = (normal(rng, *shape) for _ in range(4))
    return p, g, m, np.square(v)


@pytest.mark.parametrize("shape", [(1,), (15,), (16385,), (33, 97)], ids=str)
def test_adamw_has_the_bits_of_numpy(isa, rng, shape):
    arrays = moments(rng, shape)
    of_numpy = [a.copy() for a in arrays]
    cpu_training.adamw(*arrays, *COEFFICIENTS)
    reference_backward.adamw(*of_numpy, *COEFFICIENTS)
    for found, expected in zip(arrays, of_numpy, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_adamw_changes_arrays_of_any_layout(isa, rng):
    arrays = moments(rng, (33, 97))
    transposed = [np.asfortranarray(a) for a in arrays]
    for some in (arrays, transposed):
        cpu_training.adamw(*some, *COEFFICIENTS)
    for found, expected in zip(transposed, arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [0, 1, 17, 65536, 65537 * 2])
def test_square_sums(isa, rng, size):
    x = normal(rng, size, scale=1e3)
    found, exact = cpu_training.square_sums(x), reference_backward.square_sums(x)
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    assert sum(found) == pytest.approx(np.square(x.astype(float)).sum(), rel=1e-12)


def test_square_sums_are_exact_where_float32_would_overflow_or_vanish(isa):
    x = np.array([1e30, 1e-30, 3.0], np.float32)
    assert cpu_training.square_sums(x[1:]).tolist() == [9.0 + float(x[1]) ** 2]
    assert cpu_training.square_sums(x[:1]).tolist() == [float(x[0]) ** 2]
    assert np.isnan(cpu_training.square_sums(np.array([1, np.nan], np.float32)))


def test_results_have_the_same_bits_on_any_number_of_threads(isa, rng):
    seqs = sequences(rng, 50)
    n, width = seqs[-1], 2 * 64
    qkv, x, dy = normal(rng, n, 3 * width), normal(rng, n, width), normal(rng, n, width)
    ids, values = rng.integers(0, 3, n), normal(rng, 1 << 18)

    def everything():
        arrays = [values.copy(), values, np.square(values), np.square(values)]
        cpu_training.adamw(*arrays, *COEFFICIENTS)
        return [
            cpu_training.gelu(values),
            cpu_training.quick_gelu_backward(values, values),
            *cpu_training.layer_norm_backward(x, x[0], dy),
            cpu_training.attention_backward(qkv, dy, seqs, 2, True),
            *cpu_training.attention_pool_backward(x[:7], qkv[:, width:], dy[:7], seqs, 2),
            *cpu_training.embed_tokens_backward(ids, ids, dy, 3, 3),
            *arrays,
            cpu_training.square_sums(values),
        ]

    assert_same_on_any_threads(everything)


def assert_same_on_any_threads(compute):
    chosen = threads.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            threads.set_num_threads(count)
            results.append(compute())
    finally:
        threads.set_num_threads(chosen)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_no_kernel_takes_goes_to_the_reference(rng):
    x = rng.standard_normal((5, 8))
    for op, arrays in {
        "gelu": [x], "quick_gelu_backward": [x, x], "layer_norm_backward": [x, x[0], x],
        "embed_tokens_backward": [np.arange(5), np.arange(5), x, 9, 9], "square_sums": [x],
    }.items():  # fmt: skip
        results = each(getattr(cpu_training, op)(*arrays))
        for found, expected in zip(results, each(specification(op)(*arrays)), strict=True):
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found, expected)
    n = cpu.MAX_KEYS + 1
    seqs = np.array([0, n], np.int32)
    long = normal(rng, n, 6), normal(rng, n, 2)
    np.testing.assert_array_equal(
        cpu_training.attention_backward(*long, seqs, 1),
        reference_backward.attention_backward(*long, seqs, 1),
    )
    pool = normal(rng, 1, 2), normal(rng, n, 4), normal(rng, 1, 2)
    expected = reference_backward.attention_pool_backward(*pool, seqs, 1)
    for found, other in zip(
        cpu_training.attention_pool_backward(*pool, seqs, 1), expected, strict=True
    ):
        np.testing.assert_array_equal(found, other)


def test_the_functions_have_the_names_and_signatures_of_the_specification():
    functions = {
        name: function
        for name, function in inspect.getmembers(cpu_training, inspect.isfunction)
        if function.__module__ == cpu_training.__name__ and not name.startswith("_")
    }
    assert len(functions) == 12
    for name, function in functions.items():
        specified = inspect.signature(specification(name)).parameters
        assert inspect.signature(function).parameters.keys() == specified.keys(), name


PAIR_ISAS = [isa for isa in cpu_library.machine_isas() if isa in cpu.PAIRS]


@pytest.fixture(params=PAIR_ISAS or [None])
def pairs(request, monkeypatch):
    """The same for the ISAs that multiply bfloat16."""
    if request.param is None:
        pytest.skip("no ISA of this machine multiplies bfloat16")
    monkeypatch.setattr(cpu_library, "isas", lambda: (request.param, "avx512"))
    return request.param


def seen(x):
    """A float32 array as products of bfloat16 take it, in float64."""
    return weights.round_to(x, "bfloat16").astype(float)


def assert_sums(found, a, b):
    """found is a @ b, a rounding in float32 for every product aside."""
    depth, exact = a.shape[1], a @ b
    error = 1e-6 + np.finfo(np.float32).eps * depth**0.5 * (np.abs(a) @ np.abs(b)).max(initial=0)
    assert found.dtype == np.float32 and found.shape == exact.shape
    assert np.abs(found - exact).max(initial=0) <= error


PRODUCTS = [  # N, K, M
    (50, 768, 3072), (197, 768, 512), (1, 768, 512), (1, 1, 1), (7, 15, 17), (15, 385, 33),
    (769, 16, 31), (17, 383, 97), (31, 1, 16), (33, 97, 1), (193, 384, 64), (400, 27, 40),
    (5000, 13, 8), (0, 8, 5),
]  # fmt: skip


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_of_rounded_values(pairs, rng, shape):
    n, k, m = shape
    x, dy, weight = normal(rng, n, k), normal(rng, n, m), normal(rng, m, k, scale=k**-0.5)
    bias, residual = normal(rng, m), normal(rng, n, m)
    for w in (weight, np.asfortranarray(weight), np.ascontiguousarray(weight[::-1])[::-1]):
        rounded = cpu_training.Rounded(w)
        assert_sums(rounded.linear(x), seen(x), seen(weight).T)
        assert_sums(rounded.linear_backward(dy), seen(dy), seen(weight))
    y = cpu_training.Rounded(weight).linear(x, bias, residual)
    assert_sums(y - bias - residual, seen(x), seen(weight).T)
    assert_sums(cpu_training.linear_weight_backward(x, dy), seen(dy).T, seen(x))


def test_long_sums_are_cut(pairs, rng, monkeypatch):
    x, dy = normal(rng, 500, 9), normal(rng, 500, 7)
    whole = cpu_training.linear_weight_backward(x, dy)
    monkeypatch.setattr(cpu_training, "MAX_DEPTH", 160)
    cut = cpu_training.linear_weight_backward(x, dy)
    assert_sums(cut, seen(dy).T, seen(x))
    assert np.abs(whole - cut).max() > 0


@pytest.mark.parametrize("shape", [(3072, 768), (17, 15), (1, 1), (33, 97), (97, 33)], ids=str)
def test_packing_rounds_to_nearest_even(pairs, rng, shape):
    weight = normal(rng, *shape)
    weight.reshape(-1)[::3] = np.float32(1 + 2**-8) * np.sign(weight.reshape(-1)[::3])  # halfway
    for w in (weight, weight.T):
        expected = cpu.pack(np.ascontiguousarray(w), "bfloat16")
        np.testing.assert_array_equal(cpu_training._round_pack(w).buffer, expected.buffer)


def test_products_have_the_same_bits_on_any_number_of_threads(pairs, rng):
    x, dy, weight = normal(rng, 3000, 97), normal(rng, 3000, 130), normal(rng, 130, 97)

    def products():
        rounded = cpu_training.Rounded(weight)
        backward = cpu_training.linear_weight_backward(x, dy)
        return [rounded.linear(x), rounded.linear_backward(dy), backward]

    assert_same_on_any_threads(products)
