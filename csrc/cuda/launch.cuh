// How the host launches a kernel, and what it asks the device before.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>

namespace flowgrove::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  int cluster = 1;  // blocks that read each other's shared memory
  size_t shared_bytes = 0;
  bool early = false;  // see wait_for_launch_before; for GPUs that have clusters

  cudaLaunchConfig_t config(cudaLaunchAttribute& attribute, cudaStream_t stream) const {
    if (early) {
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early || cluster > 1;
    return config;
  }
};

template <typename... Parameters>
cudaError_t launch(
    void (*kernel)(Parameters...), const Launch& how, cudaStream_t stream,
    const std::type_identity_t<Parameters>&... arguments) {
  if (how.blocks == 0) return cudaSuccess;
  if (how.blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = how.config(attribute, stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Whether a question to the device was answered; that it was not is no error of the caller's.
inline bool answered(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

// 0 where the device does not answer.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  return answered(cudaGetDevice(&device)) && answered(cudaDeviceGetAttribute(&value, attribute, device)) ? value : 0;
}

inline size_t most_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Of one cluster, however many are launched: of an empty grid none would fit. No
// value where the device does not answer.
inline std::optional<bool> ask_whether_it_fits(const void* kernel, Launch how) {
  const size_t most = most_shared_bytes();
  if (most == 0) return std::nullopt;
  if (how.shared_bytes > most) return false;
  if (!answered(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)))) {
    return std::nullopt;
  }
  if (how.cluster == 1) return true;
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  cudaFuncAttributes compiled = {};
  if (major == 0 || !answered(cudaFuncGetAttributes(&compiled, kernel))) return std::nullopt;
  // Code for older devices, which newer ones run too, has no cluster barrier in it.
  if (major < 9 || compiled.ptxVersion < 90) return false;
  // More than 8 blocks.
  if (!answered(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))) return std::nullopt;
  how.blocks = how.cluster;
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = how.config(attribute, nullptr);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (!answered(error) && error != cudaErrorInvalidClusterSize) return std::nullopt;
  return error == cudaSuccess && clusters > 0;
}

// Whether the current device can run such blocks and clusters. Its answer is kept, for asking takes longer than a
// launch; without one they do not fit this time.
template <typename Kernel>
bool fits(Kernel* kernel, const Launch& how) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel*, int, int, int, size_t>, bool> known;
  int device = 0;
  if (!answered(cudaGetDevice(&device))) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key = {kernel, device, how.threads, how.cluster, how.shared_bytes};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const std::optional<bool> answer = ask_whether_it_fits(reinterpret_cast<const void*>(kernel), how);
  if (answer) known.emplace(key, *answer);
  return answer.value_or(false);
}

}  // namespace flowgrove::cuda
