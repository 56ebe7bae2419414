// How kernels that add up sums are planned, and how log-probabilities are made of partial ones.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/rows_launch.cuh"

namespace flowgrove::cuda {

// The shared memory of a block that gathers so many sums.
inline size_t gathered_bytes(int64_t sums, int threads) {
  return sizeof(Gathered) + sums * threads * sizeof(float);
}

// Of flow_step and flow_logprob.
template <typename Kernel>
struct Plan {
  Kernel* kernel;
  Partition partition;
  int edges_a_pass;
  Launch launch;
  int64_t partials = 0;  // doubles of scratch memory; 0 where a cluster adds up the parts
};

template <typename Kernel>
Plan<Kernel> plan_squares(Kernel* kernel, int64_t rows, int64_t elements, int64_t edges, int64_t children_of_a_row) {
  const int64_t few = children_of_a_row < MOST_SUMS ? children_of_a_row : MOST_SUMS;
  const int64_t edges_a_pass = few > 1 ? few : 1;
  const Partition partition = in_turns(partition_of(elements), rows, MOST_PARTS);
  Plan<Kernel> plan = {kernel, partition, static_cast<int>(edges_a_pass), {rows * partition.blocks, partition.threads}};
  plan.launch.shared_bytes = gathered_bytes(edges_a_pass, partition.threads);
  Launch clustered = plan.launch;
  clustered.cluster = static_cast<int>(partition.blocks);
  if (partition.parts <= MOST_PARTS && fits(kernel, clustered)) {
    plan.launch = clustered;
  } else {
    plan.partials = edges * partition.parts;
  }
  return plan;
}

// logp from partials.
inline cudaError_t launch_logp(
    const Children& children, int64_t rows, const Partition& partition, const double* partials, const float* log_norm,
    const float* precision, float* logp, cudaStream_t stream) {
  return launch(
      logp_kernel, {rows, FINISHING_THREADS}, stream, children, partition.parts, partition.elements, partials, log_norm,
      precision, logp);
}

}  // namespace flowgrove::cuda
