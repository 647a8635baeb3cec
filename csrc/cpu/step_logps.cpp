// step_logps on the CPU: every scored row is read from memory once in the forward and once in the backward.
#include "steps.h"

namespace {

constexpr int64_t kPastCache = 16 << 20;  // bytes of gradient that no cache keeps for whoever reads it next

// Rows of logits: row r of the flattened (B * L) is row r % L of sequence r / L.
template <class T>
struct Rows {
  T* data;
  int64_t B, L, stride_b, stride_l;
  bool has(int64_t r) const { return r >= 0 && r < B * L; }
  T* row(int64_t r) const { return data + r / L * stride_b + r % L * stride_l; }
};

// Every row of grads: zeros where nothing is scored, in padded columns, and around the columns that count. past_cache:
// written around the caches; unmapped: pages that no memory is behind yet.
template <class T, Mode mode>
int backward_rows(const Rows<const T>& logits, const Rows<T>& grads, const Plan& plan, const RowStats& stats,
                  const Upstream& upstream, int64_t V, int64_t vocab_size, const Transform& t, bool past_cache,
                  bool unmapped, int threads) {
  const int64_t num_rows = logits.B * logits.L;
  const Panels panels(V);
  Scratch<int64_t> order(plan.N), owner(num_rows);
  Scratch<RowLabels> labels(plan.R);
  Scratch<RowGrad> row_grads(plan.R);
  Scratch<double> merged(plan.N);
  if (!order.data || !owner.data || !labels.data || !row_grads.data || !merged.data) return SVPO_NO_MEMORY;

  for (int64_t row = 0; row < num_rows; ++row) owner[row] = -1;
  for (int64_t r = 0; r < plan.R; ++r)
    if (logits.has(plan.rows[r])) owner[plan.rows[r]] = r;
  for_each(plan.R, 1024, plan.N * 16, threads, [&](int64_t r) {
    labels[r] = sort_labels(plan, r, vocab_size, order.data + plan.row_start[r]);
    merge_upstream(plan, r, upstream, merged.data);
    row_grads[r] = row_grad(labels[r], stats.logp, merged.data);
  });
  for_each(num_rows * panels.per_row, panels.grain, num_rows * V, threads, [&](int64_t task) {
    const int64_t row = panels.row(task), r = owner[row], from = panels.from(task), to = panels.to(task);
    T* const out = grads.row(row);
    // 165 -> 137 ms forward and backward at 512 x 128256 fp32 on one thread: most of it goes into mapping the pages.
    if (unmapped) svpo_populate(out + from, (to - from) * sizeof(T));
    const int64_t end = r < 0 || vocab_size < from ? from : vocab_size < to ? vocab_size : to;
    memset(static_cast<void*>(out + end), 0, (to - end) * sizeof(T));
    if (end > from)
      gradient_columns<mode>(plan, r, labels[r], row_grads[r], merged.data, logits.row(row), out, nullptr, from, end, t,
                             stats, past_cache);
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
  const RowStats stats = {logp, row_max, row_logsum, nullptr};
  const RowTransforms transforms(temperature, softcap, nullptr);
  const int status = for_dtype_and_mode(dtype, transforms.all.mode, [&](auto type, auto tag) {
    using T = decltype(type);
    const Rows<const T> source = {static_cast<const T*>(logits), B, L, stride_b, stride_l};
    auto row = [&](int64_t r) { return source.has(rows[r]) ? source.row(rows[r]) : nullptr; };
    return score_rows<T, decltype(tag)::mode>(plan, 0, R, row, nullptr, vocab_size, transforms, stats, false,
                                              threads);
  });
  if (status != SVPO_OK) return status;
  for (int64_t n = R ? row_start[R] : 0; n < N; ++n) logp[n] = 0.0f;  // padding belongs to no row
  reduce_to_steps(logp, step_order, step_start, N, S, reduction, out, threads);
  return SVPO_OK;
}

extern "C" int SVPO_ENTRY(step_logps_bwd)(
    const float* grad_out, const void* logits, void* grad_logits, int dtype, int64_t B, int64_t L, int64_t V,
    int64_t stride_b, int64_t stride_l, int64_t grad_stride_b, int64_t grad_stride_l, const float* logp,
    const float* row_max, const float* row_logsum, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
    const int64_t* first, const int64_t* step_ids, const int64_t* step_start, int64_t R, int64_t N, int64_t S,
    int64_t vocab_size, double temperature, double softcap, int reduction, int separate, int fresh, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const RowStats stats = {const_cast<float*>(logp), const_cast<float*>(row_max), const_cast<float*>(row_logsum),
                          nullptr};
  const Transform t = make_transform(temperature, softcap);
  const Upstream upstream = {grad_out, step_ids, step_start, S, reduction};
  return for_dtype_and_mode(dtype, t.mode, [&](auto type, auto tag) {
    using T = decltype(type);
    const int64_t bytes = B * L * V * static_cast<int64_t>(sizeof(T));
    const bool large = bytes > kPastCache;
    const Rows<const T> source = {static_cast<const T*>(logits), B, L, stride_b, stride_l};
    const Rows<T> target = {static_cast<T*>(grad_logits), B, L, grad_stride_b, grad_stride_l};
    return backward_rows<T, decltype(tag)::mode>(source, target, plan, stats, upstream, V, vocab_size, t, separate && large,
                                                 fresh && large, threads);
  });
}
