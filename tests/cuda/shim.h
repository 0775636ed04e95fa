// shim.h: CUDA on one CPU core, for tests. common.cuh includes this file where NPCLIP_SHIM is defined.
//
// Fibers. Each CUDA thread is a fiber: a stack of its own and the registers that a call preserves. Blocks run
// one after the other, and within a block one fiber at a time, until it waits:
//
//      run_block                  fiber 0          fiber 1     ...     run_ready_fibers: each that is ready
//          |--- switch_to_fiber ----> |                                runs until it waits or returns
//          | <- at a barrier -------- |
//          |--- switch_to_fiber ---------------------> |
//          | <- at a warp operation ------------------ |
//          |  finish_warp_operations: if all 32 lanes wait at one, compute it for all and make them ready
//          |  finish_barrier: if all threads that have not returned wait at it, make them ready
//          |  none of the three did anything: a deadlock, which is an error
//
// Warp operations (shuffles, votes, ldmatrix, mma). Each lane leaves its operands in Fiber::in and waits; the
// scheduler computes all 32 results from them, as the PTX ISA lays out the fragments, into Fiber::out.
//
// Shared memory is NaN (bytes 0xFF) at the start of each block. copy_async makes its destination NaN at once
// and copies when the thread waits for it: between the two nobody may read there, and here nobody can.
//
// Errors that are found: addresses that are not aligned or not in shared memory, barriers and warp operations
// that some threads miss or meet at another line, copies never waited for, faults (vector accesses that are not
// aligned fault with some compilers; UBSan finds them all). An error ends the launch and is returned with the
// block and thread that made it.
//
// Sanitizers. Under ThreadSanitizer a fiber is a thread of its own, and only __syncthreads, __syncwarp, atomics
// and the end of a block order what fibers do: two accesses with no barrier between them are a race, whatever
// the order in which they ran. For that the functions of this file that work for all fibers are UNSEEN by the
// sanitizer, those that touch a kernel's memory for one fiber are not. Under AddressSanitizer dynamic shared
// memory is a heap block of its exact size. Both are run as programs: main stands at the end of this file.
//
// Not modelled: time; races between blocks; the memory model within a warp (fences do nothing); warp operations
// of fewer than 32 lanes; -ftz; the last bits of exp2_fast, rsqrtf and sums in mma; inline PTX; AddressSanitizer
// at the ends of static __shared__ arrays (UBSan sees wrong constant-size subscripts). Needs x86-64 and Linux.
#pragma once
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cfloat>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's own: <cmath> takes as long to compile as a kernel
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SHIM_THREAD_SANITIZER
#endif
#if __has_feature(address_sanitizer)
#define SHIM_ADDRESS_SANITIZER
#endif
#endif
#if defined(__SANITIZE_THREAD__) || defined(SHIM_THREAD_SANITIZER)
#undef SHIM_THREAD_SANITIZER
#define SHIM_THREAD_SANITIZER 1
#include <sanitizer/tsan_interface.h>
#define UNSEEN __attribute__((noinline, no_sanitize("thread")))
#else
#define UNSEEN __attribute__((noinline))
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(SHIM_ADDRESS_SANITIZER)
#undef SHIM_ADDRESS_SANITIZER
#define SHIM_ADDRESS_SANITIZER 1
#include <sanitizer/asan_interface.h>
#endif

// ---- words of the language ----

#define __CUDA_ARCH__ 800
#define __global__ {} static  // after extern "C": what is not called is not compiled, of several kernels in a source
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("shim_shared")))  // one block at a time: one is enough

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace shim {
template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}
}  // namespace shim

inline float __int_as_float(int x) { return shim::bits_as<float>(x); }
inline int __float_as_int(float x) { return shim::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return shim::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return shim::bits_as<unsigned>(x); }

struct __half {
    _Float16 number;
};
inline float __half2float(__half x) { return (float)x.number; }
inline __half __float2half_rn(float x) { return {(_Float16)x}; }
inline __half __float2half(float x) { return __float2half_rn(x); }

