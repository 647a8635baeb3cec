// Log-sum-exp of a row of logits with its label columns left out, and the row's gradient: the core of step_logps and of
// the passes between the products of linear_step_logps.
//
//   z = scale * x,  x = z0, or tanh(z0 / softcap) with scale = softcap / temperature
//
// A row is cut into panels of kPanel columns. A panel always gives the same bits, whoever computes it, and panels are
// combined in order: results do not depend on the thread count.
#pragma once

#include "../numerics.h"
#include "simd_math.h"

namespace {

constexpr int64_t kPanel = 16384;  // columns of one task: 8 tasks share a row of 128k columns
constexpr int kBlock = 2048;       // columns between two looks at the maximum: 8 KiB of fp32 stay in L1

constexpr double kLog2E = 1.4426950408889634;

enum Mode { kPlain, kScaled, kCapped };

// Powers are taken to base 2: exp(z - m) = 2^(high x + low x - m2) * fix. A plain row leaves `low` out: log2(e) rounded
// to fp32 acts like a temperature of 1 + 1e-8.
struct Transform {
  Mode mode;
  double temperature, softcap, scale;
  float high, low;              // scale * log2(e) = high + low, both positive: an infinite x never meets 0 * inf
  float twice_high, twice_low;  // 2 / softcap, likewise
};

inline void split(double value, float* high, float* low) {
  *high = static_cast<float>(value);
  if (static_cast<double>(*high) > value) *high = __builtin_nextafterf(*high, 0.0f);
  *low = static_cast<float>(value - static_cast<double>(*high));
  if (!(*low > 1e-37f)) *low = 1e-37f;
}

inline Transform make_transform(double temperature, double softcap) {
  Transform t = {};
  t.mode = softcap > 0.0 ? kCapped : temperature != 1.0 ? kScaled : kPlain;
  t.temperature = temperature, t.softcap = softcap;
  t.scale = (softcap > 0.0 ? softcap : 1.0) / temperature;
  split(t.scale * kLog2E, &t.high, &t.low);
  if (t.mode == kPlain) t.high = static_cast<float>(kLog2E), t.low = 0.0f;
  if (softcap > 0.0) split(2.0 / softcap, &t.twice_high, &t.twice_low);
  return t;
}

template <Mode mode_>
struct ModeTag { static constexpr Mode mode = mode_; };

// Calls body(T{}, ModeTag<mode>{}) for a dtype code and a mode.
template <class Body>
int for_dtype_and_mode(int dtype, Mode mode, const Body& body) {
  return for_dtype(dtype, [&](auto type) {
    if (mode == kPlain) return body(type, ModeTag<kPlain>{});
    if (mode == kScaled) return body(type, ModeTag<kScaled>{});
    return body(type, ModeTag<kCapped>{});
  });
}

// x of raw logits.
template <Mode mode>
SVPO_INLINE Vec transformed(Vec z0, const Transform& t) {
  if (mode != kCapped) return z0;
  return vtanh_of_half(fma(z0, set1(t.twice_low), z0 * set1(t.twice_high)));
}

// Base-2 exponent of x against a maximum: m2 is m * log2(e) in fp32, `fix` what its rounding and that of `high` cost.
struct Reference {
  float minus_m2;
  double fix;
};

inline Reference reference(const Transform& t, float m) {
  const double exact = m * (t.mode == kPlain ? static_cast<double>(t.high) : kLog2E);
  const float m2 = static_cast<float>(exact);
  return {-m2, exp2(m2 - exact)};
}

template <Mode mode>
SVPO_INLINE Vec power(Vec x, Vec minus_m2, const Transform& t) {
  const Vec coarse = fma(set1(t.high), x, minus_m2);
  return vexp2(mode == kPlain ? coarse : fma(set1(t.low), x, coarse));
}

// Maximum m of z and sum s of exp(z - m) of some columns. Nothing seen yet: m = -inf, s = 0.
struct Partial {
  double s;
  float m;
};

// A finite stand-in for m where all z seen are -inf, so that their sum is 0 and not NaN.
SVPO_INLINE float finite_max(float m) { return m == -__builtin_inff() ? 0.0f : m; }

inline void rescale(Partial& sum, float m) {
  if (!(m > sum.m)) return;
  if (sum.s != 0.0) sum.s *= exp(static_cast<double>(finite_max(sum.m)) - static_cast<double>(m));
  sum.m = m;
}

inline void add_partial(Partial& sum, Partial more) {
  rescale(sum, more.m);
  if (more.s != 0.0) sum.s += more.s * exp(static_cast<double>(finite_max(more.m)) - finite_max(sum.m));
}

// Whether the maximum's pass leaves x in a buffer for the sum's pass: where x costs more than a load.
template <Mode mode, class T>
constexpr bool kStash = mode == kCapped || sizeof(T) < sizeof(float);

// Largest x of a block; NaN is passed over (the sum catches it).
template <Mode mode, class T>
SVPO_INLINE float block_max(const T* z0, int n, const Transform& t, float* stash) {
  Vec top[4];
  for (int k = 0; k < 4; ++k) top[k] = set1(-__builtin_inff());
  int i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) {
      const Vec x = transformed<mode>(load(z0 + i + k * kWidth), t);
      if (kStash<mode, T>) store(stash + i + k * kWidth, x);
      top[k] = max(x, top[k]);
    }
  for (; i < n; i += kWidth) {
    const int left = n - i < kWidth ? n - i : kWidth;
    const Vec x = transformed<mode>(load_n(z0 + i, left, -__builtin_inff()), t);
    if (kStash<mode, T>) store_n(stash + i, x, left);
    // A capped filling is -1, which is a logit like any other: keep it out.
    top[0] = max(mode == kCapped ? load_n(stash + i, left, -__builtin_inff()) : x, top[0]);
  }
  return hmax(max(max(top[0], top[1]), max(top[2], top[3])));
}

