// The functions of block.h. No include guard: block_<instruction set>.cpp compiles them in a namespace of its
// own (FLOWGROVE_SET) under its target.

namespace flowgrove::cpu::FLOWGROVE_SET {

// bf16 is the upper half of an fp32.
FLOWGROVE_INLINE float from_bf16(uint16_t half) {
  return float_of(static_cast<uint32_t>(half) << 16);
}

// Round to nearest even; NaN stays NaN.
FLOWGROVE_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(((bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x400000u : rounded) >> 16);
}

// An fp16's exponent and mantissa read as fp32 are 2¹¹² times too small, subnormals included;
// infinities and NaN have a wrong exponent.
FLOWGROVE_INLINE float from_fp16(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  const uint32_t finite = bits_of(mul(float_of(magnitude), 0x1p112f));
  const uint32_t bits = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite;
  return float_of(bits | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// Round to nearest even by adding a power of two whose last bit is the fp16's; beyond 65519 infinity, NaN stays NaN.
FLOWGROVE_INLINE uint16_t to_fp16(float value) {
  const uint32_t bits = bits_of(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // At least 2⁻¹⁴.
  const uint32_t exponent = magnitude & 0x7F800000u, normal = exponent < 0x38800000u ? 0x38800000u : exponent;
  const float anchor = float_of(normal + (13u << 23));
  const float anchored = add(float_of(magnitude < 0x7F800000u ? magnitude : 0u), anchor);
  const uint32_t mantissa = bits_of(anchored) - bits_of(anchor);  // in units of the fp16's last bit
  const uint32_t finite = ((normal - 0x38800000u) >> 13) + mantissa;
  const uint32_t half = magnitude > 0x7F800000u ? 0x7E00u : magnitude >= 0x477FF000u ? 0x7C00u : finite;
  return static_cast<uint16_t>(half | sign >> 16);
}

static void widen(const void* from, Kind kind, int64_t n, float* to) {
  const auto halves = static_cast<const uint16_t*>(from);
  if (kind == Kind::bf16) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(halves[i]);
  } else if (kind == Kind::fp16) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_fp16(halves[i]);
  } else {
    memcpy(to, from, n * sizeof(float));
  }
}

static void narrow(const float* __restrict from, float scale, int64_t n, void* to, Kind kind) {
  const auto halves = static_cast<uint16_t*>(to);
  const auto floats = static_cast<float*>(to);
  if (kind == Kind::bf16) {
    for (int64_t i = 0; i < n; ++i) halves[i] = to_bf16(mul(scale, from[i]));
  } else if (kind == Kind::fp16) {
    for (int64_t i = 0; i < n; ++i) halves[i] = to_fp16(mul(scale, from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) floats[i] = mul(scale, from[i]);
  }
}

static void stream(const float* __restrict from, float scale, int64_t n, float* __restrict to) {
#if defined(FLOWGROVE_LANES)
  for (int64_t i = 0; i < n; i += Lanes::FLOATS) stream_floats(from + i, scale, to + i);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = mul(scale, from[i]);
#endif
}

static void guide(const float* v, const float* v_uncond, float guidance_scale, int64_t n, float* __restrict guided) {
  for (int64_t i = 0; i < n; ++i) guided[i] = flowgrove::guided(v[i], v_uncond[i], guidance_scale);
}

static void clean(const float* x, const float* v, float sigma, int64_t n, float* __restrict estimate) {
  for (int64_t i = 0; i < n; ++i) estimate[i] = flowgrove::clean(x[i], v[i], sigma);
}

static void mean(const float* x, const float* v, float x_coef, float v_coef, int64_t n, float* __restrict mean) {
  for (int64_t i = 0; i < n; ++i) mean[i] = flowgrove::mean(x_coef, v_coef, x[i], v[i]);
}

static void with_history(const float* __restrict history, float prev_coef, int64_t n, float* __restrict mean) {
  for (int64_t i = 0; i < n; ++i) mean[i] = flowgrove::with_history(prev_coef, history[i], mean[i]);
}

struct alignas(64) BlockWords {
  uint32_t w0[BLOCK / 4], w1[BLOCK / 4], w2[BLOCK / 4], w3[BLOCK / 4];
};

#if defined(FLOWGROVE_LANES)
#include "cpu/philox_lanes.h"
#else
static void draw_words(NoiseWords row, uint32_t first_block, int64_t blocks, BlockWords& words) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Words w = philox(
        {first_block + static_cast<uint32_t>(i), row.node, row.step, row.prompt}, row.seed, row.iteration);
    words.w0[i] = w.w0;
    words.w1[i] = w.w1;
    words.w2[i] = w.w2;
    words.w3[i] = w.w3;
  }
}
#endif

static void draw(NoiseWords row, uint32_t first_block, int64_t n, float* __restrict z) {
  const int64_t blocks = (n + 3) / 4;  // a buffer holds whole blocks
  BlockWords words;
  draw_words(row, first_block, blocks, words);
  for (int64_t i = 0; i < blocks; ++i) {
    const Normals four = normals(Words{words.w0[i], words.w1[i], words.w2[i], words.w3[i]});
    z[4 * i] = four.z0;
    z[4 * i + 1] = four.z1;
    z[4 * i + 2] = four.z2;
    z[4 * i + 3] = four.z3;
  }
}

static void correlate(
    float root_rho, const float* __restrict shared, float root_rest, int64_t n, float* __restrict own) {
  for (int64_t i = 0; i < n; ++i) own[i] = correlated(root_rho, shared[i], root_rest, own[i]);
}

static void step(const float* mean, const float* z, float std, int64_t n, float* __restrict x_next) {
  for (int64_t i = 0; i < n; ++i) x_next[i] = flowgrove::step(mean[i], std, z[i]);
}

static void residual(const float* left, const float* right, int64_t n, float* __restrict difference) {
  for (int64_t i = 0; i < n; ++i) difference[i] = flowgrove::residual(left[i], right[i]);
}

static void accumulate(float factor, const float* __restrict values, int64_t n, float* __restrict gradient) {
  for (int64_t i = 0; i < n; ++i) gradient[i] = fma(factor, values[i], gradient[i]);
}

// Σ left(i)·right(i) in 64 lanes, which are then added by halves.
template <class Product>
FLOWGROVE_INLINE double sum_in_lanes(int64_t n, const Product& add_product) {
  constexpr int64_t LANES = 64;
  alignas(64) float lanes[LANES] = {};
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t j = 0; j < LANES; ++j) lanes[j] = add_product(i + j, lanes[j]);
  }
  for (int64_t j = 0; j < n - whole; ++j) lanes[j] = add_product(whole + j, lanes[j]);
  for (int64_t width = LANES / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lanes[j] = add(lanes[j], lanes[j + width]);
  }
  return lanes[0];
}

