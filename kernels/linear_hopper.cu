// linear: y = act(x w^T + bias) + residual, on Hopper                     reference.py::linear
// RESIDUAL_FIRST: y = act(x w^T + bias + residual)                        reference.py::conv2d
//
// The same op and defines as linear.cu, with Hopper's own machinery: tensor maps say where x and w lie, one
// warp asks the memory system (TMA) for whole tiles, and warpgroups (128 threads) multiply them right from
// shared memory (wgmma).
//
//                 M                     As many blocks as the GPU runs at once stay, and take tile after tile of
//          +----+----+----+             y. Two of a block's warpgroups multiply, each TILE_N x
//     TILE | w' |    |    |             TILE_M sums at a time, in registers. A warp of the third fills a
//       _K +----+----+----+             ring of STAGES slots, a slot a tile of x and one of w. A slot has two
//     +---++----+----+----+             barriers: full, where the bytes are counted as they arrive, and empty,
//   N | x || y |    |    |              where the multiplying warps do.
//     +---++----+----+----+                 fetch     wait empty[s]   TMA     expect full[s]
//                                           multiply  wait full[s]    wgmma   arrive empty[s - 1]
//
// The warpgroups take turns, a tile each: one finishes and writes its tile while the other has the tensor cores
// to itself.
//     A  multiply 0 | write 0    | multiply 2 | write 2
//     B             | multiply 1 | write 1    | multiply 3 ...
//
// Clusters: CLUSTER_N x CLUSTER_M blocks of neighbouring tiles fetch together. Blocks of the same rows share x:
// each fetches a part of the tile, which TMA writes to all of them; blocks of the same columns share w likewise.
// So a slot is empty when the warps of all blocks that its parts go to have arrived: each arrives at every
// block with which it shares.
//
// Shared memory: a row of a tile is TILE_K = 64 values, 128 bytes, 8 chunks of 16. Chunk c of row r lies at
// c ^ (r % 8): the 128-byte swizzle of TMA and wgmma, if the tile begins at a multiple of 1024 bytes. Both are
// of the async proxy, so no fence stands between them. What lies outside of x and w arrives as zeros.
//
// Descriptor of such a tile of x or w, K running along the row (PTX ISA, "Matrix descriptor format"):
//
//     bits  0-13  address / 16; + 2 is 16 values further in K (the swizzle is of addresses, so that works)
//          16-29  leading offset / 16: has no meaning with a swizzle whose width is the row; 1
//          32-45  stride offset / 16: from 8 rows to the next 8, 1024 bytes
//          49-51  base offset: 0, as every 8 rows begin at a multiple of 1024
//          62-63  1: 128-byte swizzle
//
// Sums of wgmma.m64nNk16, thread t of the warpgroup: d[4 j + 2 h + e] is row t / 32 * 16 + t % 32 / 4 + 8 h,
// column 8 j + t % 4 * 2 + e. The four threads of a row exchange them, so that each writes 8 neighbours at once.
//
// cost    2 N M K flop; bound by the tensor cores from N = 200 or so. A slot takes them TILE_N TILE_M / 32 cycles,
//         for which L2 gives 128 (TILE_N / CLUSTER_M + TILE_M / CLUSTER_N) bytes: in clusters of 2 x 1, 48 a
//         cycle for 128 x 128 and 64 x 256
// order   y[n, m] is summed over k in order, in steps of 16: not dependent on N or on other rows
// launch  a multiple of CLUSTER_N CLUSTER_M blocks, any number; block 384, shared
//         128 STAGES (TILE_N + TILE_M) + 1024 bytes
// x_map, w_map   of x [N, K] and w [M, K], 128-byte swizzle, boxes of TILE_K columns and TILE_N / CLUSTER_M and
//         TILE_M / CLUSTER_N rows
// needs   sm_90a; K, the strides of x and w multiples of 8; x, w, bias, residual, y at multiples of 16 bytes.
//         TILE_N a multiple of 64, TILE_M 128 or 256, TILE_K 64; ACTIVATION, RESIDUAL_FIRST,
//         RESULT_F32 as there

