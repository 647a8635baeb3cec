// The kernels of rows.cuh that read or write whole rows: panel statistics and the gradient.
#include "rows.cuh"

using namespace rows;

namespace {

// -- z = softcap * tanh(z0 / softcap) / temperature --------------------------------------------------------------------

enum Mode { kPlain, kScaled, kCapped };

// z = scale * x, x = z0, or tanh(z0 * inverse). Factors are high + low in fp32, both positive (an infinite logit never
// meets 0 * inf), so that a product by fma is rounded once, as a division is.
struct Transform { float scale_high, scale_low, inverse_high, inverse_low; };

void split(double value, float* high, float* low) {
  *high = static_cast<float>(value);
  if (static_cast<double>(*high) > value) *high = nextafterf(*high, 0.0f);
  *low = static_cast<float>(value - static_cast<double>(*high));
  if (!(*low > 1e-37f)) *low = 1e-37f;
}

Mode mode_of(double temperature, double softcap) {
  return softcap > 0.0 ? kCapped : temperature != 1.0 ? kScaled : kPlain;
}

Transform make_transform(double temperature, double softcap) {
  Transform t;
  split((softcap > 0.0 ? softcap : 1.0) / temperature, &t.scale_high, &t.scale_low);
  split(softcap > 0.0 ? 1.0 / softcap : 1.0, &t.inverse_high, &t.inverse_low);
  return t;
}

// exp in two instructions, for sums: the rounded product with log2(e) costs |x| / 2 ulp where exp(x) is small. A column
// of the gradient stands alone and is also written: it takes expf.
SVPO_DEVICE float exp_(float x) { return exp2_approx(x * 1.4426950408889634f); }

// A finite stand-in for a maximum where all z are -inf, so that their sum is 0 and not NaN.
SVPO_DEVICE float finite_max(float m) { return m == -INFINITY ? 0.0f : m; }

// An exponent to multiply its power with: where that is 0 anyway, -256 stands in for what may be -inf.
SVPO_DEVICE float finite_exponent(float d) { return fmaxf(d, -256.0f); }

// tanh(u) and 1 - tanh(u)^2, both to a few ulp, near 0 and where tanh is 1 in fp32.
SVPO_DEVICE float tanh_slope(float u, float* slope) {
  const float w = u * u;
  // (tanh(u) - u) / u^3 on |u| < 0.6: Chebyshev fit in u^2, relative error of the whole 3e-9
  float p = fmaf(w, -0.005893945303199855f, 0.020794617710118236f);
  p = fmaf(w, p, -0.05378329300033787f);
  p = fmaf(w, p, 0.13331915298814978f);
  p = fmaf(w, p, -0.3333329751012872f);
  const float t = exp_(-2.0f * fabsf(u)), q = reciprocal_approx(1.0f + t);
  *slope = 4.0f * t * q * q;
  return fabsf(u) < 0.6f ? fmaf(u * w, p, u) : copysignf(1.0f - 2.0f * t * q, u);
}

// z of a raw logit; slope = dz/dz0 * temperature under a softcap, else 1.
template <Mode mode>
SVPO_DEVICE float transformed(float z0, const Transform& t, float* slope) {
  *slope = 1.0f;
  if (mode == kPlain) return z0;
  const float x = mode == kCapped ? tanh_slope(fmaf(z0, t.inverse_high, z0 * t.inverse_low), slope) : z0;
  return fmaf(x, t.scale_high, x * t.scale_low);
}

// -- panels ------------------------------------------------------------------------------------------------------------

// Columns that a thread holds in registers: 4 loads of 16 bytes in flight for 16-bit logits, 8 for fp32. A softcap costs
// a tanh a column and registers for it.
template <Mode mode> constexpr int kColumns = mode == kCapped ? 16 : 32;
constexpr int kWide = 256;       // threads of a block where a row fills them
constexpr int kNarrow = kWarp;   // a small vocabulary (or a value head) is one warp's, without a barrier

bool narrow(int64_t V, int pack, int columns) { return V + pack - 1 <= kNarrow * columns; }

template <class T, Mode mode>
int64_t panel_count(int64_t V) {
  const int64_t threads = narrow(V, kPack<T>, kColumns<mode>) ? kNarrow : kWide;
  return V > 0 ? ceil_div(V + kPack<T> - 1, threads * kColumns<mode>) : 0;
}

// Calls body(T{}, ModeTag<mode>{}) for a dtype code and a mode.
template <Mode mode_> struct ModeTag { static constexpr Mode mode = mode_; };
template <class Body>
int for_dtype_and_mode(int dtype, Mode mode, const Body& body) {
  return for_dtype(dtype, [&](auto type) {
    if (mode == kPlain) return body(type, ModeTag<kPlain>{});
    if (mode == kScaled) return body(type, ModeTag<kScaled>{});
    return body(type, ModeTag<kCapped>{});
  });
}

template <class T>
struct Rows {
  T* data;
  int64_t count, L, stride_b, stride_l;
  SVPO_DEVICE T* at(int64_t i) const { return data + (i / L * stride_b + i % L * stride_l); }
};

template <class T>
Rows<T> rows_of(const Source& source) {
  return {static_cast<T*>(source.data), source.count, source.L, source.stride_b, source.stride_l};
}

// Blocks that share a row's panels: one while rows alone give every multiprocessor 8 (two waves), else as many as that
// takes. 64 rows at V = 128256 on 132 of them: 16 panels, 16 blocks a row, 1024 in all.
int64_t blocks_per_row(int64_t count, int64_t panels, int device) {
  const int64_t wanted = count > 0 ? ceil_div(8 * static_cast<int64_t>(processors(device)), count) : 1;
  return panels < 1 ? 0 : wanted < panels ? wanted : panels;
}

// Whether column `column` of a run is among those that this thread holds of a panel, and which it is.
template <class T, int kThreads, int kLoads>
SVPO_DEVICE bool holds(const Run<T>& run, int64_t first_pack, int64_t column, int* which) {
  const int64_t slot = column + run.skip - first_pack * kPack<T>;
  if (slot < 0 || slot >= kThreads * kLoads * kPack<T>) return false;
  const int pack = static_cast<int>(slot) / kPack<T>;
  *which = pack / kThreads * kPack<T> + static_cast<int>(slot) % kPack<T>;
  return pack % kThreads == thread_x();
}

// Columns of a panel in registers: all loads before the first use. kWhole: every pack of the panel is whole.
template <class T, int kThreads, int kLoads, bool kWhole>
SVPO_DEVICE void load_panel(const Run<const T>& run, int64_t mine, int skip, T fill, Pack<T> (&packs)[kLoads]) {
  const T* const from = run.data + run.begin(mine);
#pragma unroll
  for (int k = 0; k < kLoads; ++k)
    packs[k] = kWhole ? load_pack(from + k * kThreads * kPack<T>) : load_edge(run, mine + k * kThreads, fill, skip);
}

// A panel's sums against another maximum.
template <bool kEntropy>
SVPO_DEVICE Partial rescaled(Partial part, float m) {
  if (part.s == 0.0f) return {m, 0.0f, 0.0f};
  const float shift = part.m - finite_max(m), factor = exp_(shift);
  return {m, part.s * factor, kEntropy ? fmaf(shift, part.s, part.t) * factor : 0.0f};
}

// The sums of a panel from every thread's own. Two sets of slots in turn: one barrier a panel.
template <int kThreads, bool kEntropy, class Slots>
SVPO_DEVICE void store_panel(Partial own, Slots& slots, int turn, Partial* to) {
  Partial sum = rescaled<kEntropy>(own, warp_max(own.m));
  sum.s = warp_sum(sum.s);
  if (kEntropy) sum.t = warp_sum(sum.t);
  if (kThreads == kWarp) {
    if (thread_x() == 0) *to = sum;
    return;
  }
  constexpr int kWarps = kThreads / kWarp;
  if (thread_x() % kWarp == 0) slots[turn * kWarps + thread_x() / kWarp] = sum;
  sync_threads();
  if (thread_x() != 0) return;
  float m = -INFINITY;
  for (int warp = 0; warp < kWarps; ++warp) m = fmaxf(m, static_cast<Partial>(slots[turn * kWarps + warp]).m);
  sum = {m, 0.0f, 0.0f};
  for (int warp = 0; warp < kWarps; ++warp) {
    const Partial part = rescaled<kEntropy>(slots[turn * kWarps + warp], m);
    sum.s += part.s, sum.t += part.t;
  }
  *to = sum;
}

// Grid (rows, blocks a row): partials (panels, rows) of the columns that are no label, each column read once.
template <class T, Mode mode, int kThreads, bool kEntropy>
SVPO_KERNEL(kThreads, kThreads == kNarrow ? 16 : kEntropy ? 3 : 4)
statistics_kernel(Rows<const T> source, Plan plan, int64_t first_row, int64_t count, bool chunk, int64_t vocab_size,
                  int64_t panels, Transform t, Partial* partials) {
  constexpr int kLoads = kColumns<mode> / kPack<T>;
  SVPO_SHARED(Partial, slots, 2 * (kThreads / kWarp));
  const int64_t i = block_x(), r = first_row + i, named = plan.rows[r], row = chunk && named >= 0 ? i : named;
  if (row < 0 || row >= source.count) return;
  const Run<const T> run(source.at(row), vocab_size);
  const int64_t start = plan.row_start[r], end = plan.row_start[r + 1];
  int turn = 0;
  for (int64_t panel = block_y(); panel < panels; panel += grid_y(), turn ^= 1) {
    const int64_t first = panel * (kLoads * kThreads), mine = first + thread_x();
    const bool whole = run.whole(first) && run.whole(first + kLoads * kThreads - 1);
    Pack<T> packs[kLoads];
    if (whole) load_panel<T, kThreads, kLoads, true>(run, mine, run.skip, from_float<T>(-INFINITY), packs);
    else load_panel<T, kThreads, kLoads, false>(run, mine, run.skip, from_float<T>(-INFINITY), packs);
    float z[kColumns<mode>], slope;
#pragma unroll
    for (int c = 0; c < kColumns<mode>; ++c) {
      z[c] = transformed<mode>(to_float(packs[c / kPack<T>].at[c % kPack<T>]), t, &slope);
      // A capped filling is a logit like any other: keep it out.
      if (mode == kCapped && !whole && !run.has(run.begin(mine + c / kPack<T> * kThreads) + c % kPack<T>)) z[c] = -INFINITY;
    }
    for (int64_t n = start; n < end; ++n) {
      int label;
      if (!holds<const T, kThreads, kLoads>(run, first, plan.labels[n], &label)) continue;
#pragma unroll
      for (int c = 0; c < kColumns<mode>; ++c)
        if (c == label) z[c] = -INFINITY;
    }
    Partial own = {z[0], 0.0f, 0.0f};
#pragma unroll
    for (int c = 1; c < kColumns<mode>; ++c) own.m = fmaxf(own.m, z[c]);
    const float m = finite_max(own.m);
    float sums[4] = {}, weighted[2] = {};
#pragma unroll
    for (int c = 0; c < kColumns<mode>; ++c) {
      const float d = z[c] - m, power = exp_(d);
      sums[c % 4] += power;
      if (kEntropy) weighted[c % 2] = fmaf(power, finite_exponent(d), weighted[c % 2]);
    }
    own.s = (sums[0] + sums[1]) + (sums[2] + sums[3]), own.t = weighted[0] + weighted[1];
    store_panel<kThreads, kEntropy>(own, slots, turn, partials + (panel * count + i));
  }
}

// What makes a row's gradient: factor exp(z - m) slope (constant + linear (z - m)).
struct Factors { float m, factor, constant, linear; };

// The gradient of the columns of a pack.
template <class T, Mode mode, bool kEntropy>
SVPO_DEVICE void gradient_of(Pack<T>& pack, const Factors& by, const Transform& t) {
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    float slope;
    const float d = transformed<mode>(to_float(pack.at[j]), t, &slope) - by.m;
    float y = by.factor * expf(d);
    if (kEntropy) y *= fmaf(by.linear, finite_exponent(d), by.constant);
    pack.at[j] = from_float<T>(mode == kCapped ? y * slope : y);
  }
}

