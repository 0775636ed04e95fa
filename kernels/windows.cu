// windows: the k x k windows of feature maps as rows, so that a convolution is a linear
//                                                                          reference.py::conv2d
// avg_pool2d: the mean of each k x k cell                                  reference.py::avg_pool2d
//
//     rows[(b, y, x), (dy, dx, c)] = image[b, y stride + dy - k / 2, x stride + dx - k / 2, c]
//     y[b, y, x, c] = mean over dy, dx of x[b, y k + dy, x k + dx, c]
//
// All values, channels last: image [B, height, width, channels]; rows [B out_height out_width,
// row_width], row_width a multiple of CHUNK; what lies outside the image and the columns after
// k k channels are zeros. Pixels that lie side by side follow each other in memory, so a row is k
// runs of k channels values each:
//
//     image, k = 3                      row of window (y, x)
//     . . . . . . .   dy = 0            +------------+------------+------------+-------+
//     . [a a a] . .   dy = 1    ---->   | a a a      | b b b      | c c c      | zeros |
//     . [b b b] . .   dy = 2            +------------+------------+------------+-------+
//     . [c c c] . .                       3 channels values each
//
// A thread writes one chunk of one row (windows), or STEP channels of one pixel (avg_pool2d). STEP
// is how many values are read at once: CHUNK where channels is a multiple of it, else 1.
//
// cost    windows reads an image once (then from the caches) and writes it k k / stride^2 times;
//         avg_pool2d reads it once: both are bound by memory
// launch  grid (what a row of out_height needs, out_height, B), block 256, no shared memory
// needs   B and out_height up to 65535

#define THREADS 256
#define BOUNDS THREADS, 4  // blocks of an SM; for 8 some compilers spill

struct __align__(STEP * sizeof(value)) Step {
    value v[STEP];
};

KERNEL(THREADS)
SYMBOL(windows)(const value *image, value *rows, int height, int width, int channels, int k, int stride,
                int out_width, int row_width) {
    wait_for_previous();
    int y = blockIdx.y, out_height = gridDim.y, chunks = row_width / CHUNK;
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= out_width * chunks) return;
    int x = i / chunks, column = (i - x * chunks) * CHUNK;

    int run = k * channels;                                 // values of one dy
    int left = (x * stride - k / 2) * channels;             // where a run begins in its image row
    int top = y * stride - k / 2, image_row = width * channels;
    const value *from = image + (int64_t)blockIdx.z * height * image_row;

    int dy = column / run;
    column -= dy * run;
    Chunk chunk;
    for (int v = 0; v < CHUNK; v += STEP) {
        int at = left + column;
        Step step;
        for (int s = 0; s < STEP; s++) step.v[s] = from_float(0);
        if (dy < k && top + dy >= 0 && top + dy < height && at >= 0 && at < image_row)
            step = *reinterpret_cast<const Step *>(from + (int64_t)(top + dy) * image_row + at);
        for (int s = 0; s < STEP; s++) chunk.v[v + s] = step.v[s];
        column += STEP;
        if (column == run) column = 0, dy++;
    }
    int64_t row = ((int64_t)blockIdx.z * out_height + y) * out_width + x;
    store_chunk(rows + row * row_width + (i - x * chunks) * CHUNK, chunk);
}

KERNEL(BOUNDS)
SYMBOL(avg_pool2d)(const value *x, value *y, int height, int width, int channels, int k, int out_width,
                   float one_by_k2) {
    wait_for_previous();
    int steps = channels / STEP, i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= out_width * steps) return;
    int column = i / steps, channel = (i - column * steps) * STEP;
    int64_t top = (int64_t)blockIdx.z * height + blockIdx.y * k;
    const value *cell = x + (top * width + column * k) * channels + channel;

    float sum[STEP];
    for (int s = 0; s < STEP; s++) sum[s] = 0;
    for (int dy = 0; dy < k; dy++)
#pragma unroll 2
        for (int dx = 0; dx < k; dx++) {
            Step step = *reinterpret_cast<const Step *>(cell + ((int64_t)dy * width + dx) * channels);
            for (int s = 0; s < STEP; s++) sum[s] += to_float(step.v[s]);
        }
    Step mean;
    for (int s = 0; s < STEP; s++) mean.v[s] = from_float(sum[s] * one_by_k2);
    int64_t pixel = ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * out_width + column;
    *reinterpret_cast<Step *>(y + pixel * channels + channel) = mean;
}
