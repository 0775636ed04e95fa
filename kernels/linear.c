// linear: y = act(x w^T + bias) + residual                                reference.py::linear
//
// x [N, K] f32, row-major; w [M, K] in panels of NR rows, [M / NR][K][NR], filled up with zeros;
// y [N, M] f32. linear_f16 and linear_bf16 store w in 16 bits and compute in f32, so that a checkpoint
// which stores float16 gives the same bits in half the memory. linear_bf16_avx512_bf16 and
// linear_bf16_amx multiply pairs of bfloat16: x is stored so or rounded to it, y is stored as asked for.
//
//      K                  NR        The panels lie one after another, so the micro-kernel of gemm.c
//    +----+   pack    +---------+   reads w forward from its first byte to its last.
//  M | w  |   ---->   | k0: NR  |
//    +----+           | k1: NR  |
//                     +---------+
//
// cost    see gemm.c; packing reads and writes w once, when a model is loaded
// needs   avx2, avx512, avx512_bf16 or amx; K <= 24576
#include <string.h>

#include "gemm.h"

static void pack_a(const Gemm *g, int64_t row, int64_t rows, int64_t k, int64_t depth, void *a) {
    int64_t size = size_of(g->x_format);
    const char *x = (const char *)g->x + (row * g->k + k) * size;
    for (int64_t i = 0; i < rows; i++)
        memcpy((float *)a + i * LDA, x + i * g->k * size, depth * size);
}

#define LINEAR(name, stored, type)                                                             \
    EXPORT void SYMBOL(name)(const void *x, const type *w, const float *bias,                   \
                             const void *residual, void *y, int64_t n, int64_t k, int64_t m,    \
                             int activation, int x_format, int y_format) {                     \
        SYMBOL(gemm)((Gemm){.n = n, .k = k, .m = m, .weight = w, .format = stored, .bias = bias, \
                            .residual = residual, .activation = activation, .y = y, .x = x,     \
                            .pack_a = pack_a, .x_format = x_format, .y_format = y_format});     \
    }

// The panels of w, of `size` bytes an element.
static void pack(const void *w, void *out, int64_t m, int64_t k, int size) {
    const uint16_t *w16 = w;
    const uint32_t *w32 = w;
    uint16_t *out16 = out;
    uint32_t *out32 = out;
    int64_t i = 0;
    for (int64_t panel = 0; panel < m; panel += NR)
        for (int64_t j = 0; j < round_up(k, K_STEP); j += PAIR)
            for (int64_t c = panel; c < panel + NR; c++)
                for (int64_t p = j; p < j + PAIR; p++, i++) {
                    int inside = c < m && p < k;
                    if (size == 2) out16[i] = inside ? w16[c * k + p] : 0;
                    else out32[i] = inside ? w32[c * k + p] : 0;
                }
}

#ifdef __AVX512BF16__

LINEAR(linear_bf16, BF16, uint16_t)

EXPORT void SYMBOL(pack_bf16)(const void *w, void *out, int64_t m, int64_t k) {
    pack(w, out, m, k, 2);
}

#else

LINEAR(linear_f32, F32, float)
LINEAR(linear_f16, F16, uint16_t)
LINEAR(linear_bf16, BF16, uint16_t)

EXPORT void SYMBOL(pack_f32)(const void *w, void *out, int64_t m, int64_t k) {
    pack(w, out, m, k, 4);
}
EXPORT void SYMBOL(pack_f16)(const void *w, void *out, int64_t m, int64_t k) {
    pack(w, out, m, k, 2);
}
EXPORT void SYMBOL(pack_bf16)(const void *w, void *out, int64_t m, int64_t k) {
    pack(w, out, m, k, 2);
}

#endif

// How many elements pack_* writes for w [m, k].
EXPORT int64_t SYMBOL(packed_size)(int64_t m, int64_t k) {
    return round_up(m, NR) * round_up(k, K_STEP);
}
