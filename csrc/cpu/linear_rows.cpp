// The passes between the matrix products of linear_step_logps (svpo_kernels/linear_step_logps/products.py).
//
// h (R, D) are the gathered hidden rows, z a chunk (c, V) of products h W^T + b in the input dtype, or a tile of it with
// columns [first_column, first_column + columns). The label columns of z are rounded, so their logits are taken from exact fp32 dots instead (label_z0).
#include <stdlib.h>

#include "steps.h"

namespace {

constexpr int64_t kSlice = 1024;  // columns of D whose fp32 sums stay in L1

// out += coefficient * row, n elements in fp32.
template <class T>
void add_scaled(float* out, const T* row, float coefficient, int64_t n) {
  const Vec c = set1(coefficient);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, fma(c, load(row + i), load(out + i)));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(out + i, fma(c, load_n(row + i, left, 0.0f), load_n(out + i, left, 0.0f)), left);
  }
}

// out = factor * row, between any storage formats.
template <class A, class B>
void scale_row(A* out, const B* row, float factor, int64_t n) {
  const Vec c = set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, c * load(row + i));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(out + i, c * load_n(row + i, left, 0.0f), left);
  }
}

// Columns [first_column, first_column + columns) of plan rows [first_row, last_row): z is read, out, which may be z, is
// written.
struct Tile {
  const void* z;
  void* out;
  int64_t stride_z, stride_out, first_row, last_row, first_column, columns;
};

// The labels of the rows [first_row, last_row), sorted.
struct SortedLabels {
  Scratch<int64_t> order;
  Scratch<RowLabels> rows;
  SortedLabels(const Plan& plan, int64_t first_row, int64_t last_row, int64_t vocab_size, int threads)
      : order(last_row > first_row ? plan.row_start[last_row] - plan.row_start[first_row] : 0),
        rows(last_row - first_row) {
    if (!made()) return;
    const int64_t base = last_row > first_row ? plan.row_start[first_row] : 0;
    for_each(last_row - first_row, 1024, 16 * plan.N, threads, [&](int64_t i) {
      rows[i] = sort_labels(plan, first_row + i, vocab_size, order.data + plan.row_start[first_row + i] - base);
    });
  }
  bool made() const { return order.data && rows.data; }
};

// Calls body(tag, r, labels, z, out, from, to) for every panel of a tile: columns [from, to) of all V, z and out as if
// rows began at column 0. Padding becomes 0.
template <class Body>
int for_panels(const Tile& tile, int dtype, Mode mode, const Plan& plan, int64_t vocab_size, int threads,
               const Body& body) {
  const int64_t count = tile.last_row - tile.first_row;
  const Panels panels(tile.columns);
  const SortedLabels own(plan, tile.first_row, tile.last_row, vocab_size, threads);
  if (!own.made()) return SVPO_NO_MEMORY;
  return for_dtype_and_mode(dtype, mode, [&](auto type, auto tag) {
    using T = decltype(type);
    for_each(count * panels.per_row, panels.grain, count * tile.columns, threads, [&](int64_t task) {
      const int64_t i = panels.row(task), r = tile.first_row + i;
      const int64_t from = tile.first_column + panels.from(task), to = tile.first_column + panels.to(task);
      const T* const z = static_cast<const T*>(tile.z) + i * tile.stride_z - tile.first_column;
      T* const out = static_cast<T*>(tile.out) + i * tile.stride_out - tile.first_column;
      if (plan.rows[r] < 0) memset(static_cast<void*>(out + from), 0, (to - from) * sizeof(T));
      else body(tag, r, own.rows[i], z, out, from, to);
    });
    return SVPO_OK;
  });
}

// Statistics that are only read.
RowStats given(const float* logp, const float* row_max, const float* row_logsum, const float* entropy) {
  return {const_cast<float*>(logp), const_cast<float*>(row_max), const_cast<float*>(row_logsum),
          const_cast<float*>(entropy)};
}

// One term of dW: coefficient * h[row] goes to row `label`.
struct Term {
  int64_t label, row;
  float coefficient;
};

int compare_terms(const void* a, const void* b) {
  const Term &x = *static_cast<const Term*>(a), &y = *static_cast<const Term*>(b);
  if (x.label != y.label) return x.label < y.label ? -1 : 1;
  return x.row < y.row ? -1 : x.row > y.row;
}

}  // namespace

