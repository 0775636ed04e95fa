// gemm.h: the matrix product under linear and conv2d; gemm.c explains it.
#ifndef NPCLIP_GEMM_H
#define NPCLIP_GEMM_H

#include "cpu.h"
#include "simd.h"
#ifdef NPCLIP_AMX
#include "amx.h"
#endif

#define NV 2              // vectors a row of the micro-tile
#define NR (NV * LANES)   // columns of the micro-tile, and of a panel of packed weights
#if defined(NPCLIP_AMX)
#define MR 32  // 2x2 tiles of 16x16 sums, 2 of x, 2 of w: all 8
#elif LANES == 16
#define MR 12  // rows: 12x2 accumulators + 2 b + 1 a = 27 of 32 zmm
#else
#define MR 6   // 6x2 accumulators + 2 b + 1 a = 15 of 16 ymm
#endif
#define KC 384  // depth of a slice: 192 rows of it are 307 KB, in L2; one panel of it 49 KB
#define CHAIN 192  // products that are added up in registers: the shorter, the smaller the error
#define MC 192  // rows of a block
#define LDA (KC + 16)  // from one packed row to the next: a whole number of cache lines, odd, so
                       // that the rows of a tile fall into different cache sets
#define AHEAD 24  // rows of a panel that are fetched in advance: about 500 cycles, L3's latency twice

#ifdef __AVX512BF16__
#define PAIR 2      // values of k that lie beside each other in packed weights
#define K_STEP 32   // K is filled up with zeros to a multiple: the depth of a tile
#else
#define PAIR 1
#define K_STEP 1
#endif

enum { NONE, QUICK_GELU, GELU, RELU };  // activation, by its number in npclip/cpu.py
enum { F32, F16, BF16 };                // how values are stored, by its number in npclip/cpu.py

// How activations are stored between ops, in this copy of a kernel; ACTIVATION_SYMBOL names it.
#if PAIR == 2
#define ACTIVATIONS BF16
typedef uint16_t Activation;
#define ACTIVATION_SYMBOL(op) SYMBOL(op##_bf16)
#else
#define ACTIVATIONS F32
typedef float Activation;
#define ACTIVATION_SYMBOL(op) SYMBOL(op##_f32)
#endif

typedef struct Gemm Gemm;

struct Gemm {
    int64_t n, k, m;         // y [n, m] = act(x [n, k] w [m, k]^T + bias) + residual
    const void *weight;      // packed: [m / NR][k][NR], the last panel filled up with zeros
    int format;              // of weight
    const float *bias;       // [m] or NULL
    const void *residual;    // [n, m] or NULL, stored as y is
    int activation;
    int residual_first;      // act(... + residual) instead of act(...) + residual
    const void *x;
    void *y;
    int x_format, y_format;  // F32, or BF16 where PAIR is 2
    // Copies rows row .. row+rows-1 of x, columns k .. k+depth-1, as they are stored, to a, whose rows
    // begin LDA floats apart.
    void (*pack_a)(const Gemm *g, int64_t row, int64_t rows, int64_t k, int64_t depth, void *a);
    int64_t height, width, channels, kernel, stride;  // of conv2d's x
};

void SYMBOL(gemm)(Gemm g);

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int lanes_left(int64_t n) { return n < 0 ? 0 : n < LANES ? (int)n : LANES; }

INLINE int64_t size_of(int format) { return format == F32 ? 4 : 2; }

// The first n of LANES values of y or a residual.
INLINE vf load_n(int format, const void *p, int64_t i, int n) {
#ifdef __AVX512BF16__
    if (format == BF16) return v_from_bf16_n((const uint16_t *)p + i, n);
#endif
    (void)format;
    return v_load_n((const float *)p + i, n);
}
INLINE void store_n(int format, void *p, int64_t i, vf x, int n) {
#ifdef __AVX512BF16__
    if (format == BF16) {
        v_to_bf16_n((uint16_t *)p + i, x, n);
        return;
    }
#endif
    (void)format;
    v_store_n((float *)p + i, x, n);
}

INLINE vf load_weight(int format, const void *w, int64_t i) {
    if (format == F32) return v_load((const float *)w + i);
    if (format == F16) return v_from_f16((const uint16_t *)w + i);
    return v_from_bf16((const uint16_t *)w + i);
}

