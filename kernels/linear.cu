// linear: y = act(x w^T + bias) + residual                                reference.py::linear
// RESIDUAL_FIRST: y = act(x w^T + bias + residual)                        reference.py::conv2d
//
// x [N, K], w [M, K] values, rows x_stride and w_stride values apart; bias [M] float or null; residual and
// y [N, M] values, or floats with RESULT_F32; residual may be null, or y.
//
//                 M                     A block computes a tile of y. It walks K in steps of TILE_K; a ring
//          +----+----+----+             of STAGES tiles of x and w is filled in shared memory by cp.async,
//        K | w' |    |    |             STAGES - 1 ahead. A warp takes WARP_N x WARP_M of the tile: its sums
//          +----+----+----+             stay in registers, and ldmatrix fetches the fragments of the next 16
//      K                                of K while the tensor cores multiply the last.
//    +---+ +----+----+----+
//  N | x | | y  |    |    |             A row of a tile is TILE_K / 8 chunks of 16 bytes. Chunk c of row r
//    +---+ +----+----+----+             lies at c ^ (r % 8), or c ^ (r / 2 % 4) if a row has 4 chunks: the 8
//    |   | |    |    |    |             rows that ldmatrix reads at once are then in 8 different bank groups.
//
// The sums leave through shared memory, 16 rows of a warp at a time, so that y and residual move in 16-byte
// pieces, whole rows of the warp's tile. Blocks that run at once form a near-square of tiles (place): what
// they read of x and w stays in L2.
//
// For a few rows, reading w is all the work, and more blocks read faster: tiles are 16 or 32 rows high and
// narrow. Narrow tiles alone would leave one warp with a long chain of multiplications, so WARPS_K warps
// share the tile, each with its part of every TILE_K, and their sums are added at the end, in order. While
// the kernel before this one runs, w is on its way already (wait_for_previous): the first tiles to the ring,
// the rest to L2.
//
// f32: no tensor cores; 256 threads keep 4 x 4 sums each of a 64 x 64 tile, read as float4 along K.
//
// cost    2 N M K flop; 2 (N K + M K + N M) bytes. Bound by the tensor cores from N = 200 or so, by reading
//         w below
// order   y[n, m] is summed over k in an order that depends on the variant, not on N or on other rows
// launch  grid ceil(N / TILE_N) ceil(M / TILE_M), block 32 WARPS_N WARPS_M WARPS_K (f32: 256), shared as
//         npclip/cuda_linear.py says
// needs   any architecture from sm_75 on (bf16: sm_80); K, x_stride, w_stride multiples of CHUNK; x, w, bias,
//         residual, y at multiples of 16 bytes. TILE_N, TILE_M, TILE_K, STAGES, WARPS_N, WARPS_M, WARPS_K,
//         ACTIVATION (one of linear.cuh), RESIDUAL_FIRST and RESULT_F32 (0 or 1)

INLINE int next_slot(int slot) { return slot + 1 == STAGES ? 0 : slot + 1; }

#if DTYPE == F32
#define WARPS 8
#else
#define WARPS (WARPS_N * WARPS_M * WARPS_K)
#endif
#define ROW_CHUNKS (TILE_K / CHUNK)
#define ROWS_AT_ONCE (32 * WARPS / ROW_CHUNKS)  // that the block copies, a chunk per thread

static_assert(ROWS_AT_ONCE % 8 == 0 && TILE_N % ROWS_AT_ONCE == 0 && TILE_M % ROWS_AT_ONCE == 0,
              "all threads copy as much, and swizzle all rows alike");

INLINE int swizzle(int row) { return ROW_CHUNKS == 4 ? row / 2 % 4 : row % 8; }

// ROWS rows of a tile; from: what this thread copies of the first ROWS_AT_ONCE, of which rows are inside.
template <int ROWS>
INLINE void copy_tile(value *tile, const value *from, int64_t stride, int rows, bool inside) {
    int row = threadIdx.x / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS;
    value *to = tile + row * TILE_K + (chunk ^ swizzle(row)) * CHUNK;
#pragma unroll
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE)
        copy_async(to + i * TILE_K, from + i * stride, inside && i < rows);
}

#if DTYPE != F32

#define WARP_N (TILE_N / WARPS_N)
#define WARP_M (TILE_M / WARPS_M)
#define STEPS (TILE_K / 16 / WARPS_K)  // of K, that a warp takes of each tile
#define PITCH (WARP_M + 8)  // floats from one row of sums to the next in shared memory

static_assert(WARP_N % 16 == 0 && WARP_M % 16 == 0, "a warp multiplies 16 x 16");
static_assert(STEPS % 2 == 0, "the two sets of fragments take turns");

#if __CUDA_ARCH__ >= 1000 && TILE_N >= 32 && TILE_N * TILE_M <= 64 * 64
#define BOUNDS 32 * WARPS, 3  // else ptxas aims at 5 blocks and spills
#else
#define BOUNDS 32 * WARPS
#endif

