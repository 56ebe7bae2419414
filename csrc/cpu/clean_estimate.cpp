#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cpu/rows.h"

namespace flowgrove::cpu {

static void clean_estimate(const CleanEstimate& op, const Tensor&) {
  const States& states = op.states;
  for_each_row(states.rows, states.elements, [&](int64_t b, const auto& chunks) {
    chunks([&](int64_t chunk) {
      Buffer velocity;
      for_each_block(chunk, states.elements, [&](int64_t start, int64_t n) {
        const float* v = load_velocity(states, b, start, n, velocity);
        block().clean(load(states.x, b, start, n, nullptr), v, op.sigma[b], n, place(op.out, b, start));
      });
    });
  });
}

}  // namespace flowgrove::cpu

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CPU, m) {
  m.impl("clean_estimate", TORCH_BOX(&flowgrove::clean_estimate<flowgrove::cpu::clean_estimate>));
}
