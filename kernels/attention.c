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

// scores -> exp(scores - max) of n values; returns their sum. What follows them up to a whole vector
// is overwritten.
INLINE float exponentials(float *scores, int64_t n) {
    vf lowest = v_set1(-INFINITY), most = lowest, sum = v_zero();
    for (int64_t t = 0; t < n; t += LANES)
        most = v_max(most, v_select_n(v_load(scores + t), lowest, lanes_left(n - t)));
    most = v_set1(v_largest(most));
    for (int64_t t = 0; t < n; t += LANES) {
        vf e = v_exp(v_sub(v_load(scores + t), most));
        e = v_first_n(e, lanes_left(n - t));
        v_store(scores + t, e);
        sum = v_add(sum, e);
    }
    return v_sum(sum);
}

static void pack_keys(const float *k, int64_t row, int64_t keys, int64_t d, float *packed) {
    for (int64_t t = 0; t < ceil_div(keys, NR) * NR; t += LANES)
        for (int64_t i = 0; i < d; i += LANES) {
            vf block[LANES];
            for (int64_t r = 0; r < LANES; r++)
                block[r] = t + r < keys ? v_load_n(k + (t + r) * row + i, lanes_left(d - i)) : v_zero();
            v_transpose(block);
            float *to = packed + t / NR * NR * d + i * NR + t % NR;
            for (int64_t r = 0; r < smaller(d - i, LANES); r++) v_store(to + r * NR, block[r]);
        }
}

static void pack_values(const float *v, int64_t row, int64_t keys, int64_t d, float *packed) {
    for (int64_t t = 0; t < keys; t++)
        for (int64_t i = 0; i < d; i += LANES)
            v_store(packed + (i / NR * keys + t) * NR + i % NR,
                    v_load_n(v + t * row + i, lanes_left(d - i)));
    if (d % NR && d % NR <= LANES)  // the last panel's second vector
        for (int64_t t = 0; t < keys; t++)
            v_store(packed + (d / NR * keys + t) * NR + LANES, v_zero());
}

// The next head's rows lie behind this one's, stretches too short for the hardware to foresee.
static void prefetch_next_head(const float *q, int64_t row, int64_t width, int64_t keys, int64_t d) {
    for (int64_t t = 0; t < keys; t++)
        for (int64_t part = 0; part < 3; part++)
            for (int64_t i = d; i < 2 * d; i += 16)
                __builtin_prefetch(q + t * row + part * width + i);
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
    float scales[MR];
    for (int i = 0; i < mr; i++) {
        int64_t n = a->causal ? row + i + 1 : keys;
        scales[i] = 1.0f / exponentials(m->scores + i * ROW, n);
        for (int64_t t = n; t < seen; t++) m->scores[i * ROW + t] = 0;
    }
    for (int64_t c = 0; c < d; c += NR) {
        multiply(mr, F32, seen, m->scores, ROW, m->values + c * keys, acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++)
                v_store_n(o + i * a->width + c + v * LANES, v_mul(acc[i][v], v_set1(scales[i])),
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
    pack_keys(kv, a->row, keys, d, m->keys);
    pack_values(kv + a->width, a->row, keys, d, m->values);
    if (head + 1 < a->heads) prefetch_next_head(q, a->row, a->width, keys, d);
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
    float scale_v = 1.0f / exponentials(m->scores, keys);
    for (int64_t i = 0; i < d; i += LANES) {
        int n = lanes_left(d - i);
        vf sum = v_zero();
        for (int64_t t = 0; t < keys; t++)
            sum = v_fma(v_set1(m->scores[t]), v_load_n(v + t * a->row + i, n), sum);
        v_store_n(o + i, v_mul(sum, v_set1(scale_v)), n);
    }
}

EXPORT void SYMBOL(attention_pool_f32)(const float *q, const float *kv, const int32_t *cu_seqlens,
                                       float *o, int64_t batch, int64_t heads, int64_t head_width) {
    int64_t width = heads * head_width;
    Attention a = {.q = q, .kv = kv, .o = o, .cu_seqlens = cu_seqlens, .row = 2 * width,
                   .width = width, .heads = heads, .head_width = head_width};
    parallel_for(run_pool, &a, batch * heads);
}
