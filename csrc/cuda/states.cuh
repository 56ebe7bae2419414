// A state and its children: which edges are a row's, the mean of its step, and the gradient of its velocity.
#pragma once

#include "cuda/rows.cuh"

namespace flowgrove::cuda {

struct Family {
  int64_t first, count;  // edges first … first + count − 1
};

// No block reads an edge before its row's offsets were found to lie in [0, edges].
DEVICE Family family_of(const Children& children, int64_t rows, int64_t edges, int64_t row) {
  const int64_t first = first_child(children, row), end = first_child(children, row + 1);
  const bool rise = 0 <= first && first <= end && end <= edges;
  const bool ends = (row > 0 || first == 0) && (row + 1 < rows || end == edges);
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

// x and v of a chunk on their way.
struct Fetched {
  Raw x, v;
};

template <typename L>
DEVICE Fetched fetch(const States& states, int64_t row, Chunk<L::WHOLE> chunk) {
  return {read_state(states.x, row, chunk), read_velocity<L>(states.v, row, chunk)};
}

// x, and v or the guided velocity.
template <typename L>
DEVICE Loaded loaded(const States& states, int64_t row, Chunk<L::WHOLE> chunk, const Fetched& fetched) {
  Loaded found = {widen_words(fetched.x), widen(fetched.v, kind_of<L>(states.v))};
  if (states.v_uncond.data == nullptr) return found;
  const Octet uncond = widen(read_velocity<L>(states.v_uncond, row, chunk), kind_of<L>(states.v_uncond));
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    found.velocity.at[i] = guided(found.velocity.at[i], uncond.at[i], states.guidance_scale);
  }
  return found;
}

// μ of a chunk of a row.
template <bool WHOLE>
DEVICE Octet mean_chunk(
    const States& states, const MeanCoefficients& coef, int64_t row, Chunk<WHOLE> chunk, const Loaded& loaded) {
  Octet mean;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) mean.at[i] = flowgrove::mean(coef.x, coef.v, loaded.x.at[i], loaded.velocity.at[i]);
  if (states.history.data == nullptr) return mean;
  const Octet history = widen_words(read_state(states.history, row, chunk));
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) mean.at[i] = with_history(coef.prev, history.at[i], mean.at[i]);
  return mean;
}

// Takes a part of a row through its chunks, and each of them through `count` edges from `first` on.
// What is read of x, v and, with EDGES, of the first edge's row is on its way before any of it is
// needed, and that of the next chunk is asked for.
//   on_chunk(chunk, start, loaded)    on_edge(chunk, start, c, values of edge first + c)    after(chunk, start)
template <typename L, bool EDGES, typename OnChunk, typename OnEdge, typename After>
DEVICE void walk(
    const States& states, const Part& part, const Rows& edges, int64_t first, int count, OnChunk on_chunk,
    OnEdge on_edge, After after) {
#pragma unroll 1
  for (int start = first_start(); start < part.count; start += stride()) {
    const auto chunk = chunk_of<L::WHOLE>(part, start);
    const Fetched fetched = fetch<L>(states, part.row, chunk);
    Raw edge = EDGES && count > 0 ? read_state(edges, first, chunk) : Raw{};
    if (start + stride() < part.count) {
      const auto next = chunk_of<L::WHOLE>(part, start + stride());
      expect(states.x, part.row, next, Kind::fp32);
      expect(states.v, part.row, next, kind_of<L>(states.v));
      if (EDGES && count > 0) expect(edges, first, next, Kind::fp32);
    }
    on_chunk(chunk, start, loaded<L>(states, part.row, chunk, fetched));
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      on_edge(chunk, start, c, widen_words(edge));
      if (EDGES && c + 1 < count) edge = read_state(edges, first + c + 1, chunk);
    }
    after(chunk, start);
  }
}

// What walk calls where there is nothing to do.
struct Nothing {
  template <typename... Arguments>
  DEVICE_MEMBER void operator()(const Arguments&...) const {}
};

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
DEVICE void write_gradient(
    const Octet& gradient, const States& states, const OutputRows& of_v, const OutputRows& of_v_uncond, int64_t row,
    Chunk<WHOLE> chunk) {
  const bool guided = states.v_uncond.data != nullptr;
  write_scaled(gradient, guided ? states.guidance_scale : 1.0f, of_v, row, chunk);
  if (guided) write_scaled(gradient, add(1.0f, -states.guidance_scale), of_v_uncond, row, chunk);
}

}  // namespace flowgrove::cuda
