// Blocks of tokens of step_policy_loss: members that are tokens, KL, entropy, and the sums of all of them.
#pragma once

#include "../numerics.h"
#include "simd_math.h"

namespace {

constexpr int kBlock = 512;       // tokens whose numbers stay in L1
constexpr int64_t kChunk = 4096;  // tokens or steps of one task

// A vector of any storage type.
struct Floats {
  const void* data;
  int dtype;
  // Elements [first, first + n) as fp32, in place or in `buffer`.
  const float* block(int64_t first, int n, float* buffer) const {
    if (dtype == SVPO_FP32) return static_cast<const float*>(data) + first;
    for_dtype(dtype, [&](auto type) {
      const auto* const from = static_cast<const decltype(type)*>(data) + first;
      for (int i = 0; i < n; i += kWidth) {
        const int left = n - i < kWidth ? n - i : kWidth;
        store_n(buffer + i, load_n(from + i, left, 0.0f), left);
      }
      return SVPO_OK;
    });
    return buffer;
  }
};

// Step ids; without any every token is a step.
template <class T>
struct Steps {
  const T* data;
  SVPO_INLINE int64_t operator[](int64_t i) const { return data[i]; }
};
struct EveryToken {
  SVPO_INLINE int64_t operator[](int64_t i) const { return i; }
};

struct Call {
  Floats lp, old, ref, entropy;
  const float *advantages, *is_weights, *weights;
  const void* steps;  // int64 (wide) or int32; null: every token is a step
  int steps_wide;
  int64_t N, S;
  svpo_policy_options options;
  bool members_are_steps, mean;
  float *policy_slopes, *kl_slopes, *entropy_slopes;
};

// Calls body(steps) with the step ids in their own type; the status is what body returns.
template <class Body>
int for_steps(const Call& call, const Body& body) {
  if (!call.steps) return body(EveryToken{});
  if (call.steps_wide) return body(Steps<int64_t>{static_cast<const int64_t*>(call.steps)});
  return body(Steps<int32_t>{static_cast<const int32_t*>(call.steps)});
}

// The sum of a block, in fp32 lanes: each adds kBlock / kWidth / 4 numbers.
SVPO_INLINE double sum_block(const float* x, int n) {
  Vec sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) sum[k] = sum[k] + load(x + i + k * kWidth);
  for (; i < n; i += kWidth) sum[0] = sum[0] + load_n(x + i, n - i < kWidth ? n - i : kWidth, 0.0f);
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The largest of a block of numbers from 0 on, NaN left out.
SVPO_INLINE float max_block(const float* x, int n) {
  Vec largest = set1(0.0f);
  for (int i = 0; i < n; i += kWidth) largest = max(load_n(x + i, n - i < kWidth ? n - i : kWidth, 0.0f), largest);
  return hmax(largest);
}

// Of a chunk, or of all.
struct Totals {
  double policy, members, clipped, ratio, drift, member_tokens, kl, entropy, tokens;
  float largest;  // ratio of a member, 0 without one; a NaN shows in the sum of the ratios
  bool bad_step;
  void add(const Totals& other) {
    policy += other.policy, members += other.members, clipped += other.clipped, ratio += other.ratio;
    drift += other.drift, member_tokens += other.member_tokens, kl += other.kl, entropy += other.entropy;
    tokens += other.tokens, bad_step = bad_step || other.bad_step;
    if (other.largest > largest) largest = other.largest;
  }
};

constexpr Totals kNothing = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0f, false};

SVPO_INLINE float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// y = exp(x) of n numbers.
SVPO_INLINE void exp_all(const float* x, float* y, int n) {
  for (int i = 0; i < n; i += kWidth) {
    const int left = n - i < kWidth ? n - i : kWidth;
    store_n(y + i, vexp(load_n(x + i, left, 0.0f)), left);
  }
}

// -- members that are tokens -------------------------------------------------------------------------------------------

// What a block of members gives, undivided and unweighted.
struct Points { float loss[kBlock], slope[kBlock], rho[kBlock], clipped[kBlock]; };

// x: log-ratios before the clamp.
SVPO_INLINE void policy_points(const svpo_policy_options& o, const float* x, const float* u, const float* A, int n,
                               Points& to) {
  const float limit = static_cast<float>(kRatioLimit), low = static_cast<float>(o.low),
              high = static_cast<float>(o.high), dual = static_cast<float>(o.dual);
  float* const rho = to.rho;
  for (int j = 0; j < n; ++j) rho[j] = clamped(x[j], -limit, limit);
  exp_all(rho, rho, n);
  if (o.kind == SVPO_CISPO) {
    for (int j = 0; j < n; ++j) {
      const float factor = -clamped(rho[j], low, high) * A[j];
      to.loss[j] = factor * u[j];
      to.slope[j] = factor;
      to.clipped[j] = (rho[j] < low) | (rho[j] > high) | (fabsf(x[j]) > limit) ? 1.0f : 0.0f;
    }
  } else if (o.kind == SVPO_SAPO) {
    const float positive = static_cast<float>(o.tau_positive), negative = static_cast<float>(o.tau_negative);
    float y[kBlock], small[kBlock];
    for (int j = 0; j < n; ++j) {
      y[j] = (A[j] > 0.0f ? positive : negative) * (rho[j] - 1.0f);
      small[j] = -fabsf(y[j]);
    }
    exp_all(small, small, n);
    for (int j = 0; j < n; ++j) {
      const float large = 1.0f / (1.0f + small[j]), rest = small[j] * large;
      const float gate = y[j] < 0.0f ? rest : large, other = y[j] < 0.0f ? large : rest;
      const bool outside = fabsf(x[j]) > limit;
      to.loss[j] = -A[j] * gate * 4.0f / (A[j] > 0.0f ? positive : negative);
      to.slope[j] = outside ? 0.0f : -4.0f * A[j] * gate * other * rho[j];
      to.clipped[j] = outside ? 1.0f : 0.0f;
    }
  } else {
    for (int j = 0; j < n; ++j) {
      const float r = rho[j], a = A[j];
      const bool bounded = (a < 0.0f) & (r > dual);
      const bool clipped = ((a > 0.0f) & (r > high)) | ((a < 0.0f) & (r < low)) | bounded;
      const bool off = clipped | (fabsf(x[j]) > limit);
      const float kept = -r * a, bound = bounded ? -dual * a : -clamped(r, low, high) * a;
      to.loss[j] = clipped ? bound : kept;
      to.slope[j] = off ? 0.0f : kept;
      to.clipped[j] = off ? 1.0f : 0.0f;
    }
  }
}

