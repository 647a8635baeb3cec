// Process reward heads on CUDA: two dots per step end, and gradients that touch no other row of hidden.
//
//   z = hidden[position] . weight[row] + bias[row],  d = cap(z_good) - cap(z_bad), or z_good with one class (bad < 0)
//
//   forward    a block a step reads its row of hidden once; a loss over all steps takes a second launch that sums
//   backward   a block a step writes its row of the gradient of hidden; blocks of columns sum the head's rows
//
// Gradients of the logits are computed where they are needed: a few exponentials a step, for a launch less. Sums run in
// fp64 and a fixed order. A position that comes several times is written by its first step, with the sum over all.
#include "small.cuh"

namespace {

constexpr int kRowThreads = 512;  // most threads of a block that reads a row: D = 4096 is one round trip to memory
constexpr int kThreads = 256;     // of the other blocks

// Threads that a row of D columns keeps busy.
int threads_for(int64_t D) {
  const int64_t warps = ceil_div(D, kColumns * kWarp);
  return warps < 1 ? kWarp : warps < kRowThreads / kWarp ? static_cast<int>(warps) * kWarp : kRowThreads;
}

// -- rows --------------------------------------------------------------------------------------------------------------

template <class T>
struct Hidden {
  const T* data;
  Indices positions;
  int64_t B, L, stride_b, stride_l, D, S;
  SVPO_DEVICE bool has(int64_t at) const { return at >= 0 && at < B * L; }
  SVPO_DEVICE const T* row(int64_t at) const { return data + at / L * stride_b + at % L * stride_l; }
};

// The head rows that count for and against a step; bad < 0: one class.
template <class W>
struct Head {
  const W* data;
  int64_t stride, good, bad;
  SVPO_DEVICE bool two() const { return bad >= 0; }
  SVPO_DEVICE const W* good_row() const { return data + good * stride; }
  SVPO_DEVICE const W* bad_row() const { return data + (two() ? bad : good) * stride; }
};

SVPO_DEVICE void store_as(void* to, int dtype, int64_t i, double x) {
  const float value = static_cast<float>(x);
  if (dtype == SVPO_FP32) static_cast<float*>(to)[i] = value;
  else if (dtype == SVPO_BF16) static_cast<bf16*>(to)[i] = from_float<bf16>(value);
  else static_cast<fp16*>(to)[i] = from_float<fp16>(value);
}

// -- forward -----------------------------------------------------------------------------------------------------------

// What becomes of a step's logits: its score or, with labels, its loss.
struct Result {
  const float* labels;
  int activation;
  double softcap;
  float *out, *logits;  // (S,), null when the losses are summed, and (S, 2)
  double* losses;       // (S,) or null
};

SVPO_DEVICE void write_step(const Result& result, int64_t s, double good, double bad, bool two) {
  const double d = svpo_decision(good, bad, two, result.softcap);
  result.logits[2 * s] = static_cast<float>(good);
  result.logits[2 * s + 1] = static_cast<float>(bad);
  double value;
  if (!result.labels) value = svpo_score(d, two, result.activation);
  else value = result.labels[s] == result.labels[s] ? svpo_label_loss(d, result.labels[s]) : 0.0;
  if (result.out) result.out[s] = static_cast<float>(value);
  if (result.losses) result.losses[s] = value;
}

// Grid (S,). A position that does not exist is not read and gives NaN.
template <class T, class W>
SVPO_KERNEL(kRowThreads, 1) head_kernel(Hidden<T> hidden, Head<W> head, Floats bias, Result result, int threads) {
  SVPO_SHARED(double, dots_of_warps, 2 * kRowThreads / kWarp);
  const int64_t s = block_x(), at = hidden.positions[s], D = hidden.D;
  double dots[2] = {};
  if (hidden.has(at)) {
    const T* const row = hidden.row(at);
    for (int64_t column = thread_x() * kColumns; column < D; column += threads * kColumns) {
      float x[kColumns], good[kColumns], bad[kColumns];
      load_columns(row, column, D, x);
      load_columns(head.good_row(), column, D, good);
      load_columns(head.bad_row(), column, D, bad);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        dots[0] = ::fma(static_cast<double>(x[i]), static_cast<double>(good[i]), dots[0]);
        if (head.two()) dots[1] = ::fma(static_cast<double>(x[i]), static_cast<double>(bad[i]), dots[1]);
      }
    }
  }
  block_sums(dots, dots_of_warps, threads);
  if (thread_x() != 0) return;
  const double missing = hidden.has(at) ? 0.0 : NAN;
  write_step(result, s, dots[0] + bias[head.good] + missing,
             head.two() ? dots[1] + bias[head.bad] + missing : 0.0, head.two());
}

