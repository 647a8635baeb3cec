// aggregate_scores on CUDA: a warp a sequence, its lanes a score each at a time, in fp64 and a fixed order.
#include "small.cuh"

namespace {

enum How { kMin, kProd, kGeomean, kMean, kLast, kMax };

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMostBlocks = 1024;  // each looks through all offsets: more would cost more than they bring

struct Sequences {
  Indices offsets;
  int64_t S, B;
};

int64_t blocks_for(int64_t B) {
  const int64_t blocks = ceil_div(B, kWarps);
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

SVPO_DEVICE int lane() { return thread_x() % kWarp; }
SVPO_DEVICE int64_t first_sequence() { return block_x() * kWarps + thread_x() / kWarp; }

// Whether the offsets run from 0 to S; if not, nothing can be said of any sequence.
SVPO_DEVICE bool sound(const Sequences& sequences) {
  SVPO_SHARED(double, falls_of_warps, kWarps);
  const Indices offsets = sequences.offsets;
  double falls[1] = {};
  for (int64_t b = thread_x(); b < sequences.B; b += kThreads) falls[0] += offsets[b] > offsets[b + 1];
  block_sums(falls, falls_of_warps, kThreads);
  return falls[0] == 0.0 && offsets[0] == 0 && offsets[sequences.B] == sequences.S;
}

// -- forward -----------------------------------------------------------------------------------------------------------

// The first smallest (or largest) score, -1: none yet; the first NaN before all.
struct Extreme {
  float value;
  int64_t at;
};

SVPO_DEVICE bool beats(const Extreme& a, const Extreme& b, bool smallest) {
  if (a.at < 0 || b.at < 0) return b.at < 0 && a.at >= 0;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return smallest ? a.value < b.value : a.value > b.value;
  return a.at < b.at;
}

template <class T>
SVPO_DEVICE Extreme extreme(const T* x, int64_t begin, int64_t end, bool smallest) {
  Extreme best = {0.0f, -1};
  for (int64_t i = begin + lane(); i < end; i += kWarp) {
    const Extreme own = {to_float(x[i]), i};
    if (beats(own, best, smallest)) best = own;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Extreme other = {shuffle_xor(best.value, offset), shuffle_xor(best.at, offset)};
    if (beats(other, best, smallest)) best = other;
  }
  return best;
}

SVPO_DEVICE double warp_product(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value *= shuffle_xor(value, offset);
  return value;
}

// The product, the geometric mean or the mean of a sequence that is not empty.
template <class T>
SVPO_DEVICE double joined(const T* x, int64_t begin, int64_t end, int how) {
  double total = how == kProd ? 1.0 : 0.0;
  bool zero = false, negative = false;
  for (int64_t i = begin + lane(); i < end; i += kWarp) {
    const double a = to_float(x[i]);
    zero = zero || a == 0.0;
    negative = negative || a < 0.0;
    if (how == kProd) total *= a;
    else if (how == kMean) total += a;
    else if (!(a <= 0.0)) total += log(a);
  }
  if (how == kProd) return warp_product(total);
  const double mean = warp_sum(total) / static_cast<double>(end - begin);
  if (how == kMean) return mean;
  const bool any_zero = ballot(zero) != 0, any_negative = ballot(negative) != 0;
  if (any_negative || mean != mean) return NAN;
  return any_zero ? 0.0 : exp(mean);
}

// Grid (blocks_for(B),). out (B,), chosen (B,): the score that min, max and last took, else -1.
template <class T>
SVPO_KERNEL(kThreads, 4)
aggregate_scores_fwd_kernel(const T* x, Sequences sequences, int how, float* out, int64_t* chosen) {
  const bool usable = sound(sequences);
  for (int64_t b = first_sequence(); b < sequences.B; b += kMostBlocks * kWarps) {
    const int64_t begin = sequences.offsets[b], end = sequences.offsets[b + 1];
    const bool empty = !usable || begin == end;
    Extreme result = {NAN, -1};
    if (!empty && (how == kMin || how == kMax)) result = extreme(x, begin, end, how == kMin);
    else if (!empty && how == kLast) result = {to_float(x[end - 1]), end - 1};
    else if (!empty) result.value = static_cast<float>(joined(x, begin, end, how));
    if (lane() != 0) continue;
    out[b] = result.value;
    chosen[b] = result.at;
  }
}

// -- backward ----------------------------------------------------------------------------------------------------------

// Products over lanes 0 ... own, or own ... 31.
SVPO_DEVICE double scan(double value, bool from_the_end) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = from_the_end ? lane() + offset : lane() - offset;
    const double there = shuffle(value, other < 0 || other >= kWarp ? lane() : other);
    if (other >= 0 && other < kWarp) value *= there;
  }
  return value;
}

