// conv2d: y = act(x * w + bias + residual), padding k / 2                 reference.py::conv2d
// avg_pool2d: the mean of each k x k cell                                 reference.py::avg_pool2d
//
// x [B, H, W, C], w [O, k, k, C] packed as linear's [O, k k C], y [B, H / s, W / s, O]; x and y are f32,
// or bf16 for avx512_bf16 and amx
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

static void pack_a(const Gemm *g, int64_t row, int64_t rows, int64_t k, int64_t depth, void *a) {
    int64_t across = (g->width - 1) / g->stride + 1, down = (g->height - 1) / g->stride + 1;
    int64_t size = size_of(g->x_format);
    char *to = a;
    for (int64_t i = 0; i < rows; i++, row++, to += LDA * sizeof(float)) {
        int64_t image = row / (down * across);
        int64_t top = row / across % down * g->stride - g->kernel / 2;
        int64_t left = row % across * g->stride - g->kernel / 2;
        int whole = left >= 0 && left + g->kernel <= g->width;
        for (int64_t j = 0, run; j < depth; j += run) {
            int64_t tap = (k + j) / g->channels, c = (k + j) % g->channels;
            int64_t y = top + tap / g->kernel, x = left + tap % g->kernel;
            int64_t taps = whole ? g->kernel - tap % g->kernel : 1;  // that lie beside each other
            run = smaller(taps * g->channels - c, depth - j);
            if (y < 0 || y >= g->height || x < 0 || x >= g->width) {
                memset(to + j * size, 0, run * size);
                continue;
            }
            int64_t from = ((image * g->height + y) * g->width + x) * g->channels + c;
            memcpy(to + j * size, (const char *)g->x + from * size, run * size);
        }
    }
}

#define CONV2D(name, stored, type)                                                                \
    EXPORT void SYMBOL(name)(const void *x, const type *w, const float *bias,                      \
                             const void *residual, void *y, int64_t batch, int64_t height,         \
                             int64_t width, int64_t channels, int64_t outputs, int64_t kernel,     \
                             int64_t stride, int activation, int x_format, int y_format) {         \
        int64_t pixels = ((height - 1) / stride + 1) * ((width - 1) / stride + 1);                 \
        SYMBOL(gemm)((Gemm){.n = batch * pixels, .k = kernel * kernel * channels, .m = outputs,    \
                            .weight = w, .format = stored, .bias = bias, .residual = residual,     \
                            .activation = activation, .residual_first = 1, .y = y, .x = x,         \
                            .pack_a = pack_a, .x_format = x_format, .y_format = y_format,          \
                            .height = height, .width = width, .channels = channels,                \
                            .kernel = kernel, .stride = stride});                                  \
    }

#ifdef __AVX512BF16__
CONV2D(conv2d_bf16, BF16, uint16_t)
#else
CONV2D(conv2d_f32, F32, float)
CONV2D(conv2d_f16, F16, uint16_t)
CONV2D(conv2d_bf16, BF16, uint16_t)
#endif

typedef struct {
    const void *x;
    void *y;
    int64_t height, width, channels, k;
} AvgPool;

static void run_pool(const void *arguments, int64_t task, Scratch *scratch) {  // one row of y
    (void)scratch;
    const AvgPool *a = arguments;
    int64_t across = a->width / a->k, c = a->channels, x = task * a->k * a->width * c;
    vf scale = v_set1(1.0f / (float)(a->k * a->k));
    for (int64_t j = 0; j < across; j++)
        for (int64_t i = 0; i < c; i += LANES) {
            int n = lanes_left(c - i);
            vf sum = v_zero();
            for (int64_t cell = 0; cell < a->k * a->k; cell++) {
                int64_t pixel = cell / a->k * a->width + j * a->k + cell % a->k;
                sum = v_add(sum, load_n(ACTIVATIONS, a->x, x + pixel * c + i, n));
            }
            store_n(ACTIVATIONS, a->y, (task * across + j) * c + i, v_mul(sum, scale), n);
        }
}

EXPORT void ACTIVATION_SYMBOL(avg_pool2d)(const void *x, void *y, int64_t batch, int64_t height,
                                          int64_t width, int64_t channels, int64_t k) {
    AvgPool a = {x, y, height, width, channels, k};
    parallel_for(run_pool, &a, batch * (height / k));
}
