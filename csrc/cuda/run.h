// What the ops use of torch: the device and stream of their tensors, and scratch memory.
//
// A .cu file includes this on the host's pass only (no __CUDA_ARCH__): torch's headers would
// be read again for every architecture.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "bindings.h"

namespace flowgrove::cuda {
namespace {

// Makes the device of a tensor current. What is launched on `stream`, torch's current one there, may use
// `scratch` memory after this has gone.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()), tensor_(tensor) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  // Aligned for doubles; nullptr for none. Torch's allocator hands it out again in the order of the stream.
  void* scratch(size_t bytes) {
    if (bytes == 0) return nullptr;
    scratch_ = torch::stable::new_empty(tensor_, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    return scratch_->mutable_data_ptr();
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& tensor_;
  OptionalTensor scratch_;
};

// Kernels check the offsets of the rows they compute; without rows none runs, and only no edges are right.
inline void check_edges(const States& states, int64_t edges) {
  check(
      states.rows > 0 || edges == 0, "child_offsets must rise from 0 to the number of rows of x_next (", edges, ")");
}

}  // namespace
}  // namespace flowgrove::cuda
