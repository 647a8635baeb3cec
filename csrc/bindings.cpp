// The Python module `_C`: one line per SVPO_CPU_OP of api.h.
#include <atomic>

#include "bindings.h"
#include "runtime.h"

using namespace svpo;

namespace {

const char* const kIsaNames[] = {"portable", "avx2", "avx512"};
std::atomic<int> isa{-1};

template <class... A>
void bind(py::module_& m, const char* name, int (*portable)(A...), int (*avx2)(A...), int (*avx512)(A...)) {
  m.def(name, [=](typename Argument<A>::type... values) {
    int (*const builds[])(A...) = {portable, avx2, avx512};
    int status;
    {
      py::gil_scoped_release no_gil;
      status = builds[isa.load(std::memory_order_relaxed)](Argument<A>::get(values)...);
    }
    raise_status(name, status);
  });
}

void set_isa(const std::string& name) {
  for (int code = SVPO_ISA_PORTABLE; code <= SVPO_ISA_AVX512; ++code) {
    if (name != kIsaNames[code]) continue;
    if (code > svpo_isa_best())
      throw std::runtime_error("SVPO_CPU_ISA: " + name + " is not usable here, the best is " +
                               kIsaNames[svpo_isa_best()]);
    isa.store(code);
    return;
  }
  throw std::invalid_argument("SVPO_CPU_ISA must be avx512, avx2 or portable, got " + name);
}

}  // namespace

#if defined(SVPO_X86_ISAS)
#define SVPO_BIND(op) bind(m, #op, svpo_cpu_##op##_portable, svpo_cpu_##op##_avx2, svpo_cpu_##op##_avx512)
#else
#define SVPO_BIND(op) \
  bind(m, #op, svpo_cpu_##op##_portable, svpo_cpu_##op##_portable, svpo_cpu_##op##_portable)
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of svpo_kernels; use svpo_kernels._native, not this module";
  isa.store(svpo_isa_best());
  m.def("isa", [] { return kIsaNames[isa.load()]; }, "Instruction set in use: avx512, avx2 or portable");
  m.def("best_isa", [] { return kIsaNames[svpo_isa_best()]; }, "Best instruction set of this machine");
  m.def("set_isa", &set_isa, "Force an instruction set; RuntimeError when this machine lacks it");
  m.def("has_openmp", [] { return svpo_has_openmp() != 0; }, "Whether an OpenMP runtime was loaded before this module");

  SVPO_BIND(elementwise);
  SVPO_BIND(step_logps_fwd);
  SVPO_BIND(step_logps_bwd);
  SVPO_BIND(label_dots);
  SVPO_BIND(linear_rows);
  SVPO_BIND(linear_rows_scan);
  SVPO_BIND(linear_rows_finish);
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
  SVPO_BIND(tree_attention_fwd);
  SVPO_BIND(tree_attention_bwd);
}
