// patchify: each P x P patch of the images as one row                     reference.py::patchify
//
// images [B, C, R, R] f32 -> rows [B G G, C P P], G = R / P, so that the patch convolution is a linear
//
//      P                                 A task is one row of patches of one image: each line of P
//    +----+----+----+        C P P       pixels of the image goes to its place in G rows.
//  P | p0 | p1 | p2 |     +---------+
//    +----+----+----+  -> | p0      |
//    |    |    |    |     | p1      |
//    +----+----+----+     +---------+
//
// cost    no flop, 8 bytes a pixel value: bound by memory
// needs   avx2 or avx512 (for memcpy's sake nothing)
#include <string.h>

#include "gemm.h"

typedef struct {
    const float *images;
    float *rows;
    int64_t channels, height, width, patch;
} Patchify;

static void run_patchify(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    const Patchify *a = arguments;
    int64_t p = a->patch, down = a->height / p, across = a->width / p;
    int64_t image = task / down, top = task % down * p, row = a->channels * p * p;
    for (int64_t c = 0; c < a->channels; c++)
        for (int64_t y = 0; y < p; y++) {
            const float *from = a->images + ((image * a->channels + c) * a->height + top + y) * a->width;
            float *to = a->rows + task * across * row + (c * p + y) * p;
            for (int64_t i = 0; i < across; i++) memcpy(to + i * row, from + i * p, p * sizeof(float));
        }
}

EXPORT void SYMBOL(patchify_f32)(const float *images, float *rows, int64_t batch, int64_t channels,
                                 int64_t height, int64_t width, int64_t patch) {
    Patchify a = {images, rows, channels, height, width, patch};
    parallel_for(run_patchify, &a, batch * (height / patch));
}
