// The vector library of the CPU kernels: one source, compiled once per instruction set.
//
// A kernel file includes this header, nothing from the C++ standard library, and keeps everything but its entry points
// in an anonymous namespace: a shared inline symbol compiled for AVX-512 could be the one the linker keeps for all.
//
// Vec holds kWidth fp32 lanes. Sums and maxima over lanes and blocks have a fixed order, so a result does not depend on
// the thread count or the run.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../api.h"
#include "../runtime.h"

#define SVPO_JOIN_(a, b) a##_##b
#define SVPO_JOIN(a, b) SVPO_JOIN_(a, b)
// The symbol of an op's entry point in this build: SVPO_ENTRY(step_logps_fwd) -> svpo_cpu_step_logps_fwd_avx512.
#define SVPO_ENTRY(op) SVPO_JOIN(svpo_cpu_##op, SVPO_ISA)

#define SVPO_INLINE inline __attribute__((always_inline))

namespace {

// Storage formats. fp32 is float itself.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

}  // namespace

#if defined(SVPO_FOR_AVX512)
#include "simd_avx512.h"
#elif defined(SVPO_FOR_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace {

// A scalar of each storage format, through one lane of the vector code: the same rounding everywhere.
template <class T>
SVPO_INLINE float to_float(T value) {
  return first_lane(load_n(&value, 1, 0.0f));
}

template <class T>
SVPO_INLINE T from_float(float value) {
  T out;
  store_n(&out, set1(value), 1);
  return out;
}

// body(first, last) over pieces of [0, count): svpo_parallel for a lambda.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  svpo_parallel(
      count, grain, threads,
      [](void* context, int64_t first, int64_t last) { (*static_cast<const Body*>(context))(first, last); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(T{}) with the storage type of a dtype code; the status is what body returns.
template <class Body>
int for_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case SVPO_FP32: return body(float{});
    case SVPO_BF16: return body(bf16{});
    case SVPO_FP16: return body(fp16{});
  }
  return SVPO_BAD_DTYPE;
}

// Scratch of n elements, freed at the end of the scope; null when there is no memory. n = 0 is fine.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n) : data(static_cast<T*>(__builtin_malloc((n > 0 ? n : 1) * sizeof(T)))) {}
  ~Scratch() { __builtin_free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
};

// Sums n products in fp32 lanes, four accumulators, fixed order.
template <class A, class B>
double dot(const A* a, const B* b, int64_t n) {
  Vec sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) sum[k] = fma(load(a + i + k * kWidth), load(b + i + k * kWidth), sum[k]);
  for (; i < n; i += kWidth) {
    const int left = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    sum[0] = fma(load_n(a + i, left, 0.0f), load_n(b + i, left, 0.0f), sum[0]);
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace
