// x' = μ + s·z of every child of every row, and its log-probability. One block computes its
// parts of a row, for all its children.
#pragma once

#include "cuda/reduce.cuh"

namespace flowgrove::cuda {

// What becomes of a child, its squares added to sum c.
template <bool WHOLE>
DEVICE void finish_child(
    const FlowStep& op, const Octet& x_next, const Octet& mean, int64_t edge, int c, Chunk<WHOLE> chunk) {
  write_state(x_next, op.x_next, edge, chunk);
  const Octet stored = residual(x_next, mean);
  add_to_sum(c, stored, stored);
}

DEVICE Octet step_chunk(const Octet& mean, float std, const Octet& z) {
  Octet x_next;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) x_next.at[j] = step(mean.at[j], std, z.at[j]);
  return x_next;
}

// What becomes of a noise key: nothing is drawn, an edge's own normals, or these mixed with its siblings'.
enum class Draw { nothing, own, mixed };

// DRAW: from the noise key; else noise is given, or there is none. Mixed normals take more
// registers than four blocks leave each other.
template <typename L, Draw DRAW>
__global__ void __launch_bounds__(THREADS, L::WHOLE && DRAW == Draw::mixed ? 3 : BLOCKS_PER_SM<L>)
flow_step_kernel(
    const __grid_constant__ FlowStep op, const __grid_constant__ Partition partition, int edges_a_pass,
    double* partials) {
  begin_cluster(partials == nullptr);
  const Share share = share_of(partition);
  const MeanCoefficients coef = mean_coefficients(op.states, share.row);
  const float std = op.std[share.row];
  const int64_t first_edge = share.row * op.fanout, end = first_edge + op.fanout;
  const bool given = op.noise.given.data != nullptr;
  int pass = 0;
  for (int64_t first = first_edge; first < end; first += edges_a_pass, ++pass) {
    const int count = static_cast<int>(end - first < edges_a_pass ? end - first : edges_a_pass);
    if constexpr (DRAW != Draw::nothing) name_edges(op.noise, first, count);
    Octet mean;
    const auto on_chunk = [&](auto chunk, int, const Loaded& loaded) {
      mean = mean_chunk(op.states, coef, share.row, chunk, loaded);
    };
    const auto on_edge = [&](auto chunk, int, int c, const Octet& z) {
      if constexpr (DRAW != Draw::nothing) {
        finish_child(
            op, step_chunk(mean, std, drawn_chunk(op.noise, gathered().noise[c], chunk, DRAW == Draw::mixed)), mean,
            first + c, c, chunk);
      } else {
        finish_child(op, given ? step_chunk(mean, std, z) : mean, mean, first + c, c, chunk);
      }
    };
#pragma unroll 1
    for (int index = share.first; index < share.end; ++index) {
      const Part part = part_of(partition, share, index);
      begin_pass(count);
      if (DRAW == Draw::nothing && given) {
        walk<L, true>(op.states, part, op.noise.given, first, count, on_chunk, on_edge, Nothing{});
      } else {
        walk<L, false>(op.states, part, op.noise.given, first, count, on_chunk, on_edge, Nothing{});
      }
      note_squares(partition, part, first, count, pass, partials);
    }
    finish_squares(partition, share, first, count, pass, partials, op.log_norm, op.precision, op.logp);
  }
  end_cluster(partials == nullptr, pass);
}

}  // namespace flowgrove::cuda
