"""Published training loops, run with a plain PyTorch step and with the fused one: one import line is the difference.

    python recipes/compat.py flow_grpo | dance_grpo | mix_grpo | diffusers [--device cuda] [--steps 8] [--samples 16]

Each `*_loop` is written as that trainer writes it; each `plain_*` is its step in PyTorch, written from the mathematics;
`*_compat` is the import that replaces it. Both runs start from the same random state, so they draw the same samples and
find the same losses and gradients. The step is then timed alone, on the model's latents and on `--latents`.
Needs torch, diffusers and flowgrove_kernels; the reward is a stand-in (how bright the latents are).
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from flowgrove_kernels.compat.dance_grpo import flux_step as dance_grpo_compat
from flowgrove_kernels.compat.flow_grpo import sde_step_with_logprob as flow_grpo_compat
from flowgrove_kernels.compat.mix_grpo import dance_grpo_step as mix_grpo_compat
from flowgrove_kernels.compat.scheduler import FlowMatchSDEScheduler as scheduler_compat

TINY = Path(__file__).parents[1] / "engine/flowgrove/tiny/pipeline/transformer"
ETA, CLIP_RANGE = 0.7, 1e-3


def mean_over_elements(value):
    return value.mean(dim=tuple(range(1, value.ndim)))


def sde_mean(x, v, sigma, sigma_next, g):
    """The mean of one Euler–Maruyama step of the SDE with noise level g."""
    score = -(x + (1 - sigma) * v) / sigma
    return x + (sigma_next - sigma) * (v - g**2 / 2 * score)


def plain_flow_grpo(scheduler, model_output, timestep, sample, noise_level=0.7, prev_sample=None):
    v, x = model_output.float(), sample.float()
    index = [scheduler.index_for_timestep(t) for t in timestep]
    shape = (-1, *(1,) * (x.ndim - 1))
    sigma = scheduler.sigmas[index].view(shape)
    sigma_next = scheduler.sigmas[[i + 1 for i in index]].view(shape)
    g = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, scheduler.sigmas[1], sigma)))
    mean, std = sde_mean(x, v, sigma, sigma_next, g), g * torch.sqrt(sigma - sigma_next)
    if prev_sample is None:
        prev_sample = mean + std * torch.randn(v.shape, device=v.device)
    density = -((prev_sample.detach() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return prev_sample, mean_over_elements(density), mean, g


def plain_dance_grpo(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    sigma, sigma_next = sigmas[index], sigmas[index + 1]
    std = eta * math.sqrt(sigma - sigma_next)
    original = latents - sigma * model_output
    mean = sde_mean(latents, model_output, sigma, sigma_next, eta if sde_solver else 0.0)
    if not grpo:
        return mean, original
    if prev_sample is None:
        prev_sample = mean + std * torch.randn_like(mean)
    residual = prev_sample.detach().float() - mean.float()
    return prev_sample, original, mean_over_elements(-(residual**2) / (2 * std**2))


def plain_mix_grpo(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    if grpo and prev_sample is None and not sde_solver:
        prev_sample = latents + (sigmas[index + 1] - sigmas[index]) * model_output
    return plain_dance_grpo(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)


class PlainScheduler(FlowMatchEulerDiscreteScheduler):
    """A scheduler whose step is Flow-GRPO's."""

    def step(self, model_output, timestep, sample, prev_sample=None):
        taken = plain_flow_grpo(self, model_output, timestep.view(1), sample, ETA, prev_sample)
        return SimpleNamespace(prev_sample=taken[0], log_prob=taken[1])


def sigma_schedule(steps, shift=3.0):
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / ((1 - t) + shift * t)


def advantages_of(samples):
    reward = mean_over_elements(samples)
    return (reward - reward.mean()) / (reward.std() + 1e-8)


def clipped_loss(log_prob, old_log_prob, advantages):
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return torch.maximum(unclipped, clipped).mean()


