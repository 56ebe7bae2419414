// Philox for many blocks at once where the compiler does not find the instruction for it: 32×32 → 64 bit products in
// 64-bit lanes, whose upper halves nothing reads. Included by block_functions.h in the namespace of its instruction
// set; Lanes is that set's vector. The words are those of element.h.

// 32 blocks of four vectors: one multiplication waits for another one only every fourth time.
static void draw_words(NoiseWords row, uint32_t first_block, int64_t blocks, BlockWords& words) {
  constexpr int GROUPS = 4;
  for (int64_t start = 0; start < blocks; start += GROUPS * Lanes::COUNT) {
    Lanes c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
      c0[g] = Lanes::from(first_block + static_cast<uint32_t>(start + g * Lanes::COUNT));
      c1[g] = Lanes::all(row.node);
      c2[g] = Lanes::all(row.step);
      c3[g] = Lanes::all(row.prompt);
    }
    uint32_t key0 = row.seed, key1 = row.iteration;
    for (int round = 0; round < 10; ++round) {
      const Lanes k0 = Lanes::all(key0), k1 = Lanes::all(key1), m0 = Lanes::all(PHILOX_M0), m1 = Lanes::all(PHILOX_M1);
      for (int g = 0; g < GROUPS; ++g) {
        const Lanes first = product(c0[g], m0), second = product(c2[g], m1);
        c0[g] = exclusive_or(high_halves(second), c1[g], k0);
        c1[g] = second;
        c2[g] = exclusive_or(high_halves(first), c3[g], k1);
        c3[g] = first;
      }
      key0 += PHILOX_W0;
      key1 += PHILOX_W1;
    }
    for (int g = 0; g < GROUPS; ++g) {
      const int64_t at = start + g * Lanes::COUNT;
      store_low_halves(c0[g], words.w0 + at);
      store_low_halves(c1[g], words.w1 + at);
      store_low_halves(c2[g], words.w2 + at);
      store_low_halves(c3[g], words.w3 + at);
    }
  }
}
