// The log-probability of given steps, and its gradient: r = x' − μ, logp = log_norm − κ·mean r², ∂logp/∂v = (2κb/D)·r.
#pragma once

#include "cuda/reduce.cuh"

namespace flowgrove::cuda {

template <bool WHOLE>
__global__ void __launch_bounds__(THREADS, blocks_per_sm(WHOLE))
flow_logprob_kernel(const __grid_constant__ FlowLogprob op, const __grid_constant__ Partition partition, int edges_a_pass, double* partials) {
  const Part part = part_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, part.row);
  const MeanCoefficients coef = mean_coefficients(op.states, part.row);
  const int64_t end = family.first + family.count;
  int pass = 0;
  for (int64_t first = family.first; first < end; first += edges_a_pass, ++pass) {
    const int count = static_cast<int>(end - first < edges_a_pass ? end - first : edges_a_pass);
    begin_pass(count);
#pragma unroll 1
    for (int start = first_start(); start < part.count; start += stride()) {
      const auto chunk = chunk_of<WHOLE>(part, start);
      const Octet mean = mean_chunk(op.states, coef, part.row, chunk);
#pragma unroll 1
      for (int c = 0; c < count; ++c) {
        const Octet found = residual(read_state(op.x_next, first + c, chunk), mean);
        add_to_sum(c, found, found);
      }
    }
    finish_squares(partition, part, first, count, pass, partials, op.log_norm, op.precision, op.logp);
  }
  leave_cluster(partials);
}

inline auto plan_flow_logprob(const FlowLogprob& op) {
  const auto kernel = whole(op.states, op.x_next) ? flow_logprob_kernel<true> : flow_logprob_kernel<false>;
  const int64_t children_of_a_row = op.children.offsets == nullptr ? op.children.fanout : op.edges;
  return plan_squares(kernel, op.states.rows, op.states.elements, op.edges, children_of_a_row);
}

template <typename Kernel>
cudaError_t launch_flow_logprob(const FlowLogprob& op, const Plan<Kernel>& plan, double* partials, cudaStream_t stream) {
  const cudaError_t error = launch(plan.kernel, plan.launch, stream, op, plan.partition, plan.edges_a_pass, partials);
  if (error != cudaSuccess || partials == nullptr) return error;
  return launch_logp(op.children, op.states.rows, plan.partition, partials, op.log_norm, op.precision, op.logp, stream);
}

template <bool WHOLE>
__global__ void __launch_bounds__(THREADS, blocks_per_sm(WHOLE))
flow_logprob_backward_kernel(const __grid_constant__ FlowLogprobBackward op, const __grid_constant__ Partition partition) {
  const Part part = part_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, part.row);
  const MeanCoefficients coef = mean_coefficients(op.states, part.row);
  const float slope = static_cast<float>(2.0 * op.precision[part.row] * coef.v / partition.elements);  // no chunk, no division by 0
#pragma unroll 1
  for (int start = first_start(); start < part.count; start += stride()) {
    const auto chunk = chunk_of<WHOLE>(part, start);
    const Octet mean = mean_chunk(op.states, coef, part.row, chunk);
    Octet gradient = {};
#pragma unroll 1
    for (int64_t edge = family.first; edge < family.first + family.count; ++edge) {
      const Octet found = residual(read_state(op.x_next, edge, chunk), mean);
      accumulate(gradient, mul(op.grad[edge], slope), found);
    }
    write_gradient(gradient, op.states, op.grad_v, op.grad_v_uncond, part.row, chunk);
  }
}

inline cudaError_t launch_flow_logprob_backward(const FlowLogprobBackward& op, cudaStream_t stream) {
  const Partition partition = partition_of(op.states.elements);
  const bool all_whole = whole(op.states, op.x_next, op.grad_v, op.grad_v_uncond);
  const auto kernel = all_whole ? flow_logprob_backward_kernel<true> : flow_logprob_backward_kernel<false>;
  return launch(kernel, {op.states.rows * partition.parts, partition.threads}, stream, op, partition);
}

}  // namespace flowgrove::cuda
