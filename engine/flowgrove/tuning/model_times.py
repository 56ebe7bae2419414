"""What `flowgrove tune` keeps for `flowgrove plan --time`: rates of the device, and seconds of everything that an
iteration of the recipe consists of.
"""

import logging
import statistics
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from flowgrove.data.prompt import pictures_of
from flowgrove.device import is_out_of_memory
from flowgrove.errors import UserError
from flowgrove.evaluation import sample
from flowgrove.models.embeddings import LoadedEncoder
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.plan.flops import Flops, count_flops
from flowgrove.plan.identity import Identity, cheap_forward, score_key
from flowgrove.rates.kept import ModelTimes, keep_rates, today
from flowgrove.rates.kept import Passes as Curve
from flowgrove.rates.measuring import copy_rate, matrix_rate
from flowgrove.recipe.schema import Recipe
from flowgrove.rewards.registry import Rewards, is_remote
from flowgrove.setup import Setup
from flowgrove.spans import Totals
from flowgrove.tuning.pass_times import Passes
from flowgrove.update.updater import Updater

_REPEATS, _LONG = 3, 2.0  # of a pass, unless it takes so many seconds
_DRAWING = 5.0  # seconds that pictures to score may take
_MOST_PROMPTS = 8  # of which they are
_log = logging.getLogger("flowgrove")
Result = TypeVar("Result")


def keep_times(
    setup: Setup,
    tuned: Recipe,
    policy: Policy,
    runner: PassRunner,
    passes: Passes,
    rows: int,
    say: Callable[[str], None],
) -> None:
    """Measures and keeps them, with the engine settings of `tuned`, in which `policy` and `runner` are; `rows`: states
    of the largest pass. What does not fit into the memory or cannot be called here is left out, the former by a line to
    `say`. The weights are another model's afterwards.
    """
    device, recipe = policy.device, setup.recipe
    measuring = _Measuring(policy, runner, passes, say)
    (flops, *_) = count_flops(tuned)
    identity = Identity.of(tuned)
    curves = measuring.transformer(flops, rows) | measuring.decoding(flops)
    if not curves:
        return
    curves |= measuring.cheap(tuned, flops, rows)
    scores = measuring.scores(setup)
    times = ModelTimes(
        name=identity.name,
        architecture=identity.architecture,
        size=identity.size,
        dtype=identity.dtype,
        settings=identity.settings,
        source="tune",
        date=today(),
        passes=curves,
        encode=measuring.encoding(setup),
        score=scores,
        update=measuring.update(recipe),
        trained=sum(weight.numel() for weight in policy.weights.trainable().values()),
        step=identity.step.name,
    )
    matrix = measuring.fitting("the rate of matrix products", lambda: matrix_rate(device, policy.compute_dtype))
    copied = measuring.fitting("the rate of copies", lambda: copy_rate(device))
    keep_rates(device, {} if matrix is None else {recipe.model.dtype: matrix}, copied, {identity.key: times})


