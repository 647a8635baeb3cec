// What the CPU kernels need from the machine: the instruction set in use, threads, and memory advice.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum svpo_isa_code { SVPO_ISA_PORTABLE = 0, SVPO_ISA_AVX2 = 1, SVPO_ISA_AVX512 = 2 };

// Best instruction set that was compiled in and that CPU and operating system support.
int svpo_isa_best(void);

// One task of a parallel loop. Tasks are handed out one by one, so the thread that runs a task is not fixed:
// a task must not depend on it.
typedef void (*svpo_task)(void* context, int64_t first, int64_t last);

// Runs task(context, first, last) over [0, count) in pieces of `grain`, on up to `threads` threads of the OpenMP pool
// that PyTorch has loaded; serial when there is none, in a forked child, and inside another parallel region.
void svpo_parallel(int64_t count, int64_t grain, int threads, svpo_task task, void* context);

// Whether an OpenMP runtime was found, and whether this process is a forked child.
int svpo_has_openmp(void);
int svpo_is_forked(void);

// Maps the pages under a buffer that is about to be written for the first time, in one call instead of a fault a page;
// a hint, never an error. Huge pages would be cheaper still, but took from a half to three times the time of small ones
// from run to run under a hypervisor.
void svpo_populate(void* address, size_t bytes);
