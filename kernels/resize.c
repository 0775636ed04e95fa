// resize: Pillow's antialiased 8-bit resize, cropped and normalised     reference_resize.py::resize
//
//     level[i] = clip((sum_k c[i, k] pixel[first[i] + k] + 2^21) >> 22, 0, 255)    along x, then y
//     out[channel, y, x] = table[channel, level[y, x, channel]]
//
// image uint8 [height, width, channels], rows row_stride bytes apart, 3 channels or 4, one unused.
// table f32 [3, 256]; out f32 [3, size, size], of which rows y_begin .. y_end are written. Output i
// of an axis reads pairs first[i] .. first[i] + pairs, pair p being pixels 2p and 2p + 1: int32
// first [size], nowhere falling; int32 coefficients [size, pairs, 2], one with the low halves of
// the two and one with their high halves, int16 all: c = low + 2^16 high. The two sums may wrap
// around at 2^32; low + 2^16 high is right all the same, because the whole sum fits.
//
//      image            pixels                  ring                   levels         out
//    +--------+       +-----------+           +-----------+                        +------+
//    |        | copy  | rows 0 2..|   x pass  | rows 0, 1 |  y pass  +-------+     | RGB  |
//    |  ROWS  | ----> | rows 1 3..| --------> | rows 2, 3 | -------> | row y | --> |      |
//    |        |       +-----------+           | ...       |          +-------+     +------+
//    +--------+        pairs 0, 1 ..          +-----------+
//                      a lane: one channel    a lane: one channel of one column,
//                      of one row, 2 columns  2 rows
//
// Both passes broadcast coefficients, so each lane is a sum of its own and nothing is added across
// lanes. A row goes through the x pass when the first output row needs it and stays in the ring,
// whose length is a power of two, until the last one has had it. Nothing is computed for what the
// crop takes away.
//
// cost    bicubic downscaling: 4 outputs x 4 channels x 2 halves = 32 multiplications a pixel in x,
//         2 LANES of them an instruction: bound by the multiplier
// needs   avx2 or avx512; scratch: reference_resize.py::scratch_bytes
#include <string.h>

#include "simd.h"

#define PIXELS (LANES / 4)       // pixels in a vector: 4 channels each, 2 int16 a channel
#define ROWS (2 * PIXELS)        // one vector of even rows, one of odd rows
#define PAIR_BYTES (16 * ROWS)   // of two columns of those rows
#define BLOCK 4                  // vectors of the y pass: 8 accumulators + 2 coefficients + 1 load
#define ROUND_UP(n, m) (((n) + (m) - 1) / (m) * (m))

#if LANES == 16

