"""Tests of the tester: the shim runs right kernels rightly and finds what is wrong with others."""

from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

import numpy as np
import pytest
from cuda import shim

from npclip.cuda_launch import Launch

ORDERS = [0, 1, 2]


@dataclass(frozen=True)
class Source:
    """A kernel written in a test: KERNEL(32) SYMBOL(test)(...) {...}."""

    code: str
    dtype: str = "f16"

    @property
    def symbol(self):
        return f"test_{self.dtype}"

    @cached_property
    def source(self):
        words = (files("npclip.kernels") / "common.cuh").read_text()
        return f"#define DTYPE {self.dtype.upper()}\n{words}\n{self.code}"


def launch(code, *arguments, dtype="f16", grid=1, block=32, shared=0):
    return Launch(Source(code, dtype), (grid, 1, 1), block, shared, arguments)


def half_values(rng, shape, dtype):
    """Random values as they are stored in f16 or bf16, and as float64."""
    x = rng.standard_normal(shape).astype(np.float32)
    if dtype == "f16":
        return (stored := x.astype(np.float16)), stored.astype(np.float64)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- right kernels ----

# c [16, 16] = a [16, 16] b [16, 16]^T. a1, a2: the second and third register of a.
MULTIPLY = """
KERNEL(32) SYMBOL(test)(const value *a, const value *b, float *c) {{
    __shared__ __align__(16) value tile[2][16][24];  // 24: rows 48 bytes apart
    int lane = threadIdx.x;
    for (int i = lane; i < 2 * 16 * 2; i += 32) {{
        const value *from = i < 32 ? a : b;
        store_chunk(&tile[i / 32][i / 2 % 16][i % 2 * 8], load_chunk(from + i % 32 * 8));
    }}
    __syncthreads();
    uint32_t x[4], w[4];
    ldmatrix_x4(x, &tile[0][lane % 16][lane / 16 * 8]);
    ldmatrix_x4(w, &tile[1][lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    for (int n = 0; n < 2; n++) {{
        float d[4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
        uint32_t registers[4] = {{x[0], x[{a1}], x[{a2}], x[3]}};
        mma_16816(d, registers, w[2 * n], w[2 * n + 1]);
        for (int i = 0; i < 4; i++) {{
            int row = lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
            c[row * 16 + column] = d[i];
        }}
    }}
}}
"""


def multiply(rng, dtype, a1=1, a2=2):
    (a, wide_a), (b, wide_b) = (half_values(rng, (16, 16), dtype) for _ in range(2))
    c = np.zeros((16, 16), np.float32)
    return launch(MULTIPLY.format(a1=a1, a2=a2), a, b, c, dtype=dtype), c, wide_a @ wide_b.T


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_mma(rng, dtype):
    product, c, expected = multiply(rng, dtype)
    statistics = shim.run(product)
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-5)
    assert (statistics.mma, statistics.ldmatrix, statistics.bank_conflicts) == (2, 2, 0)


def test_mma_has_the_fragments_of_the_ptx_isa(rng):
    """Registers filled by its formulas ("Matrix Fragments for mma.m16n8k16")."""
    code = """
    KERNEL(32) SYMBOL(test)(const uint4 *a, const uint2 *b, float4 *c) {
        uint4 x = a[threadIdx.x];
        uint2 w = b[threadIdx.x];
        float4 &d = c[threadIdx.x];
        float sums[4] = {d.x, d.y, d.z, d.w};
        uint32_t registers[4] = {x.x, x.y, x.z, x.w};
        mma_16816(sums, registers, w.x, w.y);
        d = make_float4(sums[0], sums[1], sums[2], sums[3]);
    }"""
    group, thread_in_group, i = (
        np.arange(32)[:, None] // 4,
        np.arange(32)[:, None] % 4,
        np.arange(8),
    )
    a_row = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    a_column = np.where(i < 4, thread_in_group * 2 + (i & 1), thread_in_group * 2 + (i & 1) + 8)
    i = np.arange(4)
    b_row = np.where(i < 2, thread_in_group * 2 + (i & 1), thread_in_group * 2 + (i & 1) + 8)
    b_column = np.broadcast_to(group, (32, 4))
    c_row, c_column = np.where(i < 2, group, group + 8), thread_in_group * 2 + (i & 1)

    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in [(16, 16), (16, 8)])
    c = rng.standard_normal((16, 8)).astype(np.float32)
    registers_a, registers_b = a[a_row, a_column], b[b_row, b_column]
    sums = c[c_row, c_column]
    shim.run(launch(code, registers_a.view(np.uint32), registers_b.view(np.uint32), sums))
    expected = a.astype(float) @ b.astype(float) + c
    np.testing.assert_allclose(sums, expected[c_row, c_column], rtol=1e-5, atol=1e-5)


