// Process reward heads: two dots per step end, and gradients that touch no other row of hidden.
//
//   z = hidden[position] . weight[row] + bias[row],  d = cap(z_good) - cap(z_bad), or z_good with one class (bad < 0)
//
// The two head rows are widened once; hidden is read once in the forward and once for the weight's gradient. Sums run in
// double: the rows come from memory, which leaves the time, and a loss is one number, which shows every error.
#include "../numerics.h"
#include "wide.h"

namespace {

constexpr int64_t kColumns = 512;    // columns of the weight's gradient that one task sums
constexpr int64_t kRows = 64;        // steps whose rows stay in cache while those columns are visited
constexpr int64_t kGrain = 1 << 15;  // elements of hidden that are worth a thread

template <class T>
struct Hidden {
  const T* data;
  const void* positions;
  int wide;
  int64_t B, L, stride_b, stride_l, D;
  int64_t position(int64_t s) const {
    return wide ? static_cast<const int64_t*>(positions)[s] : static_cast<const int32_t*>(positions)[s];
  }
  const T* row(int64_t s) const {
    const int64_t at = position(s);
    return data + at / L * stride_b + at % L * stride_l;
  }
};

// The head rows that count for and against a step, widened; `bad` is null with one class.
struct Head {
  Scratch<double> rows;
  const double *good, *bad;
  double good_bias = 0.0, bad_bias = 0.0;
  Head(int64_t D, bool two) : rows(2 * D), good(rows.data), bad(two ? rows.data + D : nullptr) {}
};

template <class W>
void widen_row(const W* from, double* to, int64_t D) {
  int64_t i = 0;
  for (; i + kWidth <= D; i += kWidth) wide_store(to + i, widen(load(from + i)));
  for (; i < D; ++i) to[i] = to_float(from[i]);
}

int fill_head(Head& head, const void* weight, int weight_dtype, int64_t stride, const void* bias, int bias_dtype,
              int64_t good, int64_t bad, int64_t D) {
  if (!head.rows.data) return SVPO_NO_MEMORY;
  const int status = for_dtype(weight_dtype, [&](auto type) {
    using W = decltype(type);
    widen_row(static_cast<const W*>(weight) + good * stride, head.rows.data, D);
    if (bad >= 0) widen_row(static_cast<const W*>(weight) + bad * stride, head.rows.data + D, D);
    return SVPO_OK;
  });
  if (status != SVPO_OK || !bias) return status;
  return for_dtype(bias_dtype, [&](auto type) {
    using W = decltype(type);
    head.good_bias = to_float(static_cast<const W*>(bias)[good]);
    if (bad >= 0) head.bad_bias = to_float(static_cast<const W*>(bias)[bad]);
    return SVPO_OK;
  });
}

// Dots of up to two rows with one or two head rows; every row is read once, and a row alone gives the same bits.
template <bool two, int count, class T>
void dots(const T* const* h, const double* good, const double* bad, int64_t D, double (*out)[2]) {
  Wide g[count], b[count];
  for (int r = 0; r < count; ++r) g[r] = b[r] = wide_zero();
  int64_t i = 0;
  for (; i + kWidth <= D; i += kWidth) {
    const Wide wg = wide_load(good + i), wb = two ? wide_load(bad + i) : wg;
    for (int r = 0; r < count; ++r) {
      const Wide x = widen(load(h[r] + i));
      g[r] = fma(x, wg, g[r]);
      if (two) b[r] = fma(x, wb, b[r]);
    }
  }
  for (int r = 0; r < count; ++r) {
    out[r][0] = hsum(g[r]);
    out[r][1] = two ? hsum(b[r]) : 0.0;
    for (int64_t k = i; k < D; ++k) {
      const double x = to_float(h[r][k]);
      out[r][0] += x * good[k];
      if (two) out[r][1] += x * bad[k];
    }
  }
}

template <class T>
bool position_out_of_range(const Hidden<T>& hidden, int64_t S) {
  for (int64_t s = 0; s < S; ++s)
    if (hidden.position(s) < 0 || hidden.position(s) >= hidden.B * hidden.L) return true;
  return false;
}

// Writes the logits, before the softcap, and the decisions d of all steps.
template <class T>
void head_logits(const Hidden<T>& hidden, const Head& head, int64_t S, double softcap, int threads, float* logits,
                 double* d) {
  parallel_for(S, kGrain / (hidden.D + 1) + 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; s += 2) {
      const bool pair = s + 1 < last;
      const T* const rows[2] = {hidden.row(s), hidden.row(pair ? s + 1 : s)};
      double z[2][2];
      if (head.bad && pair) dots<true, 2>(rows, head.good, head.bad, hidden.D, z);
      else if (head.bad) dots<true, 1>(rows, head.good, head.bad, hidden.D, z);
      else if (pair) dots<false, 2>(rows, head.good, head.bad, hidden.D, z);
      else dots<false, 1>(rows, head.good, head.bad, hidden.D, z);
      for (int r = 0; r < 1 + pair; ++r) {
        z[r][0] += head.good_bias;
        z[r][1] += head.bad_bias;
        logits[2 * (s + r)] = static_cast<float>(z[r][0]);
        logits[2 * (s + r) + 1] = static_cast<float>(z[r][1]);
        d[s + r] = svpo_decision(z[r][0], z[r][1], head.bad, softcap);
      }
    }
  });
}

