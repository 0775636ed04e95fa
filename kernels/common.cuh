// common.cuh: the words that every CUDA kernel is written in.
//
// A kernel's source is `#define`s, this file and its .cu in one string, compiled by NVRTC at first use
// (npclip/nvrtc.py). DTYPE says what a `value` is: F16, BF16 or F32; SYMBOL(op) is the kernel's name, op_f16.
// All inline PTX stands here, behind functions: NPCLIP_SHIM puts the same functions in C++ in its place, so
// that the tests run the very same kernels on a CPU.
//
//   value            how activations and weights are stored; every sum is float
//   Chunk            16 bytes: CHUNK values, what one thread loads at once
//   to_float, from_float    round to nearest even
//   warp_sum, warp_max      over the 32 lanes; every lane gets the result
//   ldmatrix_x4      four 8 x 8 matrices of 16-bit values from shared memory, as mma wants them
//   mma_16816        d [16, 8] += a [16, 16] b [8, 16]^T in fragments of the 32 lanes
//   copy_async       16 bytes from global to shared memory, or zeros; visible after wait_async and a barrier
//   wait_for_previous       before a kernel touches what other kernels write: from sm_90 on it may begin while
//                    the one before it on the stream still runs (programmatic dependent launch)
//   prefetch         what will be read later
#pragma once

#define F16 1
#define BF16 2
#define F32 3

#ifdef NPCLIP_SHIM
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#define DYNAMIC_SHARED(type, name)                                     \
    extern __shared__ __align__(128) unsigned char dynamic_shared_[];  \
    type *name = reinterpret_cast<type *>(dynamic_shared_)
#endif

#define INLINE __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

#if DTYPE == F16
typedef __half value;
#define SYMBOL(op) op##_f16
INLINE float to_float(value x) { return __half2float(x); }
INLINE value from_float(float x) { return __float2half_rn(x); }
#elif DTYPE == BF16
typedef __nv_bfloat16 value;
#define SYMBOL(op) op##_bf16
INLINE float to_float(value x) { return __bfloat162float(x); }
INLINE value from_float(float x) { return __float2bfloat16_rn(x); }
#elif DTYPE == F32
typedef float value;
#define SYMBOL(op) op##_f32
INLINE float to_float(value x) { return x; }
INLINE value from_float(float x) { return x; }
#else
#error "DTYPE is none of F16, BF16, F32"
#endif

#define CHUNK (16 / (int)sizeof(value))
struct __align__(16) Chunk {
    value v[CHUNK];
};

INLINE Chunk load_chunk(const value *p) { return *reinterpret_cast<const Chunk *>(p); }
INLINE void store_chunk(value *p, Chunk x) { *reinterpret_cast<Chunk *>(p) = x; }

INLINE float warp_sum(float x) {
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
INLINE float warp_max(float x) {
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

// Two floats, rounded, in one register: low in its lower half.
INLINE uint32_t pack(float low, float high) {
    value both[2] = {from_float(low), from_float(high)};
    return *reinterpret_cast<uint32_t *>(both);
}

// The kernel after this one may begin, too: it will wait for this one to end. Every thread calls it.
INLINE void wait_for_previous() {
#if !defined(NPCLIP_SHIM) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the 128 bytes around p come from memory to L2, meanwhile.
INLINE void prefetch(const void *p) {
#ifndef NPCLIP_SHIM
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

#ifndef NPCLIP_SHIM

INLINE float exp2_fast(float x) {  // right to 2 ulp; 0 below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float reciprocal_fast(float x) {  // right to 1 ulp; 0 from 2^126 on
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Lane l gives the address of row l % 8 of matrix l / 8; r[i] is matrix i's, two values of row l / 4.
INLINE void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {  // of column l / 4 instead
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#if DTYPE == F16 && __CUDA_ARCH__ >= 800
#define MMA_TYPES "f32.f16.f16.f32"
#elif DTYPE == BF16
#define MMA_TYPES "f32.bf16.bf16.f32"
#endif

#ifdef MMA_TYPES
INLINE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#elif DTYPE == F16  // Turing: two halves of k
INLINE void mma_1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}
INLINE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_1688(d, a[0], a[1], b0);
    mma_1688(d, a[2], a[3], b1);
}
#endif

// Both addresses are multiples of 16; with inside == false nothing is read and zeros are written.
#if __CUDA_ARCH__ >= 800
INLINE void copy_async(void *shared, const void *global, bool inside) {
    int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
INLINE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>  // until at most the last N groups are under way
INLINE void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
INLINE void copy_async(void *shared, const void *global, bool inside) {
    int4 x = make_int4(0, 0, 0, 0);
    if (inside) x = *reinterpret_cast<const int4 *>(global);
    *reinterpret_cast<int4 *>(shared) = x;
}
INLINE void commit_async() {}
template <int N>
INLINE void wait_async() {}
#endif

#endif  // NPCLIP_SHIM
