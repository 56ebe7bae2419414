// What the kernels use of the machine: shared memory, sums over a warp, clusters of thread blocks, launches, and
// how a kernel ends on a user's mistake.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>

#include "arguments.h"

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

namespace flowgrove::cuda {

// ---- in a kernel ----

constexpr int WARP = 32;

DEVICE int warp() {
  return threadIdx.x / WARP;
}

DEVICE int warps() {
  return blockDim.x / WARP;
}

DEVICE int threads() {
  return blockDim.x;
}

DEVICE int lane() {
  return threadIdx.x % WARP;
}

// The sum over a warp in every lane of it: a butterfly, so that all lanes hold the same bits.
DEVICE double warp_sum(double value) {
#pragma unroll
  for (int mask = WARP / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, mask);
  return value;
}

// The dynamic shared memory of the block; the only kind that the kernels use.
DEVICE char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ uint4 flowgrove_shared[];
  return reinterpret_cast<char*>(flowgrove_shared);
#else
  return emulated::shared_memory();
#endif
}

// Thread block clusters came with sm_90; before, a cluster is one block. The intrinsics are those that
// cooperative_groups is made of: its header would cost every file four seconds. arrive publishes what the block wrote;
// after wait, all that the blocks of the cluster published can be read.
DEVICE void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __syncthreads();
#else
  __cluster_barrier_arrive();
#endif
}

// The same of a block that has published nothing yet: others learn that it has begun.
DEVICE void cluster_arrive_first() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __syncthreads();
#else
  __cluster_barrier_arrive_relaxed();
#endif
}

DEVICE void cluster_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}

// The same place in the shared memory of another block of the cluster. That block has begun once
// a barrier of the cluster lies behind.
DEVICE double* of_block(double* own, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return own;
#else
  return static_cast<double*>(__cluster_map_shared_rank(own, rank));
#endif
}

// A launch that may begin early begins as soon as all blocks of the launch before have said so, and waits for
// its end before it reads what that wrote.
DEVICE void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DEVICE void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Writes 16 bytes by one instruction; a plain assignment the compiler may take apart.
DEVICE void store(uint4* to, uint4 value) {
#if defined(__CUDACC__)
  asm volatile(
      "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
#else
  *to = value;
#endif
}

// The same pointer, which the compiler no longer takes apart: it would carry one pointer an element
// through a loop and run out of registers.
template <typename T>
DEVICE T* opaque(T* pointer) {
#if defined(__CUDACC__)
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// What lies in device memory the host cannot check: one line, then the end, as with torch._assert_async.
[[noreturn]] static __device__ __attribute__((noinline)) void fail(const char* message) {
  printf(message);
  __trap();
  __builtin_unreachable();
}

[[noreturn]] static __device__ __attribute__((noinline)) void fail_together(const char* message) {
  if (threadIdx.x == 0) printf(message);
  __syncthreads();  // or a trap could come before the line
  __trap();
  __builtin_unreachable();
}

DEVICE void require(bool fine, const char* message) {
  if (!fine) fail(message);
}

// Where all threads of a block find the same: one line a block, not one a thread.
DEVICE void require_of_block(bool fine, const char* message) {
  if (!fine) fail_together(message);
}

// ---- on the host ----

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
