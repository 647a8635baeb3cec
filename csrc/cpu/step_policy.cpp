// step_policy_loss: terms, metrics and the slopes of the undivided sums; the backward scales the slopes.
//
// Tokens are taken in chunks of a fixed size, each with its own sums, joined in order: results do not depend on the
// thread count. Members that are tokens are computed in fp32 lanes (policy_blocks.h), those that are steps in double
// (policy_steps.h). Sums are in double.
#include "policy_steps.h"

namespace {

// One chunk of tokens that are members. seen (S + 1,) bytes: steps that have a token, null where nobody asks.
template <class Ids>
Totals token_chunk(const Call& call, const Ids& steps, int64_t first, int64_t last, uint8_t* seen) {
  Totals totals = kNothing;
  const float absent = __builtin_nanf("");
  for (int64_t at = first; at < last; at += kBlock) {
    const int n = static_cast<int>(last - at < kBlock ? last - at : kBlock);
    float of_step[kBlock], counts[kBlock], lp_buffer[kBlock], old_buffer[kBlock];
    int64_t highest = -1;
    for (int j = 0; j < n; ++j) {
      const int64_t s = steps[at + j];
      counts[j] = s >= 0 ? 1.0f : 0.0f;
      highest = s > highest ? s : highest;
    }
    if (highest >= call.S) {
      totals.bad_step = true;
      return totals;
    }
    for (int j = 0; j < n; ++j) {
      const int64_t s = steps[at + j];
      of_step[j] = s >= 0 ? call.advantages[s] : absent;
    }
    for (int j = 0; seen && j < n; ++j) {
      const int64_t s = steps[at + j];
      __atomic_store_n(seen + (s >= 0 ? s : call.S), 1, __ATOMIC_RELAXED);
    }
    const float* const lp = call.lp.block(at, n, lp_buffer);
    policy_block(call, at, n, lp, call.old.block(at, n, old_buffer), of_step, totals);
    if (call.kl_slopes) kl_block(call, at, n, lp, counts, totals);
    if (call.entropy_slopes) entropy_block(call, at, n, counts, totals);
    totals.tokens += sum_block(counts, n);
  }
  totals.member_tokens = totals.members;
  return totals;
}

template <class Ids>
int token_totals(const Call& call, const Ids& ids, int threads, Totals* totals) {
  Scratch<uint8_t> seen(call.S + 1);
  if (!seen.data) return SVPO_NO_MEMORY;
  memset(seen.data, 0, call.S + 1);
  uint8_t* const marks = call.steps ? seen.data : nullptr;
  const int status = sum_chunks(call.N, kChunk, threads, totals, [&](int64_t first, int64_t last) {
    return token_chunk(call, ids, first, last, marks);
  });
  if (status != SVPO_OK) return status;
  if (totals->bad_step) return SVPO_BAD_INDEX;
  for (int64_t s = 0; marks && s < call.S; ++s)
    if (!seen[s] && call.advantages[s] == call.advantages[s]) return SVPO_BAD_VALUE;
  return SVPO_OK;
}

// The denominator of a term: given, or its own number; 1 without members. False: of no use to the members there are.
bool choose_total(const float* totals, int which, double number, double own, double* total) {
  const double given = totals ? totals[which] : number < 0.0 ? own : number;
  *total = own == 0.0 ? 1.0 : given;
  return *total > 0.0;
}

}  // namespace

