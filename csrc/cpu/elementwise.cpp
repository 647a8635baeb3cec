// exp, tanh and 2^x over an array: what tests hold against double precision on every instruction set.
#include "simd_math.h"

extern "C" int SVPO_ENTRY(elementwise)(const float* x, float* out, int64_t n, int function) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int left = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    const Vec a = load_n(x + i, left, 0.0f);
    store_n(out + i, function == 0 ? vexp(a) : function == 1 ? vtanh_of_half(a + a) : vexp2(a), left);
  }
  return SVPO_OK;
}
