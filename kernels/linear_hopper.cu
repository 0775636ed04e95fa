// linear: y = act(x w^T + bias) + residual, on Hopper                     reference.py::linear
// RESIDUAL_FIRST: y = act(x w^T + bias + residual)                        reference.py::conv2d
//
// The same op, arguments and defines as linear.cu, with Hopper's warpgroup multiplications (wgmma), which read
// x and w from shared memory by themselves.
//
//                 M                     A block computes 128 rows x TILE_M columns of y. Its first two
//          +----+----+----+             warpgroups (128 threads each) multiply 64 rows each, in 64 x TILE_M
//     TILE | w' |    |    |             sums in registers; the last COPYING warps copy tiles of x and w into a
//       _K +----+----+----+             ring of STAGES slots. A slot has two barriers: full, where the copies
//     +---++----+----+----+             of each copying thread arrive (cp.async tells the barrier when it is
//  64 | x || y of one     |             done), and empty, where the 8 multiplying warps do.
//     +---+|              |
//  64 | x || of the other |                 copy      wait empty[s]   cp.async   arrive full[s]
//     +---++----+----+----+                 multiply  wait full[s]    wgmma      arrive empty[s - 1]
//
// Shared memory: a row of a tile is TILE_K = 64 values, 128 bytes, 8 chunks of 16. Chunk c of row r lies at
// c ^ (r % 8): the 128-byte swizzle of wgmma, if the tile begins at a multiple of 1024 bytes.
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
// column 8 j + t % 4 * 2 + e; that is mma.m16n8k16's layout, for 16 rows a warp.
//
// Copies are written through the generic proxy, and wgmma reads through the async one: a fence stands between
// waiting for a slot and multiplying it. The other way round needs none: waiting for wgmma orders its reads.
// The sums leave through shared memory as in linear.cu.
//
// cost    2 N M K flop; bound by the tensor cores from N = 200 or so
// order   y[n, m] is summed over k in order, in steps of 16: not dependent on N or on other rows
// launch  grid ceil(N / TILE_N) ceil(M / TILE_M), block 320 or 384 (TILE_M 128 or 256), shared
//         128 STAGES (TILE_N + TILE_M) + 1024 bytes
// needs   sm_90a; K, x_stride, w_stride multiples of 8; x, w, bias, residual, y at multiples of 16 bytes.
//         TILE_N 128, TILE_M 128 or 256, TILE_K 64; STAGES, ACTIVATION, RESIDUAL_FIRST, RESULT_F32 as there

#define MULTIPLYING 2  // warpgroups
#define ROW_CHUNKS 8
#define ROWS_AT_ONCE (32 * COPYING / ROW_CHUNKS)  // that are copied, a chunk per thread
#define PITCH (TILE_M + 8)                        // floats from one row of sums to the next in shared memory

// TILE_M 128: two blocks share a processor, so that one multiplies while the other writes y. TILE_M 256: the sums
// need registers that the copying warpgroup gives away.
#if TILE_M == 128
#define COPYING 2  // warps
#define BOUNDS 128 * MULTIPLYING + 32 * COPYING, 2
INLINE void fewer_registers() {}
INLINE void more_registers() {}
#else
#define COPYING 4
#define BOUNDS 128 * MULTIPLYING + 32 * COPYING, 1
INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
#endif

static_assert(TILE_N == 64 * MULTIPLYING && TILE_K * sizeof(value) == 128, "what the layouts are made for");
static_assert(STAGES * (TILE_N + TILE_M) * 128 >= TILE_N * PITCH * 4, "the sums fit in the ring");

// Barriers of shared memory. A phase ends when `count` threads have arrived; waiting for a phase's parity
// returns at once if the phase after it is under way.
typedef uint64_t Barrier;
INLINE void barrier_init(Barrier *b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
INLINE void barrier_arrive(Barrier *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
INLINE void barrier_arrive_after_copies(Barrier *b) {  // when all that this thread has copied so far is there
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
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

INLINE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
INLINE void sync_multiplying() { asm volatile("bar.sync 1, %0;" ::"n"(128 * MULTIPLYING) : "memory"); }

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

// d += a [64, 16] b [TILE_M, 16]^T, of descriptors; under way until wgmma_wait says that it is not.
#if TILE_M == 128
INLINE void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, 0;\n}"
        : SUMS_16(0), SUMS_16(16), SUMS_16(32), SUMS_16(48)
        : "l"(a), "l"(b));
}
#else
INLINE void wgmma(float (&d)[128], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16." WGMMA_TYPES " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, 0, 0;\n}"
        : SUMS_16(0), SUMS_16(16), SUMS_16(32), SUMS_16(48), SUMS_16(64), SUMS_16(80), SUMS_16(96),
          SUMS_16(112)
        : "l"(a), "l"(b));
}
#endif

INLINE int swizzle(int row) { return row % 8; }

// ROWS rows of a tile; from: what this thread copies of the first ROWS_AT_ONCE, of which rows are inside.
template <int ROWS>
INLINE void copy_tile(value *tile, const value *from, int64_t stride, int rows, bool inside) {
    int row = threadIdx.x % 128 / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS;
    value *to = tile + row * TILE_K + (chunk ^ swizzle(row)) * CHUNK;
#pragma unroll
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE)
        copy_async(to + i * TILE_K, from + i * stride, inside && i < rows);
}

