"""The host runs ahead of a GPU: no pass of a rollout or an update and no recorded function copies from pageable memory,
waits or reads.

Without a GPU, tensors without storage stand for those of one.
"""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage

from flowgrove.credit import assign_credit
from flowgrove.device import to_device
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.families import qwen_image
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.recordings import Recordings, _Recorded
from flowgrove.rollout.loop import rollout
from flowgrove.update.gradient_noise import Groups, group_gradients
from flowgrove.update.passes import Rolled
from flowgrove.update.sketch import Sketch
from host_reads import DEVICE, HostWaits
from policy_cases import CPU, TEXTS, plan_and_coefficients, small_recipe
from tiny_families import FAMILIES, MODELS, sampled
from update_cases import Recorder

NAMES = sampled("sd3", "qwen_image")


WAITS = {
    "reads": lambda x: x.sum().item(),
    "reads ": lambda x: bool((x > 0).all()),
    "reads aten.index": lambda x: x[torch.ones(len(x), dtype=torch.bool, device=DEVICE)],
    "copies from pageable": lambda x: torch.ones(3).to(DEVICE),
    "copies from pageable ": lambda x: x.copy_(torch.ones(3)),
    "copies from pageable  ": lambda x: torch.ones(1 << 16).to(DEVICE, non_blocking=True),
    "waits for a copy": lambda x: torch.ones(3).pin_memory().to(DEVICE),
    "copies to the host": lambda x: x.cpu(),
    "makes a tensor": lambda x: torch.tensor(0.5, device=DEVICE),
    "makes a tensor ": lambda x: torch.as_tensor(3, device=x.device),
    "makes a tensor  ": lambda x: x.new_tensor([1.0, 2.0]),
}


@pytest.mark.parametrize("kind", WAITS)
def test_what_waits_is_noted(kind):
    # tensors without storage cannot do all of it
    with HostWaits() as waits, suppress(NotImplementedError, RuntimeError):
        WAITS[kind](torch.ones(3, device=DEVICE))
    (line,) = waits.noted
    assert line.startswith(kind.strip())
    assert "test_host_waits.py" in line


def test_what_does_not_wait_is_not_noted():
    with HostWaits() as waits:
        x = to_device(torch.arange(5.0), DEVICE)
        rows = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        y = torch.where(x > 0, x, 0)[rows] * 2 + torch.full((), 3.0, device=DEVICE)
        assert to_device(y, DEVICE) is y
    assert waits.noted == []


def on_the_device(folders, family, lora=None, splits=False):
    """A family's recipe, tiny policy and encoded prompts, on DEVICE, and an updater with a reference."""
    model = {**MODELS.get(family, {"adapter": "sd3"}), "path": folders[family], "dtype": "fp32", "lora": lora}
    model |= {"gradient_checkpointing": True, "guidance_scale": 2.5}
    update = {"updates_per_iteration": 2, "clip_range": 1e-3, "lr": 1e-4, "kl_weight": 0.1}
    recipe = small_recipe(model=model, update=update, engine={"split_lengths": splits})
    texts = FAMILIES[family].prompts(TEXTS) if family in FAMILIES else TEXTS
    policy = replace(Policy.load(recipe, CPU, texts), device=DEVICE)
    prompts = replace(policy, device=CPU).encode(texts)
    recorder = Recorder(recipe, replace(policy, device=CPU))
    policy.transformer.to(DEVICE)
    if policy.weights.reference_copy is not None:
        policy.weights.reference_copy.to(DEVICE)
    recorder.parameters = list(policy.weights.trainable().values())
    cond, uncond = (None if cond is None else moved(cond) for cond in (prompts.cond, prompts.uncond))
    return recipe, policy, replace(prompts, cond=cond, uncond=uncond), recorder


def moved(cond):
    return Conditioning({name: tensor.to(DEVICE) for name, tensor in cond.tensors.items()})


