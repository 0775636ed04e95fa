// resize: Pillow's antialiased 8-bit resize, cropped and normalised      reference_resize.py::resize
//
//     level[i] = clip((sum_t c[i, t] pixel[first[i] + t] + 2^21) >> 22, 0, 255)    along x, then y
//     out[b, channel, y, x] = table[channel, level[b, y, x, channel]]
//
// images uint8 [B, height, width, channels], 3 channels or 4, one unused. table f32 [3, 256], out
// value [B, 3, size, size]. An axis is int32 [1 + taps, size]: first, then c[:, t] for each t; so
// neighbouring threads read neighbouring coefficients. levels uint8 [B, rows, size, 4] lies between
// the passes: the input rows top .. top + rows, which are those that the crop needs, resized in x.
// The first of the y axis counts from top. The sums are int32, as Pillow's are, and fit.
//
//         images                        levels                            out
//     +--------------+             +-------------+                    +---------+
//     |  a row  -----+-- resize_x -+-> [tile]    |     +- resize_y ---+-> R G B |
//     |              |             |   [column] -+-----+              |         |
//     +--------------+             +-------------+                    +---------+
//
// resize_x: a block writes `tile` pixels of one row. It first puts the input pixels that they need
// into shared memory, one word each, then each thread sums for one pixel. resize_y: a thread sums
// the words above each other for one pixel; the table makes three values of it.
//
// cost    3 multiply-adds a tap and pixel; reads an image once and writes size / width of it;
//         less time than the copy of the image from the host
// launch  resize_x: grid (ceil(size / tile), rows, B), block 128, shared 4 bytes for each column
//         that a tile reads; resize_y: grid (ceil(size / 128), size, B), block 128
// needs   sums in Pillow's order, x first (is_x_first); height and B up to 65535

#define THREADS 128
#define ROUND (1 << 21)

struct Sum {
    int red, green, blue;
};

INLINE void add(Sum &sum, int coefficient, uint32_t pixel) {
    sum.red += coefficient * (int)(pixel & 255);
    sum.green += coefficient * (int)(pixel >> 8 & 255);
    sum.blue += coefficient * (int)(pixel >> 16 & 255);
}

INLINE int level(int sum) {
    int whole = sum >> 22;
    return whole < 0 ? 0 : whole > 255 ? 255 : whole;
}

KERNEL(THREADS)
SYMBOL(resize_x)(const uint8_t *images, const int32_t *axis, uint8_t *levels, int height, int width,
                 int channels, int top, int taps, int size, int tile) {
    wait_for_previous();
    DYNAMIC_SHARED(uint32_t, pixels);
    int begin = blockIdx.x * tile, end = begin + tile < size ? begin + tile : size;
    int left = axis[begin], right = axis[end - 1] + taps;

    int64_t row = (int64_t)blockIdx.z * height + top + blockIdx.y;
    const uint8_t *from = images + row * width * channels;
    for (int i = left + threadIdx.x; i < right; i += THREADS) {
        const uint8_t *p = from + (int64_t)i * channels;
        pixels[i - left] = p[0] | p[1] << 8 | p[2] << 16;
    }
    __syncthreads();

    int x = begin + threadIdx.x;
    if (x >= end) return;
    Sum sum = {ROUND, ROUND, ROUND};
    const uint32_t *first = pixels + (axis[x] - left);
    for (int t = 0; t < taps; t++) add(sum, axis[(int64_t)(1 + t) * size + x], first[t]);
    int64_t out_row = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
    uint32_t pixel = level(sum.red) | level(sum.green) << 8 | level(sum.blue) << 16;
    *reinterpret_cast<uint32_t *>(levels + 4 * (out_row * size + x)) = pixel;
}

KERNEL(THREADS)
SYMBOL(resize_y)(const uint8_t *levels, const int32_t *axis, const float *table, value *out, int rows,
                 int taps, int size) {
    wait_for_previous();
    int x = blockIdx.x * THREADS + threadIdx.x, y = blockIdx.y;
    if (x >= size) return;
    Sum sum = {ROUND, ROUND, ROUND};
    const uint32_t *pixels = reinterpret_cast<const uint32_t *>(levels);
    const uint32_t *first = pixels + ((int64_t)blockIdx.z * rows + axis[y]) * size + x;
    for (int t = 0; t < taps; t++)
        add(sum, axis[(int64_t)(1 + t) * size + y], first[(int64_t)t * size]);

    int64_t plane = (int64_t)size * size;
    value *to = out + blockIdx.z * 3 * plane + (int64_t)y * size + x;
    to[0] = from_float(table[level(sum.red)]);
    to[plane] = from_float(table[256 + level(sum.green)]);
    to[2 * plane] = from_float(table[512 + level(sum.blue)]);
}
