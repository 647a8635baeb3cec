// Vec on AVX-512 F, BW, DQ, VL: 16 lanes, tails by mask.
#pragma once

#include <immintrin.h>

namespace {

constexpr int kWidth = 16;

struct Vec { __m512 v; };

SVPO_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
SVPO_INLINE float first_lane(Vec a) { return _mm512_cvtss_f32(a.v); }

SVPO_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
SVPO_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
SVPO_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
SVPO_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
SVPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }   // a * b + c
SVPO_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
// The second operand where either is NaN.
SVPO_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
SVPO_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
SVPO_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// Magnitude of a with the sign of b.
SVPO_INLINE Vec copysign(Vec a, Vec b) {
  const __m512 sign = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(sign, a.v), _mm512_and_ps(sign, b.v))};
}
// a * 2^floor(k); underflows to denormals and 0, overflows to inf.
SVPO_INLINE Vec scale2(Vec a, Vec k) { return {_mm512_scalef_ps(a.v, k.v)}; }

// t = whole + f with whole = floor(t) and 0 <= f < 1; f = 0 for an infinite t.
SVPO_INLINE Vec fraction(Vec t) { return {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// 2^t for t <= 127, within 3 ulp and unbiased (5e-9 in the mean); 0 from -inf up to the underflow, NaN for NaN. The hot
// one: a degree more gives 1.3 ulp and costs 17 % of a softmax, whose sums and gradients do not show it.
SVPO_INLINE Vec vexp2(Vec t) {
  const Vec f = fraction(t);
  // (2^f - 1) / f, minimax on [0, 1]: relative error of 2^f below 2^-23. The scaling takes floor(t) by itself.
  Vec q = fma(set1(1.867441e-3f), f, set1(9.0163723e-3f));
  q = fma(q, f, set1(5.5800382e-2f));
  q = fma(q, f, set1(2.4016432e-1f));
  q = fma(q, f, set1(6.931513e-1f));
  return scale2(fma(q, f, set1(1.0f)), t);
}

SVPO_INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

SVPO_INLINE __m512 widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
// Round to nearest even; a NaN stays a NaN.
SVPO_INLINE __m256i narrow_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
}

SVPO_INLINE __m256i raw16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
SVPO_INLINE __m256i raw16_n(const void* p, int n) { return _mm256_maskz_loadu_epi16(lanes(n), p); }
SVPO_INLINE Vec fill_tail(__m512 x, int n, float fill) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), lanes(n), x)};
}

SVPO_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
SVPO_INLINE Vec load(const bf16* p) { return {widen_bf16(raw16(p))}; }
SVPO_INLINE Vec load(const fp16* p) { return {_mm512_cvtph_ps(raw16(p))}; }
// The first n lanes from memory, the others `fill`; nothing past them is touched.
SVPO_INLINE Vec load_n(const float* p, int n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes(n), p)};
}
SVPO_INLINE Vec load_n(const bf16* p, int n, float fill) { return fill_tail(widen_bf16(raw16_n(p, n)), n, fill); }
SVPO_INLINE Vec load_n(const fp16* p, int n, float fill) { return fill_tail(_mm512_cvtph_ps(raw16_n(p, n)), n, fill); }

SVPO_INLINE __m256i narrow(const bf16*, Vec a) { return narrow_bf16(a.v); }
SVPO_INLINE __m256i narrow(const fp16*, Vec a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

SVPO_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
template <class T>
SVPO_INLINE void store(T* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, a)); }
// Past the cache, to an address aligned to the vector; visible to others after the fence.
SVPO_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
template <class T>
SVPO_INLINE void stream(T* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, a)); }
SVPO_INLINE void stream_fence() { _mm_sfence(); }
SVPO_INLINE void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
template <class T>
SVPO_INLINE void store_n(T* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(p, a)); }

SVPO_INLINE float hmax(Vec a) { return _mm512_reduce_max_ps(a.v); }
SVPO_INLINE float hsum(Vec a) { return _mm512_reduce_add_ps(a.v); }

}  // namespace
