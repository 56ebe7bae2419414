// The part of CUDA that csrc/cuda/ uses, for the CPU: types, qualifiers, intrinsics and runtime calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// ---- what a thread sees ----

extern dim3 threadIdx, blockIdx, blockDim;  // of the thread that runs

namespace emulated {

char* shared_memory();
double shuffle_xor(double value, int mask);
void block_barrier();
void cluster_arrive();
void cluster_wait();
void* of_block(void* own, unsigned rank);
[[noreturn]] void trap();
void print(const char* line);
void require(bool fine, const char* message);

}  // namespace emulated

#define __syncthreads emulated::block_barrier
#define __trap emulated::trap
#define __cluster_barrier_arrive emulated::cluster_arrive
#define __cluster_barrier_arrive_relaxed emulated::cluster_arrive
#define __cluster_barrier_wait emulated::cluster_wait
#define __cluster_map_shared_rank emulated::of_block
#define printf emulated::print

inline double __shfl_xor_sync(unsigned lanes, double value, int mask) {
  emulated::require(lanes == 0xFFFFFFFFu, "a shuffle of a part of a warp");
  return emulated::shuffle_xor(value, mask);
}

template <typename T>
T __ldg(const T* from) {
  emulated::require(reinterpret_cast<uintptr_t>(from) % sizeof(T) == 0, "a misaligned read");
  return *from;
}

// ---- bf16 and fp16 ----

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) {
  return {bits};
}

inline uint16_t __half_as_ushort(__half value) {
  return value.bits;
}

inline float __half2float(__half value) {
  _Float16 half;
  memcpy(&half, &value.bits, sizeof half);
  return static_cast<float>(half);
}

inline __half __float2half_rn(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  __half found;
  memcpy(&found.bits, &half, sizeof half);
  return found;
}

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) {
  return value.bits;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

// ---- the runtime ----

using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  int ptxVersion;
};

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaGetLastError();

namespace emulated {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Parameters&... arguments) {
  return emulated::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
