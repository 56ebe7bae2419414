// What happens to one element: the arithmetic of every compiled op, the same source for g++ and nvcc.
//
// Noise: Philox4x32-10, counter (block, node, step, prompt), key (seed, iteration); u = ((r >> 9) + ½)·2⁻²³; Box–Muller
// Step:    μ = a·x + b·v + c·p        x' = μ + s·z        r = x' − μ        logp = log_norm − κ·mean r²
// Loss:    L = max(−A·ρ, −A·clip(ρ, 1−ε_lo, 1+ε_hi))
//
// Every operation is one correctly rounded fp32 instruction, with fma written out: CPU and GPU
// give the same bits, and so do all ops.
// Sources: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11); Box and Muller (1958); GRPO
// (2402.03300); Flow-GRPO (2505.05470).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FLOWGROVE_INLINE static __host__ __device__ __forceinline__
#else
#define FLOWGROVE_INLINE static inline __attribute__((always_inline))
#endif

namespace flowgrove {

// ---- rounding: the compiler may contract a·b + c unless it is told the rounding of each operation ----

FLOWGROVE_INLINE float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;  // compiled with -ffp-contract=off
#endif
}

FLOWGROVE_INLINE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FLOWGROVE_INLINE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// Correctly rounded, of 2⁻¹⁰⁰ < a < 2¹²⁰: the steps that __fsqrt_rn takes there,
// without its branch for all other numbers.
FLOWGROVE_INLINE float square_root(float a) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
  const float root = __fmul_rn(a, inverse);
  return __fmaf_rn(__fmaf_rn(-root, root, a), __fmul_rn(0.5f, inverse), root);
#else
  return __builtin_sqrtf(a);
#endif
}

FLOWGROVE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FLOWGROVE_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- noise ----

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Normals {
  float z0, z1, z2, z3;
};

// The words of one row's noise; the block is the fourth part of the element's index.
struct NoiseWords {
  uint32_t seed, iteration, step, prompt, node;
};

struct Product {
  uint32_t low, high;
};

// Both halves of a·b. One GPU instruction gives both; from C++ the compiler makes two.
FLOWGROVE_INLINE Product product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  Product halves;
  asm(
      "{\n\t.reg .u64 wide;\n\tmul.wide.u32 wide, %2, %3;\n\tmov.b64 {%0, %1}, wide;\n\t}"
      : "=r"(halves.low), "=r"(halves.high)
      : "r"(a), "r"(b));
  return halves;
#else
  return {a * b, static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32)};
#endif
}

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u, PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

FLOWGROVE_INLINE Words philox(Words counter, uint32_t key0, uint32_t key1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const Product first = product(counter.w0, PHILOX_M0), second = product(counter.w2, PHILOX_M1);
    counter = {second.high ^ counter.w1 ^ key0, second.low, first.high ^ counter.w3 ^ key1, first.low};
    key0 += PHILOX_W0;
    key1 += PHILOX_W1;
  }
  return counter;
}

// (r >> 9 + ½)·2⁻²³ in (0, 1), exact in fp32: 2⁻²⁴ ≤ u ≤ 1 − 2⁻²⁴. The 23 bits are the fraction of a number in [1, 2),
// from which 1 − 2⁻²⁴ is taken: integers are converted at an eighth of the rate of an addition.
FLOWGROVE_INLINE float uniform(uint32_t word) {
  return add(float_of(0x3F800000u | word >> 9), -0x1.fffffep-1f);
}

// ln u of a normal u > 0 within about an ulp: u = 2^e·m, m in [2/3, 4/3), ln m by a minimax polynomial of m − 1.
FLOWGROVE_INLINE float logarithm(float u) {
  const uint32_t bits = bits_of(u);
  const uint32_t exponent = (bits - 0x3F2AAAABu) & 0xFF800000u;  // e·2²³
  constexpr float TO_INTEGER = 12582912.0f;  // 1.5·2²³: added to its bits, an integer is added to its value
  const float e = add(
      float_of(bits_of(TO_INTEGER) + static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 23)), -TO_INTEGER);
  const float f = add(float_of(bits - exponent), -1.0f);  // exact
  float p = -0.12948945f;
  p = fma(p, f, 0.14004785f);
  p = fma(p, f, -0.12167159f);
  p = fma(p, f, 0.14001155f);
  p = fma(p, f, -0.16682306f);
  p = fma(p, f, 0.20010749f);
  p = fma(p, f, -0.24999717f);
  p = fma(p, f, 0.33333209f);
  p = fma(p, f, -0.5f);
  const float tail = fma(mul(f, f), p, mul(e, -1.9046542e-9f));  // the part of ln 2 below its fp32 value
  return fma(e, 0.69314718f, add(f, tail));
}

struct Pair {
  float first, second;
};