// Where 4 sums lie among those of 16 rows: two neighbours change places in odd rows and in every second
// stretch of 32, so that neither the fragments written nor the rows read meet in a bank.
INLINE int staged(int row, int column) {
    int unit = column / 4;
    return row * PITCH + (unit ^ ((row ^ unit / 8) & 1)) * 4 + column % 4;
}

// PIECE columns of a row of y.
INLINE void write_piece(const float *sums, int at, int row, int column, const float *bias, const result *residual,
                        result *y, int n, int m) {
    if (row >= n || column >= m) return;
    float total[PIECE];
#pragma unroll
    for (int e = 0; e < PIECE; e += 4) {
        float4 sum = *reinterpret_cast<const float4 *>(sums + (at ^ e));
        total[e] = sum.x, total[e + 1] = sum.y, total[e + 2] = sum.z, total[e + 3] = sum.w;
    }
    int64_t first = (int64_t)row * m + column;
    if (m % PIECE == 0) {
        Piece r, out;
        float b[PIECE];
#pragma unroll
        for (int e = 0; e < PIECE; e += 4) {
            float4 some = {0.0f, 0.0f, 0.0f, 0.0f};
            if (bias) some = *reinterpret_cast<const float4 *>(bias + column + e);
            b[e] = some.x, b[e + 1] = some.y, b[e + 2] = some.z, b[e + 3] = some.w;
        }
        if (residual) r = *reinterpret_cast<const Piece *>(residual + first);
#pragma unroll
        for (int e = 0; e < PIECE; e++)
            out.v[e] = finish(total[e], b[e], residual ? from_result(r.v[e]) : 0.0f);
        *reinterpret_cast<Piece *>(y + first) = out;
    } else {
#pragma unroll
        for (int e = 0; e < PIECE; e++)
            if (column + e < m)
                y[first + e] = finish(total[e], bias ? bias[column + e] : 0.0f,
                                      residual ? from_result(residual[first + e]) : 0.0f);
    }
}

KERNEL(BOUNDS)
SYMBOL(linear)(const value *__restrict__ x, const value *__restrict__ w, const float *__restrict__ bias,
               const result *residual, result *y, int n, int m, int k, int64_t x_stride, int64_t w_stride) {
    DYNAMIC_SHARED(unsigned char, memory);
    __shared__ Barrier full[STAGES], empty[STAGES];
    unsigned char *aligned = memory + (-shared_address(memory) & 1023);
    value *x_ring = reinterpret_cast<value *>(aligned), *w_ring = x_ring + STAGES * TILE_N * TILE_K;
    Place tile = place(n, m);
    int tiles = (k + TILE_K - 1) / TILE_K, warpgroup = threadIdx.x / 128;

    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&full[s], 32 * COPYING);
            barrier_init(&empty[s], 4 * MULTIPLYING);
        }
    __syncthreads();

    if (warpgroup == MULTIPLYING) {
        fewer_registers();
        int thread = threadIdx.x % 128, row = thread / ROW_CHUNKS, at = thread % ROW_CHUNKS * CHUNK;
        int x_rows = n - tile.row - row, w_rows = m - tile.column - row;  // from this thread's on
        x += (tile.row + row) * x_stride + at;
        w += (tile.column + row) * w_stride + at;
        for (int t = 0, slot = 0, parity = 1; t < tiles; t++) {
            barrier_wait(&empty[slot], parity);  // the first time round nobody has to arrive
            bool inside = t * TILE_K + at < k;
            copy_tile<TILE_N>(x_ring + slot * TILE_N * TILE_K, x + t * TILE_K, x_stride, x_rows, inside);
            copy_tile<TILE_M>(w_ring + slot * TILE_M * TILE_K, w + t * TILE_K, w_stride, w_rows, inside);
            barrier_arrive_after_copies(&full[slot]);
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
        commit_async();
        wait_async<0>();
        return;
    }

    more_registers();
    int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    uint64_t x_first = descriptor(x_ring + warpgroup * 64 * TILE_K), w_first = descriptor(w_ring);
    float sums[TILE_M / 2] = {};
    for (int t = 0, slot = 0, last = 0, parity = 0; t < tiles; t++) {
        barrier_wait(&full[slot], parity);
        fence_async_proxy();
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE_K / 16; step++)
            wgmma(sums, x_first + slot * (TILE_N * 128 >> 4) + step * 2,
                  w_first + slot * (TILE_M * 128 >> 4) + step * 2);
        wgmma_commit();
        wgmma_wait<1>();  // the tile before is read
        if (t && lane == 0) barrier_arrive(&empty[last]);
        last = slot;
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    sync_multiplying();  // nobody reads the ring any more

    float *own = reinterpret_cast<float *>(aligned) + warp_row * PITCH;
#pragma unroll
    for (int j = 0; j < TILE_M / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float2 two = {sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]};
            *reinterpret_cast<float2 *>(own + staged(lane / 4 + 8 * half, j * 8 + lane % 4 * 2)) = two;
        }
    __syncwarp();
#pragma unroll 4
    for (int p = lane; p < 16 * TILE_M / PIECE; p += 32) {
        int row = p / (TILE_M / PIECE), column = p % (TILE_M / PIECE) * PIECE;
        write_piece(own, staged(row, column), tile.row + warp_row + row, tile.column + column, bias, residual, y, n,
                    m);
    }
}