// From d upstream to z upstream: a gradient of the head's logits.
struct Coefficients { double good, bad; };

Coefficients through_cap(double g, const float* z, bool two, double softcap) {
  return {g * svpo_logit_slope(z[0], 1.0, softcap), two ? -g * svpo_logit_slope(z[1], 1.0, softcap) : 0.0};
}

// Visits the groups of equal positions: order (S,) sorted by position, then by s.
template <class T>
void sort_by_position(const Hidden<T>& hidden, int64_t S, int64_t* order) {
  bool sorted = true;
  for (int64_t s = 0; s < S; ++s) {
    order[s] = s;
    sorted = sorted && (s == 0 || hidden.position(s - 1) <= hidden.position(s));
  }
  auto before = [&](int64_t a, int64_t b) {
    const int64_t at = hidden.position(a), bt = hidden.position(b);
    return at != bt ? at < bt : a < b;
  };
  // Shell sort: the order is total, so it need not be stable.
  for (int64_t gap = sorted ? 0 : S / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)
    for (int64_t i = gap; i < S; ++i) {
      const int64_t s = order[i];
      int64_t j = i;
      for (; j >= gap && before(s, order[j - gap]); j -= gap) order[j] = order[j - gap];
      order[j] = s;
    }
}

// Gradient of hidden at the positions; the caller has filled it with zeros. A position that comes several times gets the
// sum of its coefficients, so that its row is rounded once.
template <class T>
int hidden_gradient(const Hidden<T>& hidden, const Head& head, const Coefficients* c, int64_t S, int threads, T* grad) {
  Scratch<int64_t> order(S);
  if (!order.data) return SVPO_NO_MEMORY;
  sort_by_position(hidden, S, order.data);
  const int64_t D = hidden.D;
  parallel_for(S, kGrain / (D + 1) + 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = hidden.position(order[i]);
      if (i > 0 && hidden.position(order[i - 1]) == at) continue;  // its group began earlier
      Coefficients sum = {0.0, 0.0};
      for (int64_t j = i; j < S && hidden.position(order[j]) == at; ++j)
        sum.good += c[order[j]].good, sum.bad += c[order[j]].bad;
      T* const row = grad + at * D;
      const Wide good = wide_set1(sum.good), bad = wide_set1(sum.bad);
      int64_t k = 0;
      for (; k + kWidth <= D; k += kWidth) {
        Wide x = fma(good, wide_load(head.good + k), wide_zero());
        if (head.bad) x = fma(bad, wide_load(head.bad + k), x);
        store(row + k, narrowed(x));
      }
      for (; k < D; ++k)
        row[k] = from_float<T>(static_cast<float>(sum.good * head.good[k] + (head.bad ? sum.bad * head.bad[k] : 0.0)));
    }
  });
  return SVPO_OK;
}

// Adds rows[r] * c[r] of `count` steps to sums of `width` columns from `start`.
template <bool two, class T>
void add_columns(const T* const* rows, const Coefficients* c, int count, int64_t start, int64_t width, double* good,
                 double* bad) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) {
    Wide g = wide_load(good + i), b = two ? wide_load(bad + i) : g;
    for (int r = 0; r < count; ++r) {
      const Wide x = widen(load(rows[r] + start + i));
      g = fma(x, wide_set1(c[r].good), g);
      if (two) b = fma(x, wide_set1(c[r].bad), b);
    }
    wide_store(good + i, g);
    if (two) wide_store(bad + i, b);
  }
  for (; i < width; ++i)
    for (int r = 0; r < count; ++r) {
      const double x = to_float(rows[r][start + i]);
      good[i] += x * c[r].good;
      if (two) bad[i] += x * c[r].bad;
    }
}