extern "C" int SVPO_ENTRY(label_dots)(
    const void* h, const void* weight, const void* bias, int dtype, int64_t D, int64_t stride_h, int64_t stride_w,
    const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N,
    int64_t vocab_size, float* label_z0, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = 0; n < N; ++n) label_z0[n] = 0.0f;
    for_each(R, 4, N * D, threads, [&](int64_t r) {
      if (plan.rows[r] < 0) return;
      const T* const row = static_cast<const T*>(h) + r * stride_h;
      for (int64_t n = row_start[r]; n < row_start[r + 1]; ++n) {
        const int64_t l = labels[n];
        if (first[n] != n || l < 0 || l >= vocab_size) continue;
        const double z0 = dot(row, static_cast<const T*>(weight) + l * stride_w, D);
        label_z0[n] = static_cast<float>(bias ? z0 + to_float(static_cast<const T*>(bias)[l]) : z0);
      }
      for (int64_t n = row_start[r]; n < row_start[r + 1]; ++n) label_z0[n] = label_z0[first[n]];
    });
    return SVPO_OK;
  });
}

extern "C" int SVPO_ENTRY(linear_rows)(
    void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row, const int64_t* rows,
    const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N, const float* label_z0,
    int64_t vocab_size, double temperature, double softcap, const float* temperatures, float* logp, float* row_max,
    float* row_logsum, float* entropy, int unit, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const RowStats stats = {logp, row_max, row_logsum, entropy};
  const RowTransforms transforms(temperature, softcap, temperatures);
  return for_dtype_and_mode(dtype, transforms.all.mode, [&](auto type, auto tag) {
    using T = decltype(type);
    T* const chunk = static_cast<T*>(z);
    auto row = [&](int64_t r) -> T* { return rows[r] < 0 ? nullptr : chunk + (r - first_row) * stride_z; };
    for (int64_t r = first_row; unit && r < last_row; ++r)
      if (rows[r] < 0) memset(static_cast<void*>(chunk + (r - first_row) * stride_z), 0, vocab_size * sizeof(T));
    return score_rows<T, decltype(tag)::mode>(plan, first_row, last_row, row, label_z0, vocab_size, transforms, stats,
                                              unit, threads);
  });
}

extern "C" int SVPO_ENTRY(linear_rows_scan)(
    const void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row, int64_t first_column,
    int64_t columns, const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first,
    int64_t R, int64_t N, int64_t vocab_size, double temperature, double softcap, const float* temperatures,
    int entropy, double* found, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const RowTransforms transforms(temperature, softcap, temperatures);
  const int64_t count = last_row - first_row;
  const Panels panels(columns);
  const SortedLabels own(plan, first_row, last_row, vocab_size, threads);
  Scratch<Partial> parts(count * panels.per_row);
  if (!own.made() || !parts.data) return SVPO_NO_MEMORY;
  return for_dtype_and_mode(dtype, transforms.all.mode, [&](auto type, auto tag) {
    using T = decltype(type);
    constexpr Mode mode = decltype(tag)::mode;
    for_each(count * panels.per_row, panels.grain, count * columns, threads, [&](int64_t task) {
      const int64_t i = panels.row(task), r = first_row + i;
      Partial& sum = parts[task] = {0.0, -__builtin_inff(), 0.0};
      if (rows[r] < 0) return;
      const T* const row = static_cast<const T*>(z) + i * stride_z - first_column;
      const Transform t = transforms.of(r);
      between_labels(plan, own.rows[i], first_column + panels.from(task), first_column + panels.to(task),
                     [&](int64_t from, int64_t to) {
                       if (entropy) scan<mode, true>(row + from, to - from, t, sum);
                       else scan<mode, false>(row + from, to - from, t, sum);
                     },
                     [](int64_t) {});
    });
    for_each(count, 1024, count * panels.per_row, threads, [&](int64_t i) {
      double* const to = found + 3 * (first_row + i);
      Partial sum = {to[0], static_cast<float>(to[1]), to[2]};
      if (first_column == 0) sum = {0.0, -__builtin_inff(), 0.0};
      for (int64_t k = 0; k < panels.per_row; ++k) add_partial(sum, parts[i * panels.per_row + k]);
      to[0] = sum.s, to[1] = sum.m, to[2] = sum.t;
    });
    return SVPO_OK;
  });
}

extern "C" int SVPO_ENTRY(linear_rows_finish)(
    const double* found, int64_t first_row, int64_t last_row, const int64_t* rows, const int64_t* row_start,
    const int64_t* labels, const int64_t* first, int64_t R, int64_t N, const float* label_z0, int64_t vocab_size,
    double temperature, double softcap, const float* temperatures, float* logp, float* row_max, float* row_logsum,
    float* entropy, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const RowStats stats = {logp, row_max, row_logsum, entropy};
  const RowTransforms transforms(temperature, softcap, temperatures);
  const SortedLabels own(plan, first_row, last_row, vocab_size, threads);
  if (!own.made()) return SVPO_NO_MEMORY;
  for_each(last_row - first_row, 256, 256 * (last_row - first_row), threads, [&](int64_t i) {
    const int64_t r = first_row + i;
    if (rows[r] < 0) return missing_row(plan, r, stats);
    const Partial sum = {found[3 * r], static_cast<float>(found[3 * r + 1]), found[3 * r + 2]};
    finish_row<float>(plan, r, own.rows[i], nullptr, label_z0, sum, transforms.of(r), stats);
  });
  return SVPO_OK;
}