// Columns of a panel that this thread holds; 0 where `in` has none. At an edge one pack after the other: with all of
// them in registers at once sm_120 spilled.
template <class T, Mode mode, int kThreads, bool kEntropy>
SVPO_DEVICE void gradient_panel(const Run<const T>& in, const Run<T>& out, bool whole, int64_t mine, const Factors& by,
                                const Transform& t) {
  constexpr int kLoads = kColumns<mode> / kPack<T>;
  if (whole) {
    Pack<T> packs[kLoads];
    load_panel<T, kThreads, kLoads, true>(in, mine, in.skip, from_float<T>(0.0f), packs);
    T* const to = out.data + out.begin(mine);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      gradient_of<T, mode, kEntropy>(packs[k], by, t);
      store_pack(to + k * kThreads * kPack<T>, packs[k]);
    }
    return;
  }
#pragma unroll 1
  for (int64_t k = mine; k < mine + kLoads * kThreads && out.begin(k) < out.size; k += kThreads) {
    Pack<T> pack = load_edge(in, k, from_float<T>(0.0f), out.skip);
    gradient_of<T, mode, kEntropy>(pack, by, t);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j)
      if (!in.has(out.begin(k) + j)) pack.at[j] = from_float<T>(0.0f);
    store_edge(out, k, pack);
  }
}