struct __nv_bfloat16 {
    uint16_t bits;  // the upper half of a float
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    unsigned bits = __float_as_uint(x), half = 0x7fff + (bits >> 16 & 1);  // half an ulp; ties go to even
    return {x != x ? (uint16_t)0x7fff : (uint16_t)((bits + half) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float exp2_fast(float x) {
    float y = exp2f(x);
    return y < FLT_MIN ? 0.0f : y;
}
template <class T>
inline T __ldg(const T *p) {
    return *p;
}
inline void __threadfence() {}
inline void __threadfence_block() {}


// They return what was there.
inline int atomicAdd(int *p, int x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned *p, unsigned x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
inline float atomicAdd(float *p, float x) {
    unsigned *bits = reinterpret_cast<unsigned *>(p), old = __atomic_load_n(bits, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(bits, &old, __float_as_uint(__uint_as_float(old) + x), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return __uint_as_float(old);
}

// ---- fibers ----

extern "C" void shim_switch_stacks(void **save, void *load);
asm(R"(
    .text
    .type shim_switch_stacks, @function
shim_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace shim {

constexpr int WARP = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 128 << 10, GUARD = 4096;  // bytes; no access is allowed to the guard below a stack
constexpr int POISON = 0xFF;                       // bytes of a NaN in every float type

// What run is told, and what it tells: shim.py has the same structures.
struct Request {
    uint32_t grid[3], block;
    uint64_t shared, order;  // order: 0 forward, 1 reverse, else a seed
    void **arguments;        // where each argument is
};
struct Result {
    int64_t mma, ldmatrix, bank_conflicts, barriers, switches;
    char error[512];  // empty if all went well
};

struct Fiber;
struct Operation {  // of a warp
    const char *name;
    void (*compute)(Fiber *lanes);  // from their `in` to their `out`
};

struct Copy {
    unsigned char *shared;
    const unsigned char *global;  // null: zeros
    int group;
};

enum State { READY, AT_BARRIER, AT_WARP_OPERATION, RETURNED };

struct Fiber {
    dim3 thread;
    State state;
    unsigned char *stack;  // its lowest address
    void *stack_pointer;   // while it does not run
    int line;              // where it waits
    const Operation *operation;
    alignas(16) unsigned char in[64], out[32];
    Copy *copies;  // under way, oldest first; group: of the next copy
    int copy_count, copy_capacity, group;
    unsigned barriers, warp_barriers;  // that it has passed
    void *sanitizer;
};

static Fiber fibers[MAX_THREADS];
static Fiber *running;  // null while the scheduler runs
static void *scheduler_stack_pointer;
static dim3 block_index, block_size, grid_size;
static int thread_count, unfinished;
static unsigned char *dynamic_shared;
static size_t dynamic_shared_bytes;
static void (*call_kernel)(void **arguments);
static void **arguments;
static Result result;

// All static __shared__ arrays lie between these two, which the linker defines.
extern "C" __attribute__((visibility("hidden"))) unsigned char __start_shim_shared[], __stop_shim_shared[];
__attribute__((section("shim_shared"), used)) static volatile int section_exists;  // run uses it, lest it goes

// ---- what the sanitizer is told ----

static char end_of_block, at_barrier[2], at_warp_barrier[MAX_THREADS / WARP][2];

#if SHIM_THREAD_SANITIZER
static void *scheduler_sanitizer;
#endif

UNSEEN static void release(void *what) {
#if SHIM_THREAD_SANITIZER
    __tsan_release(what);
#endif
    (void)what;
}
UNSEEN static void acquire(void *what) {
#if SHIM_THREAD_SANITIZER
    __tsan_acquire(what);
#endif
    (void)what;
}

UNSEEN static void switch_to_fiber(Fiber *fiber) {
    running = fiber;
    result.switches++;
#if SHIM_THREAD_SANITIZER
    scheduler_sanitizer = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    shim_switch_stacks(&scheduler_stack_pointer, fiber->stack_pointer);
    running = nullptr;
}
UNSEEN static void switch_to_scheduler() {
#if SHIM_THREAD_SANITIZER
    __tsan_switch_to_fiber(scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    shim_switch_stacks(&running->stack_pointer, scheduler_stack_pointer);
}

// ---- errors ----

// The first error of a launch is kept. A fiber that fails never runs again, nor does any other.
UNSEEN __attribute__((format(printf, 1, 2))) static void fail(const char *format, ...) {
    if (!result.error[0]) {
        va_list values;
        va_start(values, format);
        int n = vsnprintf(result.error, sizeof(result.error), format, values);
        va_end(values);
        if (n > 0 && n < (int)sizeof(result.error)) {
            int m = snprintf(result.error + n, sizeof(result.error) - n, " (block %u, %u, %u", block_index.x,
                             block_index.y, block_index.z);
            if (running && n + m < (int)sizeof(result.error))
                m += snprintf(result.error + n + m, sizeof(result.error) - n - m, ", thread %u", running->thread.x);
            if (n + m < (int)sizeof(result.error)) snprintf(result.error + n + m, sizeof(result.error) - n - m, ")");
        }
    }
    if (running) switch_to_scheduler();
}

#ifndef SHIM_PROGRAM  // a sanitizer reports faults itself

static int fault;  // the signal
static void fail_of_fault() {
    fail(fault == SIGFPE ? "division by zero"
                         : "fault: an invalid address, a vector access that is not aligned, or a full stack");
}

// Leaves the fiber's program counter at fail_of_fault, on its stack made empty: nobody returns from there.
static void on_fault(int signal_number, siginfo_t *, void *context) {
    if (!running) {
        signal(signal_number, SIG_DFL);
        return;
    }
    fault = signal_number;
    greg_t *registers = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
    registers[REG_RSP] = (greg_t)(running->stack + STACK - 64 - 8);
    registers[REG_RIP] = (greg_t)fail_of_fault;
}

constexpr int FAULT_COUNT = 4, FAULTS[FAULT_COUNT] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct FaultHandler {  // while it lives
    struct sigaction before[FAULT_COUNT];
    stack_t stack_before;
    alignas(16) unsigned char stack[32 << 10];
    FaultHandler() {
        stack_t alternate = {};
        alternate.ss_sp = stack, alternate.ss_size = sizeof(stack);
        sigaltstack(&alternate, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < FAULT_COUNT; i++) sigaction(FAULTS[i], &action, &before[i]);
    }
    ~FaultHandler() {
        for (int i = 0; i < FAULT_COUNT; i++) sigaction(FAULTS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

#else
struct FaultHandler {
    FaultHandler() {}
};
#endif

// ---- one block ----

UNSEEN static void fiber_main() {
    call_kernel(arguments);
    if (running->copy_count) fail("the thread returns from the kernel but never waited for its copy_async");
    release(&end_of_block);
    running->state = RETURNED;
    unfinished--;
    switch_to_scheduler();
    abort();
}

UNSEEN static void start_fiber(int i) {
    Fiber &f = fibers[i];
    f.thread = {(unsigned)i, 0, 0};
    f.state = READY;
    f.copy_count = f.group = 0;
    f.barriers = f.warp_barriers = 0;
#if SHIM_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(f.stack, STACK);
#endif
    void **top = reinterpret_cast<void **>(f.stack + STACK - 64);
    *--top = nullptr;  // where fiber_main would return to
    *--top = reinterpret_cast<void *>(fiber_main);
    for (int k = 0; k < 6; k++) *--top = nullptr;  // the registers of shim_switch_stacks
    f.stack_pointer = top;
#if SHIM_THREAD_SANITIZER
    f.sanitizer = __tsan_create_fiber(0);
#endif
}

UNSEEN static void end_block() {
    acquire(&end_of_block);
#if SHIM_THREAD_SANITIZER
    for (int i = 0; i < thread_count; i++) __tsan_destroy_fiber(fibers[i].sanitizer);
#endif
}

UNSEEN static bool run_ready_fibers(const int *order) {
    bool any = false;
    for (int i = 0; i < thread_count && !result.error[0]; i++) {
        Fiber *fiber = &fibers[order[i]];
        if (fiber->state != READY) continue;
        any = true;
        switch_to_fiber(fiber);
    }
    return any;
}

UNSEEN static bool finish_warp_operations() {
    bool any = false;
    for (Fiber *lanes = fibers; lanes < fibers + thread_count; lanes += WARP) {
        int waiting = 0;
        Fiber *first = nullptr;
        for (Fiber *f = lanes; f < lanes + WARP; f++) {
            if (f->state != AT_WARP_OPERATION) continue;
            if (!first) first = f;
            if (f->operation != first->operation || f->line != first->line)
                fail("lanes %u and %u of a warp are at different operations: %s at line %d, %s at line %d",
                     first->thread.x % WARP, f->thread.x % WARP, first->operation->name, first->line,
                     f->operation->name, f->line);
            waiting++;
        }
        if (waiting < WARP) continue;
        lanes->operation->compute(lanes);
        for (Fiber *f = lanes; f < lanes + WARP; f++) f->state = READY;
        any = true;
    }
    return any;
}

UNSEEN static bool finish_barrier() {
    Fiber *first = nullptr;
    int waiting = 0;
    for (Fiber *f = fibers; f < fibers + thread_count; f++) {
        if (f->state != AT_BARRIER) continue;
        if (!first) first = f;
        if (f->line != first->line)
            fail("threads %u and %u are at different barriers: __syncthreads at lines %d and %d", first->thread.x,
                 f->thread.x, first->line, f->line);
        waiting++;
    }
    if (!waiting || waiting < unfinished) return false;
    for (Fiber *f = fibers; f < fibers + thread_count; f++)
        if (f->state == AT_BARRIER) f->state = READY;
    result.barriers++;
    return true;
}

// Nobody can go on: says who waits where.
UNSEEN static void fail_of_deadlock() {
    Fiber *barrier = nullptr, *operation = nullptr;
    int at_barriers = 0, at_operations = 0;
    for (Fiber *f = fibers; f < fibers + thread_count; f++) {
        if (f->state == AT_BARRIER) barrier = f, at_barriers++;
        if (f->state == AT_WARP_OPERATION) operation = f, at_operations++;
    }
    if (!operation) return fail("deadlock: %d threads at __syncthreads, line %d", at_barriers, barrier->line);
    int lanes = 0;
    Fiber *warp = fibers + (operation - fibers) / WARP * WARP;
    for (Fiber *f = warp; f < warp + WARP; f++) lanes += f->state == AT_WARP_OPERATION;
    fail("deadlock: %d of the 32 lanes of warp %d at %s, line %d; %d threads at __syncthreads, %d have returned",
         lanes, (int)(operation - fibers) / WARP, operation->operation->name, operation->line, at_barriers,
         thread_count - unfinished);
}

UNSEEN static void run_block(const int *order) {
    memset(__start_shim_shared, POISON, __stop_shim_shared - __start_shim_shared);
    memset(dynamic_shared, POISON, dynamic_shared_bytes);
    unfinished = thread_count;
    for (int i = 0; i < thread_count; i++) start_fiber(i);
    while (unfinished && !result.error[0]) {
        bool moved = run_ready_fibers(order);
        if (!result.error[0]) moved |= finish_warp_operations();
        if (!result.error[0]) moved |= finish_barrier();
        if (!moved && !result.error[0]) fail_of_deadlock();
    }
    end_block();
}

// ---- one launch ----

// Stacks are kept from launch to launch; there is one set of them in each library or program.
UNSEEN static bool make_stacks() {
    if (fibers[thread_count - 1].stack) return true;
    for (int i = 0; i < thread_count; i++) {
        if (fibers[i].stack) continue;
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void *memory = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE)) return false;
        fibers[i].stack = static_cast<unsigned char *>(memory) + GUARD;
    }
    return true;
}

struct Random {  // splitmix64
    uint64_t state;
    uint64_t next() {
        uint64_t x = state += 0x9e3779b97f4a7c15;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
        x = (x ^ x >> 27) * 0x94d049bb133111eb;
        return x ^ x >> 31;
    }
};

static void put_in_order(int *numbers, int n, uint64_t order, Random &random) {
    for (int i = 0; i < n; i++) numbers[i] = order == 1 ? n - 1 - i : i;
    if (order > 1)
        for (int i = n - 1; i > 0; i--) std::swap(numbers[i], numbers[random.next() % (i + 1)]);
}

static Result run(void (*call)(void **), const Request &request) {
    result = {};
    section_exists = 1;
    call_kernel = call, arguments = request.arguments;
    grid_size = {request.grid[0], request.grid[1], request.grid[2]};
    block_size = {request.block, 1, 1}, thread_count = request.block;
    dynamic_shared_bytes = request.shared;
    void *memory = nullptr;
    if (!make_stacks() || posix_memalign(&memory, 128, dynamic_shared_bytes)) {
        strcpy(result.error, "out of memory");
        return result;
    }
    dynamic_shared = static_cast<unsigned char *>(memory);

    int blocks = grid_size.x * grid_size.y * grid_size.z, thread_order[MAX_THREADS];
    int *block_order = static_cast<int *>(malloc(blocks * sizeof(int)));
    Random random = {request.order};
    put_in_order(block_order, blocks, request.order, random);
    {
        FaultHandler handler;
        for (int b = 0; b < blocks && !result.error[0]; b++) {
            unsigned i = block_order[b];
            block_index = {i % grid_size.x, i / grid_size.x % grid_size.y, i / grid_size.x / grid_size.y};
            put_in_order(thread_order, thread_count, request.order, random);
            run_block(thread_order);
        }
    }
    free(block_order);
    free(memory);
    return result;
}

// ---- what kernels call ----

UNSEEN static void wait_at(State state, int line) {
    running->state = state, running->line = line;
    switch_to_scheduler();
}

// Leaves `in` for the operation, waits for the other lanes, returns this lane's result.
template <class Out, class In>
UNSEEN static Out with_warp(const Operation &operation, const In &in, int line) {
    static_assert(sizeof(In) <= sizeof(Fiber::in) && sizeof(Out) <= sizeof(Fiber::out), "too large for Fiber");
    __builtin_memcpy(running->in, &in, sizeof(in));
    running->operation = &operation;
    wait_at(AT_WARP_OPERATION, line);
    Out out;
    __builtin_memcpy(&out, running->out, sizeof(out));
    return out;
}

template <class T>
inline const T &operands(const Fiber &lane) {
    return reinterpret_cast<const T &>(lane.in);
}
template <class T>
inline T &results(Fiber &lane) {
    return reinterpret_cast<T &>(lane.out);
}

// Fibers reach the next barrier before others have left this one: two take turns, lest what the former did in
// between count as before what the latter do.
UNSEEN static void barrier(int line) {
    char *turn = &at_barrier[running->barriers++ % 2];
    release(turn);
    wait_at(AT_BARRIER, line);
    acquire(turn);
}

UNSEEN static void compute_nothing(Fiber *) {}
constexpr Operation SYNCWARP = {"__syncwarp", compute_nothing};

UNSEEN static void warp_barrier(int line) {
    char *turn = &at_warp_barrier[running->thread.x / WARP][running->warp_barriers++ % 2];
    release(turn);
    with_warp<char>(SYNCWARP, (char)0, line);
    acquire(turn);
}

// Shuffles. A lane gets the value of lane `source`, its own if that one lies outside its group of `width`.
struct Shuffle {
    uint64_t bits;
    int lane, width;  // lane: a number, an offset or a mask
};
template <class Source>
inline void shuffle(Fiber *lanes, Source source) {
    for (int l = 0; l < WARP; l++) {
        const Shuffle &in = operands<Shuffle>(lanes[l]);
        int first = l & ~(in.width - 1), from = source(l, first, in);
        results<uint64_t>(lanes[l]) = operands<Shuffle>(lanes[from]).bits;
    }
}
UNSEEN static void compute_shuffle(Fiber *lanes) {
    shuffle(lanes, [](int, int first, const Shuffle &in) { return first + (in.lane & (in.width - 1)); });
}
UNSEEN static void compute_shuffle_xor(Fiber *lanes) {
    shuffle(lanes, [](int l, int first, const Shuffle &in) {
        int from = l ^ in.lane;
        return from < first + in.width && from < WARP ? from : l;
    });
}
UNSEEN static void compute_shuffle_down(Fiber *lanes) {
    shuffle(lanes, [](int l, int first, const Shuffle &in) {
        return l + in.lane < first + in.width ? l + in.lane : l;
    });
}
UNSEEN static void compute_shuffle_up(Fiber *lanes) {
    shuffle(lanes, [](int l, int first, const Shuffle &in) { return l - in.lane >= first ? l - in.lane : l; });
}
constexpr Operation SHUFFLE = {"__shfl_sync", compute_shuffle};
constexpr Operation SHUFFLE_XOR = {"__shfl_xor_sync", compute_shuffle_xor};
constexpr Operation SHUFFLE_DOWN = {"__shfl_down_sync", compute_shuffle_down};
constexpr Operation SHUFFLE_UP = {"__shfl_up_sync", compute_shuffle_up};

inline void check_mask(unsigned mask, const char *name) {
    if (mask != 0xffffffffu) fail("%s with the mask %08x: only 0xffffffff can be run here", name, mask);
}

template <class T>
inline T shuffle(const Operation &operation, unsigned mask, T x, int lane, int width, int line) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    check_mask(mask, operation.name);
    if (width < 1 || width > WARP || width & (width - 1)) fail("%s of width %d", operation.name, width);
    Shuffle in = {0, lane, width};
    __builtin_memcpy(&in.bits, &x, sizeof(x));
    uint64_t out = with_warp<uint64_t>(operation, in, line);
    T y;
    __builtin_memcpy(&y, &out, sizeof(y));
    return y;
}

UNSEEN static void compute_ballot(Fiber *lanes) {
    unsigned votes = 0;
    for (int l = 0; l < WARP; l++) votes |= (unsigned)operands<bool>(lanes[l]) << l;
    for (int l = 0; l < WARP; l++) results<unsigned>(lanes[l]) = votes;
}
constexpr Operation BALLOT = {"a vote", compute_ballot};

// ---- matrices ----

struct Row {
    alignas(16) unsigned char bytes[16];
};
struct Registers {
    uint32_t r[4];
};

UNSEEN static bool within(const unsigned char *p, const unsigned char *start, const unsigned char *end) {
    return p >= start && p + sizeof(Row) <= end;
}
UNSEEN static void check_shared_row(const void *address, const char *name) {
    const unsigned char *p = static_cast<const unsigned char *>(address);
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Row)) fail("%s: %p is not a multiple of 16", name, address);
    if (!within(p, dynamic_shared, dynamic_shared + dynamic_shared_bytes) &&
        !within(p, __start_shim_shared, __stop_shim_shared))
        fail("%s: %p is not in shared memory (%+td bytes from the start of the dynamic part)", name, address,
             p - dynamic_shared);
}

// ldmatrix. Lane 8 m + i has row i of matrix m: 8 values of 2 bytes.
struct MatrixRow {
    uint16_t values[8];
    uint64_t address;
};

// The 8 rows of a matrix are read at once, from 32 banks of 4 bytes: two rows in the same bank are a conflict.
UNSEEN static int count_conflicts(const Fiber *rows) {
    int conflicts = 0;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++) {
            uint64_t a = operands<MatrixRow>(rows[i]).address, b = operands<MatrixRow>(rows[j]).address;
            if (a != b && a / 16 % 8 == b / 16 % 8) {
                conflicts++;
                break;
            }
        }
    return conflicts;
}

// Register m of lane l has two values of matrix m: columns 2 (l % 4) and the next of row l / 4, or that of the
// matrix transposed.
UNSEEN static void load_matrices(Fiber *lanes, bool transposed) {
    result.ldmatrix++;
    for (int m = 0; m < 4; m++) {
        const Fiber *rows = lanes + 8 * m;
        result.bank_conflicts += count_conflicts(rows);
        for (int l = 0; l < WARP; l++) {
            uint32_t both = 0;
            for (int e = 0; e < 2; e++) {
                int row = l / 4, column = l % 4 * 2 + e;
                if (transposed) std::swap(row, column);
                both |= (uint32_t)operands<MatrixRow>(rows[row]).values[column] << 16 * e;
            }
            results<Registers>(lanes[l]).r[m] = both;
        }
    }
}
UNSEEN static void compute_ldmatrix(Fiber *lanes) { load_matrices(lanes, false); }
UNSEEN static void compute_ldmatrix_trans(Fiber *lanes) { load_matrices(lanes, true); }
constexpr Operation LDMATRIX = {"ldmatrix_x4", compute_ldmatrix};
constexpr Operation LDMATRIX_TRANS = {"ldmatrix_x4_trans", compute_ldmatrix_trans};

inline void load_matrices(const Operation &operation, uint32_t (&r)[4], const void *address, int line) {
    check_shared_row(address, operation.name);
    Row row = *static_cast<const Row *>(address);  // seen by the sanitizers, as this lane's access
    MatrixRow in;
    __builtin_memcpy(in.values, row.bytes, sizeof(in.values));
    in.address = reinterpret_cast<uintptr_t>(address);
    Registers out = with_warp<Registers>(operation, in, line);
    for (int i = 0; i < 4; i++) r[i] = out.r[i];
}

// mma.m16n8k16. With g = lane / 4, q = 2 (lane % 4); each register of a and b has two values, next in k:
//   a[i]   row g + 8 (i % 2), k = q + 8 (i / 2)            a is [16, 16]
//   b[i]   k = q + 8 i, column g                           b is [16, 8]
//   d[i]   row g + 8 (i / 2), column q + i % 2             d is [16, 8]
struct Fragments {
    uint32_t a[4], b[2];
    float d[4];
};
struct Product {
    float d[4];
};

template <class To>
UNSEEN static void multiply_matrices(Fiber *lanes, To to_floats) {
    float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < WARP; l++) {
        const Fragments &in = operands<Fragments>(lanes[l]);
        int g = l / 4, q = l % 4 * 2;
        for (int i = 0; i < 4; i++) to_floats(in.a[i], &a[g + i % 2 * 8][q + i / 2 * 8], 1);
        for (int i = 0; i < 2; i++) to_floats(in.b[i], &b[q + i * 8][g], 8);
        for (int i = 0; i < 4; i++) d[g + i / 2 * 8][q + i % 2] = in.d[i];
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++)
            results<Product>(lanes[l]).d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    result.mma++;
}

UNSEEN static void compute_mma(Fiber *lanes) {
    multiply_matrices(lanes, [](uint32_t both, float *to, int step) {
#if DTYPE == BF16
        to[0] = bits_as<float>(both << 16), to[step] = bits_as<float>(both & 0xffff0000u);
#else
        to[0] = (float)bits_as<_Float16>((uint16_t)both), to[step] = (float)bits_as<_Float16>((uint16_t)(both >> 16));
#endif
    });
}
constexpr Operation MMA = {"mma_16816", compute_mma};

// ---- copies ----

UNSEEN static void begin_copy(void *shared, const void *global) {
    Fiber &f = *running;
    if (f.copy_count == f.copy_capacity) {
        f.copy_capacity = 2 * f.copy_capacity + 16;
        f.copies = static_cast<Copy *>(realloc(f.copies, f.copy_capacity * sizeof(Copy)));
    }
    f.copies[f.copy_count++] = {static_cast<unsigned char *>(shared), static_cast<const unsigned char *>(global),
                                f.group};
}

// Takes the oldest copy if its group is not one of the last `kept` that were committed.
UNSEEN static bool take_copy(int kept, Copy &copy) {
    Fiber &f = *running;
    if (!f.copy_count || f.copies[0].group >= f.group - kept) return false;
    copy = f.copies[0];
    f.copy_count--;
    for (int i = 0; i < f.copy_count; i++) f.copies[i] = f.copies[i + 1];
    return true;
}

UNSEEN static void commit_copies() { running->group++; }

}  // namespace shim

#define threadIdx (static_cast<const dim3 &>(shim::running->thread))
#define blockIdx (static_cast<const dim3 &>(shim::block_index))
#define blockDim (static_cast<const dim3 &>(shim::block_size))
#define gridDim (static_cast<const dim3 &>(shim::grid_size))
#define warpSize 32
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(shim::dynamic_shared)

// `line` is the caller's: it tells one call from another.

inline void __syncthreads(int line = __builtin_LINE()) { shim::barrier(line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    shim::check_mask(mask, "__syncwarp");
    shim::warp_barrier(line);
}

template <class T>
inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32, int line = __builtin_LINE()) {
    return shim::shuffle(shim::SHUFFLE, mask, x, lane, width, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int lane, int width = 32, int line = __builtin_LINE()) {
    return shim::shuffle(shim::SHUFFLE_XOR, mask, x, lane, width, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, int lane, int width = 32, int line = __builtin_LINE()) {
    return shim::shuffle(shim::SHUFFLE_DOWN, mask, x, lane, width, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, int lane, int width = 32, int line = __builtin_LINE()) {
    return shim::shuffle(shim::SHUFFLE_UP, mask, x, lane, width, line);
}

inline unsigned __ballot_sync(unsigned mask, bool x, int line = __builtin_LINE()) {
    shim::check_mask(mask, "a vote");
    return shim::with_warp<unsigned>(shim::BALLOT, x, line);
}
inline int __any_sync(unsigned mask, bool x, int line = __builtin_LINE()) {
    return __ballot_sync(mask, x, line) != 0;
}
inline int __all_sync(unsigned mask, bool x, int line = __builtin_LINE()) {
    return __ballot_sync(mask, x, line) == 0xffffffffu;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void *row, int line = __builtin_LINE()) {
    shim::load_matrices(shim::LDMATRIX, r, row, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, int line = __builtin_LINE()) {
    shim::load_matrices(shim::LDMATRIX_TRANS, r, row, line);
}

#if DTYPE != F32
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      int line = __builtin_LINE()) {
    shim::Fragments in = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
    shim::Product out = shim::with_warp<shim::Product>(shim::MMA, in, line);
    for (int i = 0; i < 4; i++) d[i] = out.d[i];
}
#endif

inline void copy_async(void *shared, const void *global, bool inside) {
    shim::check_shared_row(shared, "copy_async");
    if (reinterpret_cast<uintptr_t>(global) % 16) shim::fail("copy_async: %p is not a multiple of 16", global);
    memset(shared, shim::POISON, 16);  // seen by the sanitizers: from here on it may be written
    shim::begin_copy(shared, inside ? global : nullptr);
}
inline void commit_async() { shim::commit_copies(); }
template <int N>
inline void wait_async() {
    shim::Copy copy;
    while (shim::take_copy(N, copy)) {
        shim::Row row = {};
        if (copy.global) row = *reinterpret_cast<const shim::Row *>(copy.global);
        *reinterpret_cast<shim::Row *>(copy.shared) = row;
    }
}

// ---- the kernel, seen from outside: SHIM_KERNEL(name) stands at the end of its source ----

namespace shim {

// A parameter's type as shim.py checks it: f2, b2 (bfloat16), f4, i4, u8 (unsigned), ...; "?" for a structure.
template <class T>
inline void describe(char *to, size_t size) {
    using Element = std::remove_cv_t<std::remove_pointer_t<T>>;
    char kind = '?';
    if (std::is_same_v<Element, __nv_bfloat16>) kind = 'b';
    else if (std::is_same_v<Element, __half> || std::is_floating_point_v<Element>) kind = 'f';
    else if (std::is_integral_v<Element>) kind = std::is_unsigned_v<Element> ? 'u' : 'i';
    size_t bytes = 0;
    if constexpr (!std::is_void_v<Element>) bytes = sizeof(Element);
    bool constant = std::is_const_v<std::remove_pointer_t<T>>;
    size_t n = strlen(to);
    snprintf(to + n, size - n, "%s%c%zu%s,", constant ? "const " : "", kind, bytes, std::is_pointer_v<T> ? "*" : "");
}

template <class... A>
inline const char *signature(void (*)(A...)) {
    static char text[1024];
    text[0] = 0;
    (describe<A>(text, sizeof(text)), ...);
    return text;
}

template <class... A, size_t... i>
inline void call(void (*kernel)(A...), void **from, std::index_sequence<i...>) {
    kernel(*static_cast<A *>(from[i])...);
}
template <class... A>
inline void call(void (*kernel)(A...), void **from) {
    call(kernel, from, std::index_sequence_for<A...>());
}

}  // namespace shim

#define SHIM_EXPORT extern "C" __attribute__((visibility("default")))
#define SHIM_KERNEL(kernel)                                                              \
    SHIM_EXPORT const char *shim_signature() { return shim::signature(kernel); }         \
    SHIM_EXPORT void shim_run(const shim::Request *request, shim::Result *result) {      \
        *result = shim::run([](void **from) { shim::call(kernel, from); }, *request);    \
    }                                                                                    \
    SHIM_MAIN(kernel)

// ---- as a program: reads one launch from a file, runs it, writes its arrays back there; or prints the signature ----

#ifndef SHIM_PROGRAM
#define SHIM_MAIN(kernel)
#else

namespace shim {

// The file, in numbers of 8 bytes: grid x, y, z, block, shared, order, pieces of memory, arguments; for each
// piece its size and how far its start is from a multiple of 16; for each argument -1 and its bits, or its piece
// and where in it; then the bytes of all pieces. Each piece becomes a heap block of exactly its size. Afterwards
// the file has the statistics and the bytes of all pieces.
struct File {
    FILE *file;
    int64_t number() {
        int64_t n = 0;
        bytes(&n, sizeof(n));
        return n;
    }
    void bytes(void *to, size_t n) {
        if (fread(to, 1, n, file) != n) fputs("shim: the file is too short\n", stderr), exit(2);
    }
};

inline int run_file(const char *path, void (*call)(void **)) {
    File in = {fopen(path, "rb")};
    if (!in.file) return 2;
    Request request = {};
    for (uint32_t &n : request.grid) n = in.number();
    request.block = in.number(), request.shared = in.number(), request.order = in.number();
    struct Piece {
        int64_t size;
        unsigned char *block, *start;
    };
    size_t pieces = in.number(), count = in.number();
    Piece *piece = new Piece[pieces];
    for (size_t i = 0; i < pieces; i++) {
        int64_t size = in.number(), lead = in.number();
        unsigned char *block = static_cast<unsigned char *>(malloc(size + lead));
        piece[i] = {size, block, block + lead};
    }
    int64_t *value = new int64_t[count];
    request.arguments = new void *[count];
    for (size_t i = 0; i < count; i++) {
        int64_t from = in.number();
        value[i] = in.number();
        if (from >= 0) value[i] += reinterpret_cast<int64_t>(piece[from].start);
        request.arguments[i] = &value[i];
    }
    for (size_t i = 0; i < pieces; i++) in.bytes(piece[i].start, piece[i].size);
    fclose(in.file);

    Result got = run(call, request);
    FILE *out = fopen(path, "wb");
    if (!out) return 2;
    fwrite(&got, 1, sizeof(got), out);
    for (size_t i = 0; i < pieces; i++) fwrite(piece[i].start, 1, piece[i].size, out);
    fclose(out);
    for (size_t i = 0; i < pieces; i++) free(piece[i].block);
    delete[] piece, delete[] value, delete[] request.arguments;
    return 0;
}

}  // namespace shim

#define SHIM_MAIN(kernel)                                                                  \
    int main(int count, char **names) {                                                    \
        if (count < 2) return puts(shim_signature()) < 0;                                  \
        return shim::run_file(names[1], [](void **from) { shim::call(kernel, from); });    \
    }
#endif
