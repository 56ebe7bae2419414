// What the kernels use of the machine: shared memory, sums over a warp, clusters of thread blocks, and how a kernel
// ends on a user's mistake.
//
// What runs on the host lies in launch.cuh and, for what NAME.cuh holds, in NAME_launch.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#include "arguments.h"

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

namespace flowgrove::cuda {

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

}  // namespace flowgrove::cuda