def test_swapped_registers_give_another_product(rng):
    product, c, expected = multiply(rng, "f16", a1=2, a2=1)
    shim.run(product)
    assert np.abs(c - expected).max() > 1


MATRICES = """
KERNEL(32) SYMBOL(test)(const value *x, uint32_t *y) {
    DYNAMIC_SHARED(value, rows);
    int lane = threadIdx.x;
    for (int e = 0; e < 8; e++) rows[lane * STRIDE + e] = x[lane * 8 + e];
    __syncthreads();
    uint32_t r[4];
    LOAD(r, rows + lane * STRIDE);
    for (int i = 0; i < 4; i++) y[i * 32 + lane] = r[i];
}"""


@pytest.mark.parametrize(("stride", "conflicts"), [(8, 0), (40, 0), (16, 4 * 4), (64, 4 * 7)])
@pytest.mark.parametrize("load", ["ldmatrix_x4", "ldmatrix_x4_trans"])
def test_ldmatrix(load, stride, conflicts):
    x = np.arange(4 * 8 * 8, dtype=np.float16).reshape(4, 8, 8)
    y = np.zeros((4, 8, 4), np.uint32)
    code = f"#define STRIDE {stride}\n#define LOAD {load}\n{MATRICES}"
    statistics = shim.run(launch(code, x, y, shared=32 * stride * 2))
    expected = x.transpose(0, 2, 1) if load.endswith("trans") else x
    np.testing.assert_array_equal(y.view(np.float16).reshape(4, 8, 8), expected)
    assert statistics.bank_conflicts == conflicts


SHUFFLES = {
    "__shfl_xor_sync(~0u, x, 5)": lambda lane: lane ^ 5,
    "__shfl_sync(~0u, x, 7)": lambda lane: 0 * lane + 7,
    "__shfl_sync(~0u, x, x / 4 % 8, 8)": lambda lane: lane // 8 * 8 + lane // 4 % 8,
    "__shfl_down_sync(~0u, x, 3)": lambda lane: np.where(lane + 3 < 32, lane + 3, lane),
    "__shfl_down_sync(~0u, x, 3, 8)": lambda lane: np.where(lane % 8 + 3 < 8, lane + 3, lane),
    "__shfl_up_sync(~0u, x, 3)": lambda lane: np.where(lane >= 3, lane - 3, lane),
    "__popc_of(__ballot_sync(~0u, x < 5))": lambda lane: 0 * lane + 5,
    "__any_sync(~0u, x == 9) + 2 * __all_sync(~0u, x == 9)": lambda lane: 0 * lane + 1,
}


def test_shuffles_and_votes():
    lines = "\n".join(f"y[{i} * 32 + x] = {call};" for i, call in enumerate(SHUFFLES))
    code = f"""
    INLINE int __popc_of(unsigned x) {{ int n = 0; for (; x; x &= x - 1) n++; return n; }}
    KERNEL(32) SYMBOL(test)(int *y) {{ int x = threadIdx.x; {lines} }}"""
    y = np.zeros((len(SHUFFLES), 32), np.int32)
    shim.run(launch(code, y))
    expected = [source(np.arange(32)) for source in SHUFFLES.values()]
    np.testing.assert_array_equal(y, expected)


# Sums of 256 values in each block: by warps, then of the warps' sums in shared memory.
SUM = """
KERNEL(256) SYMBOL(test)(const float *x, float *y, float *total, int *count) {
    __shared__ float sums[8];
    float s = warp_sum(x[blockIdx.x * 256 + threadIdx.x]);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
    BARRIER
    if (threadIdx.x < 32) {
        s = warp_sum(threadIdx.x < 8 ? sums[threadIdx.x] : 0.0f);
        if (threadIdx.x == 0) {
            y[blockIdx.x] = s;
            atomicAdd(total, s);
            atomicAdd(count, 1);
        }
    }
}"""


