// linear_backward: dw = dy^T x, and the weights of a training step         reference_backward.py
//
// dy [N, M] f32, x [N, K] f32, dw [M, K] f32. In training weights change with every step, and both x and
// dy are read across their rows, so rounding to bfloat16, transposing and packing are one pass here:
//
//   round_pack             w [M, K] -> panels as linear reads them, for y = x w^T
//   round_pack_transposed  w [K, M] -> the same panels of w^T, for dx = dy w, and of x for dw
//   linear_weight_backward dw = dy^T x, x packed so; pack_a transposes the slices of dy
//
//      pairs of rows of w              a panel
//    k0 | a0 a1 a2 ... |    ---->    | a0 b0 a1 b1 ... |      Pairs of values of k lie beside each other
//    k1 | b0 b1 b2 ... |             | c0 d0 c1 d1 ... |      (gemm.h), so rows are interleaved by twos,
//    k2 | c0 c1 c2 ... |                                      and where k is along a row, 16 x 16 pairs are
//                                                             transposed in registers.
//
// cost    2 N M K flop, and reading dy and x once each; packing reads 4 bytes a value and writes 2
// order   sums are over N as linear's are over K: the same bits on any number of threads
// needs   avx512_bf16 or amx; N <= 24576
#include "gemm.h"

// The pairs of rows a and b at columns 0 .. n-1 of LANES.
INLINE __m512i pairs_of_rows(const float *a, int has_a, const float *b, int has_b, int n) {
    __m256i low = (__m256i)_mm512_cvtneps_pbh(v_load_n(a, has_a ? n : 0));
    __m256i high = (__m256i)_mm512_cvtneps_pbh(v_load_n(b, has_b ? n : 0));
    __m512i words = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    return _mm512_or_si512(words, _mm512_cvtepu16_epi32(low));
}

typedef struct {
    const float *w;
    float *out;  // of pairs
    int64_t m, k, depth;
} Pack;

// LANES rows of w at a time, and of them LANES pairs.
static void pack_panel(const void *arguments, int64_t panel, Scratch *scratch) {
    (void)scratch;
    const Pack *p = arguments;
    float *out = p->out + panel * p->depth * NR;
    for (int64_t c = 0; c < NR; c += LANES)
        for (int64_t t = 0; t < p->depth; t += LANES) {
            vf block[LANES];
            for (int64_t r = 0; r < LANES; r++) {
                int64_t row = panel * NR + c + r, k = 2 * t;
                const float *from = p->w + row * p->k + k;
                int low = row < p->m ? lanes_left(p->k - k) : 0;
                int high = row < p->m ? lanes_left(p->k - k - LANES) : 0;
                vf second = high ? v_load_n(from + LANES, high) : v_zero();
                block[r] = _mm512_castsi512_ps(
                    v_to_bf16_pairs(low ? v_load_n(from, low) : v_zero(), second));
            }
            v_transpose(block);
            for (int64_t r = 0; r < LANES; r++) v_store(out + (t + r) * NR + c, block[r]);
        }
}

static void pack_panel_transposed(const void *arguments, int64_t panel, Scratch *scratch) {
    (void)scratch;
    const Pack *p = arguments;
    float *out = p->out + panel * p->depth * NR;
    for (int64_t t = 0; t < p->depth; t++)
        for (int64_t c = 0; c < NR; c += LANES) {
            int64_t column = panel * NR + c, k = 2 * t;
            int n = lanes_left(p->m - column);
            const float *a = p->w + k * p->m + column;
            _mm512_storeu_si512(out + t * NR + c,
                                pairs_of_rows(a, n && k < p->k, a + p->m, n && k + 1 < p->k, n));
        }
}

EXPORT void SYMBOL(round_pack_bf16)(const float *w, void *out, int64_t m, int64_t k) {
    Pack p = {.w = w, .out = out, .m = m, .k = k, .depth = round_up(k, K_STEP) / 2};
    parallel_for(pack_panel, &p, ceil_div(m, NR));
}

EXPORT void SYMBOL(round_pack_transposed_bf16)(const float *w, void *out, int64_t m, int64_t k) {
    Pack p = {.w = w, .out = out, .m = m, .k = k, .depth = round_up(k, K_STEP) / 2};
    parallel_for(pack_panel_transposed, &p, ceil_div(m, NR));
}

// Rows of dy^T, rounded: g->x is dy [k, n] here.
static void pack_a(const Gemm *g, int64_t row, int64_t rows, int64_t k, int64_t depth, void *a) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < round_up(depth, K_STEP); j += 2 * LANES) {
            vf block[LANES];
            int n = lanes_left(smaller(rows, g->n - row) - i);
            for (int64_t r = 0; r < LANES; r++) {
                int64_t t = j + 2 * r;
                const float *from = (const float *)g->x + (k + t) * g->n + row + i;
                block[r] = _mm512_castsi512_ps(
                    pairs_of_rows(from, t < depth, from + g->n, t + 1 < depth, n));
            }
            v_transpose(block);
            for (int64_t r = 0; r < smaller(LANES, rows - i); r++)
                v_store((float *)a + (i + r) * LDA + j / 2, block[r]);
        }
}

EXPORT void SYMBOL(linear_weight_backward_bf16)(const float *dy, const uint16_t *x, float *dw,
                                                int64_t n, int64_t k, int64_t m) {
    SYMBOL(gemm)((Gemm){.n = m, .k = n, .m = k, .weight = x, .format = BF16, .y = dw, .x = dy,
                        .pack_a = pack_a, .x_format = BF16, .y_format = F32});
}
