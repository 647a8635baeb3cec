// The passes between the matrix products of linear_step_logps (svpo_kernels/linear_step_logps/products.py).
//
// h (R, D) are the gathered hidden rows, z a chunk (c, V) of products h W^T + b in the input dtype. The label columns of
// z are rounded, so their logits are taken from exact fp32 dots instead (label_z0).
#include "rows.cuh"

using namespace rows;

namespace {

constexpr int kFeatureThreads = 128;  // a block takes a row of D: 4096 16-bit features are 4 packs a thread

// The dot of two runs of the same size. In fp64, where products of fp32 numbers are exact: what is subtracted in the
// gradient of a branching row shows the rounding of its labels' logits.
template <class T>
SVPO_DEVICE double warp_dot(const Run<const T>& a, const Run<const T>& b) {
  double sums[kPack<T>] = {};
  for (int64_t k = thread_x() % kWarp; k < a.packs(); k += kWarp) {
    const Pack<T> x = load_edge(a, k, from_float<T>(0.0f), a.skip), y = load_edge(b, k, from_float<T>(0.0f), a.skip);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) sums[j] += static_cast<double>(to_float(x.at[j])) * to_float(y.at[j]);
  }
#pragma unroll
  for (int step = kPack<T> / 2; step > 0; step /= 2)
#pragma unroll
    for (int j = 0; j < step; ++j) sums[j] += sums[j + step];
  return warp_sum(sums[0]);
}

// Grid (max(R, padding),) of one warp: the labels of a row, each distinct one once.
template <class T>
SVPO_KERNEL(kWarp, 16)
label_dots_kernel(const T* h, const T* weight, const T* bias, Plan plan, int64_t D, int64_t stride_h, int64_t stride_w,
                  int64_t vocab_size, float* label_z0) {
  const int64_t r = block_x();
  const Run<const T> row(h + r * stride_h, D);
  const bool scored = plan.rows[r] >= 0;
  for (int64_t n = plan.row_start[r]; n < plan.row_start[r + 1]; ++n) {
    const int64_t label = plan.labels[n];
    if (plan.first[n] != n) continue;
    double z0 = 0.0;
    if (scored && label >= 0 && label < vocab_size) {
      z0 = warp_dot(row, Run<const T>(weight + label * stride_w, D));
      if (bias) z0 += to_float(bias[label]);
    }
    // The first lane alone writes, its equals too: no other lane waits for them.
    for (int64_t equal = n; thread_x() == 0 && equal < plan.row_start[r + 1]; ++equal)
      if (plan.first[equal] == n) label_z0[equal] = static_cast<float>(z0);
  }
}

// Grid (rows of the chunk,). out = G uw + sum of terms[n] W[l_n] over the row's predictions, in order, rounded once.
template <class T>
SVPO_KERNEL(kFeatureThreads, 8)
branch_hidden_kernel(const T* uw, const T* weight, T* to, int64_t D, int64_t stride_uw, int64_t stride_w,
                     int64_t first_row, const int64_t* row_start, const int64_t* labels, const float* terms,
                     const float* G) {
  const int64_t i = block_x(), r = first_row + i, start = row_start[r], end = row_start[r + 1];
  const Run<T> out(to + i * D, D);
  const Run<const T> source(uw + i * stride_uw, D);
  const float scale = G[r];
  for (int64_t k = thread_x(); k < out.packs(); k += kFeatureThreads) {
    Pack<T> pack = load_edge(source, k, from_float<T>(0.0f), out.skip);
    float sums[kPack<T>];
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) sums[j] = scale * to_float(pack.at[j]);
    for (int64_t n = start; n < end; ++n) {
      const float term = terms[n];
      if (term == 0.0f) continue;
      const Run<const T> row(weight + labels[n] * stride_w, D);
      const Pack<T> w = load_edge(row, k, from_float<T>(0.0f), out.skip);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) sums[j] = fmaf(term, to_float(w.at[j]), sums[j]);
    }
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) pack.at[j] = from_float<T>(sums[j]);
    store_edge(out, k, pack);
  }
}

