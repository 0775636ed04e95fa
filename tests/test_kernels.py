"""Every C kernel on every ISA of this machine against kernels/reference.py in float64, by the rule
of kernel_rule.py; those of training are in test_training_kernels.py."""

import inspect

import numpy as np
import pytest
from kernel_rule import assert_close, new_rng, normal, sequences, widened

from npclip import cpu, cpu_library, ops, threads, weights
from npclip.kernels import reference

if reason := cpu_library.why_unavailable():
    pytest.skip(f"no C kernels: {reason}", allow_module_level=True)

ISAS = cpu_library.machine_isas()
LENGTHS = [1, 2, 7, 15, 16, 17, 31, 33, 50, 77, 97, 197, 257, 577]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Makes the kernels of this ISA, and no better one, those that are used."""
    monkeypatch.setattr(cpu_library, "isas", lambda: ISAS[ISAS.index(request.param) :])
    return request.param


@pytest.fixture
def rng():
    return new_rng()


def check(op, *arrays, magnitude=0.0, **options):
    """One op on float32 arrays, against the reference on the same in float64."""
    wide = widened(arrays)
    results = getattr(cpu, op)(*arrays, **options)
    function = getattr(reference, op)
    for outcome in zip(
        *(
            r if isinstance(r, tuple) else (r,)
            for r in (results, function(*wide, **options), function(*arrays, **options))
        ),
        strict=True,
    ):
        assert_close(*outcome, magnitude)


def widen(x, dtype):
    """What a kernel of that dtype computes with, as float32."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    return weights.round_to(x, dtype)


def assert_product_close(kernel, op, packed, x, weight, *args):
    """The rule for a product, and for bfloat16 pairs, whose rounding of x hides much, how far sums
    in float32 may be from those of the rounded values: a rounding for every product."""
    wide = [a.astype(float) if isinstance(a, np.ndarray) else a for a in (x, weight, *args)]
    if not (packed.isa in ("avx512_bf16", "amx") and packed.dtype == "bf16"):
        largest = op(*(np.abs(a) if isinstance(a, np.ndarray) else a for a in wide)).max()
        return assert_close(kernel, op(*wide), op(x, weight, *args), largest)
    seen = weights.round_to(x, "bfloat16")
    assert_close(kernel, op(*wide), op(seen, weight, *args))
    exact = op(seen.astype(float), *wide[1:])
    depth = weight[0].size
    most = np.abs(seen).max() * np.abs(weight).max() * depth**0.5
    tiny = 1e-6 + np.finfo(np.float32).eps * depth**0.5 * (most + np.abs(exact).max())
    assert np.abs(kernel - exact).max() <= tiny