// Where 4 sums lie among those of 16 rows: two neighbours change places in odd rows and in every second
// stretch of 32, so that neither the fragments written nor the rows read meet in a bank.
INLINE int staged(int row, int column) {
    int unit = column / 4;
    return row * PITCH + (unit ^ ((row ^ unit / 8) & 1)) * 4 + column % 4;
}

// PIECE columns of a row of y, from the sums of WARPS_K warps.
INLINE void write_piece(const float *sums, int at, int row, int column, const float *bias, const result *residual,
                        result *y, int n, int m) {
    if (row >= n || column >= m) return;
    float total[PIECE];
#pragma unroll
    for (int e = 0; e < PIECE; e += 4) {
        float4 sum = *reinterpret_cast<const float4 *>(sums + (at ^ e));
#pragma unroll
        for (int k = 1; k < WARPS_K; k++) {
            float4 more = *reinterpret_cast<const float4 *>(sums + k * 16 * PITCH + (at ^ e));
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
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

// What the first copies leave of this block's rows of w.
INLINE void prefetch_rows(const value *w, int64_t stride, int rows, int k) {
    const int line = 128 / sizeof(value), from = (STAGES - 1) * TILE_K;
    int lines = max(0, k - from + line - 1) / line;
    for (int i = threadIdx.x; i < min(rows, TILE_M) * lines; i += 32 * WARPS)
        prefetch(w + i / lines * stride + from + i % lines * line);
}

KERNEL(BOUNDS)
SYMBOL(linear)(const value *__restrict__ x, const value *__restrict__ w, const float *__restrict__ bias,
               const result *residual, result *y, int n, int m, int k, int64_t x_stride, int64_t w_stride) {
    DYNAMIC_SHARED(value, shared);
    value *x_ring = shared, *w_ring = shared + STAGES * TILE_N * TILE_K;
    Place tile = place(blockIdx.x, n, m, TILE_N, TILE_M);

    int copied_row = threadIdx.x / ROW_CHUNKS, copied_k = threadIdx.x % ROW_CHUNKS * CHUNK;
    int x_rows = n - tile.row - copied_row, w_rows = m - tile.column - copied_row;  // from this thread's on
    if (TILE_N <= 64) prefetch_rows(w + tile.column * w_stride, w_stride, m - tile.column, k);
    x += (tile.row + copied_row) * x_stride + copied_k;
    w += (tile.column + copied_row) * w_stride + copied_k;
    auto copy_x = [&](int slot, int from) {  // of K
        copy_tile<TILE_N>(x_ring + slot * TILE_N * TILE_K, x + from, x_stride, x_rows, from + copied_k < k);
    };
    auto copy_w = [&](int slot, int from) {
        copy_tile<TILE_M>(w_ring + slot * TILE_M * TILE_K, w + from, w_stride, w_rows, from + copied_k < k);
    };

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_k = warp % WARPS_K, warp_tile = warp / WARPS_K;
    int warp_row = warp_tile % WARPS_N * WARP_N, warp_column = warp_tile / WARPS_N * WARP_M;
    int a_row = lane % 16, a_chunk = (lane / 16) ^ swizzle(a_row);  // what ldmatrix wants of this lane
    int b_row = lane / 16 * 8 + lane % 8, b_chunk = (lane / 8 % 2) ^ swizzle(b_row);
    uint32_t a[2][WARP_N / 16][4], b[2][WARP_M / 16][4];
    auto fetch = [&](int set, int slot, int step) {
        const value *from_x = x_ring + (slot * TILE_N + warp_row + a_row) * TILE_K;
        const value *from_w = w_ring + (slot * TILE_M + warp_column + b_row) * TILE_K;
        int chunk = (warp_k * STEPS + step) * 2;
#pragma unroll
        for (int i = 0; i < WARP_N / 16; i++)
            ldmatrix_x4(a[set][i], from_x + i * 16 * TILE_K + (chunk ^ a_chunk) * CHUNK);
#pragma unroll
        for (int j = 0; j < WARP_M / 16; j++)
            ldmatrix_x4(b[set][j], from_w + j * 16 * TILE_K + (chunk ^ b_chunk) * CHUNK);
    };

    float sums[WARP_N / 16][WARP_M / 8][4] = {};
    int tiles = (k + TILE_K - 1) / TILE_K, full = 0, free = STAGES - 1;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        if (s < tiles) copy_w(s, s * TILE_K);
    wait_for_previous();  // which may compute x, but no weights
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < tiles) copy_x(s, s * TILE_K);
        commit_async();
    }
    wait_async<STAGES - 2>();
    __syncthreads();
    fetch(0, 0, 0);
    for (int t = 0; t < tiles; t++) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step == 0) {  // nobody reads the slot any more: all are past the last barrier
                int next = t + STAGES - 1;
                if (next < tiles) copy_x(free, next * TILE_K), copy_w(free, next * TILE_K);
                commit_async();
                free = next_slot(free);
            }
            if (step < STEPS - 1) {
                fetch((step + 1) % 2, full, step + 1);
            } else {
                full = next_slot(full);
                wait_async<STAGES - 2>();
                __syncthreads();
                if (t + 1 < tiles) fetch(0, full, 0);
            }
#pragma unroll
            for (int i = 0; i < WARP_N / 16; i++)
#pragma unroll
                for (int j = 0; j < WARP_M / 16; j++) {
                    const uint32_t(&f)[4] = b[step % 2][j];
                    mma_16816(sums[i][2 * j], a[step % 2][i], f[0], f[1]);
                    mma_16816(sums[i][2 * j + 1], a[step % 2][i], f[2], f[3]);
                }
        }
    }

    // The last barrier was passed after the last fetch: the ring is free.
    wait_async<0>();
    float *all = reinterpret_cast<float *>(shared) + warp_tile * WARPS_K * 16 * PITCH;
    float *own = all + warp_k * 16 * PITCH;
