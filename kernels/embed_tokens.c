// embed_tokens_backward: sums of the rows of dy          reference_backward.py::embed_tokens_backward
//
// ids, positions [N] i64, dy [N, D] -> dtoken_embedding [V, D], dpositional_embedding [L, D], which hold
// zeros: dtoken_embedding[ids[n]] += dy[n], and so with positions
//
//      D            A task is COLUMNS columns of all rows, in the order of n: the same token may come
//    +---+---+      many times, and its sum does not depend on the threads.
//  N | dy|   |
//    +---+---+
//
// cost    2 flop and 20 bytes a value
// needs   avx2 or avx512
#include "gemm.h"

#define COLUMNS 64  // four lines of a cache

typedef struct {
    const int64_t *ids, *positions;
    const float *dy;
    float *token, *position;
    int64_t n, d;
} EmbedTokens;

INLINE void add(float *sum, const float *x, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        int n = lanes_left(width - i);
        v_store_n(sum + i, v_add(v_load_n(sum + i, n), v_load_n(x + i, n)), n);
    }
}

static void run(const void *arguments, int64_t task, Scratch *scratch) {
    (void)scratch;
    const EmbedTokens *a = arguments;
    int64_t first = task * COLUMNS, width = smaller(COLUMNS, a->d - first);
    for (int64_t row = 0; row < a->n; row++) {
        const float *dy = a->dy + row * a->d + first;
        add(a->token + a->ids[row] * a->d + first, dy, width);
        add(a->position + a->positions[row] * a->d + first, dy, width);
    }
}

EXPORT void SYMBOL(embed_tokens_backward_f32)(const int64_t *ids, const int64_t *positions,
                                              const float *dy, float *dtoken_embedding,
                                              float *dpositional_embedding, int64_t n, int64_t d) {
    EmbedTokens a = {ids, positions, dy, dtoken_embedding, dpositional_embedding, n, d};
    parallel_for(run, &a, ceil_div(d, COLUMNS));
}