def sums(x, y, barrier="__syncthreads();"):
    total, count = np.zeros(1, np.float32), np.zeros(1, np.int32)
    code = SUM.replace("BARRIER", barrier)
    return launch(code, x, y, total, count, grid=len(y), block=256, dtype="f32")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitizer", [None, *shim.SANITIZERS])
def test_reduction(rng, order, sanitizer):
    x, y = rng.standard_normal((3, 256)).astype(np.float32), np.zeros(3, np.float32)
    call = sums(x, y)
    statistics = shim.run(call, order, sanitizer)
    np.testing.assert_allclose(y, x.sum(1, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(call.arguments[2], [x.sum(dtype=np.float64)], rtol=1e-5)
    assert (call.arguments[3], statistics.barriers) == ([3], 3)


COPY = """
KERNEL(32) SYMBOL(test)(const float *x, float *y, int rows) {
    __shared__ __align__(16) float tile[2][32][4];
    int lane = threadIdx.x;
    for (int s = 0; s < 2; s++) {
        int row = s * 32 + lane;
        copy_async(tile[s][lane], x + (row < rows ? row : 0) * 4, row < rows);
        commit_async();
    }
    FIRST_WAIT
    for (int e = 0; e < 4; e++) y[lane * 4 + e] = tile[0][lane][e];
    LAST_WAIT
    for (int e = 0; e < 4; e++) y[(32 + lane) * 4 + e] = tile[1][lane][e];
}"""


def copy(x, y, first="wait_async<1>();", last="wait_async<0>();"):
    code = COPY.replace("FIRST_WAIT", first).replace("LAST_WAIT", last)
    return launch(code, x, y, np.int32(len(x)), dtype="f32")


def test_copies_read_nothing_outside(rng):
    x, y = rng.standard_normal((45, 4)).astype(np.float32), np.full((64, 4), np.nan, np.float32)
    for sanitizer in (None, "address,undefined"):
        shim.run(copy(x, y), sanitizer=sanitizer)
        np.testing.assert_array_equal(y[:45], x)
        np.testing.assert_array_equal(y[45:], 0)


def test_a_copy_happens_at_its_wait_only(rng):
    x, y = rng.standard_normal((64, 4)).astype(np.float32), np.zeros((64, 4), np.float32)
    shim.run(copy(x, y, first="wait_async<2>();"))
    assert np.isnan(y[:32]).all()
    np.testing.assert_array_equal(y[32:], x[32:])


def test_a_copy_spoils_its_destination_at_once():
    code = """
    KERNEL(32) SYMBOL(test)(const float *x, float *y) {
        __shared__ __align__(16) float row[32][4];
        row[threadIdx.x][0] = 1.0f;
        copy_async(row[threadIdx.x], x, true);
        commit_async();
        y[threadIdx.x] = row[threadIdx.x][0];
        wait_async<0>();
    }"""
    x, y = np.ones(4, np.float32), np.zeros(32, np.float32)
    shim.run(launch(code, x, y, dtype="f32"))
    assert np.isnan(y).all()


CONVERSIONS = """
KERNEL(32) SYMBOL(test)(const float *x, value *y) {
    y[threadIdx.x] = from_float(x[threadIdx.x]);
}"""


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_values_round_to_nearest_even(rng, dtype):
    x = rng.standard_normal(32).astype(np.float32)
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 70000, -1e-7, np.inf, np.nan]
    x[:8] = ties
    y = np.zeros(32, np.float16 if dtype == "f16" else np.uint16)
    shim.run(launch(CONVERSIONS, x, y, dtype=dtype))
    if dtype == "f16":
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(y, x.astype(np.float16))
        return
    wide = (y.astype(np.uint32) << 16).view(np.float32)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(x[8:]))) - 7)
    assert (np.abs(wide[8:] - x[8:]) <= ulp / 2).all()
    np.testing.assert_array_equal(wide[:4], [1, 1, 1, 1 + 2**-6])
    assert wide[6] == np.inf and np.isnan(wide[7])


