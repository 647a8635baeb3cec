// What went wrong on the CUDA side, in words.
#include <stdio.h>

#include "common.cuh"

namespace {

thread_local char message[256];

}  // namespace

int svpo_cuda_fail(const char* where, const char* why) {
  snprintf(message, sizeof message, "%s: %s", where, why);
  return SVPO_CUDA_ERROR;
}

extern "C" const char* svpo_cuda_last_error() { return message; }
