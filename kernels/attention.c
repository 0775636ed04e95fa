// attention: o = softmax(q k^T / sqrt(Dh)) v, per sequence and head       reference.py::attention
//
// qkv [N, 3, H, Dh], read in place -> o [N, H, Dh]; sequence b is rows cu_seqlens[b] .. [b+1]. qkv and o
// are f32; for avx512_bf16 and amx bf16, and so are the weights of the keys: sums stay f32.
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
#include "attention.h"

typedef struct {
    const Activation *q, *kv;  // kv: k, then v at width
    Activation *o;
    const int32_t *cu_seqlens;
    int64_t row, width, heads, head_width;  // row: values from one token to the next in q and kv
    int causal;
} Attention;

// Packed for multiply, or multiply_pairs: where PAIR is 2, a float of these is a pair of bfloat16.
typedef struct {
    float keys[MAX_KEYS * MAX_HEAD_WIDTH / PAIR];    // [T / NR][Dh / PAIR][NR]
    float values[MAX_KEYS * MAX_HEAD_WIDTH / PAIR];  // [Dh / NR][T / PAIR][NR]
    float q[MR * ROW], scores[MR * ROW];
} Memory;
_Static_assert(sizeof(Memory) <= SCRATCH_BYTES, "MAX_KEYS is too large");

static void pack_q(const Activation *q, int64_t row, int64_t rows, int64_t d, float *packed) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < padded(d); j += LANES)
            v_store(packed + i * ROW + j, load_row(q + i * row + j * PAIR, d - j * PAIR));
}

// acc [mr][NV] = a w, depth in floats or pairs
INLINE void product(int mr, int64_t depth, const float *a, const float *w, vf acc[MR][NV]) {
#if PAIR == 2
    multiply_pairs(mr, depth, a, ROW, (const uint16_t *)w, acc);
#else
    multiply(mr, F32, depth, a, ROW, w, acc);
#endif
}

// The next head's rows lie behind this one's, stretches too short for the hardware to foresee.
static void prefetch_next_head(const Activation *q, int64_t row, int64_t width, int64_t keys, int64_t d) {
    for (int64_t t = 0; t < keys; t++)
        for (int64_t part = 0; part < 3; part++)
            for (int64_t i = d; i < 2 * d; i += 64 / (int64_t)sizeof *q)
                __builtin_prefetch(q + t * row + part * width + i);
}

INLINE void attend(int mr, const Attention *a, int64_t row, int64_t keys, Activation *o, Memory *m) {
    vf acc[MR][NV];
    int64_t d = a->head_width, seen = a->causal ? row + mr : keys;
    vf scale = v_set1(1.0f / sqrtf((float)d));
    for (int64_t key = 0; key < seen; key += NR) {
        product(mr, padded(d), m->q, m->keys + key * padded(d), acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++)
                v_store(m->scores + i * ROW + key + v * LANES, v_mul(acc[i][v], scale));
    }
    float scales[MR];
    for (int i = 0; i < mr; i++) {
        int64_t n = a->causal ? row + i + 1 : keys;
        scales[i] = 1.0f / exponentials(m->scores + i * ROW, n, round_up(seen, K_STEP), PAIR);
    }
    for (int64_t c = 0; c < d; c += NR) {
        product(mr, padded(seen), m->scores, m->values + c * padded(keys), acc);
        for (int i = 0; i < mr; i++)
            for (int v = 0; v < NV; v++) {
                int64_t column = c + v * LANES;
                store_n(ACTIVATIONS, o, i * a->width + column, v_mul(acc[i][v], v_set1(scales[i])),
                        lanes_left(d - column));
            }
    }
}

