"""Tests of ptx_hopper.py: wgmma and mbarrier kernels, right ones and ones with planted bugs."""

import re

import numpy as np
import pytest
from cuda import ptx
from cuda.test_ptx import Inline, launch, needs_nvrtc, without

from npclip.cuda_launch import TensorMap

pytestmark = needs_nvrtc

WORDS = """
INLINE uint64_t descriptor(const void *tile) {  // K-major, rows of 128 bytes, swizzled
    return (uint64_t)(shared_address(tile) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
INLINE void wgmma(float (&d)[8], uint64_t a, uint64_t b, int keep) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %10, 0;"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0; }"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                   "+f"(d[6]), "+f"(d[7])
                 : "l"(a), "l"(b), "r"(keep));
}
INLINE void wait_for(uint64_t *barrier, int parity) {
    asm volatile("{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
                 "@!p bra AGAIN; }" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
INLINE void init(uint64_t *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(count));
}
INLINE void arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                 ::"r"(shared_address(barrier)) : "memory");
}
"""

PRODUCT = """
// out [64, 16] = a [64, 64] b [16, 64]^T
KERNEL(128) test_f16(const value *a, const value *b, float *out) {
    DYNAMIC_SHARED(value, tiles);
    for (int i = threadIdx.x; i < 80 * 8; i += 128) {
        int row = i / 8, chunk = i % 8;
        const value *from = row < 64 ? a + row * 64 : b + (row - 64) * 64;
        copy_async(tiles + row * 64 + (chunk ^ SWIZZLE) * 8, from + chunk * 8, true);
    }
    commit_async();
    wait_async<0>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    float d[8] = {9, 9, 9, 9, 9, 9, 9, 9};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < 4; k++)
        wgmma(d, descriptor(tiles) + 2 * k, descriptor(tiles + 64 * 64) + 2 * k, k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int i = 0; i < 8; i++)
        out[(row + i / 2 % 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}
"""


def run_product(swizzle="row % 8", edit=None):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, 64)).astype(np.float16) for n in (64, 16))
    out = np.full((64, 16), np.nan, np.float32)
    kernel = Inline(f"#define SWIZZLE ({swizzle})\n{WORDS}{PRODUCT}")
    statistics = ptx.run(launch(kernel, a, b, out, shared=80 * 128), "90a", edit=edit)
    expected = a.astype(np.float64) @ b.T.astype(np.float64)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected), statistics


def test_wgmma():
    error, statistics = run_product()
    assert error < 1e-6
    assert (statistics.races, statistics.uninitialised, statistics.mma) == (0, 0, 32)


def test_rows_that_are_not_swizzled_give_a_wrong_result():
    error, _ = run_product(swizzle="0")
    assert error > 0.1


def test_a_missing_wait_is_an_error():
    with pytest.raises(ptx.KernelError, match=r"never waited for.*wgmma"):
        run_product(edit=without(r"wgmma\.wait_group[^;]*;"))


def test_a_missing_proxy_fence_is_a_race():
    error, statistics = run_product(edit=without(r"fence\.proxy[^;]*;"))
    assert error < 1e-6 and statistics.races > 0
    assert all("wgmma" in place for place in statistics.race_at)


BOX = """
struct __align__(128) Map { char opaque[128]; };
// Each of two blocks asks for half of a box [16, 64], which both get; out [2, 16, 64].
KERNEL(32) __cluster_dims__(2, 1, 1)
test_f16(const __grid_constant__ Map map, value *out, int row, int column) {
    __shared__ __align__(1024) value box[16 * 64];
    __shared__ uint64_t full;
    int rank = blockIdx.x, half = 8 * rank;
    if (threadIdx.x == 0) init(&full, 1);
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 2048;"
                     ::"r"(shared_address(&full)) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
                     ::"r"(shared_address(box + half * 64)), "l"(&map), "r"(column),
                     "r"(row + half), "r"(shared_address(&full)), "h"((uint16_t)3) : "memory");
    }
    wait_for(&full, 0);
    for (int i = threadIdx.x; i < 16 * 64; i += 32) {
        int r = i / 64, c = i % 64;
        out[rank * 1024 + i] = box[r * 64 + (c / 8 ^ r % 8) * 8 + c % 8];
    }
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
"""


