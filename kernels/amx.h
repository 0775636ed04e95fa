// amx.h: the four tile instructions that gemm.c uses, or, with NPCLIP_EMULATE_AMX, plain C that does the
// same, so that the code around them can be tested on machines without AMX.
//
//   a tile is 16 rows of 64 bytes; tiles are named by numbers, 0 .. 7
//   tile_multiply: c [16][16] f32 += a [16][32] bf16 b [32][16] bf16, b stored in pairs, [16][16][2];
//   the products of a pair are added before they go to c; subnormal numbers count as zero
#ifndef NPCLIP_AMX_H
#define NPCLIP_AMX_H

#include <stdint.h>
#include <string.h>

#ifndef NPCLIP_EMULATE_AMX

#include <immintrin.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

static inline void tiles_begin(void) {  // a thread must do this before it uses tiles
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
    __asm__ volatile("" ::: "memory");  // what tiles will load has been written before
}
#define tiles_end() _tile_release()
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, p, stride) _tile_loadd(t, p, stride)
#define tile_store(t, p, stride) _tile_stored(t, p, stride)
#define tile_multiply(c, a, b) _tile_dpbf16ps(c, a, b)

#else

static _Thread_local uint32_t tiles[8][16][16];

static inline void tiles_begin(void) { memset(tiles, 0xff, sizeof tiles); }
static inline void tiles_end(void) { memset(tiles, 0xff, sizeof tiles); }
static inline void tile_zero(int t) { memset(tiles[t], 0, sizeof tiles[t]); }
static inline void tile_load(int t, const void *p, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(tiles[t][i], (const char *)p + i * stride, 64);
}
static inline void tile_store(int t, void *p, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy((char *)p + i * stride, tiles[t][i], 64);
}
static inline float tile_bf16(uint32_t bits, int high) {
    uint32_t wide = high ? bits & 0xffff0000u : bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
static inline void tile_multiply(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                float sum;
                uint32_t x = tiles[a][m][k], w = tiles[b][k][n];
                memcpy(&sum, &tiles[c][m][n], 4);
                sum += tile_bf16(x, 0) * tile_bf16(w, 0) + tile_bf16(x, 1) * tile_bf16(w, 1);
                memcpy(&tiles[c][m][n], &sum, 4);
            }
}

#endif
#endif
