// svpo_loss on CUDA: one launch forward, one backward, whatever the number of pairs and steps.
//
// Forward: the first block sums the terms and metrics over the pairs, each of the others owns kThreads steps, one a
// thread. It looks through all pairs and SFT steps, a chunk at a time, lists those that name a step of its own, and
// every thread adds up its step's share in the order of the pairs, as the CPU does: no atomics, no sort, no second pass.
// An index is read by every block (P = 4096, S = 8192: 33 times, from the L2 cache), a log-prob by those it concerns.
#include "small.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A number per pair, or one for all.
struct PerPair {
  const float* data;
  double value;
  SVPO_DEVICE double operator[](int64_t i) const { return data ? data[i] : value; }
};

struct Inputs {
  Floats lp, ref, v;
  const float* targets;  // (S,), null without values
  Indices pairs, sft;
  PerPair weight, e, margin, rank_margin;
  const float* counts;  // (3,) before the numbers
  double pair_count, value_count, sft_count, beta, rank_scale;
  int preference, rank;
  int64_t S, P, K;
};

struct TermWeights { double preference, value, rank, sft; };

struct Outputs {
  float *loss, *preference, *value, *rank, *sft, *accuracy, *value_accuracy, *chosen_rewards, *rejected_rewards, *slopes;
};

// The denominator of a term: given, else (below 0) its own number of members; 1 without members.
SVPO_DEVICE double denominator(const Inputs& in, int which, double number, double members) {
  if (members == 0.0) return 1.0;
  return in.counts ? in.counts[which] : number < 0.0 ? members : number;
}

// Preference and rank loss of a pair, weighted; 0 for a term that is not there. D is (lp - ref)[w] - (lp - ref)[l].
struct PairLoss { svpo_point preference, rank; };

SVPO_DEVICE PairLoss pair_loss(const Inputs& in, int64_t p, int64_t w, int64_t l) {
  PairLoss loss = {};
  const double weight = in.weight[p];
  double D = 0.0;
  if (in.lp.data) {
    D = (in.lp[w] - in.ref[w]) - (in.lp[l] - in.ref[l]);
    const svpo_point point = svpo_preference_loss(in.preference, D, in.beta, in.margin[p], in.e[p]);
    loss.preference = {weight * point.value, weight * point.slope};
  }
  if (in.v.data) {
    const svpo_point point = svpo_rank_loss(in.rank, in.v[w] - in.v[l], in.rank_margin[p],
                                            in.rank_scale * (in.beta * D), in.lp.data != nullptr);
    loss.rank = {weight * point.value, weight * point.slope};
  }
  return loss;
}

// -- the first block: terms and metrics --------------------------------------------------------------------------------

enum Sum { kPreference, kValue, kRank, kSft, kRight, kValueRight, kLabelled, kSums };

// Rewards in fp32 like PyTorch's, so that `accuracy` is what a comparison of them gives.
SVPO_DEVICE float reward(const Inputs& in, int64_t s) {
  return static_cast<float>(in.beta) * (static_cast<float>(in.lp[s]) - static_cast<float>(in.ref[s]));
}

SVPO_DEVICE void add_members(const Inputs& in, const Outputs& out, double (&sums)[kSums]) {
  for (int64_t p = thread_x(); p < in.P; p += kThreads) {
    const int64_t w = in.pairs[2 * p], l = in.pairs[2 * p + 1];
    const PairLoss loss = pair_loss(in, p, w, l);
    sums[kPreference] += loss.preference.value;
    sums[kRank] += loss.rank.value;
    const float chosen = in.lp.data ? reward(in, w) : NAN, rejected = in.lp.data ? reward(in, l) : NAN;
    out.chosen_rewards[p] = chosen;
    out.rejected_rewards[p] = rejected;
    sums[kRight] += chosen > rejected;
    sums[kValueRight] += in.v[w] > in.v[l];
  }
  for (int64_t s = thread_x(); in.targets && s < in.S; s += kThreads) {
    if (in.targets[s] != in.targets[s]) continue;
    const double error = in.v[s] - in.targets[s];
    sums[kValue] += error * error;
    sums[kLabelled] += 1.0;
  }
  for (int64_t k = thread_x(); k < in.K; k += kThreads) sums[kSft] -= in.lp[in.sft[k]];
}

// 0 leaves a term out, NaN included.
SVPO_DEVICE double weighted(double weight, double term) { return weight != 0.0 ? weight * term : 0.0; }