def test_blocks_and_threads_know_where_they_are():
    code = """
    KERNEL(64) SYMBOL(test)(int *y) {
        int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        y[block * blockDim.x + threadIdx.x] += block * 64 + threadIdx.x;
    }"""
    for order in ORDERS:
        y = np.zeros(2 * 3 * 4 * 64, np.int32)
        shim.run(Launch(Source(code), (2, 3, 4), 64, 0, (y,)), order)
        np.testing.assert_array_equal(y, np.arange(len(y)))


# ---- wrong kernels ----


def test_poison_shows_a_missing_barrier(rng):
    x, y = rng.standard_normal((1, 256)).astype(np.float32), np.zeros(1, np.float32)
    shim.run(sums(x, y, barrier=""))
    assert np.isnan(y).all()


def test_thread_sanitizer_finds_a_missing_barrier_whatever_the_order(rng):
    x, y = rng.standard_normal((1, 256)).astype(np.float32), np.zeros(1, np.float32)
    with pytest.raises(shim.SanitizerError, match=r"data race[\s\S]*sums\[threadIdx"):
        shim.run(sums(x, y, barrier=""), order=1, sanitizer="thread")


def test_thread_sanitizer_tells_one_barrier_from_the_next():
    code = """
    KERNEL(64) SYMBOL(test)(int *y) {
        __shared__ int x;
        if (threadIdx.x == 0) x = 1;
        __syncthreads();
        int mine = x;
        SECOND_BARRIER
        if (threadIdx.x == 0) x = 2;  // others may not have read 1 yet
        __syncthreads();
        y[threadIdx.x] = mine + x;
    }"""
    y = np.zeros(64, np.int32)
    right = launch(code.replace("SECOND_BARRIER", "__syncthreads();"), y, block=64)
    shim.run_sanitized([right], "thread", order=1)
    np.testing.assert_array_equal(y, 3)
    wrong = launch(code.replace("SECOND_BARRIER", ""), y, block=64)
    for order in ORDERS:
        with pytest.raises(shim.SanitizerError, match="data race"):
            shim.run(wrong, order, "thread")


def test_syncwarp_orders_a_warp_and_shuffles_do_not():
    code = """
    KERNEL(32) SYMBOL(test)(int *y) {
        __shared__ int x[32];
        x[threadIdx.x] = threadIdx.x;
        BETWEEN;
        y[threadIdx.x] = x[threadIdx.x ^ 1];
    }"""
    y = np.zeros(32, np.int32)
    shim.run(launch(code.replace("BETWEEN", "__syncwarp()"), y), sanitizer="thread")
    np.testing.assert_array_equal(y, np.arange(32) ^ 1)
    with pytest.raises(shim.SanitizerError, match="data race"):
        call = launch(code.replace("BETWEEN", "__shfl_sync(~0u, 0, 0)"), y)
        shim.run(call, sanitizer="thread")


TOUCH = "KERNEL(32) SYMBOL(test)(const value *x, value *y, int read, int write)"
TOUCH += "{ if (threadIdx.x == 0) y[write] = x[read]; }"


@pytest.mark.parametrize("size", [7, 8, 100])
def test_address_sanitizer_finds_one_element_outside(size):
    x, y = np.ones(size, np.float16), np.zeros(size, np.float16)
    (statistics,) = shim.run_sanitized(
        [launch(TOUCH, x, y, np.int32(size - 1), np.int32(0))], "address,undefined"
    )
    assert y[0] == 1 and statistics.switches == 32
    for read, write, message in [(size, 0, "READ"), (-1, 0, "READ"), (0, size, "WRITE")]:
        call = launch(TOUCH, x, y, np.int32(read), np.int32(write))
        with pytest.raises(shim.SanitizerError, match=f"heap-buffer-overflow[\\s\\S]*{message} of"):
            shim.run(call, sanitizer="address,undefined")


