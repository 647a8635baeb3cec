// The C ABI of the native code: raw pointers, int64 sizes and strides in elements, no torch.
//
// A CPU op `svpo_cpu_<op>` lives in cpu/<file>.cpp, which setup.py compiles once per instruction set; the entry points
// of the three builds end in _portable, _avx2 and _avx512, and bindings.cpp picks one at run time. To add an op:
// declare it here, define it with SVPO_ENTRY (cpu/simd.h) and bind it with one line in bindings.cpp.
//
// A CUDA op `svpo_cuda_<op>` lives in cuda/<file>.cu, is declared with SVPO_CUDA_OP and takes its CPU twin's arguments, on
// the device, with the device and the stream in place of `threads`. It only queues work and never waits. `scratch` is
// device memory it may use until the stream has passed, aligned to 16 bytes; its size is checked.
//
// Every function returns SVPO_OK or an error code. `threads` is the most threads to use. Plan arrays are those of
// svpo_kernels/plan.py, int64, where the other arrays are.
#pragma once

#include <stdint.h>

enum svpo_status {
  SVPO_OK = 0,
  SVPO_BAD_DTYPE = 1,
  SVPO_NO_MEMORY = 2,
  SVPO_BAD_INDEX = 3,
  SVPO_BAD_VALUE = 4,
  SVPO_CUDA_ERROR = 5,  // svpo_cuda_last_error() says which
};
enum svpo_dtype { SVPO_FP32 = 0, SVPO_BF16 = 1, SVPO_FP16 = 2 };
enum svpo_reduction { SVPO_SUM = 0, SVPO_MEAN = 1, SVPO_NONE = 2 };

#define SVPO_CPU_OP(name, ...)         \
  int svpo_cpu_##name##_portable(__VA_ARGS__); \
  int svpo_cpu_##name##_avx2(__VA_ARGS__);     \
  int svpo_cpu_##name##_avx512(__VA_ARGS__)

#define SVPO_CUDA_OP(name, ...) int svpo_cuda_##name(__VA_ARGS__, int device, void* stream)

