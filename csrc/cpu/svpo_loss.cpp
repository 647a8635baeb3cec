// svpo_loss: terms, metrics and the slopes of the unweighted terms in one pass over the pairs; the backward scales the
// slopes. Serial on purpose: a call has tens to thousands of pairs, and steps shared by several pairs must add up in a
// fixed order. Sums are in double.
#include "../numerics.h"
#include "simd.h"

namespace {

// A vector of any storage type as doubles; a null pointer gives 0.
struct Floats {
  const void* data;
  int dtype;
  double operator[](int64_t i) const {
    switch (data ? dtype : -1) {
      case SVPO_FP32: return static_cast<const float*>(data)[i];
      case SVPO_BF16: return to_float(static_cast<const bf16*>(data)[i]);
      case SVPO_FP16: return to_float(static_cast<const fp16*>(data)[i]);
    }
    return 0.0;
  }
};

struct Steps {
  const void* data;
  int wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// A number per pair, or one for all.
struct PerPair {
  const float* data;
  double value;
  double operator[](int64_t i) const { return data ? data[i] : value; }
};

bool out_of_range(Steps steps, int64_t count, int64_t S) {
  for (int64_t i = 0; i < count; ++i)
    if (steps[i] < 0 || steps[i] >= S) return true;
  return false;
}

// The denominator of a term: given, or its own number of members. False: given, and of no use to the members there are.
bool choose_count(const float* counts, int which, double number, int64_t members, double* count) {
  const double given = counts ? counts[which] : number;
  const bool own = !counts && number < 0.0;
  *count = members == 0 ? 1.0 : own ? static_cast<double>(members) : given;
  return *count > 0.0;
}

}  // namespace

extern "C" int SVPO_ENTRY(svpo_loss_fwd)(
    const void* step_logps, int logps_dtype, const void* ref_step_logps, int ref_dtype, const void* values,
    int values_dtype, const float* value_targets, const void* pairs, int pairs_wide, const void* sft_steps,
    int sft_wide, const float* pair_weights, const float* label_smoothings, const float* margins,
    const float* rank_margins, const float* counts, int64_t S, int64_t P, int64_t K, double beta, int preference,
    double preference_weight, double label_smoothing, double margin, double value_weight, int rank, double rank_margin,
    double rank_scale, double rank_weight, double sft_weight, double pair_count, double value_count, double sft_count,
    float* loss, float* preference_term, float* value_term, float* rank_term, float* sft_term, float* accuracy,
    float* value_accuracy, float* chosen_rewards, float* rejected_rewards, float* slopes) {
  const Floats lp = {step_logps, logps_dtype}, ref = {ref_step_logps, ref_dtype}, v = {values, values_dtype};
  const Steps pair = {pairs, pairs_wide}, sft = {sft_steps, sft_wide};
  const PerPair weight = {pair_weights, 1.0}, e = {label_smoothings, label_smoothing}, m = {margins, margin},
                rank_m = {rank_margins, rank_margin};
  if (!step_logps || !sft_steps) K = 0;
  if (out_of_range(pair, 2 * P, S) || out_of_range(sft, K, S)) return SVPO_BAD_INDEX;
  int64_t labelled = 0;
  if (values && value_targets)
    for (int64_t s = 0; s < S; ++s) labelled += value_targets[s] == value_targets[s];
  double pair_n, value_n, sft_n;
  if (!choose_count(counts, 0, pair_count, P, &pair_n) || !choose_count(counts, 1, value_count, labelled, &value_n) ||
      !choose_count(counts, 2, sft_count, K, &sft_n))
    return SVPO_BAD_VALUE;
  for (int64_t p = 0; label_smoothings && p < P; ++p)
    if (!(e[p] >= 0.0 && e[p] <= 1.0)) return SVPO_BAD_VALUE;
  // Slopes: preference and sft in lp, value and rank in v.
  Scratch<double> slope(4 * S);
  if (!slope.data) return SVPO_NO_MEMORY;
  memset(slope.data, 0, 4 * S * sizeof(double));
  double *const in_preference = slope.data, *const in_sft = in_preference + S, *const in_value = in_sft + S,
         *const in_rank = in_value + S;
  double preference_sum = 0.0, rank_sum = 0.0, value_sum = 0.0, sft_sum = 0.0;
  int64_t right = 0, value_right = 0;
  const float beta32 = static_cast<float>(beta), nan = __builtin_nanf("");
  for (int64_t p = 0; p < P; ++p) {
    const int64_t w = pair[2 * p], l = pair[2 * p + 1];
    double D = 0.0;
    chosen_rewards[p] = rejected_rewards[p] = nan;
    if (step_logps) {
      const double lp_w = lp[w], lp_l = lp[l], ref_w = ref[w], ref_l = ref[l];
      D = (lp_w - ref_w) - (lp_l - ref_l);
      // Rewards in fp32 like PyTorch's, so that `accuracy` is what a comparison of them gives.
      chosen_rewards[p] = beta32 * (static_cast<float>(lp_w) - static_cast<float>(ref_w));
      rejected_rewards[p] = beta32 * (static_cast<float>(lp_l) - static_cast<float>(ref_l));
      right += chosen_rewards[p] > rejected_rewards[p];
      const svpo_point point = svpo_preference_loss(preference, D, beta, m[p], e[p]);
      preference_sum += weight[p] * point.value;
      in_preference[w] += weight[p] * point.slope / pair_n;
      in_preference[l] -= weight[p] * point.slope / pair_n;
    }
    if (values) {
      const double v_w = v[w], v_l = v[l];
      value_right += v_w > v_l;
      const svpo_point point = svpo_rank_loss(rank, v_w - v_l, rank_m[p], rank_scale * (beta * D), step_logps != nullptr);
      rank_sum += weight[p] * point.value;
      in_rank[w] += weight[p] * point.slope / pair_n;
      in_rank[l] -= weight[p] * point.slope / pair_n;
    }
  }
  if (labelled)
    for (int64_t s = 0; s < S; ++s)
      if (value_targets[s] == value_targets[s]) {
        const double error = v[s] - value_targets[s];
        value_sum += error * error;
        in_value[s] = 2.0 * error / value_n;
      }
  for (int64_t k = 0; k < K; ++k) {
    sft_sum -= lp[sft[k]];
    in_sft[sft[k]] -= 1.0 / sft_n;
  }
  for (int64_t i = 0; i < 4 * S; ++i) slopes[i] = static_cast<float>(slope[i]);
  const double terms[4] = {preference_sum / pair_n, value_sum / value_n, rank_sum / pair_n, sft_sum / sft_n};
  const double term_weights[4] = {preference_weight, value_weight, rank_weight, sft_weight};
  double total = 0.0;
  for (int i = 0; i < 4; ++i)
    if (term_weights[i] != 0.0) total += term_weights[i] * terms[i];  // 0 leaves a term out, NaN included
  *loss = static_cast<float>(total);
  *preference_term = static_cast<float>(terms[0]);
  *value_term = static_cast<float>(terms[1]);
  *rank_term = static_cast<float>(terms[2]);
  *sft_term = static_cast<float>(terms[3]);
  *accuracy = P && step_logps ? static_cast<float>(static_cast<double>(right) / P) : nan;
  *value_accuracy = P && values ? static_cast<float>(static_cast<double>(value_right) / P) : nan;
  return SVPO_OK;
}

// An upstream is a pointer to one float, null for none; a gradient that is not needed is null.
extern "C" int SVPO_ENTRY(svpo_loss_bwd)(const float* slopes, const float* grad_loss, const float* grad_preference,
                                         const float* grad_value, const float* grad_rank, const float* grad_sft,
                                         double preference_weight, double value_weight, double rank_weight,
                                         double sft_weight, int64_t S, float* grad_logps, float* grad_ref,
                                         float* grad_values) {
  // What reaches a term, and whether anything does: a NaN slope of a term that is left out must not spread.
  struct Upstream {
    double g;
    bool any;
    Upstream(const float* of_loss, double weight, const float* own)
        : g((of_loss && weight != 0.0 ? weight * *of_loss : 0.0) + (own ? *own : 0.0)),
          any((of_loss && weight != 0.0) || own) {}
    double operator*(float slope) const { return any ? g * slope : 0.0; }
  };
  const Upstream preference(grad_loss, preference_weight, grad_preference), value(grad_loss, value_weight, grad_value),
      rank(grad_loss, rank_weight, grad_rank), sft(grad_loss, sft_weight, grad_sft);
  for (int64_t s = 0; s < S; ++s) {
    const double in_preference = preference * slopes[s];
    if (grad_logps) grad_logps[s] = static_cast<float>(in_preference + sft * slopes[S + s]);
    if (grad_ref) grad_ref[s] = static_cast<float>(-in_preference);
    if (grad_values) grad_values[s] = static_cast<float>(value * slopes[2 * S + s] + rank * slopes[3 * S + s]);
  }
  return SVPO_OK;
}
