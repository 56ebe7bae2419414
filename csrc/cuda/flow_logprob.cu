// flow_logprob and its backward on CUDA tensors.
#include "cuda/flow_logprob_launch.cuh"

#if !defined(__CUDA_ARCH__)
#include "cuda/run.h"

namespace flowgrove::cuda {

static void flow_logprob(const FlowLogprob& op, const Tensor& x) {
  check_edges(op.states, op.edges);
  OnDevice device(x);
  const auto plan = plan_flow_logprob(op);
  double* partials = static_cast<double*>(device.scratch(plan.partials * sizeof(double)));
  STD_CUDA_CHECK(launch_flow_logprob(op, plan, partials, device.stream));
}

static void flow_logprob_backward(const FlowLogprobBackward& op, const Tensor& x) {
  check_edges(op.states, op.edges);
  const OnDevice device(x);
  STD_CUDA_CHECK(launch_flow_logprob_backward(op, device.stream));
}

}  // namespace flowgrove::cuda

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CUDA, m) {
  m.impl("flow_logprob", TORCH_BOX(&flowgrove::flow_logprob<flowgrove::cuda::flow_logprob>));
  m.impl("flow_logprob_backward", TORCH_BOX(&flowgrove::flow_logprob_backward<flowgrove::cuda::flow_logprob_backward>));
}
#endif