// Sum of 2^(exponent of x) over a block, four accumulators without a rescale. Fetches the next block meanwhile.
template <Mode mode, class S, class T>
SVPO_INLINE float block_sum(const S* x, int n, float minus_m2, const Transform& t, const T* next) {
  const Vec bias = set1(minus_m2);
  Vec sum[4];
  for (int k = 0; k < 4; ++k) sum[k] = set1(0.0f);
  int i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (unsigned byte = 0; byte < 4 * kWidth * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(next + i) + byte);
    for (int k = 0; k < 4; ++k)
      sum[k] = sum[k] + power<mode>(load(x + i + k * kWidth), bias, t);
  }
  for (; i < n; i += kWidth) {
    const int left = n - i < kWidth ? n - i : kWidth;
    sum[0] = sum[0] + power<mode>(load_n(x + i, left, -__builtin_inff()), bias, t);
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Adds columns z0[0 ... n) to a partial sum: one read from memory.
template <Mode mode, class T>
void scan(const T* z0, int64_t n, const Transform& t, Partial& sum) {
  alignas(64) float stash[kStash<mode, T> ? kBlock : 1];
  float m = __builtin_nanf("");
  Reference to = {};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int len = n - i < kBlock ? static_cast<int>(n - i) : kBlock;
    const double top = block_max<mode>(z0 + i, len, t, stash);
    rescale(sum, static_cast<float>(mode == kPlain ? top : top * t.scale));
    if (m != sum.m) m = sum.m, to = reference(t, finite_max(m));
    sum.s += to.fix * (kStash<mode, T> ? block_sum<mode>(stash, len, to.minus_m2, t, z0 + i + kBlock)
                                       : block_sum<mode>(z0 + i, len, to.minus_m2, t, z0 + i + kBlock));
  }
}

// grad = factor * J' * exp(z - m) of n columns, in place too; J' = 1 - x^2 under a softcap, else 1.
template <Mode mode, class T>
void gradient(const T* z0, T* grad, int64_t n, const Transform& t, float m, double factor) {
  const Reference to = reference(t, finite_max(m));
  const Vec bias = set1(to.minus_m2), f = set1(static_cast<float>(factor * to.fix));
  auto one = [&](Vec raw) {
    const Vec x = transformed<mode>(raw, t);
    const Vec y = power<mode>(x, bias, t) * f;
    return mode == kCapped ? y * fnma(x, x, set1(1.0f)) : y;
  };
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) store(grad + i + k * kWidth, one(load(z0 + i + k * kWidth)));
  for (; i < n; i += kWidth) {
    const int left = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    store_n(grad + i, one(load_n(z0 + i, left, 0.0f)), left);
  }
}

