"""The kernels of layer_norm.cu, rows.cu and patchify.cu against kernels/reference.py in float64.

One rule: a kernel errs by at most one rounding of its dtype, twice what the reference errs in
float32, and two roundings of float32 of the largest value (two ways to order a few roundings differ
by that). Results are poisoned with NaNs before, also behind their end, where they must stay.

Every width runs as NVRTC compiled it; a few also as g++ did (shim), which takes seconds a kernel.
"""

from functools import partial

import numpy as np
import pytest
from cuda import gate, ptx, shim

from npclip import cuda_rows
from npclip.cuda_launch import Kernel, Launch
from npclip.kernels import reference
from npclip.weights import from_bfloat16, to_bfloat16

KINDS = ["f16", "bf16", "f32"]
NUMPY = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}
MANTISSA = {"f16": 10, "bf16": 7, "f32": 23}
LOWEST = {"f16": -14, "bf16": -126, "f32": -126}  # exponent of a normal number
WIDTHS = [1, 7, 8, 33, 512, 768, 1024, 1280, 1664, 2048, 2056]
GUARD = 64  # values behind a result
EPS = 1e-5


@pytest.fixture
def rng():
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


def on_shim(launch: Launch) -> None:
    shim.run(launch)


def on_shim_backwards(launch: Launch) -> None:
    shim.run(launch, order=1)


def on_ptx(launch: Launch, arch: str = "80") -> None:
    statistics = ptx.run(launch, arch)
    assert statistics.races == 0, statistics.race_at
    assert statistics.uninitialised == 0
    assert statistics.bank_conflicts == statistics.other_conflicts == 0


def narrow(x, kind):
    """As a kernel of that kind stores it."""
    if kind == "bf16":
        return to_bfloat16(np.asarray(x, np.float32))
    return np.ascontiguousarray(x, NUMPY[kind])


def widen(x, dtype=np.float64):
    return (from_bfloat16(x) if x.dtype == np.uint16 else x).astype(dtype)


def normal(rng, *shape, scale=1.0, offset=0.0):
    return (rng.standard_normal(shape) * scale + offset).astype(np.float32)


class Result:
    """A poisoned array with a guard behind it."""

    def __init__(self, kind, *shape):
        self.size = int(np.prod(shape))
        self.memory = np.full(self.size + GUARD, np.nan, np.float32)
        self.memory = narrow(self.memory, kind)
        self.array = self.memory[: self.size].reshape(shape)

    def check(self):
        assert np.isnan(widen(self.memory[self.size :])).all(), "written behind the end"
        return self.array


def half_ulp(x, kind):
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0 ** LOWEST[kind])))
    return 2.0 ** (exponent - MANTISSA[kind] - 1)


def assert_close(kernel, wanted, baseline, kind):
    """The rule. wanted is the reference in float64, baseline in float32."""
    assert kernel.shape == wanted.shape
    kernel = widen(kernel)
    assert np.isfinite(kernel).all()
    slack = 2 * np.abs(baseline - wanted).max()
    slack += 2 * np.finfo(np.float32).eps * np.abs(wanted).max()
    bound = half_ulp(np.abs(wanted) + slack, kind) + slack
    error = np.abs(kernel - wanted)
    worst = np.unravel_index((error - bound).argmax(), error.shape)
    assert error[worst] <= bound[worst], (
        f"worst at {worst}: {kernel[worst]!r}, expected {wanted[worst]!r}, "
        f"error {error[worst]:.3g}, bound {bound[worst]:.3g}"
    )


def check_against(op, kernel, kind, *arrays, **options):
    function = getattr(reference, op)
    wanted = function(*(widen(a) for a in arrays), **options)
    baseline = function(*(widen(a, np.float32) for a in arrays), **options)
    assert_close(kernel, wanted, baseline, kind)


def check_layer_norm(run, rng, kind, n, d, offset):
    x = narrow(normal(rng, n, d, offset=offset), kind)
    weight, bias = normal(rng, d), normal(rng, d)
    y = Result(kind, n, d)
    run(cuda_rows.layer_norm(x, weight, bias, y.array, EPS))
    check_against("layer_norm", y.check(), kind, x, weight, bias, eps=EPS)


def check_add_layer_norm(run, rng, kind, n, d, offset):
    x, h = narrow(normal(rng, n, d, offset=offset), kind), narrow(normal(rng, n, d), kind)
    weight, bias = normal(rng, d), normal(rng, d)
    total, y = Result(kind, n, d), Result(kind, n, d)
    run(cuda_rows.add_layer_norm(x, h, weight, bias, total.array, y.array, EPS))
    exact = narrow(widen(x, np.float32) + widen(h, np.float32), kind)
    np.testing.assert_array_equal(total.check(), exact)
    check_against("layer_norm", y.check(), kind, exact, weight, bias, eps=EPS)


