// What the CUDA kernels and `_C_cuda` ask of the driver. No call here makes a context.
#pragma once

extern "C" {

// CUDA versions as 1000 * major + 10 * minor: of the runtime linked in, and the newest the driver supports (0 = there is
// no driver).
int svpo_cuda_runtime_version(void);
int svpo_cuda_driver_version(void);

// Devices that the driver shows; 0 without one.
int svpo_cuda_device_count(void);

// 10 * major + minor of a device's compute capability, 0 when it cannot be asked.
int svpo_cuda_capability(int device);

}  // extern "C"
