// What the CPU ops do to a block of up to BLOCK neighbouring elements, in vector registers and the first-level cache.
//
// Each function is compiled once per instruction set (block_avx512.cpp, block_avx2.cpp, block_baseline.cpp) and chosen
// at run time. Sums fold in an order that the number of elements fixes, so every instruction set gives the same bits.
#pragma once

#include "arguments.h"
#include "cpu/instruction_set.h"

namespace flowgrove::cpu {

// Elements: a few buffers of them stay in the first-level cache; a multiple of Philox's four.
constexpr int64_t BLOCK = 1024;

// A fp32 buffer of one block.
struct alignas(64) Buffer {
  float values[BLOCK];
  operator float*() { return values; }
};

struct Block {
  // Elements of any kind → fp32.
  void (*widen)(const void* from, Kind kind, int64_t n, float* to);
  // scale·from → elements of any kind.
  void (*narrow)(const float* from, float scale, int64_t n, void* to, Kind kind);
  // scale·from → fp32 past the caches, for outputs too large to be found there again. `to`
  // is 64-byte aligned, n a multiple of 16.
  void (*stream)(const float* from, float scale, int64_t n, float* to);
  void (*guide)(const float* v, const float* v_uncond, float guidance_scale, int64_t n, float* guided);
  void (*clean)(const float* x, const float* v, float sigma, int64_t n, float* estimate);
  void (*mean)(const float* x, const float* v, float x_coef, float v_coef, int64_t n, float* mean);
  void (*with_history)(const float* history, float prev_coef, int64_t n, float* mean);
  // Standard normals of elements 4·first_block … of a row.
  void (*draw)(NoiseWords row, uint32_t first_block, int64_t n, float* z);
  void (*correlate)(float root_rho, const float* shared, float root_rest, int64_t n, float* own);
  void (*step)(const float* mean, const float* z, float std, int64_t n, float* x_next);
  // The mean of a step without history, the step and Σ (x' − μ)² in one pass.
  double (*step_and_square)(
      const float* x, const float* v, const float* z, float x_coef, float v_coef, float std, int64_t n, float* x_next);
  void (*residual)(const float* left, const float* right, int64_t n, float* difference);
  // gradient += factor·values
  void (*accumulate)(float factor, const float* values, int64_t n, float* gradient);
  double (*dot)(const float* left, const float* right, int64_t n);
  // The same in one pass each, for steps without history: Σ (x' − μ)², and gradient += factor·(x' − μ).
  double (*squared_residual)(
      const float* x, const float* v, const float* x_next, float x_coef, float v_coef, int64_t n);
  void (*accumulate_residual)(
      float factor, const float* x, const float* v, const float* x_next, float x_coef, float v_coef, int64_t n,
      float* gradient);
};

// The functions for the processor that runs this.
const Block& block();

}  // namespace flowgrove::cpu