extern "C" int SVPO_ENTRY(linear_rows_unit)(
    void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row, int64_t first_column, int64_t columns,
    const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N,
    const float* label_z0, int64_t vocab_size, double temperature, double softcap, const float* temperatures,
    const float* logp, const float* row_max, const float* row_logsum, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const RowStats stats = given(logp, row_max, row_logsum, nullptr);
  const RowTransforms transforms(temperature, softcap, temperatures);
  const Tile tile = {z, z, stride_z, stride_z, first_row, last_row, first_column, columns};
  auto unit = [&](auto tag, int64_t r, RowLabels own, auto* from_row, auto* to_row, int64_t from, int64_t to) {
    const RowGrad one = {1.0, 0.0, likeliest(own, logp)};
    gradient_columns<decltype(tag)::mode>(plan, r, own, one, nullptr, from_row, to_row, label_z0, from, to,
                                          transforms.of(r), stats, false);
  };
  return for_panels(tile, dtype, transforms.all.mode, plan, vocab_size, threads, unit);
}

extern "C" int SVPO_ENTRY(linear_row_stats)(
    const void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row, const int64_t* rows,
    const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N, const float* label_z0,
    int64_t vocab_size, double temperature, double softcap, const float* temperatures, const float* row_max,
    float* sums, float* squares, float* total, float* top, int64_t* top_at, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const RowTransforms transforms(temperature, softcap, temperatures);
  const int64_t count = last_row - first_row;
  const Panels panels(vocab_size);
  const SortedLabels own(plan, first_row, last_row, vocab_size, threads);
  Scratch<MoreStats> parts(count * panels.per_row);
  if (!own.made() || !parts.data) return SVPO_NO_MEMORY;
  return for_dtype_and_mode(dtype, transforms.all.mode, [&](auto type, auto tag) {
    using T = decltype(type);
    for_each(count * panels.per_row, panels.grain, count * vocab_size, threads, [&](int64_t task) {
      const int64_t i = panels.row(task), r = first_row + i;
      if (rows[r] >= 0)
        parts[task] = more_stats<decltype(tag)::mode>(plan, own.rows[i], static_cast<const T*>(z) + i * stride_z, label_z0,
                                                      panels.from(task), panels.to(task), transforms.of(r), row_max[r]);
    });
    for_each(count, 1024, count * panels.per_row, threads, [&](int64_t i) {
      MoreStats sum = {0.0, 0.0, 0.0, rows[first_row + i] < 0 ? 0.0f : -__builtin_inff(), 0};
      for (int64_t k = 0; rows[first_row + i] >= 0 && k < panels.per_row; ++k) {
        const MoreStats& part = parts[i * panels.per_row + k];
        sum.sums += part.sums, sum.squares += part.squares, sum.total += part.total;
        if (part.top > sum.top) sum.top = part.top, sum.at = part.at;
      }
      const int64_t r = first_row + i;
      sums[r] = static_cast<float>(sum.sums), squares[r] = static_cast<float>(sum.squares);
      total[r] = static_cast<float>(sum.total);
      top[r] = sum.top, top_at[r] = sum.at;
    });
    return SVPO_OK;
  });
}

extern "C" int SVPO_ENTRY(linear_rows_grad)(
    const void* z, void* out, int dtype, int64_t stride_z, int64_t stride_out, int64_t first_row, int64_t last_row,
    int64_t first_column, int64_t columns, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
    const int64_t* first, int64_t R, int64_t N, const float* label_z0, int64_t vocab_size, double temperature,
    double softcap, const float* temperatures, const float* logp, const float* row_max, const float* row_logsum,
    const float* entropy, const float* g, const float* G, const float* E, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const RowStats stats = given(logp, row_max, row_logsum, entropy);
  const RowTransforms transforms(temperature, softcap, temperatures);
  const Tile tile = {z, out, stride_z, stride_out, first_row, last_row, first_column, columns};
  auto gradient = [&](auto tag, int64_t r, RowLabels own, auto* from_row, auto* to_row, int64_t from, int64_t to) {
    entropy_gradient_columns<decltype(tag)::mode>(plan, r, own, {G[r], E[r]}, g, from_row, to_row, label_z0, from, to,
                                                  transforms.of(r), stats);
  };
  return for_panels(tile, dtype, transforms.all.mode, plan, vocab_size, threads, gradient);
}

