// layer_norm: y = (x - mean) / sqrt(var + eps) weight + bias              reference.py::layer_norm
// add_layer_norm: x + h, and its LayerNorm
// embed_patches: the class token before the patches of each image, plus positions, and their LayerNorm
// l2_normalize: x / |x|, of embeddings, so f32 only
// layer_norm_backward: dx, dweight and dbias        reference_backward.py::layer_norm_backward, f32 only
//
// x, sum [N, D] f32, row-major; h, y [N, D] f32, or bf16 for avx512_bf16 and amx; weight, bias [D]. x is
// the residual stream, which stays f32: only what is multiplied next is rounded.
//
//         D            A task is ROWS rows. Each is read three times (mean, variance, result), the
//      +------+        second and third time from L1.
// ROWS |  x   |
//      +------+
//
// Backward a task is a block of rows, whose share of dweight and dbias it adds up in a row of `sums`, in
// L1; the shares are then added in the order of the blocks, a task for a few columns. So they depend on the
// size of a block and not on the threads.
//
// cost    7 flop and 8 bytes a value (12 + 4 with h), backward 20 flop and 12 bytes: bound by memory
//         beyond the last cache
// needs   avx2 or avx512
#include <math.h>
#include <string.h>

#include "gemm.h"

#define ROWS 8
#define CHAINS 4

typedef struct {
    const float *x, *weight, *bias;
    const Activation *h;
    float *sum;
    Activation *y;
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

INLINE void normalize(const float *x, const float *weight, const float *bias, int64_t d, float eps,
                      int format, void *y) {
    vf mean = v_set1(sum(x, d, v_zero(), 0) / (float)d);
    vf scale = v_set1(1.0f / sqrtf(sum(x, d, mean, 1) / (float)d + eps));
    for (int64_t i = 0; i < d; i += LANES) {
        int n = lanes_left(d - i);
        vf c = v_mul(v_sub(v_load_n(x + i, n), mean), scale);
        store_n(format, y, i, v_fma(c, v_load_n(weight + i, n), v_load_n(bias + i, n)), n);
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
                vf h = load_n(ACTIVATIONS, p->h, row * p->d + i, n);
                v_store_n(sum + i, v_add(v_load_n(x + i, n), h), n);
            }
            x = sum;
        }
        normalize(x, p->weight, p->bias, p->d, p->eps, ACTIVATIONS, p->y + row * p->d);
    }
}

EXPORT void ACTIVATION_SYMBOL(layer_norm)(const float *x, const float *weight, const float *bias,
                                          Activation *y, int64_t n, int64_t d, float eps) {
    LayerNorm p = {.x = x, .weight = weight, .bias = bias, .y = y, .n = n, .d = d, .eps = eps};
    parallel_for(run, &p, ceil_div(n, ROWS));
}

EXPORT void ACTIVATION_SYMBOL(add_layer_norm)(const float *x, const Activation *h, const float *weight,
                                              const float *bias, float *sum, Activation *y, int64_t n,
                                              int64_t d, float eps) {
    LayerNorm p = {.x = x, .h = h, .weight = weight, .bias = bias, .sum = sum, .y = y, .n = n,
                   .d = d, .eps = eps};
    parallel_for(run, &p, ceil_div(n, ROWS));
}

typedef struct {
    const Activation *patches;
    const float *class_embedding, *positional_embedding, *weight, *bias;
    float *x;
    int64_t tokens, width;
    float eps;
} EmbedPatches;

static void run_embed(const void *arguments, int64_t image, Scratch *scratch) {
    (void)scratch;
    const EmbedPatches *a = arguments;
    const Activation *patches = a->patches + image * (a->tokens - 1) * a->width;
    for (int64_t t = 0; t < a->tokens; t++) {
        float *x = a->x + (image * a->tokens + t) * a->width;
        for (int64_t i = 0; i < a->width; i += LANES) {
            int n = lanes_left(a->width - i);
            vf token = t ? load_n(ACTIVATIONS, patches, (t - 1) * a->width + i, n)
                         : v_load_n(a->class_embedding + i, n);
            vf position = v_load_n(a->positional_embedding + t * a->width + i, n);
            v_store_n(x + i, v_add(token, position), n);
        }
        normalize(x, a->weight, a->bias, a->width, a->eps, F32, x);
    }
}

EXPORT void ACTIVATION_SYMBOL(embed_patches)(const Activation *patches, const float *class_embedding,
                                             const float *positional_embedding, const float *weight,
                                             const float *bias, float *x, int64_t batch,
                                             int64_t tokens, int64_t width, float eps) {
    EmbedPatches a = {patches, class_embedding, positional_embedding, weight, bias, x, tokens, width,
                      eps};
    parallel_for(run_embed, &a, batch);
}

#if PAIR == 1

