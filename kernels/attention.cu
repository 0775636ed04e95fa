// attention: o = softmax(q k^T / sqrt(Dh)) v, per sequence and head       reference.py::attention
// attention_pool: the same with one query per sequence, which sees all of it   reference.py::attention_pool
//
// qkv [N, 3, H, Dh], read in place -> o [N, H, Dh]; pool: q [B, H, Dh], kv [N, 2, H, Dh] -> o [B, H, Dh].
// All are values. Sequence b is rows cu_seqlens[b] .. cu_seqlens[b+1], int32; it may be empty. No row outside
// a sequence is read or written. causal: a token sees no later one. scale is log2(e) / sqrt(Dh): exp(x) is
// exp2 of a score times that. Sums and exponentials are float; for the tensor cores (SHORT, LONG) the weights
// exp(s - max) are rounded to values.
//
//            BLOCK keys at a time          A block has a head of a sequence, or a tile of its queries; each of
//          +------+------+------+          its warps has QUERIES of them (16 M), whose scores never leave the
//          | k^T  |      |      |          registers: the accumulators of s, rounded, are what the next
//          +------+------+------+          mma wants as its left operand.
//    +---+ +------+------+------+  +---+
//    | q | |  s   |      |      | x| v |   SHORT  all keys at once (KEYS of them), plain softmax.
// 16 +---+ +------+------+------+  |   |   LONG   key blocks in turn, the next one being copied meanwhile, and
// M  | q | |      |      |      |  |   |          STEP keys at a time; at the end of a sequence, and where a
//    +---+ +------+------+------+  +---+          causal mask cuts, 16, masked.
//
//   LONG's weights are exp2 of a score less the largest one of its row when that was last looked for: at the first
//   keys, and wherever a weight of the warp's rows would be above 2^LIMIT. Then what was summed is rescaled. So few
//   steps pay for a new maximum. Order of summation: keys in order, 16 to an mma; the weights in four sums, of the
//   keys that are 0 and 1, 2 and 3, 4 and 5, 6 and 7 modulo 8.
//
//   PLAIN  no tensor cores: float, or rows that are not whole chunks. A warp has 4 queries, a lane a key.
//   POOL   k and v are read once, straight into registers: LANES lanes have a key, a chunk each, and every
//          group of lanes a softmax of its own, which are merged at the end.
//
// Rows in shared memory are DEPTH + 8 values long, an odd number of chunks: 8 rows, as ldmatrix reads them,
// lie in different banks. They are filled up with zeros to DEPTH, a multiple of 16.
//
// Bank conflicts: ldmatrix has none. Where DEPTH is 64 or 128, SHORT and LONG have none at all. At other widths 8
// lanes that copy 8 neighbouring chunks may cross into the next row, past its gap, where the last meets the first:
// at most one cycle for each row that is copied or stored. For a head at T = 257 and Dh = 80 that is 2232 cycles,
// beside 11560 of ldmatrix. Copying by columns would have none, but access memory in pieces of 32 bytes. POOL's
// merging has less than Dh a head.
//
// cost    4 T^2 Dh flop (causal: half) and T^2 exps per head; SHORT and POOL read every value once and are
//         bound by memory. LONG reads k and v once per tile, from L2. For 16 x 16 scores with Dh = 64 a
//         warp issues 16 mma, 8 / M ldmatrix, 8 ex2 and about 36 others. M = 1 is bound by ldmatrix, 4 clocks of an
//         SM each; M = 2 by tensor cores; up to T = 257 memory is not far behind.
// launch  SHORT  grid B H, block 2 KEYS, shared 3 KEYS (DEPTH + 8) values
//         LONG   grid B H tiles, block 32 WARPS (WARPS QUERIES queries), shared 2 STAGES BLOCK (DEPTH + 8) values
//         PLAIN  grid B H tiles, block 256 (32 queries), shared PLAIN_FLOATS floats
//         POOL   grid B H, block 128, shared 4 (Dh + 2) floats
// needs   SHORT, LONG: 16-bit values (bf16: sm_80), Dh a multiple of 8; they fit in the 64 KB of sm_75.
//         All: Dh <= 128; no sequence longer than KEYS, or than all tiles together; one sequence at least.
//         #defines: VARIANT, HEAD_WIDTH; KEYS (SHORT); QUERIES, WARPS, STEP (LONG)