def flow_grpo_loop(sde_step_with_logprob, velocity, latents, steps):
    """Flow-GRPO: a scheduler of diffusers and its timesteps; the last step is sampled and not trained."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps, device=latents.device)
    all_latents, all_log_probs = [latents], []
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise_pred = velocity(latents, t)
            latents, log_prob, _, _ = sde_step_with_logprob(
                scheduler,
                noise_pred.float(),
                t.unsqueeze(0),
                latents.float(),
                noise_level=ETA,
            )
            all_latents.append(latents)
            all_log_probs.append(log_prob)
    advantages, losses = advantages_of(latents), []
    for j, t in enumerate(scheduler.timesteps[:-1]):
        noise_pred = velocity(all_latents[j] + 0.05, t)  # as if the model had moved, so that ratios are not 1
        _, log_prob, mean, std = sde_step_with_logprob(
            scheduler,
            noise_pred.float(),
            t.expand(len(latents)),
            all_latents[j].float(),
            noise_level=ETA,
            prev_sample=all_latents[j + 1].float(),
        )
        reference = mean.detach() + 0.01  # stands for the mean under the frozen model
        kl = ((mean - reference) ** 2 / (2 * std**2)).mean()
        loss = clipped_loss(log_prob, all_log_probs[j], advantages) + 0.04 * kl
        loss.backward()
        losses.append(loss.detach())
    return all_latents, all_log_probs, losses


def dance_grpo_loop(flux_step, velocity, z, steps):
    """DanceGRPO: a table of σ and the index of a step; what is decoded is the last clean estimate."""
    sigmas = sigma_schedule(steps)
    all_latents, all_log_probs = [z], []
    with torch.no_grad():
        for i in range(steps):
            pred = velocity(z, 1000 * sigmas[i])
            z, pred_original, log_prob = flux_step(
                pred,
                z.to(torch.float32),
                0.3,
                sigmas=sigmas,
                index=i,
                prev_sample=None,
                grpo=True,
                sde_solver=True,
            )
            all_latents.append(z)
            all_log_probs.append(log_prob)
    advantages, losses = advantages_of(pred_original), []
    for i in torch.randperm(steps - 1, generator=torch.Generator().manual_seed(0)):
        pred = velocity(all_latents[i] + 0.05, 1000 * sigmas[i])
        taken = all_latents[i + 1]
        _, _, log_prob = flux_step(pred, all_latents[i], 0.3, sigmas, i, prev_sample=taken, grpo=True, sde_solver=True)
        loss = clipped_loss(log_prob, all_log_probs[i], advantages)
        loss.backward()
        losses.append(loss.detach())
    return all_latents, all_log_probs, losses


def mix_grpo_loop(dance_grpo_step, velocity, z, steps):
    """MixGRPO: an SDE inside a window of steps, an ODE outside; the window is trained."""
    sigmas, window = sigma_schedule(steps), range(1, 1 + min(4, steps - 2))
    determistic = [i not in window for i in range(steps)]
    all_latents, all_log_probs = [z], []
    with torch.no_grad():
        for i in range(steps):
            pred = velocity(z, 1000 * sigmas[i])
            z, _, log_prob = dance_grpo_step(
                pred,
                z.to(torch.float32),
                ETA,
                sigmas=sigmas,
                index=i,
                prev_sample=None,
                grpo=True,
                sde_solver=not determistic[i],
            )
            all_latents.append(z)
            all_log_probs.append(log_prob)
    advantages, losses = advantages_of(z), []
    for i in window:
        pred = velocity(all_latents[i] + 0.05, 1000 * sigmas[i])
        taken = all_latents[i + 1]
        _, _, log_prob = dance_grpo_step(
            pred,
            all_latents[i],
            ETA,
            sigmas,
            i,
            prev_sample=taken,
            grpo=True,
            sde_solver=True,
        )
        loss = clipped_loss(log_prob, all_log_probs[i], advantages)
        loss.backward()
        losses.append(loss.detach())
    return all_latents, all_log_probs, losses


def diffusers_loop(scheduler_class, velocity, latents, steps):
    """A loop over a scheduler's timesteps that asks `step` for the next sample, as the pipelines of diffusers do."""
    scheduler = scheduler_class(shift=3.0)
    scheduler.set_timesteps(steps, device=latents.device)
    all_latents, all_log_probs = [latents], []
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = scheduler.step(velocity(latents, t), t, latents)
            latents = out.prev_sample
            all_latents.append(latents)
            all_log_probs.append(out.log_prob)
    advantages, losses = advantages_of(latents), []
    for i, t in enumerate(scheduler.timesteps[:-1]):
        v = velocity(all_latents[i] + 0.05, t)
        out = scheduler.step(v, t, all_latents[i], prev_sample=all_latents[i + 1])
        loss = clipped_loss(out.log_prob, all_log_probs[i], advantages)
        loss.backward()
        losses.append(loss.detach())
    return all_latents, all_log_probs, losses


def flow_grpo_once(step, steps, device):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps, device=device)
    t = scheduler.timesteps[1:2]
    return lambda v, x, prev_sample: step(scheduler, v, t, x, ETA, prev_sample)[1]