// Grid (1,). The sum of losses (S,), or their mean over the labelled steps.
SVPO_KERNEL(kThreads, 1) loss_kernel(const double* losses, const float* labels, int64_t S, bool mean, float* loss) {
  SVPO_SHARED(double, sums_of_warps, 2 * kThreads / kWarp);
  double sums[2] = {};
  for (int64_t s = thread_x(); s < S; s += kThreads) {
    sums[0] += losses[s];
    sums[1] += labels[s] == labels[s];
  }
  block_sums(sums, sums_of_warps, kThreads);
  if (thread_x() == 0) *loss = static_cast<float>(mean && sums[1] > 0.0 ? sums[0] / sums[1] : sums[0]);
}

// -- backward ----------------------------------------------------------------------------------------------------------

// Gradients of a step's two logits.
struct Coefficients { double good, bad; };

// Upstreams (S,), or one for all steps, of scores or of losses, and what leads from there to the logits.
struct Upstream {
  const float *grad, *labels, *logits;
  bool each, two, mean;  // mean: still to be divided by the number of labelled steps
  int activation;
  double softcap;
  SVPO_DEVICE bool known(int64_t s) const { return !labels || labels[s] == labels[s]; }
  SVPO_DEVICE Coefficients of(int64_t s) const {
    if (!known(s)) return {0.0, 0.0};
    const double good = logits[2 * s], bad = logits[2 * s + 1], d = svpo_decision(good, bad, two, softcap);
    const double slope = labels ? svpo_label_slope(d, labels[s]) : svpo_score_slope(d, two, activation);
    const double g = grad[each ? s : 0] * slope;
    return {g * svpo_logit_slope(good, 1.0, softcap), two ? -g * svpo_logit_slope(bad, 1.0, softcap) : 0.0};
  }
  SVPO_DEVICE double scale(double labelled) const { return mean && labelled > 0.0 ? 1.0 / labelled : 1.0; }
};

// Grid (S,). Rows of grad (B * L, D) at the positions; the others are not touched.
template <class T, class W>
SVPO_KERNEL(kRowThreads, 1)
head_hidden_kernel(Hidden<T> hidden, Head<W> head, Upstream upstream, T* grad, int threads) {
  enum { kGood, kBad, kEarlier, kLabelled, kSums };
  SVPO_SHARED(double, sums_of_warps, kSums * kRowThreads / kWarp);
  const int64_t s = block_x(), at = hidden.positions[s], D = hidden.D;
  if (!hidden.has(at)) return;
  double sums[kSums] = {};
  for (int64_t other = thread_x(); other < hidden.S; other += threads) {
    if (upstream.mean) sums[kLabelled] += upstream.known(other);
    if (hidden.positions[other] != at) continue;
    const Coefficients c = upstream.of(other);
    sums[kGood] += c.good;
    sums[kBad] += c.bad;
    sums[kEarlier] += other < s;
  }
  block_sums(sums, sums_of_warps, threads);
  if (sums[kEarlier] != 0.0) return;
  const double scale = upstream.scale(sums[kLabelled]), c_good = sums[kGood] * scale, c_bad = sums[kBad] * scale;
  for (int64_t column = thread_x() * kColumns; column < D; column += threads * kColumns) {
    float good[kColumns], bad[kColumns];
    load_columns(head.good_row(), column, D, good);
    load_columns(head.bad_row(), column, D, bad);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const double x = c_good * good[i];
      good[i] = static_cast<float>(head.two() ? ::fma(c_bad, static_cast<double>(bad[i]), x) : x);
    }
    store_columns(grad + at * D, column, D, good);
  }
}

constexpr int kGroups = 8;                       // groups of kColumns that a block sums: 128 bytes a row of 16 bits
constexpr int kTile = kGroups * kColumns;        // its columns
constexpr int kSweep = kThreads / kGroups;       // steps that it reads at a time, one a thread of a group
constexpr int kTileWarps = kThreads / kWarp;
constexpr int kFlight = 4;                       // sweeps whose loads are under way at once
static_assert(kThreads % (kFlight * kSweep) == 0, "what is behind the last step is read too, and counts 0");

// Where the gradients of a head go; null: not needed.
struct HeadGradients {
  void* weight;
  int weight_dtype;
  void* bias;
  int bias_dtype;
  int64_t good, bad;
};