#define SHORT 1
#define LONG 2
#define PLAIN 3
#define POOL 4

// What a block works on: rows first .. first + length of one head.
struct Work {
    int sequence, head, tile, first, length;
};

INLINE Work this_work(const int32_t *cu_seqlens, int heads, int tiles) {
    int i = blockIdx.x / tiles, sequence = i / heads, first = cu_seqlens[sequence];
    return {sequence, i % heads, (int)(blockIdx.x % tiles), first, cu_seqlens[sequence + 1] - first};
}

#if VARIANT == SHORT || VARIANT == LONG

#define DEPTH ((HEAD_WIDTH + 15) / 16 * 16)
#define STRIDE (DEPTH + 8)
#if VARIANT == SHORT
#define THREADS (2 * KEYS)
#define QUERIES 16  // of a warp
#define REGISTERS (DEPTH <= 64 ? 96 : DEPTH <= 112 ? 128 : 160)
#if __CUDA_ARCH__ >= 800
#define BOUNDS THREADS, 65536 / REGISTERS / THREADS  // else some compilers want more, or spill for fewer
#else
#define BOUNDS THREADS, 1  // shared memory has no room for more
#endif
#else
#define THREADS (32 * WARPS)
#define BLOCK (DEPTH > 112 ? 32 : 64)  // two of k and two of v fit in the 64 KB of sm_75
#define STAGES 2
#define REGISTERS (STEP > 16 || DEPTH > 112 ? 255 : 168)
#if __CUDA_ARCH__ == 750
#define SHARED (64 << 10)  // bytes of an SM
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
#define SHARED (100 << 10)
#elif __CUDA_ARCH__ < 900
#define SHARED (164 << 10)
#else
#define SHARED (228 << 10)
#endif
#define FIT (SHARED / (4 * STAGES * BLOCK * STRIDE + 1024))  // blocks of an SM, by shared memory
#define BOUNDS THREADS, (65536 / REGISTERS / THREADS < FIT ? 65536 / REGISTERS / THREADS : FIT)
#endif
#define LIMIT 8.0f

#define COLUMNS (DEPTH / 8)         // chunks of a row in shared memory; a thread copies one column
#define STRIPE (THREADS / COLUMNS)  // rows that are copied at once

// Starts to copy a head's part of `rows` rows, at most MOST; from row `inside` on, zeros.
template <int MOST>
INLINE void copy_rows(value *to, const value *from, int row, int inside, int rows) {
    int r = threadIdx.x / COLUMNS, c = threadIdx.x % COLUMNS;
    from += (int64_t)r * row + c * 8, to += r * STRIDE + c * 8;
    if (THREADS % COLUMNS && r >= STRIPE) return;
#pragma unroll
    for (int i = 0; i < MOST; i += STRIPE)
        if (i + r < rows)
            copy_async(to + i * STRIDE, from + (int64_t)i * row, i + r < inside && c < HEAD_WIDTH / 8);
}

// 16 M queries as left operands of mma, zeros beyond those that exist.
template <int M>
struct Queries {
    uint32_t fragment[M][DEPTH / 16][4];

    INLINE void load_shared(const value *q) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < DEPTH / 16; k++)
                ldmatrix_x4(fragment[m][k], q + (16 * m + lane % 16) * STRIDE + k * 16 + lane / 16 * 8);
    }

    INLINE void load_global(const value *q, int row, int rows) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = 16 * m + i % 2 * 8 + lane / 4;
                const value *from = q + (int64_t)r * row + i / 2 * 8 + lane % 4 * 2;
#pragma unroll
                for (int k = 0; k < DEPTH / 16; k++) {
                    bool exists = r < rows && k * 16 + i / 2 * 8 < HEAD_WIDTH;
                    fragment[m][k][i] = exists ? *reinterpret_cast<const uint32_t *>(from + k * 16) : 0;
                }
            }
    }
};

