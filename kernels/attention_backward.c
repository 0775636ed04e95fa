// attention_backward: dqkv of o = P v, P = softmax(q k^T / sqrt(Dh))
// attention_pool_backward: dq and dkv, with one query per sequence        reference_backward.py
//
// qkv, dqkv [N, 3, H, Dh], dy [N, H, Dh], f32; pool: q, dq, dy [B, H, Dh], kv, dkv [N, 2, H, Dh].
// Sequence b is rows cu_seqlens[b] .. [b+1]. Dots are over Dh, P is computed again.
//
//     dv = P^T dy    dP = dy v^T    dS = P (dP - sum P dP)    dq = dS k / sqrt(Dh)    dk = dS^T q / sqrt(Dh)
//
//             T keys, in panels of NR     A task is one sequence and head. It packs k^T, v^T and k once,
//            +----+----+----+             then takes BLOCK queries at a time; MR of them give their rows
//         Dh | k' v'   |    |             of P and dP, softmax's backward within the rows, and dq. What
//       Dh   +----+----+----+             the block adds to dk and dv comes last: there its rows of dS
//      +---+ +----+----+----+ ^           and P are the depth, and are read down their columns. So no
// MR   | q | |  P, dP -> dS | | BLOCK     more than BLOCK rows of P and dS are stored.
//      +---+ +----+----+----+ v
//
// cost    10 T^2 Dh flop and T^2 exp per head; 36 T Dh bytes. Bound by the FMA units and the exps.
// order   all sums run over keys or queries in order, within one sequence
// needs   avx2 or avx512; T <= 1024, Dh <= 128
#include "attention.h"

#define BLOCK 60                      // queries: whole tiles of 6 or 12
#define Q_ROW (MAX_HEAD_WIDTH + 16)   // an odd number of cache lines, see LDA

typedef struct {
    const float *q, *kv, *dy;  // kv: k, then v at width; dkv likewise
    float *dq, *dkv;
    const int32_t *cu_seqlens;
    int64_t q_row, kv_row, width, heads, head_width;  // rows: values from one token to the next
    int causal, pool;
} AttentionBackward;

typedef struct {
    float keys[MAX_KEYS * MAX_HEAD_WIDTH];      // k^T [T / NR][Dh][NR]
    float values[MAX_KEYS * MAX_HEAD_WIDTH];    // v^T [T / NR][Dh][NR]
    float key_rows[MAX_KEYS * MAX_HEAD_WIDTH];  // k [Dh / NR][T][NR]
    float q[BLOCK * Q_ROW], dy[BLOCK * Q_ROW];  // q / sqrt(Dh), dy
    float q_panels[BLOCK * MAX_HEAD_WIDTH], dy_panels[BLOCK * MAX_HEAD_WIDTH];  // [Dh / NR][rows][NR]
    float p[BLOCK * ROW], ds[BLOCK * ROW];
} Memory;
_Static_assert(sizeof(Memory) <= SCRATCH_BYTES, "MAX_KEYS or BLOCK is too large");

// One sequence and head.
typedef struct {
    const float *q, *dy;
    float *dq, *dk, *dv;
    int64_t queries, keys, d;
} Head;

static void pack_block(const float *x, int64_t row, int64_t rows, int64_t d, float scale, float *packed,
                       float *panels) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < d; j += LANES) {
            vf v = v_load_n(x + i * row + j, lanes_left(d - j));
            v_store(packed + i * Q_ROW + j, v_mul(v, v_set1(scale)));
        }
    pack_values(packed, Q_ROW, rows, d, panels);
}

// A row of scores -> P, and one of dP -> dS; the query sees n keys, and both are 0 from there to end.
INLINE void softmax_backward(float *p, float *ds, int64_t n, int64_t end) {
    vf scale = v_set1(1.0f / exponentials(p, n, end, 1)), sum = v_zero();
    for (int64_t t = 0; t < end; t += LANES) {
        vf weight = v_mul(v_load(p + t), scale);
        v_store(p + t, weight);
        sum = v_fma(weight, v_load(ds + t), sum);
    }
    vf mean = v_set1(v_sum(sum));
    for (int64_t t = 0; t < end; t += LANES)
        v_store(ds + t, v_mul(v_load(p + t), v_sub(v_load(ds + t), mean)));
}

INLINE void store_tile(int mr, vf acc[MR][NV], float *to) {
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) v_store(to + i * ROW + v * LANES, acc[i][v]);
}

// mr rows of P, dS and dq. row: of the first in its block, which begins at query `first` and sees `seen`.
INLINE void queries_tile(int mr, const AttentionBackward *a, const Head *h, int64_t first, int64_t row,
                         int64_t seen, Memory *m) {
    vf acc[MR][NV];
    float *p = m->p + row * ROW, *ds = m->ds + row * ROW;
    for (int64_t key = 0; key < seen; key += NR) {
        multiply(mr, F32, h->d, m->q + row * Q_ROW, Q_ROW, m->keys + key * h->d, acc);
        store_tile(mr, acc, p + key);
        multiply(mr, F32, h->d, m->dy + row * Q_ROW, Q_ROW, m->values + key * h->d, acc);
        store_tile(mr, acc, ds + key);
    }
    for (int i = 0; i < mr; i++)
        softmax_backward(p + i * ROW, ds + i * ROW, a->causal ? first + row + i + 1 : h->keys, seen);
    vf scale = v_set1(1.0f / sqrtf((float)h->d));
    for (int64_t c = 0; c < h->d; c += NR) {
        multiply(mr, F32, seen, ds, ROW, m->key_rows + c * h->keys, acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++) {
                int64_t column = c + v * LANES;
                v_store_n(h->dq + (first + row + i) * a->q_row + column, v_mul(acc[i][v], scale),
                          lanes_left(h->d - column));
            }
    }
}

