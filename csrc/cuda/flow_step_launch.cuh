// How flow_step is planned and launched.
#pragma once

#include "cuda/flow_step.cuh"
#include "cuda/reduce_launch.cuh"

namespace flowgrove::cuda {

inline auto plan_flow_step(const FlowStep& op) {
  const bool drawn = op.noise.given.data == nullptr && op.noise.key.data != nullptr;
  const auto kernel = with_layout(whole(op.states, op.noise.given, op.x_next), op.states.v.kind, [&](auto layout) {
    using L = decltype(layout);
    if (!drawn) return flow_step_kernel<L, Draw::nothing>;
    return op.noise.root_rho == 0.0f ? flow_step_kernel<L, Draw::own> : flow_step_kernel<L, Draw::mixed>;
  });
  return plan_squares(kernel, op.states.rows, op.states.elements, op.states.rows * op.fanout, op.fanout);
}

template <typename Kernel>
cudaError_t launch_flow_step(const FlowStep& op, const Plan<Kernel>& plan, double* partials, cudaStream_t stream) {
  const cudaError_t error = launch(plan.kernel, plan.launch, stream, op, plan.partition, plan.edges_a_pass, partials);
  if (error != cudaSuccess || partials == nullptr) return error;
  const Children children = {nullptr, op.fanout};
  return launch_logp(children, op.states.rows, plan.partition, partials, op.log_norm, op.precision, op.logp, stream);
}

}  // namespace flowgrove::cuda