// Of each 16 queries, a lane has parts of rows lane / 4 and lane / 4 + 8: those of s[..][0, 1] and of
// s[..][2, 3], which are columns 8 n + 2 (lane % 4) and the next.
template <int M, int N>
struct Scores {
    float s[M][N / 8][4];
    uint32_t weights[M][N / 8][2];  // two values of row lane / 4, two of row lane / 4 + 8

    // q k^T with N keys. Unless WHOLE, only the groups of 16 keys that begin before `seen`.
    template <bool WHOLE>
    INLINE void multiply(const Queries<M> &q, const value *keys, int seen) {
        int lane = threadIdx.x % 32;
        const value *row = keys + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[m][n][j] = 0.0f;
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
            for (int n = 0; n < N / 16; n++)
                if (WHOLE || 16 * n < seen) {
                    uint32_t b[4];
                    ldmatrix_x4(b, row + n * 16 * STRIDE + k * 16);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        mma_16816(s[m][2 * n], q.fragment[m][k], b[0], b[1]);
                        mma_16816(s[m][2 * n + 1], q.fragment[m][k], b[2], b[3]);
                    }
                }
    }

    // Row r sees the first end + r * slope of these keys, but at most `most`.
    INLINE void mask(int most, int end, int slope) {
        int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int sees = min(most, end + (16 * m + lane / 4 + j / 2 * 8) * slope);
#pragma unroll
                for (int n = 0; n < N / 8; n++)
                    if (8 * n + column + j % 2 >= sees) s[m][n][j] = -INFINITY;
            }
    }

    // The largest of row lane / 4 + 8 i that this lane has.
    INLINE float largest(int m, int i) const {
        float x = s[m][0][2 * i];
#pragma unroll
        for (int n = 0; n < N / 8; n++) x = fmaxf(x, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
        return x;
    }
};

// The softmax of 16 M rows and their sums of weighted values, over the keys so far. A weight is
// exp2(score * scale + shift), at most 2^LIMIT; -shift is the largest score * scale of some keys so far.
template <int M>
struct Sums {
    float shift[M][2], weights[M][2];  // weights: what this lane's columns add to the sum
    float o[M][HEAD_WIDTH / 8][4];

    INLINE void clear() {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) shift[m][i] = INFINITY, weights[m][i] = 0.0f;
#pragma unroll
            for (int n = 0; n < HEAD_WIDTH / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) o[m][n][j] = 0.0f;
        }
    }

    // Whether a weight in one of the warp's rows would be above 2^LIMIT.
    template <int N>
    INLINE bool exceeded(const Scores<M, N> &scores, float scale) const {
        bool any = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) any |= fmaf(scores.largest(m, i), scale, shift[m][i]) > LIMIT;
        return __any_sync(0xffffffffu, any);
    }

    // Makes the largest weight so far 1; returns by which factors that scales o. A row sees one of the first
    // keys at least, so shift is finite from then on.
    template <int N>
    INLINE void raise(const Scores<M, N> &scores, float scale, float (&factors)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = scores.largest(m, i);
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
                x = fminf(-x * scale, shift[m][i]);
                factors[m][i] = exp2_fast(x - shift[m][i]);
                shift[m][i] = x;
                weights[m][i] *= factors[m][i];
            }
    }

    INLINE void rescale(const float (&factors)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < HEAD_WIDTH / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) o[m][n][j] *= factors[m][j / 2];
    }

    // The weights, whose sum is that of the rounded ones: then a single large one errs by nothing.
    template <int N>
    INLINE void exponentials(Scores<M, N> &scores, float scale) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float e[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) e[j] = exp2_fast(fmaf(scores.s[m][n][2 * i + j], scale, shift[m][i]));
                    uint32_t both = scores.weights[m][n][i] = pack(e[0], e[1]);
                    const value *rounded = reinterpret_cast<const value *>(&both);
                    weights[m][i] += to_float(rounded[0]) + to_float(rounded[1]);
                }
    }

    // o += s v; the groups of 16 keys as in Scores::multiply
    template <bool WHOLE, int N>
    INLINE void add(const Scores<M, N> &scores, const value *values, int seen) {
        int lane = threadIdx.x % 32;
        const value *row = values + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < N / 16; k++)
            if (WHOLE || 16 * k < seen) {
                uint32_t a[M][4];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) a[m][i] = scores.weights[m][2 * k + i / 2][i % 2];
