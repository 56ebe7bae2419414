// x̂0 = x − σ·v
#pragma once

#include "cuda/states.cuh"

namespace flowgrove::cuda {

template <typename L>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<L>)
clean_estimate_kernel(const __grid_constant__ CleanEstimate op, const __grid_constant__ Partition partition) {
  const Part part = part_of(partition);
  const float sigma = op.sigma[part.row];
  const auto on_chunk = [&](auto chunk, int, const Loaded& loaded) {
    Octet estimate;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) estimate.at[j] = clean(loaded.x.at[j], loaded.velocity.at[j], sigma);
    write_state(estimate, op.out, part.row, chunk);
  };
  walk<L, false>(op.states, part, Rows{}, 0, 0, on_chunk, Nothing{}, Nothing{});
}

}  // namespace flowgrove::cuda
