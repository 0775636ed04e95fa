// cpu.c: which ISAs this machine has, and the thread pool
//
// The pool is made at the first use and lives as long as the process. A job is split into one range
// of tasks per thread; a thread that has finished its own range takes from those of the others.
// Tasks write to places of their own, so results do not depend on who ran them.
//
//   one caller at a time has the workers; another that comes meanwhile runs its tasks itself, so
//   several Python threads that encode at once never run more threads than there are cores
//   a worker that waits spins for a moment (the next op follows within microseconds), then sleeps
//   workers beyond a number of threads that was lowered end with the next job
//   after fork the child has no workers: they are made again at its first job
#define _GNU_SOURCE
#include "cpu.h"

#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MAX_THREADS 256
#define OPEN (1 << 16)
#define SPINS 20000  // of about 40 cycles: some 200 us
#define EXPORT __attribute__((visibility("default")))

typedef struct {
    _Alignas(64) atomic_llong next;
    int64_t end;
} Range;

static struct {
    pthread_mutex_t owner;   // held by the caller whose job runs, and never waited for
    pthread_mutex_t mutex;   // of the condition below
    pthread_cond_t wake;
    atomic_uint generation;  // counts the jobs; a change of it starts the workers
    atomic_int gate;         // OPEN while a job takes workers, plus the number that are in it
    int sleeping;
    atomic_int workers;      // that live
    atomic_int wanted;       // threads, the caller among them; may change at any time
    int threads;             // that the job is split for
    Task run;
    const void *arguments;
    Range ranges[MAX_THREADS];
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .wanted = 1};

static _Thread_local _Alignas(64) unsigned char memory[SCRATCH_BYTES];

static void work(int self) {
    Scratch scratch = {memory, -1};
    for (int i = 0; i < pool.threads; i++) {
        Range *range = &pool.ranges[(self + i) % pool.threads];
        int64_t task;
        while ((task = atomic_fetch_add(&range->next, 1)) < range->end)
            pool.run(pool.arguments, task, &scratch);
    }
}

static int enter(void) {
    int gate = atomic_load(&pool.gate);
    while (gate & OPEN)
        if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1)) return 1;
    return 0;
}

static void *worker(void *start) {  // its number, and the generation of the job before its first
    int self = (int)((uintptr_t)start % MAX_THREADS);
    unsigned seen = (unsigned)((uintptr_t)start / MAX_THREADS);
    for (;;) {
        unsigned generation = seen;
        for (int i = 0; i < SPINS && generation == seen; i++) {
            _mm_pause();
            generation = atomic_load(&pool.generation);
        }
        if (generation == seen) {
            pthread_mutex_lock(&pool.mutex);
            pool.sleeping++;
            while ((generation = atomic_load(&pool.generation)) == seen)
                pthread_cond_wait(&pool.wake, &pool.mutex);
            pool.sleeping--;
            pthread_mutex_unlock(&pool.mutex);
        }
        seen = generation;
        if (self >= atomic_load(&pool.wanted)) {  // fewer threads are wanted now
            atomic_fetch_sub(&pool.workers, 1);
            return NULL;
        }
        if (!enter()) continue;  // too late: the job is done
        work(self);
        atomic_fetch_sub(&pool.gate, 1);  // from here on the next job may be written
    }
}

static void after_fork_in_child(void) {
    pool.sleeping = 0;
    pool.workers = 0;
    pool.gate = 0;
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

// When the library is loaded: by its first job another thread could fork already.
__attribute__((constructor)) static void register_fork_handler(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

static void make_workers(int wanted) {  // as many, or as the system gives
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // signals are the callers' business
    while (pool.workers < wanted - 1) {
        pthread_t thread;
        uintptr_t self = pool.workers + 1, generation = atomic_load(&pool.generation);
        void *start = (void *)(generation * MAX_THREADS + self);
        atomic_fetch_add(&pool.workers, 1);  // before it can end; others end meanwhile
        if (pthread_create(&thread, NULL, worker, start)) {
            atomic_fetch_sub(&pool.workers, 1);
            break;
        }
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void parallel_for(Task run, const void *arguments, int64_t tasks) {
    int wanted = pool.wanted;
    int alone = tasks < 2 || wanted < 2 || pthread_mutex_trylock(&pool.owner);
    if (!alone && pool.workers < wanted - 1) make_workers(wanted);
    if (alone || !pool.workers) {
        Scratch scratch = {memory, -1};
        for (int64_t task = 0; task < tasks; task++) run(arguments, task, &scratch);
        if (!alone) pthread_mutex_unlock(&pool.owner);
        return;
    }
    int threads = pool.workers + 1 < wanted ? pool.workers + 1 : wanted;
    pool.threads = tasks < threads ? (int)tasks : threads;
    pool.run = run;
    pool.arguments = arguments;
    for (int i = 0; i < pool.threads; i++) {
        atomic_store(&pool.ranges[i].next, tasks * i / pool.threads);
        pool.ranges[i].end = tasks * (i + 1) / pool.threads;
    }
    atomic_store(&pool.gate, OPEN);
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.generation, 1);
    if (pool.sleeping) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
    work(0);
    atomic_fetch_and(&pool.gate, ~OPEN);  // who has not come by now is not waited for
    for (int spins = 0; atomic_load(&pool.gate); spins++)
        if (spins < SPINS) _mm_pause();
        else sched_yield();
    pthread_mutex_unlock(&pool.owner);
}

EXPORT void npclip_set_num_threads(int threads) {
    pool.wanted = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
}

EXPORT int npclip_num_threads(void) { return pool.wanted; }

static int has_amx(void) {
#ifdef NPCLIP_EMULATE_AMX
    return 1;
#elif defined(__linux__)
    unsigned a, b, c, d;
    int tile_and_bf16 = 1 << 24 | 1 << 22;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ((int)d & tile_and_bf16) != tile_and_bf16) return 0;
    return !syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XTILEDATA: for all threads
#else
    return 0;
#endif
}

// Bits of what this machine and its operating system can run, in the order of npclip/cpu.py.
EXPORT int npclip_isas(void) {
    __builtin_cpu_init();
    unsigned a, b, c, d;
    int f16c = __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;  // Clang knows no name for it
    int avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    return avx2 | avx512 << 1 | bf16 << 2 | (bf16 && has_amx()) << 3;
}
