// Standard normals that a key names: [rows, D].
#pragma once

#include "cuda/noise.cuh"

namespace flowgrove::cuda {

template <typename L>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<L>)
philox_normal_kernel(const __grid_constant__ PhiloxNormal op, const __grid_constant__ Partition partition) {
  const Part part = part_of(partition);
  require_words<require_of_block>(op.key, part.row, false);
  const NoiseWords words = edge_noise(op.key, part.row).words;
#pragma unroll 1
  for (int start = first_start(); start < part.count; start += stride()) {
    const auto chunk = chunk_of<L::WHOLE>(part, start);
    const uint32_t block = static_cast<uint32_t>(chunk.first / 4);
    write_state(octet_of(normals(words, block), normals(words, block + 1)), op.out, part.row, chunk);
  }
}

inline cudaError_t launch_philox_normal(const PhiloxNormal& op, cudaStream_t stream) {
  const Partition partition = partition_of(op.elements);
  const auto kernel = whole(op.elements, op.out) ? philox_normal_kernel<Layout<true, Kind::fp32>>
                                                 : philox_normal_kernel<Layout<false, Kind::fp32>>;
  return launch(kernel, {op.rows * partition.parts, partition.threads}, stream, op, partition);
}

}  // namespace flowgrove::cuda