#pragma unroll
                for (int n = 0; n < HEAD_WIDTH / 8; n += 2) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, row + k * 16 * STRIDE + n * 8);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        mma_16816(o[m][n], a[m], b[0], b[1]);
                        if (n + 1 < HEAD_WIDTH / 8) mma_16816(o[m][n + 1], a[m], b[2], b[3]);
                    }
                }
            }
    }

    // o / sum of the weights, of the first `rows` rows, by way of 16 rows of shared memory that only this warp
    // uses: so that lanes store whole chunks.
    INLINE void store(value *to, int row, int rows, value *shared) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < M; m++) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float sum = weights[m][i];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                float factor = 1.0f / sum;
                value *part = shared + (lane / 4 + 8 * i) * STRIDE + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < HEAD_WIDTH / 8; n++)
                    *reinterpret_cast<uint32_t *>(part + n * 8) =
                        pack(o[m][n][2 * i] * factor, o[m][n][2 * i + 1] * factor);
            }
            __syncwarp();
            int count = min(16, rows - 16 * m);
            for (int i = lane; i < count * (HEAD_WIDTH / 8); i += 32) {
                int r = i / (HEAD_WIDTH / 8), c = i % (HEAD_WIDTH / 8);
                store_chunk(to + (int64_t)(16 * m + r) * row + c * 8, load_chunk(shared + r * STRIDE + c * 8));
            }
        }
    }
};

#endif

#if VARIANT == SHORT

KERNEL(BOUNDS)
SYMBOL(attention_short)(const value *__restrict__ qkv, const int32_t *__restrict__ cu_seqlens,
                        value *__restrict__ o, int heads, int causal, float scale) {
    wait_for_previous();
    DYNAMIC_SHARED(value, q);
    value *k = q + KEYS * STRIDE, *v = k + KEYS * STRIDE;
    Work work = this_work(cu_seqlens, heads, 1);
    if (work.length <= 0) return;
    int width = heads * HEAD_WIDTH, row = 3 * width;  // values of a token in o and in qkv
    const value *from = qkv + (int64_t)work.first * row + work.head * HEAD_WIDTH;
    int rows = (work.length + 15) / 16 * 16;
    copy_rows<KEYS>(q, from, row, work.length, rows);
    copy_rows<KEYS>(k, from + width, row, work.length, rows);
    commit_async();
    copy_rows<KEYS>(v, from + 2 * width, row, work.length, rows);
    commit_async();

    int first = threadIdx.x / 32 * 16;  // this warp's first query
    bool has_rows = first < work.length;
    int seen = causal ? min(work.length, first + 16) : work.length;
    Scores<1, KEYS> scores;
    Sums<1> sums;
    wait_async<1>();
    __syncthreads();
    if (has_rows) {
        Queries<1> queries;
        queries.load_shared(q + first * STRIDE);
        scores.multiply<false>(queries, k, seen);
        scores.mask(work.length, causal ? first + 1 : work.length, causal);
        float unused[1][2];
        sums.clear();
        sums.raise(scores, scale, unused);
        sums.exponentials(scores, scale);
    }
    wait_async<0>();
    __syncthreads();
    if (!has_rows) return;
    sums.add<false>(scores, v, seen);
    value *to = o + (int64_t)(work.first + first) * width + work.head * HEAD_WIDTH;
    sums.store(to, width, work.length - first, q + first * STRIDE);
}

#elif VARIANT == LONG

#define ROWS (QUERIES * WARPS)  // queries of a block

