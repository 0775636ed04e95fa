// gemm: y = act(x w^T + bias) + residual                                  reference.py::linear
//
// x [N, K], as pack_a gives it; w [M, K] packed at load; y [N, M], row-major; x and y are f32, or bf16
// for avx512_bf16 and amx
//
//              M: a task takes NC columns,       A task is MC rows x NC columns of y. It walks K in
//              panels of NR                      slices of KC; those of x are copied into scratch, in
//            +----+----+----+----+               rows of LDA, which no two share a cache set; w was
//       K KC | w' |    |    |    |               packed when it was loaded.
//            +----+----+----+----+
//      KC                                        The micro-kernel keeps MR x NR sums in registers and
//    +----+  +----+----+----+----+               adds the products of one k after another. A slice's
// MR | x  |  | y  |    |    |    |               sums are added in scratch, in the order of k; y is
//    +----+  +----+----+----+----+               written once, after bias, activation and residual.
//
// cost    2 N M K flop; reads w once per MC rows. Bound by the FMA units for N > 50, by reading w
//         from memory (2 or 4 bytes a weight) below.
// order   y[n, m] is summed over k in KC-slices, each in turn from its first k to its last, whatever
//         N, the blocks and the threads are: a row's result has the same bits in every batch.
// needs   avx2 or avx512; avx512_bf16 multiplies pairs of bfloat16 (vdpbf16ps), w being packed
//         [M / NR][K / 2][NR][2]; amx does so in tiles (tdpbf16ps), and reads the same layouts
#include <string.h>

#include "gemm.h"

#define NC 512             // columns of a block at most: MC x NC sums are 393 KB, in L2
#define SMALL (256 << 10)  // bytes of weights that stay in L2: y is then written row by row
#define TASKS_A_THREAD 4   // enough to even out threads of different speed

// The scratch of a thread: x's rows packed over all of K, the rows that tiles read beyond them, the sums
// of a block over the slices so far, and one widened slice of a weight panel.
#define SLICE_BYTES (KC * NR * 4)
#define SUMS_BYTES (MC * NC * 4)
#define PACKED_BYTES (SCRATCH_BYTES - SUMS_BYTES - SLICE_BYTES - MR * LDA * 4)

typedef struct {
    Gemm g;
    int64_t rows, cols;         // of a block
    int64_t row_blocks, col_blocks;
} Plan;

// Where a tile is in y, and in K.
typedef struct {
    int64_t row, col;
    float *sums;  // [mr][NR]: of the slices before this one
    int first, last;
} Place;

// y = act(sums + acc + bias) + residual of a tile: the constants are where this is inlined.
INLINE void finish(const Gemm *g, int mr, Place at, vf acc[MR][NV], int activation, int format,
                   int whole) {
    for (int v = 0; v < NV; v++) {
        int64_t c = at.col + v * LANES;
        int n = whole ? LANES : lanes_left(g->m - c);
        if (n == 0) return;
        vf bias = g->bias ? v_load_n(g->bias + c, n) : v_zero();
        for (int i = 0; i < mr; i++) {
            int64_t y = (at.row + i) * g->m + c;
            vf sum = acc[i][v];
            if (!at.first) sum = v_add(v_load(at.sums + i * NR + v * LANES), sum);
            vf r = g->residual ? load_n(format, g->residual, y, n) : v_zero();
            sum = v_add(sum, bias);
            if (g->residual_first) sum = v_add(sum, r);
            sum = activate(activation, sum);
            if (!g->residual_first) sum = v_add(sum, r);
            store_n(format, g->y, y, sum, n);
        }
    }
}

static void __attribute__((noinline)) finish_any(const Gemm *g, int mr, Place at, vf acc[MR][NV]) {
    int whole = at.col + NR <= g->m;
#define CASE(activation)                                                                        \
    case activation:                                                                            \
        if (!whole) finish(g, mr, at, acc, activation, g->y_format, 0);                         \
        else if (g->y_format == F32) finish(g, mr, at, acc, activation, F32, 1);                \
        else finish(g, mr, at, acc, activation, BF16, 1);                                       \
        break;
    switch (g->activation) { CASE(NONE) CASE(QUICK_GELU) CASE(GELU) CASE(RELU) }
#undef CASE
}

INLINE void epilogue(const Gemm *g, int mr, Place at, vf acc[MR][NV]) {
    if (at.last) {
        finish_any(g, mr, at, acc);
        return;
    }
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) {
            float *sums = at.sums + i * NR + v * LANES;
            v_store(sums, at.first ? acc[i][v] : v_add(v_load(sums), acc[i][v]));
        }
}

// Rows of y and of the residual lie far apart. They are fetched while a tile is multiplied: those of the
// next tile, or, where they are large and would not stay in L1 for so long, its own.
INLINE void prefetch(const Gemm *g, int mr, Place at) {
    int64_t size = size_of(g->y_format), row = at.row + (g->y_format == F32 ? 0 : mr);
    for (int i = 0; i < mr; i++)
        for (int64_t line = 0; line < NR * size; line += 64) {
            int64_t offset = ((row + i) * g->m + at.col) * size + line;
            __builtin_prefetch((const char *)g->y + offset, 1);
            if (g->residual) __builtin_prefetch((const char *)g->residual + offset);
        }
}

INLINE void micro_kernel(const Gemm *g, int mr, int format, int64_t depth, const float *a,
                         const void *w, Place at) {
    vf acc[MR][NV];
    if (at.last) prefetch(g, mr, at);
#if PAIR == 2
    (void)format;
    multiply_pairs(mr, depth / 2, a, LDA, w, acc);
#else
    multiply(mr, format, smaller(depth, CHAIN), a, LDA, w, acc);
    if (depth > CHAIN) {
        vf sum[MR][NV];
        memcpy(sum, acc, sizeof(acc));
        const char *rest = (const char *)w + CHAIN * NR * size_of(format);
        multiply(mr, format, depth - CHAIN, a + CHAIN, LDA, rest, acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++) acc[i][v] = v_add(sum[i][v], acc[i][v]);
    }
#endif
    epilogue(g, mr, at, acc);
}

