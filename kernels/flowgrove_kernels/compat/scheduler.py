"""A scheduler for loops as diffusers writes them: `step` draws a stochastic step, or scores one.

Needs diffusers; nothing else in flowgrove_kernels does.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowgrove_kernels.coefficients import StepCoefficients, step_coefficients
from flowgrove_kernels.compat.steps import Generators, check, check_level, check_noise, computed, drawn, step
from flowgrove_kernels.compat.tables import Rows, Timestep, index_of, listed, step_table
from flowgrove_kernels.noise import NoiseKey

try:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise ImportError("flowgrove_kernels.compat.scheduler needs diffusers: pip install 'diffusers>=0.42'") from error

DYNAMICS = ("flow_sde", "dance_sde", "wan_sde", "cps")


@cache
def _rows_of(dynamics: str) -> Rows:
    if dynamics not in DYNAMICS:
        raise ValueError(f"unknown dynamics {dynamics!r}: write one of {', '.join(DYNAMICS)}")

    def rows(sigma: Tensor, sigma_next: Tensor, noise_level: float, second: float) -> StepCoefficients:
        cap = None if dynamics == "flow_sde" and float(sigma[0]) < 1 else second
        if noise_level == 0:
            return step_coefficients("ode", sigma, sigma_next)
        return step_coefficients(dynamics, sigma, sigma_next, noise_level=noise_level, sigma_max=cap)

    return rows


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """What `step` returns: prev_sample [B, ...] and log_prob fp32 [B]."""

    prev_sample: Tensor
    log_prob: Tensor


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEulerDiscreteScheduler, tables and all, with the steps of an SDE of the same marginals.

    dynamics: "flow_sde" (arXiv 2505.05470), "dance_sde" (2505.07818), "wan_sde" (Flow-GRPO for Wan) or "cps"
    (2509.05952), see `step_coefficients`. noise_level: its η; 0 is the Euler step of diffusers, with log_prob 0. Both
    are kept in the config: `FlowMatchSDEScheduler.from_config(pipeline.scheduler.config, noise_level=0.7)`. Raises
    ValueError for unknown dynamics and for `stochastic_sampling`, which is a dynamics of its own.
    """

    def __init__(self, *args: Any, dynamics: str = "flow_sde", noise_level: float = 0.7, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _rows_of(dynamics)
        if self.config.stochastic_sampling:
            raise ValueError("stochastic_sampling is a dynamics of its own: write False and choose a noise_level")
        self.register_to_config(dynamics=dynamics, noise_level=noise_level)

    # from_config reads off the signature which keys are this class's
    vars(__init__)["__signature__"] = inspect.Signature(
        [
            *inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.values(),
            *(p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY),
        ]
    )

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        prev_sample: Tensor | None = None,
        noise_level: float | None = None,
        key: NoiseKey | None = None,
    ) -> FlowMatchSDESchedulerOutput | tuple[Tensor, Tensor]:
        """prev_sample [B, ...] in the dtype of model_output and log_prob fp32 [B]; a tuple without `return_dict`.

        model_output, sample, prev_sample: [B, ...], any floating-point dtype; computed in fp32. timestep: an entry of
        `timesteps`, or [B] of them. Without `prev_sample` a step is drawn: fp32 normals from `generator` (one, or a
        list of B; torch's own if None), or those that `key` names. With one timestep for all, steps then count up by
        themselves, as in diffusers. With `prev_sample` that step is scored and nothing counts. log_prob (a mean over
        all but the batch) is differentiable in model_output and that of the sample as returned, so a loop that trains
        passes `model_output.float()` and keeps fp32 states. noise_level: in place of the config's, for this step.
        Raises ValueError for other shapes or devices, a timestep not in the table, s_churn or s_noise, or
        per_token_timesteps.
        """
        if s_churn != 0 or s_noise != 1 or per_token_timesteps is not None:
            raise ValueError("s_churn, s_noise and per_token_timesteps do not go with an SDE step: leave them out")
        check(model_output, sample, prev_sample, name="sample")
        check_noise(prev_sample, generator, key)
        x = computed(sample, torch.float32)
        v = model_output.float() if model_output.dtype == torch.float64 else model_output
        level = check_level(self.config.noise_level if noise_level is None else noise_level, "noise_level")
        counting = prev_sample is None and listed(timestep, self.timesteps).numel() == 1
        if counting and self.step_index is None:
            begin = self.begin_index
            self._step_index = int(index_of(self.timesteps, timestep, x.shape[0])) if begin is None else begin
        index = self.step_index if counting else index_of(self.timesteps, timestep, x.shape[0])
        coef = step_table(self.sigmas, _rows_of(self.config.dynamics), level, x.device).at(index, x.shape[0]).coef
        draws = prev_sample is None and key is None and level > 0
        noise = drawn(x.shape, generator, x.device, torch.float32) if draws else None
        inside = key if level > 0 else None
        x_next, logp = step(x, v, coef, model_output.dtype, noise=noise, key=inside, prev_sample=prev_sample)
        if counting:
            self._step_index += 1
        return FlowMatchSDESchedulerOutput(prev_sample=x_next, log_prob=logp) if return_dict else (x_next, logp)
