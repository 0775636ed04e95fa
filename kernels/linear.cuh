// linear.cuh: what linear.cu and linear_hopper.cu share: how a result is finished and stored, and where the
// tiles of y lie.
#pragma once

#define QUICK_GELU 1
#define GELU 2
#define RELU 3

#define GROUP 8  // tiles of y in a column that neighbouring blocks take

#if RESULT_F32 || DTYPE == F32
typedef float result;
INLINE float from_result(result x) { return x; }
INLINE result to_result(float x) { return x; }
#else
typedef value result;
INLINE float from_result(result x) { return to_float(x); }
INLINE result to_result(float x) { return from_float(x); }
#endif

#define PIECE (16 / (int)sizeof(result))
struct __align__(16) Piece {
    result v[PIECE];
};

INLINE float activate(float x) {
#if ACTIVATION == QUICK_GELU
    return x * reciprocal_fast(1.0f + exp2_fast(x * (-1.702f * 1.44269504f)));  // x sigmoid(1.702 x)
#elif ACTIVATION == GELU
    return x * 0.5f * (1.0f + erff(x * 0.707106781f));
#elif ACTIVATION == RELU
    return x < 0.0f ? 0.0f : x;  // NaN stays NaN
#else
    return x;
#endif
}

INLINE result finish(float sum, float bias, float residual) {
#if RESIDUAL_FIRST
    return to_result(activate(sum + bias + residual));
#else
    return to_result(activate(sum + bias) + residual);
#endif
}

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where a tile begins. The order goes down GROUP tiles, then to the next column; a band of GROUP tiles is done
// before the next begins.
struct Place {
    int row, column;
};
INLINE Place place(int index, int n, int m, int tile_n, int tile_m) {
    int rows = ceil_div(n, tile_n), band = GROUP * ceil_div(m, tile_m);
    int first = index / band * GROUP, in_band = index % band;
    int height = min(rows - first, GROUP);
    return {(first + in_band % height) * tile_n, in_band / height * tile_m};
}