// (cos a, sin a) within about an ulp for 0 ≤ a ≤ 2π: a = q·π/2 + r with |r| ≤ π/4.
FLOWGROVE_INLINE Pair cosine_and_sine(float angle) {
  constexpr float TO_INTEGER = 12582912.0f;  // 1.5·2²³: the low bits of a sum with it are the nearest integer
  const float shifted = fma(angle, 0.63661977f, TO_INTEGER);
  const uint32_t quadrant = bits_of(shifted);
  const float q = add(shifted, -TO_INTEGER);
  const float r = fma(q, 4.3711388e-8f, fma(q, -1.5707964f, angle));
  const float t = mul(r, r);
  const float sine = fma(mul(r, t), fma(fma(-1.9515216e-4f, t, 8.3321603e-3f), t, -0.16666655f), r);
  const float cosine = fma(
      mul(t, t), fma(fma(2.4433080e-5f, t, -1.3887315e-3f), t, 4.1666646e-2f), fma(t, -0.5f, 1.0f));
  const bool swapped = (quadrant & 1u) != 0;
  const uint32_t c = bits_of(swapped ? sine : cosine), s = bits_of(swapped ? cosine : sine);
  return {float_of(c ^ (((quadrant + 1u) & 2u) << 30)), float_of(s ^ ((quadrant & 2u) << 30))};
}

// √(−2 ln u0)·(cos, sin)(fl32(2π)·u1)
FLOWGROVE_INLINE Pair box_muller(uint32_t word0, uint32_t word1) {
  const float radius = square_root(mul(-2.0f, logarithm(uniform(word0))));
  const Pair direction = cosine_and_sine(mul(6.2831855f, uniform(word1)));
  return {mul(radius, direction.first), mul(radius, direction.second)};
}

FLOWGROVE_INLINE Normals normals(Words w) {
  const Pair low = box_muller(w.w0, w.w1), high = box_muller(w.w2, w.w3);
  return {low.first, low.second, high.first, high.second};
}

// The four standard normals of elements 4·block … 4·block + 3.
FLOWGROVE_INLINE Normals normals(NoiseWords row, uint32_t block) {
  return normals(philox({block, row.node, row.step, row.prompt}, row.seed, row.iteration));
}

// √ρ·ξ_shared + √(1−ρ)·ξ_own
FLOWGROVE_INLINE float correlated(float root_rho, float shared, float root_rest, float own) {
  return fma(root_rho, shared, mul(root_rest, own));
}

// ---- step ----

FLOWGROVE_INLINE float guided(float v, float v_uncond, float guidance_scale) {
  return fma(guidance_scale, add(v, -v_uncond), v_uncond);
}

FLOWGROVE_INLINE float mean(float x_coef, float v_coef, float x, float v) {
  return fma(v_coef, v, mul(x_coef, x));
}

FLOWGROVE_INLINE float with_history(float prev_coef, float history, float mean) {
  return fma(prev_coef, history, mean);
}

FLOWGROVE_INLINE float step(float mean, float std, float z) {
  return fma(std, z, mean);
}

FLOWGROVE_INLINE float residual(float x_next, float mean) {
  return add(x_next, -mean);
}

FLOWGROVE_INLINE float clean(float x, float v, float sigma) {
  return fma(-sigma, v, x);
}

// ---- one edge ----

// Σ over the elements of a row, divided by their number; 0 for a row without elements.
FLOWGROVE_INLINE float mean_of(double sum, int64_t elements) {
  return static_cast<float>(sum / static_cast<double>(elements > 0 ? elements : 1));
}

FLOWGROVE_INLINE float log_probability(float log_norm, float precision, float mean_square) {
  return fma(-precision, mean_square, log_norm);
}

struct Surrogate {
  float value;     // max(−A·ρ, −A·clip(ρ)), NaN if −A·ρ is
  float slope;     // ∂value/∂(log ρ): −A·ρ, or 0 where the clip removes the gradient
  int8_t clipped;  // −1 below, +1 above, whatever the sign of A
};

// floor = 1 − ε_lo, ceiling = 1 + ε_hi
FLOWGROVE_INLINE Surrogate surrogate(float ratio, float advantage, float floor, float ceiling) {
  const bool below = ratio < floor, above = ratio > ceiling;
  const float plain = mul(-advantage, ratio), clipped = mul(-advantage, below ? floor : above ? ceiling : ratio);
  const bool removed = (advantage > 0.0f && above) || (advantage < 0.0f && below);
  return {plain < clipped ? clipped : plain, removed ? 0.0f : plain, static_cast<int8_t>(above - below)};
}

// b²/(2s²), by which the mean of (v − v_ref)² is the KL divergence per element; 0 where a step has no noise.
FLOWGROVE_INLINE float kl_scale(float v_coef, float std) {
  const float ratio = std > 0.0f ? v_coef / std : 0.0f;
  return mul(0.5f, mul(ratio, ratio));
}

}  // namespace flowgrove
