// quick_gelu: y = x sigmoid(1.702 x); gelu: y = x Phi(x)                  reference.py
// quick_gelu_backward, gelu_backward: dx = dy f'(x)                       reference_backward.py
//
// x, dy, y, dx: n f32 each. Of training, which keeps x: elsewhere linear's epilogue has them (gemm.c).
//
//     s = sigmoid(z), z = 1.702 x:   f'(x) = s (1 + z (1 - s)), and 1 - s = exp(-z) s does not cancel
//     Phi, and phi its derivative:   f'(x) = Phi(x) + x phi(x)
//
// A task is TASK values. Far out, where f' is 0 or 1 to all digits, x is taken back to where no power of
// e overflows. NaN stays NaN: training looks for it in the gradients.
//
// cost    20 to 40 flop and 8 bytes a value, 12 backward: bound by memory beyond the last cache
// needs   avx2 or avx512
#include "gemm.h"

#define TASK (1 << 14)  // 3 x 64 KB, in L2

typedef struct {
    const float *x, *dy;  // dy is NULL forward
    float *out;
    int64_t n;
} Values;

// x in -most .. most; v_max and v_min return their second operand where either is NaN.
INLINE vf clamp(vf x, float most) { return v_min(v_set1(most), v_max(v_set1(-most), x)); }

INLINE vf derivative(int activation, vf x) {
    if (activation == QUICK_GELU) {
        vf z = clamp(v_mul(x, v_set1(1.702f)), 87.0f);
        vf e = v_exp(v_sub(v_zero(), z)), s = v_div(v_set1(1.0f), v_add(v_set1(1.0f), e));
        return v_mul(s, v_fma(z, v_mul(e, s), v_set1(1.0f)));
    }
    x = clamp(x, 13.0f);
    vf half = v_set1(0.5f), cdf = v_fma(half, v_erf(v_mul(x, v_set1(0.70710678118654752f))), half);
    vf density = v_mul(v_exp(v_mul(v_mul(x, x), v_set1(-0.5f))), v_set1(0.39894228040143268f));
    return v_fma(x, density, cdf);
}

INLINE void run(int activation, const Values *p, int64_t task) {
    int64_t end = smaller(p->n, (task + 1) * TASK);
    for (int64_t i = task * TASK; i < end; i += LANES) {
        int n = lanes_left(end - i);
        vf x = v_load_n(p->x + i, n);
        vf y = p->dy ? v_mul(v_load_n(p->dy + i, n), derivative(activation, x)) : activate(activation, x);
        v_store_n(p->out + i, y, n);
    }
}

#define ACTIVATION(name, activation)                                                           \
    static void run_##name(const void *arguments, int64_t task, Scratch *scratch) {            \
        (void)scratch;                                                                         \
        run(activation, arguments, task);                                                      \
    }                                                                                          \
    EXPORT void SYMBOL(name##_f32)(const float *x, float *y, int64_t n) {                      \
        Values p = {.x = x, .out = y, .n = n};                                                 \
        parallel_for(run_##name, &p, ceil_div(n, TASK));                                       \
    }                                                                                          \
    EXPORT void SYMBOL(name##_backward_f32)(const float *x, const float *dy, float *dx, int64_t n) { \
        Values p = {.x = x, .dy = dy, .out = dx, .n = n};                                      \
        parallel_for(run_##name, &p, ceil_div(n, TASK));                                       \
    }

ACTIVATION(quick_gelu, QUICK_GELU)
ACTIVATION(gelu, GELU)
