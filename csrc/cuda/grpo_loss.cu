// grpo_loss on CUDA tensors.
#include "cuda/grpo_loss_launch.cuh"

#if !defined(__CUDA_ARCH__)
#include "cuda/run.h"

namespace flowgrove::cuda {

static void grpo_loss(const GRPOLoss& op, const Tensor& x) {
  check_edges(op.states, op.edges);
  OnDevice device(x);
  const GRPOPlan plan = plan_grpo_loss(op);
  STD_CUDA_CHECK(launch_grpo_loss(op, plan, device.scratch(plan.scratch_bytes(op)), device.stream));
}

}  // namespace flowgrove::cuda

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CUDA, m) {
  m.impl("grpo_loss", TORCH_BOX(&flowgrove::grpo_loss<flowgrove::cuda::grpo_loss>));
}
#endif
