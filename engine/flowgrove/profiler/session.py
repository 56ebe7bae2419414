"""A recipe set up as `flowgrove train` sets it up, without a run folder: iterations that can be measured."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from flowgrove.data.prompts import prompts_of_iteration
from flowgrove.device import pick_device
from flowgrove.iteration import NothingScoredError, Stages
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.allocator import keep_freed_memory
from flowgrove.plan.planner import RolloutPlan
from flowgrove.profiler.clock import Spent, Stopwatch
from flowgrove.profiler.traffic import traffic_of
from flowgrove.ranks import Ranks
from flowgrove.setup import Setup
from flowgrove.spans import listening
from flowgrove.trainer import checked_rewards
from flowgrove.tuning.checkpointing import settled
from flowgrove.tuning.token_budget import settle_token_budget
from flowgrove.update.updater import Updater

Runner = TypeVar("Runner", bound=PassRunner)


class Session(Generic[Runner]):
    """A recipe's model and stages. `most`: iterations numbered from 0 that will run; `runner`: the class of what runs
    their passes; `held_out`: prompts that will be evaluated. Raises UserError as `train` does before its first
    iteration.
    """

    def __init__(self, setup: Setup, most: int, runner: type[Runner], held_out: Sequence[str] = ()) -> None:
        keep_freed_memory()
        self.device = pick_device(setup.recipe)
        self.rewards = checked_rewards(setup)
        self.setup = setup = settled(setup, self.device)
        recipe = setup.recipe
        self._texts = [
            prompts_of_iteration(setup.prompts, number, recipe.data.prompts_per_iteration, recipe.run.seed)
            for number in range(most)
        ]
        asked = list(dict.fromkeys([*held_out, *(text for texts in self._texts for text in texts)]))
        self.policy = Policy.load_together(recipe, self.device, asked, Ranks())
        self.runner = runner.of(recipe, self.policy)
        settle_token_budget(setup, self.policy, self.runner, None)
        self.updater = Updater(recipe, self.policy, self.runner)
        self.stages = Stages(setup, self.policy, self.updater, self.rewards)

    def run(self, iterations: int) -> None:
        """Iterations 0, 1, …; weights go on from one call to the next."""
        try:
            for number in range(iterations):
                self.stages.run(self._texts[number], number)
        except NothingScoredError as nothing:
            raise nothing.reason from None

    def plan(self, iteration: int) -> RolloutPlan:
        """That of an iteration as it last ran."""
        evidence = self.stages.evidence
        return self.setup.plan(iteration, None if evidence is None else evidence.chosen)

    def counted(self, iterations: int) -> dict[str, int]:
        """Bytes that the fused ops move by path of the range (see `traffic_of`)."""
        found = traffic_of(lambda: self.run(iterations))
        self.runner.forget()  # what was compiled ran eagerly, and so do the passes recorded of it
        return found

    def timed(self, iterations: int) -> tuple[float, list[Spent]]:
        """(seconds of all of them by the host's clock, what their ranges took), with nothing else that listens."""
        watch = Stopwatch(self.device)
        self._wait()
        begun = time.perf_counter()
        with listening(watch):
            self.run(iterations)
            self._wait()
        return time.perf_counter() - begun, watch.read()

    def traced(self, iterations: int, path: Path, around: Callable[[], object] = lambda: None) -> int | None:
        """Writes a Chrome trace of so many iterations to `path` (.json.gz). They decode and score on their own thread:
        of others torch.profiler records neither ops nor ranges. `around` is called right before them.
        Returns the most bytes that the GPU's allocator had given out meanwhile; None on a CPU.
        """
        on_gpu = self.device.type == "cuda"
        self._wait()
        around()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])], profile_memory=True
        ) as profiler:
            before, self.stages.scores_on_a_thread = self.stages.scores_on_a_thread, False
            try:
                self.run(iterations)
                self._wait()
            finally:
                self.stages.scores_on_a_thread = before
        most = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        profiler.export_chrome_trace(str(path))
        return most

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