#pragma unroll
    for (int i = 0; i < WARP_N / 16; i++) {
        if (i && WARPS_K == 1) __syncwarp();
        if (i && WARPS_K > 1) __syncthreads();
#pragma unroll
        for (int j = 0; j < WARP_M / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 two = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
                *reinterpret_cast<float2 *>(own + staged(lane / 4 + 8 * half, j * 8 + lane % 4 * 2)) = two;
            }
        if (WARPS_K == 1) __syncwarp();
        if (WARPS_K > 1) __syncthreads();
        for (int p = warp_k * 32 + lane; p < 16 * WARP_M / PIECE; p += 32 * WARPS_K) {
            int row = p / (WARP_M / PIECE), column = p % (WARP_M / PIECE) * PIECE;
            write_piece(all, staged(row, column), tile.row + warp_row + i * 16 + row,
                        tile.column + warp_column + column, bias, residual, y, n, m);
        }
    }
}

#else  // F32

#define SIDE 16               // threads along each side of the tile
#define ROWS (TILE_N / SIDE)  // of this thread, SIDE apart, as its columns are
#define COLUMNS (TILE_M / SIDE)

// Chunk c of a row of a tile: 8 rows read at once are in 8 bank groups.
INLINE float4 load_four(const float *tile, int row, int c) {
    return *reinterpret_cast<const float4 *>(tile + row * TILE_K + (c ^ swizzle(row)) * CHUNK);
}

KERNEL(32 * WARPS)
SYMBOL(linear)(const value *__restrict__ x, const value *__restrict__ w, const float *__restrict__ bias,
               const result *residual, result *y, int n, int m, int k, int64_t x_stride, int64_t w_stride) {
    DYNAMIC_SHARED(value, shared);
    value *x_ring = shared, *w_ring = shared + STAGES * TILE_N * TILE_K;
    Place tile = place(blockIdx.x, n, m, TILE_N, TILE_M);

    int copied_row = threadIdx.x / ROW_CHUNKS, copied_k = threadIdx.x % ROW_CHUNKS * CHUNK;
    int x_rows = n - tile.row - copied_row, w_rows = m - tile.column - copied_row;  // from this thread's on
    x += (tile.row + copied_row) * x_stride + copied_k;
    w += (tile.column + copied_row) * w_stride + copied_k;
    auto copy = [&](int slot, int from) {  // of K
        bool inside = from + copied_k < k;
        copy_tile<TILE_N>(x_ring + slot * TILE_N * TILE_K, x + from, x_stride, x_rows, inside);
        copy_tile<TILE_M>(w_ring + slot * TILE_M * TILE_K, w + from, w_stride, w_rows, inside);
    };

    int row = threadIdx.x / SIDE, column = threadIdx.x % SIDE;
    float sums[ROWS][COLUMNS] = {};
    wait_for_previous();
    int tiles = (k + TILE_K - 1) / TILE_K, full = 0, free = STAGES - 1;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < tiles) copy(s, s * TILE_K);
        commit_async();
    }
    for (int t = 0; t < tiles; t++) {
        wait_async<STAGES - 2>();
        __syncthreads();
        if (t + STAGES - 1 < tiles) copy(free, (t + STAGES - 1) * TILE_K);
        commit_async();
        const float *from_x = x_ring + full * TILE_N * TILE_K, *from_w = w_ring + full * TILE_M * TILE_K;
#pragma unroll
        for (int chunk = 0; chunk < ROW_CHUNKS; chunk++) {
            float4 a[ROWS], b[COLUMNS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) a[i] = load_four(from_x, row + i * SIDE, chunk);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) b[j] = load_four(from_w, column + j * SIDE, chunk);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    sums[i][j] += a[i].x * b[j].x;
                    sums[i][j] += a[i].y * b[j].y;
                    sums[i][j] += a[i].z * b[j].z;
                    sums[i][j] += a[i].w * b[j].w;
                }
        }
        full = next_slot(full), free = next_slot(free);
    }
    wait_async<0>();

#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            int r = tile.row + row + i * SIDE, c = tile.column + column + j * SIDE;
            if (r < n && c < m) {
                int64_t at = (int64_t)r * m + c;
                y[at] = finish(sums[i][j], bias ? bias[c] : 0.0f, residual ? residual[at] : 0.0f);
            }
        }
}

#endif