def index_once(step, steps, device):
    sigmas = sigma_schedule(steps)
    return lambda v, x, prev_sample: step(v, x, 0.3, sigmas, 1, prev_sample, True, True)[2]


def scheduler_once(scheduler_class, steps, device):
    scheduler = scheduler_class(shift=3.0)
    scheduler.set_timesteps(steps, device=device)

    def once(v, x, prev_sample):
        scheduler.set_begin_index(1)
        scheduler._step_index = None
        return scheduler.step(v, scheduler.timesteps[1], x, prev_sample=prev_sample).log_prob

    return once


@dataclass
class Trainer:
    loop: object
    plain: object
    compat: object
    once: object  # makes a function that takes one step: (v, x, prev_sample) → log_prob


TRAINERS = {
    "flow_grpo": Trainer(flow_grpo_loop, plain_flow_grpo, flow_grpo_compat, flow_grpo_once),
    "dance_grpo": Trainer(dance_grpo_loop, plain_dance_grpo, dance_grpo_compat, index_once),
    "mix_grpo": Trainer(mix_grpo_loop, plain_mix_grpo, mix_grpo_compat, index_once),
    "diffusers": Trainer(diffusers_loop, PlainScheduler, scheduler_compat, scheduler_once),
}


def run(trainer, step, model, conditions, start, steps):
    """The loop with `step`, from the same random state: {name: tensor} of all that two steps should agree on."""

    def velocity(latents, t):
        timestep = t.to(latents.device).expand(len(latents))
        return model(hidden_states=latents, timestep=timestep, **conditions, return_dict=False)[0]

    model.zero_grad()
    torch.manual_seed(1)
    latents, log_probs, losses = trainer.loop(step, velocity, start, steps)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    names = ("samples", "log-probabilities", "losses", "gradient of all weights")
    return dict(zip(names, (latents[-1], torch.stack(log_probs[:-1]), torch.stack(losses), gradient), strict=True))


def milliseconds(works, device, rounds):
    """Median time of each of `works`, called in turn."""
    found = [[] for _ in works]
    for _ in range(rounds + 2):
        for work, times in zip(works, found, strict=True):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(times[2:]) for times in found]


def time_steps(trainer, shape, steps, device, rounds):
    """((plain, compat) of a sampled step, (plain, compat) of a scored one with its gradient), in milliseconds."""
    v, x, after = (torch.randn(shape, device=device) for _ in range(3))
    once = [trainer.once(step, steps, device) for step in (trainer.plain, trainer.compat)]

    def sampled(step):
        with torch.no_grad():
            step(v, x, None)

    def scored(step):
        torch.autograd.grad(step(v.requires_grad_(), x, after).sum(), v)
        v.requires_grad_(False)

    return [milliseconds([lambda s=s, f=f: f(s) for s in once], device, rounds) for f in (sampled, scored)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--model", type=Path, default=TINY, help="folder of an SD3 transformer, as diffusers saves it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--latents", type=int, nargs="+", default=[4, 16, 128, 128], help="shape of the larger timing")
    parser.add_argument("--rounds", type=int, default=31, help="calls of each step that are timed")
    options = parser.parse_args()

    torch.manual_seed(0)
    device, trainer = torch.device(options.device), TRAINERS[options.trainer]
    model = SD3Transformer2DModel.from_pretrained(options.model).float().to(device)
    config = model.config
    start = torch.randn(options.samples, config.in_channels, config.sample_size, config.sample_size, device=device)
    conditions = {
        "encoder_hidden_states": torch.randn(options.samples, 8, config.joint_attention_dim, device=device),
        "pooled_projections": torch.randn(options.samples, config.pooled_projection_dim, device=device),
    }
    both = (trainer.plain, trainer.compat)
    plain, compat = (run(trainer, step, model, conditions, start, options.steps) for step in both)
    print(f"{options.trainer:<26}{'plain':>14}{'compat':>14}{'largest difference':>22}")
    for name, ours in compat.items():
        theirs, difference = plain[name], (ours - plain[name]).abs().max().item()
        print(f"{name:<26}{theirs.norm().item():>14.6g}{ours.norm().item():>14.6g}{difference:>22.1e}")

    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{'one step, ms (' + named + ')':<50}{'plain':>14}{'compat':>14}")
    for shape in (list(start.shape), options.latents):
        timed = time_steps(trainer, shape, options.steps, device, options.rounds)
        for what, (before, after) in zip(("sampled", "scored, with its gradient"), timed, strict=True):
            print(f"{what + ' ' + str(shape):<50}{before:>14.3f}{after:>14.3f}")


if __name__ == "__main__":
    main()
