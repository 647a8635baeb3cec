// Runs CUDA kernels on a CPU and checks what a GPU would not say:
//
//   - shared memory: elements read before they are written, or touched by two threads, one of them writing, without a
//     barrier in between (of the block, or of the warp for two of its lanes), indices out of bounds
//   - barriers and warp operations that not all threads reach, or reach at different lines
//   - blocks and threads in ascending, descending or shuffled order: what depends on it shows in the results
//   - global memory, through the sanitizers this file is built with: fibre switches are announced to AddressSanitizer
//
// An error ends the launch and is reported as any CUDA error is (svpo_cuda_last_error).
#include "../../csrc/cuda/common.cuh"

#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SVPO_ASAN(call) call
#else
#define SVPO_ASAN(call) (void)0
#endif

// Saves the registers that a call preserves, stores the stack pointer and continues on another stack.
#if defined(__x86_64__)
extern "C" void svpo_switch_stack(void** from, void* to);
asm(R"(
.text
.type svpo_switch_stack, @function
svpo_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#else
#error "the emulation of CUDA kernels switches stacks on x86-64 only"
#endif

namespace emulation {

int now_thread;
int64_t now_block_x, now_block_y, now_grid_y;

namespace {

constexpr size_t kStack = 256 << 10;  // AddressSanitizer writes its report on the stack it finds
constexpr int kMostThreads = 1024, kMostBlocks = 8, kLanes = 32;  // of a block, of a cluster, of a warp

enum Wait { kReady, kBarrier, kWarpBarrier, kExchange, kClusterBarrier, kDone };
const char* const kWaits[] = {"runs", "waits at a barrier", "waits at a warp barrier", "waits in a warp operation",
                             "waits at a cluster barrier", "has ended"};

struct Fibre {
  char* stack = nullptr;
  void* pointer = nullptr;
  void* fake_stack = nullptr;
  Wait wait = kDone;
  int line = 0;
};

struct Warp {
  int64_t interval = 0;           // warp barriers passed
  int64_t turn[kLanes] = {};      // exchanges begun by each lane
  int arrived = 0;                // lanes in the exchange under way
  uint64_t words[2][kLanes] = {};  // of this exchange and the one before, which slow lanes still read
};

Fibre fibres[kMostBlocks * kMostThreads];
std::vector<Warp> warps;
std::map<std::pair<const void*, int>, Array> arrays;  // of each block of a cluster
const std::function<void()>* body;
void* scheduler;
const void* scheduler_stack;
size_t scheduler_size;
int threads, total, schedule = 0, processor_count = 132, device_capability = 80;  // threads of a block, of a cluster
int now_rank;                    // the running thread's block in its cluster
int64_t now_first_x;             // the cluster's first block
int64_t intervals[kMostBlocks];  // barriers passed by each block
int64_t serial;                  // clusters begun
int64_t dynamic_bytes;
char error[200];

int now_fibre() { return now_rank * threads + now_thread; }

void to_fibre(int t) {
  now_thread = t % threads, now_rank = t / threads, now_block_x = now_first_x + now_rank;
  void* fake = nullptr;
  SVPO_ASAN(__sanitizer_start_switch_fiber(&fake, fibres[t].stack, kStack));
  svpo_switch_stack(&scheduler, fibres[t].pointer);
  SVPO_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr));
  (void)fake;
}

void to_scheduler(bool last) {
  Fibre& own = fibres[now_fibre()];
  SVPO_ASAN(__sanitizer_start_switch_fiber(last ? nullptr : &own.fake_stack, scheduler_stack, scheduler_size));
  svpo_switch_stack(&own.pointer, scheduler);
  SVPO_ASAN(__sanitizer_finish_switch_fiber(own.fake_stack, &scheduler_stack, &scheduler_size));
  (void)last;
}

__attribute__((no_sanitize("address"))) void enter() {
  SVPO_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size));
  (*body)();
  fibres[now_fibre()].wait = kDone;
  to_scheduler(true);
  __builtin_trap();
}

void start(int t) {
  Fibre& fibre = fibres[t];
  if (!fibre.stack) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    fibre.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (fibre.stack == MAP_FAILED) perror("mmap"), abort();
  }
  // As if `enter` had been called: six registers, then the return address, on a stack of 16-byte frames.
  void** top = reinterpret_cast<void**>(fibre.stack + kStack) - 2;
  *top = reinterpret_cast<void*>(enter);
  fibre.pointer = top - 6;
  memset(fibre.pointer, 0, 6 * sizeof(void*));
  fibre.wait = kReady;
}

