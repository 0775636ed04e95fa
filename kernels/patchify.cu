// patchify: each P x P patch of the images as one row                     reference.py::patchify
// patchify_u8: the same of bytes [B, H, W, 3], as table[c][byte]: to the bits of preprocessing on the host
//
// images [B, C, H, W] values or [B, H, W, 3] uint8 -> rows [B G G', padded] values, G = H / P, G' = W / P;
// what is in a row after its C P P values is 0. table [3, 256] float.
//
//      P                                    A thread writes one chunk of one row. Its values are next to
//    +----+----+----+        padded         each other in the image but for the ends of lines, so what
//  P | p0 | p1 | p2 |     +---------+---+   neighbouring threads read is too; if WHOLE, they are one
//    +----+----+----+  -> | p0      | 0 |   aligned chunk of the image as well. If P is 1 (images to
//    |    |    |    |     | p1      | 0 |   [B, H, W, C]) neighbouring threads take neighbouring rows,
//    +----+----+----+     +---------+---+   which lie next to each other in each channel.
//
// cost    no flop, 4 bytes a 16-bit value (3 from uint8): bound by memory
// launch  grid chunks / THREADS, block THREADS, no shared memory
// needs   any architecture; padded a multiple of CHUNK, fewer than 2^31 chunks. PATCH: P; WHOLE: 1 if P
//         and W are multiples of CHUNK, else 0

#define THREADS 256

// Where a thread's chunk is: column k of row, which is the patch at (top, left) of image.
struct Place {
    uint32_t row, k, image, top, left;
    bool inside;
};

INLINE Place this_place(uint32_t rows, uint32_t padded, uint32_t height, uint32_t width) {
    uint32_t index = blockIdx.x * THREADS + threadIdx.x, across = width / PATCH, down = height / PATCH;
    Place p;
#if PATCH == 1
    p.row = index % rows, p.k = index / rows * CHUNK;
#else
    p.row = index / (padded / CHUNK), p.k = index % (padded / CHUNK) * CHUNK;
#endif
    p.inside = p.row < rows && p.k < padded;
    p.image = p.row / (across * down);
    p.top = p.row / across % down * PATCH, p.left = p.row % across * PATCH;
    return p;
}

KERNEL(THREADS)
SYMBOL(patchify)(const value *__restrict__ images, value *__restrict__ rows, int n, int padded, int channels,
                 int height, int width) {
    wait_for_previous();
    Place p = this_place(n, padded, height, width);
    if (!p.inside) return;
    const value *image = images + (int64_t)p.image * channels * height * width;
    Chunk c;
#pragma unroll
    for (int e = 0; e < CHUNK; e++) {
        uint32_t k = p.k + e, channel = k / (PATCH * PATCH), y = k / PATCH % PATCH, x = k % PATCH;
        bool filled = channel < (uint32_t)channels;
        const value *from = image + ((int64_t)channel * height + p.top + y) * width + p.left + x;
#if WHOLE
        if (e == 0) c = filled ? load_chunk(from) : Chunk{};
#else
        c.v[e] = filled ? *from : from_float(0.0f);
#endif
    }
    store_chunk(rows + (int64_t)p.row * padded + p.k, c);
}

KERNEL(THREADS)
SYMBOL(patchify_u8)(const uint8_t *__restrict__ images, const float *__restrict__ table,
                    value *__restrict__ rows, int n, int padded, int height, int width) {
    wait_for_previous();
    Place p = this_place(n, padded, height, width);
    if (!p.inside) return;
    const uint8_t *image = images + (int64_t)p.image * height * width * 3;
    Chunk c;
#pragma unroll
    for (int e = 0; e < CHUNK; e++) {
        uint32_t k = p.k + e, channel = k / (PATCH * PATCH), y = k / PATCH % PATCH, x = k % PATCH;
        float pixel = 0.0f;
        if (channel < 3) {
            int64_t at = ((int64_t)(p.top + y) * width + p.left + x) * 3 + channel;
            pixel = table[channel * 256 + image[at]];
        }
        c.v[e] = from_float(pixel);
    }
    store_chunk(rows + (int64_t)p.row * padded + p.k, c);
}
