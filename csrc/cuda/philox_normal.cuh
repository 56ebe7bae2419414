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

}  // namespace flowgrove::cuda
