// Members of step_policy_loss that are steps: sums over runs of equal step ids, their losses in double, their slopes.
#pragma once

#include "policy_blocks.h"

namespace {

constexpr int64_t kStepChunk = 512;  // steps of one task: an exp each

// Totals of chunks of [0, count), each by body(first, last), joined in order.
template <class Body>
int sum_chunks(int64_t count, int64_t chunk, int threads, Totals* totals, const Body& body) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  Scratch<Totals> parts(chunks);
  if (!parts.data) return SVPO_NO_MEMORY;
  parallel_for(chunks, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      parts[c] = body(c * chunk, (c + 1) * chunk < count ? (c + 1) * chunk : count);
  });
  for (int64_t c = 0; c < chunks; ++c) totals->add(parts[c]);
  return SVPO_OK;
}

// A run of equal step ids within a chunk: its first token, how many, and the sums of lp - old and of lp.
struct Run {
  int64_t step;  // below 0: of no step
  int32_t begin, count;
  double x, u;
};

struct Step {
  double x, u;
  int64_t tokens;
  float weight;  // that of the first token
};

// The end of the run that begins at j < n.
template <class Ids>
SVPO_INLINE int run_end(const Ids& ids, int64_t at, int j, int n) {
  const int64_t s = ids[at + j];
  int end = j + 1;
  for (; end + 16 <= n; end += 16) {
    int64_t differ = 0;
    for (int k = 0; k < 16; ++k) differ |= ids[at + end + k] ^ s;
    if (differ) break;
  }
  for (; end + 4 <= n; end += 4) {
    int64_t differ = 0;
    for (int k = 0; k < 4; ++k) differ |= ids[at + end + k] ^ s;
    if (differ) break;
  }
  while (end < n && ids[at + end] == s) ++end;
  return end;
}

// The runs of one chunk of tokens, and its KL and entropy. runs: room for one a token; many: how many there are.
template <class Ids>
Totals run_chunk(const Call& call, const Ids& ids, int64_t first, int64_t last, Run* runs, int64_t* many) {
  Totals totals = kNothing;
  const bool needs_u = call.options.kind == SVPO_CISPO, needs_counts = call.kl_slopes || call.entropy_slopes;
  Run* run = nullptr;
  for (int64_t at = first; at < last; at += kBlock) {
    const int n = static_cast<int>(last - at < kBlock ? last - at : kBlock);
    float lp_buffer[kBlock], old_buffer[kBlock], x[kBlock], counts[kBlock];
    const float *const lp = call.lp.block(at, n, lp_buffer), *const old = call.old.block(at, n, old_buffer);
    for (int j = 0; j < n; ++j) x[j] = lp[j] - old[j];
    for (int j = 0; j < n;) {
      const int end = run_end(ids, at, j, n), count = end - j;
      const int64_t s = ids[at + j];
      if (s >= call.S) {
        totals.bad_step = true;
        return totals;
      }
      if (!run || run->step != s) {
        run = run ? run + 1 : runs;
        *run = {s, static_cast<int32_t>(at + j - first), 0, 0.0, 0.0};
      }
      run->count += count;
      if (s >= 0) {
        run->x += sum_block(x + j, count);
        if (needs_u) run->u += sum_block(lp + j, count);
        totals.tokens += count;
      }
      for (int k = j; needs_counts && k < end; ++k) counts[k] = s >= 0 ? 1.0f : 0.0f;
      j = end;
    }
    if (call.kl_slopes) kl_block(call, at, n, lp, counts, totals);
    if (call.entropy_slopes) entropy_block(call, at, n, counts, totals);
  }
  *many = run ? run - runs + 1 : 0;
  return totals;
}

// Totals of steps [first, last), and the slope that each of a step's tokens takes.
Totals step_chunk(const Call& call, const Step* steps, int64_t first, int64_t last, float* slopes) {
  Totals totals = kNothing;
  for (int64_t s = first; s < last; ++s) {
    const Step& step = steps[s];
    const double A = call.advantages[s];
    slopes[s] = 0.0f;
    if (A != A || step.tokens == 0) continue;
    const double share = call.mean ? 1.0 / static_cast<double>(step.tokens) : 1.0;
    const svpo_policy_point point = svpo_policy_loss(call.options, share * step.x, share * step.u, A);
    const double weight = call.is_weights ? static_cast<double>(step.weight) * call.is_weights[s] : step.weight;
    slopes[s] = static_cast<float>(weight * (share * point.slope));
    Totals one = {weight * point.loss, 1.0, point.clipped ? 1.0 : 0.0, point.rho, -step.x,
                  static_cast<double>(step.tokens), 0.0, 0.0, 0.0, static_cast<float>(point.rho), false};
    totals.add(one);
  }
  return totals;
}

template <class Ids>
int step_totals(const Call& call, const Ids& ids, int threads, Totals* totals) {
  const int64_t chunks = (call.N + kChunk - 1) / kChunk;
  Scratch<Run> runs(call.N);
  Scratch<int64_t> many(chunks);
  Scratch<Step> steps(call.S);
  Scratch<float> slopes(call.S);
  if (!runs.data || !many.data || !steps.data || !slopes.data) return SVPO_NO_MEMORY;
  Totals tokens = kNothing;
  int status = sum_chunks(call.N, kChunk, threads, &tokens, [&](int64_t first, int64_t last) {
    return run_chunk(call, ids, first, last, runs.data + first, many.data + first / kChunk);
  });
  if (status != SVPO_OK) return status;
  if (tokens.bad_step) return SVPO_BAD_INDEX;
  memset(static_cast<void*>(steps.data), 0, call.S * sizeof(Step));
  for (int64_t c = 0; c < chunks; ++c)
    for (const Run *run = runs.data + c * kChunk, *end = run + many[c]; run < end; ++run) {
      if (run->step < 0) continue;
      Step& step = steps[run->step];
      if (step.tokens == 0) step.weight = call.weights ? call.weights[c * kChunk + run->begin] : 1.0f;
      step.tokens += run->count, step.x += run->x, step.u += run->u;
    }
  for (int64_t s = 0; s < call.S; ++s)
    if (steps[s].tokens == 0 && call.advantages[s] == call.advantages[s]) return SVPO_BAD_VALUE;
  status = sum_chunks(call.S, kStepChunk, threads, totals, [&](int64_t first, int64_t last) {
    return step_chunk(call, steps.data, first, last, slopes.data);
  });
  if (status != SVPO_OK) return status;
  parallel_for(chunks, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      for (const Run *run = runs.data + c * kChunk, *end = run + many[c]; run < end; ++run) {
        float* const to = call.policy_slopes + c * kChunk + run->begin;
        const float slope = run->step < 0 ? 0.0f : slopes[run->step];
        for (int32_t j = 0; j < run->count; ++j) to[j] = slope;
      }
  });
  totals->kl = tokens.kl, totals->entropy = tokens.entropy, totals->tokens = tokens.tokens;
  return SVPO_OK;
}

}  // namespace
