// What the ops use of torch: the device and stream of their tensors, and scratch memory.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "bindings.h"

namespace flowgrove::cuda {

// Makes the device of a tensor current; `stream` is torch's current one there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace flowgrove::cuda
