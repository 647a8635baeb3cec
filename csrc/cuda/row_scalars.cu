// The kernels of rows.cuh that do a row's scalars, in fp64 with the formulas of numerics.h, one row a thread; and steps.
#include "rows.cuh"

using namespace rows;

namespace {

constexpr int kRowThreads = 128;   // rows of a block, one a thread
constexpr int kStepThreads = 128;  // four steps of a block, one a warp

int64_t blocks_for(int64_t items) { return ceil_div(items, kRowThreads); }

SVPO_DEVICE int64_t thread_row() { return block_x() * kRowThreads + thread_x(); }

// -- a row's labels ----------------------------------------------------------------------------------------------------

struct RowLabels { int64_t start, end; };

SVPO_DEVICE RowLabels labels_of(const Plan& plan, int64_t r) { return {plan.row_start[r], plan.row_start[r + 1]}; }

SVPO_DEVICE bool known(const Plan& plan, int64_t n, int64_t vocab_size) {
  return plan.labels[n] >= 0 && plan.labels[n] < vocab_size;
}

// Whether prediction n is the first of its (row, label), a label that exists.
SVPO_DEVICE bool distinct(const Plan& plan, int64_t n, int64_t vocab_size) {
  return plan.first[n] == n && known(plan, n, vocab_size);
}

// l*: the likeliest distinct label, ties: the first prediction. -1 when there is none.
SVPO_DEVICE int64_t likeliest(const Plan& plan, RowLabels own, int64_t vocab_size, const float* logp) {
  int64_t best = -1;
  for (int64_t n = own.start; n < own.end; ++n)
    if (distinct(plan, n, vocab_size) && (best < 0 || logp[n] > logp[best])) best = n;
  return best;
}

// Rows of logits and the exact logits of labels, where there are any.
template <class T>
struct Logits {
  const T* data;
  int64_t count, L, stride_b, stride_l, first_row;
  bool chunk;
  Options options;