def check_embed_patches(run, rng, kind, batch, tokens, d):
    patches = narrow(normal(rng, batch * (tokens - 1), d), kind)
    vectors = [normal(rng, *shape) for shape in ((d,), (tokens, d), (d,), (d,))]
    x = Result(kind, batch * tokens, d)
    run(cuda_rows.embed_patches(patches, *vectors, x.array, EPS))
    check_against("embed_patches", x.check(), kind, patches, *vectors, eps=EPS)


def check_layer_norms(run, rng, kind, d):
    for n in (1, 7, 50):
        check_layer_norm(run, rng, kind, n, d, 0)
    check_layer_norm(run, rng, kind, 7, d, 1000)
    check_add_layer_norm(run, rng, kind, 7, d, 0)
    check_add_layer_norm(run, rng, kind, 1, d, 1000)
    check_embed_patches(run, rng, kind, 2, 5, d)
    check_embed_patches(run, rng, kind, 1, 2, d)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_norms(rng, kind, d):
    check_layer_norms(on_ptx, rng, kind, d)


@pytest.mark.parametrize("arch", ["75", "90"])
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_layer_norms_on_other_architectures(rng, kind, arch):
    run = partial(on_ptx, arch=arch)
    for d, offset in ((768, 1000), (33, 0)):
        check_layer_norm(run, rng, kind, 7, d, offset)
        check_add_layer_norm(run, rng, kind, 7, d, offset)
        check_embed_patches(run, rng, kind, 2, 5, d)


@pytest.mark.parametrize("kind, d", [("f16", 768), ("f16", 7), ("bf16", 512), ("f32", 2056)])
def test_layer_norms_on_shim(rng, kind, d):
    check_layer_norms(on_shim, rng, kind, d)
    check_layer_norm(on_shim_backwards, rng, kind, 7, d, 1000)


@pytest.mark.parametrize("d", [768, 2056, 7])
def test_layer_norm_in_place(rng, d):
    x, h = narrow(normal(rng, 7, d), "f16"), narrow(normal(rng, 7, d), "f16")
    weight, bias = normal(rng, d), normal(rng, d)
    apart = np.empty_like(x), np.empty_like(x)
    on_ptx(cuda_rows.add_layer_norm(x, h, weight, bias, *apart, EPS))
    on_ptx(cuda_rows.add_layer_norm(x, h, weight, bias, x, h, EPS))
    np.testing.assert_array_equal(x, apart[0])
    np.testing.assert_array_equal(h, apart[1])
    on_ptx(cuda_rows.layer_norm(x, weight, bias, x, EPS))
    np.testing.assert_array_equal(x, h)


@pytest.mark.parametrize("d", [7, 768, 2056])
def test_layer_norm_of_equal_values(rng, d):
    """The variance is 0, and never less by a rounding; nor is the mean's rounding magnified."""
    for offset in (1000.0, -0.37, 0.0):
        x, y = np.full((3, d), offset, np.float16), Result("f16", 3, d)
        weight, bias = normal(rng, d), normal(rng, d)
        on_ptx(cuda_rows.layer_norm(x, weight, bias, y.array, EPS))
        np.testing.assert_allclose(y.check(), np.tile(bias, (3, 1)), atol=2e-3, rtol=1e-3)


def check_embed_tokens(run, rng, kind, n, d):
    tokens, positions = narrow(normal(rng, 30, d), kind), normal(rng, 9, d)
    ids = rng.integers(30, size=n, dtype=np.int32)
    at = rng.integers(9, size=n, dtype=np.int32)
    x = Result(kind, n, d)
    run(cuda_rows.embed_tokens(ids, at, tokens, positions, x.array))
    exact = widen(tokens, np.float32)[ids] + positions[at]
    np.testing.assert_array_equal(x.check(), narrow(exact, kind))


def check_take(run, rng, kind, n, d):
    x = narrow(normal(rng, 30, d), kind)
    rows, y = rng.integers(30, size=n, dtype=np.int32), Result(kind, n, d)
    run(cuda_rows.take(x, rows, y.array))
    np.testing.assert_array_equal(y.check(), x[rows])


def check_l2_normalize(run, rng, n, d):
    x, y = normal(rng, n, d, scale=10), Result("f32", n, d)
    run(cuda_rows.l2_normalize(x, y.array))
    check_against("l2_normalize", y.check(), "f32", x)


def check_rows(run, rng, kind, n, d):
    check_embed_tokens(run, rng, kind, n, d)
    check_take(run, rng, kind, n, d)
    if kind == "f32":
        check_l2_normalize(run, rng, n, d)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows(rng, kind, d):
    for n in (1, 7, 50):
        check_rows(on_ptx, rng, kind, n, d)