// Adds c h over all steps: those of a thread in order, kSweep apart. Returns the sums of all c and the labelled steps.
template <class T>
SVPO_DEVICE void add_steps(const Hidden<T>& hidden, const Upstream& upstream, int64_t column, bool rows,
                           double (&good)[kColumns], double (&bad)[kColumns], double (&totals)[3]) {
  SVPO_SHARED(double, good_of_steps, kThreads);
  SVPO_SHARED(double, bad_of_steps, kThreads);
  SVPO_SHARED(int64_t, rows_of_steps, kThreads);
  const int t = thread_x();
  for (int64_t chunk = 0; chunk < hidden.S; chunk += kThreads) {
    const int64_t own = chunk + t, count = hidden.S - chunk < kThreads ? hidden.S - chunk : kThreads;
    Coefficients c = {0.0, 0.0};
    if (own < hidden.S) {
      c = upstream.of(own);
      totals[0] += c.good;
      totals[1] += c.bad;
      totals[2] += upstream.known(own);
    }
    if (!rows) continue;
    sync_threads();  // the chunk before has been read
    good_of_steps[t] = c.good;
    bad_of_steps[t] = c.bad;
    rows_of_steps[t] = own < hidden.S ? hidden.positions[own] : -1;
    sync_threads();
    for (int64_t i = t / kGroups; i < count; i += kFlight * kSweep) {
      float x[kFlight][kColumns] = {};
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t at = rows_of_steps[i + k * kSweep];
        if (column < hidden.D && hidden.has(at)) load_columns(hidden.row(at), column, hidden.D, x[k]);
      }
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const double c_good = good_of_steps[i + k * kSweep], c_bad = bad_of_steps[i + k * kSweep];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          good[j] = ::fma(static_cast<double>(x[k][j]), c_good, good[j]);
          if (upstream.two) bad[j] = ::fma(static_cast<double>(x[k][j]), c_bad, bad[j]);
        }
      }
    }
  }
}

// Grid (tiles of columns, at least 1). The head's rows `good` and `bad`, every column, and its two biases.
template <class T>
SVPO_KERNEL(kThreads, 1) head_weight_kernel(Hidden<T> hidden, Upstream upstream, HeadGradients out) {
  SVPO_SHARED(double, totals_of_warps, 3 * kTileWarps);
  SVPO_SHARED(double, sums_of_warps, 2 * kTile * kTileWarps);
  const int t = thread_x(), group = t % kGroups;
  double good[kColumns] = {}, bad[kColumns] = {}, totals[3] = {};
  add_steps(hidden, upstream, block_x() * kTile + group * kColumns, out.weight != nullptr, good, bad, totals);
  block_sums(totals, totals_of_warps, kThreads);
  const double scale = upstream.scale(totals[2]);
  if (out.bias && block_x() == 0 && t == 0) {
    store_as(out.bias, out.bias_dtype, out.good, totals[0] * scale);
    if (upstream.two) store_as(out.bias, out.bias_dtype, out.bad, totals[1] * scale);
  }
  if (!out.weight) return;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int offset = kGroups; offset < kWarp; offset *= 2) {
      good[j] += shuffle_xor(good[j], offset);
      bad[j] += shuffle_xor(bad[j], offset);
    }
    if (t % kWarp < kGroups) {
      const int at = t / kWarp * 2 * kTile + group * kColumns + j;
      sums_of_warps[at] = good[j];
      sums_of_warps[at + kTile] = bad[j];
    }
  }
  sync_threads();
  const int64_t column = block_x() * kTile + t % kTile;
  if (t >= (upstream.two ? 2 : 1) * kTile || column >= hidden.D) return;
  double sum = sums_of_warps[t];
  for (int warp = 1; warp < kTileWarps; ++warp) sum += sums_of_warps[warp * 2 * kTile + t];
  store_as(out.weight, out.weight_dtype, (t < kTile ? out.good : out.bad) * hidden.D + column, sum * scale);
}

// -- launches ----------------------------------------------------------------------------------------------------------

// A call's tensors, before their dtypes are types.
struct Call {
  const void* hidden;
  int dtype;
  int64_t B, L, stride_b, stride_l, D;
  Indices positions;
  int64_t S;
  const void* weight;
  int weight_dtype;
  int64_t weight_stride, good, bad;
  template <class T>
  Hidden<T> rows() const {
    return {static_cast<const T*>(hidden), positions, B, L, stride_b, stride_l, D, S};
  }
  template <class W>
  Head<W> head() const {
    return {static_cast<const W*>(weight), weight_stride, good, bad};
  }
};

int launch_forward(const Call& call, const void* bias, int bias_dtype, const Result& result, Queue queue) {
  const Floats biases = {bias, bias_dtype, (call.good > call.bad ? call.good : call.bad) + 1};
  const int threads = threads_for(call.D);
  return for_dtype(call.dtype, [&](auto type) {
    return for_dtype(call.weight_dtype, [&](auto weight_type) {
      using T = decltype(type);
      using W = decltype(weight_type);
      return launch("head", head_kernel<T, W>, Grid{call.S, 1}, threads, queue, call.rows<T>(), call.head<W>(), biases,
                    result, threads);
    });
  });
}

