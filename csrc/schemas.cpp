// The ops of flowgrove_native. cpu/ and cuda/ register their kernels for them; bindings.h says what the arguments are.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flowgrove_native, m) {
  m.def("philox_normal(Tensor key, Tensor(a!) out) -> ()");
  m.def(
      "clean_estimate(Tensor x, Tensor v, Tensor sigma, Tensor? v_uncond, float guidance_scale, Tensor(a!) out) -> ()");
  m.def(
      "flow_step(Tensor x, Tensor v, Tensor x_coef, Tensor v_coef, Tensor prev_coef, Tensor std, Tensor precision, "
      "Tensor log_norm, Tensor? key, Tensor? noise, Tensor? history, Tensor? v_uncond, int fanout, "
      "float sibling_correlation, float guidance_scale, Tensor(a!) x_next, Tensor(b!) logp) -> ()");
  m.def(
      "flow_logprob(Tensor x, Tensor v, Tensor x_next, Tensor x_coef, Tensor v_coef, Tensor prev_coef, "
      "Tensor precision, Tensor log_norm, Tensor? child_offsets, Tensor? v_uncond, int fanout, float guidance_scale, "
      "Tensor(a!) logp) -> ()");
  m.def(
      "flow_logprob_backward(Tensor grad, Tensor x, Tensor v, Tensor x_next, Tensor x_coef, Tensor v_coef, "
      "Tensor precision, Tensor? child_offsets, Tensor? v_uncond, int fanout, float guidance_scale, Tensor(a!) grad_v, "
      "Tensor(b!)? grad_v_uncond) -> ()");
  m.def(
      "grpo_loss(Tensor? grad_loss, Tensor x, Tensor v, Tensor x_next, Tensor x_coef, Tensor v_coef, "
      "Tensor prev_coef, Tensor std, Tensor precision, Tensor log_norm, Tensor? old_logp, Tensor advantage, "
      "Tensor weight, Tensor? child_offsets, Tensor? key, Tensor? noise, Tensor? v_ref, Tensor? v_uncond, bool guard, "
      "float clip_low, float clip_high, int fanout, float sibling_correlation, float kl_weight, float guidance_scale, "
      "Tensor(a!) loss, Tensor(b!) logp, Tensor(c!) ratio, Tensor(d!) clipped, Tensor(e!) kl, Tensor(f!)? grad_v, "
      "Tensor(g!)? grad_v_uncond) -> ()");
}