#define MULTIPLYING 2  // warpgroups
#define THREADS (128 * (MULTIPLYING + 1))
#define BLOCKS (TILE_N / 64)  // of 64 rows
#define CLUSTER (CLUSTER_N * CLUSTER_M)
#define X_PART (TILE_N / CLUSTER_M)  // rows that a block fetches
#define W_PART (TILE_M / CLUSTER_N)

static_assert(TILE_N % 64 == 0 && TILE_M % 128 == 0, "what the warpgroups are made for");
static_assert(TILE_K * sizeof(value) == 128 && X_PART % 8 == 0 && W_PART % 8 == 0, "what the swizzle is made for");

struct __align__(128) TensorMap {
    char opaque[128];
};

// Barriers of shared memory. A phase ends when `count` threads have arrived and all bytes that they expect;
// waiting for a phase's parity returns at once if the phase after it is under way.
typedef uint64_t Barrier;
INLINE void barrier_init(Barrier *b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
INLINE void barrier_arrive(Barrier *b, int block) {  // at that of a block of the cluster
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(b)),
                 "r"(block)
                 : "memory");
}
INLINE void barrier_arrive_expecting(Barrier *b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}
INLINE void barrier_wait(Barrier *b, int parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(b)), "r"(parity)
                     : "memory");
}
INLINE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE int rank_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
INLINE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The warpgroups' turns: barrier 1 is A's, 2 is B's.
INLINE void wait_turn(int warpgroup) { asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory"); }
INLINE void give_turn(int warpgroup) { asm volatile("bar.arrive %0, 256;" ::"r"(1 + warpgroup) : "memory"); }

// A box of the tensor, from that row and column on, into the shared memory of all blocks in the mask, each of
// whose barriers gets its bytes. A mask of 0: of this block only.
INLINE void fetch(value *to, const TensorMap &map, int row, int column, Barrier *full, uint32_t blocks) {
    if (blocks)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                     "l"(&map), "r"(column), "r"(row), "r"(shared_address(full)), "h"((uint16_t)blocks)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
                     "l"(&map), "r"(column), "r"(row), "r"(shared_address(full))
                     : "memory");
}

INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }

