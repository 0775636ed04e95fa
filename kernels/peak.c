// peak: how many multiply-adds a second all threads do                    tools/bench_kernels.py
// bandwidth: how many bytes a second they read
//
// steps -> flop, how many were done; x [N] f32, read `passes` times -> sum [1], so that it is read
//
//        a   b              A task of peak is a chain of multiply-adds for each of ACCUMULATORS
//        |   |              registers. They wait for nothing but each other, and nothing is loaded
//   +----v---v----+         or stored: no kernel can do more. A task of bandwidth is one part of x,
//   | acc = acc a + b | x ACCUMULATORS      all passes of it, so that what fits in the caches of
//   +-------------+         a core is read from there.
//
// cost    2 flop a lane of f32 and 4 of bf16, which come in pairs. u8 stands for resize.c's products
//         of a pixel and a weight of two int16 halves: half a vpmaddwd and vpaddd each
// needs   avx2 or avx512 for f32 and u8; avx512_bf16 or amx for bf16
#include <string.h>

#include "gemm.h"

#define ACCUMULATORS 12  // latency 4 x 2 a cycle = 8 at least; 12 + a + b = 14 of 16 ymm
#define STREAMS 8         // likewise for additions, 3 x 2
#define TASKS_A_THREAD 4

typedef struct {
    int64_t steps;
    double flop;        // of all tasks
    const float *x;     // bandwidth's
    int64_t n, passes, tasks;
    float *sum;
} Peak;

static void run_all(Task run, Peak *p, double flop_a_step) {
    p->tasks = TASKS_A_THREAD * npclip_num_threads();
    p->flop = flop_a_step * (double)p->steps * (double)p->tasks;
    parallel_for(run, p, p->tasks);
}

#if defined(NPCLIP_AMX)

static void run_bf16(const void *arguments, int64_t task, Scratch *scratch) {
    (void)task;
    const Peak *p = arguments;
    memset(scratch->memory, 0x3f, 1024);  // 0.7466 in bf16
    tiles_begin();
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_load(4, scratch->memory, 64);
    tile_load(5, scratch->memory, 64);
    tile_load(6, scratch->memory, 64);
    tile_load(7, scratch->memory, 64);
    for (int64_t i = 0; i < p->steps; i++) {
        tile_multiply(0, 4, 6);
        tile_multiply(1, 4, 7);
        tile_multiply(2, 5, 6);
        tile_multiply(3, 5, 7);
    }
    tile_store(0, scratch->memory, 64);
    tiles_end();
}

EXPORT void SYMBOL(peak_bf16)(int64_t steps, double *flop) {
    Peak p = {.steps = steps};
    run_all(run_bf16, &p, 4 * 2.0 * 16 * 16 * 32);
    *flop = p.flop;
}

#elif defined(__AVX512BF16__)

static void run_bf16(const void *arguments, int64_t task, Scratch *scratch) {
    const Peak *p = arguments;
    vf acc[ACCUMULATORS];
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = v_set1((float)(task + i));
    __m512bh a = _mm512_cvtne2ps_pbh(v_set1(0.5f), v_set1(0.5f));
    for (int64_t s = 0; s < p->steps; s++)
        for (int i = 0; i < ACCUMULATORS; i++) acc[i] = _mm512_dpbf16_ps(acc[i], a, a);
    for (int i = 0; i < ACCUMULATORS; i++) v_store((float *)scratch->memory + i * LANES, acc[i]);
}

EXPORT void SYMBOL(peak_bf16)(int64_t steps, double *flop) {
    Peak p = {.steps = steps};
    run_all(run_bf16, &p, 4.0 * LANES * ACCUMULATORS);
    *flop = p.flop;
}

#else

static void run_f32(const void *arguments, int64_t task, Scratch *scratch) {
    const Peak *p = arguments;
    vf acc[ACCUMULATORS], a = v_set1(0.5f), b = v_set1(1.0f);
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = v_set1((float)(task + i));
    for (int64_t s = 0; s < p->steps; s++)
        for (int i = 0; i < ACCUMULATORS; i++) acc[i] = v_fma(acc[i], a, b);
    for (int i = 0; i < ACCUMULATORS; i++) v_store((float *)scratch->memory + i * LANES, acc[i]);
}

EXPORT void SYMBOL(peak_f32)(int64_t steps, double *flop) {
    Peak p = {.steps = steps};
    run_all(run_f32, &p, 2.0 * LANES * ACCUMULATORS);
    *flop = p.flop;
}

#if LANES == 16
typedef __m512i vi;
#define v_set1_i32(x) _mm512_set1_epi32(x)
#define v_multiply_add(a, b, c) _mm512_add_epi32(_mm512_madd_epi16(a, b), c)
#define v_as_f32(x) _mm512_castsi512_ps(x)
#else
typedef __m256i vi;
#define v_set1_i32(x) _mm256_set1_epi32(x)
#define v_multiply_add(a, b, c) _mm256_add_epi32(_mm256_madd_epi16(a, b), c)
#define v_as_f32(x) _mm256_castsi256_ps(x)
#endif

static void run_u8(const void *arguments, int64_t task, Scratch *scratch) {
    const Peak *p = arguments;
    vi acc[ACCUMULATORS], a = v_set1_i32(0x00010003), b = v_set1_i32(1);
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = v_set1_i32((int)task + i);
    for (int64_t s = 0; s < p->steps; s++)
        for (int i = 0; i < ACCUMULATORS; i++) {
            vi sum = v_multiply_add(acc[i], a, b);
            __asm__("" : "+v"(sum));  // in a register: GCC spills some otherwise
            acc[i] = sum;
        }
    for (int i = 0; i < ACCUMULATORS; i++)
        v_store((float *)scratch->memory + i * LANES, v_as_f32(acc[i]));
}

EXPORT void SYMBOL(peak_u8)(int64_t steps, double *flop) {
    Peak p = {.steps = steps};
    run_all(run_u8, &p, 2.0 * LANES * ACCUMULATORS);
    *flop = p.flop;
}

static void run_bandwidth(const void *arguments, int64_t task, Scratch *scratch) {
    const Peak *p = arguments;
    const float *begin = p->x + p->n * task / p->tasks, *end = p->x + p->n * (task + 1) / p->tasks;
    vf acc[STREAMS];
    for (int i = 0; i < STREAMS; i++) acc[i] = v_zero();
    for (int64_t pass = 0; pass < p->passes; pass++)
        for (const float *x = begin; x + STREAMS * LANES <= end; x += STREAMS * LANES)
            for (int i = 0; i < STREAMS; i++) acc[i] = v_add(acc[i], v_load(x + i * LANES));
    for (int i = 1; i < STREAMS; i++) acc[0] = v_add(acc[0], acc[i]);
    v_store((float *)scratch->memory, acc[0]);
    if (task == 0) *p->sum = v_sum(acc[0]);
}

EXPORT void SYMBOL(bandwidth_f32)(const float *x, int64_t n, int64_t passes, float *sum) {
    Peak p = {.x = x, .n = n, .passes = passes, .sum = sum};
    run_all(run_bandwidth, &p, 0);
}

#endif
