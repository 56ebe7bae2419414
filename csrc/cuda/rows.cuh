// How threads share the elements of a row, and how they read and write them.
//
// A row falls into parts, a part into chunks of 8 neighbouring elements. A block of threads computes one part
// or, of many rows, several one after another: its thread t the chunks t, t + threads, … of each. Which
// thread adds which elements of a part, and in which order, follows from D alone: sums do not depend on
// batch, order, fanout, strides or alignment.
#pragma once

#include "cuda/device.cuh"

namespace flowgrove::cuda {

constexpr int WIDTH = 8;               // elements of a chunk: 16 bytes of bf16 or fp16, two Philox blocks
// At most, of a block: while some blocks of a multiprocessor add up and meet, others read.
constexpr int THREADS = 256;
constexpr int MOST_PARTS = 16;         // of a row whose parts can form a cluster
constexpr int64_t MOST_CHUNKS = 1024;  // of a part; rows beyond 16 such parts get more parts

// How the rows of a call lie, as far as it is compiled into a kernel: whether all allow
// 16-byte accesses, and then the kind of v.
template <bool WHOLE_, Kind V_>
struct Layout {
  static constexpr bool WHOLE = WHOLE_;
  static constexpr Kind V = V_;
};

// Blocks that share a multiprocessor: 64 registers a thread, or 128 where rows allow no 16-byte accesses.
constexpr int WHOLE_BLOCKS_PER_SM = 4;
template <typename L>
constexpr int BLOCKS_PER_SM = L::WHOLE ? WHOLE_BLOCKS_PER_SM : 2;

// `blocks` of a row share its parts: `turns` each, the last block perhaps fewer.
struct Partition {
  int64_t elements, part_elements, parts;
  int threads;
  int64_t blocks;
  int turns = 1;
};

// What a block computes: parts first … end − 1 of a row.
struct Share {
  int64_t row;
  int rank, first, end;
};

DEVICE Share share_of(const Partition& partition) {
  const unsigned blocks = static_cast<unsigned>(partition.blocks);
  const unsigned row = blockIdx.x / blocks;
  const unsigned rank = blockIdx.x - row * blocks;
  const int first = static_cast<int>(rank) * partition.turns;
  const int end = first + partition.turns;
  const int parts = static_cast<int>(partition.parts);
  return {row, static_cast<int>(rank), first, end < parts ? end : parts};
}

// A part of a row: elements first … first + count − 1. `turn`: how many parts of the block come before it.
struct Part {
  int64_t row, first;
  int index, count, turn;
};

DEVICE Part part_of(const Partition& partition, const Share& share, int index) {
  const int64_t first = index * partition.part_elements, left = partition.elements - first;
  const int64_t count = left < partition.part_elements ? left : partition.part_elements;
  return {share.row, first, index, static_cast<int>(count > 0 ? count : 0), index - share.first};
}

// Where a block computes one part.
DEVICE Part part_of(const Partition& partition) {
  const Share share = share_of(partition);
  return part_of(partition, share, share.first);
}

// A thread's chunks begin at these elements of a part: for (int start = first_start();
// start < part.count; start += stride()).
DEVICE int first_start() {
  return threadIdx.x * WIDTH;
}

DEVICE int stride() {
  return threads() * WIDTH;
}

// Elements first … first + count − 1 of a row. WHOLE: 8 of them at a 16-byte address in every tensor;
// else 1 … 8, read and written one by one.
template <bool WHOLE>
struct Chunk {
  int64_t first;
  int count;
};

template <bool WHOLE>
DEVICE Chunk<WHOLE> chunk_of(const Part& part, int start) {
  const int left = part.count - start;
  return {part.first + start, WHOLE || left > WIDTH ? WIDTH : left};
}

// ---- 8 elements ----

struct Octet {
  float at[WIDTH];
};

// 8 elements as they lie in memory; bf16 and fp16 fill the lower half. Reading and widening are apart, so that all
// loads of a chunk are in flight at once.
struct Raw {
  uint4 low, high;
};

// Elements beyond the row are 0 and add nothing to any sum.
template <bool WHOLE>
DEVICE Raw read_words(const uint32_t* from, Chunk<WHOLE> chunk) {
  if constexpr (WHOLE) {
    const uint4* quads = reinterpret_cast<const uint4*>(from);
    return {__ldg(quads), __ldg(quads + 1)};
  } else {
    uint32_t w[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) w[i] = i < chunk.count ? __ldg(from + i) : 0u;
    return {make_uint4(w[0], w[1], w[2], w[3]), make_uint4(w[4], w[5], w[6], w[7])};
  }
}

template <bool WHOLE>
DEVICE Raw read_halves(const uint16_t* from, Chunk<WHOLE> chunk) {
  if constexpr (WHOLE) {
    return {__ldg(reinterpret_cast<const uint4*>(from)), uint4{}};
  } else {
    uint32_t w[WIDTH / 2];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
      const uint32_t even = 2 * i < chunk.count ? __ldg(from + 2 * i) : 0u;
      const uint32_t odd = 2 * i + 1 < chunk.count ? __ldg(from + 2 * i + 1) : 0u;
      w[i] = even | odd << 16;
    }
    return {make_uint4(w[0], w[1], w[2], w[3]), uint4{}};
  }
}