// out [mr][d] += (columns of a)^T panels: a [rows][ROW], panels [d / NR][rows][NR]
INLINE void keys_tile(int mr, const float *a, const float *panels, int64_t rows, int64_t d, float *out,
                      int64_t out_row) {
    for (int64_t c = 0; c < d; c += NR, panels += rows * NR) {
        vf acc[MR][NV];
        for (int i = 0; i < mr; i++) acc[i][0] = acc[i][1] = v_zero();
        for (int64_t k = 0; k < rows; k++) {
            vf b0 = v_load(panels + k * NR), b1 = v_load(panels + k * NR + LANES);
            for (int i = 0; i < mr; i++) {
                vf ai = v_set1(a[k * ROW + i]);
                acc[i][0] = v_fma(ai, b0, acc[i][0]);
                acc[i][1] = v_fma(ai, b1, acc[i][1]);
            }
        }
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++) {
                int n = lanes_left(d - c - v * LANES);
                float *to = out + i * out_row + c + v * LANES;
                if (n) v_store_n(to, v_add(v_load_n(to, n), acc[i][v]), n);
            }
    }
}

static void run_block(const AttentionBackward *a, const Head *h, int64_t first, int64_t rows, Memory *m) {
    float scale = 1.0f / sqrtf((float)h->d);
    pack_block(h->q + first * a->q_row, a->q_row, rows, h->d, scale, m->q, m->q_panels);
    pack_block(h->dy + first * a->width, a->width, rows, h->d, 1.0f, m->dy, m->dy_panels);
    int64_t seen = a->causal ? first + rows : h->keys, tiles = ceil_div(rows, MR);
    for (int64_t i = 0; i < tiles; i++) {
        int64_t row = tile_start(rows, tiles, i);
#define CASE(height) \
    case height: queries_tile(height, a, h, first, row, seen, m); break;
        switch (tile_start(rows, tiles, i + 1) - row) { EACH_HEIGHT(CASE) }
#undef CASE
    }
    tiles = ceil_div(seen, MR);
    for (int64_t i = 0; i < tiles; i++) {
        int64_t key = tile_start(seen, tiles, i);
        float *dk = h->dk + key * a->kv_row, *dv = h->dv + key * a->kv_row;
#define CASE(height)                                                                            \
    case height:                                                                                \
        keys_tile(height, m->ds + key, m->q_panels, rows, h->d, dk, a->kv_row);                 \
        keys_tile(height, m->p + key, m->dy_panels, rows, h->d, dv, a->kv_row);                 \
        break;
        switch (tile_start(seen, tiles, i + 1) - key) { EACH_HEIGHT(CASE) }
#undef CASE
    }
}

static void run(const void *arguments, int64_t task, Scratch *scratch) {
    const AttentionBackward *a = arguments;
    Memory *m = (Memory *)scratch->memory;
    int64_t sequence = task / a->heads, d = a->head_width, head = task % a->heads * d;
    int64_t first = a->cu_seqlens[sequence], keys = a->cu_seqlens[sequence + 1] - first;
    int64_t query = a->pool ? sequence : first;
    const float *kv = a->kv + first * a->kv_row + head;
    float *dkv = a->dkv + first * a->kv_row + head;
    Head h = {.q = a->q + query * a->q_row + head, .dy = a->dy + query * a->width + head,
              .dq = a->dq + query * a->q_row + head, .dk = dkv, .dv = dkv + a->width,
              .queries = a->pool ? 1 : keys, .keys = keys, .d = d};
    pack_keys(kv, a->kv_row, keys, d, m->keys);
    pack_keys(kv + a->width, a->kv_row, keys, d, m->values);
    pack_values(kv, a->kv_row, keys, d, m->key_rows);
    for (int64_t t = 0; t < keys; t++)
        for (int64_t i = 0; i < d; i += LANES) {
            v_store_n(h.dk + t * a->kv_row + i, v_zero(), lanes_left(d - i));
            v_store_n(h.dv + t * a->kv_row + i, v_zero(), lanes_left(d - i));
        }
    int64_t blocks = ceil_div(h.queries, BLOCK);
    for (int64_t i = 0; i < blocks; i++) {
        int64_t row = tile_start(h.queries, blocks, i);
        run_block(a, &h, row, tile_start(h.queries, blocks, i + 1) - row, m);
    }
}

EXPORT void SYMBOL(attention_backward_f32)(const float *qkv, const float *dy, const int32_t *cu_seqlens,
                                           float *dqkv, int64_t batch, int64_t heads,
                                           int64_t head_width, int causal) {
    int64_t width = heads * head_width;
    AttentionBackward a = {.q = qkv, .kv = qkv + width, .dy = dy, .dq = dqkv, .dkv = dqkv + width,
                           .cu_seqlens = cu_seqlens, .q_row = 3 * width, .kv_row = 3 * width,
                           .width = width, .heads = heads, .head_width = head_width,
                           .causal = causal};
    parallel_for(run, &a, batch * heads);
}

EXPORT void SYMBOL(attention_pool_backward_f32)(const float *q, const float *kv, const float *dy,
                                                const int32_t *cu_seqlens, float *dq, float *dkv,
                                                int64_t batch, int64_t heads, int64_t head_width) {
    int64_t width = heads * head_width;
    AttentionBackward a = {.q = q, .kv = kv, .dy = dy, .dq = dq, .dkv = dkv, .cu_seqlens = cu_seqlens,
                           .q_row = width, .kv_row = 2 * width, .width = width, .heads = heads,
                           .head_width = head_width, .pool = 1};
    parallel_for(run, &a, batch * heads);
}
