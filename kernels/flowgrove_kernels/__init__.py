"""Fused ops for reinforcement learning of flow-matching models: SDE step, log-probability and clipped GRPO loss.
Needs torch only.
"""

from flowgrove_kernels.backends import available_backends, use_backend
from flowgrove_kernels.clean_estimate import clean_estimate
from flowgrove_kernels.coefficients import StepCoefficients, dpmpp_2m_coefficients, step_coefficients
from flowgrove_kernels.flow_logprob import flow_logprob
from flowgrove_kernels.flow_step import flow_step
from flowgrove_kernels.grpo_loss import GRPOLoss, grpo_loss, grpo_loss_and_grad
from flowgrove_kernels.noise import INITIAL_STEP, NoiseKey, philox_normal

__all__ = [
    "INITIAL_STEP",
    "GRPOLoss",
    "NoiseKey",
    "StepCoefficients",
    "available_backends",
    "clean_estimate",
    "dpmpp_2m_coefficients",
    "flow_logprob",
    "flow_step",
    "grpo_loss",
    "grpo_loss_and_grad",
    "philox_normal",
    "step_coefficients",
    "use_backend",
]
