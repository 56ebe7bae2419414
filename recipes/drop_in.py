"""The fused ops in a plain diffusers-style GRPO loop: the same loop twice, with the step, log-probability and loss of
the published code and with ours.

    python recipes/drop_in.py [--model FOLDER/transformer] [--device cuda] [--steps 8] [--samples 16]

Both draw the same samples and find the same loss and gradients; only what `Plain` and `Fused` do differs. Needs torch,
diffusers and flowgrove_kernels. The reward is a stand-in (how bright the latents are); nothing else depends on
flowgrove. A loop that has Flow-GRPO's, DanceGRPO's or MixGRPO's step already changes one import instead:
recipes/compat.py.
"""

import argparse
import math
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

import flowgrove_kernels as fk

TINY = Path(__file__).parents[1] / "engine/flowgrove/tiny/pipeline/transformer"
NOISE_LEVEL, CLIP_RANGE = 0.7, 1e-3


class Plain:
    """What a loop does without the ops: Flow-GRPO's SDE step, its log-probability and the clipped loss,
    a dozen passes over the latents each.
    """

    def __init__(self, sigmas):
        self.sigmas = sigmas

    def mean_and_std(self, x, v, i):
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        dt, g = sigma_next - sigma, NOISE_LEVEL * math.sqrt(sigma / (1 - min(sigma, self.sigmas[1])))
        v = v.float()
        drift = v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)
        return x + drift * dt, g * math.sqrt(-dt)

    def log_probability(self, x_next, mean, std):
        return (-((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean(
            dim=(1, 2, 3)
        )

    def step(self, x, v, i, noise):
        mean, std = self.mean_and_std(x, v, i)
        x_next = mean + std * noise
        return x_next, self.log_probability(x_next, mean, std)

    def loss(self, x, v, x_next, i, old_logp, advantage):
        ratio = torch.exp(self.log_probability(x_next, *self.mean_and_std(x, v, i)) - old_logp)
        clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
        return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


class Fused:
    """The same with flowgrove_kernels: one row of coefficients per sample, one op for the step, one for the loss."""

    def __init__(self, sigmas):
        self.sigmas = sigmas

    def rows(self, x, i):
        sigma = torch.full((len(x),), self.sigmas[i], dtype=torch.float64)
        sigma_next = torch.full((len(x),), self.sigmas[i + 1], dtype=torch.float64)
        return fk.step_coefficients(
            "flow_sde", sigma, sigma_next, noise_level=NOISE_LEVEL, sigma_max=self.sigmas[1]
        ).to(x.device)

    def step(self, x, v, i, noise):
        # key=fk.NoiseKey(seed, iteration, i, prompt, node) in place of noise= draws it inside, the same for any batch,
        # order or number of GPUs
        return fk.flow_step(x, v, self.rows(x, i), noise=noise)

    def loss(self, x, v, x_next, i, old_logp, advantage):
        weight = torch.full_like(advantage, 1 / len(advantage))
        return fk.grpo_loss(x, v, x_next, self.rows(x, i), old_logp, advantage, weight, clip_range=CLIP_RANGE).loss


def run(ops, model, sigmas, x, noise, conditions):
    """Samples with `ops`, then one GRPO pass over every stochastic step. Returns {name:
    tensor} of all that the two ways should agree on.
    """

    def velocity(x, i):
        t = torch.full((len(x),), 1000 * sigmas[i], device=x.device)
        return model(hidden_states=x, timestep=t, **conditions, return_dict=False)[0]

    states, logps = [x], []
    trained = range(len(sigmas) - 2)  # the last step ends at σ = 0 and is never stochastic
    with torch.no_grad():
        for i in trained:
            x, logp = ops.step(x, velocity(x, i), i, noise[i])
            states.append(x)
            logps.append(logp)
        sample = x - sigmas[-2] * velocity(x, len(sigmas) - 2).float()
    reward = sample.mean(dim=(1, 2, 3))
    advantage = (reward - reward.mean()) / (reward.std() + 1e-8)

    model.zero_grad()
    total = torch.zeros((), device=x.device)
    for i in trained:
        v = velocity(states[i] + 0.05, i)  # as if the model had moved since the rollout, so that ratios are not 1
        loss = ops.loss(states[i], v, states[i + 1], i, logps[i], advantage)
        loss.backward()
        total += loss.detach()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {
        "samples": sample,
        "log-probabilities": torch.stack(logps),
        "loss": total,
        "gradient of all weights": gradient,
    }


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--model", type=Path, default=TINY, help="folder of an SD3 transformer, as diffusers saves it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = SD3Transformer2DModel.from_pretrained(options.model).float().to(options.device)
    config, device = model.config, options.device
    shape = (options.samples, config.in_channels, config.sample_size, config.sample_size)
    conditions = {
        "encoder_hidden_states": torch.randn(options.samples, 8, config.joint_attention_dim, device=device),
        "pooled_projections": torch.randn(options.samples, config.pooled_projection_dim, device=device),
    }
    sigmas = [1 - i / options.steps for i in range(options.steps + 1)]
    x, noise = torch.randn(shape, device=device), torch.randn(options.steps, *shape, device=device)

    plain, fused = (run(ops(sigmas), model, sigmas, x, noise, conditions) for ops in (Plain, Fused))
    print(f"{'':<26}{'plain':>14}{'fused':>14}{'largest difference':>22}")
    for name, ours in fused.items():
        theirs = plain[name]
        difference = (ours - theirs).abs().max().item()
        print(f"{name:<26}{theirs.norm().item():>14.6g}{ours.norm().item():>14.6g}{difference:>22.1e}")


if __name__ == "__main__":
    main()