extern "C" {

// What the last SVPO_CUDA_ERROR of this thread was about.
const char* svpo_cuda_last_error();

// exp, tanh or 2^x of the vector library on (n,) fp32, for tests. function: 0 exp, 1 tanh, 2 2^x.
SVPO_CPU_OP(elementwise, const float* x, float* out, int64_t n, int function);

// out (S,) or (N,), logp (N,), row_max (R,), row_logsum (R,) fp32 from logits with row r of the flattened (B * L) at
// (r / L) * stride_b + (r % L) * stride_l. A label outside [0, vocab_size) or a row outside [0, B * L) gives NaN.
SVPO_CPU_OP(step_logps_fwd, const void* logits, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
            const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first,
            const int64_t* step_order, const int64_t* step_start, int64_t R, int64_t N, int64_t S, int64_t vocab_size,
            double temperature, double softcap, int reduction, float* out, float* logp, float* row_max,
            float* row_logsum, int threads);

// The same on CUDA; a step id at or above S makes every step NaN. scratch: 12 bytes for each of (V / 4096 + 2) * R panels.
SVPO_CUDA_OP(step_logps_fwd, const void* logits, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
             const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first,
             const int64_t* step_ids, const int64_t* step_order, const int64_t* step_start, int64_t R, int64_t N,
             int64_t S, int64_t vocab_size, double temperature, double softcap, int reduction, float* out, float* logp,
             float* row_max, float* row_logsum, void* scratch, int64_t scratch_bytes);

// grad_logits, every element of all B * L rows of V columns, from grad_out (S,) or (N,). grad_logits may be logits.
// separate: grad_logits is not logits. fresh: it is memory that was never written.
SVPO_CPU_OP(step_logps_bwd, const float* grad_out, const void* logits, void* grad_logits, int dtype, int64_t B,
            int64_t L, int64_t V, int64_t stride_b, int64_t stride_l, int64_t grad_stride_b, int64_t grad_stride_l,
            const float* logp, const float* row_max, const float* row_logsum, const int64_t* rows,
            const int64_t* row_start, const int64_t* labels, const int64_t* first, const int64_t* step_ids,
            const int64_t* step_start, int64_t R, int64_t N, int64_t S, int64_t vocab_size, double temperature,
            double softcap, int reduction, int separate, int fresh, int threads);

// The same on CUDA; a step id out of range gives NaN. scratch: 8 bytes for each of B * L, 4 for each of R and N.
SVPO_CUDA_OP(step_logps_bwd, const float* grad_out, const void* logits, void* grad_logits, int dtype, int64_t B,
             int64_t L, int64_t V, int64_t stride_b, int64_t stride_l, int64_t grad_stride_b, int64_t grad_stride_l,
             const float* logp, const float* row_max, const float* row_logsum, const int64_t* rows,
             const int64_t* row_start, const int64_t* labels, const int64_t* first, const int64_t* step_ids,
             const int64_t* step_start, int64_t R, int64_t N, int64_t S, int64_t vocab_size, double temperature,
             double softcap, int reduction, void* scratch, int64_t scratch_bytes);

// Terms, metrics and slopes of svpo_loss; null = not given. lp, ref, v (S,) of their own dtypes, value_targets (S,),
// pairs (P, 2) and sft_steps (K,) int64 (wide) or int32, per-pair numbers (P,) before the scalar of their name, counts
// (3,) before the numbers (< 0: own count). preference: 0 sigmoid, 1 ipo, 2 hinge; rank: 0 hinge, 1 logistic, 2
// implicit. slopes (4, S): d preference / d lp, d sft / d lp, d value / d v, d rank / d v. SVPO_BAD_INDEX: a step outside
// [0, S); SVPO_BAD_VALUE: a count that is not above 0 for a term with members.
SVPO_CPU_OP(svpo_loss_fwd, const void* step_logps, int logps_dtype, const void* ref_step_logps, int ref_dtype,
            const void* values, int values_dtype, const float* value_targets, const void* pairs, int pairs_wide,
            const void* sft_steps, int sft_wide, const float* pair_weights, const float* label_smoothings,
            const float* margins, const float* rank_margins, const float* counts, int64_t S, int64_t P, int64_t K,
            double beta, int preference, double preference_weight, double label_smoothing, double margin,
            double value_weight, int rank, double rank_margin, double rank_scale, double rank_weight,
            double sft_weight, double pair_count, double value_count, double sft_count, float* loss,
            float* preference_term, float* value_term, float* rank_term, float* sft_term, float* accuracy,
            float* value_accuracy, float* chosen_rewards, float* rejected_rewards, float* slopes);

// The same on CUDA, where a step outside [0, S) gives NaN and a count is taken as it is.
SVPO_CUDA_OP(svpo_loss_fwd, const void* step_logps, int logps_dtype, const void* ref_step_logps, int ref_dtype,
             const void* values, int values_dtype, const float* value_targets, const void* pairs, int pairs_wide,
             const void* sft_steps, int sft_wide, const float* pair_weights, const float* label_smoothings,
             const float* margins, const float* rank_margins, const float* counts, int64_t S, int64_t P, int64_t K,
             double beta, int preference, double preference_weight, double label_smoothing, double margin,
             double value_weight, int rank, double rank_margin, double rank_scale, double rank_weight,
             double sft_weight, double pair_count, double value_count, double sft_count, float* loss,
             float* preference_term, float* value_term, float* rank_term, float* sft_term, float* accuracy,
             float* value_accuracy, float* chosen_rewards, float* rejected_rewards, float* slopes);

// Gradients (S,) from the upstream of the loss and of each term (one float each, null = none); null = not needed.
SVPO_CPU_OP(svpo_loss_bwd, const float* slopes, const float* grad_loss, const float* grad_preference,
            const float* grad_value, const float* grad_rank, const float* grad_sft, double preference_weight,
            double value_weight, double rank_weight, double sft_weight, int64_t S, float* grad_logps, float* grad_ref,
            float* grad_values);

SVPO_CUDA_OP(svpo_loss_bwd, const float* slopes, const float* grad_loss, const float* grad_preference,
             const float* grad_value, const float* grad_rank, const float* grad_sft, double preference_weight,
             double value_weight, double rank_weight, double sft_weight, int64_t S, float* grad_logps, float* grad_ref,
             float* grad_values);

// Terms, metrics and slopes of step_policy_loss; null = not given. logps, old, ref, entropy (N,) of their own dtypes,
// advantages (S,), step_ids (N,) int64 (wide) or int32, null: every token is a step; is_weights one a member, weights
// (N,), totals (2,) before the numbers (< 0: own count). ratio: 0 token, 1 step, 2 step_mean; kind: 0 ppo, 1 cispo, 2
// sapo; kl: 0 k1, 1 k2, 2 k3; dual_clip infinity: none. slopes (rows, N) of the undivided sums: policy in logps, then kl
// in logps and entropy in entropy where given; denominators (2,). SVPO_BAD_INDEX: a step at or above S; SVPO_BAD_VALUE: an
// advantage for a step without tokens, or a total that is not above 0 beside members.
SVPO_CPU_OP(step_policy_loss_fwd, const void* logps, int logps_dtype, const void* old_logps, int old_dtype,
            const float* advantages, const void* step_ids, int steps_wide, const float* is_weights,
            const void* ref_logps, int ref_dtype, const void* entropy, int entropy_dtype, const float* weights,
            const float* totals, int64_t N, int64_t S, int ratio, int kind, double clip_low, double clip_high,
            double dual_clip, double tau_positive, double tau_negative, int kl, double kl_weight, double entropy_weight,
            double total_members, double total_tokens, float* loss, float* policy_term, float* kl_term,
            float* entropy_term, float* clip_fraction, float* ratio_mean, float* ratio_max, float* approx_kl,
            float* slopes, float* denominators, int threads);

// The same on CUDA, where a step at or above S gives NaN and a total is taken as it is. order (N,): the tokens sorted by
// step, start (S + 1,): where each step's begin; null with ratio 0. scratch: 88 bytes for each of N / 1024 rounded up, or
// with members that are steps for each of S + 2.
SVPO_CUDA_OP(step_policy_loss_fwd, const void* logps, int logps_dtype, const void* old_logps, int old_dtype,
             const float* advantages, const void* step_ids, int steps_wide, const float* is_weights,
             const void* ref_logps, int ref_dtype, const void* entropy, int entropy_dtype, const float* weights,
             const float* totals, int64_t N, int64_t S, int ratio, int kind, double clip_low, double clip_high,
             double dual_clip, double tau_positive, double tau_negative, int kl, double kl_weight,
             double entropy_weight, double total_members, double total_tokens, float* loss, float* policy_term,
             float* kl_term, float* entropy_term, float* clip_fraction, float* ratio_mean, float* ratio_max,
             float* approx_kl, float* slopes, float* denominators, const int64_t* order, const int64_t* start,
             void* scratch, int64_t scratch_bytes);

// Gradients (N,) from the upstream of the loss and of each term (one float each, null = none); null = not needed.
SVPO_CPU_OP(step_policy_loss_bwd, const float* slopes, const float* denominators, const float* grad_loss,
            const float* grad_policy, const float* grad_kl, const float* grad_entropy, double kl_weight,
            double entropy_weight, int has_kl, int has_entropy, int64_t N, float* grad_logps, float* grad_entropies,
            int threads);

SVPO_CUDA_OP(step_policy_loss_bwd, const float* slopes, const float* denominators, const float* grad_loss,
             const float* grad_policy, const float* grad_kl, const float* grad_entropy, double kl_weight,
             double entropy_weight, int has_kl, int has_entropy, int64_t N, float* grad_logps, float* grad_entropies);

// Scores (S,) and logits (S, 2) of a head at positions (S,) int64 (wide) or int32 of hidden, row r of the flattened
// (B * L) at (r / L) * stride_b + (r % L) * stride_l; head row r at r * weight_stride. bad < 0: one class. activation: 0
// none, 1 sigmoid, 2 tanh. SVPO_BAD_INDEX: a position outside [0, B * L).
SVPO_CPU_OP(prm_scores_fwd, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
            int64_t D, const void* positions, int wide, int64_t S, const void* weight, int weight_dtype,
            int64_t weight_stride, const void* bias, int bias_dtype, int64_t good, int64_t bad, int activation,
            double softcap, float* scores, float* logits, int threads);

// The same on CUDA, where a position outside [0, B * L) gives NaN.
SVPO_CUDA_OP(prm_scores_fwd, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
             int64_t D, const void* positions, int wide, int64_t S, const void* weight, int weight_dtype,
             int64_t weight_stride, const void* bias, int bias_dtype, int64_t good, int64_t bad, int activation,
             double softcap, float* scores, float* logits);

// Gradients from grad (S,): the named rows of grad_hidden (B, L, D) and grad_weight (rows of D), grad_bias; the caller
// fills the rest with zeros; null = not needed.
SVPO_CPU_OP(prm_scores_bwd, const float* grad, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b,
            int64_t stride_l, int64_t D, const void* positions, int wide, int64_t S, const void* weight,
            int weight_dtype, int64_t weight_stride, int bias_dtype, const float* logits, int64_t good, int64_t bad,
            int activation, double softcap, void* grad_hidden, void* grad_weight, void* grad_bias, int threads);

// The same on CUDA; a position that does not exist has no row to write.
SVPO_CUDA_OP(prm_scores_bwd, const float* grad, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b,
             int64_t stride_l, int64_t D, const void* positions, int wide, int64_t S, const void* weight,
             int weight_dtype, int64_t weight_stride, int bias_dtype, const float* logits, int64_t good, int64_t bad,
             int activation, double softcap, void* grad_hidden, void* grad_weight, void* grad_bias);

// loss () or (S,) and logits (S, 2) for labels (S,) in [0, 1], NaN = unlabelled. SVPO_BAD_VALUE: another label.
SVPO_CPU_OP(prm_loss_fwd, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
            int64_t D, const void* positions, int wide, int64_t S, const float* labels, const void* weight,
            int weight_dtype, int64_t weight_stride, const void* bias, int bias_dtype, int64_t good, int64_t bad,
            int reduction, float* loss, float* logits, int threads);

// The same on CUDA, where another label gives NaN. scratch: 8 bytes for each of S when the losses are summed.
SVPO_CUDA_OP(prm_loss_fwd, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
             int64_t D, const void* positions, int wide, int64_t S, const float* labels, const void* weight,
             int weight_dtype, int64_t weight_stride, const void* bias, int bias_dtype, int64_t good, int64_t bad,
             int reduction, float* loss, float* logits, void* scratch, int64_t scratch_bytes);

// As prm_scores_bwd, from grad () or (S,).
SVPO_CPU_OP(prm_loss_bwd, const float* grad, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b,
            int64_t stride_l, int64_t D, const void* positions, int wide, int64_t S, const float* labels,
            const void* weight, int weight_dtype, int64_t weight_stride, int bias_dtype, const float* logits,
            int64_t good, int64_t bad, int reduction, void* grad_hidden, void* grad_weight, void* grad_bias,
            int threads);

SVPO_CUDA_OP(prm_loss_bwd, const float* grad, const void* hidden, int dtype, int64_t B, int64_t L, int64_t stride_b,
             int64_t stride_l, int64_t D, const void* positions, int wide, int64_t S, const float* labels,
             const void* weight, int weight_dtype, int64_t weight_stride, int bias_dtype, const float* logits,
             int64_t good, int64_t bad, int reduction, void* grad_hidden, void* grad_weight, void* grad_bias);

// out (B,) and chosen (B,) of scores (S,) with offsets (B + 1,) int64 (wide) or int32. how: 0 min, 1 prod, 2 geomean,
// 3 mean, 4 last, 5 max. SVPO_BAD_VALUE: offsets that do not run from 0 to S.
SVPO_CPU_OP(aggregate_scores_fwd, const void* scores, int dtype, const void* offsets, int wide, int64_t S, int64_t B,
            int how, float* out, int64_t* chosen, int threads);

// The same on CUDA, where such offsets make every result NaN.
SVPO_CUDA_OP(aggregate_scores_fwd, const void* scores, int dtype, const void* offsets, int wide, int64_t S, int64_t B,
             int how, float* out, int64_t* chosen);

// grad_scores (S,), every element.
SVPO_CPU_OP(aggregate_scores_bwd, const float* grad, const void* scores, int dtype, const void* offsets, int wide,
            int64_t S, int64_t B, const float* out, const int64_t* chosen, int how, void* grad_scores, int threads);

// The same on CUDA. scratch: 8 bytes for each of S with how 1.
SVPO_CUDA_OP(aggregate_scores_bwd, const float* grad, const void* scores, int dtype, const void* offsets, int wide,
             int64_t S, int64_t B, const float* out, const int64_t* chosen, int how, void* grad_scores, void* scratch,
             int64_t scratch_bytes);

// -- linear_step_logps: the passes between the products; meanings in svpo_kernels/linear_step_logps/products.py ------

// label_z0 (N,): h[r] . weight[label] + bias[label] in fp32, once per distinct (row, label); 0 for padding.
SVPO_CPU_OP(label_dots, const void* h, const void* weight, const void* bias, int dtype, int64_t D, int64_t stride_h,
            int64_t stride_w, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
            const int64_t* first, int64_t R, int64_t N, int64_t vocab_size, float* label_z0, int threads);

// Rows [first_row, last_row) of z (c, vocab_size): logp, row_max, row_logsum and entropy (R,) unless null, and with `unit`
// z becomes U. temperatures: (R,), of each plan row, in the place of temperature; null without.
SVPO_CPU_OP(linear_rows, void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row,
            const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R,
            int64_t N, const float* label_z0, int64_t vocab_size, double temperature, double softcap,
            const float* temperatures, float* logp, float* row_max, float* row_logsum, float* entropy, int unit,
            int threads);

// The same statistics from tiles of z, columns [first_column, first_column + columns) at a time, the one from column 0
// first: found (R, 3) collects what linear_rows_finish makes them of.
SVPO_CPU_OP(linear_rows_scan, const void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row,
            int64_t first_column, int64_t columns, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
            const int64_t* first, int64_t R, int64_t N, int64_t vocab_size, double temperature, double softcap,
            const float* temperatures, int entropy, double* found, int threads);

SVPO_CPU_OP(linear_rows_finish, const double* found, int64_t first_row, int64_t last_row, const int64_t* rows,
            const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N,
            const float* label_z0, int64_t vocab_size, double temperature, double softcap, const float* temperatures,
            float* logp, float* row_max, float* row_logsum, float* entropy, int threads);

// A tile of z becomes U, the statistics given.
SVPO_CPU_OP(linear_rows_unit, void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row,
            int64_t first_column, int64_t columns, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
            const int64_t* first, int64_t R, int64_t N, const float* label_z0, int64_t vocab_size, double temperature,
            double softcap, const float* temperatures, const float* logp, const float* row_max,
            const float* row_logsum, int threads);

// Of the same rows, before z is U: the sums of exp(z - row_max), of its square and of z, label columns exact; the
// largest z as z holds it and the first column that has it. All (R,), padding 0.
SVPO_CPU_OP(linear_row_stats, const void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row,
            const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R,
            int64_t N, const float* label_z0, int64_t vocab_size, double temperature, double softcap,
            const float* temperatures, const float* row_max, float* sums, float* squares, float* total, float* top,
            int64_t* top_at, int threads);

// out, which may be z: the whole gradient of a tile of z, for upstreams g (N,) and G (R,) of the log-probs and E (R,) of
// the entropies.
SVPO_CPU_OP(linear_rows_grad, const void* z, void* out, int dtype, int64_t stride_z, int64_t stride_out,
            int64_t first_row, int64_t last_row, int64_t first_column, int64_t columns, const int64_t* rows,
            const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N,
            const float* label_z0, int64_t vocab_size, double temperature, double softcap, const float* temperatures,
            const float* logp, const float* row_max, const float* row_logsum, const float* entropy, const float* g,
            const float* G, const float* E, int threads);

// out (S,) or (N,) from logp (N,).
SVPO_CPU_OP(reduce_steps, const float* logp, const int64_t* step_order, const int64_t* step_start, int64_t N, int64_t S,
            int reduction, float* out, int threads);

// g (N,): upstreams with equal (row, label) merged into the first, 0 elsewhere; G (R,) their sums per row.
SVPO_CPU_OP(row_grads, const float* grad_out, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
            const int64_t* first, const int64_t* step_ids, const int64_t* step_start, int64_t R, int64_t N, int64_t S,
            int reduction, float* g, float* G, int threads);

// out (c, D) contiguous = G uw + sum of terms[n] weight[labels[n]] over each row's predictions, for rows [first_row,
// last_row). A label whose term is 0 is never looked at.
SVPO_CPU_OP(branch_hidden, const void* uw, const void* weight, void* out, int dtype, int64_t D, int64_t stride_uw,
            int64_t stride_w, int64_t first_row, int64_t last_row, const int64_t* row_start, const int64_t* labels,
            const float* terms, const float* G, int threads);

// dweight (V, D) in dtype_w and dbias (V,), each may be null: += coefficients[n] h[row of n] at labels[n], in fixed order.
SVPO_CPU_OP(branch_weight, void* dweight, float* dbias, const void* h, int dtype_w, int dtype, int64_t D,
            int64_t stride_dw, int64_t stride_h, const int64_t* row_start, const int64_t* labels,
            const float* coefficients, int64_t R, int64_t N, int threads);

// On CUDA. label_dots, reduce_steps and row_grads as above; a step id out of range gives NaN.
SVPO_CUDA_OP(label_dots, const void* h, const void* weight, const void* bias, int dtype, int64_t D, int64_t stride_h,
             int64_t stride_w, const int64_t* rows, const int64_t* row_start, const int64_t* labels,
             const int64_t* first, int64_t R, int64_t N, int64_t vocab_size, float* label_z0);
SVPO_CUDA_OP(reduce_steps, const float* logp, const int64_t* step_ids, const int64_t* step_order,
             const int64_t* step_start, int64_t N, int64_t S, int reduction, float* out);
SVPO_CUDA_OP(row_grads, const float* grad_out, const int64_t* rows, const int64_t* row_start, const int64_t* first,
             const int64_t* step_ids, const int64_t* step_start, int64_t R, int64_t N, int64_t S, int reduction,
             float* g, float* G);

// As above; entropy (R,) unless null. scales: (R, 2), (softcap or 1) / temperature of each plan row as high + low, in the
// place of temperature; null without. clusters: rows may be held on chip (sm_90 and later), else never. scratch: 12 bytes
// for each of (vocab_size / 4096 + 2) * (last_row - first_row) panels, 4 for each of R and N.
SVPO_CUDA_OP(linear_rows, void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row,
             const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R,
             int64_t N, const float* label_z0, int64_t vocab_size, double temperature, double softcap,
             const float* scales, float* logp, float* row_max, float* row_logsum, float* entropy, int unit,
             int clusters, void* scratch, int64_t scratch_bytes);

// As on the CPU; tile_labels (N,): labels counted from the tile's first column. scratch: 4 bytes for each of R and N.
SVPO_CUDA_OP(linear_rows_unit, void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row,
             const int64_t* tile_labels, int64_t columns, const int64_t* rows, const int64_t* row_start,
             const int64_t* labels, const int64_t* first, int64_t R, int64_t N, const float* label_z0,
             int64_t vocab_size, double temperature, double softcap, const float* scales, const float* logp,
             const float* row_max, const float* row_logsum, void* scratch, int64_t scratch_bytes);

// As on the CPU.
SVPO_CUDA_OP(linear_row_stats, const void* z, int dtype, int64_t stride_z, int64_t first_row, int64_t last_row,
             const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R,
             int64_t N, const float* label_z0, int64_t vocab_size, double temperature, double softcap,
             const float* scales, const float* row_max, float* sums, float* squares, float* total, float* top,
             int64_t* top_at);

// As on the CPU, tile_labels as above. scratch: 4 bytes for each of 3 R and N.
SVPO_CUDA_OP(linear_rows_grad, const void* z, void* out, int dtype, int64_t stride_z, int64_t stride_out,
             int64_t first_row, int64_t last_row, const int64_t* tile_labels, int64_t columns, const int64_t* rows,
             const int64_t* row_start, const int64_t* labels, const int64_t* first, int64_t R, int64_t N,
             const float* label_z0, int64_t vocab_size, double temperature, double softcap, const float* scales,
             const float* logp, const float* row_max, const float* row_logsum, const float* entropy, const float* g,
             const float* G, const float* E, void* scratch, int64_t scratch_bytes);

SVPO_CUDA_OP(branch_hidden, const void* uw, const void* weight, void* out, int dtype, int64_t D, int64_t stride_uw,
             int64_t stride_w, int64_t first_row, int64_t last_row, const int64_t* row_start, const int64_t* labels,
             const float* terms, const float* G);

// As above, for terms sorted: keys (N,) ascend, V where there is no term; term i is coefficients[order[i]] h[row_of[order[i]]]
// and goes to row keys[i].
SVPO_CUDA_OP(branch_weight, void* dweight, float* dbias, const void* h, int dtype_w, int dtype, int64_t V, int64_t D,
             int64_t stride_dw, int64_t stride_h, const int64_t* keys, const int64_t* order, const int64_t* row_of,
             const float* coefficients, int64_t N);

// out (B, H, T, Dv), row_max and row_sum (B, H, T) = sum e^(z - row_max) of attention where query q sees key k iff k <= q < end[k], and, with positions,
// position[q] - position[k] < window. strides: batch, head and row of q (B, H, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv)
// and out. end, position: (T,) with stride 0 or (B, T) with stride T; position and sinks (H,) may be null; softcap 0 =
// none. An end outside (k, T] is SVPO_BAD_INDEX.
SVPO_CPU_OP(tree_attention_fwd, const void* q, const void* k, const void* v, int dtype, const int64_t* strides,
            int64_t B, int64_t H, int64_t Hkv, int64_t T, int64_t D, int64_t Dv, const int64_t* end,
            int64_t end_stride, const int64_t* position, int64_t position_stride, int64_t window, double scale,
            double softcap, const float* sinks, void* out, int out_dtype, float* row_max, float* row_sum, int threads);

// Gradients from grad, like out. strides: as above, then grad's and dq's, then split, batch, head and row of dk and dv.
// delta (B, H, T) = sum grad out. dq in dtype, may be null; dk (splits, B, Hkv, T, D padded to 16) and dv, may be null:
// fp32, zero at first, the query blocks of split s being s, s + splits, ...
SVPO_CPU_OP(tree_attention_bwd, const void* grad, const void* q, const void* k, const void* v, const void* out,
            int dtype, int out_dtype, int grad_dtype, const int64_t* strides, int64_t B, int64_t H, int64_t Hkv,
            int64_t T, int64_t D, int64_t Dv, const int64_t* end, int64_t end_stride, const int64_t* position,
            int64_t position_stride, int64_t window, double scale, double softcap, const float* row_max,
            const float* row_sum, float* delta, void* dq, float* dk, float* dv, int64_t splits, int threads);

}  // extern "C"
