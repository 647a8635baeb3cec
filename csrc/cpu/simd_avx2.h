// Vec on AVX2, FMA and F16C: 8 lanes, tails through a small buffer.
#pragma once

#include <immintrin.h>

namespace {

constexpr int kWidth = 8;

struct Vec { __m256 v; };

SVPO_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
SVPO_INLINE float first_lane(Vec a) { return _mm256_cvtss_f32(a.v); }

SVPO_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
SVPO_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
SVPO_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
SVPO_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
SVPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }   // a * b + c
SVPO_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
// The second operand where either is NaN.
SVPO_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
SVPO_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
SVPO_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// Magnitude of a with the sign of b.
SVPO_INLINE Vec copysign(Vec a, Vec b) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, a.v), _mm256_and_ps(sign, b.v))};
}
// a * 2^k for an integral |k| <= 250: two factors, so that denormals and inf come out right.
SVPO_INLINE Vec scale2(Vec a, Vec k) {
  const __m256i whole = _mm256_cvtps_epi32(k.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i one = _mm256_set1_epi32(127);
  const __m256i x = _mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
  const __m256i y = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), one), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(x)), _mm256_castsi256_ps(y))};
}

// For vexp2: rounded = t + kExp2Magic with t >= kExp2Lowest; a * 2^(t to the nearest integer), 0 below 2^-126. The low
// bits of the sum are the exponent field of the factor, and -127 makes that factor 0.
constexpr float kExp2Magic = 12583039.0f, kExp2Lowest = -127.0f;
SVPO_INLINE Vec scale_by_rounded(Vec a, Vec rounded) {
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(rounded.v), 23)))};
}

SVPO_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
SVPO_INLINE Vec load(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
SVPO_INLINE Vec load(const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

// Round to nearest even; a NaN stays a NaN.
SVPO_INLINE __m128i narrow(const bf16*, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256 safe = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(safe), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
SVPO_INLINE __m128i narrow(const fp16*, Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

SVPO_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
template <class T>
SVPO_INLINE void store(T* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, a)); }
// Past the cache, to an address aligned to the vector; visible to others after the fence.
SVPO_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
template <class T>
SVPO_INLINE void stream(T* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, a)); }
SVPO_INLINE void stream_fence() { _mm_sfence(); }

// The first n lanes from memory, the others `fill`; nothing past them is touched.
template <class T>
SVPO_INLINE Vec load_n(const T* p, int n, float fill) {
  T raw[kWidth] = {};
  for (int i = 0; i < n; ++i) raw[i] = p[i];
  alignas(32) float wide[kWidth];
  store(wide, load(raw));
  for (int i = n; i < kWidth; ++i) wide[i] = fill;
  return load(wide);
}
template <class T>
SVPO_INLINE void store_n(T* p, Vec a, int n) {
  T raw[kWidth];
  store(raw, a);
  for (int i = 0; i < n; ++i) p[i] = raw[i];
}

SVPO_INLINE float hmax(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
SVPO_INLINE float hsum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

}  // namespace
