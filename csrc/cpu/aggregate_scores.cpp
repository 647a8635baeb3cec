// aggregate_scores: one number per sequence of step scores, and where its gradient goes. Sums and products in double.
#include "simd.h"

namespace {

enum { kMin, kProd, kGeomean, kMean, kLast, kMax };

constexpr int64_t kGrain = 4096;  // sequences that are worth a thread

struct Offsets {
  const void* data;
  int wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Result {
  double value;
  int64_t chosen;
};

bool valid(Offsets start, int64_t B, int64_t S) {
  if (start[0] != 0 || start[B] != S) return false;
  for (int64_t b = 0; b < B; ++b)
    if (start[b] > start[b + 1]) return false;
  return true;
}

// The first smallest or largest score; a NaN is taken at once.
template <class T>
Result extreme(const T* x, int64_t first, int64_t last, bool smallest) {
  int64_t best = first;
  for (int64_t i = first; i < last; ++i) {
    const float a = to_float(x[i]), b = to_float(x[best]);
    if (a != a) return {a, i};
    if (smallest ? a < b : a > b) best = i;
  }
  return {to_float(x[best]), best};
}

template <class T>
double geomean(const T* x, int64_t first, int64_t last) {
  double logs = 0.0;
  bool zero = false, negative = false;
  for (int64_t i = first; i < last; ++i) {
    const double a = to_float(x[i]);
    zero = zero || a == 0.0;
    negative = negative || a < 0.0;
    if (!(a <= 0.0)) logs += log(a);
  }
  if (negative || logs != logs) return __builtin_nan("");
  return zero ? 0.0 : exp(logs / static_cast<double>(last - first));
}

template <class T>
Result aggregate(const T* x, int64_t first, int64_t last, int how) {
  if (first == last) return {__builtin_nan(""), -1};
  if (how == kMin || how == kMax) return extreme(x, first, last, how == kMin);
  if (how == kLast) return {to_float(x[last - 1]), last - 1};
  if (how == kGeomean) return {geomean(x, first, last), -1};
  double result = how == kProd ? 1.0 : 0.0;
  for (int64_t i = first; i < last; ++i) result = how == kProd ? result * to_float(x[i]) : result + to_float(x[i]);
  return {how == kProd ? result : result / static_cast<double>(last - first), -1};
}

// Product of the others: what comes before times what comes behind, exact with zeros.
template <class T>
void prod_gradient(const T* x, T* grad, int64_t count, double g, double* behind) {
  double product = 1.0;
  for (int64_t i = count - 1; i >= 0; --i) behind[i] = product, product *= to_float(x[i]);
  product = 1.0;
  for (int64_t i = 0; i < count; ++i) {
    grad[i] = from_float<T>(static_cast<float>(g * (product * behind[i])));
    product *= to_float(x[i]);
  }
}

}  // namespace

// out (B,), chosen (B,): the score that min, max and last took, else -1.
extern "C" int SVPO_ENTRY(aggregate_scores_fwd)(const void* scores, int dtype, const void* offsets, int wide, int64_t S,
                                                int64_t B, int how, float* out, int64_t* chosen, int threads) {
  const Offsets start = {offsets, wide};
  if (!valid(start, B, S)) return SVPO_BAD_VALUE;
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const T* const x = static_cast<const T*>(scores);
    parallel_for(B, kGrain, threads, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const Result result = aggregate(x, start[b], start[b + 1], how);
        out[b] = static_cast<float>(result.value);
        chosen[b] = result.chosen;
      }
    });
    return SVPO_OK;
  });
}

// grad_scores (S,), every element.
extern "C" int SVPO_ENTRY(aggregate_scores_bwd)(const float* grad, const void* scores, int dtype, const void* offsets,
                                                int wide, int64_t S, int64_t B, const float* out,
                                                const int64_t* chosen, int how, void* grad_scores, int threads) {
  const Offsets start = {offsets, wide};
  if (!valid(start, B, S)) return SVPO_BAD_VALUE;
  Scratch<double> behind(how == kProd ? S : 0);
  if (!behind.data) return SVPO_NO_MEMORY;
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const T* const x = static_cast<const T*>(scores);
    T* const g = static_cast<T*>(grad_scores);
    parallel_for(B, kGrain, threads, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t from = start[b], count = start[b + 1] - from;
        if (how == kProd) {
          prod_gradient(x + from, g + from, count, grad[b], behind.data + from);
          continue;
        }
        for (int64_t i = from; i < from + count; ++i) {
          double value = 0.0;
          if (how == kMean) value = grad[b] / static_cast<double>(count);
          else if (how == kGeomean) {
            if (out[b] != 0.0f) value = grad[b] * (static_cast<double>(out[b]) / (count * static_cast<double>(to_float(x[i]))));
          } else if (i == chosen[b]) value = grad[b];
          g[i] = from_float<T>(static_cast<float>(value));
        }
      }
    });
    return SVPO_OK;
  });
}
