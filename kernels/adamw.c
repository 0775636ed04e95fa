// adamw: one step of AdamW, in place                                      reference_backward.py::adamw
// square_sums: of all squares, in double
//
// p, g, m, v: n f32 each, as one vector. The scalars hold the schedule, the bias corrections and the
// factor that clips g; they are rounded once, by the caller.
//
//     g = factor g                 A task is TASK values: each is read once, and p, m and v written
//     m = beta1 m + rest1 g        once. What is fused nowhere else (v_fma) is not fused here, so that
//     v = beta2 v + rest2 g^2      every value has the bits that NumPy gives it.
//     p = keep p - rate m / (scale sqrt(v) + eps)
//
// square_sums writes the sum of every block of `block` values to sums, added in an order that only n and
// `block` decide.
//
// cost    14 flop and 28 bytes a value; 2 flop and 4 bytes: both bound by memory
// needs   avx2 or avx512
#include "gemm.h"

#define TASK (1 << 14)

typedef struct {
    float factor, beta1, rest1, beta2, rest2, keep, scale, eps, rate;
} Coefficients;

typedef struct {
    float *p, *m, *v;
    const float *g;
    int64_t n;
    Coefficients c;
} AdamW;

static void run_adamw(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    const AdamW *a = arguments;
    vf factor = v_set1(a->c.factor), beta1 = v_set1(a->c.beta1), rest1 = v_set1(a->c.rest1);
    vf beta2 = v_set1(a->c.beta2), rest2 = v_set1(a->c.rest2), keep = v_set1(a->c.keep);
    vf scale = v_set1(a->c.scale), eps = v_set1(a->c.eps), rate = v_set1(a->c.rate);
    int64_t end = smaller(a->n, (task + 1) * TASK);
    for (int64_t i = task * TASK; i < end; i += LANES) {
        int n = lanes_left(end - i);
        vf g = v_mul(v_load_n(a->g + i, n), factor);
        vf m = v_add(v_mul(v_load_n(a->m + i, n), beta1), v_mul(rest1, g));
        vf v = v_add(v_mul(v_load_n(a->v + i, n), beta2), v_mul(rest2, v_mul(g, g)));
        vf p = v_mul(v_load_n(a->p + i, n), keep);
        vf step = v_div(m, v_add(v_mul(v_sqrt(v), scale), eps));
        v_store_n(a->m + i, m, n);
        v_store_n(a->v + i, v, n);
        v_store_n(a->p + i, v_sub(p, v_mul(step, rate)), n);
    }
}

EXPORT void SYMBOL(adamw_f32)(float *p, const float *g, float *m, float *v, int64_t n, float factor,
                              float beta1, float rest1, float beta2, float rest2, float keep,
                              float scale, float eps, float rate) {
    AdamW a = {.p = p, .g = g, .m = m, .v = v, .n = n,
               .c = {factor, beta1, rest1, beta2, rest2, keep, scale, eps, rate}};
    parallel_for(run_adamw, &a, ceil_div(n, TASK));
}

typedef struct {
    const float *x;
    double *sums;
    int64_t n, block;
} Squares;

static void run_squares(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    const Squares *s = arguments;
    const float *x = s->x + task * s->block;
    int64_t n = smaller(s->block, s->n - task * s->block);
    vd low = vd_zero(), high = vd_zero();
    for (int64_t i = 0; i < n; i += LANES) {
        vf value = v_load_n(x + i, lanes_left(n - i));
        vd a = v_widen(value, 0), b = v_widen(value, 1);
        low = vd_fma(a, a, low);
        high = vd_fma(b, b, high);
    }
    s->sums[task] = vd_sum(low) + vd_sum(high);
}

EXPORT void SYMBOL(square_sums_f32)(const float *x, double *sums, int64_t n, int64_t block) {
    Squares s = {.x = x, .sums = sums, .n = n, .block = block};
    parallel_for(run_squares, &s, ceil_div(n, block));
}
