// What the Python modules `_C` and `_C_cuda` share: pointers as integers, and statuses as exceptions.
#pragma once

#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "api.h"

namespace svpo {

namespace py = pybind11;

// A pointer argument is an integer on the Python side (tensor.data_ptr()), everything else is itself.
template <class T>
struct Argument {
  using type = T;
  static T get(T value) { return value; }
};
template <class T>
struct Argument<T*> {
  using type = uintptr_t;
  static T* get(uintptr_t value) { return reinterpret_cast<T*>(value); }
};

// cuda_error: what svpo_cuda_last_error() says, for SVPO_CUDA_ERROR.
inline void raise_status(const char* name, int status, const char* cuda_error = "") {
  const std::string op(name);
  if (status == SVPO_BAD_DTYPE) throw std::invalid_argument(op + ": dtype must be fp32, bf16 or fp16");
  if (status == SVPO_NO_MEMORY) throw std::bad_alloc();
  // The backend file knows the argument and says more.
  if (status == SVPO_BAD_INDEX) throw py::index_error(op + ": an index is out of range");
  if (status == SVPO_BAD_VALUE) throw py::value_error(op + ": a value is out of range");
  if (status == SVPO_CUDA_ERROR) throw std::runtime_error(op + ": " + cuda_error);
  if (status != SVPO_OK) throw std::runtime_error(op + ": unknown native status " + std::to_string(status));
}

}  // namespace svpo