SVPO_DEVICE void write_terms(const Inputs& in, const TermWeights& weights, const Outputs& out) {
  SVPO_SHARED(double, sums_of_warps, kSums * kWarps);
  double sums[kSums] = {};
  add_members(in, out, sums);
  block_sums(sums, sums_of_warps, kThreads);
  if (thread_x() != 0) return;
  const double P = static_cast<double>(in.P), pair_n = denominator(in, 0, in.pair_count, P);
  const double preference = sums[kPreference] / pair_n, rank = sums[kRank] / pair_n;
  const double value = sums[kValue] / denominator(in, 1, in.value_count, sums[kLabelled]);
  const double sft = sums[kSft] / denominator(in, 2, in.sft_count, static_cast<double>(in.K));
  *out.loss = static_cast<float>(((weighted(weights.preference, preference) + weighted(weights.value, value)) +
                                  weighted(weights.rank, rank)) + weighted(weights.sft, sft));
  *out.preference = static_cast<float>(preference);
  *out.value = static_cast<float>(value);
  *out.rank = static_cast<float>(rank);
  *out.sft = static_cast<float>(sft);
  *out.accuracy = in.P && in.lp.data ? static_cast<float>(sums[kRight] / P) : NAN;
  *out.value_accuracy = in.P && in.v.data ? static_cast<float>(sums[kValueRight] / P) : NAN;
}

// -- the other blocks: slopes of steps ---------------------------------------------------------------------------------

// Whose step it is in the block that owns first ... + kThreads; -1: another block's, or nobody's.
SVPO_DEVICE int owner(int64_t step, int64_t first) {
  return step >= first && step - first < kThreads ? static_cast<int>(step - first) : -1;
}

// How many steps have a target, where a denominator asks for it.
SVPO_DEVICE double labelled_steps(const Inputs& in) {
  SVPO_SHARED(double, labelled_of_warps, kWarps);
  double labelled[1] = {};
  if (!in.targets || in.counts || in.value_count >= 0.0) return 1.0;
  for (int64_t s = thread_x(); s < in.S; s += kThreads) labelled[0] += in.targets[s] == in.targets[s];
  block_sums(labelled, labelled_of_warps, kThreads);
  return labelled[0];
}

SVPO_DEVICE void write_slopes(const Inputs& in, const Outputs& out, int64_t first) {
  // Of each warp how many of its members name a step of this block: of this chunk and of the next.
  SVPO_SHARED(int, named, 2 * kWarps);
  // Those members in order: the owner of the step, plus kThreads for an SFT step, and what its slopes take.
  SVPO_SHARED(int, owners, 2 * kThreads);
  SVPO_SHARED(double, preference_slopes, 2 * kThreads);
  SVPO_SHARED(double, rank_slopes, 2 * kThreads);
  const int t = thread_x(), lane = t % kWarp, warp = t / kWarp;
  const double pair_n = denominator(in, 0, in.pair_count, static_cast<double>(in.P));
  const double sft_n = denominator(in, 2, in.sft_count, static_cast<double>(in.K));
  const double value_n = denominator(in, 1, in.value_count, labelled_steps(in));
  double in_preference = 0.0, in_rank = 0.0, in_sft = 0.0;
  int half = 0;
  for (int64_t chunk = 0; chunk < in.P + in.K; chunk += kThreads, half ^= kWarps) {
    const int64_t i = chunk + t, k = i - in.P;
    int64_t w = -1, l = -1;
    if (k < 0) w = in.pairs[2 * i], l = in.pairs[2 * i + 1];
    else if (k < in.K) w = in.sft[k];
    const int chosen = owner(w, first), rejected = owner(l, first);
    const uint32_t all_chosen = ballot(chosen >= 0), all_rejected = ballot(rejected >= 0);
    if (lane == 0) named[half + warp] = popcount(all_chosen) + popcount(all_rejected);
    sync_threads();
    int at = 0, total = 0;
    for (int other = 0; other < kWarps; ++other) {
      const int count = named[half + other];
      if (other < warp) at += count;
      total += count;
    }
    if (total == 0) continue;
    const uint32_t before = (1u << lane) - 1;
    at += popcount(all_chosen & before) + popcount(all_rejected & before);
    if (k >= 0) {
      if (chosen >= 0) owners[at] = kThreads + chosen;
    } else if (chosen >= 0 || rejected >= 0) {
      const PairLoss loss = pair_loss(in, i, w, l);
      const double preference = loss.preference.slope / pair_n, rank = loss.rank.slope / pair_n;
      if (chosen >= 0) owners[at] = chosen, preference_slopes[at] = preference, rank_slopes[at] = rank, ++at;
      if (rejected >= 0) owners[at] = rejected, preference_slopes[at] = -preference, rank_slopes[at] = -rank;
    }
    sync_threads();
    for (int other = 0; other < total; ++other) {
      const int mine = owners[other];
      if (mine == t) in_preference += preference_slopes[other], in_rank += rank_slopes[other];
      if (mine == t + kThreads) in_sft -= 1.0 / sft_n;
    }
  }
  const int64_t s = first + t, S = in.S;
  if (s >= S) return;
  const bool known = in.targets && in.targets[s] == in.targets[s];
  out.slopes[s] = static_cast<float>(in_preference);
  out.slopes[S + s] = static_cast<float>(in_sft);
  out.slopes[2 * S + s] = known ? static_cast<float>(2.0 * (in.v[s] - in.targets[s]) / value_n) : 0.0f;
  out.slopes[3 * S + s] = static_cast<float>(in_rank);
}

