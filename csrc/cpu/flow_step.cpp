#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cpu/rows.h"

namespace flowgrove::cpu {

// One chunk of row b for all its children, each x' and its Σ r² in one pass; squares[c] becomes Σ r² of child c.
static void draw_chunk(const FlowStep& op, int64_t b, int64_t chunk, double* squares) {
  const States& states = op.states;
  const bool large = states.rows * op.fanout * states.elements > LARGE;
  Buffer velocity, stepped;
  NoiseReader noise(op.noise);
  for_each_block(chunk, states.elements, [&](int64_t start, int64_t n) {
    const float* v = load_velocity(states, b, start, n, velocity);
    const float* x = load(states.x, b, start, n, nullptr);
    for (int64_t child = 0; child < op.fanout; ++child) {
      const int64_t edge = b * op.fanout + child;
      float* x_next = large ? stepped.values : place(op.x_next, edge, start);
      squares[child] += block().step_and_square(
          x, v, noise.load(edge, start, n), states.x_coef[b], states.v_coef[b], op.std[b], n, x_next);
      if (large) store(op.x_next, edge, start, n, x_next, 1.0f, true);
    }
  });
}

// The same for steps with history, and for those without noise, whose children all are μ.
static void mean_chunk(const FlowStep& op, int64_t b, int64_t chunk, double* squares) {
  const bool noisy = op.noise.given.data != nullptr || op.noise.key.data != nullptr;
  Buffer velocity, mean, residual;
  NoiseReader noise(op.noise);
  for_each_block(chunk, op.states.elements, [&](int64_t start, int64_t n) {
    load_mean(op.states, b, start, n, load_velocity(op.states, b, start, n, velocity), mean);
    for (int64_t child = 0; child < op.fanout; ++child) {
      const int64_t edge = b * op.fanout + child;
      float* x_next = place(op.x_next, edge, start);
      if (noisy) {
        block().step(mean, noise.load(edge, start, n), op.std[b], n, x_next);
      } else {
        memcpy(x_next, mean.values, n * sizeof(float));
      }
      block().residual(x_next, mean, n, residual);
      squares[child] += block().dot(residual, residual, n);
    }
  });
}

static void flow_step(const FlowStep& op, const Tensor&) {
  const States& states = op.states;
  const int64_t chunks = chunks_of(states.elements);
  check_key(op.noise.key, states.rows * op.fanout, op.noise.root_rho > 0.0f);
  check_history(states);
  const bool noisy = op.noise.given.data != nullptr || op.noise.key.data != nullptr;
  const auto step_chunk = noisy && states.history.data == nullptr ? draw_chunk : mean_chunk;
  for_each_row(states.rows, states.elements, [&](int64_t b, const auto& for_each_chunk) {
    std::vector<double> squares(chunks * op.fanout);
    for_each_chunk([&](int64_t chunk) { step_chunk(op, b, chunk, &squares[chunk * op.fanout]); });
    for (int64_t child = 0; child < op.fanout; ++child) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += squares[chunk * op.fanout + child];
      op.logp[b * op.fanout + child] = log_probability(op.log_norm[b], op.precision[b], mean_of(sum, states.elements));
    }
  });
}

}  // namespace flowgrove::cpu

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CPU, m) {
  m.impl("flow_step", TORCH_BOX(&flowgrove::flow_step<flowgrove::cpu::flow_step>));
}