static void run_l2(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    const LayerNorm *p = arguments;
    int64_t end = smaller(p->n, (task + 1) * ROWS);
    for (int64_t row = task * ROWS; row < end; row++) {
        const float *x = p->x + row * p->d;
        vf length = v_set1(sqrtf(sum(x, p->d, v_zero(), 1)));
        for (int64_t i = 0; i < p->d; i += LANES) {
            int n = lanes_left(p->d - i);
            v_store_n(p->y + row * p->d + i, v_div(v_load_n(x + i, n), length), n);
        }
    }
}

EXPORT void SYMBOL(l2_normalize_f32)(const float *x, float *y, int64_t n, int64_t d) {
    LayerNorm p = {.x = x, .y = y, .n = n, .d = d};
    parallel_for(run_l2, &p, ceil_div(n, ROWS));
}

#define COLUMNS 64  // of dweight and dbias, whose shares a task adds

typedef struct {
    const float *x, *weight, *dy;
    float *dx, *dweight, *dbias, *sums;  // sums [blocks][2][D]: of dweight, then of dbias
    int64_t n, d, rows, blocks;  // rows: of a block
    float eps;
} Backward;

// With z = (x - mean) / std and g = dy weight: dx = (g - mean(g) - z mean(g z)) / std
INLINE void row_backward(const Backward *p, int64_t row, float *dweight, float *dbias) {
    const float *x = p->x + row * p->d, *dy = p->dy + row * p->d;
    vf mean = v_set1(sum(x, p->d, v_zero(), 0) / (float)p->d);
    vf scale = v_set1(1.0f / sqrtf(sum(x, p->d, mean, 1) / (float)p->d + p->eps));
    vf g_sum = v_zero(), gz_sum = v_zero();
    for (int64_t i = 0; i < p->d; i += LANES) {
        int n = lanes_left(p->d - i);
        vf z = v_mul(v_sub(v_load_n(x + i, n), mean), scale), d = v_load_n(dy + i, n);
        vf g = v_mul(d, v_load_n(p->weight + i, n));
        v_store_n(dweight + i, v_fma(d, z, v_load_n(dweight + i, n)), n);
        v_store_n(dbias + i, v_add(d, v_load_n(dbias + i, n)), n);
        g_sum = v_add(g_sum, g);
        gz_sum = v_fma(g, z, gz_sum);
    }
    vf g_mean = v_set1(v_sum(g_sum) / (float)p->d), gz_mean = v_set1(v_sum(gz_sum) / (float)p->d);
    for (int64_t i = 0; i < p->d; i += LANES) {
        int n = lanes_left(p->d - i);
        vf z = v_mul(v_sub(v_load_n(x + i, n), mean), scale);
        vf g = v_mul(v_load_n(dy + i, n), v_load_n(p->weight + i, n));
        vf dx = v_mul(v_fnma(z, gz_mean, v_sub(g, g_mean)), scale);
        v_store_n(p->dx + row * p->d + i, dx, n);
    }
}

static void run_backward(const void *arguments, int64_t block, Scratch *scratch) {
    (void)scratch;
    const Backward *p = arguments;
    float *dweight = p->sums + block * 2 * p->d;
    memset(dweight, 0, 2 * p->d * sizeof *dweight);
    int64_t end = smaller(p->n, (block + 1) * p->rows);
    for (int64_t row = block * p->rows; row < end; row++) row_backward(p, row, dweight, dweight + p->d);
}

static void run_totals(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    const Backward *p = arguments;
    int64_t end = smaller(p->d, (task + 1) * COLUMNS);
    for (int64_t i = task * COLUMNS; i < end; i += LANES) {
        int n = lanes_left(end - i);
        vf dweight = v_zero(), dbias = v_zero();
        for (int64_t block = 0; block < p->blocks; block++) {
            const float *sums = p->sums + block * 2 * p->d + i;
            dweight = v_add(dweight, v_load_n(sums, n));
            dbias = v_add(dbias, v_load_n(sums + p->d, n));
        }
        v_store_n(p->dweight + i, dweight, n);
        v_store_n(p->dbias + i, dbias, n);
    }
}

EXPORT void SYMBOL(layer_norm_backward_f32)(const float *x, const float *weight, const float *dy,
                                            float *dx, float *dweight, float *dbias, float *sums,
                                            int64_t n, int64_t d, int64_t rows, float eps) {
    Backward p = {.x = x, .weight = weight, .dy = dy, .dx = dx, .dweight = dweight, .dbias = dbias,
                  .sums = sums, .n = n, .d = d, .rows = rows, .blocks = ceil_div(n, rows), .eps = eps};
    parallel_for(run_backward, &p, p.blocks);
    parallel_for(run_totals, &p, ceil_div(d, COLUMNS));
}

#endif
