// gemm: y = act(x w^T + bias) + residual                                  reference.py::linear
//
// x [N, K] f32, as pack_a gives it; w [M, K] packed at load; y [N, M] f32, row-major
//
//              M: a task takes NC columns,       A task is MC rows x NC columns of y. It walks K in
//              panels of NR                      slices of KC; those of x are copied into scratch, in
//            +----+----+----+----+               rows of LDA, which no two share a cache set; w was
//       K KC | w' |    |    |    |               packed when it was loaded.
//            +----+----+----+----+
//      KC                                        The micro-kernel keeps MR x NR sums in registers and
//    +----+  +----+----+----+----+               adds the products of one k after another. A slice's
// MR | x  |  | y  |    |    |    |               sums are added to y, in the order of k.
//    +----+  +----+----+----+----+
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
#define TASKS_A_THREAD 4   // enough to even out threads of different speed

// The scratch of a thread: x's rows packed over all of K, the rows that tiles read beyond them, and one
// widened slice of a weight panel.
#define SLICE_BYTES (KC * NR * 4)
#define PACKED_BYTES (SCRATCH_BYTES - SLICE_BYTES - MR * LDA * 4)

typedef struct {
    Gemm g;
    int64_t rows, cols;         // of a block
    int64_t row_blocks, col_blocks;
} Plan;

INLINE vf activate(int activation, vf x) {
    if (activation == QUICK_GELU)
        return v_div(x, v_add(v_set1(1.0f), v_exp(v_mul(x, v_set1(-1.702f)))));
    if (activation == GELU) {
        vf half = v_mul(x, v_set1(0.5f));
        return v_fma(half, v_erf(v_mul(x, v_set1(0.70710678118654752f))), half);
    }
    return activation == RELU ? v_max(x, v_zero()) : x;
}

// y += acc; after the last slice also bias, activation, residual
INLINE void epilogue(const Gemm *g, int mr, int64_t row, int64_t col, int first, int last,
                     vf acc[MR][NV]) {
    for (int v = 0; v < NV; v++) {
        int64_t c = col + v * LANES;
        int n = (int)smaller(g->m - c, LANES);
        if (n <= 0) return;
        vf bias = last && g->bias ? v_load_n(g->bias + c, n) : v_zero();
        for (int i = 0; i < mr; i++) {
            float *y = g->y + (row + i) * g->m + c;
            vf sum = first ? acc[i][v] : v_add(v_load_n(y, n), acc[i][v]);
            if (last) {
                vf r = g->residual ? v_load_n(g->residual + (row + i) * g->m + c, n) : v_zero();
                sum = v_add(sum, bias);
                if (g->residual_first) sum = v_add(sum, r);
                sum = activate(g->activation, sum);
                if (!g->residual_first) sum = v_add(sum, r);
            }
            v_store_n(y, sum, n);
        }
    }
}

INLINE void micro_kernel(const Gemm *g, int mr, int format, int64_t depth, const float *a,
                         const void *w, int64_t row, int64_t col, int first, int last) {
    vf acc[MR][NV];
#if PAIR == 2
    (void)format;
    multiply_pairs(mr, depth / 2, a, LDA, w, acc);
#else
    multiply(mr, format, smaller(depth, CHAIN), a, LDA, w, acc);
    if (depth > CHAIN) {
        vf sum[MR][NV];
        memcpy(sum, acc, sizeof(acc));
        int64_t bytes = format == F32 ? 4 : 2;
        multiply(mr, format, depth - CHAIN, a + CHAIN, LDA, (const char *)w + CHAIN * NR * bytes, acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++) acc[i][v] = v_add(sum[i][v], acc[i][v]);
    }
#endif
    epilogue(g, mr, row, col, first, last, acc);
}

INLINE void tile(const Gemm *g, int mr, int format, int64_t depth, const float *a, const void *w,
                 int64_t row, int64_t col, int first, int last) {
#ifdef NPCLIP_AMX
    micro_kernel(g, mr, format, depth, a, w, row, col, first, last);
#else
#define CASE(height) \
    case height: micro_kernel(g, height, format, depth, a, w, row, col, first, last); break;
    switch (mr) { EACH_HEIGHT(CASE) }
#undef CASE
#endif
}

// All slices of x's rows, one after another, each [rows][LDA].
static void pack_rows(const Gemm *g, int64_t row, int64_t rows, float *a) {
    for (int64_t k = 0; k < g->k; k += KC * PAIR, a += rows * LDA) {
        int64_t depth = smaller(g->k - k, KC * PAIR);
#if PAIR == 2
        for (int64_t i = 0; i < rows; i++) {
            float wide[2 * KC + 2 * LANES];
            g->pack_a(g, row + i, 1, k, depth, wide);
            for (int64_t j = depth; j % (2 * LANES); j++) wide[j] = 0;
            for (int64_t j = 0; j < depth; j += 2 * LANES) {
                __m512bh both = _mm512_cvtne2ps_pbh(v_load(wide + j + LANES), v_load(wide + j));
                _mm512_storeu_si512(a + i * LDA + j / 2, (__m512i)both);
            }
        }
#else
        g->pack_a(g, row, rows, k, depth, a);
#endif
    }
}

static void run(const void *arguments, int64_t task, Scratch *scratch) {
    const Plan *plan = arguments;
    const Gemm *g = &plan->g;
    int64_t row_block = task / plan->col_blocks, col_block = task % plan->col_blocks;
    int64_t row0 = row_block * plan->rows, rows = smaller(plan->rows, g->n - row0);
    int64_t col0 = col_block * plan->cols, col1 = smaller(g->m, col0 + plan->cols);
    int64_t tiles = ceil_div(rows, MR), k_padded = round_up(g->k, K_STEP);
    int64_t element = g->format == F32 ? 4 : 2;
    float *wide = (float *)(scratch->memory + SCRATCH_BYTES - SLICE_BYTES);
    if (scratch->packed != row_block) pack_rows(g, row0, rows, (float *)scratch->memory);
    scratch->packed = row_block;
#ifdef NPCLIP_AMX
    tiles_begin();
#endif
    const float *slice = (const float *)scratch->memory;
    for (int64_t k = 0; k < g->k; k += KC * PAIR) {
        int64_t depth = smaller(k_padded - k, KC * PAIR);
        int first = k == 0, last = k + KC * PAIR >= g->k;
        for (int64_t col = col0; col < col1; col += NR) {
            const void *w = (const char *)g->weight + (col * k_padded + k * NR) * element;
            int format = g->format;
            if (PAIR == 1 && format != F32 && tiles > 2) {  // widen once for all tiles
                for (int64_t i = 0; i < depth * NR; i += LANES)
                    v_store(wide + i, load_weight(format, w, i));
                w = wide;
                format = F32;
            }
            const float *a = slice;
            for (int64_t i = 0; i < tiles; i++) {
                int64_t start = tile_start(rows, tiles, i);
                int mr = (int)(tile_start(rows, tiles, i + 1) - start);
                int64_t row = row0 + start;
                if (PAIR == 2 || format == BF16)
                    tile(g, mr, BF16, depth, a, w, row, col, first, last);
                else if (format == F32)
                    tile(g, mr, F32, depth, a, w, row, col, first, last);
                else
                    tile(g, mr, F16, depth, a, w, row, col, first, last);
                a += mr * LDA;
            }
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