// -- a row's labels ------------------------------------------------------------------------------------------------

// The plan's arrays that say what is predicted by whom (svpo_kernels/plan.py).
struct Plan {
  const int64_t *rows, *row_start, *labels, *first;
  int64_t R, N;
};

// Distinct labels of a row: predictions order[0 ... count), by ascending label.
struct RowLabels {
  const int64_t* order;
  int64_t count;
};

// Writes the distinct labels of plan row r to order[row_start[r] ...]; labels outside [0, vocab_size) are left out.
inline RowLabels sort_labels(const Plan& plan, int64_t r, int64_t vocab_size, int64_t* order) {
  int64_t* const own = order + plan.row_start[r];
  int64_t count = 0;
  for (int64_t n = plan.row_start[r]; n < plan.row_start[r + 1]; ++n)
    if (plan.first[n] == n && plan.labels[n] >= 0 && plan.labels[n] < vocab_size) own[count++] = n;
  // Shell sort: one label is the rule, a few the exception, thousands still fine.
  for (int64_t gap = count / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)
    for (int64_t i = gap; i < count; ++i) {
      const int64_t n = own[i];
      int64_t j = i;
      for (; j >= gap && plan.labels[own[j - gap]] > plan.labels[n]; j -= gap) own[j] = own[j - gap];
      own[j] = n;
    }
  return {own, count};
}

// Calls columns(from, to) for the runs of columns in [from, to) between labels, and label(n) at each label, in order.
template <class Columns, class Label>
SVPO_INLINE void between_labels(const Plan& plan, RowLabels own, int64_t from, int64_t to, const Columns& columns,
                                const Label& label) {
  int64_t low = 0, high = own.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (plan.labels[own.order[middle]] < from) low = middle + 1;
    else high = middle;
  }
  for (; low < own.count && plan.labels[own.order[low]] < to; ++low) {
    const int64_t n = own.order[low];
    if (from < plan.labels[n]) columns(from, plan.labels[n]);
    label(n);
    from = plan.labels[n] + 1;
  }
  if (from < to) columns(from, to);
}

// Raw logit of a distinct label: computed exactly beforehand, or the row's own column.
template <class T>
SVPO_INLINE double label_logit(const Plan& plan, const T* z0, const float* exact, int64_t n) {
  return exact ? exact[n] : to_float(z0[plan.labels[n]]);
}

// Joins the panels' sums of the other columns with the label columns. Writes logp of the row's predictions, NaN for a
// label that is out of range.
template <class T>
void finish_row(const Plan& plan, int64_t r, RowLabels own, const T* z0, const float* exact, Partial sum,
                const Transform& t, float* logp, float* row_max, float* row_logsum) {
  for (int64_t n = plan.row_start[r]; n < plan.row_start[r + 1]; ++n) logp[n] = __builtin_nanf("");
  auto logit = [&](int64_t n) { return svpo_logit(label_logit(plan, z0, exact, n), t.temperature, t.softcap); };
  float top = sum.m;
  int64_t likely = 0;
  double best = -HUGE_VAL;
  for (int64_t i = 0; i < own.count; ++i) {
    const double z = logit(own.order[i]);
    if (z > best) best = z, likely = i;
    if (static_cast<float>(z) > top) top = static_cast<float>(z);
  }
  const double m = finite_max(top);
  // The likeliest label comes last, so that its log-prob sees the sum of all others as it is.
  double others = sum.s == 0.0 ? 0.0 : sum.s * exp(finite_max(sum.m) - m);
  for (int64_t i = 0; i < own.count; ++i)
    if (i != likely) others += exp(logit(own.order[i]) - m);
  double s = others;
  if (own.count) s += exp(logit(own.order[likely]) - m);
  if (top == -__builtin_inff()) s = others = __builtin_nan("");
  *row_max = top;
  *row_logsum = static_cast<float>(log(s));
  for (int64_t i = 0; i < own.count; ++i) {
    const double z = logit(own.order[i]) - m, e = exp(z);
    logp[own.order[i]] = static_cast<float>(svpo_logp(z, e, i == likely ? others : s - e));
  }
  for (int64_t n = plan.row_start[r]; n < plan.row_start[r + 1]; ++n) logp[n] = logp[plan.first[n]];
}

}  // namespace
