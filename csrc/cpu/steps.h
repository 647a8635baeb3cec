// Predictions to steps and back: reductions and upstream gradients.
#pragma once

#include "rows.h"

namespace {

// out (S,) or (N,) from logp (N,), each step's predictions in order.
inline void reduce_to_steps(const float* logp, const int64_t* step_order, const int64_t* step_start, int64_t N,
                            int64_t S, int reduction, float* out, int threads) {
  if (reduction == SVPO_NONE) {
    memcpy(out, logp, N * sizeof(float));
    return;
  }
  for_each(S, 256, N, threads, [&](int64_t s) {
    double sum = 0.0;
    for (int64_t i = step_start[s]; i < step_start[s + 1]; ++i) sum += logp[step_order[i]];
    const int64_t count = step_start[s + 1] - step_start[s];
    out[s] = static_cast<float>(reduction == SVPO_MEAN && count ? sum / count : sum);
  });
}

// Upstream gradient of each prediction, from that of its step (S,) or its own (N,).
struct Upstream {
  const float* grad_out;
  const int64_t *step_ids, *step_start;
  int64_t S;
  int reduction;
  double of(int64_t n) const {
    if (reduction == SVPO_NONE) return grad_out[n];
    const int64_t s = step_ids[n];
    if (s < 0 || s >= S) return 0.0;
    const int64_t count = step_start[s + 1] - step_start[s];
    return reduction == SVPO_MEAN && count ? static_cast<double>(grad_out[s]) / count : grad_out[s];
  }
};

// Merges the upstreams of equal (row, label) into merged[first], 0 elsewhere.
template <class Real>
void merge_upstream(const Plan& plan, int64_t r, const Upstream& upstream, Real* merged) {
  const int64_t begin = plan.row_start[r], end = plan.row_start[r + 1];
  for (int64_t n = begin; n < end; ++n) merged[n] = Real(0);
  if (plan.rows[r] < 0) return;
  for (int64_t n = begin; n < end; ++n) merged[plan.first[n]] += static_cast<Real>(upstream.of(n));
}

// G of a row and the part of it that is not for l*.
template <class Real>
RowGrad row_grad(RowLabels own, const float* logp, const Real* merged) {
  RowGrad grad = {0.0, 0.0, likeliest(own, logp)};
  for (int64_t i = 0; i < own.count; ++i)
    if (own.order[i] != grad.likely) grad.others += merged[own.order[i]];
  grad.total = own.count ? grad.others + merged[grad.likely] : 0.0;
  return grad;
}

}  // namespace
