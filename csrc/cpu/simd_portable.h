// Vec without any instruction set of its own: 4 lanes of the compiler's generic vectors (SSE2, NEON, or scalar code).
#pragma once

namespace {

constexpr int kWidth = 4;

typedef float Lanes __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));

struct Vec { Lanes v; };

SVPO_INLINE Vec set1(float x) { return {Lanes{x, x, x, x}}; }
SVPO_INLINE float first_lane(Vec a) { return a.v[0]; }

SVPO_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
SVPO_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
SVPO_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
SVPO_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
SVPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }   // a * b + c, rounded twice
SVPO_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }  // c - a * b, rounded twice
// Lanes of a where mask is set, of b elsewhere.
SVPO_INLINE Vec select(Bits mask, Vec a, Vec b) {
  return {(Lanes)(((Bits)a.v & mask) | ((Bits)b.v & ~mask))};
}
// The second operand where either is NaN.
SVPO_INLINE Vec max(Vec a, Vec b) { return select(a.v > b.v, a, b); }
SVPO_INLINE Vec min(Vec a, Vec b) { return select(a.v < b.v, a, b); }
SVPO_INLINE Vec abs(Vec a) { return {(Lanes)((Bits)a.v & 0x7fffffff)}; }
// Magnitude of a with the sign of b.
SVPO_INLINE Vec copysign(Vec a, Vec b) {
  const Bits sign = Bits{} + INT32_MIN;
  return {(Lanes)(((Bits)a.v & ~sign) | ((Bits)b.v & sign))};
}
// a * 2^k for an integral |k| <= 250: two factors, so that denormals and inf come out right.
SVPO_INLINE Vec scale2(Vec a, Vec k) {
  const Bits whole = __builtin_convertvector(k.v, Bits);
  const Bits half = whole >> 1;
  return {a.v * (Lanes)((half + 127) << 23) * (Lanes)((whole - half + 127) << 23)};
}

// For vexp2: rounded = t + kExp2Magic with t >= kExp2Lowest; a * 2^(t to the nearest integer), 0 below 2^-126. The low
// bits of the sum are the exponent field of the factor, and -127 makes that factor 0.
constexpr float kExp2Magic = 12583039.0f, kExp2Lowest = -127.0f;
SVPO_INLINE Vec scale_by_rounded(Vec a, Vec rounded) { return {a.v * (Lanes)((Bits)rounded.v << 23)}; }

SVPO_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
SVPO_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

SVPO_INLINE float widen(float x) { return x; }
SVPO_INLINE float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
SVPO_INLINE float widen(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent fields differ by 112; the product also turns fp16's denormals into normal fp32 numbers.
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

SVPO_INLINE void narrow(float x, float* out) { *out = x; }
// Round to nearest even; a NaN stays a NaN.
SVPO_INLINE void narrow(float x, bf16* out) {
  const uint32_t bits = to_bits(x);
  out->bits = static_cast<uint16_t>((x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
SVPO_INLINE void narrow(float x, fp16* out) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u, rest = to_bits(x) & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) half = 0x7e00u;         // NaN
  else if (rest >= 0x477ff000u) half = 0x7c00u;   // rounds to 65536 or above
  else if (rest < 0x38800000u)                    // denormal in fp16: let the adder round at 2^-24
    half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000u;
  else half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  out->bits = static_cast<uint16_t>(sign | half);
}

// The first n lanes from memory, the others `fill`; nothing past them is touched.
template <class T>
SVPO_INLINE Vec load_n(const T* p, int n, float fill) {
  Lanes x = {fill, fill, fill, fill};
  for (int i = 0; i < n; ++i) x[i] = widen(p[i]);
  return {x};
}
template <class T>
SVPO_INLINE void store_n(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) narrow(a.v[i], p + i);
}
SVPO_INLINE Vec load(const float* p) {
  Vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
SVPO_INLINE void store(float* p, Vec a) { memcpy(p, &a, sizeof a); }
template <class T>
SVPO_INLINE Vec load(const T* p) { return load_n(p, kWidth, 0.0f); }
template <class T>
SVPO_INLINE void store(T* p, Vec a) { store_n(p, a, kWidth); }
template <class T>
SVPO_INLINE void stream(T* p, Vec a) { store(p, a); }
SVPO_INLINE void stream_fence() {}

SVPO_INLINE float hmax(Vec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
SVPO_INLINE float hsum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

}  // namespace
