// layer_norm: y = (x - mean) / sqrt(var + eps) weight + bias              reference.py::layer_norm
// add_layer_norm: x + h, and its LayerNorm
//
// x, h, y [N, D] f32, row-major; weight, bias [D]
//
//         D            A task is ROWS rows. Each is read three times (mean, variance, result), the
//      +------+        second and third time from L1.
// ROWS |  x   |
//      +------+
//
// cost    7 flop and 8 bytes a value (12 + 4 with h): bound by memory beyond the last cache
// needs   avx2 or avx512
#include <math.h>

#include "gemm.h"

#define ROWS 8
#define CHAINS 4

typedef struct {
    const float *x, *h, *weight, *bias;
    float *sum, *y;
    int64_t n, d;
    float eps;
} LayerNorm;

// The sum over a row of x - center, or of its square, in CHAINS sums, so that additions need not wait for
// one another.
INLINE float sum(const float *x, int64_t d, vf center, int square) {
    vf sums[CHAINS];
    for (int c = 0; c < CHAINS; c++) sums[c] = v_zero();
    int64_t i = 0;
    for (; i + CHAINS * LANES <= d; i += CHAINS * LANES)
        for (int c = 0; c < CHAINS; c++) {
            vf v = v_sub(v_load(x + i + c * LANES), center);
            sums[c] = square ? v_fma(v, v, sums[c]) : v_add(v, sums[c]);
        }
    for (; i < d; i += LANES) {
        int n = lanes_left(d - i);
        vf v = v_first_n(v_sub(v_load_n(x + i, n), center), n);
        sums[0] = square ? v_fma(v, v, sums[0]) : v_add(v, sums[0]);
    }
    return v_sum(v_add(v_add(sums[0], sums[1]), v_add(sums[2], sums[3])));
}

static void normalize(const LayerNorm *p, const float *x, float *y) {
    int64_t d = p->d;
    vf mean = v_set1(sum(x, d, v_zero(), 0) / (float)d);
    vf scale = v_set1(1.0f / sqrtf(sum(x, d, mean, 1) / (float)d + p->eps));
    for (int64_t i = 0; i < d; i += LANES) {
        int n = lanes_left(d - i);
        vf c = v_mul(v_sub(v_load_n(x + i, n), mean), scale);
        v_store_n(y + i, v_fma(c, v_load_n(p->weight + i, n), v_load_n(p->bias + i, n)), n);
    }
}

static void run(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    const LayerNorm *p = arguments;
    int64_t end = smaller(p->n, (task + 1) * ROWS);
    for (int64_t row = task * ROWS; row < end; row++) {
        const float *x = p->x + row * p->d;
        if (p->h) {
            float *sum = p->sum + row * p->d;
            for (int64_t i = 0; i < p->d; i += LANES) {
                int n = lanes_left(p->d - i);
                vf h = v_load_n(p->h + row * p->d + i, n);
                v_store_n(sum + i, v_add(v_load_n(x + i, n), h), n);
            }
            x = sum;
        }
        normalize(p, x, p->y + row * p->d);
    }
}

EXPORT void SYMBOL(layer_norm_f32)(const float *x, const float *weight, const float *bias, float *y,
                                   int64_t n, int64_t d, float eps) {
    LayerNorm p = {.x = x, .weight = weight, .bias = bias, .y = y, .n = n, .d = d, .eps = eps};
    parallel_for(run, &p, ceil_div(n, ROWS));
}

EXPORT void SYMBOL(add_layer_norm_f32)(const float *x, const float *h, const float *weight,
                                       const float *bias, float *sum, float *y, int64_t n, int64_t d,
                                       float eps) {
    LayerNorm p = {.x = x, .h = h, .weight = weight, .bias = bias, .sum = sum, .y = y, .n = n,
                   .d = d, .eps = eps};
    parallel_for(run, &p, ceil_div(n, ROWS));
}
