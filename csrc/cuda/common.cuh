// What every CUDA kernel goes through: launches, threads, shared memory, warps, 16-byte packs and storage formats.
//
// Kernels use nothing of CUDA's own but this file, so that the same sources also compile as C++ and run on a CPU, where
// barriers, races and bounds are checked (tests/cuda_emulation). A primitive that is missing here is added twice: to
// the device half below and to tests/cuda_emulation/emulation.h.
//
// An entry point is `int svpo_cuda_<op>(..., int device, void* stream)`, declared in api.h with SVPO_CUDA_OP.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../api.h"
#include "../numerics.h"

// Keeps the message of svpo_cuda_last_error() and returns SVPO_CUDA_ERROR (status.cu).
int svpo_cuda_fail(const char* where, const char* why);

// Where a launch goes, and its blocks: x is the long axis (rows), y at most 65535.
struct Queue { int device; void* stream; };
struct Grid { int64_t x, y; };

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A kernel of blocks of at most `threads`, of which an SM is to hold `blocks`: what bounds its registers.
#define SVPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SVPO_DEVICE __device__ __forceinline__
#define SVPO_SHARED(type, name, count) __shared__ type name[count]
// `count` elements in the bytes that launch_clusters was given; one such array a kernel.
#define SVPO_DYNAMIC_SHARED(type, name, count)                            \
  extern __shared__ __align__(16) unsigned char svpo_dynamic_shared[];    \
  type* const name = reinterpret_cast<type*>(svpo_dynamic_shared)

namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

SVPO_DEVICE float to_float(float x) { return x; }
SVPO_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
SVPO_DEVICE float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T> SVPO_DEVICE T from_float(float x);
template <> SVPO_DEVICE float from_float<float>(float x) { return x; }
template <> SVPO_DEVICE bf16 from_float<bf16>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
template <> SVPO_DEVICE fp16 from_float<fp16>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }

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

SVPO_DEVICE int thread_x() { return threadIdx.x; }
SVPO_DEVICE int64_t block_x() { return blockIdx.x; }
SVPO_DEVICE int64_t block_y() { return blockIdx.y; }
SVPO_DEVICE int64_t grid_y() { return gridDim.y; }
SVPO_DEVICE void sync_threads() { __syncthreads(); }
SVPO_DEVICE void sync_warp() { __syncwarp(); }
// Thread-block clusters came with sm_90; a kernel of theirs is empty before.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
SVPO_DEVICE constexpr bool has_clusters() { return false; }
SVPO_DEVICE void sync_cluster() {}
#else
SVPO_DEVICE constexpr bool has_clusters() { return true; }
// A barrier of all threads of a cluster's blocks; what was written before it, in global memory too, is seen behind it.
SVPO_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif
// The value of lane (lane ^ offset), and of lane `lane`; all lanes take part.
template <class V> SVPO_DEVICE V shuffle_xor(V value, int offset) { return __shfl_xor_sync(0xffffffffu, value, offset); }
template <class V> SVPO_DEVICE V shuffle(V value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// The lanes for which `yes` holds; all lanes take part.
SVPO_DEVICE uint32_t ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
SVPO_DEVICE int popcount(uint32_t bits) { return __popc(bits); }
// 2^x by the special function unit: 2 ulp, denormal results are 0.
SVPO_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x for a normal x: 1 ulp.
SVPO_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SVPO_DEVICE uint4 load_16_bytes(const void* p) { return *static_cast<const uint4*>(p); }
SVPO_DEVICE void store_16_bytes(void* p, uint4 bits) { *static_cast<uint4*>(p) = bits; }

inline int cuda_status(const char* where, cudaError_t error) {
  return error == cudaSuccess ? SVPO_OK : svpo_cuda_fail(where, cudaGetErrorString(error));
}

// Makes a device the current one for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device), moved_ = error == cudaSuccess;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  cudaError_t error;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// Runs kernel(arguments...) on a queue; an empty grid runs nothing.
template <class... P, class... A>
int launch(const char* name, void (*kernel)(P...), Grid grid, int threads, Queue queue, A... arguments) {
  if (grid.x <= 0 || grid.y <= 0) return SVPO_OK;
  if (grid.x > INT32_MAX || grid.y > 65535) return svpo_cuda_fail(name, "more blocks than a grid can have");
  const DeviceGuard guard(queue.device);
  if (guard.error != cudaSuccess) return cuda_status(name, guard.error);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(queue.stream)>>>(arguments...);
  return cuda_status(name, cudaGetLastError());
}

// The same in clusters of `cluster` blocks along x, each block with bytes of shared memory for SVPO_DYNAMIC_SHARED.
template <class... P, class... A>
int launch_clusters(const char* name, void (*kernel)(P...), Grid grid, int cluster, int threads, int64_t shared_bytes,
                    Queue queue, A... arguments) {
  if (grid.x <= 0 || grid.y <= 0) return SVPO_OK;
  if (grid.x > INT32_MAX || grid.y > 65535) return svpo_cuda_fail(name, "more blocks than a grid can have");
  const DeviceGuard guard(queue.device);
  if (guard.error != cudaSuccess) return cuda_status(name, guard.error);
  const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
  if (allowed != cudaSuccess) return cuda_status(name, allowed);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &attribute, config.numAttrs = 1;
  return cuda_status(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Sets every byte of a buffer, in stream order.
inline int fill_bytes(void* to, int byte, int64_t bytes, Queue queue) {
  if (bytes <= 0) return SVPO_OK;
  const DeviceGuard guard(queue.device);
  if (guard.error != cudaSuccess) return cuda_status("fill_bytes", guard.error);
  return cuda_status("fill_bytes", cudaMemsetAsync(to, byte, bytes, static_cast<cudaStream_t>(queue.stream)));
}

// Copies bytes on the device, in stream order.
inline int copy_bytes(void* to, const void* from, int64_t bytes, Queue queue) {
  if (bytes <= 0) return SVPO_OK;
  const DeviceGuard guard(queue.device);
  if (guard.error != cudaSuccess) return cuda_status("copy_bytes", guard.error);
  const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
  return cuda_status("copy_bytes", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}

// Multiprocessors of a device; 1 where the driver does not say.
inline int processors(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0) return count;
  (void)cudaGetLastError();  // the launch will say what is wrong
  return 1;
}

// 10 * major + minor of a device's compute capability; 0 where the driver does not say.
inline int capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    return 10 * major + minor;
  (void)cudaGetLastError();
  return 0;
}

}  // namespace

#else
#include "emulation.h"
#endif

namespace {

constexpr int kWarp = 32;

SVPO_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// -- sums and maxima over threads, in a fixed order --------------------------------------------------------------------

template <class V>
SVPO_DEVICE V warp_sum(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}

SVPO_DEVICE float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, shuffle_xor(value, offset));
  return value;
}

