// Rows of logits and the labels that a plan scores in them: what step_logps and the passes between the products of
// linear_step_logps have in common.
//
// A row is cut into panels of kPanel columns. A panel always gives the same bits, whoever computes it, and panels are
// combined in order: results do not depend on the thread count.
#pragma once

#include "softmax.h"

namespace {

constexpr int64_t kPanel = 16384;  // columns of one task: 8 tasks share a row of 128k columns
constexpr int64_t kSmall = 65536;  // elements below which waking threads costs more than it saves

// Calls body(i) for i in [0, count), threaded when `work` elements are worth it.
template <class Body>
void for_each(int64_t count, int64_t grain, int64_t work, int threads, const Body& body) {
  parallel_for(count, grain, work < kSmall ? 1 : threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

// The tasks of a loop over (row, panel of columns); rows of few columns are handed out several at a time.
struct Panels {
  int64_t columns, per_row, grain;
  explicit Panels(int64_t V)
      : columns(V), per_row(V > kPanel ? (V + kPanel - 1) / kPanel : 1), grain(V < kPanel ? kPanel / (V + 1) + 1 : 1) {}
  int64_t row(int64_t task) const { return task / per_row; }
  int64_t from(int64_t task) const { return task % per_row * kPanel; }
  int64_t to(int64_t task) const { return from(task) + kPanel < columns ? from(task) + kPanel : columns; }
};

// -- a row's labels ---------------------------------------------------------------------------------------------------

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

// Finds the distinct labels of plan row r, into `own`; labels outside [0, vocab_size) are left out.
RowLabels sort_labels(const Plan& plan, int64_t r, int64_t vocab_size, int64_t* own) {
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

// l*: the likeliest distinct label, ties: the first prediction. -1 when there is none.
int64_t likeliest(RowLabels own, const float* logp) {
  int64_t best = own.count ? own.order[0] : -1;
  for (int64_t i = 1; i < own.count; ++i) {
    const int64_t n = own.order[i];
    if (logp[n] > logp[best] || (logp[n] == logp[best] && n < best)) best = n;
  }
  return best;
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

// -- forward ----------------------------------------------------------------------------------------------------------

// What the forward finds: logp (N,), row_max and row_logsum (R,), and entropy (R,) if wanted, else null.
struct RowStats { float *logp, *row_max, *row_logsum, *entropy; };

// Raw logit of a distinct label: computed exactly beforehand, or the row's own column.
template <class T>
SVPO_INLINE double label_logit(const Plan& plan, const T* z0, const float* exact, int64_t n) {
  return exact ? exact[n] : to_float(z0[plan.labels[n]]);
}

// Joins the panels' sums of the other columns with the label columns. A label that is out of range gets NaN.
template <class T>
void finish_row(const Plan& plan, int64_t r, RowLabels own, const T* z0, const float* exact, Partial sum,
                const Transform& t, const RowStats& to) {
  const int64_t begin = plan.row_start[r], end = plan.row_start[r + 1];
  for (int64_t n = begin; n < end; ++n) to.logp[n] = __builtin_nanf("");
  auto logit = [&](int64_t i) {
    return svpo_logit(label_logit(plan, z0, exact, own.order[i]), t.temperature, t.softcap);
  };
  float top = sum.m;
  double best = -HUGE_VAL;
  int64_t likely = 0;
  for (int64_t i = 0; i < own.count; ++i) {
    const double z = logit(i);
    if (z > best) best = z, likely = i;
    if (static_cast<float>(z) > top) top = static_cast<float>(z);
  }
  const double m = finite_max(top);
  // z - m; where m is huge z counts as rounded as m is, so that equals stay equal.
  auto shifted = [&](int64_t i) { return (huge(top) ? static_cast<float>(logit(i)) : logit(i)) - m; };
  // The likeliest label comes last, so that its log-prob sees the sum of all others as it is.
  rescale(sum, top);
  double others = sum.s;
  for (int64_t i = 0; i < own.count; ++i)
    if (i != likely) others += exp(shifted(i));
  double s = own.count ? others + exp(shifted(likely)) : others;
  if (top == -__builtin_inff()) s = others = __builtin_nan("");
  to.row_max[r] = top;
  to.row_logsum[r] = static_cast<float>(log(s));
  for (int64_t i = 0; i < own.count; ++i) {
    const double z = shifted(i), e = exp(z);
    to.logp[own.order[i]] = static_cast<float>(svpo_logp(z, e, i == likely ? others : s - e));
  }
  for (int64_t n = begin; n < end; ++n) to.logp[n] = to.logp[plan.first[n]];
  if (!to.entropy) return;
  double weighted = sum.t;
  for (int64_t i = 0; i < own.count; ++i) {
    const double z = shifted(i), e = exp(z);
    if (e > 0.0) weighted += e * z;
  }
  const double entropy = log(s) - weighted / s;
  to.entropy[r] = static_cast<float>(entropy < 0.0 ? 0.0 : entropy);
}

// Statistics of a row that is not there: 0 for padding, NaN for one out of range.
void missing_row(const Plan& plan, int64_t r, const RowStats& to) {
  const float missing = plan.rows[r] < 0 ? 0.0f : __builtin_nanf("");
  to.row_max[r] = to.row_logsum[r] = missing;
  if (to.entropy) to.entropy[r] = missing;
  for (int64_t n = plan.row_start[r]; n < plan.row_start[r + 1]; ++n) to.logp[n] = missing;
}

// Of some columns: sums of exp(z - m), of its square and of z with exact labels, the largest z as rounded and the first
// column that has it.
struct MoreStats {
  double sums, squares, total;
  float top;
  int64_t at;
};

// Those of columns [from, to) of a row whose maximum is m.
template <Mode mode, class T>
MoreStats more_stats(const Plan& plan, RowLabels own, const T* z0, const float* exact, int64_t from, int64_t to,
                     const Transform& t, float m) {
  alignas(64) float stash[kBlock];
  const Reference at_max = reference(t, finite_max(m));
  const double scale = mode == kPlain ? 1.0 : t.scale;
  MoreStats sum = {0.0, 0.0, 0.0, -__builtin_inff(), from};
  auto best_of = [&](int64_t begin, int n, float x) {  // x: the largest of the block, which the stash holds
    const float top = static_cast<float>(x * scale);
    if (!(top > sum.top)) return;
    int k = 0;
    while (k < n - 1 && stash[k] != x) ++k;
    sum.top = top, sum.at = begin + k;
  };
  between_labels(
      plan, own, from, to,
      [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b; i += kBlock) {
          const int n = b - i < kBlock ? static_cast<int>(b - i) : kBlock;
          const StashSums sums = stash_sums<mode>(z0 + i, n, t, at_max, stash);
          sum.sums += at_max.fix * sums.powers;
          sum.squares += at_max.fix * at_max.fix * sums.squares;
          sum.total += scale * sums.total;
          best_of(i, n, sums.top);
        }
      },
      [&](int64_t n) {
        const int64_t label = plan.labels[n];
        const double z = svpo_logit(label_logit(plan, z0, exact, n), t.temperature, t.softcap);
        const double shifted = (huge(m) ? static_cast<float>(z) : z) - finite_max(m);
        sum.sums += exp(shifted), sum.squares += exp(2.0 * shifted), sum.total += z;
        best_of(label, 1, stash_sums<mode>(z0 + label, 1, t, at_max, stash).top);
      });
  return sum;
}

// -- gradient ---------------------------------------------------------------------------------------------------------

// What the upstream gradients mean for one row.
struct RowGrad {
  double total;    // G: sum over the row's predictions
  double others;   // the part of G that is not for `likely`, summed on its own
  int64_t likely;  // l*
};

// dlogits of columns [from, to) of plan row r, in place too. `merged` (N,) holds the upstreams, equal (row, label) merged
// into the first; null: 0 for all labels but l*.
//
//   -G p J,  at a label J (g - G p),  at l* J (G (1 - p) - G_others): nothing cancels where a label is likely
template <Mode mode, class T>
void gradient_columns(const Plan& plan, int64_t r, RowLabels own, const RowGrad& grad, const double* merged,
                      const T* z0, T* out, const float* exact, int64_t from, int64_t to, const Transform& t,
                      const RowStats& stats, bool past_cache) {
  const double logsum = stats.row_logsum[r];
  const double factor = -grad.total * exp(-logsum) / t.temperature;
  // With G = 0 only the label columns count, unless the row is NaN.
  const bool empty = grad.total == 0.0 && logsum - logsum == 0.0;
  between_labels(
      plan, own, from, to,
      [&](int64_t a, int64_t b) {
        if (empty) memset(static_cast<void*>(out + a), 0, (b - a) * sizeof(T));
        else gradient<mode>(z0 + a, out + a, b - a, t, stats.row_max[r], factor, past_cache);
      },
      [&](int64_t n) {
        const double slope = svpo_logit_slope(label_logit(plan, z0, exact, n), t.temperature, t.softcap);
        const double logp = stats.logp[n];
        const double value = n == grad.likely ? grad.total * svpo_one_minus_p(logp) - grad.others
                                              : (merged ? merged[n] : 0.0) - grad.total * exp(logp);
        out[plan.labels[n]] = from_float<T>(static_cast<float>(slope * value));
      });
}

// What the upstreams of log-probs and entropy mean for one row: G = sum of g_n, and the entropy's own.
struct EntropyGrad { double total, entropy; };

// dlogits of columns [from, to) of plan row r, in place too, with every label's own upstream g (N,), merged.
//
//   -p J (G + E (logp_j + H)),  at a label J (g (1 - p) - (G - g) p - E p (logp + H)): nothing cancels where it is likely
template <Mode mode, class T>
void entropy_gradient_columns(const Plan& plan, int64_t r, RowLabels own, const EntropyGrad& grad, const float* g,
                              const T* z0, T* out, const float* exact, int64_t from, int64_t to, const Transform& t,
                              const RowStats& stats) {
  const double logsum = stats.row_logsum[r], H = stats.entropy[r], factor = -exp(-logsum) / t.temperature;
  between_labels(
      plan, own, from, to,
      [&](int64_t a, int64_t b) {
        weighted_gradient<mode>(z0 + a, out + a, b - a, t, stats.row_max[r], factor,
                                grad.total + grad.entropy * (H - logsum), grad.entropy);
      },
      [&](int64_t n) {
        const double slope = svpo_logit_slope(label_logit(plan, z0, exact, n), t.temperature, t.softcap);
        const double logp = stats.logp[n], p = exp(logp);
        double value = g[n] * svpo_one_minus_p(logp) - (grad.total - g[n]) * p;
        if (p > 0.0) value -= grad.entropy * p * (logp + H);
        out[plan.labels[n]] = from_float<T>(static_cast<float>(slope * value));
      });
}

// -- a range of plan rows ---------------------------------------------------------------------------------------------

// Log-probs and statistics of plan rows [first, last). row(r) points to the logits of plan row r, null where there is
// none. With `unit` the logits become U = J (onehot(l*) - softmax(z)) while they are still in the cache.
template <class T, Mode mode, class Row>
int score_rows(const Plan& plan, int64_t first, int64_t last, const Row& row, const float* exact, int64_t vocab_size,
               const RowTransforms& transforms, const RowStats& stats, bool unit, int threads) {
  const int64_t count = last - first, base = count ? plan.row_start[first] : 0, work = count * vocab_size;
  if (count <= 0) return SVPO_OK;
  const Panels panels(vocab_size);
  Scratch<int64_t> order(plan.row_start[last] - base);
  Scratch<RowLabels> labels(count);
  Scratch<Partial> partial(count * panels.per_row);
  if (!order.data || !labels.data || !partial.data) return SVPO_NO_MEMORY;

  auto scan_panel = [&](int64_t task) {
    const int64_t i = panels.row(task), r = first + i;
    Partial& sum = partial[task] = {0.0, -__builtin_inff(), 0.0};
    const T* z0 = row(r);
    if (!z0) return;
    const Transform t = transforms.of(r);
    between_labels(plan, labels[i], panels.from(task), panels.to(task),
                   [&](int64_t from, int64_t to) {
                     if (stats.entropy) scan<mode, true>(z0 + from, to - from, t, sum);
                     else scan<mode, false>(z0 + from, to - from, t, sum);
                   },
                   [](int64_t) {});
  };
  auto finish = [&](int64_t i) {
    const int64_t r = first + i;
    if (!row(r)) return missing_row(plan, r, stats);
    Partial sum = {0.0, -__builtin_inff(), 0.0};
    for (int64_t p = 0; p < panels.per_row; ++p) add_partial(sum, partial[i * panels.per_row + p]);
    finish_row(plan, r, labels[i], row(r), exact, sum, transforms.of(r), stats);
  };
  auto unit_panel = [&](int64_t task) {
    const int64_t i = panels.row(task), r = first + i;
    T* const z0 = const_cast<T*>(row(r));
    if (!z0) return;
    const RowGrad one = {1.0, 0.0, likeliest(labels[i], stats.logp)};
    gradient_columns<mode>(plan, r, labels[i], one, nullptr, z0, z0, exact, panels.from(task), panels.to(task),
                           transforms.of(r), stats, false);
  };
  for_each(count, 1024, 16 * (plan.row_start[last] - base), threads, [&](int64_t i) {
    labels[i] = sort_labels(plan, first + i, vocab_size, order.data + plan.row_start[first + i] - base);
  });
  // Enough rows: each stays with one thread, and in its cache. Few rows: their panels are shared out.
  if (count >= 4 * threads) {
    for_each(count, panels.grain, work, threads, [&](int64_t i) {
      const int64_t begin = i * panels.per_row, end = begin + panels.per_row;
      for (int64_t task = begin; task < end; ++task) scan_panel(task);
      finish(i);
      for (int64_t task = begin; unit && task < end; ++task) unit_panel(task);
    });
  } else {
    for_each(count * panels.per_row, panels.grain, work, threads, scan_panel);
    for_each(count, 1, work, threads, finish);
    if (unit) for_each(count * panels.per_row, panels.grain, work, threads, unit_panel);
  }
  return SVPO_OK;
}

}  // namespace
