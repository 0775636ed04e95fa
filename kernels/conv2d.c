// conv2d: y = act(x * w + bias + residual), padding k / 2                 reference.py::conv2d
// avg_pool2d: the mean of each k x k cell                                 reference.py::avg_pool2d
//
// x [B, H, W, C] f32, w [O, k, k, C] packed as linear's [O, k k C], y [B, H / s, W / s, O]
//
//      k C           A pixel of y is a row of a linear: the k x k window of x around it. The rows are
//    +-----+         never stored: gemm.c asks for MC of them at a time, KC values deep, and copies
//  k |     | -> row  runs of C values from x (or zeros, outside of it) straight into its scratch.
//    +-----+
//
// cost    2 B H W / s^2 O k k C flop; reads x once per NC outputs and tap: bound by the FMA units
// needs   as linear
#include <string.h>

#include "gemm.h"

static void pack_a(const Gemm *g, int64_t row, int64_t rows, int64_t k, int64_t depth, float *a) {
    int64_t across = (g->width - 1) / g->stride + 1, down = (g->height - 1) / g->stride + 1;
    for (int64_t i = 0; i < rows; i++, row++, a += LDA) {
        int64_t image = row / (down * across);
        int64_t top = row / across % down * g->stride - g->kernel / 2;
        int64_t left = row % across * g->stride - g->kernel / 2;
        for (int64_t j = 0, run; j < depth; j += run) {
            int64_t tap = (k + j) / g->channels, c = (k + j) % g->channels;
            int64_t y = top + tap / g->kernel, x = left + tap % g->kernel;
            run = smaller(g->channels - c, depth - j);
            if (y < 0 || y >= g->height || x < 0 || x >= g->width)
                memset(a + j, 0, run * sizeof(float));
            else
                memcpy(a + j,
                       (const float *)g->x +
                           ((image * g->height + y) * g->width + x) * g->channels + c,
                       run * sizeof(float));
        }
    }
}

#define CONV2D(name, stored, type)                                                                \
    EXPORT void SYMBOL(name)(const float *x, const type *w, const float *bias,                     \
                             const float *residual, float *y, int64_t batch, int64_t height,       \
                             int64_t width, int64_t channels, int64_t outputs, int64_t kernel,     \
                             int64_t stride, int activation) {                                     \
        int64_t pixels = ((height - 1) / stride + 1) * ((width - 1) / stride + 1);                 \
        SYMBOL(gemm)((Gemm){.n = batch * pixels, .k = kernel * kernel * channels, .m = outputs,    \
                            .weight = w, .format = stored, .bias = bias, .residual = residual,     \
                            .activation = activation, .residual_first = 1, .y = y, .x = x,         \
                            .pack_a = pack_a, .height = height, .width = width,                    \
                            .channels = channels, .kernel = kernel, .stride = stride});            \
    }

#ifdef __AVX512BF16__

CONV2D(conv2d_bf16, BF16, uint16_t)

#else

CONV2D(conv2d_f32, F32, float)
CONV2D(conv2d_f16, F16, uint16_t)
CONV2D(conv2d_bf16, BF16, uint16_t)

typedef struct {
    const float *x;
    float *y;
    int64_t height, width, channels, k;
} AvgPool;

static void run_pool(const void *arguments, int64_t task, Scratch *scratch) {  // one row of y
    (void)scratch;
    const AvgPool *a = arguments;
    int64_t across = a->width / a->k, c = a->channels;
    const float *x = a->x + task * a->k * a->width * c;
    vf scale = v_set1(1.0f / (float)(a->k * a->k));
    for (int64_t j = 0; j < across; j++)
        for (int64_t i = 0; i < c; i += LANES) {
            int n = lanes_left(c - i);
            vf sum = v_zero();
            for (int64_t cell = 0; cell < a->k * a->k; cell++) {
                int64_t pixel = cell / a->k * a->width + j * a->k + cell % a->k;
                sum = v_add(sum, v_load_n(x + pixel * c + i, n));
            }
            v_store_n(a->y + (task * across + j) * c + i, v_mul(sum, scale), n);
        }
}

EXPORT void SYMBOL(avg_pool2d_f32)(const float *x, float *y, int64_t batch, int64_t height,
                                   int64_t width, int64_t channels, int64_t k) {
    AvgPool a = {x, y, height, width, channels, k};
    parallel_for(run_pool, &a, batch * (height / k));
}

#endif
