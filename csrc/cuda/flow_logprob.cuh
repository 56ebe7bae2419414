// The log-probability of given steps, and its gradient: r = x' − μ, logp = log_norm − κ·mean r², ∂logp/∂v = (2κb/D)·r.
#pragma once

#include "cuda/reduce.cuh"

namespace flowgrove::cuda {

template <typename L>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<L>)
flow_logprob_kernel(
    const __grid_constant__ FlowLogprob op, const __grid_constant__ Partition partition, int edges_a_pass,
    double* partials) {
  begin_cluster(partials == nullptr);
  const Share share = share_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, share.row);
  const MeanCoefficients coef = mean_coefficients(op.states, share.row);
  const int64_t end = family.first + family.count;
  int pass = 0;
  for (int64_t first = family.first; first < end; first += edges_a_pass, ++pass) {
    const int count = static_cast<int>(end - first < edges_a_pass ? end - first : edges_a_pass);
    Octet mean;
    const auto on_chunk = [&](auto chunk, int, const Loaded& loaded) {
      mean = mean_chunk(op.states, coef, share.row, chunk, loaded);
    };
    const auto on_edge = [&](auto, int, int c, const Octet& x_next) {
      const Octet found = residual(x_next, mean);
      add_to_sum(c, found, found);
    };
#pragma unroll 1
    for (int index = share.first; index < share.end; ++index) {
      const Part part = part_of(partition, share, index);
      begin_pass(count);
      walk<L, true>(op.states, part, op.x_next, first, count, on_chunk, on_edge, Nothing{});
      note_squares(partition, part, first, count, pass, partials);
    }
    finish_squares(partition, share, first, count, pass, partials, op.log_norm, op.precision, op.logp);
  }
  end_cluster(partials == nullptr, pass);
}

template <typename L>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<L>)
flow_logprob_backward_kernel(
    const __grid_constant__ FlowLogprobBackward op, const __grid_constant__ Partition partition) {
  const Part part = part_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, part.row);
  const MeanCoefficients coef = mean_coefficients(op.states, part.row);
  // No chunk, no division by 0.
  const float slope = static_cast<float>(2.0 * op.precision[part.row] * coef.v / partition.elements);
  Octet mean, gradient;
  walk<L, true>(
      op.states, part, op.x_next, family.first, static_cast<int>(family.count),
      [&](auto chunk, int, const Loaded& loaded) {
        mean = mean_chunk(op.states, coef, part.row, chunk, loaded);
        gradient = {};
      },
      [&](auto, int, int c, const Octet& x_next) {
        accumulate(gradient, mul(op.grad[family.first + c], slope), residual(x_next, mean));
      },
      [&](auto chunk, int) { write_gradient(gradient, op.states, op.grad_v, op.grad_v_uncond, part.row, chunk); });
}

}  // namespace flowgrove::cuda