void policy_block(const Call& call, int64_t first, int n, const float* lp, const float* old, const float* A,
                  Totals& totals) {
  Points points;
  float x[kBlock], member[kBlock];
  for (int j = 0; j < n; ++j) x[j] = lp[j] - old[j];
  policy_points(call.options, x, lp, A, n, points);
  float* const slope = call.policy_slopes + first;
  const float* const w = call.weights ? call.weights + first : nullptr;
  const float* const is = call.is_weights ? call.is_weights + first : nullptr;
  if (w)
    for (int j = 0; j < n; ++j) points.loss[j] *= w[j], points.slope[j] *= w[j];
  if (is)
    for (int j = 0; j < n; ++j) points.loss[j] *= is[j], points.slope[j] *= is[j];
  for (int j = 0; j < n; ++j) {
    const bool in = A[j] == A[j];
    member[j] = in ? 1.0f : 0.0f;
    points.loss[j] = in ? points.loss[j] : 0.0f;
    slope[j] = in ? points.slope[j] : 0.0f;
    points.clipped[j] = in ? points.clipped[j] : 0.0f;
    points.rho[j] = in ? points.rho[j] : 0.0f;
    x[j] = in ? -x[j] : 0.0f;
  }
  totals.policy += sum_block(points.loss, n);
  totals.members += sum_block(member, n);
  totals.clipped += sum_block(points.clipped, n);
  totals.ratio += sum_block(points.rho, n);
  totals.drift += sum_block(x, n);
  const float largest = max_block(points.rho, n);
  if (largest > totals.largest) totals.largest = largest;
}

// -- tokens: KL, entropy, and the slopes of steps ----------------------------------------------------------------------

// counts: 1 for a token that has a step, else 0.
void kl_block(const Call& call, int64_t first, int n, const float* lp, const float* counts, Totals& totals) {
  const float limit = static_cast<float>(kRatioLimit);
  float buffer[kBlock], d[kBlock], value[kBlock], power[kBlock];
  const float* const ref = call.ref.block(first, n, buffer);
  const float* const w = call.weights ? call.weights + first : nullptr;
  float* const slope = call.kl_slopes + first;
  for (int j = 0; j < n; ++j) d[j] = clamped(ref[j] - lp[j], -limit, limit);
  if (call.options.kl == SVPO_K3) {
    // Near 0 from the tail of the series, never from a rounded difference.
    for (int i = 0; i < n; i += kWidth) {
      const int left = n - i < kWidth ? n - i : kWidth;
      const Vec v = load_n(d + i, left, 0.0f);
      store_n(value + i, exp_tail(v) * v * v, left);
      store_n(power + i, vexp(v), left);
    }
    for (int j = 0; j < n; ++j) {
      const bool near = fabsf(d[j]) < 0.34f;
      slope[j] = near ? -(d[j] + value[j]) : 1.0f - power[j];
      value[j] = near ? value[j] : power[j] - d[j] - 1.0f;
    }
  } else if (call.options.kl == SVPO_K2) {
    for (int j = 0; j < n; ++j) value[j] = 0.5f * d[j] * d[j], slope[j] = -d[j];
  } else {
    for (int j = 0; j < n; ++j) value[j] = -d[j], slope[j] = 1.0f + 0.0f * d[j];
  }
  for (int j = 0; j < n; ++j) {
    const float weight = w ? w[j] : 1.0f;
    const bool outside = fabsf(ref[j] - lp[j]) > limit, in = counts[j] != 0.0f;
    value[j] = in ? weight * value[j] : 0.0f;
    slope[j] = in & !outside ? weight * slope[j] : 0.0f;
  }
  totals.kl += sum_block(value, n);
}

void entropy_block(const Call& call, int64_t first, int n, const float* counts, Totals& totals) {
  float buffer[kBlock], value[kBlock];
  const float* const entropy = call.entropy.block(first, n, buffer);
  float* const slope = call.entropy_slopes + first;
  for (int j = 0; j < n; ++j) {
    slope[j] = counts[j] != 0.0f ? (call.weights ? call.weights[first + j] : 1.0f) : 0.0f;
    value[j] = counts[j] != 0.0f ? slope[j] * entropy[j] : 0.0f;
  }
  totals.entropy += sum_block(value, n);
}

}  // namespace