// Upstream times the product of the others, what comes before times what comes behind: exact with zeros. A lane takes
// the score one to the side, so that its own is left out; `behind` (S,) holds the second half, written by who reads it.
template <class T>
SVPO_DEVICE void prod_gradient(const T* x, T* grad, int64_t begin, int64_t end, double g, double* behind) {
  double carry = 1.0;
  for (int64_t from = begin + (end - begin - 1) / kWarp * kWarp; from >= begin; from -= kWarp) {
    const int64_t i = from + lane();
    const double product = carry * scan(i + 1 < end ? to_float(x[i + 1]) : 1.0, true);
    if (i < end) behind[i] = product;
    carry = shuffle(product, 0);
  }
  carry = 1.0;
  for (int64_t from = begin; from < end; from += kWarp) {
    const int64_t i = from + lane();
    const double product = carry * scan(i > begin && i <= end ? to_float(x[i - 1]) : 1.0, false);
    if (i < end) grad[i] = from_float<T>(static_cast<float>(g * (product * behind[i])));
    carry = shuffle(product, kWarp - 1);
  }
}

// The gradient of score i of a sequence of `count`, unless `how` is kProd.
SVPO_DEVICE double score_gradient(int how, double g, double x, double out, bool chosen, double count) {
  if (how == kMean) return g / count;
  if (how == kGeomean) return out != 0.0 ? g * (out / (count * x)) : 0.0;
  return chosen ? g : 0.0;
}

// Grid (blocks_for(B),). Every element of grad_scores (S,); all NaN when the offsets are not sound.
template <class T>
SVPO_KERNEL(kThreads, 4)
aggregate_scores_bwd_kernel(const float* grad, const T* x, Sequences sequences, const float* out,
                            const int64_t* chosen, int how, double* behind, T* grad_scores) {
  const bool usable = sound(sequences);
  for (int64_t b = first_sequence(); b < sequences.B; b += kMostBlocks * kWarps) {
    if (!usable) {
      for (int64_t i = b * kWarp + lane(); i < sequences.S; i += sequences.B * kWarp) grad_scores[i] = from_float<T>(NAN);
      continue;
    }
    const int64_t begin = sequences.offsets[b], end = sequences.offsets[b + 1];
    if (how == kProd) {
      prod_gradient(x, grad_scores, begin, end, grad[b], behind);
      continue;
    }
    const double count = static_cast<double>(end - begin);
    for (int64_t i = begin + lane(); i < end; i += kWarp)
      grad_scores[i] = from_float<T>(static_cast<float>(
          score_gradient(how, grad[b], to_float(x[i]), out[b], i == chosen[b], count)));
  }
}

}  // namespace

extern "C" int svpo_cuda_aggregate_scores_fwd(const void* scores, int dtype, const void* offsets, int wide, int64_t S,
                                              int64_t B, int how, float* out, int64_t* chosen, int device,
                                              void* stream) {
  const Sequences sequences = {{offsets, wide}, S, B};
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return launch("aggregate_scores_fwd", aggregate_scores_fwd_kernel<T>, Grid{blocks_for(B), 1}, kThreads,
                  Queue{device, stream}, static_cast<const T*>(scores), sequences, how, out, chosen);
  });
}

extern "C" int svpo_cuda_aggregate_scores_bwd(const float* grad, const void* scores, int dtype, const void* offsets,
                                              int wide, int64_t S, int64_t B, const float* out, const int64_t* chosen,
                                              int how, void* grad_scores, void* scratch, int64_t scratch_bytes,
                                              int device, void* stream) {
  const Sequences sequences = {{offsets, wide}, S, B};
  const Queue queue = {device, stream};
  if (how == kProd && scratch_bytes < S * static_cast<int64_t>(sizeof(double)))
    return svpo_cuda_fail("aggregate_scores_bwd", "scratch is too small");
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    // Without a sequence no score has a gradient, and no block would write one.
    if (B == 0) return fill_bytes(grad_scores, 0, S * static_cast<int64_t>(sizeof(T)), queue);
    return launch("aggregate_scores_bwd", aggregate_scores_bwd_kernel<T>, Grid{blocks_for(B), 1}, kThreads, queue, grad,
                  static_cast<const T*>(scores), sequences, out, chosen, how, static_cast<double*>(scratch),
                  static_cast<T*>(grad_scores));
  });
}
