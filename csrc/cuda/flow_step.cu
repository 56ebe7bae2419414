// flow_step on CUDA tensors.
#include "cuda/flow_step_launch.cuh"

#if !defined(__CUDA_ARCH__)
#include "cuda/run.h"

namespace flowgrove::cuda {

static void flow_step(const FlowStep& op, const Tensor& x) {
  OnDevice device(x);
  const auto plan = plan_flow_step(op);
  double* partials = static_cast<double*>(device.scratch(plan.partials * sizeof(double)));
  STD_CUDA_CHECK(launch_flow_step(op, plan, partials, device.stream));
}

}  // namespace flowgrove::cuda

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CUDA, m) {
  m.impl("flow_step", TORCH_BOX(&flowgrove::flow_step<flowgrove::cuda::flow_step>));
}
#endif
