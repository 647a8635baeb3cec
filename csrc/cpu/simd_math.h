// exp and tanh of a Vec.
#pragma once

#include "simd.h"

namespace {

constexpr float kLog2e = 1.44269504088896341f;
// ln 2 in two parts: the first has 11 bits, so that k times it is exact for |k| < 4096.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
// 1.5 * 2^23: adding it rounds to an integer, subtracting it gives that integer back.
constexpr float kRound = 12582912.0f;

// e^x = 2^k e^f with |f| <= ln 2 / 2.
struct Reduced { Vec k, f; };

SVPO_INLINE Reduced reduce(Vec x) {
  const Vec magic = set1(kRound);
  const Vec k = fma(x, set1(kLog2e), magic) - magic;
  return {k, fnma(k, set1(kLn2Low), fnma(k, set1(kLn2High), x))};
}

// (e^f - 1 - f) / f^2, minimax on |f| <= ln 2 / 2: relative error of e^f below 2^-29.
SVPO_INLINE Vec exp_tail(Vec f) {
  Vec q = fma(set1(1.3814467e-3f), f, set1(8.368781e-3f));
  q = fma(q, f, set1(4.1668393e-2f));
  q = fma(q, f, set1(1.666652e-1f));
  return fma(q, f, set1(4.9999994e-1f));
}

// e^x within 2 ulp; 0 below -104, inf above 89, NaN for NaN.
SVPO_INLINE Vec vexp(Vec x) {
  const Reduced r = reduce(min(set1(89.0f), max(set1(-104.0f), x)));
  const Vec p = fma(fma(exp_tail(r.f), r.f, set1(1.0f)), r.f, set1(1.0f));
  return scale2(p, r.k);
}

#if !defined(SVPO_FOR_AVX512)  // which has instructions for the parts (simd_avx512.h)
// 2^t for t <= 127, within 3 ulp; 0 for t far below, NaN for NaN.
SVPO_INLINE Vec vexp2(Vec t) {
  const Vec low = max(set1(kExp2Lowest), t), magic = set1(kExp2Magic);
  const Vec rounded = low + magic;
  const Vec f = low - (rounded - magic);
  // 2^f - 1 over f, minimax on |f| <= 1/2: relative error of 2^f below 2^-23.
  Vec q = fma(set1(1.3264659e-3f), f, set1(9.671566e-3f));
  q = fma(q, f, set1(5.5507343e-2f));
  q = fma(q, f, set1(2.4022241e-1f));
  q = fma(q, f, set1(6.931470e-1f));
  return scale_by_rounded(fma(q, f, set1(1.0f)), rounded);
}
#endif

// tanh(y) from 2 y, within 2.5 ulp, relative near 0 too: t / (t + 2) with t = expm1(|2 y|).
SVPO_INLINE Vec vtanh_of_half(Vec twice) {
  // tanh(10) is 1 in fp32.
  const Reduced r = reduce(min(set1(20.0f), abs(twice)));
  const Vec tail = fma(exp_tail(r.f) * r.f, r.f, r.f);
  const Vec power = scale2(set1(1.0f), r.k);
  const Vec t = fma(power, tail, power - set1(1.0f));
  return copysign(t / (t + set1(2.0f)), twice);
}

}  // namespace