class _Measuring:
    """Seconds of a policy's work, each the median of a few after one that is not timed."""

    def __init__(self, policy: Policy, runner: PassRunner, passes: Passes, say: Callable[[str], None]) -> None:
        self.policy, self.runner, self.passes, self.device = policy, runner, passes, policy.device
        self.say = say

    def fitting(self, name: str, measure: Callable[[], Result]) -> Result | None:
        """What `measure` returns; None, and a line that says so by `name`, where the memory is too small for it."""
        try:
            return measure()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.passes.release()
        self.say(f"not kept: {name}, which does not fit into the memory")
        return None

    def transformer(self, flops: Flops, most: int) -> dict[str, Curve]:
        """Passes of the rollout, forwards whose graph stays, and backwards, of 1, 2, 4, … and `most` states."""
        found: dict[str, dict[int, float]] = {"forward": {}, "kept": {}, "backward": {}}
        for rows in _sizes(most):
            try:
                self.passes.release()
                x = self.passes.states(rows)
                forward = self._median(lambda: self.passes.roll(self.runner, x))  # noqa: B023
                kept, backward = self._trained(x)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                break
            for kind, seconds in (("forward", forward), ("kept", kept), ("backward", backward)):
                found[kind][rows] = seconds
        self.passes.release()
        of_a_state = {"backward": flops.trained * (flops.backward + flops.recomputed)}
        forward_flops = flops.doubled * flops.forward
        return {
            kind: Curve(flops=of_a_state.get(kind, forward_flops), seconds=seconds)
            for kind, seconds in found.items()
            if seconds
        }

    def cheap(self, recipe: Recipe, flops: Flops, most: int) -> dict[str, Curve]:
        """Forwards in rollout.precision and with rollout.attention, where the recipe has them."""
        name, rolled, weights = cheap_forward(recipe.rollout), recipe.rollout, self.policy.weights
        if name is None:
            return {}

        def measure() -> dict[int, float]:
            weights.cheapen(rolled.precision, recipe.engine.compile, rolled.attention)
            cheap = Passes(self.policy.cheap(), self.runner)
            return {rows: self._median(partial(cheap.roll, self.runner, cheap.states(rows))) for rows in _sizes(most)}

        try:
            seconds = self.fitting(f"a {name}", measure)
        finally:
            weights.cheapen(None)
        return {name: Curve(flops=flops.doubled * flops.forward, seconds=seconds)} if seconds else {}

    def _trained(self, x: Tensor) -> tuple[float, float]:
        """Seconds of a forward that keeps its graph, and of its backward."""
        spent: list[tuple[float, float]] = []
        while len(spent) <= _REPEATS:  # the first warms up
            totals = Totals(self.device)
            with totals("kept"):
                v = self.passes.velocity(x)
            with totals("backward"):
                v.backward(torch.ones_like(v))
            seconds = totals.seconds
            spent.append((seconds["kept"], seconds["backward"]))
            if sum(spent[-1]) > _LONG and len(spent) > 1:
                break
        kept, backward = zip(*spent[1:], strict=True)
        return statistics.median(kept), statistics.median(backward)

    @torch.no_grad()
    def decoding(self, flops: Flops) -> dict[str, Curve]:
        """One sample, and as many as are decoded together."""
        seconds: dict[int, float] = {}
        for samples in sorted({1, self.runner.budget.samples(self.policy.adapter.geometry.pixels)}):

            def decode() -> float:
                latents = self.passes.states(samples)  # noqa: B023
                return self._median(lambda: self.policy.decode(latents, len(latents)))

            if (spent := self.fitting(f"the decode of {samples} samples", decode)) is not None:
                seconds[samples] = spent
        return {"decode": Curve(flops=flops.decode, seconds=seconds)} if seconds else {}

    def encoding(self, setup: Setup) -> float | None:
        """A prompt with its pictures, where the encoders are loaded."""
        if not isinstance(self.policy.encoder, LoadedEncoder):
            return None
        (text, *_) = self._prompts(setup) or [""]
        if len(pictures_of(text)) < self.policy.adapter.source_count(setup.recipe.model):
            return None
        return self.fitting("the encoding of prompts", lambda: self._median(lambda: self.policy.adapter.encode([text])))

    def scores(self, setup: Setup) -> dict[str, float]:
        """A picture that the model has drawn, by all rewards, unless a server scores it."""
        recipe, prompts = setup.recipe, self._prompts(setup)
        if not prompts or any(is_remote(reward.name) for reward in recipe.reward):
            return {}
        try:
            rewards = Rewards(recipe, self.device)
            state = self.passes.states(1)
            a_picture = self._median(lambda: self.passes.roll(self.runner, state)) * len(setup.eval_plan.steps)
            count = int(_DRAWING / (a_picture * recipe.run.eval.samples))
            some = prompts[: max(1, min(_MOST_PROMPTS, count))]
            pictures = sample(setup, self.policy, self.runner, some).to(self.device)
            texts = [prompt for prompt in some for _ in range(recipe.run.eval.samples)]
            seconds = self._median(lambda: rewards(pictures, texts))
        except Exception as error:  # whatever a reward raises where its model, file or licence is missing
            _log.info("rewards are not measured: %s", error)
            return {}
        return {score_key(recipe, self.policy.adapter.geometry.pixels): seconds / len(texts)}

    def update(self, recipe: Recipe) -> float | None:
        """An optimiser's step with clipping, rounding and averaging; None where it does not fit into the memory."""
        return self.fitting("the optimiser's step", lambda: self._stepped(recipe))

    def _stepped(self, recipe: Recipe) -> float:
        updater, spent = Updater(recipe, self.policy, self.runner), []
        for _ in range(_REPEATS + 1):
            for weight in updater.parameters:
                weight.grad = torch.full_like(weight, 1e-3)
            totals = Totals(self.device)
            with totals("step"):
                updater.step()
            spent.append(totals.seconds["step"])
        return statistics.median(spent[1:])

    def _median(self, work: Callable[[], object]) -> float:
        spent: list[float] = []
        while len(spent) <= _REPEATS:
            totals = Totals(self.device)
            with totals("work"):
                work()
            spent.append(totals.seconds["work"])
            if spent[-1] > _LONG and len(spent) > 1:
                break
        return statistics.median(spent[1:])

    @staticmethod
    def _prompts(setup: Setup) -> list[str]:
        try:
            return setup.prompts
        except UserError:  # tuning needs none
            return []


def _sizes(most: int) -> list[int]:
    """States of passes: powers of two, and the most."""
    return sorted({most, *(2**power for power in range(most.bit_length()))})
