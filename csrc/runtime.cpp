#include "runtime.h"

#include <atomic>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

// Entry points of the OpenMP runtime that PyTorch ships (libgomp, and LLVM's or Intel's, which export the same names).
// Weak: nothing is linked and nothing fails to load without it. Called directly, because the pragma would make clang
// ask for LLVM's own entry points, which libgomp does not have.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_in_parallel(void) __attribute__((weak));
}

namespace {

std::atomic<bool> forked{false};

void on_fork() { forked.store(true, std::memory_order_relaxed); }

struct ForkGuard {
  ForkGuard() { pthread_atfork(nullptr, nullptr, on_fork); }
} fork_guard;

struct Loop {
  int64_t count, grain;
  svpo_task task;
  void* context;
  std::atomic<int64_t> next;
};

void drain(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (;;) {
    const int64_t first = loop.next.fetch_add(loop.grain, std::memory_order_relaxed);
    if (first >= loop.count) return;
    const int64_t last = first + loop.grain;
    loop.task(loop.context, first, last < loop.count ? last : loop.count);
  }
}

}  // namespace

void svpo_parallel(int64_t count, int64_t grain, int threads, svpo_task task, void* context) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t pieces = (count + grain - 1) / grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  Loop loop{count, grain, task, context, {0}};
  // libgomp's pool does not survive a fork: the child would wait for threads that are gone.
  const bool serial = threads <= 1 || !svpo_has_openmp() || svpo_is_forked() || (omp_in_parallel && omp_in_parallel());
  if (serial) drain(&loop);
  else GOMP_parallel(drain, &loop, static_cast<unsigned>(threads), 0);
}

int svpo_has_openmp(void) { return GOMP_parallel != nullptr; }

int svpo_is_forked(void) { return forked.load(std::memory_order_relaxed); }

int svpo_isa_best(void) {
#if defined(SVPO_X86_ISAS)
  __builtin_cpu_init();
  // These also ask whether the operating system saves the wide registers (XGETBV).
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return SVPO_ISA_AVX512;
  // Every CPU with AVX2 has F16C; older compilers do not know its name here.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SVPO_ISA_AVX2;
#endif
  return SVPO_ISA_PORTABLE;
}

void svpo_populate(void* address, size_t bytes) {
#if defined(__linux__)
  const int populate_write = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older headers lack the name, older kernels refuse
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), from = reinterpret_cast<uintptr_t>(address);
  const uintptr_t first = from & ~(page - 1), last = (from + bytes + page - 1) & ~(page - 1);
  if (bytes) (void)madvise(reinterpret_cast<void*>(first), last - first, populate_write);
#else
  (void)address, (void)bytes;
#endif
}