INLINE vf activate(int activation, vf x) {
    if (activation == QUICK_GELU)
        return v_div(x, v_add(v_set1(1.0f), v_exp(v_mul(x, v_set1(-1.702f)))));
    if (activation == GELU) {
        vf half = v_mul(x, v_set1(0.5f));
        return v_fma(half, v_erf(v_mul(x, v_set1(0.70710678118654752f))), half);
    }
    return activation == RELU ? v_max(x, v_zero()) : x;
}

// acc [mr][NV] = a [mr][depth] w [depth][NR], a in rows of lda. mr, format and lda are constants where
// this is inlined, so acc stays in registers and a row's address is a constant away from the first's.
INLINE void multiply(int mr, int format, int64_t depth, const float *a, int lda, const void *w,
                     vf acc[MR][NV]) {
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) acc[i][v] = v_zero();
    for (int64_t k = 0; k < depth; k++) {
        const char *ahead = (const char *)w + (k + AHEAD) * NR * size_of(format);
        __builtin_prefetch(ahead);
        if (format == F32 && LANES == 16) __builtin_prefetch(ahead + 64);
        vf b0 = load_weight(format, w, k * NR), b1 = load_weight(format, w, k * NR + LANES);
        for (int i = 0; i < mr; i++) {
            vf ai = v_set1(a[i * lda + k]);
            acc[i][0] = v_fma(ai, b0, acc[i][0]);
            acc[i][1] = v_fma(ai, b1, acc[i][1]);
        }
    }
}

#ifdef NPCLIP_AMX
// The same with tiles, for a and w in pairs of bfloat16: a [mr][pairs][2], w [pairs][NR][2]. Rows after
// mr up to a whole tile are computed from what lies there, and mean nothing.
INLINE void multiply_pairs(int mr, int64_t pairs, const float *a, int lda, const uint16_t *w,
                           vf acc[MR][NV]) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int64_t k = 0; k < pairs; k += 16, w += 16 * 2 * NR) {
        tile_load(6, w, 4 * NR);
        tile_load(7, w + NR, 4 * NR);
        tile_load(4, a + k, 4 * lda);
        tile_multiply(0, 4, 6);
        tile_multiply(1, 4, 7);
        if (mr <= 16) continue;
        tile_load(5, a + 16 * lda + k, 4 * lda);
        tile_multiply(2, 5, 6);
        tile_multiply(3, 5, 7);
    }
    tile_store(0, &acc[0][0], 4 * NR);
    tile_store(1, &acc[0][1], 4 * NR);
    tile_store(2, &acc[16][0], 4 * NR);
    tile_store(3, &acc[16][1], 4 * NR);
}
#elif defined(__AVX512BF16__)
// The same where a and w are pairs of bfloat16: a [mr][pairs][2], w [pairs][NR][2].
INLINE void multiply_pairs(int mr, int64_t pairs, const float *a, int lda, const uint16_t *w,
                           vf acc[MR][NV]) {
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) acc[i][v] = v_zero();
    for (int64_t k = 0; k < pairs; k++, w += 2 * NR) {
        __builtin_prefetch(w + AHEAD * 2 * NR);
        __builtin_prefetch(w + AHEAD * 2 * NR + NR);
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(w), b1 = (__m512bh)_mm512_loadu_si512(w + NR);
        for (int i = 0; i < mr; i++) {
            __m512bh ai = (__m512bh)v_set1(a[i * lda + k]);
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], ai, b0);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], ai, b1);
        }
    }
}
#endif

// Runs CASE(mr) for mr = 1 .. MR: one copy of the code per height of a tile.
#define EACH_HEIGHT_6(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MR == 12
#define EACH_HEIGHT(CASE) EACH_HEIGHT_6(CASE) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define EACH_HEIGHT(CASE) EACH_HEIGHT_6(CASE)
#endif

// Rows are spread evenly over tiles: 50 rows are 5 tiles of 10, not 4 of 12 and one of 2.
INLINE int64_t tile_start(int64_t rows, int64_t tiles, int64_t i) { return rows * i / tiles; }

#endif
