#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cpu/rows.h"

namespace flowgrove::cpu {

static void flow_logprob(const FlowLogprob& op, const Tensor&) {
  const States& states = op.states;
  const int64_t chunks = chunks_of(states.elements);
  check_history(states);
  check_children(op.children, states.rows, op.edges);
  for_each_row(states.rows, states.elements, [&](int64_t b, const auto& for_each_chunk) {
    const int64_t first = first_child(op.children, b), count = first_child(op.children, b + 1) - first;
    std::vector<double> squares(chunks * count);
    for_each_chunk([&](int64_t chunk) {
      Buffer velocity;
      for_each_block(chunk, states.elements, [&](int64_t start, int64_t n) {
        const float *x = load(states.x, b, start, n, nullptr), *v = load_velocity(states, b, start, n, velocity);
        for (int64_t child = 0; child < count; ++child) {
          const float* x_next = load(op.x_next, first + child, start, n, nullptr);
          squares[chunk * count + child] += block().squared_residual(
              x, v, x_next, states.x_coef[b], states.v_coef[b], n);
        }
      });
    });
    for (int64_t child = 0; child < count; ++child) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += squares[chunk * count + child];
      op.logp[first + child] = log_probability(op.log_norm[b], op.precision[b], mean_of(sum, states.elements));
    }
  });
}

static void flow_logprob_backward(const FlowLogprobBackward& op, const Tensor&) {
  const States& states = op.states;
  check_children(op.children, states.rows, op.edges);
  const double elements = static_cast<double>(std::max<int64_t>(states.elements, 1));
  for_each_row(states.rows, states.elements, [&](int64_t b, const auto& for_each_chunk) {
    const int64_t first = first_child(op.children, b), end = first_child(op.children, b + 1);
    const double slope = 2.0 * op.precision[b] * states.v_coef[b] / elements;
    for_each_chunk([&](int64_t chunk) {
      Buffer velocity, gradient;
      for_each_block(chunk, states.elements, [&](int64_t start, int64_t n) {
        const float *x = load(states.x, b, start, n, nullptr), *v = load_velocity(states, b, start, n, velocity);
        std::fill_n(gradient.values, n, 0.0f);
        for (int64_t edge = first; edge < end; ++edge) {
          const float* x_next = load(op.x_next, edge, start, n, nullptr);
          block().accumulate_residual(
              static_cast<float>(op.grad[edge] * slope), x, v, x_next, states.x_coef[b], states.v_coef[b], n, gradient);
        }
        const bool guided = states.v_uncond.data != nullptr, large = states.rows * states.elements > LARGE;
        store(op.grad_v, b, start, n, gradient, guided ? states.guidance_scale : 1.0f, large);
        store(op.grad_v_uncond, b, start, n, gradient, 1.0f - states.guidance_scale, large);
      });
    });
  });
}

}  // namespace flowgrove::cpu

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CPU, m) {
  m.impl("flow_logprob", TORCH_BOX(&flowgrove::flow_logprob<flowgrove::cpu::flow_logprob>));
  m.impl("flow_logprob_backward", TORCH_BOX(&flowgrove::flow_logprob_backward<flowgrove::cpu::flow_logprob_backward>));
}