INLINE uint64_t descriptor(const value *tile) {
    return (uint64_t)((shared_address(tile) & 0x3ffff) >> 4) | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>  // until at most the last N groups are under way
INLINE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#if DTYPE == F16
#define WGMMA_TYPES "f32.f16.f16"
#else
#define WGMMA_TYPES "f32.bf16.bf16"
#endif
#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_64 SUMS_16(0), SUMS_16(16), SUMS_16(32), SUMS_16(48)
#define NAMES_64                                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "      \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "      \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                           \
    NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "     \
    "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, " \
    "%95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "       \
    "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "  \
    "%123, %124, %125, %126, %127"
#define WGMMA(columns, names, a, b, add, ...)                                               \
    asm volatile("{\n.reg .pred add;\nsetp.ne.s32 add, " add ", 0;\n"                       \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16." WGMMA_TYPES " {" names "}, " \
                 a ", " b ", add, 1, 1, 0, 0;\n}"                                           \
                 : __VA_ARGS__                                                              \
                 : "l"(x), "l"(w), "r"(keep))

// d = x [64, 16] w [TILE_M, 16]^T of descriptors, or d += where keep; under way until wgmma_wait says it is not.
INLINE void wgmma(float (&d)[TILE_M / 2], uint64_t x, uint64_t w, int keep) {
#if TILE_M == 128
    WGMMA("128", NAMES_64, "%64", "%65", "%66", SUMS_64);
#else
    WGMMA("256", NAMES_128, "%128", "%129", "%130", SUMS_64, SUMS_16(64), SUMS_16(80), SUMS_16(96), SUMS_16(112));
#endif
}

// A place in the ring, and the parity of the full barrier's phase there.
struct Slot {
    int at = 0, parity = 0;
    INLINE void skip(int slots) {
        at += slots;
        parity ^= at / STAGES & 1;
        at %= STAGES;
    }
    INLINE void next() {
        if (++at == STAGES) at = 0, parity ^= 1;
    }
};

// What a thread reads of a residual and writes of y at once: a float32 y as the sums lie, else 8 columns.
#define UNIT (sizeof(result) == 4 ? 2 : 8)
struct __align__(UNIT * sizeof(result)) Unit {
    result v[UNIT];
    INLINE uint32_t &pair(int j) { return reinterpret_cast<uint32_t *>(v)[j]; }
};
INLINE Unit load_unit(const result *row, int column, int m, bool inside) {
    Unit unit = {};
    if (!inside || column >= m) return unit;
    if (m % UNIT == 0) return *reinterpret_cast<const Unit *>(row + column);
#pragma unroll
    for (int e = 0; e < UNIT; e++)
        if (column + e < m) unit.v[e] = row[column + e];
    return unit;
}
INLINE void store_unit(result *row, int column, int m, bool inside, Unit unit) {
    if (!inside || column >= m) return;
    if (m % UNIT == 0) {
        *reinterpret_cast<Unit *>(row + column) = unit;
        return;
    }
#pragma unroll
    for (int e = 0; e < UNIT; e++)
        if (column + e < m) row[column + e] = unit.v[e];
}

// Of the four threads of a row, thread q's value i becomes thread i's value q.
INLINE void exchange(uint32_t &a, uint32_t &b, int distance) {
    bool upper = threadIdx.x & distance;
    uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? a : b, distance);
    (upper ? a : b) = other;
}
INLINE void transpose(Unit &unit) {
#if !RESULT_F32
    exchange(unit.pair(0), unit.pair(1), 1);
    exchange(unit.pair(2), unit.pair(3), 1);
    exchange(unit.pair(0), unit.pair(2), 2);
    exchange(unit.pair(1), unit.pair(3), 2);
#endif
}

// A warpgroup's sums, of rows from `row` and columns from `column` on, into y.
INLINE void write_tile(const float (&sums)[BLOCKS][TILE_M / 2], int row, int column, const float *bias,
                       const result *residual, result *y, int n, int m) {
    constexpr int UNITS = 8 / UNIT;  // of 32 columns, of which a thread has 8
    int lane = threadIdx.x % 32, quad = lane % 4;
    row += threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int g = 0; g < TILE_M / 32; g++) {
        int first = column + g * 32, at = first + quad * UNIT;
        float b[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int of_sum = first + e / 2 * 8 + quad * 2 + e % 2;
            b[e] = bias && of_sum < m ? bias[of_sum] : 0.0f;
        }
        Unit r[BLOCKS * 2][UNITS];
        if (residual)
#pragma unroll
            for (int i = 0; i < BLOCKS * 2; i++)
#pragma unroll
                for (int u = 0; u < UNITS; u++)
                    r[i][u] = load_unit(residual + (int64_t)(row + i * 8 + i / 2 * 48) * m, at + u * 8, m,
                                        row + i * 8 + i / 2 * 48 < n);
#pragma unroll
        for (int i = 0; i < BLOCKS * 2; i++) {
            int here = row + i * 8 + i / 2 * 48;  // 64 rows further every second time
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                Unit out;
                if (residual) transpose(r[i][u]);
#pragma unroll
                for (int e = 0; e < UNIT; e++) {
                    int of = u * UNIT + e;
                    out.v[e] = finish(sums[i / 2][g * 16 + of / 2 * 4 + i % 2 * 2 + of % 2], b[of],
                                      residual ? from_result(r[i][u].v[e]) : 0.0f);
                }
                transpose(out);
                store_unit(y + (int64_t)here * m, at + u * 8, m, here < n, out);
            }
        }
    }
}