template <bool WHOLE>
DEVICE Raw read(const Rows& rows, int64_t row, Chunk<WHOLE> chunk) {
  const int64_t offset = row * rows.stride + chunk.first;
  if (rows.kind == Kind::fp32) return read_words(opaque(static_cast<const uint32_t*>(rows.data) + offset), chunk);
  return read_halves(opaque(static_cast<const uint16_t*>(rows.data) + offset), chunk);
}

DEVICE Octet widen_words(const Raw& raw) {
  return {
      float_of(raw.low.x), float_of(raw.low.y), float_of(raw.low.z), float_of(raw.low.w),
      float_of(raw.high.x), float_of(raw.high.y), float_of(raw.high.z), float_of(raw.high.w)};
}

DEVICE Octet widen(const Raw& raw, Kind kind) {
  if (kind == Kind::fp32) return widen_words(raw);
  const uint32_t pairs[WIDTH / 2] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
  Octet wide;
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) {
    if (kind == Kind::bf16) {
      wide.at[2 * i] = float_of(pairs[i] << 16);
      wide.at[2 * i + 1] = float_of(pairs[i] & 0xFFFF0000u);
    } else {
      wide.at[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(pairs[i])));
      wide.at[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(pairs[i] >> 16)));
    }
  }
  return wide;
}

// Rows that are known to be fp32.
template <bool WHOLE>
DEVICE Raw read_state(const Rows& rows, int64_t row, Chunk<WHOLE> chunk) {
  return read_words(opaque(static_cast<const uint32_t*>(rows.data) + row * rows.stride + chunk.first), chunk);
}

// Asks for what read or read_state will read of rows of some kind soon; it waits for nothing and takes no registers.
template <bool WHOLE>
DEVICE void expect(const Rows& rows, int64_t row, Chunk<WHOLE> chunk, Kind kind) {
#if defined(__CUDACC__)
  if constexpr (WHOLE) {
    const int64_t bytes = (row * rows.stride + chunk.first) * (kind == Kind::fp32 ? 4 : 2);
    asm volatile(
        "prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(static_cast<const char*>(rows.data) + bytes)));
  }
#endif
}

// v and what is like it: the kind is compiled in where all chunks are whole.
template <typename L>
DEVICE Kind kind_of(const Rows& rows) {
  return L::WHOLE ? L::V : rows.kind;
}

template <typename L>
DEVICE Raw read_velocity(const Rows& rows, int64_t row, Chunk<L::WHOLE> chunk) {
  const int64_t offset = row * rows.stride + chunk.first;
  if (kind_of<L>(rows) == Kind::fp32) {
    return read_words(opaque(static_cast<const uint32_t*>(rows.data) + offset), chunk);
  }
  return read_halves(opaque(static_cast<const uint16_t*>(rows.data) + offset), chunk);
}

template <bool WHOLE>
DEVICE void write_words(const Octet& octet, uint32_t* to, Chunk<WHOLE> chunk) {
  uint32_t w[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) w[i] = bits_of(octet.at[i]);
  if constexpr (WHOLE) {
    uint4* quads = reinterpret_cast<uint4*>(to);
    store(quads, make_uint4(w[0], w[1], w[2], w[3]));
    store(quads + 1, make_uint4(w[4], w[5], w[6], w[7]));
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (i < chunk.count) to[i] = w[i];
    }
  }
}

DEVICE uint32_t narrow(float value, Kind kind) {
  if (kind == Kind::bf16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

template <bool WHOLE>
DEVICE void write_halves(const Octet& octet, Kind kind, uint16_t* to, Chunk<WHOLE> chunk) {
  uint32_t w[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) w[i] = narrow(octet.at[2 * i], kind) | narrow(octet.at[2 * i + 1], kind) << 16;
  if constexpr (WHOLE) {
    store(reinterpret_cast<uint4*>(to), make_uint4(w[0], w[1], w[2], w[3]));
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (i < chunk.count) to[i] = static_cast<uint16_t>(w[i / 2] >> 16 * (i % 2));
    }
  }
}

template <bool WHOLE>
DEVICE void write(const Octet& octet, const OutputRows& rows, int64_t row, Chunk<WHOLE> chunk) {
  const int64_t offset = row * rows.stride + chunk.first;
  if (rows.kind == Kind::fp32) {
    write_words(octet, static_cast<uint32_t*>(rows.data) + offset, chunk);
  } else {
    write_halves(octet, rows.kind, static_cast<uint16_t*>(rows.data) + offset, chunk);
  }
}

template <bool WHOLE>
DEVICE void write_state(const Octet& octet, const OutputRows& rows, int64_t row, Chunk<WHOLE> chunk) {
  write_words(octet, static_cast<uint32_t*>(rows.data) + row * rows.stride + chunk.first, chunk);
}

}  // namespace flowgrove::cuda