// Gradients of the two head rows, sums over the steps in order; tasks share columns, so that the thread count does not
// matter.
template <class T, class W>
void weight_gradient(const Hidden<T>& hidden, const Coefficients* c, int64_t S, bool two, int threads, W* good, W* bad) {
  const int64_t D = hidden.D, blocks = (D + kColumns - 1) / kColumns;
  parallel_for(blocks, kGrain / (kColumns * (S + 1)) + 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * kColumns, width = D - start < kColumns ? D - start : kColumns;
      double sums[2][kColumns] = {};
      for (int64_t s = 0; s < S; s += kRows) {
        const int count = static_cast<int>(S - s < kRows ? S - s : kRows);
        const T* rows[kRows];
        for (int r = 0; r < count; ++r) rows[r] = hidden.row(s + r);
        if (two) add_columns<true>(rows, c + s, count, start, width, sums[0], sums[1]);
        else add_columns<false>(rows, c + s, count, start, width, sums[0], sums[1]);
      }
      for (int64_t i = 0; i < width; ++i) {
        good[start + i] = from_float<W>(static_cast<float>(sums[0][i]));
        if (two) bad[start + i] = from_float<W>(static_cast<float>(sums[1][i]));
      }
    }
  });
}

template <class W>
void bias_gradient(const Coefficients* c, int64_t S, int64_t good, int64_t bad, W* grad) {
  double sum[2] = {0.0, 0.0};
  for (int64_t s = 0; s < S; ++s) sum[0] += c[s].good, sum[1] += c[s].bad;
  grad[good] = from_float<W>(static_cast<float>(sum[0]));
  if (bad >= 0) grad[bad] = from_float<W>(static_cast<float>(sum[1]));
}

// All gradients of a head from the coefficients; a null pointer is not needed.
template <class T>
int head_gradients(const Hidden<T>& hidden, const Coefficients* c, int64_t S, const void* weight, int weight_dtype,
                   int64_t stride, int bias_dtype, int64_t good, int64_t bad, int threads, void* grad_hidden,
                   void* grad_weight, void* grad_bias) {
  int status = SVPO_OK;
  const int64_t D = hidden.D;
  if (grad_hidden) {
    Head head(D, bad >= 0);
    status = fill_head(head, weight, weight_dtype, stride, nullptr, 0, good, bad, D);
    if (status == SVPO_OK)
      status = hidden_gradient(hidden, head, c, S, threads, static_cast<T*>(grad_hidden));
  }
  if (status == SVPO_OK && grad_weight)
    status = for_dtype(weight_dtype, [&](auto type) {
      using W = decltype(type);
      W* const rows = static_cast<W*>(grad_weight);
      weight_gradient(hidden, c, S, bad >= 0, threads, rows + good * D, rows + (bad >= 0 ? bad : 0) * D);
      return SVPO_OK;
    });
  if (status == SVPO_OK && grad_bias)
    status = for_dtype(bias_dtype, [&](auto type) {
      bias_gradient(c, S, good, bad, static_cast<decltype(type)*>(grad_bias));
      return SVPO_OK;
    });
  return status;
}

}  // namespace

extern "C" int SVPO_ENTRY(prm_scores_fwd)(const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b,
                                          int64_t stride_l, int64_t D, const void* positions, int wide, int64_t S,
                                          const void* weight, int weight_dtype, int64_t weight_stride, const void* bias,
                                          int bias_dtype, int64_t good, int64_t bad, int activation, double softcap,
                                          float* scores, float* logits, int threads) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const Hidden<T> h = {static_cast<const T*>(hidden), positions, wide, B, L, stride_b, stride_l, D};
    if (position_out_of_range(h, S)) return SVPO_BAD_INDEX;
    Head head(D, bad >= 0);
    const int status = fill_head(head, weight, weight_dtype, weight_stride, bias, bias_dtype, good, bad, D);
    if (status != SVPO_OK) return status;
    Scratch<double> d(S);
    if (!d.data) return SVPO_NO_MEMORY;
    head_logits(h, head, S, softcap, threads, logits, d.data);
    for (int64_t s = 0; s < S; ++s) scores[s] = static_cast<float>(svpo_score(d[s], bad >= 0, activation));
    return SVPO_OK;
  });
}