// Grid (rows of the target, blocks a row): one read and one write of a scored row, zeros elsewhere.
template <class T, Mode mode, int kThreads, bool kEntropy>
SVPO_KERNEL(kThreads, kThreads == kNarrow ? 16 : 2)  // at 3 blocks, 80 registers, some spilled on sm_90 and sm_100
gradient_kernel(Rows<const T> source, Rows<T> target, Plan plan, int64_t first_row, const int64_t* owner,
                const float* row_max, RowFactors rows, int64_t V, int64_t vocab_size, int64_t panels, Transform t) {
  constexpr int kLoads = kColumns<mode> / kPack<T>;
  const int64_t i = block_x(), r = owner ? owner[i] : plan.rows[first_row + i] < 0 ? -1 : first_row + i;
  const Run<T> out(target.at(i), V);
  const Run<const T> in(source.at(i), r < 0 ? 0 : vocab_size);
  Factors by = {};
  if (r >= 0) by.m = finite_max(row_max[r]), by.factor = rows.factors[r];
  if (kEntropy && r >= 0) by.constant = rows.constants[r], by.linear = rows.slopes[r];
  const int64_t start = r < 0 ? 0 : plan.row_start[r], end = r < 0 ? 0 : plan.row_start[r + 1];
  for (int64_t panel = block_y(); panel < panels; panel += grid_y()) {
    const int64_t first = panel * (kLoads * kThreads), mine = first + thread_x();
    const bool whole = in.skip == out.skip && in.whole(first) && in.whole(first + kLoads * kThreads - 1);
    gradient_panel<T, mode, kThreads, kEntropy>(in, out, whole, mine, by, t);
    // The thread that wrote a label's column writes it again.
    for (int64_t n = start; n < end; ++n) {
      const int64_t label = plan.labels[n];
      int which;
      if (in.has(label) && holds<T, kThreads, kLoads>(out, first, label, &which))
        out.data[label] = from_float<T>(rows.targets[n]);
    }
  }
}

