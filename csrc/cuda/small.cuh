// What the small ops have in common: vectors of any dtype, indices of two widths, several sums at a time; and the columns
// of rows that lie next to each other in no particular way.
#pragma once

#include "common.cuh"

namespace {

// A vector of any storage type as doubles; nothing (null) gives 0, an element that does not exist NaN.
struct Floats {
  const void* data;
  int dtype;
  int64_t size;
  SVPO_DEVICE double operator[](int64_t i) const {
    if (!data) return 0.0;
    if (i < 0 || i >= size) return NAN;
    if (dtype == SVPO_FP32) return static_cast<const float*>(data)[i];
    return dtype == SVPO_BF16 ? to_float(static_cast<const bf16*>(data)[i]) : to_float(static_cast<const fp16*>(data)[i]);
  }
};

// int64 (wide) or int32.
struct Indices {
  const void* data;
  int wide;
  SVPO_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Sums over the threads of a block, a multiple of a warp, for every thread: in a fixed order and with one barrier.
// `slots`: shared memory of kSums values a warp, used by no other sums of the kernel.
template <int kSums, class Slots>
SVPO_DEVICE void block_sums(double (&sums)[kSums], Slots& slots, int threads) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(sums[i]);
  if (threads == kWarp) return;
  const int warp = thread_x() / kWarp;
  if (thread_x() % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) slots[warp * kSums + i] = sums[i];
  }
  sync_threads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = slots[i];
  for (int other = 1; other < threads / kWarp; ++other) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += slots[other * kSums + i];
  }
}

// -- columns of a row --------------------------------------------------------------------------------------------------

constexpr int kColumns = 8;  // that a thread takes at a time: one 16-byte load of 16-bit numbers, two of fp32

// Columns that 16-byte loads and stores may take whole. A row of hidden and one of the head need not lie alike, so no
// scalars in front could align both: a row that does not start on 16 bytes goes column by column.
template <class T>
SVPO_DEVICE bool whole(const T* row, int64_t column, int64_t D) {
  return D - column >= kColumns && reinterpret_cast<uintptr_t>(row + column) % 16 == 0;
}

// Columns [column, column + kColumns) of a row of D, 0 behind its end.
template <class T>
SVPO_DEVICE void load_columns(const T* row, int64_t column, int64_t D, float (&x)[kColumns]) {
  if (whole(row, column, D)) {
#pragma unroll
    for (int i = 0; i < kColumns; i += kPack<T>) {
      const Pack<T> pack = load_pack(row + column + i);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) x[i + j] = to_float(pack.at[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) x[i] = column + i < D ? to_float(row[column + i]) : 0.0f;
}

template <class T>
SVPO_DEVICE void store_columns(T* row, int64_t column, int64_t D, const float (&x)[kColumns]) {
  if (whole(row, column, D)) {
#pragma unroll
    for (int i = 0; i < kColumns; i += kPack<T>) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) pack.at[j] = from_float<T>(x[i + j]);
      store_pack(row + column + i, pack);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (column + i < D) row[column + i] = from_float<T>(x[i]);
}

}  // namespace