// Grid (N,). Keys ascend: the first of equal labels adds all their terms in fp32, by ascending row, and rounds once.
template <class T, class W>
SVPO_KERNEL(kFeatureThreads, 8)
branch_weight_kernel(W* dweight, float* dbias, const T* h, int64_t V, int64_t D, int64_t stride_dw, int64_t stride_h,
                     const int64_t* keys, const int64_t* order, const int64_t* row_of, const float* coefficients,
                     int64_t N) {
  const int64_t i = block_x(), label = keys[i];
  if (label < 0 || label >= V || (i > 0 && keys[i - 1] == label)) return;
  if (dbias && thread_x() == 0) {
    double sum = 0.0;
    for (int64_t j = i; j < N && keys[j] == label; ++j) sum += coefficients[order[j]];
    dbias[label] += static_cast<float>(sum);
  }
  if (!dweight) return;
  const Run<W> out(dweight + label * stride_dw, D);
  for (int64_t k = thread_x(); k < out.packs(); k += kFeatureThreads) {
    const int64_t begin = out.begin(k);
    Pack<W> pack = load_edge(Run<const W>(out.data, D), k, from_float<W>(0.0f), out.skip);
    float sums[kPack<W>];
#pragma unroll
    for (int e = 0; e < kPack<W>; ++e) sums[e] = to_float(pack.at[e]);
    for (int64_t j = i; j < N && keys[j] == label; ++j) {
      const int64_t n = order[j];
      const T* const row = h + row_of[n] * stride_h;
      const float c = coefficients[n];
#pragma unroll
      for (int e = 0; e < kPack<W>; ++e)
        if (out.has(begin + e)) sums[e] = fmaf(c, to_float(row[begin + e]), sums[e]);
    }
#pragma unroll
    for (int e = 0; e < kPack<W>; ++e) pack.at[e] = from_float<W>(sums[e]);
    store_edge(out, k, pack);
  }
}

// Rows of a chunk or of some of its columns.
Source tile_of(void* data, int dtype, int64_t stride, int64_t count) {
  return {data, dtype, count, count > 0 ? count : 1, 0, stride};
}

// Statistics that are only read.
Stats given(const float* logp, const float* row_max, const float* row_logsum, const float* entropy) {
  return {const_cast<float*>(logp), const_cast<float*>(row_max), const_cast<float*>(row_logsum),
          const_cast<float*>(entropy)};
}

// The gradient of a tile whose columns are labels counted from its own first.
int tile_gradient(const Source& source, const Source& target, Plan plan, int64_t first_row, const int64_t* tile_labels,
                  Options options, const float* row_max, const RowFactors& by, int64_t columns, Queue queue) {
  plan.labels = tile_labels;
  options.vocab_size = columns;
  return gradient(source, target, plan, first_row, nullptr, options, row_max, by, columns, queue);
}

}  // namespace

extern "C" int svpo_cuda_label_dots(
    const void* h, const void* weight, const void* bias, int dtype, int64_t D, int64_t stride_h, int64_t stride_w,
    const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N,
    int64_t vocab_size, float* label_z0, int device, void* stream) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const Queue queue = {device, stream};
  const int status = fill_bytes(label_z0, 0, N * 4, queue);  // the plan's padding
  if (status != SVPO_OK) return status;
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return launch("label_dots", label_dots_kernel<T>, Grid{R, 1}, kWarp, queue, static_cast<const T*>(h),
                  static_cast<const T*>(weight), static_cast<const T*>(bias), plan, D, stride_h, stride_w, vocab_size,
                  label_z0);
  });
}

extern "C" int svpo_cuda_linear_rows(
    void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row, const int64_t* rows,
    const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N, const float* label_z0,
    int64_t vocab_size, double temperature, double softcap, const float* scales, float* logp, float* row_max,
    float* row_logsum, float* entropy, int unit, int clusters, void* scratch, int64_t scratch_bytes, int device,
    void* stream) {
  const int64_t count = last_row - first_row, partials = panels(dtype, vocab_size, softcap) * count;
  const Queue queue = {device, stream};
  const Plan plan = {rows, row_start, labels, first, R, N};
  const Source chunk = tile_of(z, dtype, stride_z, count);
  const Options options = {vocab_size, temperature, softcap, label_z0, scales};
  const Stats stats = {logp, row_max, row_logsum, entropy};
  if (scratch_bytes < partials * static_cast<int64_t>(sizeof(Partial)) + (R + N) * 4)
    return svpo_cuda_fail("linear_rows", "scratch is too small");
  Partial* const partial = static_cast<Partial*>(scratch);
  float* const factors = reinterpret_cast<float*>(partial + partials);
  const RowFactors by = {factors, factors + R, nullptr, nullptr};
  if (unit && clusters) {
    const int64_t kept = kept_in_cluster(dtype, vocab_size, softcap, count, capability(device), processors(device));
    if (kept) return cluster_rows(chunk, plan, first_row, kept, options, stats, partial, by, queue);
  }
  int status = statistics(chunk, plan, first_row, count, true, options, stats, partial, queue);
  if (status == SVPO_OK && unit)
    status = row_targets(chunk, plan, first_row, count, true, options, stats, nullptr, by, nullptr, queue);
  if (status == SVPO_OK && unit)
    status = gradient(chunk, chunk, plan, first_row, nullptr, options, row_max, by, vocab_size, queue);
  return status;
}

