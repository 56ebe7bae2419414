"""compat.scheduler: an SDE scheduler in loops that are written as diffusers writes them."""

import importlib
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from compat_cases import logp_of, mean_and_std
from flowgrove.models.folders import TINY
from flowgrove_kernels import NoiseKey, flow_logprob, step_coefficients
from flowgrove_kernels.compat.flow_grpo import sde_step_with_logprob
from flowgrove_kernels.compat.scheduler import DYNAMICS, FlowMatchSDEScheduler
from kernel_cases import randn

SHAPE = (3, 4, 8, 8)


def scheduler(steps: int = 6, **config) -> FlowMatchSDEScheduler:
    made = FlowMatchSDEScheduler(shift=3.0, **config)
    made.set_timesteps(steps)
    return made


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipeline, chosen):
    pipeline.scheduler = chosen
    torch.manual_seed(1)
    how = {"height": 32, "width": 32, "num_inference_steps": 5, "output_type": "latent"}
    return pipeline(["a red square", "a ring"], latents=torch.randn(2, 4, 8, 8), **how).images


def test_without_noise_a_pipeline_samples_what_it_did(pipeline):
    euler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    ours = FlowMatchSDEScheduler.from_config(pipeline.scheduler.config, noise_level=0.0)
    expected = latents(pipeline, euler)
    torch.testing.assert_close(latents(pipeline, ours), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_pipeline_samples_the_sde_and_replay_finds_its_log_probabilities(pipeline, dynamics):
    class Recording(FlowMatchSDEScheduler):
        def step(self, model_output, timestep, sample, **options):
            out = super().step(model_output, timestep, sample, **options)
            taken.append((model_output, timestep, sample, *out))
            return out

    taken = []
    sde = Recording.from_config(pipeline.scheduler.config, dynamics=dynamics, noise_level=0.5)
    final = latents(pipeline, sde)
    assert len(taken) == 5
    assert torch.equal(final, taken[-1][3])
    torch.manual_seed(1)
    torch.randn(2, 4, 8, 8)  # where the loop began
    for i, (v, t, x, x_next, logp) in enumerate(taken):
        levels = sde.sigmas[i : i + 2].double().tolist()
        rows = step_coefficients(dynamics, *levels, noise_level=0.5, sigma_max=sde.sigmas[1].item())[[0, 0]]
        mean = rows.x_coef[0] * x + rows.v_coef[0] * v
        torch.testing.assert_close(x_next, mean + rows.std[0] * torch.randn(x.shape), rtol=0, atol=4e-6)
        torch.testing.assert_close(logp, flow_logprob(x, v, x_next, rows), rtol=0, atol=2e-6)
        v.requires_grad_()
        replayed = FlowMatchSDEScheduler.step(sde, v, t, x, prev_sample=x_next).log_prob
        assert torch.equal(replayed, logp)
        assert replayed.requires_grad or i == 4


def test_one_loop_written_by_hand():
    torch.manual_seed(0)
    sde, x = scheduler(), torch.randn(SHAPE)
    velocities = [torch.randn(SHAPE) for _ in sde.timesteps]
    for i, t in enumerate(sde.timesteps):
        step = torch.full((3,), i)
        out = sde.step(velocities[i], t, x, generator=torch.Generator().manual_seed(i))
        mean, std = mean_and_std("flow_sde", x, velocities[i], step, 0.7, sde.sigmas)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(out.prev_sample.double(), mean + std * noise, rtol=0, atol=4e-6)
        last = i == len(velocities) - 1  # its deviation is small, its squares large
        expected = logp_of("flow_sde", mean, std, out.prev_sample)
        torch.testing.assert_close(out.log_prob.double(), expected, rtol=0, atol=1e-3 if last else 4e-6)
        x = out.prev_sample
    assert sde.step_index == 6


def test_scoring_and_timesteps_of_each_sample_leave_the_count_alone():
    sde, x, v = scheduler(), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    first = sde.step(v, sde.timesteps[0], x, return_dict=False)
    assert sde.step_index == 1
    again = sde.step(v, sde.timesteps[0], x, prev_sample=first[0], return_dict=False)
    assert again[0] is first[0]
    assert torch.equal(again[1], first[1])
    mixed = sde.step(v, sde.timesteps[[4, 0, 2]], x, key=NoiseKey(0, 0, 0, 0, torch.arange(3)))
    assert sde.step_index == 1
    key, mixed_steps = NoiseKey(0, 0, 0, 0, torch.arange(3)), sde.timesteps[[4, 0, 2]]
    for timesteps in (list(mixed_steps), mixed_steps.tolist(), mixed_steps.numpy()):
        assert torch.equal(sde.step(v, timesteps, x, key=key).prev_sample, mixed.prev_sample)
    assert sde.step_index == 1
    theirs = sde_step_with_logprob(sde, v, sde.timesteps[[4, 0, 2]], x, prev_sample=mixed.prev_sample)
    assert torch.equal(theirs[1], mixed.log_prob)
    sde.set_begin_index(2)
    sde.set_timesteps(6)
    sde.set_begin_index(2)
    sde.step(v, sde.timesteps[2], x)
    assert sde.step_index == 3


def test_half_precision_models_get_samples_of_their_dtype():
    sde, x, v = scheduler(), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2).bfloat16()
    out = sde.step(v, sde.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    assert out.prev_sample.dtype == torch.bfloat16
    assert out.log_prob.dtype == torch.float32
    v.requires_grad_()
    again = sde.step(v, sde.timesteps[0], x, prev_sample=out.prev_sample)
    assert torch.equal(again.log_prob, out.log_prob)
    (gradient,) = torch.autograd.grad(again.log_prob.sum(), v)
    assert gradient.dtype == torch.bfloat16
    double = sde.step(v.detach().double(), sde.timesteps[1], x)
    assert double.prev_sample.dtype == torch.float64


def test_the_configuration_is_kept(tmp_path):
    made = FlowMatchSDEScheduler(shift=2.0, dynamics="cps", noise_level=0.8)
    made.save_pretrained(tmp_path)
    read = FlowMatchSDEScheduler.from_pretrained(tmp_path)
    assert (read.config.shift, read.config.dynamics, read.config.noise_level) == (2.0, "cps", 0.8)
    changed = FlowMatchSDEScheduler.from_config(read.config, noise_level=0.1)
    assert (changed.config.shift, changed.config.dynamics, changed.config.noise_level) == (2.0, "cps", 0.1)
    back = FlowMatchEulerDiscreteScheduler.from_config(read.config)
    assert back.config.shift == 2.0
    sde, x, v = scheduler(noise_level=0.1), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    louder = sde.step(v, sde.timesteps[0], x, generator=torch.Generator().manual_seed(0), noise_level=0.7)
    usual = scheduler(noise_level=0.7).step(v, sde.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(louder.prev_sample, usual.prev_sample)


def test_errors_say_what_to_write_instead():
    sde, x = scheduler(), randn(*SHAPE, seed=1)
    with pytest.raises(ValueError, match="unknown dynamics 'flow': write one of flow_sde, dance_sde, wan_sde, cps"):
        FlowMatchSDEScheduler(dynamics="flow")
    with pytest.raises(ValueError, match="stochastic_sampling is a dynamics of its own: write False"):
        FlowMatchSDEScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="do not go with an SDE step: leave them out"):
        sde.step(x, sde.timesteps[0], x, per_token_timesteps=x)
    with pytest.raises(ValueError, match=r"timestep 3 is not in scheduler.timesteps"):
        sde.step(x, 3.0, x)
    with pytest.raises(ValueError, match="key and generator both say"):
        sde.step(x, sde.timesteps[0], x, key=NoiseKey(0, 0, 0, 0, 0), generator=torch.Generator())
    assert sde.step_index is None


def test_without_diffusers_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "flowgrove_kernels.compat.scheduler")
    with pytest.raises(ImportError, match="needs diffusers: pip install"):
        importlib.import_module("flowgrove_kernels.compat.scheduler")
