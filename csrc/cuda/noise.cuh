// The noise of an edge in registers, and the checks of the keys that name it.
#pragma once

#include "cuda/rows.cuh"

namespace flowgrove::cuda {

// What names the noise of an edge: its words, and the node word of the component that it shares with its siblings.
struct EdgeNoise {
  NoiseWords words;
  uint32_t parent;
};

DEVICE uint32_t key_word(const Key& key, int64_t edge, KeyWord word, const char* message) {
  const int64_t value = key.data[word * key.word_stride + edge * key.edge_stride];
  require(static_cast<uint64_t>(value) >> 32 == 0, message);
  return static_cast<uint32_t>(value);
}

DEVICE EdgeNoise edge_noise(const Key& key, int64_t edge) {
  EdgeNoise noise;
  noise.words.seed = key_word(key, edge, SEED, "NoiseKey.seed holds a value outside [0, 2**32)\n");
  noise.words.iteration = key_word(key, edge, ITERATION, "NoiseKey.iteration holds a value outside [0, 2**32)\n");
  noise.words.step = key_word(key, edge, STEP, "NoiseKey.step holds a value outside [0, 2**32)\n");
  noise.words.prompt = key_word(key, edge, PROMPT, "NoiseKey.prompt holds a value outside [0, 2**32)\n");
  noise.words.node = key_word(key, edge, NODE, "NoiseKey.node holds a value outside [0, 2**32)\n");
  noise.parent = key_word(key, edge, PARENT, "NoiseKey.parent holds a value outside [0, 2**32)\n");
  return noise;
}

DEVICE EdgeNoise edge_noise(const Noise& noise, int64_t edge) {
  const EdgeNoise found = edge_noise(noise.key, edge);
  require(noise.root_rho == 0.0f || found.words.step < SHARED_STEP - 1, "NoiseKey.step must be below 2**31 - 1 for correlated siblings\n");
  return found;
}

DEVICE Octet octet_of(const Normals& low, const Normals& high) {
  return {low.z0, low.z1, low.z2, low.z3, high.z0, high.z1, high.z2, high.z3};
}

DEVICE bool has_noise(const Noise& noise) {
  return noise.given.data != nullptr || noise.key.data != nullptr;
}

// Four normals of an edge, in which its siblings' part may be mixed.
DEVICE Normals draw(const Noise& noise, const EdgeNoise& name, uint32_t block) {
  const NoiseWords& words = name.words;
  const Normals own = normals(words, block);
  if (noise.root_rho == 0.0f) return own;
  const Normals shared = normals({words.seed, words.iteration, words.step + SHARED_STEP, words.prompt, name.parent}, block);
  return {
      correlated(noise.root_rho, shared.z0, noise.root_rest, own.z0), correlated(noise.root_rho, shared.z1, noise.root_rest, own.z1),
      correlated(noise.root_rho, shared.z2, noise.root_rest, own.z2), correlated(noise.root_rho, shared.z3, noise.root_rest, own.z3)};
}

// z of a chunk, given or drawn; 0 beyond the row, as everything there.
template <bool WHOLE>
DEVICE Octet noise_of(const Noise& noise, const EdgeNoise& name, int64_t edge, Chunk<WHOLE> chunk) {
  if (noise.given.data != nullptr) return read_state(noise.given, edge, chunk);
  const uint32_t block = static_cast<uint32_t>(chunk.first / 4);
  Octet z = octet_of(draw(noise, name, block), draw(noise, name, block + 1));
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) z.at[i] = i < chunk.count ? z.at[i] : 0.0f;
  return z;
}

}  // namespace flowgrove::cuda