KERNEL(BOUNDS)
SYMBOL(attention_long)(const value *__restrict__ qkv, const int32_t *__restrict__ cu_seqlens,
                       value *__restrict__ o, int heads, int tiles, int causal, float scale) {
    wait_for_previous();
    DYNAMIC_SHARED(value, shared);
    Work work = this_work(cu_seqlens, heads, tiles);
    if (work.tile * ROWS >= work.length) return;
    int width = heads * HEAD_WIDTH, row = 3 * width;  // values of a token in o and in qkv
    const value *from = qkv + (int64_t)work.first * row + work.head * HEAD_WIDTH;
    int first = work.tile * ROWS + threadIdx.x / 32 * QUERIES;  // this warp's first query
    int end = causal ? min(work.length, (work.tile + 1) * ROWS) : work.length;  // of the keys for this block

    // Key block i: k, then v, in one of STAGES buffers.
    auto copy_block = [&](int i) {
        int keys = end - i * BLOCK, rows = min(BLOCK, (keys + 15) / 16 * 16);
        value *to = shared + i % STAGES * (2 * BLOCK * STRIDE);
        const value *k = from + width + (int64_t)(i * BLOCK) * row;
        copy_rows<BLOCK>(to, k, row, keys, rows);
        copy_rows<BLOCK>(to + BLOCK * STRIDE, k + width, row, keys, rows);
        commit_async();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_block(i);
    Queries<QUERIES / 16> queries;
    queries.load_global(from + (int64_t)first * row, row, work.length - first);
    Sums<QUERIES / 16> sums;
    sums.clear();

    auto softmax = [&](auto &scores, const value *v) {
        if (sums.exceeded(scores, scale)) {
            float factors[QUERIES / 16][2];
            sums.raise(scores, scale, factors);
            sums.rescale(factors);
        }
        sums.exponentials(scores, scale);
        sums.add<true>(scores, v, 0);
    };
#pragma unroll 1
    for (int i = 0; i * BLOCK < end; i++) {
        wait_async<STAGES - 2>();
        __syncthreads();  // block i is there, and nobody reads the buffer before it any more
        copy_block(i + STAGES - 1);
        // Of these keys, one of this warp's rows sees the first `seen`, all of them see the first `clear`.
        int before = i * BLOCK, seen = min(BLOCK, end - before), clear = seen;
        if (causal) seen = min(seen, first + QUERIES - before), clear = min(seen, first + 1 - before);
        if (first >= work.length) seen = clear = 0;
        const value *block = shared + i % STAGES * (2 * BLOCK * STRIDE);
        int key = 0;
#pragma unroll 1
        for (; key + STEP <= clear; key += STEP) {
            Scores<QUERIES / 16, STEP> scores;
            scores.multiply<true>(queries, block + key * STRIDE, 0);
            softmax(scores, block + (BLOCK + key) * STRIDE);
        }
#pragma unroll 1
        for (; key < seen; key += 16) {
            Scores<QUERIES / 16, 16> scores;
            scores.multiply<true>(queries, block + key * STRIDE, 0);
            scores.mask(end - before - key, causal ? first + 1 - before - key : BLOCK, causal);
            softmax(scores, block + (BLOCK + key) * STRIDE);
        }
    }
    __syncthreads();
    if (first >= work.length) return;
    value *to = o + (int64_t)(work.first + first) * width + work.head * HEAD_WIDTH;
    sums.store(to, width, work.length - first, shared + threadIdx.x / 32 * 16 * STRIDE);
}

#elif VARIANT == PLAIN

#define THREADS 256
#define BOUNDS THREADS, 2                 // two blocks; else some compilers spill for more
#define EACH 4                            // queries of a warp
#define ROWS (THREADS / 32 * EACH)        // queries of a block
#define COLUMNS ((HEAD_WIDTH + 31) / 32)  // of o, that a lane has
#define Q_STRIDE ((HEAD_WIDTH + 3) / 4 * 4)
#define K_STRIDE (Q_STRIDE + 1)           // odd: 32 keys lie in different banks
#define V_STRIDE (32 * COLUMNS)
#define PLAIN_FLOATS (ROWS * Q_STRIDE + 32 * V_STRIDE + ROWS * 32 + 32 * K_STRIDE)

// A head's part of `rows` rows as floats; from row `inside` and column HEAD_WIDTH on, zeros.
template <int ROW, int COUNT>
INLINE void load_rows(float *to, const value *from, int row, int inside, int rows) {
    for (int i = threadIdx.x; i < rows * COUNT; i += THREADS) {
        int r = i / COUNT, c = i % COUNT;
        to[r * ROW + c] = r < inside && c < HEAD_WIDTH ? to_float(from[r * row + c]) : 0.0f;
    }
}

KERNEL(BOUNDS)
SYMBOL(attention_plain)(const value *__restrict__ qkv, const int32_t *__restrict__ cu_seqlens,
                        value *__restrict__ o, int heads, int tiles, int causal, float scale) {
    wait_for_previous();
    DYNAMIC_SHARED(float, q);
    float *v = q + ROWS * Q_STRIDE, *weights = v + 32 * V_STRIDE, *k = weights + ROWS * 32;
    Work work = this_work(cu_seqlens, heads, tiles);
    int tile = work.tile * ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (tile >= work.length) return;
    int width = heads * HEAD_WIDTH, row = 3 * width;  // values of a token in o and in qkv
    const value *from = qkv + (int64_t)work.first * row + work.head * HEAD_WIDTH;
    load_rows<Q_STRIDE, Q_STRIDE>(q, from + (int64_t)tile * row, row, work.length - tile, ROWS);
    int first = tile + warp * EACH, end = causal ? min(work.length, tile + ROWS) : work.length;
    float4 *mine = reinterpret_cast<float4 *>(weights) + warp * 32;  // [32 keys][EACH]
    const float4 *rows = reinterpret_cast<const float4 *>(q + warp * EACH * Q_STRIDE);

    float most[EACH], sum[EACH], total[EACH][COLUMNS];
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        most[r] = -INFINITY, sum[r] = 0.0f;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) total[r][j] = 0.0f;
    }
    for (int before = 0; before < end; before += 32) {
        const value *keys = from + width + (int64_t)before * row;
        load_rows<K_STRIDE, Q_STRIDE>(k, keys, row, end - before, 32);
        load_rows<V_STRIDE, V_STRIDE>(v, keys + width, row, end - before, 32);
        __syncthreads();
        float s[EACH] = {};
#pragma unroll 4
        for (int d = 0; d < Q_STRIDE; d += 4) {
            const float *key = k + lane * K_STRIDE + d;
#pragma unroll
            for (int r = 0; r < EACH; r++) {
                float4 x = rows[(r * Q_STRIDE + d) / 4];
                s[r] += x.x * key[0] + x.y * key[1] + x.z * key[2] + x.w * key[3];
            }
        }
#pragma unroll
        for (int r = 0; r < EACH; r++) {
            int sees = causal ? min(work.length, first + r + 1) : work.length;
            if (before + lane >= sees) s[r] = -INFINITY;
            float x = fmaxf(most[r], warp_max(s[r])), factor = exp2_fast((most[r] - x) * scale);
            most[r] = x;
            s[r] = exp2_fast((s[r] - x) * scale);
            sum[r] = sum[r] * factor + s[r];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) total[r][j] *= factor;
        }
        mine[lane] = make_float4(s[0], s[1], s[2], s[3]);
        __syncwarp();
