// block.h for processors with AVX-512 (F, BW, DQ, VL).
#include "cpu/block.h"

#if defined(FLOWGROVE_X86_SETS)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace flowgrove::cpu::avx512 {

// Eight 64-bit lanes, see philox_lanes.h.
struct Lanes {
  static constexpr int COUNT = 8, FLOATS = 16;
  __m512i bits;

  static Lanes all(uint32_t value) { return {_mm512_set1_epi64(value)}; }
  static Lanes from(uint32_t first) {
    return {_mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
};

static inline Lanes product(Lanes a, Lanes b) {
  return {_mm512_mul_epu32(a.bits, b.bits)};
}

static inline Lanes high_halves(Lanes a) {
  return {_mm512_shuffle_epi32(a.bits, static_cast<_MM_PERM_ENUM>(0xF5))};
}

static inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
  return {_mm512_ternarylogic_epi64(a.bits, b.bits, c.bits, 0x96)};
}

static inline void store_low_halves(Lanes a, uint32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(a.bits));
}

static inline void stream_floats(const float* from, float scale, float* to) {
  _mm512_stream_ps(to, _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(from)));
}

}  // namespace flowgrove::cpu::avx512

#define FLOWGROVE_SET avx512
#define FLOWGROVE_LANES
#include "cpu/block_functions.h"
#endif
