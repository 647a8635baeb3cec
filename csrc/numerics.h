// Scalar formulas shared by every native backend: host and device, no dependence on the instruction set.
//
//   z = softcap * tanh(z0 / softcap) / temperature        J = dz/dz0 = (1 - tanh^2(z0 / softcap)) / temperature
//
// softcap 0 means none. All in an anonymous namespace: the CPU files that include this header are compiled once per
// instruction set, and a shared inline symbol would let the linker run AVX-512 code on an old CPU.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define SVPO_HD __host__ __device__ __forceinline__
#else
#define SVPO_HD inline
#endif

namespace {

// z of a raw logit z0.
SVPO_HD double svpo_logit(double z0, double temperature, double softcap) {
  const double capped = softcap > 0.0 ? softcap * tanh(z0 / softcap) : z0;
  return capped / temperature;
}

// J = dz/dz0 at a raw logit z0.
SVPO_HD double svpo_logit_slope(double z0, double temperature, double softcap) {
  if (!(softcap > 0.0)) return 1.0 / temperature;
  const double u = tanh(z0 / softcap);
  return (1.0 - u) * (1.0 + u) / temperature;
}

// Log-prob of a label from e = exp(z_l - m) and the sum of exp(z_j - m) over all other columns: never above 0.
// `shifted` = z_l - m decides alone where e underflows.
SVPO_HD double svpo_logp(double shifted, double e, double others) {
  return e > 0.0 ? -log1p(others / e) : shifted - log(others);
}

// Unit gradient d logp_l / d z_l = 1 - p_l, from the log-prob and never from a rounded difference.
SVPO_HD double svpo_one_minus_p(double logp) { return -expm1(logp); }

// log(sigmoid(x)), finite for every finite x.
SVPO_HD double svpo_logsigmoid(double x) { return (x < 0.0 ? x : 0.0) - log1p(exp(-fabs(x))); }

// sigmoid(x), exact at both ends.
SVPO_HD double svpo_sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x < 0.0 ? e : 1.0) / (1.0 + e);
}

}  // namespace