extern "C" int SVPO_ENTRY(step_policy_loss_fwd)(
    const void* logps, int logps_dtype, const void* old_logps, int old_dtype, const float* advantages,
    const void* step_ids, int steps_wide, const float* is_weights, const void* ref_logps, int ref_dtype,
    const void* entropy, int entropy_dtype, const float* weights, const float* totals, int64_t N, int64_t S, int ratio,
    int kind, double clip_low, double clip_high, double dual_clip, double tau_positive, double tau_negative, int kl,
    double kl_weight, double entropy_weight, double total_members, double total_tokens, float* loss,
    float* policy_term, float* kl_term, float* entropy_term, float* clip_fraction, float* ratio_mean, float* ratio_max,
    float* approx_kl, float* slopes, float* denominators, int threads) {
  const svpo_policy_options options = {kind, kl, 1.0 - clip_low, 1.0 + clip_high, dual_clip, tau_positive, tau_negative};
  const Call call = {
      {logps, logps_dtype}, {old_logps, old_dtype}, {ref_logps, ref_dtype}, {entropy, entropy_dtype}, advantages,
      is_weights, weights, step_ids, steps_wide, N, S, options, ratio != 0, ratio == 2, slopes,
      ref_logps ? slopes + N : nullptr, entropy ? slopes + (ref_logps ? 2 : 1) * N : nullptr};
  Totals found;
  const int status = for_steps(call, [&](const auto& ids) {
    found = kNothing;
    return call.members_are_steps ? step_totals(call, ids, threads, &found) : token_totals(call, ids, threads, &found);
  });
  if (status != SVPO_OK) return status;
  double members, tokens;
  const bool sound = choose_total(totals, 0, total_members, found.members, &members);
  if (!sound || (!choose_total(totals, 1, total_tokens, found.tokens, &tokens) && (ref_logps || entropy)))
    return SVPO_BAD_VALUE;
  const double policy = found.policy / members, divergence = ref_logps ? found.kl / tokens : 0.0,
               entropies = entropy ? found.entropy / tokens : 0.0;
  double total = policy;  // a weight of 0 leaves a term out, NaN included
  if (kl_weight != 0.0) total += kl_weight * divergence;
  if (entropy_weight != 0.0) total -= entropy_weight * entropies;
  *loss = static_cast<float>(total);
  *policy_term = static_cast<float>(policy);
  *kl_term = static_cast<float>(divergence);
  *entropy_term = static_cast<float>(entropies);
  *clip_fraction = static_cast<float>(found.clipped / found.members);  // NaN without members, as the others
  *ratio_mean = static_cast<float>(found.ratio / found.members);
  *ratio_max = *ratio_mean == *ratio_mean ? found.largest : __builtin_nanf("");
  *approx_kl = static_cast<float>(found.drift / found.member_tokens);
  denominators[0] = static_cast<float>(members);
  denominators[1] = static_cast<float>(tokens);
  return SVPO_OK;
}

// An upstream is a pointer to one float, null for none; a gradient that is not needed is null.
extern "C" int SVPO_ENTRY(step_policy_loss_bwd)(const float* slopes, const float* denominators, const float* grad_loss,
                                                const float* grad_policy, const float* grad_kl,
                                                const float* grad_entropy, double kl_weight, double entropy_weight,
                                                int has_kl, int has_entropy, int64_t N, float* grad_logps,
                                                float* grad_entropies, int threads) {
  // What reaches a row, and whether anything does: a NaN slope of a term that is left out must not spread.
  struct Upstream {
    double g;
    bool any;
    Upstream(const float* of_loss, double weight, const float* own, double denominator)
        : g(((of_loss && weight != 0.0 ? weight * *of_loss : 0.0) + (own ? *own : 0.0)) / denominator),
          any((of_loss && weight != 0.0) || own) {}
  };
  const Upstream policy(grad_loss, 1.0, grad_policy, denominators[0]), kl(grad_loss, kl_weight, grad_kl, denominators[1]),
      entropy(grad_loss, -entropy_weight, grad_entropy, denominators[1]);
  parallel_for(N, kChunk, threads, [&](int64_t first, int64_t last) {
    const float *const of_policy = slopes, *const of_kl = slopes + N;
    if (grad_logps && has_kl && kl.any) {
      for (int64_t n = first; n < last; ++n)
        grad_logps[n] = static_cast<float>((policy.any ? policy.g * of_policy[n] : 0.0) + kl.g * of_kl[n]);
    } else if (grad_logps) {
      for (int64_t n = first; n < last; ++n)
        grad_logps[n] = policy.any ? static_cast<float>(policy.g * of_policy[n]) : 0.0f;
    }
    if (grad_entropies && has_entropy) {
      const float* const row = slopes + (has_kl ? 2 : 1) * N;
      for (int64_t n = first; n < last; ++n) grad_entropies[n] = entropy.any ? static_cast<float>(entropy.g * row[n]) : 0.0f;
    }
  });
  return SVPO_OK;
}
