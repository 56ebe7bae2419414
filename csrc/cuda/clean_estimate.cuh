// x̂0 = x − σ·v
#pragma once

#include "cuda/states.cuh"

namespace flowgrove::cuda {

template <bool WHOLE>
__global__ void __launch_bounds__(THREADS, blocks_per_sm(WHOLE))
clean_estimate_kernel(const __grid_constant__ CleanEstimate op, const __grid_constant__ Partition partition) {
  const Part part = part_of(partition);
  const float sigma = op.sigma[part.row];
#pragma unroll 1
  for (int start = first_start(); start < part.count; start += stride()) {
    const auto chunk = chunk_of<WHOLE>(part, start);
    const Loaded loaded = load(op.states, part.row, chunk);
    Octet estimate;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) estimate.at[j] = clean(loaded.x.at[j], loaded.velocity.at[j], sigma);
    write_state(estimate, op.out, part.row, chunk);
  }
}

inline cudaError_t launch_clean_estimate(const CleanEstimate& op, cudaStream_t stream) {
  const Partition partition = partition_of(op.states.elements);
  const auto kernel = whole(op.states, op.out) ? clean_estimate_kernel<true> : clean_estimate_kernel<false>;
  return launch(kernel, {op.states.rows * partition.parts, partition.threads}, stream, op, partition);
}

}  // namespace flowgrove::cuda
