#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cpu/rows.h"

namespace flowgrove::cpu {

// First pass over one chunk of row b: sums[c] is what the chunk adds to child c.
static void sum_chunk(const GRPOLoss& op, int64_t b, int64_t first, int64_t count, int64_t chunk, EdgeSums* sums) {
  Buffer velocity, mean, difference, reference;
  NoiseReader noise(op.noise);
  for_each_block(chunk, op.states.elements, [&](int64_t start, int64_t n) {
    const float* v = load_velocity(op.states, b, start, n, velocity);
    double drift = 0.0;
    if (op.v_ref.data != nullptr) {
      block().residual(v, load(op.v_ref, b, start, n, reference), n, difference);
      drift = block().dot(difference, difference, n);
    }
    const float* x = load(op.states.x, b, start, n, nullptr);
    const float x_coef = op.states.x_coef[b], v_coef = op.states.v_coef[b];
    if (op.guard) load_mean(op.states, b, start, n, v, mean);
    for (int64_t child = 0; child < count; ++child) {
      const float* x_next = load(op.x_next, first + child, start, n, nullptr);
      sums[child].squares += block().squared_residual(x, v, x_next, x_coef, v_coef, n);
      sums[child].drift += drift;
      if (op.guard) {
        block().residual(x_next, mean, n, difference);
        const float* z = noise.load(first + child, start, n);
        sums[child].noise_squares += block().dot(z, z, n);
        sums[child].noise_residual += block().dot(z, difference, n);
      }
    }
  });
}

// Second pass: the gradient of one chunk of row b.
static void gradient_chunk(
    const GRPOLoss& op, int64_t b, int64_t first, int64_t count, int64_t chunk, const EdgeScore* scores) {
  Buffer velocity, difference, gradient, reference;
  NoiseReader noise(op.noise);
  float pull = 0.0f;
  for (int64_t child = 0; child < count; ++child) pull = add(pull, scores[child].pull);
  for_each_block(chunk, op.states.elements, [&](int64_t start, int64_t n) {
    const float* v = load_velocity(op.states, b, start, n, velocity);
    std::fill_n(gradient.values, n, 0.0f);
    if (op.v_ref.data != nullptr) {
      block().residual(v, load(op.v_ref, b, start, n, reference), n, difference);
      block().accumulate(pull, difference, n, gradient);
    }
    const float* x = load(op.states.x, b, start, n, nullptr);
    for (int64_t child = 0; child < count; ++child) {
      if (op.guard) {
        block().accumulate(scores[child].push, noise.load(first + child, start, n), n, gradient);
      } else {
        const float* x_next = load(op.x_next, first + child, start, n, nullptr);
        block().accumulate_residual(
            scores[child].push, x, v, x_next, op.states.x_coef[b], op.states.v_coef[b], n, gradient);
      }
    }
    const bool guided = op.states.v_uncond.data != nullptr, large = op.states.rows * op.states.elements > LARGE;
    store(op.grad_v, b, start, n, gradient, guided ? op.states.guidance_scale : 1.0f, large);
    store(op.grad_v_uncond, b, start, n, gradient, 1.0f - op.states.guidance_scale, large);
  });
}

static EdgeSums added_up(const EdgeSums* sums, int64_t chunks, int64_t count) {
  EdgeSums total;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const EdgeSums& part = sums[chunk * count];
    total = {
        total.squares + part.squares, total.noise_squares + part.noise_squares,
        total.noise_residual + part.noise_residual, total.drift + part.drift};
  }
  return total;
}

static void grpo_loss(const GRPOLoss& op, const Tensor&) {
  const States& states = op.states;
  const int64_t chunks = chunks_of(states.elements);
  check_key(op.noise.key, op.edges, op.noise.root_rho > 0.0f);
  check_history(states);
  check_children(op.children, states.rows, op.edges);
  std::vector<float> losses(op.edges);
  for_each_row(states.rows, states.elements, [&](int64_t b, const auto& for_each_chunk) {
    const int64_t first = first_child(op.children, b), count = first_child(op.children, b + 1) - first;
    std::vector<EdgeSums> sums(chunks * count);
    std::vector<EdgeScore> scores(count);
    for_each_chunk([&](int64_t chunk) { sum_chunk(op, b, first, count, chunk, sums.data() + chunk * count); });
    for (int64_t child = 0; child < count; ++child) {
      const int64_t edge = first + child;
      const EdgeScore score = score_edge(op, b, edge, added_up(sums.data() + child, chunks, count));
      op.logp[edge] = score.logp;
      op.ratio[edge] = score.ratio;
      op.kl[edge] = score.kl;
      op.clipped[edge] = score.clipped;
      losses[edge] = score.loss;
      scores[child] = score;
    }
    if (op.grad_loss == nullptr) return;
    // Backwards: what was read last is in the cache.
    for_each_chunk([&](int64_t c) { gradient_chunk(op, b, first, count, chunks - 1 - c, scores.data()); });
  });
  double loss = 0.0;
  for (const float edge_loss : losses) loss += edge_loss;
  *op.loss = static_cast<float>(loss);
}

}  // namespace flowgrove::cpu

STABLE_TORCH_LIBRARY_IMPL(flowgrove_native, CPU, m) {
  m.impl("grpo_loss", TORCH_BOX(&flowgrove::grpo_loss<flowgrove::cpu::grpo_loss>));
}
