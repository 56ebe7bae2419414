// How clean_estimate is launched.
#pragma once

#include "cuda/clean_estimate.cuh"
#include "cuda/rows_launch.cuh"

namespace flowgrove::cuda {

inline cudaError_t launch_clean_estimate(const CleanEstimate& op, cudaStream_t stream) {
  const Partition partition = partition_of(op.states.elements);
  const auto kernel = with_layout(
      whole(op.states, op.out), op.states.v.kind, [](auto layout) { return clean_estimate_kernel<decltype(layout)>; });
  return launch(kernel, {op.states.rows * partition.parts, partition.threads}, stream, op, partition);
}

}  // namespace flowgrove::cuda
