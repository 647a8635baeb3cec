// The device half of csrc/cuda/common.cuh for a CPU: the CUDA kernels compiled as C++ and run block by block, a block's
// threads as fibres that take turns at barriers and warp operations. Test only; see emulation.cpp for what it checks.
#pragma once

#include <functional>
#include <vector>

#include "../../csrc/cpu/simd.h"  // storage formats, their conversions and for_dtype

#define SVPO_KERNEL(threads, blocks) inline void
#define SVPO_DEVICE inline
#define SVPO_SHARED(type, name, count)                      \
  static const char name##_key = 0;                         \
  const emulation::Shared<type> name(&name##_key, (count), #name)

#define SVPO_DYNAMIC_SHARED(type, name, count)              \
  static const char name##_key = 0;                         \
  emulation::check_dynamic((count) * static_cast<int64_t>(sizeof(type)), __LINE__); \
  const emulation::Shared<type> name(&name##_key, (count), #name)

#define SVPO_LINE int line = __builtin_LINE()

struct uint4 { uint32_t x, y, z, w; };

namespace emulation {

// -- the running thread, in emulation.cpp ------------------------------------------------------------------------------

extern int now_thread;
extern int64_t now_block_x, now_block_y, now_grid_y;

void barrier(int line);
void warp_barrier(int line);
void cluster_barrier(int line);
// Fails when a block asks for more shared memory than it was launched with.
void check_dynamic(int64_t bytes, int line);
// Hands `bits` to the warp, waits for all its lanes, and returns what lane `source` handed in.
uint64_t exchange(uint64_t bits, int source, int line);
uint32_t vote(bool yes, int line);
// Ends the launch with an error.
[[noreturn]] void fail(const char* what, const char* name, int64_t index, int line);
// Runs body() for every thread of every block, in the order of the schedule in force; the blocks of a cluster at once.
int run(const char* name, int64_t blocks_x, int64_t blocks_y, int cluster, int threads, int64_t shared_bytes,
        const std::function<void()>& body);
int processors();
int capability();

// -- shared memory -----------------------------------------------------------------------------------------------------

// Who touched an element last, and in which intervals between barriers of the block and of the warp.
struct Access {
  int writer = -1, reader = -1;              // threads; reader -2: several
  int64_t write_block = 0, write_warp = 0;   // intervals of the last write
  int64_t read_block = 0, read_warp = 0, read_by_warp = -1;  // of the last reads; by warp -2: several
};

struct Array {
  std::vector<char> bytes;
  std::vector<Access> accesses;
  const char* name = "";
  int64_t block = 0;  // the last block that used it
};

Array& shared_array(const void* key, int64_t count, int64_t item_bytes, const char* name);
void check_read(Array& array, int64_t index, int line);
void check_write(Array& array, int64_t index, int line);

// An element of shared memory: reads and writes are whole, and looked at.
template <class T>
class Element {
 public:
  Element(Array& array, int64_t index, int line) : array_(array), index_(index), line_(line) {}
  operator T() const {
    check_read(array_, index_, line_);
    T value;
    memcpy(static_cast<void*>(&value), array_.bytes.data() + index_ * sizeof(T), sizeof(T));
    return value;
  }
  const Element& operator=(const T& value) const {
    check_write(array_, index_, line_);
    memcpy(array_.bytes.data() + index_ * sizeof(T), &value, sizeof(T));
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
  const Element& operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }

 private:
  Array& array_;
  int64_t index_;
  int line_;
};

// An index and the line it was written on.
struct Index {
  int64_t value;
  int line;
  Index(int64_t value, SVPO_LINE) : value(value), line(line) {}
};

template <class T>
class Shared {
 public:
  Shared(const void* key, int64_t count, const char* name) : array_(shared_array(key, count, sizeof(T), name)) {}
  Element<T> operator[](Index at) const {
    if (at.value < 0 || at.value >= static_cast<int64_t>(array_.accesses.size())) fail("out of bounds", array_.name, at.value, at.line);
    return Element<T>(array_, at.value, at.line);
  }

 private:
  Array& array_;
};

template <class V>
uint64_t to_word(V value) {
  static_assert(sizeof(V) <= sizeof(uint64_t), "a warp exchanges at most 8 bytes a lane");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class V>
V from_word(uint64_t bits) {
  V value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

// -- the primitives ----------------------------------------------------------------------------------------------------

namespace {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return widen(x); }
inline float to_float(fp16 x) { return widen(x); }

inline int thread_x() { return emulation::now_thread; }
inline int64_t block_x() { return emulation::now_block_x; }
inline int64_t block_y() { return emulation::now_block_y; }
inline int64_t grid_y() { return emulation::now_grid_y; }
inline void sync_threads(SVPO_LINE) { emulation::barrier(line); }
inline constexpr bool has_clusters() { return true; }
inline void sync_cluster(SVPO_LINE) { emulation::cluster_barrier(line); }
inline void sync_warp(SVPO_LINE) { emulation::warp_barrier(line); }
template <class V> V shuffle_xor(V value, int offset, SVPO_LINE) {
  return emulation::from_word<V>(emulation::exchange(emulation::to_word(value), (thread_x() % 32) ^ offset, line));
}
template <class V> V shuffle(V value, int lane, SVPO_LINE) {
  return emulation::from_word<V>(emulation::exchange(emulation::to_word(value), lane, line));
}
inline uint32_t ballot(bool yes, SVPO_LINE) { return emulation::vote(yes, line); }
inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;  // flushes; a NaN stays
}
inline float reciprocal_approx(float x) { return 1.0f / x; }

inline uint4 load_16_bytes(const void* p, SVPO_LINE) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulation::fail("a 16-byte load is not aligned", "", 0, line);
  uint4 bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}
inline void store_16_bytes(void* p, uint4 bits, SVPO_LINE) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulation::fail("a 16-byte store is not aligned", "", 0, line);
  memcpy(p, &bits, sizeof bits);
}

template <class... P, class... A>
int launch(const char* name, void (*kernel)(P...), Grid grid, int threads, Queue, A... arguments) {
  if (grid.x <= 0 || grid.y <= 0) return SVPO_OK;
  if (grid.x > INT32_MAX || grid.y > 65535) return svpo_cuda_fail(name, "more blocks than a grid can have");
  return emulation::run(name, grid.x, grid.y, 1, threads, 0, [&] { kernel(arguments...); });
}

template <class... P, class... A>
int launch_clusters(const char* name, void (*kernel)(P...), Grid grid, int cluster, int threads, int64_t shared_bytes,
                    Queue, A... arguments) {
  if (grid.x <= 0 || grid.y <= 0) return SVPO_OK;
  return emulation::run(name, grid.x, grid.y, cluster, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline int fill_bytes(void* to, int byte, int64_t bytes, Queue) {
  if (bytes > 0) memset(to, byte, static_cast<size_t>(bytes));
  return SVPO_OK;
}

inline int copy_bytes(void* to, const void* from, int64_t bytes, Queue) {
  if (bytes > 0) memcpy(to, from, static_cast<size_t>(bytes));
  return SVPO_OK;
}

inline int processors(int) { return emulation::processors(); }
inline int capability(int) { return emulation::capability(); }

}  // namespace
