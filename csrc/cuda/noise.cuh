// The noise of an edge in registers, and the checks of the keys that name it.
#pragma once

#include "cuda/rows.cuh"

namespace flowgrove::cuda {

// What names the noise of an edge: its words, and the node word of the component that it shares with its siblings.
struct EdgeNoise {
  NoiseWords words;
  uint32_t parent;
};

DEVICE int64_t key_word(const Key& key, int64_t edge, KeyWord word) {
  return key.data[word * key.word_stride + edge * key.edge_stride];
}

DEVICE EdgeNoise edge_noise(const Key& key, int64_t edge) {
  const auto word = [&](KeyWord which) { return static_cast<uint32_t>(key_word(key, edge, which)); };
  return {{word(SEED), word(ITERATION), word(STEP), word(PROMPT), word(NODE)}, word(PARENT)};
}

// REQUIRE: require, or require_of_block where all threads of a block check the same edge.
template <void (*REQUIRE)(bool, const char*)>
DEVICE void require_words(const Key& key, int64_t edge, bool shared) {
  const auto fits = [&](KeyWord which) { return static_cast<uint64_t>(key_word(key, edge, which)) >> 32 == 0; };
  REQUIRE(fits(SEED), "NoiseKey.seed holds a value outside [0, 2**32)\n");
  REQUIRE(fits(ITERATION), "NoiseKey.iteration holds a value outside [0, 2**32)\n");
  REQUIRE(fits(STEP), "NoiseKey.step holds a value outside [0, 2**32)\n");
  REQUIRE(fits(PROMPT), "NoiseKey.prompt holds a value outside [0, 2**32)\n");
  REQUIRE(fits(NODE), "NoiseKey.node holds a value outside [0, 2**32)\n");
  REQUIRE(fits(PARENT), "NoiseKey.parent holds a value outside [0, 2**32)\n");
  REQUIRE(
      !shared || key_word(key, edge, STEP) < SHARED_STEP - 1,
      "NoiseKey.step must be below 2**31 - 1 for correlated siblings\n");
}

DEVICE Octet octet_of(const Normals& low, const Normals& high) {
  return {low.z0, low.z1, low.z2, low.z3, high.z0, high.z1, high.z2, high.z3};
}

// Four normals of an edge, in which its siblings' part may be mixed.
DEVICE Normals draw(const Noise& noise, const EdgeNoise& name, uint32_t block, bool mixed) {
  const NoiseWords& words = name.words;
  const Normals own = normals(words, block);
  if (!mixed) return own;
  const Normals shared = normals(
      {words.seed, words.iteration, words.step + SHARED_STEP, words.prompt, name.parent}, block);
  return {
      correlated(noise.root_rho, shared.z0, noise.root_rest, own.z0),
      correlated(noise.root_rho, shared.z1, noise.root_rest, own.z1),
      correlated(noise.root_rho, shared.z2, noise.root_rest, own.z2),
      correlated(noise.root_rho, shared.z3, noise.root_rest, own.z3)};
}

// z of a chunk that a key names; 0 beyond the row, as everything there. Where `mixed` is known to the compiler the two
// draws take turns, which is faster and takes more registers.
template <bool WHOLE>
DEVICE Octet drawn_chunk(const Noise& noise, const EdgeNoise& name, Chunk<WHOLE> chunk, bool mixed) {
  const uint32_t block = static_cast<uint32_t>(chunk.first / 4);
  Octet z = octet_of(draw(noise, name, block, mixed), draw(noise, name, block + 1, mixed));
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) z.at[i] = i < chunk.count ? z.at[i] : 0.0f;
  return z;
}

// The same, or what is given.
template <bool WHOLE>
DEVICE Octet noise_chunk(const Noise& noise, const EdgeNoise& name, int64_t edge, Chunk<WHOLE> chunk) {
  if (noise.given.data != nullptr) return widen_words(read_state(noise.given, edge, chunk));
  return drawn_chunk(noise, name, chunk, noise.root_rho != 0.0f);
}

}  // namespace flowgrove::cuda
