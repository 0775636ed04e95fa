// attention: o = softmax(q k^T / sqrt(Dh)) v, per sequence and head       reference.py::attention
//
// qkv [N, 3, H, Dh] f32, read in place -> o [N, H, Dh]; sequence b is rows cu_seqlens[b] .. [b+1]
//
//            T keys, in panels of NR     A task is one sequence and head. It packs k^T and v into
//          +----+----+----+              panels as gemm.h's micro-kernel reads them, then takes MR
//       Dh | k' |    |    |              rows of q at a time: their scores against all keys fit in
//          +----+----+----+              L1, so that softmax needs no second look at k or v.
//      Dh
//    +----+ +----+----+----+    +---+
// MR | q  | | s, then exp  | x T| v |    sum_t exp(s_t - max) v_t, divided by sum_t exp(s_t - max)
//    +----+ +----+----+----+    +---+
//                                Dh
//
// cost    4 T^2 Dh flop and T^2 exp per head; 16 T Dh bytes. Bound by the FMA units and the exps.
// order   all sums run over the keys in order, within one sequence: the batch does not matter
// needs   avx2 or avx512; T <= 1024, Dh <= 128
#include <math.h>
#include <string.h>

#include "gemm.h"

#define MAX_KEYS 1024
#define MAX_HEAD_WIDTH 128
#define ROW (MAX_KEYS + 16)  // from one row of scores to the next; not a multiple of 4 KB, see LDA

typedef struct {
    const float *q, *kv;  // kv: k, then v at width
    float *o;
    const int32_t *cu_seqlens;
    int64_t row, width, heads, head_width;  // row: floats from one token to the next in q and kv
    int causal;
} Attention;

typedef struct {
    float keys[MAX_KEYS * MAX_HEAD_WIDTH];    // [T / NR][Dh][NR]
    float values[MAX_KEYS * MAX_HEAD_WIDTH];  // [Dh / NR][T][NR]
    float q[MR * ROW], scores[MR * ROW];
} Memory;
_Static_assert(sizeof(Memory) <= SCRATCH_BYTES, "MAX_KEYS is too large");

// scores -> exp(scores - max) of n values, which end in -inf up to a whole vector; returns their sum
INLINE float exponentials(float *scores, int64_t n) {
    int64_t end = ceil_div(n, LANES) * LANES;
    for (int64_t t = n; t < end; t++) scores[t] = -INFINITY;
    vf most = v_load(scores), sum = v_zero();
    for (int64_t t = LANES; t < end; t += LANES) most = v_max(most, v_load(scores + t));
    most = v_set1(v_largest(most));
    for (int64_t t = 0; t < end; t += LANES) {
        vf e = v_exp(v_sub(v_load(scores + t), most));
        v_store(scores + t, e);
        sum = v_add(sum, e);
    }
    return v_sum(sum);
}

static void pack_keys_and_values(const float *kv, int64_t row, int64_t width, int64_t keys, int64_t d,
                                 Memory *m) {
    int64_t panels = ceil_div(d, NR);
    for (int64_t t = 0; t < keys; t++, kv += row) {
        float *k = m->keys + t / NR * NR * d + t % NR;
        for (int64_t i = 0; i < d; i++) k[i * NR] = kv[i];
        for (int64_t p = 0; p < panels; p++) {
            float *v = m->values + (p * keys + t) * NR;
            const float *from = kv + width + p * NR;
            for (int64_t i = 0; i < NR; i += LANES)
                v_store(v + i, v_load_n(from + i, lanes_left(d - p * NR - i)));
        }
    }
    for (int64_t t = keys; t % NR; t++)
        for (int64_t i = 0; i < d; i++) m->keys[t / NR * NR * d + i * NR + t % NR] = 0;
}