extern "C" int svpo_cuda_linear_rows_unit(
    void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row, const int64_t* tile_labels,
    int64_t columns, const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first,
    int64_t R, int64_t N, const float* label_z0, int64_t vocab_size, double temperature, double softcap,
    const float* scales, const float* logp, const float* row_max, const float* row_logsum, void* scratch,
    int64_t scratch_bytes, int device, void* stream) {
  const Queue queue = {device, stream};
  const Plan plan = {rows, row_start, labels, first, R, N};
  const Source tile = tile_of(z, dtype, stride_z, last_row - first_row);
  const Options options = {vocab_size, temperature, softcap, label_z0, scales};
  if (scratch_bytes < (R + N) * 4) return svpo_cuda_fail("linear_rows_unit", "scratch is too small");
  float* const factors = static_cast<float*>(scratch);
  const RowFactors by = {factors, factors + R, nullptr, nullptr};
  const int status = row_targets(tile, plan, first_row, tile.count, true, options,
                                 given(logp, row_max, row_logsum, nullptr), nullptr, by, nullptr, queue);
  if (status != SVPO_OK) return status;
  return tile_gradient(tile, tile, plan, first_row, tile_labels, options, row_max, by, columns, queue);
}

extern "C" int svpo_cuda_linear_rows_grad(
    const void* z, void* out, int dtype, int64_t stride_z, int64_t stride_out, int64_t first_row, int64_t last_row,
    const int64_t* tile_labels, int64_t columns, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
    const int64_t* first, int64_t R, int64_t N, const float* label_z0, int64_t vocab_size, double temperature,
    double softcap, const float* scales, const float* logp, const float* row_max, const float* row_logsum,
    const float* entropy, const float* g, const float* G, const float* E, void* scratch, int64_t scratch_bytes,
    int device, void* stream) {
  const Queue queue = {device, stream};
  const Plan plan = {rows, row_start, labels, first, R, N};
  const Source source = tile_of(const_cast<void*>(z), dtype, stride_z, last_row - first_row);
  const Source target = tile_of(out, dtype, stride_out, last_row - first_row);
  const Options options = {vocab_size, temperature, softcap, label_z0, scales};
  if (scratch_bytes < (3 * R + N) * 4) return svpo_cuda_fail("linear_rows_grad", "scratch is too small");
  float* const factors = static_cast<float*>(scratch);
  const RowFactors by = {factors, factors + 3 * R, factors + R, factors + 2 * R};
  const int status = entropy_targets(plan, first_row, source.count, options, given(logp, row_max, row_logsum, entropy),
                                     {g, G, E}, by, queue);
  if (status != SVPO_OK) return status;
  return tile_gradient(source, target, plan, first_row, tile_labels, options, row_max, by, columns, queue);
}

extern "C" int svpo_cuda_reduce_steps(const float* logp, const int64_t* step_ids, const int64_t* step_order,
                                      const int64_t* step_start, int64_t N, int64_t S, int reduction, float* out,
                                      int device, void* stream) {
  return reduce_steps(logp, step_ids, step_order, step_start, N, S, reduction, out, {device, stream});
}

extern "C" int svpo_cuda_row_grads(const float* grad_out, const int64_t* rows, const int64_t* row_start,
                                   const int64_t* first, const int64_t* step_ids, const int64_t* step_start, int64_t R,
                                   int64_t N, int64_t S, int reduction, float* g, float* G, int device, void* stream) {
  const Plan plan = {rows, row_start, nullptr, first, R, N};
  return row_grads(plan, {grad_out, step_ids, step_start, S, reduction}, g, G, {device, stream});
}

extern "C" int svpo_cuda_branch_hidden(
    const void* uw, const void* weight, void* out, int dtype, int64_t D, int64_t stride_uw, int64_t stride_w,
    int64_t first_row, int64_t last_row, const int64_t* row_start, const int64_t* labels, const float* terms,
    const float* G, int device, void* stream) {
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return launch("branch_hidden", branch_hidden_kernel<T>, Grid{last_row - first_row, 1}, kFeatureThreads,
                  Queue{device, stream}, static_cast<const T*>(uw), static_cast<const T*>(weight),
                  static_cast<T*>(out), D, stride_uw, stride_w, first_row, row_start, labels, terms, G);
  });
}

extern "C" int svpo_cuda_branch_weight(
    void* dweight, float* dbias, const void* h, int dtype_w, int dtype, int64_t V, int64_t D, int64_t stride_dw,
    int64_t stride_h, const int64_t* keys, const int64_t* order, const int64_t* row_of, const float* coefficients,
    int64_t N, int device, void* stream) {
  return for_dtype(dtype, [&](auto type) {
    return for_dtype(dtype_w, [&](auto type_w) {
      using T = decltype(type);
      using W = decltype(type_w);
      return launch("branch_weight", branch_weight_kernel<T, W>, Grid{N, 1}, kFeatureThreads, Queue{device, stream},
                    static_cast<W*>(dweight), dbias, static_cast<const T*>(h), V, D, stride_dw, stride_h, keys, order,
                    row_of, coefficients, N);
    });
  });
}