template <class T, Mode mode, bool kEntropy>
int launch_statistics(const Source& source, const Plan& plan, int64_t first_row, int64_t count, bool chunk,
                      int64_t vocab_size, const Transform& t, Partial* partials, Queue queue) {
  const bool small = narrow(vocab_size, kPack<T>, kColumns<mode>);
  const int64_t panels = panel_count<T, mode>(vocab_size);
  const auto kernel = small ? statistics_kernel<T, mode, kNarrow, kEntropy> : statistics_kernel<T, mode, kWide, kEntropy>;
  return launch("statistics", kernel, Grid{count, blocks_per_row(count, panels, queue.device)},
                small ? kNarrow : kWide, queue, rows_of<const T>(source), plan, first_row, count, chunk, vocab_size,
                panels, t, partials);
}

template <class T, Mode mode, bool kEntropy>
int launch_gradient(const Source& source, const Source& target, const Plan& plan, int64_t first_row,
                    const int64_t* owner, const float* row_max, const RowFactors& by, int64_t V, int64_t vocab_size,
                    const Transform& t, Queue queue) {
  const bool small = narrow(V, kPack<T>, kColumns<mode>);
  const int64_t panels = panel_count<T, mode>(V);
  const auto kernel = small ? gradient_kernel<T, mode, kNarrow, kEntropy> : gradient_kernel<T, mode, kWide, kEntropy>;
  return launch("gradient", kernel, Grid{target.count, blocks_per_row(target.count, panels, queue.device)},
                small ? kNarrow : kWide, queue, rows_of<const T>(source), rows_of<T>(target), plan, first_row, owner,
                row_max, by, V, vocab_size, panels, t);
}

}  // namespace

int64_t rows::panels(int dtype, int64_t V, double softcap) {
  int64_t count = 0;
  for_dtype_and_mode(dtype, mode_of(1.0, softcap), [&](auto type, auto tag) {
    count = panel_count<decltype(type), decltype(tag)::mode>(V);
    return SVPO_OK;
  });
  return count;
}

int rows::gradient(const Source& source, const Source& target, const Plan& plan, int64_t first_row,
                   const int64_t* owner, const Options& options, const float* row_max, const RowFactors& by, int64_t V,
                   Queue queue) {
  const Transform t = make_transform(options.temperature, options.softcap);
  return for_dtype_and_mode(source.dtype, mode_of(options.temperature, options.softcap), [&](auto type, auto tag) {
    using T = decltype(type);
    constexpr Mode mode = decltype(tag)::mode;
    const auto launch_it = by.slopes ? launch_gradient<T, mode, true> : launch_gradient<T, mode, false>;
    return launch_it(source, target, plan, first_row, owner, row_max, by, V, options.vocab_size, t, queue);
  });
}

int rows::panel_statistics(const Source& source, const Plan& plan, int64_t first_row, int64_t count, bool chunk,
                           const Options& options, bool entropy, Partial* partials, Queue queue) {
  const Transform t = make_transform(options.temperature, options.softcap);
  return for_dtype_and_mode(source.dtype, mode_of(options.temperature, options.softcap), [&](auto type, auto tag) {
    using T = decltype(type);
    constexpr Mode mode = decltype(tag)::mode;
    const auto launch_it = entropy ? launch_statistics<T, mode, true> : launch_statistics<T, mode, false>;
    return launch_it(source, plan, first_row, count, chunk, options.vocab_size, t, partials, queue);
  });
}
