// attention.h: what attention and its backward share: the exponentials, and how k and v are packed
#ifndef NPCLIP_ATTENTION_H
#define NPCLIP_ATTENTION_H

#include <math.h>

#include "gemm.h"

#define MAX_KEYS 1024
#define MAX_HEAD_WIDTH 128
#define ROW (MAX_KEYS + 16)  // from one row of scores to the next; not a multiple of 4 KB, see LDA

// scores -> exp(scores - max) of the first n, 0 up to `end`, as floats or in pairs; returns their sum.
INLINE float exponentials(float *scores, int64_t n, int64_t end, int pair) {
    vf lowest = v_set1(-INFINITY), most = lowest, sum = v_zero();
    for (int64_t t = 0; t < n; t += LANES)
        most = v_max(most, v_select_n(v_load(scores + t), lowest, lanes_left(n - t)));
    most = v_set1(v_largest(most));
    for (int64_t t = 0; t < end; t += pair * LANES) {
        vf e[2];
        for (int p = 0; p < pair; p++) {
            e[p] = v_exp(v_sub(v_load(scores + t + p * LANES), most));
            e[p] = v_first_n(e[p], lanes_left(n - t - p * LANES));
            sum = v_add(sum, e[p]);
        }
        if (pair == 1) v_store(scores + t, e[0]);
#if PAIR == 2
        else _mm512_storeu_si512(scores + t / 2, v_to_bf16_pairs(e[0], e[1]));
#endif
    }
    return v_sum(sum);
}

// LANES floats, or pairs, of a row: the first n values.
INLINE vf load_row(const Activation *p, int64_t n) {
    n = n < 0 ? 0 : smaller(n, PAIR * LANES);
#if PAIR == 2
    return _mm512_castsi512_ps(v_load16_n(p, (int)n));
#else
    return v_load_n(p, (int)n);
#endif
}

// A depth as packed matrices have it, in floats or pairs.
INLINE int64_t padded(int64_t depth) { return round_up(depth, K_STEP) / PAIR; }

// k [keys, d], rows so far apart, -> k^T in panels of NR keys
INLINE void pack_keys(const Activation *k, int64_t row, int64_t keys, int64_t d, float *packed) {
    int64_t depth = padded(d);
    for (int64_t t = 0; t < ceil_div(keys, NR) * NR; t += LANES)
        for (int64_t i = 0; i < depth; i += LANES) {
            vf block[LANES];
            for (int64_t r = 0; r < LANES; r++)
                block[r] = t + r < keys ? load_row(k + (t + r) * row + i * PAIR, d - i * PAIR) : v_zero();
            v_transpose(block);
            float *to = packed + t / NR * NR * depth + i * NR + t % NR;
            for (int64_t r = 0; r < smaller(depth - i, LANES); r++) v_store(to + r * NR, block[r]);
        }
}

// v [keys, d] -> in panels of NR columns
#if PAIR == 2
INLINE void pack_values(const uint16_t *v, int64_t row, int64_t keys, int64_t d, float *packed) {
    int64_t depth = padded(keys);
    for (int64_t t = 0; t < depth; t++)
        for (int64_t i = 0; i < d; i += NR) {
            int n = (int)smaller(d - i, NR);
            const uint16_t *a = v + 2 * t * row + i, *b = a + row;
            __m512i even = v_load16_n(a, 2 * t < keys ? n : 0);
            __m512i odd = v_load16_n(b, 2 * t + 1 < keys ? n : 0);
            float *to = packed + (i / NR * depth + t) * NR;
            _mm512_storeu_si512(to, v_interleave16(even, odd, 0));
            _mm512_storeu_si512(to + LANES, v_interleave16(even, odd, 1));
        }
}
#else
INLINE void pack_values(const float *v, int64_t row, int64_t keys, int64_t d, float *packed) {
    for (int64_t t = 0; t < keys; t++)
        for (int64_t i = 0; i < round_up(d, NR); i += LANES)
            v_store(packed + (i / NR * keys + t) * NR + i % NR,
                    v_load_n(v + t * row + i, lanes_left(d - i)));
}
#endif

#endif
