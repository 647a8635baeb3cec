// Kernels with one fault each, and one without: what the emulation must find (tests/cuda_checks.py).
#include "../../csrc/cuda/common.cuh"

namespace {

constexpr int kThreads = 64;

enum Fault {
  kNone, kNoBarrier, kNoWarpBarrier, kNotWritten, kTwoWriters, kSharedIndex, kDivergentBarrier, kEarlyExit,
  kDivergentShuffle, kNoSuchLane, kMisaligned, kGlobalIndex, kEarlyBlock, kDivergentCluster, kSharedBytes
};

// data (kThreads,): each thread's number, reversed through shared memory.
template <int fault>
SVPO_KERNEL(kThreads, 1) fault_kernel(float* data) {
  SVPO_SHARED(float, slots, kThreads);
  const int t = thread_x(), other = kThreads - 1 - t;
  if (fault == kEarlyExit && t == 5) return;
  if (fault != kNotWritten || t != 7) slots[fault == kSharedIndex ? t + 1 : t] = data[t];
  if (fault == kTwoWriters && t == 9) slots[10] = 0.0f;
  if (fault == kDivergentBarrier && t == 3) sync_threads();
  if (fault == kNoWarpBarrier) data[t] = slots[t ^ 1];
  else if (fault != kNoBarrier) sync_threads();
  if (fault == kDivergentShuffle && t == 40) return;
  const float first = shuffle(static_cast<float>(slots[other]), fault == kNoSuchLane ? 32 : t % kWarp);
  if (fault == kMisaligned) store_16_bytes(data + 1, load_16_bytes(data));
  data[fault == kGlobalIndex ? t + 1 : t] = first;
}

// data (2 * kThreads,): each thread's number, reversed by two blocks of a cluster; between the barriers it is another's.
template <int fault>
SVPO_KERNEL(kThreads, 1) cluster_fault_kernel(float* data) {
  SVPO_DYNAMIC_SHARED(float, slots, kThreads + (fault == kSharedBytes));
  const int64_t t = block_x() * kThreads + thread_x(), other = 2 * kThreads - 1 - t;
  slots[thread_x()] = data[other];
  if (fault == kEarlyBlock && block_x() == 1) return;
  if (fault == kDivergentCluster && t == 70) sync_threads();
  sync_cluster();
  data[t] = slots[thread_x()];
}

}  // namespace

extern "C" int svpo_cluster_fault(int fault, float* data) {
  void (*const kernels[])(float*) = {cluster_fault_kernel<kNone>, cluster_fault_kernel<kEarlyBlock>,
                                     cluster_fault_kernel<kDivergentCluster>, cluster_fault_kernel<kSharedBytes>};
  return launch_clusters("fault", kernels[fault], Grid{2, 1}, 2, kThreads, kThreads * 4, Queue{0, nullptr}, data);
}

extern "C" int svpo_fault(int fault, float* data) {
  void (*const kernels[])(float*) = {
      fault_kernel<kNone>, fault_kernel<kNoBarrier>, fault_kernel<kNoWarpBarrier>, fault_kernel<kNotWritten>,
      fault_kernel<kTwoWriters>, fault_kernel<kSharedIndex>, fault_kernel<kDivergentBarrier>, fault_kernel<kEarlyExit>,
      fault_kernel<kDivergentShuffle>, fault_kernel<kNoSuchLane>, fault_kernel<kMisaligned>, fault_kernel<kGlobalIndex>};
  return launch("fault", kernels[fault], Grid{1, 1}, kThreads, Queue{0, nullptr}, data);
}