// grad_hidden (B, L, D) and, with more than two rows, grad_weight come filled with zeros; null is not needed.
extern "C" int SVPO_ENTRY(prm_scores_bwd)(const float* grad, const void* hidden, int dtype, int64_t B, int64_t L,
                                          int64_t stride_b, int64_t stride_l, int64_t D, const void* positions,
                                          int wide, int64_t S, const void* weight, int weight_dtype,
                                          int64_t weight_stride, int bias_dtype, const float* logits, int64_t good,
                                          int64_t bad, int activation, double softcap, void* grad_hidden,
                                          void* grad_weight, void* grad_bias, int threads) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const Hidden<T> h = {static_cast<const T*>(hidden), positions, wide, B, L, stride_b, stride_l, D};
    if (position_out_of_range(h, S)) return SVPO_BAD_INDEX;
    Scratch<Coefficients> c(S);
    if (!c.data) return SVPO_NO_MEMORY;
    for (int64_t s = 0; s < S; ++s) {
      const float* const z = logits + 2 * s;
      const double slope = svpo_score_slope(svpo_decision(z[0], z[1], bad >= 0, softcap), bad >= 0, activation);
      c[s] = through_cap(grad[s] * slope, z, bad >= 0, softcap);
    }
    return head_gradients(h, c.data, S, weight, weight_dtype, weight_stride, bias_dtype, good, bad, threads,
                          grad_hidden, grad_weight, grad_bias);
  });
}

// labels (S,), NaN = unlabelled. loss () or, with SVPO_NONE, (S,).
extern "C" int SVPO_ENTRY(prm_loss_fwd)(const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b,
                                        int64_t stride_l, int64_t D, const void* positions, int wide, int64_t S,
                                        const float* labels, const void* weight, int weight_dtype,
                                        int64_t weight_stride, const void* bias, int bias_dtype, int64_t good,
                                        int64_t bad, int reduction, float* loss, float* logits, int threads) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const Hidden<T> h = {static_cast<const T*>(hidden), positions, wide, B, L, stride_b, stride_l, D};
    if (position_out_of_range(h, S)) return SVPO_BAD_INDEX;
    for (int64_t s = 0; s < S; ++s)
      if (labels[s] < 0.0f || labels[s] > 1.0f) return SVPO_BAD_VALUE;
    Head head(D, bad >= 0);
    const int status = fill_head(head, weight, weight_dtype, weight_stride, bias, bias_dtype, good, bad, D);
    if (status != SVPO_OK) return status;
    Scratch<double> d(S);
    if (!d.data) return SVPO_NO_MEMORY;
    head_logits(h, head, S, 0.0, threads, logits, d.data);
    double total = 0.0;
    int64_t labelled = 0;
    for (int64_t s = 0; s < S; ++s) {
      const bool known = labels[s] == labels[s];
      const double value = known ? svpo_label_loss(d[s], labels[s]) : 0.0;
      labelled += known;
      total += value;
      if (reduction == SVPO_NONE) loss[s] = static_cast<float>(value);
    }
    if (reduction != SVPO_NONE)
      *loss = static_cast<float>(reduction == SVPO_MEAN && labelled ? total / static_cast<double>(labelled) : total);
    return SVPO_OK;
  });
}

// As prm_scores_bwd; grad () or, with SVPO_NONE, (S,).
extern "C" int SVPO_ENTRY(prm_loss_bwd)(const float* grad, const void* hidden, int dtype, int64_t B, int64_t L,
                                        int64_t stride_b, int64_t stride_l, int64_t D, const void* positions, int wide,
                                        int64_t S, const float* labels, const void* weight, int weight_dtype,
                                        int64_t weight_stride, int bias_dtype, const float* logits, int64_t good,
                                        int64_t bad, int reduction, void* grad_hidden, void* grad_weight,
                                        void* grad_bias, int threads) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const Hidden<T> h = {static_cast<const T*>(hidden), positions, wide, B, L, stride_b, stride_l, D};
    if (position_out_of_range(h, S)) return SVPO_BAD_INDEX;
    Scratch<Coefficients> c(S);
    if (!c.data) return SVPO_NO_MEMORY;
    int64_t labelled = 0;
    for (int64_t s = 0; s < S; ++s) labelled += labels[s] == labels[s];
    const double scale = reduction == SVPO_MEAN && labelled ? 1.0 / static_cast<double>(labelled) : 1.0;
    for (int64_t s = 0; s < S; ++s) {
      const float* const z = logits + 2 * s;
      const double y = labels[s], g = (reduction == SVPO_NONE ? grad[s] : *grad) * scale;
      const double slope = y == y ? svpo_label_slope(svpo_decision(z[0], z[1], bad >= 0, 0.0), y) : 0.0;
      c[s] = through_cap(y == y ? g * slope : 0.0, z, bad >= 0, 0.0);
    }
    return head_gradients(h, c.data, S, weight, weight_dtype, weight_stride, bias_dtype, good, bad, threads,
                          grad_hidden, grad_weight, grad_bias);
  });
}
