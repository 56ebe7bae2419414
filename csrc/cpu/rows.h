// How the CPU ops walk over rows: in chunks that a thread takes whole, in blocks that stay in the first-level cache.
//
// Chunks depend on the number of elements alone, and their sums are added in order: so no result depends on
// batch size, order or number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/block.h"
#include "tensors.h"

namespace flowgrove::cpu {

constexpr int64_t CHUNK = 16 * BLOCK;

inline int64_t chunks_of(int64_t elements) {
  return (elements + CHUNK - 1) / CHUNK;
}

// Calls row(b, chunks) for every row. chunks(body) calls body(c) for every chunk of the row: on this
// thread where there are enough rows for all threads (a row then stays in this core's cache from one pass
// over it to the next), else on all threads.
template <class Row>
void for_each_row(int64_t rows, int64_t elements, const Row& row) {
  const int64_t chunks = chunks_of(elements);
  if (chunks <= 1 || rows >= 2 * torch::stable::get_num_threads()) {
    const auto serially = [chunks](const auto& body) {
      for (int64_t c = 0; c < chunks; ++c) body(c);
    };
    const int64_t grain = 1 + 2 * BLOCK / std::max<int64_t>(elements, 1);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) row(b, serially);
    });
    return;
  }
  const auto on_all_threads = [chunks](const auto& body) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) body(c);
    });
  };
  for (int64_t b = 0; b < rows; ++b) row(b, on_all_threads);
}

// Calls body(start, n) for every block of a chunk.
template <class Body>
void for_each_block(int64_t chunk, int64_t elements, const Body& body) {
  const int64_t end = std::min(elements, (chunk + 1) * CHUNK);
  for (int64_t start = chunk * CHUNK; start < end; start += BLOCK) body(start, std::min(BLOCK, end - start));
}

// n elements of a row from `start` on as fp32: where they lie, or widened into `buffer`.
inline const float* load(const Rows& rows, int64_t row, int64_t start, int64_t n, float* buffer) {
  const int64_t offset = row * rows.stride + start;
  if (rows.kind == Kind::fp32) return static_cast<const float*>(rows.data) + offset;
  block().widen(static_cast<const uint16_t*>(rows.data) + offset, rows.kind, n, buffer);
  return buffer;
}

inline float* place(const OutputRows& rows, int64_t row, int64_t start) {
  return static_cast<float*>(rows.data) + row * rows.stride + start;
}

constexpr int64_t LARGE = 1 << 20;  // elements of an output that will not be found in a cache again

// scale·values into a row of any kind; nothing where the output is left out. A large output
// (rows·elements) goes past the caches.
inline void store(
    const OutputRows& rows, int64_t row, int64_t start, int64_t n, const float* values, float scale,
    bool large = false) {
  if (rows.data == nullptr) return;
  const bool whole_lines = large && rows.kind == Kind::fp32 && n % 16 == 0;
  if (whole_lines && reinterpret_cast<uintptr_t>(place(rows, row, start)) % 64 == 0) {
    block().stream(values, scale, n, place(rows, row, start));
    return;
  }
  const int64_t offset = (row * rows.stride + start) * (rows.kind == Kind::fp32 ? 4 : 2);
  block().narrow(values, scale, n, static_cast<char*>(rows.data) + offset, rows.kind);
}

// The (guided) velocity of a block.
inline const float* load_velocity(const States& states, int64_t b, int64_t start, int64_t n, float* buffer) {
  if (states.v_uncond.data == nullptr) return load(states.v, b, start, n, buffer);
  Buffer v, v_uncond;
  block().guide(
      load(states.v, b, start, n, v), load(states.v_uncond, b, start, n, v_uncond), states.guidance_scale, n, buffer);
  return buffer;
}

// μ of a block from its velocity.
inline void load_mean(const States& states, int64_t b, int64_t start, int64_t n, const float* velocity, float* mean) {
  block().mean(load(states.x, b, start, n, nullptr), velocity, states.x_coef[b], states.v_coef[b], n, mean);
  if (states.history.data != nullptr) {
    block().with_history(load(states.history, b, start, n, nullptr), states.prev_coef[b], n, mean);
  }
}

// z of edges, block by block. Siblings that come one after the other share the component that their parent names.
class NoiseReader {
 public:
  explicit NoiseReader(const Noise& noise) : noise_(noise) {}

  const float* load(int64_t edge, int64_t start, int64_t n) {
    if (noise_.given.data != nullptr) return cpu::load(noise_.given, edge, start, n, nullptr);
    const NoiseWords own = words(edge, false);
    const auto first_block = static_cast<uint32_t>(start / 4);
    block().draw(own, first_block, n, z_);
    if (noise_.root_rho > 0.0f) {
      const NoiseWords shared = words(edge, true);
      if (start != start_ || memcmp(&shared, &drawn_, sizeof shared) != 0) {
        block().draw(shared, first_block, n, shared_);
      }
      start_ = start;
      drawn_ = shared;
      block().correlate(noise_.root_rho, shared_, noise_.root_rest, n, z_);
    }
    return z_;
  }

 private:
  NoiseWords words(int64_t edge, bool shared) const {
    const auto word = [&](KeyWord w) {
      return static_cast<uint32_t>(noise_.key.data[w * noise_.key.word_stride + edge * noise_.key.edge_stride]);
    };
    const uint32_t step = word(STEP) + (shared ? SHARED_STEP : 0u);
    return {word(SEED), word(ITERATION), step, word(PROMPT), word(shared ? PARENT : NODE)};
  }

  const Noise& noise_;
  NoiseWords drawn_{};
  int64_t start_ = -1;
  Buffer z_, shared_;
};

// The checks that need values: on the CPU they cost nothing.
inline void check_history(const States& states) {
  const float* end = states.prev_coef + states.rows;
  const bool one_step = std::all_of(states.prev_coef, end, [](float c) { return c == 0.0f; });
  check(
      one_step || states.history.data != nullptr,
      "these coefficients need history=, the previous clean estimate: prev_coef is not 0");
}

inline void check_key(const Key& key, int64_t edges, bool correlated) {
  constexpr const char* NAMES[] = {"seed", "iteration", "step", "prompt", "node", "parent"};
  if (key.data == nullptr) return;
  for (int word = 0; word < KEY_WORDS; ++word) {
    for (int64_t e = 0; e < edges; ++e) {
      const int64_t value = key.data[word * key.word_stride + e * key.edge_stride];
      check((value >> 32) == 0, "NoiseKey.", NAMES[word], " holds ", value, ": write values in [0, 2**32)");
      check(
          !correlated || word != STEP || value < SHARED_STEP - 1,
          "NoiseKey.step must be below 2**31 - 1 for correlated siblings");
      if (key.edge_stride == 0) break;
    }
  }
}

inline void check_children(const Children& children, int64_t rows, int64_t edges) {
  if (children.offsets == nullptr) return;
  bool ordered = children.offsets[0] == 0 && children.offsets[rows] == edges;
  for (int64_t b = 0; b < rows; ++b) ordered &= children.offsets[b] <= children.offsets[b + 1];
  check(ordered, "child_offsets must rise from 0 to the number of rows of x_next (", edges, ")");
}

}  // namespace flowgrove::cpu
