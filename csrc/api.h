// The C ABI of the native code: raw pointers, int64 sizes and strides in elements, no torch.
//
// A CPU op `svpo_cpu_<op>` lives in cpu/<file>.cpp, which setup.py compiles once per instruction set; the entry points
// of the three builds end in _portable, _avx2 and _avx512, and bindings.cpp picks one at run time. To add an op:
// declare it here, define it with SVPO_ENTRY (cpu/simd.h) and bind it with one line in bindings.cpp.
//
// Every function returns SVPO_OK or an error code. `threads` is the most threads to use. Plan arrays are those of
// svpo_kernels/plan.py, int64, on the CPU.
#pragma once

#include <stdint.h>

enum svpo_status { SVPO_OK = 0, SVPO_BAD_DTYPE = 1, SVPO_NO_MEMORY = 2 };
enum svpo_dtype { SVPO_FP32 = 0, SVPO_BF16 = 1, SVPO_FP16 = 2 };
enum svpo_reduction { SVPO_SUM = 0, SVPO_MEAN = 1, SVPO_NONE = 2 };

#define SVPO_CPU_OP(name, ...)         \
  int svpo_cpu_##name##_portable(__VA_ARGS__); \
  int svpo_cpu_##name##_avx2(__VA_ARGS__);     \
  int svpo_cpu_##name##_avx512(__VA_ARGS__)

extern "C" {

// exp and tanh of the vector library on (n,) fp32, for tests. function: 0 exp, 1 tanh.
SVPO_CPU_OP(elementwise, const float* x, float* out, int64_t n, int function);

// out (S,) or (N,), logp (N,), row_max (R,), row_logsum (R,) fp32 from logits with row r of the flattened (B * L) at
// (r / L) * stride_b + (r % L) * stride_l. A label outside [0, vocab_size) or a row outside [0, B * L) gives NaN.
SVPO_CPU_OP(step_logps_fwd, const void* logits, int dtype, int64_t B, int64_t L, int64_t stride_b, int64_t stride_l,
            const int64_t* rows, const int64_t* row_start, const int64_t* labels, const int64_t* first,
            const int64_t* step_order, const int64_t* step_start, int64_t R, int64_t N, int64_t S, int64_t vocab_size,
            double temperature, double softcap, int reduction, float* out, float* logp, float* row_max,
            float* row_logsum, int threads);

// grad_logits, every element of all B * L rows of V columns, from grad_out (S,) or (N,). grad_logits may be logits.
// fresh: grad_logits is memory that was never written.
SVPO_CPU_OP(step_logps_bwd, const float* grad_out, const void* logits, void* grad_logits, int dtype, int64_t B,
            int64_t L, int64_t V, int64_t stride_b, int64_t stride_l, int64_t grad_stride_b, int64_t grad_stride_l,
            const float* logp, const float* row_max, const float* row_logsum, const int64_t* rows,
            const int64_t* row_start, const int64_t* labels, const int64_t* first, const int64_t* step_ids,
            const int64_t* step_start, int64_t R, int64_t N, int64_t S, int64_t vocab_size, double temperature,
            double softcap, int reduction, int fresh, int threads);

}  // extern "C"
