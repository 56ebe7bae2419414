// clean_estimate on CUDA tensors.
#include "cuda/clean_estimate_launch.cuh"

#if !defined(__CUDA_ARCH__)
#include "cuda/run.h"

namespace flowgrove::cuda {

static void clean_estimate(const CleanEstimate& op, const Tensor& x) {
  const OnDevice device(x);
  STD_CUDA_CHECK(launch_clean_estimate(op, device.stream));
}

}  // namespace flowgrove::cuda

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CUDA, m) {
  m.impl("clean_estimate", TORCH_BOX(&flowgrove::clean_estimate<flowgrove::cuda::clean_estimate>));
}
#endif