def run_box(row, column, edit=None):
    """The box that starts there in a matrix of 20 rows of 72, between which are NaNs."""
    whole = np.full((20, 80), np.nan, np.float16)
    whole[:, :72] = np.arange(20 * 72).reshape(20, 72)
    memory = np.empty(whole.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    aligned = memory[start : start + whole.nbytes].view(np.float16).reshape(whole.shape)
    aligned[...] = whole
    out = np.full((2, 16, 64), np.nan, np.float16)
    box = TensorMap(aligned[:, :72], (8, 64))
    arguments = box, out, np.int32(row), np.int32(column)
    work = launch(Inline(WORDS + BOX), *arguments, grid=(2, 1, 1), block=32)
    statistics = ptx.run(work, "90a", edit=edit)
    padded = np.zeros((60, 200), np.float16)
    padded[20:40, 64:136] = whole[:, :72]
    expected = padded[20 + row : 36 + row, 64 + column : 128 + column]
    return (out == expected).all(), statistics


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 8), (14, 64), (-3, -8), (20, 0)])
def test_a_box_of_a_tensor_map(row, column):
    right, statistics = run_box(row, column)
    assert right
    assert (statistics.races, statistics.uninitialised) == (0, 0), statistics.race_at


def test_a_box_that_only_one_block_gets():
    def edit(text):
        changed, found = re.subn(r"\.multicast::cluster( .*\]), %rs\d+;", r"\1;", text)
        assert found == 1
        return changed

    with pytest.raises(ptx.KernelError, match="wait for ever"):
        run_box(0, 0, edit)


def test_a_block_that_does_not_wait_for_the_other():
    barrier = r"barrier\.cluster\.arrive\.release;\s*barrier\.cluster\.wait\.acquire;"
    with pytest.raises(ptx.KernelError, match=r"no mbarrier was initialised|has ended"):
        run_box(0, 0, without(barrier))


RING = """
// y [n] = 2 x [n] through two stages of 128 floats: warp 0 copies, warps 1 to 4 compute.
KERNEL(160) test_f16(const float *x, float *y, int tiles) {
    __shared__ __align__(128) float stage[2][128];
    __shared__ uint64_t full[2], empty[2];
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            init(full + i, 1);
            init(empty + i, 128);
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < tiles; i++) {
                int s = i % 2;
                wait_for(empty + s, i / 2 % 2 ^ 1);
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 512;"
                             ::"r"(shared_address(full + s)) : "memory");
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                             " [%0], [%1], 512, [%2];" ::"r"(shared_address(stage[s])),
                             "l"(x + 128 * i), "r"(shared_address(full + s)) : "memory");
            }
        }
    } else {
        int thread = threadIdx.x - 32;
        for (int i = 0; i < tiles; i++) {
            int s = i % 2;
            wait_for(full + s, i / 2 % 2);
            y[128 * i + thread] = 2 * stage[s][127 - thread];
            arrive(empty + s);
        }
    }
}
"""


def run_ring(source=RING, edit=None):
    x = np.arange(7 * 128, dtype=np.float32)
    y = np.full_like(x, np.nan)
    work = launch(Inline(WORDS + source), x, y, np.int32(7), block=160)
    statistics = ptx.run(work, "90a", edit=edit)
    right = (y == 2 * x.reshape(7, 128)[:, ::-1].reshape(-1)).all()
    return right, statistics


def test_a_ring_of_stages():
    right, statistics = run_ring()
    assert right
    assert (statistics.races, statistics.uninitialised) == (0, 0), statistics.race_at


def test_a_producer_that_does_not_wait_overtakes_the_consumers():
    with pytest.raises(ptx.KernelError, match="wait for ever"):
        run_ring(RING.replace("wait_for(empty + s, i / 2 % 2 ^ 1);", ""))


def test_consumers_that_never_arrive_block_the_producer():
    with pytest.raises(ptx.KernelError, match=r"wait for ever at mbarrier\.try_wait"):
        run_ring(RING.replace("arrive(empty + s);", ""))


def test_a_consumer_that_does_not_wait_reads_too_early():
    def edit(text):
        changed, found = re.subn(r"mbarrier\.try_wait[^;]*\[%r\d+\][^;]*;\s*@!p", "@!p", text)
        assert found
        return changed.replace(".reg .pred p;", ".reg .pred p; setp.eq.u32 p, 0, 0;")

    right, statistics = run_ring(edit=edit)
    assert statistics.races > 0 or statistics.uninitialised > 0 or not right
