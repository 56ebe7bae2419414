// philox_normal on CUDA tensors.
#include "cuda/philox_normal_launch.cuh"

#if !defined(__CUDA_ARCH__)
#include "cuda/run.h"

namespace flowgrove::cuda {

static void philox_normal(const PhiloxNormal& op, const Tensor& out) {
  const OnDevice device(out);
  STD_CUDA_CHECK(launch_philox_normal(op, device.stream));
}

}  // namespace flowgrove::cuda

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CUDA, m) {
  m.impl("philox_normal", TORCH_BOX(&flowgrove::philox_normal<flowgrove::cuda::philox_normal>));
}
#endif
