// Kernels with one fault each, and one without: what the emulation must find (tests/cuda_checks.py).
#include "../../csrc/cuda/common.cuh"

namespace {

constexpr int kThreads = 64;

enum Fault {
  kNone, kNoBarrier, kNoWarpBarrier, kNotWritten, kTwoWriters, kSharedIndex, kDivergentBarrier, kEarlyExit,
  kDivergentShuffle, kNoSuchLane, kMisaligned, kGlobalIndex
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

}  // namespace

extern "C" int svpo_fault(int fault, float* data) {
  void (*const kernels[])(float*) = {
      fault_kernel<kNone>, fault_kernel<kNoBarrier>, fault_kernel<kNoWarpBarrier>, fault_kernel<kNotWritten>,
      fault_kernel<kTwoWriters>, fault_kernel<kSharedIndex>, fault_kernel<kDivergentBarrier>, fault_kernel<kEarlyExit>,
      fault_kernel<kDivergentShuffle>, fault_kernel<kNoSuchLane>, fault_kernel<kMisaligned>, fault_kernel<kGlobalIndex>};
  return launch("fault", kernels[fault], Grid{1, 1}, kThreads, Queue{0, nullptr}, data);
}
