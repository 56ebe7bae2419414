// x' = μ + s·z of every child of every row, and its log-probability. One block computes one part of a row, for all its children.
#pragma once

#include "cuda/reduce.cuh"

namespace flowgrove::cuda {

template <bool WHOLE>
__global__ void __launch_bounds__(THREADS, blocks_per_sm(WHOLE))
flow_step_kernel(const __grid_constant__ FlowStep op, const __grid_constant__ Partition partition, int edges_a_pass, double* partials) {
  const Part part = part_of(partition);
  const MeanCoefficients coef = mean_coefficients(op.states, part.row);
  const float std = op.std[part.row];
  const int64_t first_edge = part.row * op.fanout, end = first_edge + op.fanout;
  int pass = 0;
  for (int64_t first = first_edge; first < end; first += edges_a_pass, ++pass) {
    const int count = static_cast<int>(end - first < edges_a_pass ? end - first : edges_a_pass);
    name_edges(op.noise, first, count);
    begin_pass(count);
#pragma unroll 1
    for (int start = first_start(); start < part.count; start += stride()) {
      const auto chunk = chunk_of<WHOLE>(part, start);
      const Octet mean = mean_chunk(op.states, coef, part.row, chunk);
#pragma unroll 1
      for (int c = 0; c < count; ++c) {
        Octet x_next = mean;
        if (has_noise(op.noise)) {
          const Octet z = noise_chunk(op.noise, gathered().noise[c], first + c, chunk);
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) x_next.at[j] = step(mean.at[j], std, z.at[j]);
        }
        write_state(x_next, op.x_next, first + c, chunk);
        const Octet stored = residual(x_next, mean);
        add_to_sum(c, stored, stored);
      }
    }
    finish_squares(partition, part, first, count, pass, partials, op.log_norm, op.precision, op.logp);
  }
  leave_cluster(partials);
}

inline auto plan_flow_step(const FlowStep& op) {
  const auto kernel = whole(op.states, op.noise.given, op.x_next) ? flow_step_kernel<true> : flow_step_kernel<false>;
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