// Grid (1 + blocks of steps,).
SVPO_KERNEL(kThreads, 2) svpo_loss_fwd_kernel(Inputs in, TermWeights weights, Outputs out) {
  if (block_x() == 0) write_terms(in, weights, out);
  else write_slopes(in, out, (block_x() - 1) * kThreads);
}

// -- backward ----------------------------------------------------------------------------------------------------------

// Upstreams of the loss and of a term, one float each or null.
struct Upstream {
  const float *of_loss, *own;
  double weight;
  // What reaches a slope; 0 where nothing does, so that a NaN slope of a term that is left out does not spread.
  SVPO_DEVICE double times(float slope) const {
    const bool weighs = of_loss && weight != 0.0;
    if (!weighs && !own) return 0.0;
    return ((weighs ? weight * *of_loss : 0.0) + (own ? *own : 0.0)) * slope;
  }
};

// Grid (blocks of steps,).
SVPO_KERNEL(kThreads, 2)
svpo_loss_bwd_kernel(const float* slopes, Upstream preference, Upstream value, Upstream rank, Upstream sft, int64_t S,
                     float* grad_logps, float* grad_ref, float* grad_values) {
  const int64_t s = block_x() * kThreads + thread_x();
  if (s >= S) return;
  const double in_preference = preference.times(slopes[s]);
  if (grad_logps) grad_logps[s] = static_cast<float>(in_preference + sft.times(slopes[S + s]));
  if (grad_ref) grad_ref[s] = static_cast<float>(-in_preference);
  if (grad_values) grad_values[s] = static_cast<float>(value.times(slopes[2 * S + s]) + rank.times(slopes[3 * S + s]));
}

}  // namespace

extern "C" int svpo_cuda_svpo_loss_fwd(
    const void* step_logps, int logps_dtype, const void* ref_step_logps, int ref_dtype, const void* values,
    int values_dtype, const float* value_targets, const void* pairs, int pairs_wide, const void* sft_steps,
    int sft_wide, const float* pair_weights, const float* label_smoothings, const float* margins,
    const float* rank_margins, const float* counts, int64_t S, int64_t P, int64_t K, double beta, int preference,
    double preference_weight, double label_smoothing, double margin, double value_weight, int rank, double rank_margin,
    double rank_scale, double rank_weight, double sft_weight, double pair_count, double value_count, double sft_count,
    float* loss, float* preference_term, float* value_term, float* rank_term, float* sft_term, float* accuracy,
    float* value_accuracy, float* chosen_rewards, float* rejected_rewards, float* slopes, int device, void* stream) {
  const Inputs in = {
      {step_logps, logps_dtype, S}, {ref_step_logps, ref_dtype, S}, {values, values_dtype, S},
      values ? value_targets : nullptr, {pairs, pairs_wide}, {sft_steps, sft_wide}, {pair_weights, 1.0},
      {label_smoothings, label_smoothing}, {margins, margin}, {rank_margins, rank_margin}, counts, pair_count,
      value_count, sft_count, beta, rank_scale, preference, rank, S, P, step_logps && sft_steps ? K : 0};
  const TermWeights weights = {preference_weight, value_weight, rank_weight, sft_weight};
  const Outputs out = {loss, preference_term, value_term, rank_term, sft_term, accuracy, value_accuracy, chosen_rewards,
                       rejected_rewards, slopes};
  return launch("svpo_loss_fwd", svpo_loss_fwd_kernel, Grid{1 + ceil_div(S, kThreads), 1}, kThreads,
                Queue{device, stream}, in, weights, out);
}

extern "C" int svpo_cuda_svpo_loss_bwd(
    const float* slopes, const float* grad_loss, const float* grad_preference, const float* grad_value,
    const float* grad_rank, const float* grad_sft, double preference_weight, double value_weight, double rank_weight,
    double sft_weight, int64_t S, float* grad_logps, float* grad_ref, float* grad_values, int device, void* stream) {
  const Upstream preference = {grad_loss, grad_preference, preference_weight}, value = {grad_loss, grad_value, value_weight},
                 rank = {grad_loss, grad_rank, rank_weight}, sft = {grad_loss, grad_sft, sft_weight};
  return launch("svpo_loss_bwd", svpo_loss_bwd_kernel, Grid{ceil_div(S, kThreads), 1}, kThreads, Queue{device, stream},
                slopes, preference, value, rank, sft, S, grad_logps, grad_ref, grad_values);
}