def rolled(recipe, policy, prompts, runner, iteration=0):
    plan, rows = plan_and_coefficients(recipe, iteration)
    rows = rows.to(DEVICE, non_blocking=True)
    return plan, rows, rollout(plan, rows, policy, prompts, runner, seed=1, iteration=iteration)


LORA = {"rank": 2, "alpha": 2}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", NAMES)
def test_rollout_and_update_never_wait_for_the_device(folders, family, lora):
    check_that_nothing_waits(*on_the_device(folders, family, lora))


def test_texts_of_each_length_run_apart_without_a_wait(folders):
    check_that_nothing_waits(*on_the_device(folders, "qwen_image", LORA, splits=True))


def check_that_nothing_waits(recipe, policy, prompts, recorder):
    for iteration in range(2):
        with HostWaits() as waits:
            plan, rows, forest = rolled(recipe, policy, prompts, recorder.runner, iteration)
            scores = np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1))
            credit = assign_credit(plan, recipe.credit, scores, [1.0])
            stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
    assert waits.noted == []  # of the second: some tables go to the device once per model
    assert stats.train_passes > 0
    assert forest.leaves.device == DEVICE


@pytest.mark.long
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2}], ids=["full", "lora"])
def test_a_measurement_of_the_gradients_noise_never_waits_for_the_device(folders, lora):
    recipe, policy, prompts, updater = on_the_device(folders, "sd3", lora)
    prompts, groups = prompts[:2], Groups.among(np.ones(2, dtype=bool))
    updater.policy = policy
    for _ in range(2):
        with HostWaits() as waits:
            plan, rows, forest = rolled(recipe, policy, prompts, updater.runner)
            scores = np.random.default_rng(0).random((2, plan.leaves, 1))
            part = Rolled(policy, forest, prompts, assign_credit(plan, recipe.credit, scores, [1.0]), rows)
            sketch = Sketch("s", DEVICE, torch.float32)

            def take(sketch=sketch):
                return sketch(policy.weights.own_gradients())

            found, passes = group_gradients(updater, plan, [part], groups, 1.0, sketch.buckets, take)
    assert waits.noted == []
    assert found.device == DEVICE
    assert passes > 0


class Watched(Recordings):
    """Runs what would be recorded, and notes what no recording can hold."""

    def __init__(self):
        super().__init__(CPU)
        self.noted = []

    def _record(self, function, inputs):
        function(*inputs)  # the warm-up
        with HostWaits(recording=True) as waits:
            outputs = function(*inputs)
        self.noted += waits.noted
        return _Recorded(inputs, outputs, lambda: None)


@pytest.mark.parametrize("family", NAMES)
def test_recorded_functions_hold_no_copy_and_no_read(folders, family):
    recipe, policy, prompts, recorder = on_the_device(folders, family)
    watched = Watched()
    with HostWaits():
        rolled(recipe, policy, prompts, PassRunner(recorder.runner.budget, watched))
    assert len(watched) > 0
    assert watched.noted == []


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_qwen_images_text_lengths_are_those_of_diffusers(dtype):
    theirs = transformer_qwenimage.compute_text_seq_len_from_mask
    assert theirs is qwen_image._text_lengths, "the transformer's forward calls this one"
    embeds = torch.zeros(5, 7, 2)
    texts = [[1, 1, 0, 0, 0, 0, 0], [0] * 7, [1] * 7, [0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    mask = torch.tensor(texts).to(dtype)
    length, lengths, marked = qwen_image._text_lengths(embeds, mask)
    assert (length, lengths.tolist()) == (7, [2, 7, 7, 5, 1])
    assert torch.equal(marked, mask != 0)
    assert lengths.dtype == torch.int64
    assert qwen_image._text_lengths(embeds, None) == (7, None, None)
    with pytest.raises(ValueError, match="mask"):
        qwen_image._text_lengths(embeds, mask[:, 1:])