SHAPES = [
    (50, 768, 3072), (50, 3072, 768), (197, 768, 2304), (257, 1024, 1024), (1, 768, 512),
    (1, 1, 1), (7, 15, 17), (15, 385, 33), (16, 769, 31), (17, 383, 97), (31, 1, 16), (33, 97, 1),
    (193, 384, 64), (400, 27, 40), (13, 5000, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_linear(isa, rng, shape, dtype):
    n, k, m = shape
    x, weight = normal(rng, n, k), normal(rng, m, k, scale=k**-0.5)
    bias, residual = normal(rng, m), normal(rng, n, m)
    packed = cpu.pack(weight.astype(np.float16) if dtype == "float16" else weight, dtype)
    if dtype == "bfloat16":
        assert packed.isa == isa
    weight = widen(weight, dtype)
    for activation in (None, "quick_gelu", "gelu", "relu"):
        for b, r in ((bias, residual), (None, None)):
            y = cpu.linear(x, packed, b, activation, r)
            assert_product_close(y, reference.linear, packed, x, weight, b, activation, r)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_rows_and_no_weights(isa, rng, dtype):
    packed = cpu.pack(normal(rng, 5, 8), dtype)
    assert cpu.linear(normal(rng, 0, 8), packed, normal(rng, 5), "gelu").shape == (0, 5)
    kernel = cpu.pack(normal(rng, 5, 3, 3, 2), dtype)
    assert cpu.conv2d(normal(rng, 0, 4, 4, 2), kernel, normal(rng, 5)).shape == (0, 4, 4, 5)
    for shape in ((0, 8), (5, 0)):
        weight = cpu.pack(normal(rng, *shape), dtype)
        assert cpu.linear(normal(rng, 3, shape[1]), weight).tolist() == [[0.0] * shape[0]] * 3


CONVOLUTIONS = [  # B, H, W, C, O, k, stride
    (2, 14, 14, 64, 64, 3, 1), (1, 8, 8, 256, 64, 1, 1), (2, 16, 16, 3, 32, 3, 2),
    (1, 1, 1, 1, 1, 1, 1), (1, 5, 7, 17, 33, 3, 1), (3, 7, 5, 5, 3, 3, 2), (1, 1, 9, 130, 31, 3, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conv2d(isa, rng, shape, dtype):
    b, h, w, c, o, k, stride = shape
    x, weight = normal(rng, b, h, w, c), normal(rng, o, k, k, c, scale=(k * k * c) ** -0.5)
    bias = normal(rng, o)
    residual = normal(rng, b, (h - 1) // stride + 1, (w - 1) // stride + 1, o)
    packed = cpu.pack(weight.astype(np.float16) if dtype == "float16" else weight, dtype)
    weight = widen(weight, dtype)
    for activation, r in ((None, None), ("relu", residual)):
        y = cpu.conv2d(x, packed, bias, stride, activation, r)
        args = (bias, stride, activation, r)
        assert_product_close(y, reference.conv2d, packed, x, weight, *args)


def magnitude(qkv, heads):
    """The largest |v|, times how far a score can be moved by its own rounding."""
    q, k, v = np.abs(qkv).reshape(len(qkv), 3, heads, -1).transpose(1, 2, 0, 3)
    return v.max() * (1 + (q @ k.transpose(0, 2, 1)).max() / q.shape[-1] ** 0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_width", [1, 16, 33, 64, 80, 88, 104, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention(isa, rng, length, head_width, causal):
    seqs = sequences(rng, length)
    qkv = normal(rng, seqs[-1], 3 * 2 * head_width)
    check("attention", qkv, seqs, heads=2, causal=causal, magnitude=magnitude(qkv, 2))


def test_attention_with_scores_as_large_as_a_trained_models(isa, rng):
    seqs = sequences(rng, 50)
    qkv = normal(rng, seqs[-1], 3 * 128, scale=6)  # scores of hundreds: all but one weight vanish
    check("attention", qkv, seqs, heads=2, magnitude=magnitude(qkv, 2))
    check("attention", qkv, seqs, heads=2, causal=True, magnitude=magnitude(qkv, 2))


@pytest.mark.parametrize("head_width", [1, 33, 64, 80, 104])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_pool(isa, rng, length, head_width):
    seqs = sequences(rng, length)
    q, kv = normal(rng, 7, 3 * head_width), normal(rng, seqs[-1], 6 * head_width)
    check("attention_pool", q, kv, seqs, heads=3, magnitude=np.abs(kv).max())


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 97, 512, 768, 1024, 1280])
def test_layer_norm(isa, rng, rows, width):
    x, h = normal(rng, rows, width, scale=5) + np.float32(3), normal(rng, rows, width)
    weight, bias = normal(rng, width), normal(rng, width)
    for op, *inputs in (("layer_norm", x), ("add_layer_norm", x, h)):
        scaled = reference.layer_norm(sum(inputs).astype(float), weight, np.zeros(width))
        magnitude = (np.abs(scaled) + np.abs(bias)).max()  # the bias may cancel the rest
        check(op, *inputs, weight, bias, magnitude=magnitude)


@pytest.mark.parametrize(
    "shape", [(2, 3, 224, 224, 32), (1, 3, 28, 28, 14), (3, 1, 4, 6, 2), (2, 3, 5, 7, 1)]
)
def test_patchify(isa, rng, shape):
    *image, patch = shape
    x = normal(rng, *image)
    np.testing.assert_array_equal(cpu.patchify(x, patch), reference.patchify(x, patch))


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 7, 33), (2, 50, 768), (1, 17, 1280)])
def test_embed_patches(isa, rng, shape):
    batch, tokens, width = shape
    patches, position = normal(rng, batch * (tokens - 1), width), normal(rng, tokens, width)
    vectors = [normal(rng, width) for _ in range(3)]
    check("embed_patches", patches, vectors[0], position, *vectors[1:])


@pytest.mark.parametrize("shape", [(2, 8, 8, 64, 2), (1, 6, 9, 17, 3), (1, 4, 4, 1, 4)])
def test_avg_pool2d(isa, rng, shape):
    *image, k = shape
    x = normal(rng, *image)
    check("avg_pool2d", x, k=k, magnitude=np.abs(x).max())


@pytest.mark.parametrize("shape", [(1, 1), (7, 512), (9, 770), (513,), (0, 512)], ids=str)
def test_l2_normalize(isa, rng, shape):
    check("l2_normalize", normal(rng, *shape, scale=20))


SEARCHES = [(1, 1000, 512), (2, 333, 768), (5, 129, 770), (3, 7, 33), (1, 1, 1), (16, 17, 1024)]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", SEARCHES, ids=str)
def test_similarity(isa, rng, shape, dtype, cosine):
    q, n, d = shape
    queries, rows = normal(rng, q, d), normal(rng, n, d).astype(dtype)
    rows[n // 2] = 0
    wide = rows.astype(np.float64)
    largest = reference.similarity(np.abs(queries).astype(float), np.abs(wide), cosine).max()
    assert_close(
        cpu.similarity(queries, rows, cosine),
        reference.similarity(queries.astype(float), wide, cosine),
        reference.similarity(queries, rows, cosine),
        largest,
    )


def test_similarity_is_the_same_alone_and_among_others_at_any_address(isa, rng):
    queries, rows = normal(rng, 5, 77), normal(rng, 300, 77).astype(np.float16)
    expected = cpu.similarity(queries, rows)
    each = [[cpu.similarity(q[None], r[None])[0, 0] for r in rows[:9]] for q in queries]
    np.testing.assert_array_equal(each, expected[:, :9])
    memory = np.empty(rows.nbytes + 1, np.uint8)[1:].view(np.float16).reshape(rows.shape)
    memory[:] = rows
    np.testing.assert_array_equal(cpu.similarity(queries, memory), expected)
    np.testing.assert_array_equal(cpu.similarity(queries, rows[::2]), expected[:, ::2])


def test_similarity_reads_nothing_beyond_the_last_row(isa, rng):
    mmap = pytest.importorskip("mmap")
    rows = normal(rng, 31, 33).astype(np.float16)
    page = mmap.PAGESIZE
    size = -(-rows.nbytes // page) * page
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # what follows it is mostly not mapped
    there = memory[size - rows.nbytes :].view(np.float16).reshape(rows.shape)
    there[:] = rows
    queries = normal(rng, 3, 33)
    np.testing.assert_array_equal(cpu.similarity(queries, there), cpu.similarity(queries, rows))


def test_similarity_with_nothing(isa, rng):
    for q, n in ((0, 3), (3, 0)):
        assert cpu.similarity(normal(rng, q, 8), normal(rng, n, 8)).shape == (q, n)


PAIR_ISAS = [isa for isa in ISAS if isa in cpu.PAIRS]


@pytest.fixture(params=PAIR_ISAS or [None])
def pairs(request, monkeypatch):
    """The same for the ISAs that store activations in bfloat16."""
    if request.param is None:
        pytest.skip("no ISA of this machine multiplies bfloat16")
    monkeypatch.setattr(cpu_library, "isas", lambda: ISAS[ISAS.index(request.param) :])
    return request.param


def bfloat16(rng, *shape, scale=1.0):
    """Bit patterns, and what they stand for."""
    bits = weights.to_bfloat16(normal(rng, *shape, scale=scale))
    return bits, weights.from_bfloat16(bits)


def assert_rounds(result, exact, error):
    """result is what `exact` is, within `error`, rounded to bfloat16."""
    assert result.dtype == np.uint16
    assert result.shape == exact.shape
    rounding = np.abs(exact) * 2.0**-8 + 1e-30  # half of the last of 8 bits
    difference = np.abs(weights.from_bfloat16(result) - exact)
    assert (difference <= rounding + 1.01 * error).all(), (difference - rounding).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_between_bfloat16_activations(pairs, rng, shape):
    n, k, m = shape
    weight = normal(rng, m, k, scale=k**-0.5)
    packed = cpu.pack(weight, "bfloat16", "bfloat16")
    assert (packed.isa, packed.result) == (pairs, "bf16")
    bits, x = bfloat16(rng, n, k)
    bias, (r_bits, residual) = normal(rng, m), bfloat16(rng, n, m)
    wide = weights.round_to(weight, "bfloat16").astype(float)
    error = 1e-6 + np.finfo(np.float32).eps * k**0.5 * (np.abs(x) @ np.abs(wide).T + 8).max()
    for activation in (None, "quick_gelu", "gelu", "relu"):
        exact = reference.linear(x.astype(float), wide, bias, activation, residual)
        for values in (bits, x):
            y = cpu.linear(values, packed, bias, activation, r_bits)
            assert_rounds(y, exact, error)
        to_float = cpu.pack(weight, "bfloat16")
        y = cpu.linear(bits, to_float, bias, activation, residual)
        assert y.dtype == np.float32
        assert np.abs(y - exact).max() <= error
    assert_rounds(cpu.linear(bits, packed), x.astype(float) @ wide.T, error)


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv2d_and_avg_pool2d_between_bfloat16_activations(pairs, rng, shape):
    b, h, w, c, o, k, stride = shape
    weight = normal(rng, o, k, k, c, scale=(k * k * c) ** -0.5)
    packed, bias = cpu.pack(weight, "bfloat16", "bfloat16"), normal(rng, o)
    bits, x = bfloat16(rng, b, h, w, c)
    r_bits, residual = bfloat16(rng, b, (h - 1) // stride + 1, (w - 1) // stride + 1, o)
    wide = weights.round_to(weight, "bfloat16").astype(float)
    exact = reference.conv2d(x.astype(float), wide, bias, stride, "relu", residual)
    y = cpu.conv2d(bits, packed, bias, stride, "relu", r_bits)
    assert_rounds(y, exact, 1e-6 + (k * k * c) ** 0.5 * 1e-6)
    pool = min(2, h)
    cells, narrow = (v[:, : h // pool * pool, : w // pool * pool] for v in (bits, x))
    exact = reference.avg_pool2d(narrow.astype(float), pool)
    assert_rounds(cpu.avg_pool2d(cells, pool), exact, 1e-6)


def attention_error(qkv, heads):
    """How far rounding the weights of the keys, and the error of scores, may move attention."""
    return 2.0**-8 * np.abs(qkv[:, -qkv.shape[1] // 3 :]).max() + 1e-6 * magnitude(qkv, heads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_width", [1, 16, 33, 64, 80, 88, 104, 128])
@pytest.mark.parametrize("length", [*LENGTHS, 1024])
def test_attention_of_bfloat16(pairs, rng, length, head_width, causal):
    seqs = sequences(rng, length)
    bits, qkv = bfloat16(rng, seqs[-1], 3 * 2 * head_width)
    o = cpu.attention(bits, seqs, 2, causal)
    exact = reference.attention(qkv.astype(float), seqs, 2, causal)
    assert_rounds(o, exact, attention_error(qkv, 2))
    assert np.abs(weights.from_bfloat16(o) - exact).mean() <= 2.0**-8 * np.abs(exact).mean() + 1e-6


@pytest.mark.parametrize("head_width", [1, 33, 64, 80, 104])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_pool_of_bfloat16(pairs, rng, length, head_width):
    seqs = sequences(rng, length)
    (q_bits, q), (bits, kv) = (
        bfloat16(rng, n, parts * 3 * head_width) for n, parts in ((7, 1), (seqs[-1], 2))
    )
    exact = reference.attention_pool(q.astype(float), kv.astype(float), seqs, 3)
    assert_rounds(cpu.attention_pool(q_bits, bits, seqs, 3), exact, 1e-6 * np.abs(kv).max() * 20)


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 97, 512, 768, 1280])
def test_layer_norm_to_bfloat16(pairs, rng, rows, width):
    x, (bits, h) = normal(rng, rows, width, scale=5) + np.float32(3), bfloat16(rng, rows, width)
    weight, bias = normal(rng, width), normal(rng, width)
    gain = cpu.pack(weight, "bfloat16", "bfloat16")
    assert_rounds(
        cpu.layer_norm(x, gain, bias), reference.layer_norm(x.astype(float), weight, bias), 1e-5
    )
    total, y = cpu.add_layer_norm(x, bits, gain, bias)
    np.testing.assert_array_equal(total, x + h)
    assert_rounds(y, reference.layer_norm((x + h).astype(float), weight, bias), 1e-5)


def test_embed_patches_of_bfloat16(pairs, rng):
    bits, patches = bfloat16(rng, 2 * 6, 770)
    position, vectors = normal(rng, 7, 770), [normal(rng, 770) for _ in range(3)]
    expected = cpu.embed_patches(patches, vectors[0], position, *vectors[1:])
    actual = cpu.embed_patches(bits, vectors[0], position, *vectors[1:])
    np.testing.assert_array_equal(actual, expected)


def test_what_no_kernel_takes_of_bfloat16_is_widened(pairs, rng):
    bits, qkv = bfloat16(rng, cpu.MAX_KEYS + 1, 6)
    seqs = np.array([0, len(bits)], np.int32)
    expected = reference.attention(qkv, seqs, 1)
    np.testing.assert_array_equal(cpu.attention(bits, seqs, 1), expected)
    deep = normal(rng, 2, cpu.MAX_DEPTH + 1)
    weight = cpu.pack(deep, "bfloat16", "bfloat16")
    bits, x = bfloat16(rng, 3, cpu.MAX_DEPTH + 1)
    np.testing.assert_array_equal(cpu.linear(bits, weight), reference.linear(x, weight))


def test_arrays_of_any_layout(isa, rng):
    x, weight = normal(rng, 40, 5).T[::2], normal(rng, 6, 40)
    packed = cpu.pack(weight, "float32")
    expected = cpu.linear(np.ascontiguousarray(x), packed)
    np.testing.assert_array_equal(cpu.linear(x, packed), expected)
    transposed = cpu.pack(np.asfortranarray(weight), "float32")
    np.testing.assert_array_equal(cpu.linear(x, transposed), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_number_of_threads(isa, rng, dtype):
    x, weight = normal(rng, 256 * 3, 770), normal(rng, 97, 770)
    packed, bias = cpu.pack(weight, dtype), normal(rng, 97)
    chosen = threads.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            threads.set_num_threads(count)
            results += [cpu.linear(x[:n], packed, bias, "gelu")[:3] for n in (3, 21, 50, 768)]
            results.append(
                np.concatenate([cpu.linear(r[None], packed, bias, "gelu") for r in x[:3]])
            )
    finally:
        threads.set_num_threads(chosen)
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_what_no_kernel_takes_goes_to_the_reference(rng):
    x = rng.standard_normal((5, 8))
    np.testing.assert_array_equal(
        cpu.layer_norm(x, x[0], x[1]), reference.layer_norm(x, x[0], x[1])
    )
    long = normal(rng, cpu.MAX_KEYS + 1, 6)
    seqs = np.array([0, len(long)], np.int32)
    np.testing.assert_array_equal(cpu.attention(long, seqs, 1), reference.attention(long, seqs, 1))
    deep = normal(rng, 2, cpu.MAX_DEPTH + 1)
    assert isinstance(cpu.pack(deep, "float32"), np.ndarray)


def test_the_backends_have_the_same_functions_with_the_same_signatures():
    ops_functions = [n for n, _ in inspect.getmembers(ops, inspect.isfunction)]
    shared = [n for n in ops_functions if hasattr(reference, n)]
    assert len(shared) >= 12
    for name in shared:
        of_cpu, of_reference = (inspect.signature(getattr(m, name)) for m in (cpu, reference))
        assert of_cpu.parameters.keys() == of_reference.parameters.keys(), name
