// How a row is cut into parts for blocks, and which layout its kernel is compiled for.
#pragma once

#include "cuda/rows.cuh"

#include "cuda/launch.cuh"

namespace flowgrove::cuda {

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline Partition partition_of(int64_t elements) {
  const int64_t chunks = divide_up(elements, WIDTH);
  const int64_t one_each = divide_up(chunks, THREADS);
  const int64_t least = divide_up(chunks, MOST_CHUNKS);
  const int64_t few = one_each < MOST_PARTS ? one_each : MOST_PARTS;
  const int64_t parts = least > few ? least : few > 1 ? few : 1;
  const int64_t part_chunks = divide_up(chunks, parts);
  const int64_t busy = divide_up(part_chunks, WARP) * WARP;
  const int threads = static_cast<int>(busy > THREADS ? THREADS : busy > WARP ? busy : WARP);
  return {elements, part_chunks * WIDTH, parts, threads, parts};
}

// Every multiprocessor shall be filled with blocks this many times: the last filling, perhaps nearly empty, then takes
// at most a third of the time of the others.
constexpr int ROUNDS = 3;

// The same parts for fewer blocks of several turns each, at most `most`, as long as the `rows` keep all multiprocessors
// busy: a block that starts, and a cluster that meets, costs as much as reading a part. A row of more parts than a
// cluster has blocks keeps a block for each.
inline Partition in_turns(Partition partition, int64_t rows, int most) {
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t busy = ROUNDS * WHOLE_BLOCKS_PER_SM * multiprocessors;  // blocks
  for (int turns = 2; turns <= most && partition.parts <= MOST_PARTS && busy > 0; turns *= 2) {
    const int64_t blocks = divide_up(partition.parts, turns);
    if (blocks == partition.blocks || rows * blocks < busy) break;
    partition.blocks = blocks;
    partition.turns = turns;
  }
  return partition;
}

template <typename AnyRows>
bool aligned(const AnyRows& rows) {
  const int64_t elements_of_16_bytes = rows.kind == Kind::fp32 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % elements_of_16_bytes == 0;
}

// Whether all chunks of these rows are whole.
template <typename... AnyRows>
bool whole(int64_t elements, const AnyRows&... rows) {
  return elements % WIDTH == 0 && (aligned(rows) && ...);
}

// What pick returns for the layout of a call's rows.
template <typename Pick>
auto with_layout(bool whole, Kind v, Pick pick) {
  if (!whole) return pick(Layout<false, Kind::fp32>{});
  if (v == Kind::bf16) return pick(Layout<true, Kind::bf16>{});
  if (v == Kind::fp16) return pick(Layout<true, Kind::fp16>{});
  return pick(Layout<true, Kind::fp32>{});
}

// Whether all chunks of the states and of these rows are whole, and both velocities of one kind.
template <typename... AnyRows>
bool whole(const States& states, const AnyRows&... rows) {
  const bool one_kind = states.v_uncond.data == nullptr || states.v_uncond.kind == states.v.kind;
  return one_kind && whole(states.elements, states.x, states.v, states.v_uncond, states.history, rows...);
}

}  // namespace flowgrove::cuda