def check_activate(run, rng, kind, activation, shape):
    x = Result(kind, *shape)
    before = narrow(normal(rng, *shape, scale=4), kind)
    x.array[...] = before
    run(cuda_rows.activate(x.array, activation))
    check_against(activation, x.check(), kind, before)


def check_limits(run, kind, activation):
    largest = {"f16": 65504, "bf16": 3e38, "f32": 3e38}[kind]
    x = narrow(np.array([largest, 100, 20, 0, -20, -100, -largest]), kind)
    wanted = reference.ACTIVATIONS[activation](widen(x))
    run(cuda_rows.activate(x, activation))
    np.testing.assert_allclose(widen(x), wanted, rtol=2.0 ** -MANTISSA[kind], atol=1e-6)


@pytest.mark.parametrize("activation", cuda_rows.ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activate(rng, kind, activation):
    for shape in ((1,), (7,), (50, 33), (3, 5, 1024), (16, 2048 // 8)):
        check_activate(on_ptx, rng, kind, activation, shape)
    check_limits(on_ptx, kind, activation)


def check_patchify(run, rng, kind, patch, shape, more=0):
    images = narrow(normal(rng, *shape), kind)
    wanted = reference.patchify(images, patch)
    n, k = wanted.shape
    chunk = 16 // images.itemsize
    rows = Result(kind, n, -(-k // chunk) * chunk + more * chunk)
    run(cuda_rows.patchify(images, patch, rows.array))
    np.testing.assert_array_equal(rows.check()[:, :k], wanted)
    assert not rows.array[:, k:].any()


def check_patchify_u8(run, rng, kind, patch, batch, height, width):
    images = rng.integers(256, size=(batch, height, width, 3), dtype=np.uint8)
    table = normal(rng, 3, 256)
    n, k = batch * (height // patch) * (width // patch), 3 * patch * patch
    rows = Result(kind, n, -(-k // 8) * 8)
    run(cuda_rows.patchify_u8(images, patch, table, rows.array))
    pixels = np.stack([table[c][images[..., c]] for c in range(3)], axis=1)
    wanted = reference.patchify(narrow(pixels, kind), patch)
    np.testing.assert_array_equal(rows.check()[:, :k], wanted)
    assert not rows.array[:, k:].any()


PATCHES = [
    (14, 2, 3, 28, 42), (16, 1, 3, 32, 48), (32, 1, 3, 64, 32), (12, 1, 2, 24, 12),
    (1, 2, 3, 15, 17), (1, 1, 20, 5, 8), (2, 3, 5, 4, 6), (1, 1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", PATCHES, ids=str)
def test_patchify(rng, kind, shape):
    patch, batch, _, height, width = shape
    check_patchify(on_ptx, rng, kind, patch, shape[1:])
    check_patchify(on_ptx, rng, kind, patch, shape[1:], more=2)
    check_patchify_u8(on_ptx, rng, kind, patch, batch, height, width)


def check_some(run, rng, kind):
    for d in (512, 33):
        check_rows(run, rng, kind, 7, d)
    for activation in cuda_rows.ACTIVATIONS:
        check_activate(run, rng, kind, activation, (50, 33))
        check_limits(run, kind, activation)
    check_patchify(run, rng, kind, 14, (2, 3, 28, 28))
    check_patchify(run, rng, kind, 1, (2, 3, 15, 17))
    check_patchify_u8(run, rng, kind, 14, 2, 28, 28)


@pytest.mark.parametrize("arch", ["75", "90"])
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_others_on_other_architectures(rng, kind, arch):
    check_some(partial(on_ptx, arch=arch), rng, kind)


def test_others_on_shim(rng):
    check_some(on_shim, rng, "f16")
    check_l2_normalize(on_shim, rng, 7, 33)


SANITIZED = {  # every kernel, rows of whole chunks and not, the last block not full
    "layer_norm": [
        partial(check_layer_norm, kind="f16", n=7, d=512, offset=0),
        partial(check_layer_norm, kind="f32", n=7, d=33, offset=0),
    ],
    "add_layer_norm": [partial(check_add_layer_norm, kind="f16", n=7, d=512, offset=0)],
    "embed_patches": [partial(check_embed_patches, kind="f16", batch=2, tokens=5, d=512)],
    "embed_tokens": [partial(check_embed_tokens, kind="f16", n=7, d=d) for d in (512, 33)],
    "take": [partial(check_take, kind="f16", n=7, d=d) for d in (512, 33)],
    "l2_normalize": [partial(check_l2_normalize, n=7, d=512)],
    "activate": [partial(check_activate, kind="f16", activation="quick_gelu", shape=(50, 33))],
    "patchify": [
        partial(check_patchify, kind="f16", patch=14, shape=(2, 3, 28, 28)),
        partial(check_patchify, kind="f16", patch=16, shape=(1, 3, 32, 48), more=2),
    ],
    "patchify_u8": [partial(check_patchify_u8, kind="f16", patch=14, batch=2, height=28, width=28)],
}


@pytest.mark.parametrize("sanitizer", shim.SANITIZERS)
@pytest.mark.parametrize("op", SANITIZED)
def test_sanitized(rng, op, sanitizer):
    for check in SANITIZED[op]:
        check(partial(shim.run, sanitizer=sanitizer), rng)


# What makes a kernel read or write outside an array, and what makes two threads write one value.
NO_LAST_ROW = ("row >= n", "row > n")
HALF_A_WARP = ("threadIdx.x % 32", "threadIdx.x % 16")
OUTSIDE = {
    "layer_norm": ("min(first_row() + r, n - 1)", "first_row() + r"),
    "add_layer_norm": ("h + at, total + at}", "h + at + STEP, total + at}"),
    "embed_patches": ("row - image - 1", "row - image"),
    "embed_tokens": NO_LAST_ROW,
    "take": NO_LAST_ROW,
    "l2_normalize": NO_LAST_ROW,
    "activate": ("i + CHUNK <= count", "i < count"),
    "patchify": ("p.row < rows", "p.row <= rows"),
    "patchify_u8": ("p.row / across % down", "p.row / across"),
}
RACES = dict.fromkeys(OUTSIDE, HALF_A_WARP) | {
    "activate": ("+ threadIdx.x)", "+ threadIdx.x / 2)"),
    "patchify": ("THREADS + threadIdx.x", "THREADS + threadIdx.x / 2"),
    "patchify_u8": ("THREADS + threadIdx.x", "THREADS + threadIdx.x / 2"),
}


@pytest.mark.parametrize("op", SANITIZED)
@pytest.mark.parametrize(
    ("sanitizer", "changes", "message"),
    [("address,undefined", OUTSIDE, "heap-buffer-overflow"), ("thread", RACES, "data race")],
    ids=["address", "thread"],
)
def test_a_wrong_kernel_is_found(rng, op, sanitizer, changes, message):
    """So that test_sanitized can fail, for each kernel."""
    before, after = changes[op]

    def run(launch):
        assert before in launch.kernel.source
        wrong = shim.Source(launch.kernel.source.replace(before, after), launch.kernel.symbol)
        shim.run(launch._replace(kernel=wrong), sanitizer=sanitizer)

    with pytest.raises(shim.SanitizerError, match=message):
        SANITIZED[op][0](run, rng)


def test_no_rows():
    """A launch of nothing is a launch nevertheless, and writes nothing."""
    x, ids, vector = (
        np.empty((0, 512), np.float16),
        np.empty(0, np.int32),
        np.empty(512, np.float32),
    )
    on_ptx(cuda_rows.layer_norm(x, vector, vector, x, EPS))
    on_ptx(cuda_rows.take(x, ids, x))
    on_ptx(cuda_rows.activate(x, "relu"))


EXTREMES = gate.ARCHS if gate.EVERYTHING else ("75", "90", "120")


def variant(file, op, kind, **defines):
    return Kernel(file, op, kind, tuple(defines.items()))


@gate.each_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_layer_norms_compile(kind, cuda):
    """Common widths, rows that do not fit in registers, and, for some, the widest that do.

    With NPCLIP_TEST_EVERYTHING all that fit.
    """
    chunk = 4 if kind == "f32" else 8
    widest = cuda_rows.MAX_KEPT_WIDTH // (32 * chunk)
    common = 768 // (32 * chunk)
    some = range(1, widest + 1) if gate.EVERYTHING else (common,)
    for step, kept in (*((chunk, kept) for kept in some), (chunk, 0), (1, 0)):
        gate.assert_compiles(variant("layer_norm", "layer_norm", kind, STEP=step, KEPT=kept), cuda)
    kernel = variant("layer_norm", "layer_norm", kind, STEP=chunk, KEPT=widest)
    gate.assert_compiles(kernel, cuda, EXTREMES)


@gate.each_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_patchify_compile(kind, cuda):
    chunk = 4 if kind == "f32" else 8
    kernels = [variant("rows", "take", kind, STEP=step) for step in (1, chunk)]
    for name, activation in cuda_rows.ACTIVATIONS.items():
        archs = gate.ALL_ARCHS if name == "gelu" else EXTREMES
        gate.assert_compiles(variant("rows", "activate", kind, ACTIVATION=activation), cuda, archs)
    for patch, whole in ((1, 0), (14, 0), (32, 1)):
        kernels.append(variant("patchify", "patchify", kind, PATCH=patch, WHOLE=whole))
    for kernel in kernels:
        gate.assert_compiles(kernel, cuda, gate.ALL_ARCHS)
