// How philox_normal is launched.
#pragma once

#include "cuda/philox_normal.cuh"
#include "cuda/rows_launch.cuh"

namespace flowgrove::cuda {

inline cudaError_t launch_philox_normal(const PhiloxNormal& op, cudaStream_t stream) {
  const Partition partition = partition_of(op.elements);
  const auto kernel = whole(op.elements, op.out) ? philox_normal_kernel<Layout<true, Kind::fp32>>
                                                 : philox_normal_kernel<Layout<false, Kind::fp32>>;
  return launch(kernel, {op.rows * partition.parts, partition.threads}, stream, op, partition);
}

}  // namespace flowgrove::cuda
