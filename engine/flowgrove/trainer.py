"""The training loop: iterations, and what is kept of each: metrics, checkpoints, evaluations."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flowgrove import metrics
from flowgrove.allocator import keep_freed_memory
from flowgrove.checkpoint import load_checkpoint, save_checkpoint
from flowgrove.data import prompts_of_iteration, read_prompts
from flowgrove.device import pick_backend, pick_device
from flowgrove.errors import UserError
from flowgrove.evaluation import Evaluated, evaluate
from flowgrove.files import write_text
from flowgrove.grids import save_grid
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.plan import make_plan
from flowgrove.recipe import Recipe, dump_recipe
from flowgrove.resume import choose_checkpoint, fingerprint, stored_budget
from flowgrove.rewards.registry import Rewards
from flowgrove.sigmas import recipe_sigmas
from flowgrove.spans import span
from flowgrove.token_budget import settle_token_budget, with_budget
from flowgrove.update import Updater

Report = Callable[[dict[str, Any]], None]


class Trainer:
    """One run in one folder. `resume`: "auto", "never" or a checkpoint folder."""

    def __init__(self, recipe: Recipe, out: Path, resume: str = "auto") -> None:
        keep_freed_memory()
        self.recipe, self.out = recipe, out
        self.train_prompts = read_prompts(recipe.data.prompts, "data.prompts", recipe.data.prompt_key)
        self.eval_prompts = read_prompts(recipe.data.eval_prompts, "data.eval_prompts", recipe.data.prompt_key) if recipe.data.eval_prompts else []
        self.rewards = Rewards(recipe, pick_device(recipe))
        self.rewards.check(self.train_prompts + self.eval_prompts)
        plan = make_plan(recipe, 0, recipe_sigmas(recipe))  # a plan that cannot be made is an error before a model is loaded
        if not any(step.stochastic for step in plan.steps):
            raise UserError("rollout.window.strategy is none and there is no tree: no step is stochastic, so nothing would train; give a window or a tree")
        pick_backend(recipe)
        checkpoint = choose_checkpoint(recipe, out, resume)
        self.fingerprint = fingerprint(recipe)  # of the prompts that this run has read, whatever their file holds later
        self.policy = Policy(recipe, pick_device(recipe), self._texts())
        settle_token_budget(recipe, self.policy, stored_budget(checkpoint, self.fingerprint))
        self.updater = Updater(recipe, self.policy)
        self.stages = Stages(with_budget(recipe, self.policy.budget.tokens), self.policy, self.updater, self.rewards)
        self.completed, self.last_line = 0, None
        if checkpoint is not None:
            self.completed, self.last_line = load_checkpoint(checkpoint, self.policy, self.updater)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "recipe.yaml", dump_recipe(recipe))

    def _texts(self) -> list[str]:
        """All prompts that the run will encode."""
        trained = (self._prompts(iteration) for iteration in range(self.recipe.run.iterations))
        return [text for texts in (self.eval_prompts, *trained) for text in texts]

    def _prompts(self, iteration: int) -> list[str]:
        return prompts_of_iteration(self.train_prompts, iteration, self.recipe.data.prompts_per_iteration, self.recipe.run.seed)

    def run(self, report: Report = lambda line: None) -> None:
        """Trains to `run.iterations`; `report` gets the metrics line of every iteration."""
        run = self.recipe.run
        log = metrics.MetricsLog(self.out, list(run.log), self.completed - (self.last_line is not None))
        for grid in (self.out / "samples").glob("iteration_*.png"):
            if int(grid.stem.removeprefix("iteration_")) > self.completed:
                grid.unlink()  # of a branch that this run has left
        with pick_backend(self.recipe):
            if self.last_line is not None:  # the checkpoint's own line: the run may have stopped before writing it, or end later now than it did then
                self._finish(self.last_line, log)
            for iteration in range(self.completed, run.iterations):
                evaluated = self.evaluate(iteration) if run.eval_every and iteration % run.eval_every == 0 else None
                with span("iteration"):
                    line = self.iterate(iteration)
                if evaluated is not None:
                    line["eval_reward"] = evaluated.weighted(self.rewards.weights)
                if iteration + 1 == run.iterations or (run.checkpoint_every and (iteration + 1) % run.checkpoint_every == 0):
                    save_checkpoint(self.out, self.policy, self.updater, iteration + 1, self.fingerprint, run.keep_last, line)
                self._finish(line, log)
                report(line)
        log.close()

    def _finish(self, line: dict[str, Any], log: metrics.MetricsLog) -> None:
        """Writes an iteration's line; the last one carries the final model's evaluation."""
        run = self.recipe.run
        if line["iteration"] + 1 == run.iterations and run.eval_every and (evaluated := self.evaluate(run.iterations)) is not None:
            line["eval_reward"] = evaluated.weighted(self.rewards.weights)
        log.write(line)

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its metrics line."""
        return self.stages.run(self._prompts(iteration), iteration)

    def evaluate(self, iteration: int) -> Evaluated | None:
        """Held-out reward and a sample grid of the model after `iteration` updates; None without held-out prompts."""
        if not self.eval_prompts:
            return None
        with self.updater.ema.swapped_in() if self.updater.ema is not None else nullcontext():
            evaluated = evaluate(self.recipe, self.policy, self.rewards, self.eval_prompts)
        save_grid(self.out / "samples" / f"iteration_{iteration:06d}.png", evaluated, self.recipe.run.eval.samples, self.rewards.weights)
        return evaluated
