// embed_tokens: x = token_embedding[ids] + positional_embedding[positions]  reference.py::embed_tokens
// take: y[i] = x[rows[i]]
// l2_normalize: y = x / |x|, of embeddings, so f32 only                    reference.py::l2_normalize
// activate: x = quick_gelu(x), gelu(x) or relu(x), in place                reference.py::ACTIVATIONS
//
// x, y [N, D] values; ids, positions, rows [N] int32; token_embedding [V, D] values,
// positional_embedding [L, D] float.
//
//         lane 0  1 ... 31  0  1 ...         A warp takes a row, STEP values a lane at a time. activate
//       +----+----+----+----+----+           knows no rows: a thread takes DEPTH chunks, a block apart,
// row i |STEP|    |    |    |    | -> x_i    so that neighbours read neighbouring chunks.
//       +----+----+----+----+----+
//
// cost    a flop or a few (gelu 30), 4 bytes a 16-bit value: bound by memory
// launch  rows: grid N / WARPS, block 32 WARPS; activate: grid count / (THREADS DEPTH CHUNK), block
//         THREADS; no shared memory
// needs   any architecture. STEP: CHUNK, or 1 if D is not a multiple of that; ACTIVATION: one of those
//         below

#define QUICK_GELU 1
#define GELU 2
#define RELU 3

#define WARPS 4
#define THREADS 256
#define DEPTH 2

#ifdef STEP

INLINE int this_row() { return blockIdx.x * WARPS + threadIdx.x / 32; }

KERNEL(32 * WARPS)
SYMBOL(embed_tokens)(const int32_t *__restrict__ ids, const int32_t *__restrict__ positions,
                     const value *__restrict__ token_embedding, const float *__restrict__ positional_embedding,
                     value *__restrict__ x, int n, int d) {
    wait_for_previous();
    int row = this_row();
    if (row >= n) return;
    const value *token = token_embedding + (int64_t)ids[row] * d;
    const float *position = positional_embedding + (int64_t)positions[row] * d;
    value *to = x + (int64_t)row * d;
#pragma unroll 2
    for (int i = threadIdx.x % 32 * STEP; i < d; i += 32 * STEP) {
#if STEP == 1
        to[i] = from_float(to_float(token[i]) + position[i]);
#else
        Chunk c = load_chunk(token + i);
#pragma unroll
        for (int e = 0; e < STEP; e += 4) {
            float4 p = *reinterpret_cast<const float4 *>(position + i + e);
            c.v[e] = from_float(to_float(c.v[e]) + p.x);
            c.v[e + 1] = from_float(to_float(c.v[e + 1]) + p.y);
            c.v[e + 2] = from_float(to_float(c.v[e + 2]) + p.z);
            c.v[e + 3] = from_float(to_float(c.v[e + 3]) + p.w);
        }
        store_chunk(to + i, c);
#endif
    }
}

KERNEL(32 * WARPS)
SYMBOL(take)(const value *__restrict__ x, const int32_t *__restrict__ rows, value *__restrict__ y, int n, int d) {
    wait_for_previous();
    int row = this_row();
    if (row >= n) return;
    const value *from = x + (int64_t)rows[row] * d;
    value *to = y + (int64_t)row * d;
#pragma unroll 4
    for (int i = threadIdx.x % 32 * STEP; i < d; i += 32 * STEP)
#if STEP == 1
        to[i] = from[i];
#else
        store_chunk(to + i, load_chunk(from + i));
#endif
}

#if DTYPE == F32

KERNEL(32 * WARPS)
SYMBOL(l2_normalize)(const float *__restrict__ x, float *__restrict__ y, int n, int d) {
    wait_for_previous();
    int row = this_row();
    if (row >= n) return;
    const float *from = x + (int64_t)row * d;
    float *to = y + (int64_t)row * d, sum = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < d; i += 32) sum += from[i] * from[i];
    float length = sqrtf(warp_sum(sum));
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < d; i += 32) to[i] = from[i] / length;
}

#endif
#endif  // STEP

#ifdef ACTIVATION

INLINE float activation(float x) {
#if ACTIVATION == QUICK_GELU
    return x / (1.0f + exp2_fast(x * (-1.702f * 1.44269504f)));  // x sigmoid(1.702 x); -0 where exp is inf
#elif ACTIVATION == GELU
    return x * 0.5f * (1.0f + erff(x * 0.707106781f));
#else
    return x < 0.0f ? 0.0f : x;  // NaN stays NaN
#endif
}

KERNEL(THREADS)
SYMBOL(activate)(value *x, int64_t count) {
    wait_for_previous();
    int64_t first = ((int64_t)blockIdx.x * THREADS * DEPTH + threadIdx.x) * CHUNK;
    Chunk c[DEPTH];
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        int64_t i = first + k * THREADS * CHUNK;
        if (i + CHUNK <= count) c[k] = load_chunk(x + i);
    }
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        int64_t i = first + k * THREADS * CHUNK;
        if (i + CHUNK <= count) {
#pragma unroll
            for (int e = 0; e < CHUNK; e++) c[k].v[e] = from_float(activation(to_float(c[k].v[e])));
            store_chunk(x + i, c[k]);
        } else {
            for (; i < count; i++) x[i] = from_float(activation(to_float(x[i])));
        }
    }
}

#endif  // ACTIVATION