INLINE void tile(const Gemm *g, int mr, int format, int64_t depth, const float *a, const void *w,
                 Place at) {
#ifdef NPCLIP_AMX
    micro_kernel(g, mr, format, depth, a, w, at);
#else
#define CASE(height) \
    case height: micro_kernel(g, height, format, depth, a, w, at); break;
    switch (mr) { EACH_HEIGHT(CASE) }
#undef CASE
#endif
}

// All slices of x's rows, one after another, each [rows][LDA].
static void pack_rows(const Gemm *g, int64_t row, int64_t rows, float *a) {
    for (int64_t k = 0; k < g->k; k += KC * PAIR, a += rows * LDA) {
        int64_t depth = smaller(g->k - k, KC * PAIR);
#if PAIR == 2
        if (g->x_format == F32) {
            for (int64_t i = 0; i < rows; i++) {
                float wide[2 * KC + 2 * LANES];
                g->pack_a(g, row + i, 1, k, depth, wide);
                for (int64_t j = depth; j % K_STEP; j++) wide[j] = 0;
                for (int64_t j = 0; j < depth; j += K_STEP)
                    _mm512_storeu_si512(a + i * LDA + j / 2,
                                        v_to_bf16_pairs(v_load(wide + j), v_load(wide + j + LANES)));
            }
            continue;
        }
        for (int64_t i = 0; depth % K_STEP && i < rows; i++)
            memset((uint16_t *)(a + i * LDA) + depth, 0, (K_STEP - depth % K_STEP) * 2);
#endif
        g->pack_a(g, row, rows, k, depth, a);
    }
}

static void run(const void *arguments, int64_t task, Scratch *scratch) {
    const Plan *plan = arguments;
    const Gemm *g = &plan->g;
    int64_t row_block = task / plan->col_blocks, col_block = task % plan->col_blocks;
    int64_t row0 = row_block * plan->rows, rows = smaller(plan->rows, g->n - row0);
    int64_t col0 = col_block * plan->cols, col1 = smaller(g->m, col0 + plan->cols);
    int64_t tiles = ceil_div(rows, MR), k_padded = round_up(g->k, K_STEP);
    float *sums = (float *)(scratch->memory + SCRATCH_BYTES - SLICE_BYTES - SUMS_BYTES);
    float *wide = (float *)(scratch->memory + SCRATCH_BYTES - SLICE_BYTES);
    if (scratch->packed != row_block) pack_rows(g, row0, rows, (float *)scratch->memory);
    scratch->packed = row_block;
#ifdef NPCLIP_AMX
    tiles_begin();
#endif
    const float *slice = (const float *)scratch->memory;
    int64_t panels = ceil_div(col1 - col0, NR), panel_bytes = k_padded * NR * size_of(g->format);
    int by_rows = panels * panel_bytes <= SMALL && (PAIR == 2 || g->format == F32);
    for (int64_t k = 0; k < g->k; k += KC * PAIR) {
        int64_t depth = smaller(k_padded - k, KC * PAIR);
        Place at = {.first = k == 0, .last = k + KC * PAIR >= g->k};
        for (int64_t i = 0; i < tiles * panels; i++) {
            int64_t panel = by_rows ? i % panels : i / tiles, t = by_rows ? i / panels : i % tiles;
            int64_t start = tile_start(rows, tiles, t);
            int mr = (int)(tile_start(rows, tiles, t + 1) - start), format = g->format;
            const void *w = (const char *)g->weight + (col0 / NR + panel) * panel_bytes +
                            k * NR * size_of(format);
            if (PAIR == 1 && format != F32 && tiles > 2) {  // widen once for all tiles
                for (int64_t j = 0; t == 0 && j < depth * NR; j += LANES)
                    v_store(wide + j, load_weight(format, w, j));
                w = wide;
                format = F32;
            }
            const float *a = slice + start * LDA;
            at.row = row0 + start;
            at.col = col0 + panel * NR;
            at.sums = sums + (panel * rows + start) * NR;
            if (PAIR == 2 || format == BF16) tile(g, mr, BF16, depth, a, w, at);
            else if (format == F32) tile(g, mr, F32, depth, a, w, at);
            else tile(g, mr, F16, depth, a, w, at);
        }
        slice += rows * LDA;
    }
#ifdef NPCLIP_AMX
    tiles_end();
#endif
}

void SYMBOL(gemm)(Gemm g) {
    if (!g.n) return;  // no rows: nothing to divide into blocks
    Plan plan = {.g = g};
    int64_t fits = PACKED_BYTES / (4 * LDA * ceil_div(g.k, KC * PAIR)) / MR * MR;
    int64_t rows = fits < MC ? fits : MC;
    plan.row_blocks = ceil_div(g.n, rows);
    plan.rows = ceil_div(ceil_div(g.n, plan.row_blocks), MR) * MR;
    plan.row_blocks = ceil_div(g.n, plan.rows);
    int64_t panels = ceil_div(g.m, NR), wanted = TASKS_A_THREAD * npclip_num_threads();
    int64_t col_blocks = ceil_div(wanted, plan.row_blocks);
    plan.cols = smaller(ceil_div(panels, smaller(panels, col_blocks)) * NR, NC);
    plan.col_blocks = ceil_div(g.m, plan.cols);
    parallel_for(run, &plan, plan.row_blocks * plan.col_blocks);
}