void wait(Wait why, int line) {
  fibres[now_fibre()].wait = why, fibres[now_fibre()].line = line;
  to_scheduler(false);
}

// Says which threads of a group keep it from going on, when they are not all in one place.
void report(int first, int last) {
  const Fibre *const begin = fibres + first, *const end = fibres + last;
  const Fibre* const one = std::find_if(begin, end, [](const Fibre& fibre) { return fibre.wait != kDone; });
  const Fibre* const other = std::find_if(begin, end, [&](const Fibre& fibre) {
    return one != end && (fibre.wait != one->wait || fibre.line != one->line);
  });
  if (other == end) return;
  snprintf(error, sizeof error, "divergent threads: thread %d %s (line %d), thread %d %s (line %d)",
           static_cast<int>(one - fibres), kWaits[one->wait], one->line, static_cast<int>(other - fibres),
           kWaits[other->wait], other->line);
}

// Lets the threads go on that all wait in one place; false when nobody can.
bool release() {
  bool any = false;
  for (size_t w = 0; w < warps.size(); ++w) {
    const int first = static_cast<int>(w) * kLanes, last = std::min(first + kLanes, total);
    const bool together = std::all_of(fibres + first, fibres + last, [&](const Fibre& fibre) {
      return fibre.wait == fibres[first].wait && fibre.line == fibres[first].line;
    });
    if (!together || (fibres[first].wait != kWarpBarrier && fibres[first].wait != kExchange)) continue;
    warps[w].interval += fibres[first].wait == kWarpBarrier;
    for (int t = first; t < last; ++t) fibres[t].wait = kReady;
    any = true;
  }
  // A block at its barrier does not wait for the warps of another.
  const auto together = [](int first, int last, Wait why) {
    return std::all_of(fibres + first, fibres + last, [&](const Fibre& fibre) {
      return fibre.wait == why && fibre.line == fibres[first].line;
    });
  };
  const bool all = together(0, total, kClusterBarrier);
  for (int first = 0; first < total; first += threads) {
    if (!all && !together(first, first + threads, kBarrier)) continue;
    ++intervals[first / threads];
    for (int t = first; t < first + threads; ++t) fibres[t].wait = kReady;
    any = true;
  }
  return any;
}

std::vector<int64_t> ordered(int64_t count, std::mt19937& random) {
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = schedule == 1 ? count - 1 - i : i;
  if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
  return order;
}

void run_cluster(const std::vector<int64_t>& order) {
  std::fill(intervals, intervals + kMostBlocks, 0);
  warps.assign((total + kLanes - 1) / kLanes, Warp());
  ++serial;
  for (int t = 0; t < total; ++t) start(t);
  for (;;) {
    for (const int64_t t : order) {
      if (fibres[t].wait == kReady) to_fibre(static_cast<int>(t));
      if (error[0]) return;
    }
    if (std::all_of(fibres, fibres + total, [](const Fibre& fibre) { return fibre.wait == kDone; })) return;
    if (release()) continue;
    for (int first = 0; first < total && !error[0]; first += kLanes) report(first, std::min(first + kLanes, total));
    for (int first = 0; first < total && !error[0]; first += threads) report(first, first + threads);
    if (!error[0]) report(0, total);
    return;
  }
}

bool same_warp(int a, int b) { return a / kLanes == b / kLanes; }

}  // namespace

void barrier(int line) { wait(kBarrier, line); }
void warp_barrier(int line) { wait(kWarpBarrier, line); }
void cluster_barrier(int line) { wait(kClusterBarrier, line); }

void check_dynamic(int64_t bytes, int line) {
  if (bytes > dynamic_bytes) fail("more than the launch gave", "bytes", bytes, line);
}

uint64_t exchange(uint64_t bits, int source, int line) {
  const int t = now_fibre(), lane = t % kLanes;
  const int64_t turn = warps[t / kLanes].turn[lane]++;
  warps[t / kLanes].words[turn % 2][lane] = bits;
  wait(kExchange, line);
  if (source < 0 || source >= std::min(kLanes, total - t / kLanes * kLanes)) fail("no such lane", "", source, line);
  return warps[t / kLanes].words[turn % 2][source];
}

uint32_t vote(bool yes, int line) {
  uint32_t lanes = 0;
  const int64_t turn = warps[now_fibre() / kLanes].turn[now_fibre() % kLanes];
  exchange(yes, now_thread % kLanes, line);
  for (int lane = 0; lane < kLanes; ++lane)
    lanes |= static_cast<uint32_t>(warps[now_fibre() / kLanes].words[turn % 2][lane] & 1) << lane;
  return lanes;
}

