"""The training loop: iterations, and what is kept of each: metrics, checkpoints, evaluations."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flowgrove.data.prompts import prompts_of_iteration, prompts_of_run
from flowgrove.device import pick_backend, pick_device
from flowgrove.errors import UserError
from flowgrove.evaluation import Evaluated, evaluate
from flowgrove.files import remove_left_behind, write_text
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.allocator import keep_freed_memory
from flowgrove.recipe.loading import dump_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.report.grids import grid_files, save_grid
from flowgrove.rewards.registry import Rewards
from flowgrove.run.checkpoint import Say, best_checkpoint, load_checkpoint, mark_best, remove_older, save_checkpoint
from flowgrove.run.folder_lock import FolderLock
from flowgrove.run.metrics import MetricsLog
from flowgrove.run.resume import choose_checkpoint, stored_budget
from flowgrove.run.stopping import Stopped, Stopping
from flowgrove.setup import Setup
from flowgrove.spans import span
from flowgrove.tuning.token_budget import settle_token_budget
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater, UpdateStats

Report = Callable[[dict[str, Any]], None]
_log = logging.getLogger("flowgrove")


class _HeldUpdater(Updater):
    """While weights change, a signal waits."""

    def __init__(self, recipe: Recipe, policy: Policy, runner: PassRunner, stopping: Stopping) -> None:
        super().__init__(recipe, policy, runner)
        self.stopping = stopping

    def run(self, parts: list[Rolled]) -> UpdateStats:
        """All updates of an iteration, whose checkpoint then is the next that can be written."""
        self.stopping.hold()
        return super().run(parts)


class Trainer:
    """One run in one folder, which no other process may have meanwhile. `resume`: "auto", "never" or a checkpoint
    folder.

    `stopping` tells when to save and end; `say` takes what the user should know.
    """

    def __init__(
        self,
        setup: Setup,
        out: Path,
        resume: str = "auto",
        stopping: Stopping | None = None,
        say: Say = _log.warning,
    ) -> None:
        keep_freed_memory()
        recipe = setup.recipe
        self.setup, self.recipe, self.out, self.stopping = setup, recipe, out, stopping or Stopping()
        prompts = setup.prompts + setup.eval_prompts
        self.rewards = Rewards(recipe, pick_device(recipe))
        self.rewards.check(prompts)
        # a plan that cannot be made is an error before a model is loaded
        if not any(step.stochastic for step in setup.first_plan.steps):
            raise UserError(
                "rollout.window.strategy is none and there is no tree: no step is stochastic, so nothing would train; "
                "give a window or a tree"
            )
        pick_backend(recipe)
        self.lock = FolderLock(out)
        try:
            self._load(resume, say)
        except BaseException:
            self.lock.release()
            raise

    def _load(self, resume: str, say: Say) -> None:
        """The model, and the state of the run so far."""
        setup, recipe = self.setup, self.recipe
        checkpoint = choose_checkpoint(setup, self.out, resume, say)
        self.policy = Policy.load(recipe, pick_device(recipe), self._texts())
        self.runner = PassRunner.of(recipe, self.policy)
        settle_token_budget(setup, self.policy, self.runner, stored_budget(checkpoint, setup.fingerprint))
        self.updater = _HeldUpdater(recipe, self.policy, self.runner, self.stopping)
        self.stages = Stages(setup, self.policy, self.updater, self.rewards)
        self.completed: int = 0
        self.last_line: dict[str, Any] | None = None
        self.saved: Path | None = None  # the checkpoint of `completed`, if there is one in this folder
        if checkpoint is not None:
            self.completed, self.last_line = load_checkpoint(checkpoint, self.policy, self.updater)
            place = checkpoint.resolve()
            self.saved = self.out / "checkpoints" / place.name if place.parent.parent == self.out.resolve() else None
        for folder in (self.out, self.out / "samples"):
            remove_left_behind(folder)
        write_text(self.out / "recipe.yaml", dump_recipe(recipe))

    def _texts(self) -> list[str]:
        """All prompts that the run will encode."""
        run, count = self.recipe.run, self.recipe.data.prompts_per_iteration
        return [*self.setup.eval_prompts, *prompts_of_run(self.setup.prompts, run.iterations, count, run.seed)]

    def _prompts(self, iteration: int) -> list[str]:
        return prompts_of_iteration(
            self.setup.prompts, iteration, self.recipe.data.prompts_per_iteration, self.recipe.run.seed
        )

    def run(self, report: Report = lambda line: None) -> None:
        """Trains to `run.iterations`; `report` gets the metrics line of every iteration.

        Raises Stopped, with a checkpoint of all that is done, after a signal that `stopping` has heard.
        """
        if self.lock.released:
            self.lock = FolderLock(self.out)
        log = MetricsLog(self.out, list(self.recipe.run.log), self.completed - (self.last_line is not None))
        for completed, grid in grid_files(self.out).items():
            if completed > self.completed:
                grid.unlink()  # of a branch that this run has left
        self.stopping.hold()
        try:
            with pick_backend(self.recipe):
                self._train(report, log)
        except BaseException as error:
            request = self.stopping.request
            if request is None or (self.stopping.holding and not isinstance(error, Stopped)):
                raise
            self.stopping.hold()  # a reward may have turned the interruption into an error of its own
            self.stopping.saved = self._save() if self.last_line is not None else None
            raise Stopped(request) from None
        finally:
            log.close()
            self.lock.release()

    def _train(self, report: Report, log: MetricsLog) -> None:
        run = self.recipe.run
        # the checkpoint's own: a run may stop before writing it, or end later than it did
        if self.last_line is not None:
            self._finish(self.last_line, log)
        for iteration in range(self.completed, run.iterations):
            evaluated = self.evaluate(iteration) if run.eval_every and iteration % run.eval_every == 0 else None
            self.stopping.let_go()
            with span("iteration"):
                line = self.iterate(iteration)
            self.stopping.hold()
            if evaluated is not None:
                line["eval_reward"] = evaluated.weighted(self.rewards.weights)
            done = iteration + 1
            self.completed, self.last_line, self.saved = done, line, None
            if done == run.iterations or (run.checkpoint_every and done % run.checkpoint_every == 0):
                self._save()
            self._finish(line, log)
            report(line)

    def _save(self) -> Path:
        """The checkpoint of all iterations that are completed."""
        if self.saved is None:
            self.lock.check()
            state = (self.out, self.policy, self.updater, self.completed, self.setup.fingerprint)
            self.saved = save_checkpoint(*state, self.recipe.run.keep_last, self.last_line or {})
        return self.saved

    def _finish(self, line: dict[str, Any], log: MetricsLog) -> None:
        """Writes an iteration's line; the last one carries the final model's evaluation."""
        run = self.recipe.run
        if (
            line["iteration"] + 1 == run.iterations
            and run.eval_every
            and (evaluated := self.evaluate(run.iterations)) is not None
        ):
            line["eval_reward"] = evaluated.weighted(self.rewards.weights)
        self.lock.check()
        log.write(line)

    def _keep_if_best(self, reward: float) -> None:
        """A checkpoint of the model that has just been evaluated, if no trained one has scored higher."""
        best = best_checkpoint(self.out)
        if best is not None and int(best[0].name[5:]) < self.completed and best[1] >= reward:
            return
        folder = self._save()
        mark_best(folder, reward)
        remove_older(self.out, folder, self.recipe.run.keep_last)

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its metrics line."""
        return self.stages.run(self._prompts(iteration), iteration)

    def evaluate(self, iteration: int) -> Evaluated | None:
        """Held-out reward and a sample grid of the model after `iteration` updates; None without held-out prompts."""
        if not self.setup.eval_prompts:
            return None
        with self.updater.ema.swapped_in() if self.updater.ema is not None else nullcontext():
            held_out, between = self.setup.eval_prompts, self.stopping.check
            evaluated = evaluate(self.setup, self.policy, self.runner, self.rewards, held_out, between)
        save_grid(
            self.out / "samples" / f"iteration_{iteration:06d}.png",
            evaluated,
            self.recipe.run.eval.samples,
            self.rewards.weights,
        )
        if self.recipe.run.keep_best and iteration > 0:
            self._keep_if_best(evaluated.weighted(self.rewards.weights))
        return evaluated
