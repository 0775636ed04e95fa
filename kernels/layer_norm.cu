// layer_norm: y = (x - mean) / sqrt(var + eps) weight + bias              reference.py::layer_norm
// add_layer_norm: x + h, rounded to a value, and its LayerNorm
// embed_patches: the class token before the patches of each image, plus positions, and their LayerNorm
//
// x, h, total, y [N, D] values; weight, bias [D] float. patches [B (T - 1), D] values, class_embedding [D]
// and positional_embedding [T, D] float; token + position is not rounded before its LayerNorm. y and total
// may be x or h.
//
//           D = KEPT x 32 STEP, or less       A warp takes ROWS rows at once and keeps them in registers:
//         +--------+--------+-----+           lane l has values l STEP .. + STEP of each of the KEPT
// ROWS {  | 32 STEP|        |     |           stretches. Both rows share what is read of weight and bias,
//         +--------+--------+-----+           whose floats would else be most of what L1 delivers.
//
// The second pass sums the deviations as well as their squares: what they sum to is the rounding error of
// the first pass's mean, so a large common offset costs no accuracy.
//
// cost    9 flop and 4 bytes a 16-bit value (8 with h and total): bound by memory
// launch  grid N / (WARPS ROWS), block 32 WARPS, no shared memory
// needs   any architecture. KEPT: stretches of a row, 1 .. 2048 / (32 STEP), if D is a multiple of CHUNK;
//         0 for any D: ROWS is 1 then and the row is read again in each pass, from L1. STEP: values that a
//         lane reads at once, CHUNK or, if D is not a multiple of that, 1.

#define WARPS 4
#define ROWS (KEPT ? 2 : 1)
#define BOUNDS 32 * WARPS, 1  // 1 block: else ptxas would rather spill than miss an occupancy it aims at

struct Piece {
    float v[STEP];
};

INLINE Piece load_values(const value *p) {
    Piece x;
#if STEP == 1
    x.v[0] = to_float(*p);
#else
    Chunk c = load_chunk(p);
#pragma unroll
    for (int e = 0; e < STEP; e++) x.v[e] = to_float(c.v[e]);
#endif
    return x;
}

INLINE Piece load_floats(const float *p) {
    Piece x;
#if STEP == 1
    x.v[0] = *p;
#else
#pragma unroll
    for (int e = 0; e < STEP; e += 4) {
        float4 f = *reinterpret_cast<const float4 *>(p + e);
        x.v[e] = f.x, x.v[e + 1] = f.y, x.v[e + 2] = f.z, x.v[e + 3] = f.w;
    }
#endif
    return x;
}

INLINE void store_values(value *p, const Piece &x) {
#if STEP == 1
    *p = from_float(x.v[0]);
#else
    Chunk c;
#pragma unroll
    for (int e = 0; e < STEP; e++) c.v[e] = from_float(x.v[e]);
    store_chunk(p, c);
#endif
}

// Where a row comes from: load reads a piece, save is called once with each piece when the row was read
// (in part, if KEPT is 0), reload reads it after that.
struct Plain {
    const value *x;
    INLINE Piece load(int i) const { return load_values(x + i); }
    INLINE void save(int, const Piece &) const {}
    INLINE Piece reload(int i) const { return load(i); }
};

struct Sum {
    const value *x, *h;
    value *total;
    INLINE Piece load(int i) const {
        Piece a = load_values(x + i), b = load_values(h + i);
#pragma unroll
        for (int e = 0; e < STEP; e++) a.v[e] = to_float(from_float(a.v[e] + b.v[e]));
        return a;
    }
    INLINE void save(int i, const Piece &sum) const { store_values(total + i, sum); }
    INLINE Piece reload(int i) const { return load_values(total + i); }
};

struct Token {
    const value *patch;  // null for the class token
    const float *class_embedding, *position;
    INLINE Piece load(int i) const {
        Piece a = patch ? load_values(patch + i) : load_floats(class_embedding + i);
        Piece b = load_floats(position + i);
#pragma unroll
        for (int e = 0; e < STEP; e++) a.v[e] += b.v[e];
        return a;
    }
    INLINE void save(int, const Piece &) const {}
    INLINE Piece reload(int i) const { return load(i); }
};

template <class Source>
struct Rows {
    Source source[ROWS];
    int d;
#if KEPT
    Piece kept[ROWS][KEPT];
#endif