static double dot(const float* left, const float* right, int64_t n) {
  return sum_in_lanes(
      n, [=](int64_t i, float sum) __attribute__((always_inline)) { return fma(left[i], right[i], sum); });
}

static double step_and_square(
    const float* x, const float* v, const float* z, float x_coef, float v_coef, float std, int64_t n,
    float* __restrict x_next) {
  return sum_in_lanes(n, [=](int64_t i, float sum) __attribute__((always_inline)) {
    const float mean = flowgrove::mean(x_coef, v_coef, x[i], v[i]);
    x_next[i] = flowgrove::step(mean, std, z[i]);
    const float r = flowgrove::residual(x_next[i], mean);
    return fma(r, r, sum);
  });
}

static double squared_residual(
    const float* x, const float* v, const float* x_next, float x_coef, float v_coef, int64_t n) {
  return sum_in_lanes(n, [=](int64_t i, float sum) __attribute__((always_inline)) {
    const float r = flowgrove::residual(x_next[i], flowgrove::mean(x_coef, v_coef, x[i], v[i]));
    return fma(r, r, sum);
  });
}

static void accumulate_residual(
    float factor, const float* x, const float* v, const float* x_next, float x_coef, float v_coef, int64_t n,
    float* __restrict gradient) {
  for (int64_t i = 0; i < n; ++i) {
    gradient[i] = fma(factor, flowgrove::residual(x_next[i], flowgrove::mean(x_coef, v_coef, x[i], v[i])), gradient[i]);
  }
}

extern const Block functions;
const Block functions = {
    widen, narrow, stream, guide, clean, mean, with_history, draw, correlate, step, step_and_square, residual,
    accumulate, dot, squared_residual, accumulate_residual};

}  // namespace flowgrove::cpu::FLOWGROVE_SET