INLINE void attend(int mr, const Attention *a, int64_t row, int64_t keys, float *o, Memory *m) {
    vf acc[MR][NV];
    int64_t d = a->head_width, seen = a->causal ? row + mr : keys;
    float scale = 1.0f / sqrtf((float)d);
    for (int64_t key = 0; key < seen; key += NR) {
        multiply(mr, F32, d, m->q, ROW, m->keys + key * d, acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++)
                v_store(m->scores + i * ROW + key + v * LANES, v_mul(acc[i][v], v_set1(scale)));
    }
    float sums[MR];
    for (int i = 0; i < mr; i++) {
        int64_t n = a->causal ? row + i + 1 : keys;
        sums[i] = exponentials(m->scores + i * ROW, n);
        for (int64_t t = n; t < seen; t++) m->scores[i * ROW + t] = 0;
    }
    for (int64_t c = 0; c < d; c += NR) {
        multiply(mr, F32, seen, m->scores, ROW, m->values + c * keys, acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++)
                v_store_n(o + i * a->width + c + v * LANES, v_div(acc[i][v], v_set1(sums[i])),
                          lanes_left(d - c - v * LANES));
    }
}

static void run(const void *arguments, int64_t task, Scratch *scratch) {
    const Attention *a = arguments;
    Memory *m = (Memory *)scratch->memory;
    int64_t head = task % a->heads, first = a->cu_seqlens[task / a->heads];
    int64_t keys = a->cu_seqlens[task / a->heads + 1] - first, d = a->head_width;
    const float *q = a->q + first * a->row + head * d, *kv = a->kv + first * a->row + head * d;
    float *o = a->o + first * a->width + head * d;
    pack_keys_and_values(kv, a->row, a->width, keys, d, m);
    int64_t tiles = ceil_div(keys, MR);
    for (int64_t i = 0; i < tiles; i++) {
        int64_t row = tile_start(keys, tiles, i);
        int mr = (int)(tile_start(keys, tiles, i + 1) - row);
        for (int r = 0; r < mr; r++)
            memcpy(m->q + r * ROW, q + (row + r) * a->row, d * sizeof(float));
#define CASE(height) \
    case height: attend(height, a, row, keys, o + row * a->width, m); break;
        switch (mr) { EACH_HEIGHT(CASE) }
#undef CASE
    }
}

EXPORT void SYMBOL(attention_f32)(const float *qkv, const int32_t *cu_seqlens, float *o, int64_t batch,
                                  int64_t heads, int64_t head_width, int causal) {
    int64_t width = heads * head_width;
    Attention a = {.q = qkv, .kv = qkv + width, .o = o, .cu_seqlens = cu_seqlens, .row = 3 * width,
                   .width = width, .heads = heads, .head_width = head_width, .causal = causal};
    parallel_for(run, &a, batch * heads);
}

// attention_pool: one query per sequence, q [B, D] and kv [N, 2, H, Dh] -> o [B, D]. k and v are read
// once, so they stay where they are: a dot product per key, then a sum over the keys.
static void run_pool(const void *arguments, int64_t task, Scratch *scratch) {
    const Attention *a = arguments;
    Memory *m = (Memory *)scratch->memory;
    int64_t sequence = task / a->heads, head = task % a->heads, d = a->head_width;
    int64_t first = a->cu_seqlens[sequence], keys = a->cu_seqlens[sequence + 1] - first;
    const float *q = a->q + sequence * a->width + head * d;
    const float *k = a->kv + first * a->row + head * d, *v = k + a->width;
    float *o = a->o + sequence * a->width + head * d, scale = 1.0f / sqrtf((float)d);
    for (int64_t t = 0; t < keys; t++) {
        vf sum = v_zero();
        for (int64_t i = 0; i < d; i += LANES) {
            int n = lanes_left(d - i);
            sum = v_fma(v_load_n(q + i, n), v_load_n(k + t * a->row + i, n), sum);
        }
        m->scores[t] = v_sum(sum) * scale;
    }
    float total = exponentials(m->scores, keys);
    for (int64_t i = 0; i < d; i += LANES) {
        int n = lanes_left(d - i);
        vf sum = v_zero();
        for (int64_t t = 0; t < keys; t++)
            sum = v_fma(v_set1(m->scores[t]), v_load_n(v + t * a->row + i, n), sum);
        v_store_n(o + i, v_div(sum, v_set1(total)), n);
    }
}

EXPORT void SYMBOL(attention_pool_f32)(const float *q, const float *kv, const int32_t *cu_seqlens,
                                       float *o, int64_t batch, int64_t heads, int64_t head_width) {
    int64_t width = heads * head_width;
    Attention a = {.q = q, .kv = kv, .o = o, .cu_seqlens = cu_seqlens, .row = 2 * width,
                   .width = width, .heads = heads, .head_width = head_width};
    parallel_for(run_pool, &a, batch * heads);
}