// The sum over a block of kThreads, for every thread. One barrier: two sums in a row need slots of their own, which
// `slots`, shared memory of kThreads / kWarp values, gives them.
template <int kThreads, class V, class Slots>
SVPO_DEVICE V block_sum(V value, Slots& slots) {
  value = warp_sum(value);
  if (kThreads == kWarp) return value;
  if (thread_x() % kWarp == 0) slots[thread_x() / kWarp] = value;
  sync_threads();
  V sum = slots[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += slots[warp];
  return sum;
}

// -- 16-byte packs -----------------------------------------------------------------------------------------------------

// Elements that one load moves.
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack { T at[kPack<T>]; };

template <class T>
SVPO_DEVICE Pack<T> load_pack(const T* p) {
  const uint4 bits = load_16_bytes(p);
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}

template <class T>
SVPO_DEVICE void store_pack(T* p, const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof bits);
  store_16_bytes(p, bits);
}

// A run of `size` elements from any address, as packs that start on 16 bytes: the first may begin before the run, the
// last end behind it, and only what is inside is touched.
template <class T>
struct Run {
  T* data;
  int64_t size;
  int skip;  // elements of the first pack before the run

  SVPO_DEVICE Run(T* data, int64_t size)
      : data(data), size(size), skip(static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T))) {}
  SVPO_DEVICE int64_t packs() const { return ceil_div(size + skip, kPack<T>); }
  // Index in the run of the first element of pack k.
  SVPO_DEVICE int64_t begin(int64_t k) const { return k * kPack<T> - skip; }
  SVPO_DEVICE bool whole(int64_t k) const { return begin(k) >= 0 && begin(k) + kPack<T> <= size; }
  SVPO_DEVICE bool has(int64_t i) const { return i >= 0 && i < size; }
};

// Pack k with `fill` where it is outside the run. skip: that of the run beside which this one is read; where it differs
// from the run's own, no 16-byte load fits.
template <class T>
SVPO_DEVICE Pack<T> load_edge(const Run<const T>& run, int64_t k, T fill, int skip) {
  const int64_t begin = k * kPack<T> - skip;
  if (skip == run.skip && run.whole(k)) return load_pack(run.data + begin);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) pack.at[j] = run.has(begin + j) ? run.data[begin + j] : fill;
  return pack;
}

template <class T>
SVPO_DEVICE void store_edge(const Run<T>& run, int64_t k, const Pack<T>& pack) {
  const int64_t begin = run.begin(k);
  if (run.whole(k)) return store_pack(run.data + begin, pack);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j)
    if (run.has(begin + j)) run.data[begin + j] = pack.at[j];
}

}  // namespace
