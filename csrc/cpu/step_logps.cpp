// step_logps on the CPU: every scored row is read from memory once in the forward and once in the backward.
#include "rows.h"

namespace {

constexpr int64_t kSmall = 65536;  // elements below which waking threads costs more than it saves

// Rows of logits: row r of the flattened (B * L) is L-row r % L of sequence r / L.
template <class T>
struct Rows {
  T* data;
  int64_t B, L, stride_b, stride_l;
  bool has(int64_t r) const { return r >= 0 && r < B * L; }
  T* row(int64_t r) const { return data + r / L * stride_b + r % L * stride_l; }
};

// Tasks are (row, panel of columns); rows of few columns are handed out several at a time.
struct Panels {
  int64_t columns, per_row, grain;
  explicit Panels(int64_t V)
      : columns(V), per_row(V > kPanel ? (V + kPanel - 1) / kPanel : 1), grain(V < kPanel ? kPanel / (V + 1) + 1 : 1) {}
  int64_t row(int64_t task) const { return task / per_row; }
  int64_t from(int64_t task) const { return task % per_row * kPanel; }
  int64_t to(int64_t task) const { return from(task) + kPanel < columns ? from(task) + kPanel : columns; }
};

// Calls body(i) for i in [0, count), threaded when `work` elements are worth it.
template <class Body>
void for_each(int64_t count, int64_t grain, int64_t work, int threads, const Body& body) {
  parallel_for(count, grain, work < kSmall ? 1 : threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

// -- forward ----------------------------------------------------------------------------------------------------------

struct ForwardOut { float *out, *logp, *row_max, *row_logsum; };

template <class T, Mode mode>
int forward_rows(const Rows<const T>& logits, const Plan& plan, int64_t vocab_size, const Transform& t,
                 const ForwardOut& to, int threads) {
  const Panels panels(vocab_size);
  Scratch<int64_t> order(plan.N);
  Scratch<RowLabels> labels(plan.R);
  Scratch<Partial> partial(plan.R * panels.per_row);
  if (!order.data || !labels.data || !partial.data) return SVPO_NO_MEMORY;
  const int64_t work = plan.R * vocab_size;

  for_each(plan.R, 1024, plan.N * 16, threads,
           [&](int64_t r) { labels[r] = sort_labels(plan, r, vocab_size, order.data); });
  for_each(plan.R * panels.per_row, panels.grain, work, threads, [&](int64_t task) {
    const int64_t r = panels.row(task);
    Partial& sum = partial[task] = {0.0, -__builtin_inff()};
    if (!logits.has(plan.rows[r])) return;
    const T* z0 = logits.row(plan.rows[r]);
    between_labels(plan, labels[r], panels.from(task), panels.to(task),
                   [&](int64_t from, int64_t end) { scan<mode>(z0 + from, end - from, t, sum); }, [](int64_t) {});
  });
  for_each(plan.R, 64, work, threads, [&](int64_t r) {
    if (!logits.has(plan.rows[r])) {
      const float missing = plan.rows[r] < 0 ? 0.0f : __builtin_nanf("");
      to.row_max[r] = to.row_logsum[r] = missing;
      for (int64_t n = plan.row_start[r]; n < plan.row_start[r + 1]; ++n) to.logp[n] = missing;
      return;
    }
    Partial sum = {0.0, -__builtin_inff()};
    for (int64_t p = 0; p < panels.per_row; ++p) add_partial(sum, partial[r * panels.per_row + p]);
    finish_row(plan, r, labels[r], logits.row(plan.rows[r]), nullptr, sum, t, to.logp, to.row_max + r,
               to.row_logsum + r);
  });
  for (int64_t n = plan.R ? plan.row_start[plan.R] : 0; n < plan.N; ++n) to.logp[n] = 0.0f;
  return SVPO_OK;
}

// out (S,) or (N,) from logp (N,), each step's predictions in order.
void reduce_steps(const float* logp, const int64_t* step_order, const int64_t* step_start, int64_t N, int64_t S,
                  int reduction, float* out, int threads) {
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

// -- backward ---------------------------------------------------------------------------------------------------------

// What the upstream gradients mean for one row.
struct RowGrad {
  double total;    // G: sum over the row's predictions
  double others;   // the part of G that is not for `likely`, summed on its own
  int64_t likely;  // l*: the likeliest distinct label, ties: the first
};

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

// Upstreams of equal (row, label) merged into merged[first]; the row's totals.
RowGrad merge_upstream(const Plan& plan, int64_t r, RowLabels own, const Upstream& upstream, const float* logp,
                       double* merged) {
  const int64_t begin = plan.row_start[r], end = plan.row_start[r + 1];
  for (int64_t n = begin; n < end; ++n) merged[n] = 0.0;
  for (int64_t n = begin; n < end; ++n) merged[plan.first[n]] += upstream.of(n);
  RowGrad grad = {0.0, 0.0, -1};
  for (int64_t i = 0; i < own.count; ++i) {
    const int64_t n = own.order[i], best = grad.likely;
    if (best < 0 || logp[n] > logp[best] || (logp[n] == logp[best] && n < best)) grad.likely = n;
  }
  for (int64_t i = 0; i < own.count; ++i)
    if (own.order[i] != grad.likely) grad.others += merged[own.order[i]];
  if (own.count) grad.total = grad.others + merged[grad.likely];
  return grad;
}

// dlogits of a label's own column, without cancellation: J (G (1 - p*) - G_others) at l*, else J (g - G p).
double label_gradient(const RowGrad& grad, int64_t n, double merged, double logp, double slope) {
  if (n == grad.likely) return slope * (grad.total * svpo_one_minus_p(logp) - grad.others);
  return slope * (merged - grad.total * exp(logp));
}

struct RowStats { const float *logp, *row_max, *row_logsum; };

template <class T, Mode mode>
int backward_rows(const Rows<const T>& logits, const Rows<T>& grads, const Plan& plan, const RowStats& stats,
                  const Upstream& upstream, int64_t V, int64_t vocab_size, const Transform& t, int threads) {
  const int64_t num_rows = logits.B * logits.L;
  const Panels panels(V);
  Scratch<int64_t> order(plan.N), owner(num_rows);
  Scratch<RowLabels> labels(plan.R);
  Scratch<RowGrad> row_grad(plan.R);
  Scratch<double> merged(plan.N);
  if (!order.data || !owner.data || !labels.data || !row_grad.data || !merged.data) return SVPO_NO_MEMORY;

  for (int64_t r = 0; r < num_rows; ++r) owner[r] = -1;
  for (int64_t r = 0; r < plan.R; ++r)
    if (logits.has(plan.rows[r])) owner[plan.rows[r]] = r;
  for_each(plan.R, 1024, plan.N * 16, threads, [&](int64_t r) {
    labels[r] = sort_labels(plan, r, vocab_size, order.data);
    row_grad[r] = merge_upstream(plan, r, labels[r], upstream, stats.logp, merged.data);
  });
  for_each(num_rows * panels.per_row, panels.grain, num_rows * V, threads, [&](int64_t task) {
    const int64_t row = panels.row(task), r = owner[row], from = panels.from(task), to = panels.to(task);
    T* const out = grads.row(row);
    const int64_t end = r < 0 || vocab_size < from ? from : vocab_size < to ? vocab_size : to;
    memset(static_cast<void*>(out + end), 0, (to - end) * sizeof(T));
    if (end == from) return;
    const T* const z0 = logits.row(row);
    const RowGrad& grad = row_grad[r];
    const double logsum = stats.row_logsum[r];
    const double factor = -grad.total * exp(-logsum) / t.temperature;
    // With G = 0 only the label columns count, unless the row is NaN.
    const bool empty = grad.total == 0.0 && logsum - logsum == 0.0;
    between_labels(
        plan, labels[r], from, end,
        [&](int64_t a, int64_t b) {
          if (empty) memset(static_cast<void*>(out + a), 0, (b - a) * sizeof(T));
          else gradient<mode>(z0 + a, out + a, b - a, t, stats.row_max[r], factor);
        },
        [&](int64_t n) {
          const double slope = svpo_logit_slope(to_float(z0[plan.labels[n]]), t.temperature, t.softcap);
          const double value = label_gradient(grad, n, merged[n], stats.logp[n], slope);
          out[plan.labels[n]] = from_float<T>(static_cast<float>(value));
        });
  });
  return SVPO_OK;
}

}  // namespace

extern "C" int SVPO_ENTRY(step_logps_fwd)(
    const void* logits, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l, const int64_t* rows,
    const int64_t* row_start, const int64_t* labels, const int64_t* first, const int64_t* step_order,
    const int64_t* step_start, int64_t R, int64_t N, int64_t S, int64_t vocab_size, double temperature, double softcap,
    int reduction, float* out, float* logp, float* row_max, float* row_logsum, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const Transform t = make_transform(temperature, softcap);
  const int status = for_dtype_and_mode(dtype, t.mode, [&](auto type, auto tag) {
    using T = decltype(type);
    const Rows<const T> source = {static_cast<const T*>(logits), B, L, stride_b, stride_l};
    return forward_rows<T, decltype(tag)::mode>(source, plan, vocab_size, t, {out, logp, row_max, row_logsum}, threads);
  });
  if (status == SVPO_OK) reduce_steps(logp, step_order, step_start, N, S, reduction, out, threads);
  return status;
}

extern "C" int SVPO_ENTRY(step_logps_bwd)(
    const float* grad_out, const void* logits, void* grad_logits, int dtype, int64_t B, int64_t L, int64_t V,
    int64_t stride_b, int64_t stride_l, int64_t grad_stride_b, int64_t grad_stride_l, const float* logp,
    const float* row_max, const float* row_logsum, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
    const int64_t* first, const int64_t* step_ids, const int64_t* step_start, int64_t R, int64_t N, int64_t S,
    int64_t vocab_size, double temperature, double softcap, int reduction, int fresh, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const Transform t = make_transform(temperature, softcap);
  const Upstream upstream = {grad_out, step_ids, step_start, S, reduction};
  return for_dtype_and_mode(dtype, t.mode, [&](auto type, auto tag) {
    using T = decltype(type);
    if (fresh) svpo_advise_huge(grad_logits, B * L * V * sizeof(T));
    const Rows<const T> source = {static_cast<const T*>(logits), B, L, stride_b, stride_l};
    const Rows<T> target = {static_cast<T*>(grad_logits), B, L, grad_stride_b, grad_stride_l};
    return backward_rows<T, decltype(tag)::mode>(source, target, plan, {logp, row_max, row_logsum}, upstream, V,
                                                 vocab_size, t, threads);
  });
}
