"""Small checkpoints for tests: LoRA weights with averages and moments, two of one run, and those of format 1."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowgrove.models.policy import Policy
from flowgrove.run.saving import CheckpointWriter
from flowgrove.update.optimizers import state_tensors
from flowgrove.update.updater import Updater
from policy_cases import CPU, runner_of, small_recipe


def save_checkpoint(run, policy, updater, completed, fingerprint, keep_last, line):
    """Returns its folder once it stands."""
    writer = CheckpointWriter(run, keep_last)
    folder = writer.begin(policy, updater, completed, fingerprint, line)
    writer.wait()
    return folder


@dataclass
class Trained:
    """A policy and its updater; `advance` changes all that a checkpoint holds."""

    policy: Policy
    updater: Updater

    @classmethod
    def small(cls):
        recipe = small_recipe(
            model={
                "adapter": "sd3",
                "path": "tiny",
                "dtype": "fp32",
                "lora": {"rank": 2, "alpha": 4, "targets": ["attn.to_q"]},
            },
            update={"ema_decay": 0.5},
        )
        policy = Policy.load(recipe, CPU, None)
        return cls(policy, Updater(recipe, policy, runner_of(policy, recipe)))

    def advance(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.policy.weights.trainable().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.updater.optimizer.step()
        self.updater.ema.update(torch.zeros(()))

    def scramble(self):
        """What a checkpoint does not put back stays 7."""
        with torch.no_grad():
            for tensor in self.held().values():
                tensor.fill_(7)

    def held(self):
        """All that a resumed run goes on with, by name; these are the tensors themselves."""
        trainable = self.policy.weights.trainable()
        state = {
            f"optimizer/{name}/{key}": t
            for name, p in trainable.items()
            for key, t in self.updater.optimizer.state[p].items()
        }
        average = {f"ema/{name}": tensor for name, tensor in self.updater.ema.average.items()}
        return {**{f"weights/{name}": p.data for name, p in trainable.items()}, **average, **state}

    def kept(self):
        return {name: tensor.clone() for name, tensor in self.held().items()}

    def holds(self, kept):
        held = self.held()
        return set(held) == set(kept) and all(
            held[n].dtype == t.dtype and torch.equal(held[n], t) for n, t in kept.items()
        )

    def save(self, run, completed):
        return save_checkpoint(run, self.policy, self.updater, completed, "print", 9, {"iteration": completed - 1})

    def save_as_before(self, run, completed):
        """As version 0.1.0 wrote them: format 1, without a manifest."""
        folder = Path(run) / "checkpoints" / f"step_{completed:06d}"
        folder.mkdir(parents=True)
        trainable = self.policy.weights.trainable()
        tensors = {"weights": {name: p.detach().contiguous() for name, p in trainable.items()}}
        tensors["optimizer"] = state_tensors(self.updater.optimizer, trainable)
        tensors["ema"] = {name: average.contiguous() for name, average in self.updater.ema.average.items()}
        for name, content in tensors.items():
            save_file(content, folder / f"{name}.safetensors")
        line = {"iteration": completed - 1}
        state = {"format": 1, "completed_iterations": completed, "recipe": "print", "line": line, "token_budget": 4096}
        (folder / "state.json").write_text(json.dumps(state))
        return folder