int launch_backward(const Call& call, const Upstream& upstream, void* grad_hidden, const HeadGradients& out,
                    Queue queue) {
  const int threads = threads_for(call.D);
  return for_dtype(call.dtype, [&](auto type) {
    using T = decltype(type);
    int status = SVPO_OK;
    if (grad_hidden)
      status = for_dtype(call.weight_dtype, [&](auto weight_type) {
        using W = decltype(weight_type);
        return launch("head_hidden", head_hidden_kernel<T, W>, Grid{call.S, 1}, threads, queue, call.rows<T>(),
                      call.head<W>(), upstream, static_cast<T*>(grad_hidden), threads);
      });
    const int64_t tiles = out.weight ? ceil_div(call.D, kTile) : 0;
    if (status != SVPO_OK || (!out.weight && !out.bias)) return status;
    return launch("head_weight", head_weight_kernel<T>, Grid{tiles > 1 ? tiles : 1, 1}, kThreads, queue,
                  call.rows<T>(), upstream, out);
  });
}

}  // namespace

extern "C" int svpo_cuda_prm_scores_fwd(
    const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l, int64_t D,
    const void* positions, int wide, int64_t S, const void* weight, int weight_dtype, int64_t weight_stride,
    const void* bias, int bias_dtype, int64_t good, int64_t bad, int activation, double softcap, float* scores,
    float* logits, int device, void* stream) {
  const Call call = {hidden, dtype, B, L, stride_b, stride_l, D, {positions, wide}, S,
                     weight, weight_dtype, weight_stride, good, bad};
  return launch_forward(call, bias, bias_dtype, {nullptr, activation, softcap, scores, logits, nullptr},
                        {device, stream});
}

extern "C" int svpo_cuda_prm_scores_bwd(
    const float* grad, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
    int64_t D, const void* positions, int wide, int64_t S, const void* weight, int weight_dtype, int64_t weight_stride,
    int bias_dtype, const float* logits, int64_t good, int64_t bad, int activation, double softcap, void* grad_hidden,
    void* grad_weight, void* grad_bias, int device, void* stream) {
  const Call call = {hidden, dtype, B, L, stride_b, stride_l, D, {positions, wide}, S,
                     weight, weight_dtype, weight_stride, good, bad};
  const Upstream upstream = {grad, nullptr, logits, true, bad >= 0, false, activation, softcap};
  return launch_backward(call, upstream, grad_hidden, {grad_weight, weight_dtype, grad_bias, bias_dtype, good, bad},
                         {device, stream});
}

extern "C" int svpo_cuda_prm_loss_fwd(
    const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l, int64_t D,
    const void* positions, int wide, int64_t S, const float* labels, const void* weight, int weight_dtype,
    int64_t weight_stride, const void* bias, int bias_dtype, int64_t good, int64_t bad, int reduction, float* loss,
    float* logits, void* scratch, int64_t scratch_bytes, int device, void* stream) {
  const Call call = {hidden, dtype, B, L, stride_b, stride_l, D, {positions, wide}, S,
                     weight, weight_dtype, weight_stride, good, bad};
  const Queue queue = {device, stream};
  const bool each = reduction == SVPO_NONE;
  if (!each && scratch_bytes < S * static_cast<int64_t>(sizeof(double)))
    return svpo_cuda_fail("prm_loss_fwd", "scratch is too small");
  double* const losses = each ? nullptr : static_cast<double*>(scratch);
  const Result result = {labels, SVPO_ACTIVATION_NONE, 0.0, each ? loss : nullptr, logits, losses};
  const int status = launch_forward(call, bias, bias_dtype, result, queue);
  if (status != SVPO_OK || each) return status;
  return launch("prm_loss", loss_kernel, Grid{1, 1}, kThreads, queue, losses, labels, S, reduction == SVPO_MEAN, loss);
}

extern "C" int svpo_cuda_prm_loss_bwd(
    const float* grad, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
    int64_t D, const void* positions, int wide, int64_t S, const float* labels, const void* weight, int weight_dtype,
    int64_t weight_stride, int bias_dtype, const float* logits, int64_t good, int64_t bad, int reduction,
    void* grad_hidden, void* grad_weight, void* grad_bias, int device, void* stream) {
  const Call call = {hidden, dtype, B, L, stride_b, stride_l, D, {positions, wide}, S,
                     weight, weight_dtype, weight_stride, good, bad};
  const Upstream upstream = {grad, labels, logits, reduction == SVPO_NONE, bad >= 0, reduction == SVPO_MEAN,
                             SVPO_ACTIVATION_NONE, 0.0};
  return launch_backward(call, upstream, grad_hidden, {grad_weight, weight_dtype, grad_bias, bias_dtype, good, bad},
                         {device, stream});
}
