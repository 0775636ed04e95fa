// simd.h: the vectors of the ISA that a source is compiled for, and the functions of them.
//
// Every kernel is written once in these names and compiled once per ISA (CMakeLists.txt), so SYMBOL
// gives each copy its own: SYMBOL(linear_f32) is linear_f32_avx512.
//
//   vf            LANES floats in one register
//   v_*_n         the same for the first n lanes only, 0 <= n <= LANES; the others read as 0
//                 (v_select_n: as those of `other`)
//   vd            half as many doubles
//
// Multiplications and additions are fused where v_fma says so and nowhere else (-ffp-contract=off):
// a result must not depend on how the compiler arranged a loop.
#ifndef NPCLIP_SIMD_H
#define NPCLIP_SIMD_H

#include <immintrin.h>
#include <stdint.h>

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define SYMBOL(name) PASTE(name, ISA)
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

#define LANES 16
typedef __m512 vf;

INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
INLINE vf v_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE __mmask16 v_mask(int n) { return (__mmask16)((1u << n) - 1); }
#ifndef NPCLIP_SANITIZE
INLINE vf v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(v_mask(n), p); }
INLINE void v_store_n(float *p, vf x, int n) {
    if (n == LANES) v_store(p, x);  // masked stores are slow
    else _mm512_mask_storeu_ps(p, v_mask(n), x);
}
#endif
INLINE vf v_first_n(vf x, int n) { return _mm512_maskz_mov_ps(v_mask(n), x); }  // 0 after n lanes
INLINE vf v_select_n(vf x, vf other, int n) { return _mm512_mask_mov_ps(other, v_mask(n), x); }
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
INLINE vf v_sqrt(vf x) { return _mm512_sqrt_ps(x); }
INLINE vf v_round(vf x) { return _mm512_roundscale_ps(x, 8); }  // to nearest, ties to even
INLINE vf v_scale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }  // x 2^n, n a whole number
INLINE float v_sum(vf x) { return _mm512_reduce_add_ps(x); }
INLINE float v_largest(vf x) { return _mm512_reduce_max_ps(x); }
typedef __m512d vd;
INLINE vd vd_zero(void) { return _mm512_setzero_pd(); }
INLINE vd vd_fma(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
INLINE double vd_sum(vd x) { return _mm512_reduce_add_pd(x); }
INLINE vd v_widen(vf x, int high) {
    return _mm512_cvtps_pd(high ? _mm512_extractf32x8_ps(x, 1) : _mm512_castps512_ps256(x));
}
INLINE vf v_from_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE vf v_from_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf v_interleave(vf a, vf b, int high) {  // of each 128 bits: a0 b0 a1 b1, or a2 b2 a3 b3
    return high ? _mm512_unpackhi_ps(a, b) : _mm512_unpacklo_ps(a, b);
}
INLINE vf v_interleave2(vf a, vf b, int high) {  // a0 a1 b0 b1, or a2 a3 b2 b3
    __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
}
INLINE void v_gather_quarters(const vf in[LANES], vf out[LANES], int j) {
    vf a = _mm512_shuffle_f32x4(in[j], in[4 + j], 0x88);       // their quarters 0 and 2
    vf b = _mm512_shuffle_f32x4(in[j], in[4 + j], 0xdd);       // 1 and 3
    vf c = _mm512_shuffle_f32x4(in[8 + j], in[12 + j], 0x88);
    vf d = _mm512_shuffle_f32x4(in[8 + j], in[12 + j], 0xdd);
    out[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    out[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    out[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    out[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

#elif defined(__AVX2__)

#define LANES 8
typedef __m256 vf;

INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
INLINE vf v_set1(float x) { return _mm256_set1_ps(x); }
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE __m256i v_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#ifndef NPCLIP_SANITIZE
INLINE vf v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, v_mask(n)); }
INLINE void v_store_n(float *p, vf x, int n) {
    if (n == LANES) v_store(p, x);  // masked stores are slow
    else _mm256_maskstore_ps(p, v_mask(n), x);
}
#endif
INLINE vf v_first_n(vf x, int n) { return _mm256_and_ps(x, _mm256_castsi256_ps(v_mask(n))); }
INLINE vf v_select_n(vf x, vf other, int n) {
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(v_mask(n)));
}
INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf v_sqrt(vf x) { return _mm256_sqrt_ps(x); }
INLINE vf v_round(vf x) { return _mm256_round_ps(x, 8); }
INLINE vf v_scale2(vf x, vf n) {  // in two halves, so that neither power of two overflows
    __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1);
    __m256i rest = _mm256_sub_epi32(i, half), bias = _mm256_set1_epi32(127);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    return v_mul(v_mul(x, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}
INLINE float v_sum(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float v_largest(vf x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
typedef __m256d vd;
INLINE vd vd_zero(void) { return _mm256_setzero_pd(); }
INLINE vd vd_fma(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
INLINE double vd_sum(vd x) {
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
INLINE vd v_widen(vf x, int high) {
    return _mm256_cvtps_pd(high ? _mm256_extractf128_ps(x, 1) : _mm256_castps256_ps128(x));
}
INLINE vf v_from_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf v_from_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vf v_interleave(vf a, vf b, int high) {
    return high ? _mm256_unpackhi_ps(a, b) : _mm256_unpacklo_ps(a, b);
}
INLINE vf v_interleave2(vf a, vf b, int high) {
    __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_castpd_ps(high ? _mm256_unpackhi_pd(x, y) : _mm256_unpacklo_pd(x, y));
}
INLINE void v_gather_quarters(const vf in[LANES], vf out[LANES], int j) {
    out[j] = _mm256_permute2f128_ps(in[j], in[4 + j], 0x20);
    out[4 + j] = _mm256_permute2f128_ps(in[j], in[4 + j], 0x31);
}

#else
#error "simd.h knows AVX2 and AVX-512"
#endif

#ifdef NPCLIP_SANITIZE  // GCC's sanitizers look into memcpy, but not into masked loads and stores
#include <string.h>
INLINE vf v_load_n(const float *p, int n) {
    vf x = v_zero();
    memcpy(&x, p, n * sizeof *p);
    return x;
}
INLINE void v_store_n(float *p, vf x, int n) { memcpy(p, &x, n * sizeof *p); }
#endif

#ifdef __AVX512BF16__

// Values of bfloat16: v_from_bf16_n and v_to_bf16_n widen and round LANES of them, the rest move 2 LANES.
#ifndef NPCLIP_SANITIZE
INLINE __m512i v_load16_n(const uint16_t *p, int n) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
INLINE vf v_from_bf16_n(const uint16_t *p, int n) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(v_mask(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE void v_to_bf16_n(uint16_t *p, vf x, int n) {
    __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    if (n == LANES) _mm256_storeu_si256((__m256i *)p, bits);
    else _mm256_mask_storeu_epi16(p, v_mask(n), bits);
}
#else
INLINE __m512i v_load16_n(const uint16_t *p, int n) {
    __m512i x = _mm512_setzero_si512();
    memcpy(&x, p, n * sizeof *p);
    return x;
}
INLINE vf v_from_bf16_n(const uint16_t *p, int n) {
    uint16_t bits[LANES] = {0};
    memcpy(bits, p, n * sizeof *p);
    return v_from_bf16(bits);
}
INLINE void v_to_bf16_n(uint16_t *p, vf x, int n) {
    __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    memcpy(p, &bits, n * sizeof *p);
}
#endif
INLINE __m512i v_to_bf16_pairs(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INLINE __m512i v_interleave16(__m512i a, __m512i b, int high) {  // a0 b0 a1 b1 ... of the low or high half
    __m512i to = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009,
                                  0x280008, 0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002,
                                  0x210001, 0x200000);
    if (high) to = _mm512_add_epi16(to, _mm512_set1_epi16(16));
    return _mm512_permutex2var_epi16(a, to, b);
}

#endif

// rows[i][j] -> rows[j][i]: 4 x 4 blocks are transposed within each 128 bits, then put in order.
INLINE void v_transpose(vf rows[LANES]) {
    vf t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = v_interleave(rows[i], rows[i + 1], 0);
        t[i + 1] = v_interleave(rows[i], rows[i + 1], 1);
    }
    vf u[LANES];
    for (int i = 0; i < LANES; i += 4)
        for (int half = 0; half < 2; half++) {
            u[i + 2 * half] = v_interleave2(t[i + half], t[i + 2 + half], 0);
            u[i + 2 * half + 1] = v_interleave2(t[i + half], t[i + 2 + half], 1);
        }
    for (int j = 0; j < 4; j++) v_gather_quarters(u, rows, j);
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; the polynomial is that of Cephes' expf
// (S. Moshier), right to about 1 ulp. x is taken into -87.3 .. 88.7,
// where exp(x) is a normal number.
INLINE vf v_exp(vf x) {
    x = v_min(v_max(x, v_set1(-87.3f)), v_set1(88.7f));
    vf n = v_round(v_mul(x, v_set1(1.44269504088896341f)));
    vf r = v_fnma(n, v_set1(0.693359375f), x);
    r = v_fnma(n, v_set1(-2.12194440e-4f), r);
    vf p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    return v_scale2(v_add(v_fma(v_mul(r, r), p, r), v_set1(1.0f)), n);
}

// erf(x) = x P(x^2) / Q(x^2), |x| <= 4: a minimax fit, right to 3e-7; beyond, erf(x) rounds to 1.
INLINE vf v_erf(vf x) {
    x = v_min(v_max(x, v_set1(-4.0f)), v_set1(4.0f));
    vf z = v_mul(x, x), p = v_set1(-2.72614225801306e-10f), q = v_set1(-1.45660718464996e-05f);
    p = v_fma(p, z, v_set1(2.77068142495902e-08f));
    p = v_fma(p, z, v_set1(-2.10102402082508e-06f));
    p = v_fma(p, z, v_set1(-5.69250639462346e-05f));
    p = v_fma(p, z, v_set1(-7.34990630326855e-04f));
    p = v_fma(p, z, v_set1(-2.95459980854025e-03f));
    p = v_fma(p, z, v_set1(-1.60960333262415e-02f));
    q = v_fma(q, z, v_set1(-2.13374055278905e-04f));
    q = v_fma(q, z, v_set1(-1.68282697438203e-03f));
    q = v_fma(q, z, v_set1(-7.37332916720468e-03f));
    q = v_fma(q, z, v_set1(-1.42647390514189e-02f));
    return v_div(v_mul(x, p), q);
}

#endif