    // f(first column, the piece of each row) for all that this lane has.
    template <class Function>
    INLINE void each(Function f) {
        int lane = threadIdx.x % 32;
#if KEPT
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            int i = (k * 32 + lane) * STEP;
            if (k < KEPT - 1 || i < d) {
                Piece x[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; r++) x[r] = kept[r][k];
                f(i, x);
            }
        }
#else
        for (int i = lane * STEP; i < d; i += 32 * STEP) {
            Piece x[1] = {source[0].reload(i)};
            f(i, x);
        }
#endif
    }

    INLINE void read() {
        int lane = threadIdx.x % 32;
#if KEPT
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int k = 0; k < KEPT; k++) {
                int i = (k * 32 + lane) * STEP;
                if (k < KEPT - 1 || i < d) kept[r][k] = source[r].load(i);
            }
        each([&](int i, const Piece (&x)[ROWS]) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) source[r].save(i, x[r]);
        });
#else
        for (int i = lane * STEP; i < d; i += 32 * STEP) source[0].save(i, source[0].load(i));
#endif
    }

    INLINE void normalize(const float *weight, const float *bias, float eps, value *const (&y)[ROWS]) {
        const float share = 1.0f / d;  // of each value in a mean
        read();
        float mean[ROWS] = {}, rest[ROWS] = {}, scale[ROWS] = {};
        each([&](int, const Piece (&x)[ROWS]) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int e = 0; e < STEP; e++) mean[r] += x[r].v[e];
        });
#pragma unroll
        for (int r = 0; r < ROWS; r++) mean[r] = warp_sum(mean[r]) * share;
        each([&](int, const Piece (&x)[ROWS]) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int e = 0; e < STEP; e++) {
                    float deviation = x[r].v[e] - mean[r];
                    rest[r] += deviation;
                    scale[r] += deviation * deviation;
                }
        });
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            rest[r] = warp_sum(rest[r]) * share;
            scale[r] = rsqrtf(fmaxf(warp_sum(scale[r]) * share - rest[r] * rest[r], 0.0f) + eps);
        }
        each([&](int i, const Piece (&x)[ROWS]) {
            Piece w = load_floats(weight + i), b = load_floats(bias + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                Piece result;
#pragma unroll
                for (int e = 0; e < STEP; e++)
                    result.v[e] = (x[r].v[e] - mean[r] - rest[r]) * scale[r] * w.v[e] + b.v[e];
                store_values(y[r] + i, result);
            }
        });
    }
};

// This warp's first row; n or more if it has none.
INLINE int first_row() { return (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS; }

// Its row r. The last warp may have the last row twice.
INLINE int nth_row(int r, int n) { return min(first_row() + r, n - 1); }

KERNEL(BOUNDS)
SYMBOL(layer_norm)(const value *x, const float *weight, const float *bias, value *y, int n, int d, float eps) {
    wait_for_previous();
    if (first_row() >= n) return;
    Rows<Plain> rows;
    rows.d = d;
    value *to[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int64_t at = (int64_t)nth_row(r, n) * d;
        rows.source[r] = {x + at};
        to[r] = y + at;
    }
    rows.normalize(weight, bias, eps, to);
}

KERNEL(BOUNDS)
SYMBOL(add_layer_norm)(const value *x, const value *h, const float *weight, const float *bias, value *total,
                       value *y, int n, int d, float eps) {
    wait_for_previous();
    if (first_row() >= n) return;
    Rows<Sum> rows;
    rows.d = d;
    value *to[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int64_t at = (int64_t)nth_row(r, n) * d;
        rows.source[r] = {x + at, h + at, total + at};
        to[r] = y + at;
    }
    rows.normalize(weight, bias, eps, to);
}

KERNEL(BOUNDS)
SYMBOL(embed_patches)(const value *patches, const float *class_embedding, const float *positional_embedding,
                      const float *weight, const float *bias, value *x, int n, int tokens, int d, float eps) {
    wait_for_previous();
    if (first_row() >= n) return;
    Rows<Token> rows;
    rows.d = d;
    value *to[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = nth_row(r, n), image = row / tokens, token = row % tokens;
        const value *patch = token ? patches + (int64_t)(row - image - 1) * d : nullptr;
        rows.source[r] = {patch, class_embedding, positional_embedding + (int64_t)token * d};
        to[r] = x + (int64_t)row * d;
    }
    rows.normalize(weight, bias, eps, to);
}