  // Row of `data` that belongs to plan row r: < 0 is padding, >= count out of range.
  SVPO_DEVICE int64_t row(const Plan& plan, int64_t r) const {
    return chunk && plan.rows[r] >= 0 ? r - first_row : plan.rows[r];
  }
  SVPO_DEVICE double label(const Plan& plan, int64_t row, int64_t n) const {
    if (options.label_z0) return options.label_z0[n];
    return to_float(data[row / L * stride_b + row % L * stride_l + plan.labels[n]]);
  }
  SVPO_DEVICE double z(const Plan& plan, int64_t row, int64_t n) const {
    return svpo_logit(label(plan, row, n), options.temperature, options.softcap);
  }
};

template <class T>
Logits<T> logits_of(const Source& source, int64_t first_row, bool chunk, const Options& options) {
  return {static_cast<const T*>(source.data), source.count, source.L, source.stride_b, source.stride_l, first_row,
          chunk, options};
}

// -- forward -----------------------------------------------------------------------------------------------------------

// Grid (blocks_for(max(count, tail)),). Joins the panels of rows first_row ... + count with their label columns, and
// sets the log-probs of the plan's padding, `tail` of them at most, to 0.
template <class T>
SVPO_KERNEL(kRowThreads, 1)
finish_kernel(Logits<T> logits, Plan plan, int64_t count, int64_t tail, int64_t panels, const Partial* partials,
              Stats stats) {
  const int64_t i = thread_row(), r = logits.first_row + i, vocab_size = logits.options.vocab_size;
  if (i < tail && i >= plan.row_start[plan.R]) stats.logp[i] = 0.0f;
  if (i >= count) return;
  const RowLabels own = labels_of(plan, r);
  const int64_t row = logits.row(plan, r);
  if (row < 0 || row >= logits.count) {
    const float missing = row < 0 ? 0.0f : NAN;
    stats.row_max[r] = stats.row_logsum[r] = missing;
    if (stats.entropy) stats.entropy[r] = missing;
    for (int64_t n = own.start; n < own.end; ++n) stats.logp[n] = missing;
    return;
  }
  float top = -INFINITY;
  for (int64_t k = 0; k < panels; ++k) top = fmaxf(top, partials[k * count + i].m);
  double best = -INFINITY;
  int64_t likely = -1;
  for (int64_t n = own.start; n < own.end; ++n) {
    if (!distinct(plan, n, vocab_size)) continue;
    const double z = logits.z(plan, row, n);
    if (likely < 0 || z > best) best = z, likely = n;
  }
  top = fmaxf(top, static_cast<float>(best));
  const double m = top == -INFINITY ? 0.0 : top;
  // The likeliest label comes last, so that its log-prob sees the sum of all others as it is.
  double others = 0.0, weighted = 0.0;  // sums of exp(z - m), and of exp(z - m) (z - m)
  for (int64_t k = 0; k < panels; ++k) {
    const Partial part = partials[k * count + i];
    if (part.s == 0.0f) continue;
    const double shift = part.m - m, factor = exp(shift);
    others += part.s * factor;
    weighted += (part.t + shift * part.s) * factor;
  }
  for (int64_t n = own.start; n < own.end; ++n)
    if (n != likely && distinct(plan, n, vocab_size)) others += exp(logits.z(plan, row, n) - m);
  double s = likely < 0 ? others : others + exp(best - m);
  if (top == -INFINITY) s = others = NAN;
  stats.row_max[r] = top;
  stats.row_logsum[r] = static_cast<float>(log(s));
  for (int64_t n = own.start; n < own.end; ++n) {
    float logp = NAN;
    if (known(plan, n, vocab_size)) {
      const double z = logits.z(plan, row, plan.first[n]) - m, e = exp(z);
      logp = static_cast<float>(svpo_logp(z, e, plan.first[n] == likely ? others : s - e));
    }
    stats.logp[n] = logp;
  }
  if (!stats.entropy) return;
  for (int64_t n = own.start; n < own.end; ++n) {
    if (!distinct(plan, n, vocab_size)) continue;
    const double z = logits.z(plan, row, n) - m, e = exp(z);
    if (e > 0.0) weighted += e * z;
  }
  const double entropy = log(s) - weighted / s;
  stats.entropy[r] = static_cast<float>(entropy < 0.0 ? 0.0 : entropy);
}

// Grid (steps / 4,): a warp sums a step. A scored token whose step is out of range sorts behind all steps and counts
// nowhere: no step can be trusted then.
SVPO_KERNEL(kStepThreads, 1)
reduce_steps_kernel(const float* logp, const int64_t* step_ids, const int64_t* step_order, const int64_t* step_start,
                    int64_t N, int64_t S, bool mean, float* out) {
  const int64_t s = block_x() * (kStepThreads / kWarp) + thread_x() / kWarp;
  if (s >= S) return;
  const int64_t begin = step_start[s], end = step_start[s + 1];
  double sum = 0.0;
  for (int64_t i = begin + thread_x() % kWarp; i < end; i += kWarp) sum += logp[step_order[i]];
  sum = warp_sum(sum);
  if (thread_x() % kWarp != 0) return;
  const bool lost = step_ids && N > 0 && step_ids[step_order[N - 1]] >= S;
  out[s] = lost ? NAN : static_cast<float>(mean && end > begin ? sum / static_cast<double>(end - begin) : sum);
}

// -- backward ----------------------------------------------------------------------------------------------------------

// Upstream gradient of prediction n; NaN for a step that does not exist.
SVPO_DEVICE double upstream_of(const Upstream& upstream, int64_t n) {
  if (upstream.reduction == SVPO_NONE) return upstream.grad_out[n];
  const int64_t s = upstream.step_ids[n];
  if (s < 0 || s >= upstream.S) return NAN;
  const int64_t count = upstream.step_start[s + 1] - upstream.step_start[s];
  return upstream.reduction == SVPO_MEAN && count ? upstream.grad_out[s] / static_cast<double>(count)
                                                  : upstream.grad_out[s];
}

// Upstreams of the predictions with the (row, label) of n, the first of them.
SVPO_DEVICE double merged_upstream(const Plan& plan, RowLabels own, const Upstream& upstream, int64_t n) {
  double sum = 0.0;
  for (int64_t other = n; other < own.end; ++other)
    if (plan.first[other] == n) sum += upstream_of(upstream, other);
  return sum;
}

// Grid (blocks_for(max(R, N)),).
SVPO_KERNEL(kRowThreads, 1)
row_grads_kernel(Plan plan, Upstream upstream, float* g, float* G) {
  const int64_t r = thread_row();
  if (r < plan.N && r >= plan.row_start[plan.R]) g[r] = 0.0f;
  if (r >= plan.R) return;
  const RowLabels own = labels_of(plan, r);
  double total = 0.0;
  for (int64_t n = own.start; n < own.end; ++n) {
    const bool counts = plan.rows[r] >= 0 && plan.first[n] == n;
    const double merged = counts ? merged_upstream(plan, own, upstream, n) : 0.0;
    g[n] = static_cast<float>(merged);
    total += merged;
  }
  G[r] = static_cast<float>(total);
}

// Grid (blocks_for(count),). A label's own gradient is J times
//   at l* g (1 - p) - (the other labels' g) p, else g - G p: nothing cancels where a label is likely
// `unit`: g is 1 for l* and 0 for the others.
template <class T>
SVPO_KERNEL(kRowThreads, 1)
row_targets_kernel(Logits<T> logits, Plan plan, int64_t count, Stats stats, bool unit, Upstream upstream,
                   RowFactors to, int64_t* owner) {
  const int64_t i = thread_row(), r = logits.first_row + i, vocab_size = logits.options.vocab_size;
  if (i >= count) return;
  const int64_t row = logits.row(plan, r);
  if (row < 0 || row >= logits.count) return;
  if (owner) owner[row] = r;
  const RowLabels own = labels_of(plan, r);
  const int64_t likely = likeliest(plan, own, vocab_size, stats.logp);
  double total = unit ? 1.0 : 0.0, others = 0.0;
  for (int64_t n = own.start; n < own.end; ++n) {
    const double g = unit ? 0.0 : upstream_of(upstream, n);
    total += known(plan, n, vocab_size) ? g : NAN;
    if (plan.first[n] != likely) others += g;
  }
  to.factors[r] = static_cast<float>(-total * exp(-static_cast<double>(stats.row_logsum[r])) / logits.options.temperature);
  for (int64_t n = own.start; n < own.end; ++n) {
    if (!known(plan, n, vocab_size)) continue;
    const int64_t mine = plan.first[n];
    const double g = unit ? (mine == likely ? 1.0 : 0.0) : merged_upstream(plan, own, upstream, mine);
    const double logp = stats.logp[mine], p = exp(logp);
    const double value = mine == likely ? g * svpo_one_minus_p(logp) - others * p : g - total * p;
    const double slope = svpo_logit_slope(logits.label(plan, row, mine), logits.options.temperature, logits.options.softcap);
    to.targets[n] = static_cast<float>(slope * value);
  }
}

// Grid (blocks_for(count),). A column's gradient is -p J (G + E (log p + entropy)), a label's
//   J (g (1 - p) - (G - g) p - E p (log p + entropy)): nothing cancels where it is likely
SVPO_KERNEL(kRowThreads, 1)
entropy_targets_kernel(Plan plan, int64_t first_row, int64_t count, Options options, Stats stats, RowUpstream upstream,
                       RowFactors to) {
  const int64_t i = thread_row(), r = first_row + i;
  if (i >= count || plan.rows[r] < 0) return;
  const RowLabels own = labels_of(plan, r);
  const double G = upstream.G[r], E = upstream.E[r], logsum = stats.row_logsum[r], entropy = stats.entropy[r];
  double factor = -exp(-logsum) / options.temperature;
  for (int64_t n = own.start; n < own.end; ++n) {
    if (!known(plan, n, options.vocab_size)) {
      factor = NAN;
      continue;
    }
    const double g = upstream.g[plan.first[n]], logp = stats.logp[n], p = exp(logp);
    double value = g * svpo_one_minus_p(logp) - (G - g) * p;
    if (p > 0.0) value -= E * p * (logp + entropy);
    const double slope = svpo_logit_slope(options.label_z0[plan.first[n]], options.temperature, options.softcap);
    to.targets[n] = static_cast<float>(slope * value);
  }
  to.factors[r] = static_cast<float>(factor);
  to.constants[r] = static_cast<float>(G + E * (entropy - logsum));
  to.slopes[r] = static_cast<float>(E);
}

}  // namespace

