// The arguments of every op as plain pointers and numbers: what cpu/ and cuda/ kernels take. Nothing here knows torch.
//
// B rows (states), E edges (steps from a state to a child), D elements. States, coefficients and scores are
// fp32; velocities come in three kinds.
#pragma once

#include "element.h"

namespace flowgrove {

enum class Kind : int32_t { fp32, bf16, fp16 };

// [rows, elements] whose elements lie side by side; rows lie `stride` elements apart (0 for an expanded
// tensor). No data: an argument left out.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
  Kind kind = Kind::fp32;
};

struct OutputRows {
  void* data = nullptr;
  int64_t stride = 0;
  Kind kind = Kind::fp32;
};

// A packed noise key, int64 [6, edges] with any strides, 32-bit values. No data: no key.
struct Key {
  const int64_t* data = nullptr;
  int64_t word_stride = 0, edge_stride = 0;
};

enum KeyWord { SEED, ITERATION, STEP, PROMPT, NODE, PARENT, KEY_WORDS };

constexpr uint32_t SHARED_STEP = 0x80000000u;  // added to the step word for the component that siblings share

// Where z comes from: given [E, D], or drawn from a key, or nowhere (then x' = μ).
struct Noise {
  Rows given;
  Key key;
  float root_rho = 0.0f, root_rest = 1.0f;  // √ρ and √(1−ρ) of correlated siblings
};

// The children of row b are edges first_child(b) … first_child(b + 1) − 1: `fanout` each, or as CSR `offsets` say.
struct Children {
  const int64_t* offsets = nullptr;  // [B + 1]
  int64_t fanout = 1;
};

FLOWGROVE_INLINE int64_t first_child(const Children& children, int64_t row) {
  return children.offsets != nullptr ? children.offsets[row] : row * children.fanout;
}

// What the mean μ of every row is made of; coefficients are [B]. history and prev_coef only for multistep rows.
struct States {
  int64_t rows, elements;
  Rows x, v, v_uncond, history;
  float guidance_scale;
  const float *x_coef, *v_coef, *prev_coef;
};

struct PhiloxNormal {
  int64_t rows, elements;
  Key key;
  OutputRows out;
};

struct CleanEstimate {
  States states;
  const float* sigma;  // [B]
  OutputRows out;
};

struct FlowStep {
  States states;
  const float *std, *precision, *log_norm;  // [B]
  int64_t fanout;
  Noise noise;
  OutputRows x_next;  // [B·fanout, D]
  float* logp;        // [B·fanout]
};

struct FlowLogprob {
  States states;
  const float *precision, *log_norm;  // [B]
  Children children;
  int64_t edges;
  Rows x_next;  // [E, D]
  float* logp;  // [E]
};

// Gradients are written in the kind of v; the second one only under guidance.
struct FlowLogprobBackward {
  States states;
  const float* precision;  // [B]
  Children children;
  int64_t edges;
  Rows x_next;        // [E, D]
  const float* grad;  // [E]
  OutputRows grad_v, grad_v_uncond;
};

struct GRPOLoss {
  States states;
  const float *std, *precision, *log_norm;  // [B]
  Children children;
  int64_t edges;
  Rows x_next, v_ref;                           // [E, D], [B, D]
  const float *old_logp, *advantage, *weight;   // [E]; no old_logp: on-policy
  Noise noise;                                  // of the guard ratio
  bool guard;
  float floor, ceiling, kl_weight;              // 1 − ε_lo, 1 + ε_hi, β
  const float* grad_loss;                       // one value, or nullptr: no gradient is wanted
  float *loss, *logp, *ratio, *kl;              // one value, [E], [E], [E]
  int8_t* clipped;                              // [E]
  OutputRows grad_v, grad_v_uncond;             // [B, D]
};

// What the elements of an edge add up to.
struct EdgeSums {
  double squares = 0.0;         // Σ r²
  double noise_squares = 0.0;   // Σ z²
  double noise_residual = 0.0;  // Σ z·r
  double drift = 0.0;           // Σ (v − v_ref)² of its row
};

struct EdgeScore {
  float logp, ratio, kl;
  int8_t clipped;
  float loss;    // w·(L + β·KL)
  float push;    // ∂loss/∂v of an element = push·r, or push·z under guard, …
  float pull;    // … + pull·(v − v_ref)
};

// Everything about edge e of row b that is no sum over elements.
FLOWGROVE_INLINE EdgeScore score_edge(const GRPOLoss& op, int64_t b, int64_t e, const EdgeSums& sums) {
  const int64_t elements = op.states.elements;
  const float weight = op.weight[e], v_coef = op.states.v_coef[b], precision = op.precision[b];
  const float logp = log_probability(op.log_norm[b], precision, mean_of(sums.squares, elements));
  double log_ratio = 0.0;
  if (op.old_logp != nullptr && op.guard) {
    const double noise_energy = static_cast<double>(op.std[b]) * mean_of(sums.noise_squares, elements);
    log_ratio = noise_energy - mean_of(sums.noise_residual, elements);
  } else if (op.old_logp != nullptr) {
    log_ratio = static_cast<double>(logp) - op.old_logp[e];
  }
  const float ratio = static_cast<float>(exp(log_ratio));
  const Surrogate surrogate = flowgrove::surrogate(ratio, op.advantage[e], op.floor, op.ceiling);
  const float scale = kl_scale(v_coef, op.std[b]);
  const float kl = op.v_ref.data == nullptr ? 0.0f : mul(scale, mean_of(sums.drift, elements));
  const double upstream = op.grad_loss == nullptr ? 0.0 : *op.grad_loss;
  const double per_element = upstream * weight / static_cast<double>(elements > 0 ? elements : 1);
  const double slope = per_element * surrogate.slope * v_coef;
  return {
      logp,
      ratio,
      kl,
      surrogate.clipped,
      mul(weight, fma(op.kl_weight, kl, surrogate.value)),
      static_cast<float>(op.guard ? slope : slope * 2.0 * precision),
      static_cast<float>(2.0 * op.kl_weight * per_element * scale)};
}

}  // namespace flowgrove
