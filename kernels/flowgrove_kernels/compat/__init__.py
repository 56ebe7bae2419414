"""The step functions of published trainers on the fused ops: in a training loop one import line changes.

    from flowgrove_kernels.compat.flow_grpo import sde_step_with_logprob         # Flow-GRPO
    from flowgrove_kernels.compat.dance_grpo import flux_step                    # DanceGRPO
    from flowgrove_kernels.compat.mix_grpo import dance_grpo_step, flow_grpo_step  # MixGRPO
    from flowgrove_kernels.compat.scheduler import FlowMatchSDEScheduler         # diffusers (the one that needs it)

Noise comes from torch's generators as in those trainers, so the same generator gives the same sample;
`key=NoiseKey(...)` draws it inside the kernel instead. Given a `prev_sample`, each function scores it: the
log-probability is differentiable in `model_output` and, for the same velocities, has the bits that sampling returned.
All of them compute in fp32 from coefficients made in float64; the trainers round each product to the dtype of
`model_output`, so with bf16 velocities their numbers carry that rounding and these do not.

`prev_sample` carries no gradient and `sample` must not require one: no trainer of this kind differentiates through
the chain.
"""
