"""The training loop: iterations, and what is kept of each: metrics, checkpoints, evaluations."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flowgrove.data.prompt import described
from flowgrove.data.prompts import prompts_of_iteration, prompts_of_run
from flowgrove.device import pick_backend, pick_device
from flowgrove.errors import UserError, one_line
from flowgrove.evaluation import Evaluated, evaluate, rollout_distance
from flowgrove.files import is_full, remove_left_behind, write_text
from flowgrove.iteration import Look, NothingScoredError, Stages
from flowgrove.models.initial_lora import check_initial_lora
from flowgrove.models.loading import check_prompts
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.allocator import keep_freed_memory
from flowgrove.passes.out_of_memory import PassTooLargeError
from flowgrove.plan.division import Division
from flowgrove.ranks import LostError, Ranks
from flowgrove.recipe.deciding import judges
from flowgrove.recipe.loading import dump_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.report.forest_capture import capture_forest
from flowgrove.report.forests import forest_files, remove_forest, save_forest
from flowgrove.report.grids import grid_files, load_grid, save_grid
from flowgrove.report.split_view import choice_sentence
from flowgrove.rewards.faults import Faults
from flowgrove.rewards.registry import WEIGHTED_SUM, Rewards
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.run.finding import Say, best_checkpoint, leave_later, mark_best, remove_older, remove_unfinished
from flowgrove.run.folder_lock import FolderLock
from flowgrove.run.manifest import read_state
from flowgrove.run.metrics import MetricsLog
from flowgrove.run.resume import choose_checkpoint, command_again, remember_budget, remembered_budget, stored_budget
from flowgrove.run.saving import CheckpointWriter
from flowgrove.run.stopping import Stopped, Stopping
from flowgrove.run.trackers.interface import Status
from flowgrove.run.trackers.registry import check_installed
from flowgrove.run.tracking import Trackers
from flowgrove.setup import Setup
from flowgrove.tuning.checkpointing import settled
from flowgrove.tuning.token_budget import settle_meetings, settle_token_budget
from flowgrove.update.micro_batches import MicroBatch
from flowgrove.update.passes import Rolled, Whole
from flowgrove.update.updater import Updater, UpdateStats

Report = Callable[[dict[str, Any]], None]
_log = logging.getLogger("flowgrove")


def checked_rewards(setup: Setup) -> Rewards:
    """The rewards of a recipe. Raises UserError for what is wrong with it and its files, before a model is loaded."""
    recipe = setup.recipe
    rewards = Rewards(recipe, pick_device(recipe))
    rewards.check(setup.prompts)
    if setup.eval_prompts and recipe.run.eval_every:
        rewards.of_evaluations.check(setup.eval_prompts)
    if not any(step.stochastic for step in setup.first_plan.steps):
        raise UserError(
            "rollout.window.strategy is none and there is no tree: no step is stochastic, so nothing would train; "
            "give a window or a tree"
        )
    pick_backend(recipe)
    return rewards


class _HeldUpdater(Updater):
    """While weights change, a signal waits."""

    def __init__(self, recipe: Recipe, policy: Policy, runner: PassRunner, stopping: Stopping, ranks: Ranks) -> None:
        super().__init__(recipe, policy, runner, ranks)
        self.stopping = stopping

    def run(self, parts: list[Rolled], whole: Whole | None = None) -> UpdateStats:
        """All updates of an iteration, whose checkpoint then is the next that can be written."""
        self.stopping.hold()
        return super().run(parts, whole)

    def gradient(self, batches: list[tuple[Rolled, MicroBatch]]) -> int:
        """Which compares with the reference model, whose weights take the place of these meanwhile."""
        self.stopping.hold()
        return super().gradient(batches)


class Trainer:
    """One run in one folder, which no other run may have meanwhile. `resume`: "auto", "never" or a checkpoint folder;
    `force`: also one that was trained with other settings (`choose_checkpoint`).

    `stopping` tells when to save and end; `say` takes what the user should know. Of several `ranks` the first writes
    the folder, and a signal to any of them ends all after the same iteration.
    """

    def __init__(
        self,
        setup: Setup,
        out: Path,
        resume: str = "auto",
        stopping: Stopping | None = None,
        say: Say = _log.warning,
        ranks: Ranks | None = None,
        force: bool = False,
    ) -> None:
        keep_freed_memory()
        self.setup, self.recipe, self.out = setup, setup.recipe, out
        self.stopping, self.ranks = stopping or Stopping(), ranks or Ranks()
        self.say = say
        self.trackers: Trackers | None = None  # those of the first rank, while it trains
        self.rewards = self.ranks.together(self._check)
        self.lock = self._locked()
        try:
            self._load(resume, say, force)
        except BaseException:
            self._release()
            raise

    def _check(self) -> Rewards:
        """The rewards. What can be wrong with the recipe and its files is an error here, before a model is loaded."""
        if self.ranks.first:
            check_installed(list(self.recipe.run.log))
        if self.recipe.model.init_lora is not None:
            check_initial_lora(self.recipe.model)
        texts = self._texts()
        check_prompts(self.recipe, texts[self.ranks.share(len(texts))])
        return checked_rewards(self.setup)

    def _load(self, resume: str, say: Say, force: bool) -> None:
        """The model, and the state of the run so far."""
        ranks, device = self.ranks, pick_device(self.recipe)
        checkpoint = self._checkpoint(resume, say, force)
        self.setup = setup = settled(self.setup, device, ranks)
        recipe = setup.recipe
        self.policy = Policy.load_together(recipe, device, self._texts(), ranks)
        self.runner = PassRunner.of(recipe, self.policy)
        ranks.by_first(lambda: self._settle_budget(checkpoint))
        self.runner.budget.resize(ranks.most(self.runner.budget.tokens if ranks.first else 0))
        self.policy.weights.reshard(bool(ranks.most(int(ranks.first and self.policy.weights.reshards))))
        self.updater = _HeldUpdater(recipe, self.policy, self.runner, self.stopping, ranks)
        self.stages = ranks.together(lambda: Stages(setup, self.policy, self.updater, self.rewards, ranks=ranks))
        self.completed: int = 0
        self.last_line: dict[str, Any] | None = None
        self.skipped = 0  # updates in a row
        self.writer = CheckpointWriter(self.out, recipe.run.keep_last, ranks, self._check_lock)
        self.went_back = resume not in ("auto", "never")
        self.again = command_again(resume)
        self.saved: Path | None = None  # the checkpoint of `completed`, if one in this folder is or is being written
        self.changes = False  # whether the checkpoints in the folder are of another recipe than this one
        if checkpoint is not None:
            self.completed, self.last_line = load_checkpoint(checkpoint, self.policy, self.updater, ranks)
            ranks.together(lambda: self._restore_splits(checkpoint))
            place = checkpoint.resolve()
            if place.parent.parent == self.out.resolve():
                self.saved = self.out / "checkpoints" / place.name
                self.changes = not setup.is_of(read_state(checkpoint)["recipe"])
        ranks.by_first(self._tidy)

    def _restore_splits(self, checkpoint: Path) -> None:
        """What the run knew of its splits. Raises UserError where the checkpoint does not tell."""
        if self.stages.evidence is not None:
            self.stages.evidence.restore(read_state(checkpoint).get("splits"), self.completed)

    def _tidy(self) -> None:
        """Leaves the recipe in the folder, and nothing that was half written."""
        for folder in (self.out, self.out / "samples", self.out / "forests"):
            remove_left_behind(folder)
        remove_unfinished(self.out)
        if not self.changes:
            self._write_recipe()

    def _write_recipe(self) -> None:
        write_text(self.out / "recipe.yaml", dump_recipe(self.recipe))

    def _locked(self) -> FolderLock | None:
        """The folder's lock, which the first rank holds for all."""
        return self.ranks.by_first(lambda: FolderLock(self.out))

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _checkpoint(self, resume: str, say: Say, force: bool) -> Path | None:
        """What the first rank finds to resume from."""
        found = self.ranks.by_first(lambda: choose_checkpoint(self.setup, self.out, resume, say, force))
        chosen = self.ranks.chosen(None if found is None else str(found))
        return None if chosen is None else Path(chosen)

    def _settle_budget(self, checkpoint: Path | None) -> None:
        written = "" if checkpoint is None else str(read_state(checkpoint)["recipe"])
        own = written if self.setup.is_of(written) else self.setup.fingerprint
        division = Division.of(self.recipe.engine, self.ranks.size)
        settle = settle_meetings if self.policy.weights.sharded else settle_token_budget
        settle(self.setup, self.policy, self.runner, stored_budget(checkpoint, own), division)
        budget = self.runner.budget
        budget.resize(min(budget.tokens, remembered_budget(self.out) or budget.tokens))

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
        if self.ranks.most(int(self.lock is not None and self.lock.released)):
            self.lock = self._locked()
        log = self.ranks.by_first(self._open_log)
        self.ranks.by_first(self._open_trackers)
        status: Status = "failed"
        self.stopping.hold()
        try:
            with pick_backend(self.recipe):
                self._train(report, log)
                self.writer.wait()
                self.ranks.by_first(self._remove_older)
            status = "finished"
        except BaseException as error:
            if isinstance(error, PassTooLargeError) and error.tokens is not None:
                remember_budget(self.out, error.tokens)
            request = self.stopping.request
            if request is None or (self.stopping.holding and not isinstance(error, Stopped)):
                if not isinstance(error, LostError):  # what is being written is as good as it was
                    self.writer.close()
                raise
            self.stopping.hold()  # a reward may have turned the interruption into an error of its own
            self.stopping.saved = self._saved() if self.last_line is not None else None
            status = "stopped"
            raise Stopped(request) from None
        finally:
            try:
                self._close_trackers(status)
            finally:
                self._release()

    def _open_log(self) -> MetricsLog:
        """What stands in the folder of a branch that this run has left goes."""
        for completed, grid in grid_files(self.out).items():
            if completed > self.completed:
                grid.unlink()
        for iteration, forest in forest_files(self.out).items():
            if iteration >= self.completed:
                remove_forest(forest)
        if self.went_back and self.saved is not None:
            leave_later(self.out, self.saved)
        return MetricsLog(self.out, self._first_line())

    def _first_line(self) -> int:
        """The iteration of the first line that will be written: the checkpoint's own is written anew."""
        return self.completed - (self.last_line is not None)

    def _open_trackers(self) -> None:
        """They get the grid before the first line once more: TensorBoard takes back what stands there since."""
        first = self._first_line()
        self.trackers = Trackers(self.recipe, self.out, first, self.say)
        if first < self.completed and (place := grid_files(self.out).get(first)) is not None:
            with suppress(ValueError, OSError):
                self.trackers.pictures(first, load_grid(place))

    def _close_trackers(self, status: Status) -> None:
        trackers, self.trackers = self.trackers, None
        if trackers is not None:
            trackers.close(status)

    def _train(self, report: Report, log: MetricsLog | None) -> None:
        run = self.recipe.run
        # the checkpoint's own: a run may stop before writing it, or end later than it did
        if self.last_line is not None:
            self._finish(self.last_line, log)
        for iteration in range(self.completed, run.iterations):
            evaluated = self.evaluate(iteration) if run.eval_every and iteration % run.eval_every == 0 else None
            if self.ranks.size == 1:
                self.stopping.let_go()
            self._stop_together()
            line = self.iterate(iteration)
            self.stopping.hold()
            if evaluated is not None:
                line |= self._held_out(evaluated)
            done = iteration + 1
            self.completed, self.last_line, self.saved = done, line, None
            if done == run.iterations or (run.checkpoint_every and done % run.checkpoint_every == 0):
                self._save()
            self._finish(line, log)
            if "chosen_splits" in line:
                self.say(f"rollout.tree.splits: {choice_sentence(self.recipe, [line])}")
            report(line)
            if done < run.iterations:  # a run that is done ends as such
                self._stop_together()
                self._stop_if_nothing_trains(line)

    def _save(self) -> Path:
        """Begins the checkpoint of all iterations that are completed."""
        if self.saved is None:
            state = (self.policy, self.updater, self.completed, self.setup.fingerprint)
            evidence = self.stages.evidence
            splits = None if evidence is None else evidence.state()
            self.saved = self.writer.begin(*state, self.last_line or {}, splits, self.setup.initial_lora)
            if self.changes:  # the recipe in the folder is always that of its newest checkpoint
                self.writer.wait()
                self.ranks.by_first(self._write_recipe)
                self.changes = False
        return self.saved

    def _remove_older(self) -> None:
        """What the last save has not come to, where a kill ended it."""
        if self.saved is not None:
            remove_older(self.out, self.saved, self.recipe.run.keep_last)

    def _saved(self) -> Path:
        """That checkpoint, which is complete and on disk now."""
        folder = self._save()
        self.writer.wait()
        return folder

    def _stop_together(self) -> None:
        """Raises Stopped on all ranks where one has heard a signal; one alone stops where it stands."""
        if self.ranks.size > 1 and (request := self.ranks.most(self.stopping.request or 0)):
            self.stopping.told(request)
            raise Stopped(request)

    def _stop_if_nothing_trains(self, line: dict[str, Any]) -> None:
        """Raises UserError, with the last good weights saved, after run.most_skipped_updates skipped updates in a row:
        those of iterations none of whose updates came through.
        """
        self.skipped = 0 if line["grad_norm"] is not None else self.skipped + line["skipped_updates"]
        if self.skipped < self.recipe.run.most_skipped_updates:
            return
        saved = self._saved()

        def end() -> None:
            raise UserError(
                f"{self.skipped} updates in a row were skipped, as their gradients were not finite "
                f"(run.most_skipped_updates): saved {saved} with the weights before them: {self.again} tries on "
                "from it, or resume an earlier one with a lower update.lr and another --out"
            )

        self.ranks.together(end)

    def _finish(self, line: dict[str, Any], log: MetricsLog | None) -> None:
        """Writes an iteration's line; the last one carries the final model's evaluation."""
        run = self.recipe.run
        if (
            line["iteration"] + 1 == run.iterations
            and run.eval_every
            and (evaluated := self.evaluate(run.iterations)) is not None
        ):
            line |= self._held_out(evaluated)

        def write() -> None:
            if log is not None:
                self._check_lock()
                log.write(line)
            if self.trackers is not None:
                self.trackers.numbers(line)

        self.ranks.together(write)

    def _held_out(self, evaluated: Evaluated) -> dict[str, Any]:
        """What a line tells of an evaluation."""
        rewards = self.rewards.of_evaluations
        names, weights = list(rewards.scorers), rewards.weights
        found = evaluated.estimates(names, weights, self.recipe.run.eval.samples)
        return {
            "eval_reward": evaluated.weighted(weights),
            "eval_reward_confidence": found[WEIGHTED_SUM]["confidence"] if found else None,
            "eval_rewards": {name: found[name] for name in names if name in found},
            **({} if evaluated.distance is None else {"rollout_distance": evaluated.distance}),
        }

    def _keep_if_best(self, reward: float) -> None:
        """A checkpoint of the model that has just been evaluated, if no trained one has scored higher under the same
        judge.
        """
        judge = self._judge()
        best = best_checkpoint(self.out) if self.ranks.first else None
        comparable = best is not None and best.judge in ("", judge) and int(best.folder.name[5:]) < self.completed
        known = best is not None and comparable and best.reward >= reward
        if self.ranks.most(int(known)):
            return
        folder = self._saved()

        def keep() -> None:
            mark_best(folder, reward, judge)
            remove_older(self.out, folder, self.recipe.run.keep_last)

        self.ranks.by_first(keep)

    def _judge(self) -> str:
        """A hash of what gives a model its held-out reward: prompts, rewards, how it draws."""
        prompts = [described(text) for text in self.setup.eval_prompts]
        drawn = self.recipe.run.eval.model_dump(mode="json", exclude={"rewards"})
        content = json.dumps([prompts, judges(self.recipe), drawn])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _write_grid(self, place: Path, completed: int, evaluated: Evaluated) -> None:
        """A sample grid, in the folder and for the trackers."""
        grid = save_grid(place, evaluated, self.recipe.run.eval.samples, self.rewards.weights)
        if self.trackers is not None:
            self.trackers.pictures(completed, grid)

    def _write(self, place: Path, write: Callable[[], None]) -> None:
        """A full disk costs a picture and not the run, for which there may be room again before it needs any."""
        try:
            write()
        except OSError as error:
            if not is_full(error):
                raise
            _log.warning("%s is not written: %s; free some space", place, error.strerror)

    def _look(self, iteration: int) -> Look | None:
        """What keeps a forest of the iteration, or warns where it cannot; None: it keeps none."""
        run = self.recipe.run
        every = run.eval_every if run.forest_every is None else run.forest_every
        if not every or (iteration % every and iteration + 1 < run.iterations):
            return None

        def look(parts: list[Rolled], scores: Tensor, whole: Whole) -> None:
            try:
                with self.runner.budget.samples_kept():
                    forest = capture_forest(self.recipe, self.runner, parts, scores, whole)
                if forest is not None:
                    self._write(self.out / "forests", lambda: save_forest(self.out, forest))
            except Exception as error:  # whatever it is: a drawing is not worth a run
                reason = one_line(f"{type(error).__name__}: {error}")
                _log.warning("no forest of iteration %d is kept, and the run goes on: %s", iteration, reason)

        return look

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its metrics line. What is done before it is saved if none of its prompts is scored."""
        try:
            upcoming = self._prompts(iteration + 1) if iteration + 1 < self.recipe.run.iterations else None
            return self.stages.run(self._prompts(iteration), iteration, self._look(iteration), upcoming)
        except NothingScoredError as nothing:
            if self.last_line is None or not isinstance(nothing.reason, UserError):
                raise nothing.reason from None
            self.stopping.hold()
            ended = UserError(f"{nothing.reason}; saved {self._saved()}: {self.again} goes on from it")
            ended.everywhere = nothing.reason.everywhere
            raise ended from None

    def evaluate(self, iteration: int) -> Evaluated | None:
        """Held-out reward and a sample grid of the model after `iteration` updates; None without held-out prompts.

        Those that could not be scored are left out, with a warning.
        """
        if not self.setup.eval_prompts:
            return None
        self.stages.settle()
        with self.updater.ema.swapped_in() if self.updater.ema is not None else nullcontext():
            between = self.stopping.check if self.ranks.size == 1 else lambda: None
            held_out = self.setup.eval_prompts
            faults = Faults()
            model, rewards = (self.setup, self.policy, self.runner), self.rewards.of_evaluations
            evaluated = evaluate(*model, rewards, held_out, between, self.ranks, faults)
            if self.recipe.rollout.cheapens:
                evaluated = replace(evaluated, distance=rollout_distance(*model, held_out, self.ranks))
        reward = evaluated.weighted(rewards.weights)
        lost = int(evaluated.scores.isnan().any(1).sum()) // self.recipe.run.eval.samples
        faults.tell(f"the evaluation after {iteration} iterations", lost)
        place = self.out / "samples" / f"iteration_{iteration:06d}.png"
        self.ranks.by_first(lambda: self._write(place, lambda: self._write_grid(place, iteration, evaluated)))
        if self.recipe.run.keep_best and iteration > 0 and reward is not None:
            self._keep_if_best(reward)
        return evaluated
