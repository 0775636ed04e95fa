"""linear.cu and linear_hopper.cu against kernels/reference.py in float64.

One rule: a kernel errs by one rounding of its result and by what sums in float32 err, which is
bounded by 2^-20 of the sum of the magnitudes. Results are poisoned with NaNs before, also behind
their end, where they must stay; between the rows of x and weight are NaNs that must not be read.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from cuda import gate, ptx, shim

from npclip import cuda_linear, nvrtc
from npclip.cuda_linear import Variant
from npclip.kernels import reference
from npclip.weights import from_bfloat16, to_bfloat16

DTYPES = ["f16", "bf16", "f32"]
NUMPY = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}
MANTISSA = {"f16": 10, "bf16": 7, "f32": 23}
LOWEST = {"f16": -14, "bf16": -126, "f32": -126}  # exponent of a normal number
ACTIVATIONS = [None, "quick_gelu", "gelu", "relu"]
GUARD = 64  # values behind a result

VARIANTS = [(d, v) for d in DTYPES for v in cuda_linear.variants(d) if not v.arch]
HOPPER = [(d, v) for d in ("f16", "bf16") for v in cuda_linear.variants(d) if v.arch]
SMALL = {d: cuda_linear.default_variant(d, 64, 64, (8, 0)) for d in DTYPES}


def named(cases):
    return [pytest.param(*case, id="-".join(map(str, case))) for case in cases]


@pytest.fixture
def rng():
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


def narrow(x, dtype):
    """As a kernel stores it, at a multiple of 16 bytes."""
    x = to_bfloat16(x.astype(np.float32)) if dtype == "bf16" else x.astype(NUMPY[dtype])
    memory = np.empty(x.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    array = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    array[...] = x
    return array


def widen(x):
    return (from_bfloat16(x) if x.dtype == np.uint16 else x).astype(np.float64)


def half_ulp(x, dtype):
    exponent = np.frexp(np.abs(x) + np.finfo(np.float64).tiny)[1] - 1.0
    return np.exp2(np.maximum(exponent, LOWEST[dtype]) - MANTISSA[dtype] - 1)


def matrix(rng, rows, columns, apart, scale, dtype):
    """Rows of normal values, with NaNs between them: the values, and all memory."""
    x = np.full((rows, columns + apart), np.nan)
    x[:, :columns] = rng.standard_normal((rows, columns)) * scale
    whole = narrow(x, dtype)
    return whole[:, :columns], whole


class Case:
    """One linear: its launch, and what it must give."""

    def __init__(
        self,
        rng,
        dtype: str,
        variant: Variant | None,
        shape: tuple[int, int, int],
        activation: str | None = None,
        bias: bool = True,
        residual: bool = False,
        residual_first: bool = False,
        result: str | None = None,
        apart: tuple[int, int] = (8, 16),
    ):
        (n, m, k), result = shape, result or dtype
        x, self.x = matrix(rng, n, k, apart[0], 1, dtype)
        w, self.w = matrix(rng, m, k, apart[1], k**-0.5, dtype)
        b = narrow(rng.standard_normal(m), "f32") if bias else None
        r = narrow(rng.standard_normal((n, m)), result) if residual else None
        self.memory = narrow(np.full(n * m + GUARD, np.nan), result)
        self.y, self.result = self.memory[: n * m].reshape(n, m), result
        arguments = x, w, b, activation, r, self.y, variant, residual_first
        self.launch = cuda_linear.linear(*arguments)

        x, w, b, r = (None if a is None else widen(a) for a in (x, w, b, r))
        if residual_first:
            self.expected = reference.linear(x, w, b, None, r)
            if activation:
                self.expected = reference.ACTIVATIONS[activation](self.expected)
        else:
            self.expected = reference.linear(x, w, b, activation, r)
        self.magnitude = np.abs(x) @ np.abs(w).T + sum(np.abs(a) for a in (b, r) if a is not None)

    def check(self):
        assert np.isnan(widen(self.memory[self.y.size :])).all(), "written behind the end"
        error = np.abs(widen(self.y) - self.expected)
        sums = 2.0**-20 * self.magnitude
        bound = sums + half_ulp(np.abs(self.expected) + sums, self.result)
        worst = np.nanargmax(np.where(np.isnan(error), np.inf, error / bound))
        where = np.unravel_index(worst, error.shape)
        assert error[where] <= bound[where], (
            f"y{where} is {widen(self.y)[where]}, not {self.expected[where]}: "
            f"error {error[where]:.3g}, at most {bound[where]:.3g} is right"
        )

    def on_shim(self, order=0):
        statistics = shim.run(self.launch, order)
        assert statistics.bank_conflicts == 0
        self.check()

    def on_ptx(self, arch):
        launch = self.launch
        if not launch.stays:
            launch = launch._replace(arguments=(self.x, self.w, *launch.arguments[2:]))
        statistics = ptx.run(launch, arch)
        assert statistics.races == 0, statistics.race_at
        assert statistics.uninitialised == 0
        assert statistics.bank_conflicts == 0
        self.check()
        return statistics


# ---- the source, compiled for the CPU ----


@pytest.mark.parametrize(("dtype", "variant"), named(VARIANTS))
def test_variants(rng, dtype, variant):
    """Rows and columns that end in, at and behind a tile, K within a slot, one slot and many."""
    activation = ACTIVATIONS[VARIANTS.index((dtype, variant)) % 4]
    for order, shape in enumerate([(1, 8, 8), (33, 97, 24), (129, 130, 200), (16, 256, 592)]):
        Case(rng, dtype, variant, shape, activation, residual=True).on_shim(order)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(rng, dtype):
    """All tails of the smallest square tile, from an order of threads to another."""
    order = 0
    for n in (1, 7, 16, 33, 50, 129):
        for m in (8, 40, 97, 130, 256):
            k = (8, 24, 64, 96, 200)[order % 5]
            Case(rng, dtype, SMALL[dtype], (n, m, k), residual=order % 2 == 1).on_shim(order)
            order += 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(rng, activation):
    """M of whole pieces of 16 bytes and not; results of both kinds, in turn."""
    small, turn = SMALL["f16"], ACTIVATIONS.index(activation)
    for bias in (True, False):
        for residual, first in ((False, False), (True, False), (True, True)):
            result = ("f16", "f32")[(turn + first) % 2]
            for m in (40, 35):
                shape = 7, m, 24
                case = Case(rng, "f16", small, shape, activation, bias, residual, first, result)
                case.on_shim()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(rng, dtype):
    for apart in ((0, 0), (8, 0), (0, 24), (1000, 8)):
        Case(rng, dtype, SMALL[dtype], (20, 24, 96), apart=apart).on_shim()


def test_default_variant(rng):
    """What runs where none is named runs everywhere."""
    for n in (1, 17, 64, 300):
        case = Case(rng, "f16", None, (n, 48, 64), "quick_gelu")
        case.on_shim()
        assert case.launch.shared <= 64 << 10
    assert cuda_linear.default_variant("f16", 50 * 256, 3072, (8, 0)).tile_m == 128
    assert cuda_linear.default_variant("bf16", 1, 768, (9, 0)).tile_n == 16


def test_result_may_replace_residual(rng):
    case = Case(rng, "f16", SMALL["f16"], (70, 72, 64), "relu", residual=True)
    case.y[...] = case.launch.arguments[3]
    arguments = list(case.launch.arguments)
    arguments[3] = case.y
    case.launch = case.launch._replace(arguments=tuple(arguments))
    case.on_shim()


def test_extreme_values(rng):
    """QuickGELU where its exponential overflows, and NaN and infinity on their way."""
    x = np.zeros((1, 8), np.float16)
    x[0, 0] = 1
    w = np.zeros((8, 8), np.float16)
    w[:5, 0] = -60000, 60000, np.inf, np.nan, -200
    y = np.empty((1, 8), np.float16)
    for activation in ("quick_gelu", "gelu", "relu"):
        shim.run(cuda_linear.linear(x, w, None, activation, None, y, SMALL["f16"]))
        np.testing.assert_array_equal(y[0], [0, 60000, np.inf, np.nan, 0, 0, 0, 0])


@pytest.mark.parametrize("sanitizer", shim.SANITIZERS)
def test_sanitized(rng, sanitizer):
    low = cuda_linear.variants("f16")[0]
    for dtype, variant in (("f16", SMALL["f16"]), ("f16", low), ("f32", SMALL["f32"])):
        case = Case(rng, dtype, variant, (17, 35, 136), residual=True, apart=(0, 0))
        shim.run_sanitized([case.launch], sanitizer)
        case.check()


# ---- the PTX that NVRTC makes of it ----


def keeps_wide_stores():
    """NVRTC 13 writes a store of two floats, in the epilogue, as two, which conflict in PTX."""
    return nvrtc.cuda_version(nvrtc.libraries()[0])[0] < 13


def archs_of(dtype, variant):
    archs = [a for a in gate.ARCHS if (int(a[:-1]), int(a[-1])) >= variant.capability]
    return [a for a in archs if dtype != "bf16" or a != "75"]


@pytest.mark.parametrize(("dtype", "variant"), named(VARIANTS))
def test_ptx(rng, dtype, variant):
    index = VARIANTS.index((dtype, variant))
    archs = [a for a in archs_of(dtype, variant) if a in ("75", "80", "90")]
    shape = variant.tile_n // 2 + 3, min(variant.tile_m, 64) + 10, 2 * variant.tile_k + 24
    arch = archs[index % len(archs)]
    case = Case(rng, dtype, variant, shape, ACTIVATIONS[index % 4], residual=index % 2 == 0)
    statistics = case.on_ptx(arch)
    if variant.warps[2] == 1 and keeps_wide_stores():
        assert statistics.other_conflicts == 0


@pytest.mark.parametrize(
    ("dtype", "arch", "result"),
    [("f16", "75", "f16"), ("f16", "90", "f32"), ("bf16", "80", "f32"), ("f32", "75", "f32")],
)
def test_ptx_epilogues(rng, dtype, arch, result):
    variant = cuda_linear.variants("f16")[1] if dtype == "f16" else SMALL[dtype]
    for m, first in ((40, True), (35, False)):
        case = Case(rng, dtype, variant, (9, m, 72), "quick_gelu", True, True, first, result=result)
        case.on_ptx(arch)


@pytest.mark.parametrize(("dtype", "variant"), named(HOPPER))
def test_ptx_hopper(rng, dtype, variant):
    """One cluster takes all tiles: some K, more K than slots; rows and columns that end in one."""
    index = HOPPER.index((dtype, variant))
    result = "f32" if index % 2 else dtype
    along_n, along_m = variant.cluster
    for k, tiles in ((72, 3), (64 * variant.stages + 72, 2)):
        shape = tiles * variant.tile_n * along_n - 100, variant.tile_m * along_m - 24, k
        case = Case(rng, dtype, variant, shape, "quick_gelu", True, True, result=result)
        case.launch = case.launch._replace(grid=(along_n * along_m, 1, 1))
        case.on_ptx("90a")


@pytest.mark.parametrize("cluster", [(1, 1), (1, 2), (2, 2), (4, 1)], ids=str)
def test_ptx_clusters(rng, cluster):
    """Of all forms, also those that no variant has; two of them, and edges that only some touch."""
    variant = replace(HOPPER[0][1], cluster=cluster)
    case = Case(rng, "f16", variant, (700, 300, 136), None, residual=True, apart=(8, 8))
    case.launch = case.launch._replace(grid=(2 * cluster[0] * cluster[1], 1, 1))
    case.on_ptx("90a")


@pytest.mark.parametrize("m", [35, 40])
def test_ptx_hopper_epilogues(rng, m):
    for activation, first in (("gelu", True), ("relu", False), (None, False)):
        for result in ("f16", "f32"):
            shape = 9, m, 72
            bias = activation is not None
            case = Case(rng, "f16", HOPPER[0][1], shape, activation, bias, first, first, result)
            case.on_ptx("90a")


PLANTED = {  # in linear_hopper.cu: what is written instead, and what is found
    "barrier_arrive_expecting(&full[slot.at], 128 * (TILE_N + TILE_M));": (
        "barrier_arrive(&full[slot.at], rank);", "wait for ever"
    ),
    "barrier_wait(&empty[slot.at], slot.parity ^ 1);": ("", "more arrivals than"),
    "barrier_wait(&full[slot.at], slot.parity);": ("", "more arrivals than"),
    "&full[slot.at], same_columns);": ("&full[slot.at], 0);", "wait for ever"),
    "&empty[slot.at], slot.parity ^ 1);": ("&empty[slot.at], slot.parity);", "wait for ever"),
    "bool shares = ": ("bool shares = lane == rank; if (0) shares = ", "wait for ever"),
    "if (shares) barrier_arrive(&empty[last], lane);\n                }": ("}", "wait for ever"),
    "wgmma_wait<1>();": ("", "races"),
    "sync_cluster();\n    wait": ("__syncthreads();\n    wait", "no mbarrier was initialised"),
    "sync_cluster();  // nobody": ("// nobody", "a block that has ended"),
    "wgmma_wait<0>();": ("", "never waited for"),
    "            slot.skip(slots);": ("", "wait for ever"),
}  # fmt: skip


@pytest.mark.parametrize("right", PLANTED)
def test_planted_bugs(rng, right):
    wrong, found = PLANTED[right]
    variant = replace(HOPPER[0][1], stages=3)
    case = Case(rng, "f16", variant, (1000, 40, 64 * 5), "relu")
    source = case.launch.kernel.source
    assert right in source
    kernel = SimpleNamespace(
        source=source.replace(right, wrong, 1), symbol=case.launch.kernel.symbol
    )
    case.launch = case.launch._replace(kernel=kernel, grid=(2, 1, 1))
    with pytest.raises((AssertionError, ptx.KernelError)) as error:
        case.on_ptx("90a")
    assert found in str(error.value)


# ---- machine code ----

EPILOGUES = [
    (activation, first, wide)  # wide: the result is float32
    for activation in ACTIVATIONS
    for first in (False, True)
    for wide in (False, True)
    if activation or not first
]
HEAVY = ("quick_gelu", False, False), ("gelu", True, False)  # registers ran out; bf16: the latter


@gate.each_cuda
@pytest.mark.parametrize(("dtype", "variant"), named(VARIANTS + HOPPER))
def test_compiles(dtype, variant, cuda):
    """All architectures with a heavy epilogue, one for each compiler with the other.

    bfloat16, which is float16's code, on some. With NPCLIP_TEST_EVERYTHING all epilogues on all.
    """
    values = np.empty((1, 8), NUMPY[dtype])
    archs = [variant.arch] if variant.arch else archs_of(dtype, variant)
    if dtype == "bf16" and not variant.arch and not gate.EVERYTHING:
        archs = [arch for arch in archs if arch in ("80", "100", "120")]
    whole = EPILOGUES if gate.EVERYTHING else [HEAVY[dtype == "bf16"]]
    for epilogue in dict.fromkeys((*whole, *HEAVY)):
        activation, first, wide = epilogue
        y = np.empty((1, 1), np.float32 if wide else NUMPY[dtype])
        launch = cuda_linear.linear(values, values, None, activation, y, y, variant, first)
        one = archs[:1] if cuda == 12 else archs[-2:-1] or archs
        gate.assert_compiles(launch.kernel, cuda, archs if epilogue in whole else one)


def test_fits_shared_memory():
    """Of each architecture, by CUDA's table: 64 KB on sm_75, 99 KB on sm_86, 89 and 120."""
    for dtype, variant in VARIANTS + HOPPER:
        values = np.empty((1, 8), NUMPY[dtype])
        launch = cuda_linear.linear(values, values, None, None, None, values[:, :1], variant)
        limit = 227 if variant.arch else 64 if variant.capability < (8, 0) else 99
        assert launch.shared <= limit << 10, (dtype, variant)
