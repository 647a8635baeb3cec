// The Python module `_C_cuda`: one line per SVPO_CUDA_OP of api.h.
#include "bindings.h"
#include "cuda/device.h"

using namespace svpo;

namespace {

template <class... A>
void bind(py::module_& m, const char* name, int (*op)(A...)) {
  m.def(name, [=](typename Argument<A>::type... values) {
    int status;
    {
      py::gil_scoped_release no_gil;  // a launch waits when the queue is full
      status = op(Argument<A>::get(values)...);
    }
    raise_status(name, status, svpo_cuda_last_error());
  });
}

}  // namespace

#define SVPO_BIND(op) bind(m, #op, svpo_cuda_##op)

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of svpo_kernels; use svpo_kernels._native, not this module";
  // Both come from setup.py.
  m.attr("archs") = SVPO_CUDA_ARCHS;
  m.attr("toolkit") = SVPO_CUDA_TOOLKIT;
  m.def("runtime_version", &svpo_cuda_runtime_version, "CUDA version of the runtime linked in, 13000 for 13.0");
  m.def("driver_version", &svpo_cuda_driver_version, "Newest CUDA version of the driver, 0 when there is none");
  m.def("device_count", &svpo_cuda_device_count, "Devices that the driver shows");
  m.def("capability", &svpo_cuda_capability, "10 * major + minor of a device, 0 when it cannot be asked");

  SVPO_BIND(step_logps_fwd);
  SVPO_BIND(step_logps_bwd);
  SVPO_BIND(label_dots);
  SVPO_BIND(linear_rows);
  SVPO_BIND(linear_rows_unit);
  SVPO_BIND(linear_row_stats);
  SVPO_BIND(linear_rows_grad);
  SVPO_BIND(reduce_steps);
  SVPO_BIND(row_grads);
  SVPO_BIND(branch_hidden);
  SVPO_BIND(branch_weight);
  SVPO_BIND(svpo_loss_fwd);
  SVPO_BIND(svpo_loss_bwd);
  SVPO_BIND(step_policy_loss_fwd);
  SVPO_BIND(step_policy_loss_bwd);
  SVPO_BIND(prm_scores_fwd);
  SVPO_BIND(prm_scores_bwd);
  SVPO_BIND(prm_loss_fwd);
  SVPO_BIND(prm_loss_bwd);
  SVPO_BIND(aggregate_scores_fwd);
  SVPO_BIND(aggregate_scores_bwd);
}