static void run(const void *arguments, int64_t task, Scratch *scratch) {
    const Attention *a = arguments;
    Memory *m = (Memory *)scratch->memory;
    int64_t head = task % a->heads, first = a->cu_seqlens[task / a->heads];
    int64_t keys = a->cu_seqlens[task / a->heads + 1] - first, d = a->head_width;
    const Activation *q = a->q + first * a->row + head * d, *kv = a->kv + first * a->row + head * d;
    Activation *o = a->o + first * a->width + head * d;
    pack_keys(kv, a->row, keys, d, m->keys);
    pack_values(kv + a->width, a->row, keys, d, m->values);
    if (head + 1 < a->heads) prefetch_next_head(q, a->row, a->width, keys, d);
#ifdef NPCLIP_AMX
    tiles_begin();
#endif
    int64_t tiles = ceil_div(keys, MR);
    for (int64_t i = 0; i < tiles; i++) {
        int64_t row = tile_start(keys, tiles, i);
        int mr = (int)(tile_start(keys, tiles, i + 1) - row);
        pack_q(q + row * a->row, a->row, mr, d, m->q);
#ifdef NPCLIP_AMX
        attend(mr, a, row, keys, o + row * a->width, m);
#else
#define CASE(height) \
    case height: attend(height, a, row, keys, o + row * a->width, m); break;
        switch (mr) { EACH_HEIGHT(CASE) }
#undef CASE
#endif
    }
#ifdef NPCLIP_AMX
    tiles_end();
#endif
}

EXPORT void ACTIVATION_SYMBOL(attention)(const Activation *qkv, const int32_t *cu_seqlens,
                                         Activation *o, int64_t batch, int64_t heads,
                                         int64_t head_width, int causal) {
    int64_t width = heads * head_width;
    Attention a = {.q = qkv, .kv = qkv + width, .o = o, .cu_seqlens = cu_seqlens, .row = 3 * width,
                   .width = width, .heads = heads, .head_width = head_width, .causal = causal};
    parallel_for(run, &a, batch * heads);
}

// attention_pool: one query per sequence, q [B, D] and kv [N, 2, H, Dh] -> o [B, D]. k and v are read
// once, so they stay where they are: a dot product per key, then a sum over the keys.
static void run_pool(const void *arguments, int64_t task, Scratch *scratch) {
    const Attention *a = arguments;
    float *scores = (float *)scratch->memory;
    int64_t sequence = task / a->heads, head = task % a->heads, d = a->head_width;
    int64_t first = a->cu_seqlens[sequence], keys = a->cu_seqlens[sequence + 1] - first;
    const Activation *q = a->q + sequence * a->width + head * d;
    const Activation *k = a->kv + first * a->row + head * d, *v = k + a->width;
    Activation *o = a->o + sequence * a->width + head * d;
    float scale = 1.0f / sqrtf((float)d);
    for (int64_t t = 0; t < keys; t++) {
        vf sum = v_zero();
        for (int64_t i = 0; i < d; i += LANES) {
            int n = lanes_left(d - i);
            sum = v_fma(load_n(ACTIVATIONS, q, i, n), load_n(ACTIVATIONS, k, t * a->row + i, n), sum);
        }
        scores[t] = v_sum(sum) * scale;
    }
    vf normalizer = v_set1(1.0f / exponentials(scores, keys, keys, 1));
    for (int64_t i = 0; i < d; i += LANES) {
        int n = lanes_left(d - i);
        vf sum = v_zero();
        for (int64_t t = 0; t < keys; t++)
            sum = v_fma(v_set1(scores[t]), load_n(ACTIVATIONS, v, t * a->row + i, n), sum);
        store_n(ACTIVATIONS, o, i, v_mul(sum, normalizer), n);
    }
}

EXPORT void ACTIVATION_SYMBOL(attention_pool)(const Activation *q, const Activation *kv,
                                              const int32_t *cu_seqlens, Activation *o, int64_t batch,
                                              int64_t heads, int64_t head_width) {
    int64_t width = heads * head_width;
    Attention a = {.q = q, .kv = kv, .o = o, .cu_seqlens = cu_seqlens, .row = 2 * width,
                   .width = width, .heads = heads, .head_width = head_width};
    parallel_for(run_pool, &a, batch * heads);
}