typedef __m512i vi;
INLINE vi v_set1_i32(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi v_load_i32(const void *p) { return _mm512_load_si512(p); }
INLINE void v_store_i32(void *p, vi x) { _mm512_store_si512(p, x); }
INLINE vi v_add_i32(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi v_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi v_shift_up_16(vi x) { return _mm512_slli_epi32(x, 16); }
INLINE vi v_multiply_pairs(vi a, vi b) { return _mm512_madd_epi16(a, b); }
INLINE vi v_clip(vi sum) {
    vi level = _mm512_max_epi32(_mm512_srai_epi32(sum, 22), _mm512_setzero_si512());
    return _mm512_min_epi32(level, _mm512_set1_epi32(255));
}

#else

typedef __m256i vi;
INLINE vi v_set1_i32(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi v_load_i32(const void *p) { return _mm256_load_si256(p); }
INLINE void v_store_i32(void *p, vi x) { _mm256_store_si256(p, x); }
INLINE vi v_add_i32(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi v_or(vi a, vi b) { return _mm256_or_si256(a, b); }
INLINE vi v_shift_up_16(vi x) { return _mm256_slli_epi32(x, 16); }
INLINE vi v_multiply_pairs(vi a, vi b) { return _mm256_madd_epi16(a, b); }
INLINE vi v_clip(vi sum) {
    vi level = _mm256_max_epi32(_mm256_srai_epi32(sum, 22), _mm256_setzero_si256());
    return _mm256_min_epi32(level, _mm256_set1_epi32(255));
}

#endif

// A vector of sums: of the products with the low halves, and with the high halves.
typedef struct {
    vi low, high;
} Sum;

INLINE void sum_start(Sum *sum) {
    sum->low = v_set1_i32(1 << 21);
    sum->high = v_set1_i32(0);
}

INLINE void sum_add(Sum *sum, const uint8_t *data, vi low, vi high) {
    vi pixels = v_load_i32(data);
    sum->low = v_add_i32(sum->low, v_multiply_pairs(pixels, low));
    sum->high = v_add_i32(sum->high, v_multiply_pairs(pixels, high));
}

INLINE vi sum_level(const Sum *sum) {
    return v_clip(v_add_i32(sum->low, v_shift_up_16(sum->high)));
}

// Columns 2 pair, 2 pair + 1 of ROWS rows -> pixels [2 parities of row][PIXELS][4 channels][2].
INLINE void unpack_pair(const uint8_t *const *rows, int64_t channels, int64_t width, int64_t pair,
                        uint8_t *pixels) {
    for (int r = 0; r < ROWS; r++) {
        const uint8_t *even = rows[r] + 2 * pair * channels;
        const uint8_t *odd = 2 * pair + 1 < width ? even + channels : even;
        uint16_t *to = (uint16_t *)(void *)(pixels + 16 * (r % 2 * PIXELS + r / 2));
        for (int c = 0; c < 4; c++) {
            to[2 * c] = c < channels ? even[c] : 0;
            to[2 * c + 1] = c < channels ? odd[c] : 0;
        }
    }
}

// The columns 2 first .. 2 (first + pairs) of ROWS rows from `row` on, the last one standing in for
// those below the image.
static void unpack(const uint8_t *image, int64_t row_stride, int64_t channels, int64_t height,
                   int64_t width, int64_t row, int64_t first, int64_t pairs, uint8_t *pixels) {
    const uint8_t *rows[ROWS];
    for (int64_t r = 0; r < ROWS; r++)
        rows[r] = image + (row + r < height ? row + r : height - 1) * row_stride;

    // The first two pixels of 16 bytes as int16 [4 channels][2], and the next two; Z gives 0.
    enum { Z = -128 };
    char p = (char)channels, p1 = (char)(p + 1), p2 = (char)(p + 2);
    __m128i pick = _mm_setr_epi8(0, Z, p, Z, 1, Z, p1, Z, 2, Z, p2, Z, Z, Z, Z, Z);
    __m128i next = _mm_add_epi8(pick, _mm_set1_epi8((char)(2 * p)));
    int64_t i = 0;  // 16 bytes are read where 4 pixels are wanted
    for (; i + 2 <= pairs && 2 * (first + i) * channels + 16 <= width * channels; i += 2)
        for (int r = 0; r < ROWS; r++) {
            const void *from = rows[r] + 2 * (first + i) * channels;
            __m128i *to = (void *)(pixels + i * PAIR_BYTES + 16 * (r % 2 * PIXELS + r / 2));
            __m128i bytes = _mm_loadu_si128(from);
            _mm_store_si128(to, _mm_shuffle_epi8(bytes, pick));
            _mm_store_si128(to + ROWS, _mm_shuffle_epi8(bytes, next));
        }
    for (; i < pairs; i++)
        unpack_pair(rows, channels, width, first + i, pixels + i * PAIR_BYTES);
}

// Resizes ROWS rows of pixels in x: -> a row of the ring [size][4 channels][2] for every two.
static void resize_x(const uint8_t *pixels, const int32_t *first, const int32_t *coefficients,
                     int64_t pairs, int64_t size, uint8_t *const *rows) {
    for (int64_t x = 0; x < size; x++) {
        const uint8_t *data = pixels + (first[x] - first[0]) * PAIR_BYTES;
        Sum even, odd;
        sum_start(&even);
        sum_start(&odd);
        for (int64_t k = 0; k < pairs; k++, data += PAIR_BYTES, coefficients += 2) {
            vi low = v_set1_i32(coefficients[0]), high = v_set1_i32(coefficients[1]);
            sum_add(&even, data, low, high);
            sum_add(&odd, data + PAIR_BYTES / 2, low, high);
        }
        _Alignas(64) uint8_t levels[16 * PIXELS];
        v_store_i32(levels, v_or(sum_level(&even), v_shift_up_16(sum_level(&odd))));
        for (int i = 0; i < PIXELS; i++) memcpy(rows[i] + 16 * x, levels + 16 * i, 16);
    }
}

EXPORT void SYMBOL(resize_u8)(const uint8_t *image, int64_t row_stride, int64_t channels,
                              int64_t height, int64_t width, const int32_t *x_first,
                              const int32_t *x_coefficients, int64_t x_pairs,
                              const int32_t *y_first, const int32_t *y_coefficients,
                              int64_t y_pairs, int64_t size, int64_t y_begin, int64_t y_end,
                              const float *table, uint8_t *scratch, float *out) {
    int64_t columns = x_first[size - 1] + x_pairs - x_first[0], ring_rows = 1;
    while (ring_rows < y_pairs + PIXELS) ring_rows *= 2;
    int64_t mask = ring_rows - 1, pitch = ROUND_UP(16 * size, BLOCK * 4 * LANES);
    int32_t *levels = (void *)ROUND_UP((uintptr_t)scratch, 64);
    uint8_t *ring = (uint8_t *)levels + pitch, *pixels = ring + ring_rows * pitch;
    int64_t done = y_first[y_begin];  // the pair of rows that comes next into the ring

    for (int64_t y = y_begin; y < y_end; y++) {
        const int32_t *c = y_coefficients + 2 * y_pairs * y;
        for (; done < y_first[y] + y_pairs; done += PIXELS) {
            uint8_t *rows[PIXELS];
            for (int i = 0; i < PIXELS; i++) rows[i] = ring + ((done + i) & mask) * pitch;
            unpack(image, row_stride, channels, height, width, 2 * done, x_first[0], columns,
                   pixels);
            resize_x(pixels, x_first, x_coefficients, x_pairs, size, rows);
        }
        for (int64_t x = 0; x < pitch; x += BLOCK * 4 * LANES) {
            Sum sums[BLOCK];
            for (int i = 0; i < BLOCK; i++) sum_start(&sums[i]);
            for (int64_t k = 0; k < y_pairs; k++) {
                const uint8_t *row = ring + ((y_first[y] + k) & mask) * pitch + x;
                vi low = v_set1_i32(c[2 * k]), high = v_set1_i32(c[2 * k + 1]);
                for (int i = 0; i < BLOCK; i++) sum_add(&sums[i], row + i * 4 * LANES, low, high);
            }
            for (int i = 0; i < BLOCK; i++)
                v_store_i32((uint8_t *)levels + x + i * 4 * LANES, sum_level(&sums[i]));
        }
        for (int64_t x = 0; x < size; x++)
            for (int64_t rgb = 0; rgb < 3; rgb++)
                out[(rgb * size + y) * size + x] = table[256 * rgb + levels[4 * x + rgb]];
    }
}