KERNEL(THREADS) __cluster_dims__(CLUSTER, 1, 1)
SYMBOL(linear)(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
               const float *__restrict__ bias, const result *residual, result *y, int n, int m, int k) {
    DYNAMIC_SHARED(unsigned char, memory);
    __shared__ Barrier full[STAGES], empty[STAGES];
    unsigned char *aligned = memory + (-shared_address(memory) & 1023);
    value *x_ring = reinterpret_cast<value *>(aligned), *w_ring = x_ring + STAGES * TILE_N * TILE_K;

    int rank = rank_in_cluster(), n_rank = rank % CLUSTER_N, m_rank = rank / CLUSTER_N;
    int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER, slots = (k + TILE_K - 1) / TILE_K;
    int count = ceil_div(n, TILE_N * CLUSTER_N) * ceil_div(m, TILE_M * CLUSTER_M);  // of the clusters' tiles
    int warpgroup = threadIdx.x / 128;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&full[s], 1);
            barrier_init(&empty[s], 4 * (CLUSTER_N + CLUSTER_M - 1));
        }
        fence_barrier_init();
    }
    sync_cluster();
    wait_for_previous();

    if (warpgroup == MULTIPLYING) {
        fewer_registers();
        if (threadIdx.x % 128 < 32) {
            uint32_t same_rows = CLUSTER_M > 1 ? (1 | 1 << CLUSTER_N * (CLUSTER_M - 1)) << n_rank : 0;
            uint32_t same_columns = CLUSTER_N > 1 ? ((1 << CLUSTER_N) - 1) << m_rank * CLUSTER_N : 0;
            Slot slot;
            for (int q = first; q < count; q += step) {
                Place tile = place(q, n, m, TILE_N * CLUSTER_N, TILE_M * CLUSTER_M);
                int row = tile.row + n_rank * TILE_N + m_rank * X_PART;
                int column = tile.column + m_rank * TILE_M + n_rank * W_PART;
                for (int t = 0; t < slots; t++, slot.next()) {
                    value *x_part = x_ring + (slot.at * TILE_N + m_rank * X_PART) * TILE_K;
                    value *w_part = w_ring + (slot.at * TILE_M + n_rank * W_PART) * TILE_K;
                    barrier_wait(&empty[slot.at], slot.parity ^ 1);  // the first time round nobody has to arrive
                    if (threadIdx.x % 32) continue;
                    barrier_arrive_expecting(&full[slot.at], 128 * (TILE_N + TILE_M));
                    fetch(x_part, x_map, row, t * TILE_K, &full[slot.at], same_rows);
                    fetch(w_part, w_map, column, t * TILE_K, &full[slot.at], same_columns);
                }
            }
        }
    } else {
        more_registers();
        int lane = threadIdx.x % 32;
        bool shares = lane < CLUSTER && (lane % CLUSTER_N == n_rank || lane / CLUSTER_N == m_rank);
        uint64_t x_first = descriptor(x_ring), w_first = descriptor(w_ring);
        float sums[BLOCKS][TILE_M / 2] = {};
        Slot slot;
        slot.skip(warpgroup * slots);
        for (int q = first + warpgroup * step; q < count; q += 2 * step) {
            if (q != first) wait_turn(warpgroup);
            int last = 0;
            for (int t = 0; t < slots; t++) {
                barrier_wait(&full[slot.at], slot.parity);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < TILE_K / 16; s++)
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++)
                        wgmma(sums[b], x_first + ((slot.at * TILE_N + b * 64) * 128 >> 4) + s * 2,
                              w_first + (slot.at * TILE_M * 128 >> 4) + s * 2, t + s);
                wgmma_commit();
                if (t) {
                    wgmma_wait<1>();  // the slot before is read
                    if (shares) barrier_arrive(&empty[last], lane);
                }
                last = slot.at;
                slot.next();
            }
            if (q + step < count) give_turn(warpgroup ^ 1);
            wgmma_wait<0>();
            if (shares) barrier_arrive(&empty[last], lane);
            slot.skip(slots);
            Place tile = place(q, n, m, TILE_N * CLUSTER_N, TILE_M * CLUSTER_M);
            write_tile(sums, tile.row + n_rank * TILE_N, tile.column + m_rank * TILE_M, bias, residual, y, n, m);
        }
    }
    sync_cluster();  // nobody writes into a block that is gone
}
