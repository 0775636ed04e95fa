// cpu.h: what kernels share that is not compiled per ISA.
#ifndef NPCLIP_CPU_H
#define NPCLIP_CPU_H

#include <stdint.h>

// Working memory of one thread, for the tasks of one kernel after another. Kernels choose their
// block sizes so that it is enough: they allocate nothing, and so cannot fail.
#define SCRATCH_BYTES (5 << 19)

typedef struct {
    unsigned char *memory;  // SCRATCH_BYTES, 64-byte aligned
    int64_t packed;         // what a task has left in memory for the next one; -1 at first
} Scratch;

typedef void (*Task)(const void *arguments, int64_t task, Scratch *scratch);

// Runs task 0 .. tasks-1, each once, on the threads of the pool and the calling one; returns when
// all are done. Neighbours mostly run on the same thread, in order.
void parallel_for(Task run, const void *arguments, int64_t tasks);

int npclip_num_threads(void);

#endif