def test_address_sanitizer_knows_the_size_of_shared_memory():
    code = """
    KERNEL(32) SYMBOL(test)(value *y, int i) {
        DYNAMIC_SHARED(value, x);
        x[threadIdx.x + i] = from_float(2.0f);
        y[threadIdx.x] = x[threadIdx.x + i];
    }"""
    y = np.zeros(32, np.float16)
    shim.run(launch(code, y, np.int32(0), shared=64), sanitizer="address,undefined")
    np.testing.assert_array_equal(y, 2)
    with pytest.raises(shim.SanitizerError, match="heap-buffer-overflow"):
        shim.run(launch(code, y, np.int32(1), shared=64), sanitizer="address,undefined")


def test_misaligned_chunks():
    code = "KERNEL(32) SYMBOL(test)(value *y, int i) { store_chunk(y + i, load_chunk(y)); }"
    y = np.zeros(64, np.float16)
    with pytest.raises(shim.SanitizerError, match="misaligned address"):
        shim.run(launch(code, y, np.int32(4)), sanitizer="address,undefined")


def test_arrays_that_overlap_stay_so_in_a_sanitized_run():
    x = np.arange(64, dtype=np.float16)
    call = launch(TOUCH, x, x[32:], np.int32(40), np.int32(31))
    shim.run(call, sanitizer="address,undefined")
    assert x[63] == 40


LOADS = {  # an address that is 8 bytes off
    "ldmatrix_x4: .* not a multiple of 16": "uint32_t r[4]; ldmatrix_x4(r, x + 4);",
    "ldmatrix_x4_trans: .* not in shared": "uint32_t r[4]; ldmatrix_x4_trans(r, y);",
    "ldmatrix_x4: .* not in shared": "uint32_t r[4]; ldmatrix_x4(r, x + 256);",
    "copy_async: .* not a multiple of 16": "copy_async(x + 4, y, true); wait_async<0>();",
    "copy_async: 0x.* a multiple of 16": "copy_async(x, y + 4, true); wait_async<0>();",
    "copy_async: .* not in shared": "copy_async(y, y, true); wait_async<0>();",
    "fault": "y[1ll << 45] = x[0];",
    "division by zero": "y[0] = from_float(float(int(threadIdx.x) / int(blockIdx.x)));",
    "never waited .* thread 0": "copy_async(x, y, true); commit_async();",
}


@pytest.mark.parametrize("message", LOADS)
def test_addresses_and_waits(message):
    code = f"KERNEL(32) SYMBOL(test)(value *y) {{ DYNAMIC_SHARED(value, x); {LOADS[message]} }}"
    y = np.zeros(64 + 8, np.float16)
    start = -y.ctypes.data % 16 // 2
    with pytest.raises(shim.KernelError, match=message):
        shim.run(launch(code, y[start : start + 64], shared=512))


DIVERGENT = {
    "different barriers: __syncthreads at lines": (
        "if (threadIdx.x < 40) __syncthreads();\nelse __syncthreads();"
    ),
    "deadlock: 8 of the 32 lanes of warp 0 at __shfl_xor_sync": (
        "float s = threadIdx.x; if (threadIdx.x < 8) s = warp_sum(s); y[threadIdx.x] = s;"
    ),
    "deadlock: 31 of the 32 lanes of warp 1 at __syncwarp.* 1 threads at __syncthreads": (
        "if (threadIdx.x == 50) __syncthreads(); else __syncwarp();"
    ),
    "different operations: __shfl_xor_sync at line .* __syncwarp": (
        "if (threadIdx.x % 2) __syncwarp(); else y[0] = warp_sum(1.0f);"
    ),
    "mask 0000ffff": "__syncwarp(0xffffu);",
}


@pytest.mark.parametrize("message", DIVERGENT)
def test_threads_that_go_different_ways(message):
    code = f"KERNEL(64) SYMBOL(test)(float *y) {{ {DIVERGENT[message]} }}"
    for order in ORDERS:
        with pytest.raises(shim.KernelError, match=message):
            shim.run(launch(code, np.zeros(64, np.float32), block=64), order)


def test_threads_that_have_returned_are_not_waited_for():
    code = """
    KERNEL(64) SYMBOL(test)(float *y) {
        if (threadIdx.x >= 32) return;
        __syncthreads();
        y[threadIdx.x] = warp_sum(1.0f);
    }"""
    y = np.zeros(32, np.float32)
    shim.run(launch(code, y, block=64))
    np.testing.assert_array_equal(y, 32)


