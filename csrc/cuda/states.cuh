// A state and its children: which edges are a row's, the mean of its step, and the gradient of its velocity.
#pragma once

#include "cuda/rows.cuh"

namespace flowgrove::cuda {

// Whether all chunks of the states and of these rows are whole.
template <typename... AnyRows>
bool whole(const States& states, const AnyRows&... rows) {
  return whole(states.elements, states.x, states.v, states.v_uncond, states.history, rows...);
}

struct Family {
  int64_t first, count;  // edges first … first + count − 1
};

// No block reads an edge before its row's offsets were found to lie in [0, edges].
DEVICE Family family_of(const Children& children, int64_t rows, int64_t edges, int64_t row) {
  const int64_t first = first_child(children, row), end = first_child(children, row + 1);
  const bool rise = 0 <= first && first <= end && end <= edges, ends = (row > 0 || first == 0) && (row + 1 < rows || end == edges);
  require_of_block(rise && ends, "child_offsets must rise from 0 to the number of rows of x_next\n");
  return {first, end - first};
}

// The coefficients of a row's mean.
struct MeanCoefficients {
  float x, v, prev;
};

DEVICE MeanCoefficients mean_coefficients(const States& states, int64_t row) {
  const float prev = states.prev_coef == nullptr ? 0.0f : states.prev_coef[row];
  const bool fine = states.history.data != nullptr || prev == 0.0f;
  require_of_block(fine, "these coefficients need history=, the previous clean estimate: prev_coef is not 0\n");
  return {states.x_coef[row], states.v_coef[row], prev};
}

struct Loaded {
  Octet x, velocity;
};

// A chunk of a row: x, and v or the guided velocity. All of it is on its way before the first value is needed.
template <bool WHOLE>
DEVICE Loaded load(const States& states, int64_t row, Chunk<WHOLE> chunk) {
  const bool has_uncond = states.v_uncond.data != nullptr;
  const Octet x = read_state(states.x, row, chunk);
  const Raw v = read(states.v, row, chunk);
  const Raw v_uncond = has_uncond ? read(states.v_uncond, row, chunk) : Raw{};
  Loaded loaded = {x, widen(v, states.v.kind)};
  if (!has_uncond) return loaded;
  const Octet uncond = widen(v_uncond, states.v_uncond.kind);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) loaded.velocity.at[i] = guided(loaded.velocity.at[i], uncond.at[i], states.guidance_scale);
  return loaded;
}

DEVICE Octet mean_chunk(const Loaded& loaded, const MeanCoefficients& coef) {
  Octet mean;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) mean.at[i] = flowgrove::mean(coef.x, coef.v, loaded.x.at[i], loaded.velocity.at[i]);
  return mean;
}

// μ of a chunk of a row.
template <bool WHOLE>
DEVICE Octet mean_chunk(const States& states, const MeanCoefficients& coef, int64_t row, Chunk<WHOLE> chunk) {
  Octet mean = mean_chunk(load(states, row, chunk), coef);
  if (states.history.data == nullptr) return mean;
  const Octet history = read_state(states.history, row, chunk);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) mean.at[i] = with_history(coef.prev, history.at[i], mean.at[i]);
  return mean;
}

DEVICE Octet residual(const Octet& left, const Octet& right) {
  Octet difference;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) difference.at[i] = flowgrove::residual(left.at[i], right.at[i]);
  return difference;
}

// gradient += factor·direction
DEVICE void accumulate(Octet& gradient, float factor, const Octet& direction) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) gradient.at[i] = flowgrove::fma(factor, direction.at[i], gradient.at[i]);
}

template <bool WHOLE>
DEVICE void write_scaled(const Octet& gradient, float factor, const OutputRows& rows, int64_t row, Chunk<WHOLE> chunk) {
  Octet scaled;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) scaled.at[i] = mul(factor, gradient.at[i]);
  write(scaled, rows, row, chunk);
}

// The gradient of the guided velocity, split between v and v_uncond.
template <bool WHOLE>
DEVICE void write_gradient(const Octet& gradient, const States& states, const OutputRows& of_v, const OutputRows& of_v_uncond, int64_t row, Chunk<WHOLE> chunk) {
  const bool guided = states.v_uncond.data != nullptr;
  write_scaled(gradient, guided ? states.guidance_scale : 1.0f, of_v, row, chunk);
  if (guided) write_scaled(gradient, add(1.0f, -states.guidance_scale), of_v_uncond, row, chunk);
}

}  // namespace flowgrove::cuda
