// How flow_logprob and its backward are planned and launched.
#pragma once

#include "cuda/flow_logprob.cuh"
#include "cuda/reduce_launch.cuh"

namespace flowgrove::cuda {

inline auto plan_flow_logprob(const FlowLogprob& op) {
  const auto kernel = with_layout(
      whole(op.states, op.x_next), op.states.v.kind, [](auto layout) { return flow_logprob_kernel<decltype(layout)>; });
  const int64_t children_of_a_row = op.children.offsets == nullptr ? op.children.fanout : op.edges;
  return plan_squares(kernel, op.states.rows, op.states.elements, op.edges, children_of_a_row);
}

template <typename Kernel>
cudaError_t launch_flow_logprob(
    const FlowLogprob& op, const Plan<Kernel>& plan, double* partials, cudaStream_t stream) {
  const cudaError_t error = launch(plan.kernel, plan.launch, stream, op, plan.partition, plan.edges_a_pass, partials);
  if (error != cudaSuccess || partials == nullptr) return error;
  return launch_logp(op.children, op.states.rows, plan.partition, partials, op.log_norm, op.precision, op.logp, stream);
}

inline cudaError_t launch_flow_logprob_backward(const FlowLogprobBackward& op, cudaStream_t stream) {
  const Partition partition = partition_of(op.states.elements);
  const bool all_whole = whole(op.states, op.x_next, op.grad_v, op.grad_v_uncond);
  const auto kernel = with_layout(
      all_whole, op.states.v.kind, [](auto layout) { return flow_logprob_backward_kernel<decltype(layout)>; });
  return launch(kernel, {op.states.rows * partition.parts, partition.threads}, stream, op, partition);
}

}  // namespace flowgrove::cuda