#pragma unroll 4
        for (int t = 0; t < 32; t++) {
            float4 w = mine[t];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                float x = v[t * V_STRIDE + j * 32 + lane];
                total[0][j] += w.x * x, total[1][j] += w.y * x, total[2][j] += w.z * x, total[3][j] += w.w * x;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        float factor = 1.0f / warp_sum(sum[r]);
        value *to = o + (int64_t)(work.first + first + r) * width + work.head * HEAD_WIDTH;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            int c = j * 32 + lane;
            if (first + r < work.length && c < HEAD_WIDTH) to[c] = from_float(total[r][j] * factor);
        }
    }
}

#elif VARIANT == POOL

#define WARPS 4
#define STEP (HEAD_WIDTH % CHUNK == 0 ? CHUNK : 1)  // values that a lane reads at once
#define PIECES (HEAD_WIDTH / STEP)
#define LANES (PIECES > 16 ? 32 : PIECES > 8 ? 16 : PIECES > 4 ? 8 : PIECES > 2 ? 4 : PIECES)  // of a key
#define EACH ((PIECES + LANES - 1) / LANES)                                                    // pieces of a lane
#define GROUPS (32 * WARPS / LANES)
#define DEPTH 4        // keys of a group under way
#define LOWEST -3e38f  // as -inf, but the difference of two is 0

