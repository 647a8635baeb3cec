// Wide: the lanes of a Vec as doubles, for sums whose error must not show. A product of two fp32 numbers is exact in
// double, so that fused and separate multiply-add give the same bits on every instruction set.
#pragma once

#include "simd.h"

namespace {

#if defined(SVPO_FOR_AVX512)

struct Wide { __m512d low, high; };

SVPO_INLINE Wide wide_zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
SVPO_INLINE Wide wide_set1(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
SVPO_INLINE Wide wide_load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
SVPO_INLINE void wide_store(double* p, Wide a) { _mm512_storeu_pd(p, a.low), _mm512_storeu_pd(p + 8, a.high); }
SVPO_INLINE Wide widen(Vec a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
SVPO_INLINE Vec narrowed(Wide a) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.low)), _mm512_cvtpd_ps(a.high), 1)};
}
SVPO_INLINE Wide fma(Wide a, Wide b, Wide c) {
  return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}

#elif defined(SVPO_FOR_AVX2)

struct Wide { __m256d low, high; };

SVPO_INLINE Wide wide_zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
SVPO_INLINE Wide wide_set1(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
SVPO_INLINE Wide wide_load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
SVPO_INLINE void wide_store(double* p, Wide a) { _mm256_storeu_pd(p, a.low), _mm256_storeu_pd(p + 4, a.high); }
SVPO_INLINE Wide widen(Vec a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
}
SVPO_INLINE Vec narrowed(Wide a) {
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a.low)), _mm256_cvtpd_ps(a.high), 1)};
}
SVPO_INLINE Wide fma(Wide a, Wide b, Wide c) {
  return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}

#else

typedef double WideLanes __attribute__((vector_size(8 * 4)));

struct Wide { WideLanes v; };

SVPO_INLINE Wide wide_zero() { return {WideLanes{}}; }
SVPO_INLINE Wide wide_set1(double x) { return {WideLanes{x, x, x, x}}; }
SVPO_INLINE Wide wide_load(const double* p) {
  Wide a;
  memcpy(&a, p, sizeof a);
  return a;
}
SVPO_INLINE void wide_store(double* p, Wide a) { memcpy(p, &a, sizeof a); }
SVPO_INLINE Wide widen(Vec a) { return {__builtin_convertvector(a.v, WideLanes)}; }
SVPO_INLINE Vec narrowed(Wide a) { return {__builtin_convertvector(a.v, Lanes)}; }
SVPO_INLINE Wide fma(Wide a, Wide b, Wide c) { return {a.v * b.v + c.v}; }

#endif

// All lanes, in a fixed order.
SVPO_INLINE double hsum(Wide a) {
  double lanes[kWidth], sum = 0.0;
  wide_store(lanes, a);
  for (int i = 0; i < kWidth; ++i) sum += lanes[i];
  return sum;
}

}  // namespace