extern "C" int SVPO_ENTRY(reduce_steps)(const float* logp, const int64_t* step_order, const int64_t* step_start,
                                        int64_t N, int64_t S, int reduction, float* out, int threads) {
  reduce_to_steps(logp, step_order, step_start, N, S, reduction, out, threads);
  return SVPO_OK;
}

extern "C" int SVPO_ENTRY(row_grads)(
    const float* grad_out, const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first,
    const int64_t* step_ids, const int64_t* step_start, int64_t R, int64_t N, int64_t S, int reduction, float* g,
    float* G, int threads) {
  const Plan plan = {rows, row_start, labels, first, R, N};
  const Upstream upstream = {grad_out, step_ids, step_start, S, reduction};
  for (int64_t n = R ? row_start[R] : 0; n < N; ++n) g[n] = 0.0f;
  for_each(R, 1024, N * 16, threads, [&](int64_t r) {
    merge_upstream(plan, r, upstream, g);
    double total = 0.0;
    for (int64_t n = row_start[r]; n < row_start[r + 1]; ++n) total += g[n];
    G[r] = static_cast<float>(total);
  });
  return SVPO_OK;
}

extern "C" int SVPO_ENTRY(branch_hidden)(
    const void* uw, const void* weight, void* out, int dtype, int64_t D, int64_t stride_uw, int64_t stride_w,
    int64_t first_row, int64_t last_row, const int64_t* row_start, const int64_t* labels, const float* terms,
    const float* G, int threads) {
  const int64_t count = last_row - first_row;
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    for_each(count, 4, count * D, threads, [&](int64_t i) {
      const int64_t r = first_row + i, begin = row_start[r], end = row_start[r + 1];
      const T* const source = static_cast<const T*>(uw) + i * stride_uw;
      T* const target = static_cast<T*>(out) + i * D;
      bool branches = false;
      for (int64_t n = begin; n < end; ++n) branches |= terms[n] != 0.0f;
      if (!branches) return scale_row(target, source, G[r], D);
      alignas(64) float sum[kSlice];
      for (int64_t d = 0; d < D; d += kSlice) {
        const int64_t width = D - d < kSlice ? D - d : kSlice;
        scale_row(sum, source + d, G[r], width);
        for (int64_t n = begin; n < end; ++n)
          if (terms[n] != 0.0f) add_scaled(sum, static_cast<const T*>(weight) + labels[n] * stride_w + d, terms[n], width);
        scale_row(target + d, sum, 1.0f, width);
      }
    });
    return SVPO_OK;
  });
}

extern "C" int SVPO_ENTRY(branch_weight)(
    void* dweight, float* dbias, const void* h, int dtype_w, int dtype, int64_t D, int64_t stride_dw, int64_t stride_h,
    const int64_t* row_start, const int64_t* labels, const float* coefficients, int64_t R, int64_t N, int threads) {
  Scratch<int64_t> starts(N + 1);
  Scratch<Term> terms(N);
  if (!starts.data || !terms.data) return SVPO_NO_MEMORY;
  int64_t count = 0, groups = 0;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = row_start[r]; n < row_start[r + 1]; ++n)
      if (coefficients[n] != 0.0f) terms[count++] = {labels[n], r, coefficients[n]};
  // By label, then row: each row of dW is summed in fp32 by one task, in a fixed order, from 0, and rounded once.
  qsort(terms.data, count, sizeof(Term), compare_terms);
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || terms[i].label != terms[i - 1].label) starts[groups++] = i;
  starts[groups] = count;
  for (int64_t group = 0; dbias && group < groups; ++group) {
    double sum = 0.0;
    for (int64_t i = starts[group]; i < starts[group + 1]; ++i) sum += terms[i].coefficient;
    dbias[terms[starts[group]].label] += static_cast<float>(sum);
  }
  if (!dweight) return SVPO_OK;
  const int64_t slices = (D + kSlice - 1) / kSlice;
  return for_dtype(dtype, [&](auto type) {
    return for_dtype(dtype_w, [&](auto type_w) {
      using T = decltype(type);
      using W = decltype(type_w);
      for_each(groups * slices, 1, count * D, threads, [&](int64_t task) {
        const int64_t group = task / slices, d = task % slices * kSlice, width = D - d < kSlice ? D - d : kSlice;
        W* const target = static_cast<W*>(dweight) + terms[starts[group]].label * stride_dw + d;
        alignas(64) float sum[kSlice];
        memset(sum, 0, sizeof(sum));
        for (int64_t i = starts[group]; i < starts[group + 1]; ++i)
          add_scaled(sum, static_cast<const T*>(h) + terms[i].row * stride_h + d, terms[i].coefficient, width);
        add_scaled(sum, target, 1.0f, width);
        scale_row(target, sum, 1.0f, width);
      });
      return SVPO_OK;
    });
  });
}