struct Piece {  // a lane's part of a row
    value v[EACH][STEP];

    INLINE void load(const value *row, bool exists) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int piece = threadIdx.x % LANES + i * LANES;
            bool inside = exists && piece < PIECES;
            if (STEP == 1) {
                v[i][0] = inside ? row[piece] : from_float(0.0f);
            } else {
                Chunk c = {};
                if (inside) c = load_chunk(row + piece * STEP);
#pragma unroll
                for (int e = 0; e < STEP; e++) v[i][e] = c.v[e];
            }
        }
    }
};

KERNEL(32 * WARPS)
SYMBOL(attention_pool)(const value *__restrict__ q, const value *__restrict__ kv,
                       const int32_t *__restrict__ cu_seqlens, value *__restrict__ o, int heads, float scale) {
    wait_for_previous();
    DYNAMIC_SHARED(float, shared);  // [WARPS][HEAD_WIDTH], then the largest scores and the sums of weights
    float *highest = shared + WARPS * HEAD_WIDTH, *weights = highest + WARPS;
    Work work = this_work(cu_seqlens, heads, 1);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = threadIdx.x / LANES;
    int width = heads * HEAD_WIDTH;
    int64_t at = (int64_t)work.sequence * width + work.head * HEAD_WIDTH;
    const value *keys = kv + (int64_t)work.first * 2 * width + work.head * HEAD_WIDTH;
    Piece query;
    query.load(q + at, true);

    float most = LOWEST, sum = 0.0f, total[EACH][STEP] = {};
    for (int before = 0; before < work.length; before += DEPTH * GROUPS) {
        Piece k[DEPTH], v[DEPTH];
        float s[DEPTH] = {}, x = most;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            int t = before + d * GROUPS + group;
            const value *key = keys + (int64_t)t * 2 * width;
            k[d].load(key, t < work.length);
            v[d].load(key + width, t < work.length);
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int e = 0; e < STEP; e++) s[d] += to_float(query.v[i][e]) * to_float(k[d].v[i][e]);
#pragma unroll
            for (int offset = LANES / 2; offset; offset /= 2) s[d] += __shfl_xor_sync(0xffffffffu, s[d], offset);
            if (before + d * GROUPS + group >= work.length) s[d] = -INFINITY;
            x = fmaxf(x, s[d]);
        }
        float factor = exp2_fast((most - x) * scale);
        most = x;
        sum *= factor;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            s[d] = exp2_fast((s[d] - x) * scale);
            sum += s[d];
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int e = 0; e < STEP; e++) {
                total[i][e] *= factor;
#pragma unroll
                for (int d = 0; d < DEPTH; d++) total[i][e] += s[d] * to_float(v[d].v[i][e]);
            }
    }

    float x = warp_max(most), factor = exp2_fast((most - x) * scale);
    sum = warp_sum(sum * factor) / LANES;  // every lane of a group has the group's
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int e = 0; e < STEP; e++) {
            float part = total[i][e] * factor;
#pragma unroll
            for (int offset = LANES; offset < 32; offset *= 2) part += __shfl_xor_sync(0xffffffffu, part, offset);
            int piece = lane + i * LANES;
            if (lane < LANES && piece < PIECES) shared[warp * HEAD_WIDTH + piece * STEP + e] = part;
        }
    if (lane == 0) highest[warp] = x, weights[warp] = sum;
    __syncthreads();
    if (threadIdx.x >= HEAD_WIDTH) return;
    x = fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3]));
    float all = 0.0f, result = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float factor = exp2_fast((highest[w] - x) * scale);
        all += weights[w] * factor;
        result += shared[w * HEAD_WIDTH + threadIdx.x] * factor;
    }
    o[at + threadIdx.x] = from_float(all == 0.0f ? 0.0f : result / all);  // 0 if there are no keys
}

#endif
