// similarity: s = queries rows^T, of stored embeddings                    reference.py::similarity
//
// queries [Q, D] f32, rows [N, D] f16 or f32 -> s [Q, N] f32, row-major. Rows are read once, where
// they lie: in a file that is mapped into memory, it may be, at any address.
//
//                  D ->
//                +-------+    A task is TASK rows, TILE_ROWS of them at a time. These come from memory
//      queries   |       |    for the first tile, a register of sums for each pair of one of them and
//                +-------+    one of TILE_QUERIES queries, and from L1 for the tiles with the other
//   TILE_ROWS  { | rows  |    queries. f16 is widened in registers, once a tile.
//
// cost    2 Q flop for 2 bytes (f16): bound by memory for less than about ten queries
// needs   avx2 or avx512
#include <math.h>
#include <string.h>

#include "gemm.h"

#define TILE_QUERIES 2
#if LANES == 16
#define TILE_ROWS 8  // 8x2 sums + 8 rows + 1 query = 25 of 32 zmm
#else
#define TILE_ROWS 4  // 4x2 sums + 4 rows + 1 query = 13 of 16 ymm
#endif
#define TASK 128     // 128 KiB of 512 f16: some 10 us

typedef struct {
    const float *queries;
    const char *rows;
    float *s;
    int64_t q, n, d;
    int cosine;
} Similarity;

// The first n of LANES values of a row; nothing beyond them is touched: it may not be mapped.
INLINE vf load_row(int format, const void *row, int64_t i, int n) {
    if (format == F32) return v_load_n((const float *)row + i, n);
    if (n == LANES) return v_from_f16((const uint16_t *)row + i);
    uint16_t bits[LANES] = {0};
    memcpy(bits, (const uint16_t *)row + i, n * sizeof *bits);
    return v_from_f16(bits);
}

INLINE void step(int format, int queries, const void *const rows[TILE_ROWS],
                 const float *const query[TILE_QUERIES], int64_t i, int n,
                 vf sums[TILE_QUERIES][TILE_ROWS]) {
    vf row[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) row[r] = load_row(format, rows[r], i, n);
    for (int j = 0; j < queries; j++) {
        vf value = v_load_n(query[j] + i, n);
        for (int r = 0; r < TILE_ROWS; r++) sums[j][r] = v_fma(row[r], value, sums[j][r]);
    }
}

// queries is a constant where this is inlined.
INLINE void tile(int format, int queries, int64_t d, const void *const rows[TILE_ROWS],
                 const float *const query[TILE_QUERIES], float s[TILE_QUERIES][TILE_ROWS]) {
    vf sums[TILE_QUERIES][TILE_ROWS];
    for (int j = 0; j < queries; j++)
        for (int r = 0; r < TILE_ROWS; r++) sums[j][r] = v_zero();
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) step(format, queries, rows, query, i, LANES, sums);
    if (i < d) step(format, queries, rows, query, i, (int)(d - i), sums);
    for (int j = 0; j < queries; j++)
        for (int r = 0; r < TILE_ROWS; r++) s[j][r] = v_sum(sums[j][r]);
}

// 1 / |row|, and 0 for a row of zeros
INLINE float inverse_length(int format, const void *row, int64_t d) {
    vf sum = v_zero();
    for (int64_t i = 0; i < d; i += LANES) {
        vf x = load_row(format, row, i, lanes_left(d - i));
        sum = v_fma(x, x, sum);
    }
    float square = v_sum(sum);
    return square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
}

// TILE_ROWS rows from the first on, those before the end, with all queries
INLINE void run_tiles(int format, const Similarity *p, int64_t first, int64_t end) {
    const void *rows[TILE_ROWS];
    float scale[TILE_ROWS], s[TILE_QUERIES][TILE_ROWS];
    int count = (int)smaller(TILE_ROWS, end - first);
    for (int r = 0; r < TILE_ROWS; r++) {  // the last row stands for those beyond it
        int64_t row = smaller(first + r, end - 1);
        rows[r] = p->rows + row * p->d * size_of(format);
        scale[r] = p->cosine ? inverse_length(format, rows[r], p->d) : 1.0f;
    }
    for (int64_t q = 0; q < p->q; q += TILE_QUERIES) {
        int queries = (int)smaller(TILE_QUERIES, p->q - q);
        const float *query[TILE_QUERIES];
        for (int j = 0; j < queries; j++) query[j] = p->queries + (q + j) * p->d;
        if (queries == TILE_QUERIES) tile(format, TILE_QUERIES, p->d, rows, query, s);
        else tile(format, 1, p->d, rows, query, s);
        for (int j = 0; j < queries; j++)
            for (int r = 0; r < count; r++) p->s[(q + j) * p->n + first + r] = s[j][r] * scale[r];
    }
}

INLINE void run(int format, const Similarity *p, int64_t task) {
    int64_t end = smaller(p->n, (task + 1) * TASK);
    for (int64_t row = task * TASK; row < end; row += TILE_ROWS) run_tiles(format, p, row, end);
}

static void run_f16(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    run(F16, arguments, task);
}

static void run_f32(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    run(F32, arguments, task);
}

EXPORT void SYMBOL(similarity_f16)(const float *queries, const void *rows, float *s, int64_t q,
                                   int64_t n, int64_t d, int cosine) {
    Similarity p = {.queries = queries, .rows = rows, .s = s, .q = q, .n = n, .d = d, .cosine = cosine};
    parallel_for(run_f16, &p, ceil_div(n, TASK));
}

EXPORT void SYMBOL(similarity_f32)(const float *queries, const void *rows, float *s, int64_t q,
                                   int64_t n, int64_t d, int cosine) {
    Similarity p = {.queries = queries, .rows = rows, .s = s, .q = q, .n = n, .d = d, .cosine = cosine};
    parallel_for(run_f32, &p, ceil_div(n, TASK));
}
