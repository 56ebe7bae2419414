#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cpu/rows.h"

namespace flowgrove::cpu {

static void philox_normal(const PhiloxNormal& op, const Tensor&) {
  check_key(op.key, op.rows, false);
  const Noise noise = {{}, op.key};
  for_each_row(op.rows, op.elements, [&](int64_t b, const auto& chunks) {
    chunks([&](int64_t chunk) {
      NoiseReader reader(noise);
      for_each_block(
          chunk, op.elements,
          [&](int64_t start, int64_t n) { store(op.out, b, start, n, reader.load(b, start, n), 1.0f); });
    });
  });
}

}  // namespace flowgrove::cpu

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&flowgrove::philox_normal<flowgrove::cpu::philox_normal>));
}