void fail(const char* what, const char* name, int64_t index, int line) {
  snprintf(error, sizeof error, "shared memory or lane: %s: %s[%lld] by thread %d at line %d", what, name,
           static_cast<long long>(index), now_thread, line);
  to_scheduler(false);
  __builtin_unreachable();
}

Array& shared_array(const void* key, int64_t count, int64_t item_bytes, const char* name) {
  Array& array = arrays[{key, now_rank}];
  if (array.block == serial) return array;
  array.block = serial, array.name = name;
  array.accesses.assign(static_cast<size_t>(count), Access());
  array.bytes.assign(static_cast<size_t>(count * item_bytes), '\xff');  // NaN, and an index that is out of bounds
  return array;
}

void check_read(Array& array, int64_t index, int line) {
  Access& access = array.accesses[static_cast<size_t>(index)];
  const int t = now_thread;
  const int64_t own = warps[now_fibre() / kLanes].interval, interval = intervals[now_rank];
  if (access.writer < 0) fail("read before it was written", array.name, index, line);
  if (access.writer != t && access.write_block == interval &&
      !(same_warp(access.writer, t) && access.write_warp < own))
    fail("read of what another thread wrote, no barrier in between", array.name, index, line);
  // Reads of the warp before its last barrier stand behind this one.
  const bool passed = access.read_by_warp == t / kLanes && access.read_warp < own;
  const bool again = access.read_block == interval && access.reader != -1 && !passed;
  access.reader = again && access.reader != t ? -2 : t;
  access.read_by_warp = again && access.read_by_warp != t / kLanes ? -2 : t / kLanes;
  access.read_block = interval, access.read_warp = own;
}

void check_write(Array& array, int64_t index, int line) {
  Access& access = array.accesses[static_cast<size_t>(index)];
  const int t = now_thread;
  const int64_t own = warps[now_fibre() / kLanes].interval, interval = intervals[now_rank];
  if (access.writer >= 0 && access.writer != t && access.write_block == interval &&
      !(same_warp(access.writer, t) && access.write_warp < own))
    fail("written by two threads, no barrier in between", array.name, index, line);
  if (access.reader != -1 && access.reader != t && access.read_block == interval &&
      !(access.read_by_warp == t / kLanes && access.read_warp < own))
    fail("written while others read it, no barrier in between", array.name, index, line);
  access.writer = t, access.write_block = interval, access.write_warp = own;
}

int run(const char* name, int64_t blocks_x, int64_t blocks_y, int cluster, int block_threads, int64_t shared_bytes,
        const std::function<void()>& thread_body) {
  if (cluster < 1 || cluster > kMostBlocks || blocks_x % cluster || (cluster > 1 && block_threads % kLanes))
    return svpo_cuda_fail(name, "a cluster has 1 to 8 blocks of whole warps, and divides the grid");
  if (cluster > 1 && device_capability < 90) return svpo_cuda_fail(name, "this device has no clusters");
  if (shared_bytes > (device_capability < 90 ? 99 : 227) * 1024) return svpo_cuda_fail(name, "too much shared memory");
  if (block_threads < 1 || block_threads > kMostThreads) return svpo_cuda_fail(name, "a block has 1 to 1024 threads");
  static std::mt19937 random;
  random.seed(static_cast<unsigned>(schedule));
  threads = block_threads, total = cluster * threads, body = &thread_body, now_grid_y = blocks_y, error[0] = 0;
  dynamic_bytes = shared_bytes;
  for (const int64_t block : ordered(blocks_x / cluster * blocks_y, random)) {
    now_first_x = block % (blocks_x / cluster) * cluster, now_block_y = block / (blocks_x / cluster);
    run_cluster(ordered(total, random));
    if (!error[0]) continue;
    for (int t = 0; t < total; ++t) SVPO_ASAN(__asan_unpoison_memory_region(fibres[t].stack, kStack));
    return svpo_cuda_fail(name, error);
  }
  return SVPO_OK;
}

int processors() { return processor_count; }
int capability() { return device_capability; }

}  // namespace emulation

// Schedules: 0 ascending, 1 descending, above that shuffled with this seed. Processors and the compute capability
// (10 * major + minor) decide how rows are shared out.
extern "C" void svpo_emulation_schedule(int schedule, int processors, int capability) {
  emulation::schedule = schedule, emulation::processor_count = processors;
  emulation::device_capability = capability;
}
