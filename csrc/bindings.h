// The ops of flowgrove_native as the dispatcher calls them, once for all devices: each takes tensors, fills a struct of
// arguments.h and runs it. `Run` computes a struct on one device; its second argument is a tensor on that device.
//
// x, v, … are [B, D], x_next and noise [E, D], coefficients [B], scores [E]; outputs
// come allocated. Schemas: schemas.cpp.
#pragma once

#include "tensors.h"

namespace flowgrove {

template <void (*Run)(const PhiloxNormal&, const Tensor&)>
void philox_normal(const Tensor& key, const Tensor& out) {
  Run({out.size(0), out.size(1), key_of(key, out.size(0)), output_rows(out, out.size(0), out.size(1))}, out);
}

template <void (*Run)(const CleanEstimate&, const Tensor&)>
void clean_estimate(
    const Tensor& x, const Tensor& v, const Tensor& sigma, const OptionalTensor& v_uncond, double guidance_scale,
    const Tensor& out) {
  const int64_t rows = x.size(0), elements = x.size(1);
  const States states = {
      rows, elements, state_rows(x, rows, elements), rows_of(v, rows, elements), rows_of(v_uncond, rows, elements), {},
      static_cast<float>(guidance_scale), nullptr, nullptr, nullptr};
  Run({states, values_of(sigma, rows), output_rows(out, rows, elements)}, x);
}

template <void (*Run)(const FlowStep&, const Tensor&)>
void flow_step(
    const Tensor& x, const Tensor& v, const Tensor& x_coef, const Tensor& v_coef, const Tensor& prev_coef,
    const Tensor& std, const Tensor& precision, const Tensor& log_norm, const OptionalTensor& key,
    const OptionalTensor& noise, const OptionalTensor& history, const OptionalTensor& v_uncond, int64_t fanout,
    double sibling_correlation, double guidance_scale, const Tensor& x_next, const Tensor& logp) {
  const int64_t rows = x.size(0), elements = x.size(1), edges = rows * fanout;
  const States states = {
      rows, elements, state_rows(x, rows, elements), rows_of(v, rows, elements), rows_of(v_uncond, rows, elements),
      state_rows(history, rows, elements), static_cast<float>(guidance_scale), values_of(x_coef, rows),
      values_of(v_coef, rows), values_of(prev_coef, rows)};
  Run(
      {states, values_of(std, rows), values_of(precision, rows), values_of(log_norm, rows), fanout,
       noise_of(noise, key, sibling_correlation, edges, elements), output_rows(x_next, edges, elements),
       output_values(logp, edges)},
      x);
}

// States of the ops that score given steps: no history. The backward leaves out prev_coef, which the forward has found
// to be 0.
inline States scored_states(
    const Tensor& x, const Tensor& v, const Tensor& x_coef, const Tensor& v_coef, const OptionalTensor& prev_coef,
    const OptionalTensor& v_uncond, double guidance_scale) {
  const int64_t rows = x.size(0), elements = x.size(1);
  return {
      rows, elements, state_rows(x, rows, elements), rows_of(v, rows, elements), rows_of(v_uncond, rows, elements), {},
      static_cast<float>(guidance_scale), values_of(x_coef, rows), values_of(v_coef, rows), values_of(prev_coef, rows)};
}

template <void (*Run)(const FlowLogprob&, const Tensor&)>
void flow_logprob(
    const Tensor& x, const Tensor& v, const Tensor& x_next, const Tensor& x_coef, const Tensor& v_coef,
    const Tensor& prev_coef, const Tensor& precision, const Tensor& log_norm, const OptionalTensor& child_offsets,
    const OptionalTensor& v_uncond, int64_t fanout, double guidance_scale, const Tensor& logp) {
  const int64_t rows = x.size(0), elements = x.size(1), edges = x_next.size(0);
  Run(
      {scored_states(x, v, x_coef, v_coef, prev_coef, v_uncond, guidance_scale), values_of(precision, rows),
       values_of(log_norm, rows), children_of(child_offsets, fanout, rows, edges), edges,
       state_rows(x_next, edges, elements), output_values(logp, edges)},
      x);
}

template <void (*Run)(const FlowLogprobBackward&, const Tensor&)>
void flow_logprob_backward(
    const Tensor& grad, const Tensor& x, const Tensor& v, const Tensor& x_next, const Tensor& x_coef,
    const Tensor& v_coef, const Tensor& precision, const OptionalTensor& child_offsets, const OptionalTensor& v_uncond,
    int64_t fanout, double guidance_scale, const Tensor& grad_v, const OptionalTensor& grad_v_uncond) {
  const int64_t rows = x.size(0), elements = x.size(1), edges = x_next.size(0);
  Run(
      {scored_states(x, v, x_coef, v_coef, std::nullopt, v_uncond, guidance_scale), values_of(precision, rows),
       children_of(child_offsets, fanout, rows, edges), edges, state_rows(x_next, edges, elements),
       values_of(grad, edges), output_rows(grad_v, rows, elements), output_rows(grad_v_uncond, rows, elements)},
      x);
}

template <void (*Run)(const GRPOLoss&, const Tensor&)>
void grpo_loss(
    const OptionalTensor& grad_loss, const Tensor& x, const Tensor& v, const Tensor& x_next, const Tensor& x_coef,
    const Tensor& v_coef, const Tensor& prev_coef, const Tensor& std, const Tensor& precision, const Tensor& log_norm,
    const OptionalTensor& old_logp, const Tensor& advantage, const Tensor& weight, const OptionalTensor& child_offsets,
    const OptionalTensor& key, const OptionalTensor& noise, const OptionalTensor& v_ref, const OptionalTensor& v_uncond,
    bool guard, double clip_low, double clip_high, int64_t fanout, double sibling_correlation, double kl_weight,
    double guidance_scale, const Tensor& loss, const Tensor& logp, const Tensor& ratio, const Tensor& clipped,
    const Tensor& kl, const OptionalTensor& grad_v, const OptionalTensor& grad_v_uncond) {
  const int64_t rows = x.size(0), elements = x.size(1), edges = x_next.size(0);
  Run(
      {scored_states(x, v, x_coef, v_coef, prev_coef, v_uncond, guidance_scale), values_of(std, rows),
       values_of(precision, rows), values_of(log_norm, rows), children_of(child_offsets, fanout, rows, edges), edges,
       state_rows(x_next, edges, elements), rows_of(v_ref, rows, elements), values_of(old_logp, edges),
       values_of(advantage, edges), values_of(weight, edges),
       noise_of(noise, key, sibling_correlation, edges, elements), guard, static_cast<float>(1.0 - clip_low),
       static_cast<float>(1.0 + clip_high), static_cast<float>(kl_weight), values_of(grad_loss, 1),
       output_values(loss, 1), output_values(logp, edges), output_values(ratio, edges), output_values(kl, edges),
       output_signs(clipped, edges),
       output_rows(grad_v, rows, elements), output_rows(grad_v_uncond, rows, elements)},
      x);
}

}  // namespace flowgrove