@pytest.mark.parametrize("sanitizer", shim.SANITIZERS)
def test_errors_are_found_in_sanitized_runs_too(sanitizer):
    code = "KERNEL(64) SYMBOL(test)(float *y) { if (threadIdx.x == 5) __syncwarp(); *y; }"
    with pytest.raises(shim.KernelError, match="deadlock: 1 of the 32 lanes") as error:
        shim.run(launch(code, np.zeros(64, np.float32), block=64), sanitizer=sanitizer)
    assert error.type is shim.KernelError


def test_a_kernel_runs_again_after_an_error():
    code = "KERNEL(32) SYMBOL(test)(float *y, int fails) { if (fails) y = nullptr; *y += 1; }"
    y = np.zeros(1, np.float32)
    for _ in range(3):
        with pytest.raises(shim.KernelError, match="fault"):
            shim.run(launch(code, y, np.int32(1)))
        shim.run(launch(code, y, np.int32(0)))
    assert y == 3 * 32


def test_what_does_not_compile():
    with pytest.raises(shim.KernelError, match=r"does not compile:[\s\S]*no_such_word"):
        shim.run(launch("KERNEL(32) SYMBOL(test)() { no_such_word(); }"))


# ---- wrong launches ----

PARAMETERS = (
    "KERNEL(32) SYMBOL(test)(const value *x, float *y, int n, int64_t m, float eps, uint8_t *u) {}"
)
RIGHT = (
    np.zeros((4, 4), np.float16),
    np.zeros(4, np.float32),
    np.int32(1),
    np.int64(1),
    np.float32(1),
    np.zeros(3, np.uint8),
)
READ_ONLY = np.zeros(4, np.float32)
READ_ONLY.flags.writeable = False


def test_signature():
    expected = ["const f2*", "f4*", "i4", "i8", "f4", "u1*"]
    assert shim.signature(Source(PARAMETERS)) == expected
    shim.run(launch(PARAMETERS, *RIGHT))
    shim.run(launch(PARAMETERS, None, *RIGHT[1:5], None))


@pytest.mark.parametrize(
    ("index", "argument", "message"),
    [
        (0, np.zeros(4, np.float32), "const f2\\*: got an array of float32"),
        (0, np.zeros((4, 4), np.float16).T[1:], "not contiguous"),
        (0, np.zeros((4, 8), np.float16)[:, :4], "not contiguous"),
        (0, np.int32(1), "got a scalar of int32"),
        (0, [1.0], "got a list"),
        (1, READ_ONLY, "read-only"),
        (2, np.int64(1), "i4: got a scalar of int64"),
        (2, np.float32(1), "got a scalar of float32"),
        (2, 1, "got a int"),
        (3, np.int32(1), "i8: got a scalar of int32"),
        (3, RIGHT[0], "i8: got an array"),
        (4, np.int32(1), "f4: got a scalar of int32"),
        (4, None, "got None"),
    ],
)
def test_arguments_that_do_not_fit(index, argument, message):
    arguments = [*RIGHT[:index], argument, *RIGHT[index + 1 :]]
    with pytest.raises(shim.ArgumentError, match=f"argument {index} of test_f16 is .*{message}"):
        shim.run(launch(PARAMETERS, *arguments))


def test_rows_may_lie_apart_if_the_kernel_is_told():
    x = np.zeros((4, 8), np.float16)[:, :4]
    for sanitizer in (None, "address,undefined"):
        call = launch(PARAMETERS, x, *RIGHT[1:3], np.int64(8), *RIGHT[4:])
        shim.run(call, sanitizer=sanitizer)


@pytest.mark.parametrize("count", [0, 5, 7])
def test_number_of_arguments(count):
    with pytest.raises(shim.ArgumentError, match=f"takes 6 arguments .*, not {count}"):
        shim.run(launch(PARAMETERS, *(RIGHT * 2)[:count]))


@pytest.mark.parametrize(
    "wrong", [{"block": 33}, {"block": 2048}, {"grid": 0}, {"shared": 1 << 20}], ids=str
)
def test_sizes_of_a_launch(wrong):
    with pytest.raises(shim.ArgumentError):
        shim.run(launch(PARAMETERS, *RIGHT, **wrong))
