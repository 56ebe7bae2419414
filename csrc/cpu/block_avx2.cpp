// block.h for processors with AVX2 and FMA.
#include "cpu/block.h"

#if defined(FLOWGROVE_X86_SETS)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

namespace flowgrove::cpu::avx2 {

// Four 64-bit lanes, see philox_lanes.h.
struct Lanes {
  static constexpr int COUNT = 4, FLOATS = 8;
  __m256i bits;

  static Lanes all(uint32_t value) { return {_mm256_set1_epi64x(value)}; }
  static Lanes from(uint32_t first) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
};

static inline Lanes product(Lanes a, Lanes b) {
  return {_mm256_mul_epu32(a.bits, b.bits)};
}

static inline Lanes high_halves(Lanes a) {
  return {_mm256_shuffle_epi32(a.bits, 0xF5)};
}

static inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
  return {_mm256_xor_si256(a.bits, _mm256_xor_si256(b.bits, c.bits))};
}

static inline void store_low_halves(Lanes a, uint32_t* to) {
  const __m256i packed = _mm256_permutevar8x32_epi32(a.bits, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

static inline void stream_floats(const float* from, float scale, float* to) {
  _mm256_stream_ps(to, _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_loadu_ps(from)));
}

}  // namespace flowgrove::cpu::avx2

#define FLOWGROVE_SET avx2
#define FLOWGROVE_LANES
#include "cpu/block_functions.h"
#endif