int rows::statistics(const Source& source, const Plan& plan, int64_t first_row, int64_t count, bool chunk,
                     const Options& options, const Stats& stats, Partial* partials, Queue queue) {
  const int status = panel_statistics(source, plan, first_row, count, chunk, options, stats.entropy != nullptr,
                                      partials, queue);
  if (status != SVPO_OK) return status;
  const int64_t per_row = panels(source.dtype, options.vocab_size, options.softcap), tail = chunk ? 0 : plan.N;
  return for_dtype(source.dtype, [&](auto type) {
    using T = decltype(type);
    return launch("finish", finish_kernel<T>, Grid{blocks_for(count > tail ? count : tail), 1}, kRowThreads, queue,
                  logits_of<T>(source, first_row, chunk, options), plan, count, tail, per_row, partials, stats);
  });
}

int rows::reduce_steps(const float* logp, const int64_t* step_ids, const int64_t* step_order,
                       const int64_t* step_start, int64_t N, int64_t S, int reduction, float* out, Queue queue) {
  if (reduction == SVPO_NONE) return copy_bytes(out, logp, N * static_cast<int64_t>(sizeof(float)), queue);
  return launch("reduce_steps", reduce_steps_kernel, Grid{ceil_div(S, kStepThreads / kWarp), 1}, kStepThreads, queue,
                logp, step_ids, step_order, step_start, N, S, reduction == SVPO_MEAN, out);
}

int rows::row_grads(const Plan& plan, const Upstream& upstream, float* g, float* G, Queue queue) {
  return launch("row_grads", row_grads_kernel, Grid{blocks_for(plan.R > plan.N ? plan.R : plan.N), 1}, kRowThreads,
                queue, plan, upstream, g, G);
}

int rows::row_targets(const Source& source, const Plan& plan, int64_t first_row, int64_t count, bool chunk,
                      const Options& options, const Stats& stats, const Upstream* upstream, const RowFactors& to,
                      int64_t* owner, Queue queue) {
  return for_dtype(source.dtype, [&](auto type) {
    using T = decltype(type);
    return launch("row_targets", row_targets_kernel<T>, Grid{blocks_for(count), 1}, kRowThreads, queue,
                  logits_of<T>(source, first_row, chunk, options), plan, count, stats, upstream == nullptr,
                  upstream ? *upstream : Upstream{}, to, owner);
  });
}

int rows::entropy_targets(const Plan& plan, int64_t first_row, int64_t count, const Options& options,
                          const Stats& stats, const RowUpstream& upstream, const RowFactors& to, Queue queue) {
  return launch("entropy_targets", entropy_targets_kernel, Grid{blocks_for(count), 1}, kRowThreads, queue, plan,
                first_row, count, options, stats, upstream, to);
}
