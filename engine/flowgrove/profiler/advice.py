"""What to try next: rules over a profile, each of which names a recipe key, why, and what it may save at most.

A rule speaks only where its reason has been measured, and never of what the recipe already has. What it may save is
derived from the counts of the plan and from the seconds that were measured, or left open.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flowgrove.profiler.facts import Facts
from flowgrove.profiler.phases import waits
from flowgrove.recipe.checks import checkpointing_with
from flowgrove.recipe.schema import Tail
from flowgrove.spans import DECODE, OPTIMIZER, REWARD, TRANSFORMER

SHOWN = 3
_WAITS, _DECODES, _STEPS = 0.15, 0.25, 0.15  # shares from which reward, decoding and optimiser are told of
_FULL, _SPARSE = 0.85, 0.5  # of the token budget: from, and up to
_USED = 0.5  # of the matrix rate
_COMPILED = 0.5  # share of the transformer from which compiling it is worth its minutes
_SERVERS = {"http": 4, "unified_reward": 16}  # their requests at once by default
_MODELS = ("aesthetic", "clip_score", "hpsv2", "image_reward", "pickscore")


@dataclass(frozen=True)
class Suggestion:
    """`--set key=value` tries it. `saves`: seconds of an iteration at most; None: cannot be said before it is
    tried. `learns_otherwise`: the change is no mere change of speed.
    """

    key: str
    value: str
    reason: str
    saves: float | None = None
    learns_otherwise: bool = False

    def told(self, seconds: float) -> str:
        """As a sentence, of an iteration of so many seconds."""
        gain = "" if self.saves is None else f"; saves at most {self.saves:.2g} of {seconds:.2g} s"
        kind = "; it changes what is learned" if self.learns_otherwise else ""
        return f"{self.key}: {self.value}: {self.reason}{gain}{kind}"


def suggestions(facts: Facts) -> list[Suggestion]:
    """All that apply and that a recipe may say, the most that may be saved first, then those of which it cannot be
    said.
    """
    applying = (suggestion for rule in RULES if (suggestion := rule(facts)) is not None)
    found = [one for one in applying if facts.allows(one.key, one.value)]
    return sorted(found, key=lambda one: -1.0 if one.saves is None else one.saves, reverse=True)


def sharing(facts: Facts) -> Suggestion | None:
    """States that are run once for each trajectory."""
    if facts.recipe.engine.share:
        return None
    counts = facts.plan.counts
    forwards, passes = facts.rows_of(counts)
    prompts = facts.recipe.data.prompts_per_iteration
    fewer, trained = forwards - prompts * counts.rollout_forwards, passes - prompts * counts.train_passes
    saved = fewer * facts.forward + trained * facts.train
    reason = f"{fewer + trained} of {forwards + passes} rows are of states that other rows have too"
    return Suggestion("engine.share", "true", reason, saved) if facts.tells(saved) else None


def graphs_of_the_rollout(facts: Facts) -> Suggestion | None:
    """Forwards that the rollout has run already."""
    engine, prune = facts.recipe.engine, facts.recipe.credit.prune
    if engine.distributed == "fsdp2" or (prune is not None and prune.kind != "depth"):  # where auto retains none
        return None
    saved = sum(one.seconds for one in facts.phases if one.name == "update/transformer") / facts.plan.updates
    if engine.reuse_rollout_graph is not False or not engine.share or engine.exact_replay or not facts.tells(saved):
        return None
    reason = "the first update runs forwards again that the rollout has just run"
    return Suggestion("engine.reuse_rollout_graph", "auto", reason, saved)


def recomputation(facts: Facts) -> Suggestion | None:
    """Activations that are computed twice although they would fit."""
    saved = facts.forward * facts.rows(stage="update", name="backward")
    if facts.recipe.model.gradient_checkpointing != "full" or not facts.tells(saved):
        return None
    reason = "each backward runs a forward again to save memory, and by prediction there is room without that"
    for kind in reversed(checkpointing_with(facts.recipe.engine)[1:]):
        model = facts.recipe.model.model_copy(update={"gradient_checkpointing": kind})
        if facts.fits(facts.recipe.model_copy(update={"model": model})):
            return Suggestion("model.gradient_checkpointing", kind, reason, saved)
    return None


def recorded_passes(facts: Facts) -> Suggestion | None:
    """A GPU that waits for launches."""
    engine = facts.recipe.engine
    if facts.device_type != "cuda" or engine.cuda_graphs or engine.split_lengths or engine.distributed == "fsdp2":
        return None
    if facts.idle is None or not facts.idle.span:
        return None
    waited = sum(
        gaps.total for phase, gaps in facts.idle.gaps.items() if phase.startswith("rollout/") and not waits(phase)
    )
    saved = waited / facts.idle.span * facts.seconds
    reason = f"the GPU waits for launches in {waited / facts.idle.span:.0%} of the iteration, in its rollout"
    return Suggestion("engine.cuda_graphs", "true", reason, saved) if facts.tells(saved) else None


def larger_passes(facts: Facts) -> Suggestion | None:
    """Full passes at a low rate; a GPU's auto has been measured."""
    engine = facts.recipe.engine
    if (engine.token_budget == "auto") == (facts.device_type == "cuda") or facts.utilisation is None:
        return None
    passes = [phase for phase in facts.phases if phase.kind == TRANSFORMER and phase.passes]
    held = sum(phase.tokens for phase in passes) / max(1, sum(phase.passes for phase in passes))
    if held < _FULL * facts.budget or facts.utilisation >= _USED:
        return None
    reason = (
        f"passes are full with {held:,.0f} of {facts.budget:,} tokens, and the transformer reaches "
        f"{facts.utilisation:.0%} of the matrix rate; `flowgrove tune` measures which budget is best"
    )
    value = "auto" if facts.device_type == "cuda" else str(2 * facts.budget)
    return Suggestion("engine.token_budget", value, reason)


def more_prompts(facts: Facts) -> Suggestion | None:
    """Passes that are far from full."""
    passes = [phase for phase in facts.phases if phase.kind == TRANSFORMER and phase.passes]
    held = sum(phase.tokens for phase in passes) / max(1, sum(phase.passes for phase in passes))
    if not passes or held >= _SPARSE * facts.budget or facts.utilisation is None or facts.utilisation >= _USED:
        return None
    prompts = facts.recipe.data.prompts_per_iteration
    reason = f"passes hold {held:,.0f} of {facts.budget:,} tokens: with more prompts a row costs less"
    return Suggestion("data.prompts_per_iteration", str(2 * prompts), reason, learns_otherwise=True)


def compiled_blocks(facts: Facts) -> Suggestion | None:
    """A GPU that is mostly in the transformer."""
    share = facts.spent(kind=TRANSFORMER) / facts.seconds
    if facts.device_type != "cuda" or facts.recipe.engine.compile or share < _COMPILED:
        return None
    reason = f"the transformer takes {share:.0%} of the iteration; `flowgrove tune --compile` measures it, in minutes"
    return Suggestion("engine.compile", "true", reason)


def half_precision(facts: Facts) -> Suggestion | None:
    """fp32 on a GPU."""
    share = facts.spent(kind=TRANSFORMER) / facts.seconds
    if facts.device_type != "cuda" or facts.recipe.model.dtype == "bf16" or share < _COMPILED:
        return None
    reason = f"the transformer takes {share:.0%} of the iteration and computes in {facts.recipe.model.dtype}"
    return Suggestion("model.dtype", "bf16", reason, learns_otherwise=True)


def rewards(facts: Facts) -> Suggestion | None:
    """Scoring that the iteration waits for."""
    waited = facts.waited(REWARD)
    if waited < _WAITS * facts.seconds:
        return None
    scored = [phase for phase in facts.phases if phase.kind == REWARD]
    entries = facts.recipe.reward
    slowest = max(scored, key=lambda phase: phase.seconds, default=None)
    called = [slowest is not None and slowest.name.endswith(f"/{reward.title}") for reward in entries]
    number = called.index(True) if any(called) else 0
    place, name, given = f"reward.{number}", entries[number].name, entries[number].model_extra or {}
    reason = f"the iteration waits {waited:.2g} s for rewards, of which {entries[number].title} takes the most"
    if name in _SERVERS:
        twice = 2 * given.get("concurrency", _SERVERS[name])
        return Suggestion(f"{place}.concurrency", str(twice), f"{reason}, with half as many requests at once", waited)
    if name in _MODELS and given.get("dtype", "fp32") == "fp32" and facts.device_type == "cuda":
        return Suggestion(f"{place}.dtype", "bf16", reason, waited, learns_otherwise=True)
    if name in _MODELS and facts.device_type == "cuda":
        return Suggestion(f"{place}.batch_size", str(2 * given.get("batch_size", 32)), reason, waited)
    remote = f"{reason}; a server on other cores or another GPU works beside the rollout (its url beside it)"
    return Suggestion(f"{place}.name", "http", remote, waited)


def tiles(facts: Facts) -> Suggestion | None:
    """Decoding in tiles."""
    spent = facts.waited(DECODE)
    if not facts.recipe.model.vae_tiling or not facts.tells(spent):
        return None
    reason = f"decoding takes {spent / facts.seconds:.0%} of the iteration, and tiles are slower than whole pictures"
    return Suggestion("model.vae_tiling", "false", reason)


def fewer_pictures(facts: Facts) -> Suggestion | None:
    """Decoding that dominates."""
    spent, size = facts.waited(DECODE), facts.recipe.rollout.group_size
    if spent < _DECODES * facts.seconds or size < 4 or facts.recipe.rollout.tree is not None:
        return None
    fewer = size * 3 // 4
    if facts.changed("rollout", group_size=fewer) is None:
        return None
    reason = f"decoding takes {spent / facts.seconds:.0%} of the iteration"
    return Suggestion("rollout.group_size", str(fewer), reason, spent * (1 - fewer / size), learns_otherwise=True)


def shorter_tail(facts: Facts) -> Suggestion | None:
    """ODE steps after the last stochastic one."""
    other = facts.changed("rollout", tail=Tail()) if facts.recipe.rollout.tail is None else None
    if other is None:
        return None
    fewer = facts.rows_of(facts.plan.counts)[0] - facts.rows_of(other.first_plan.counts)[0]
    saved = fewer * facts.forward
    if not facts.tells(saved):
        return None
    share = facts.spent(stage="rollout") / facts.seconds
    reason = f"the rollout takes {share:.0%} of the iteration, {fewer} of its rows in steps that a tail leaves out"
    return Suggestion("rollout.tail", "{compress: 0.4}", reason, saved, learns_otherwise=True)


def unguided_steps(facts: Facts) -> Suggestion | None:
    """Guidance before the first stochastic step and after the last."""
    rollout = facts.recipe.rollout
    if not facts.doubles or rollout.guidance_range is not None or rollout.cache is not None:
        return None
    share, prompts = facts.recipe.engine.share, facts.recipe.data.prompts_per_iteration
    stochastic = [step.index for step in facts.plan.steps if step.stochastic]
    first, last = min(stochastic, default=0), max(stochastic, default=0)
    outside = [step for step in facts.plan.steps if not first <= step.index <= last]
    rows = prompts * sum(step.nodes_in if share else facts.plan.leaves for step in outside)
    saved = rows * facts.forward / 2
    if not facts.tells(saved):
        return None
    reason = f"{rows} of the rollout's rows are guided before or after all steps with noise, at twice the cost"
    return Suggestion("rollout.guidance_range", f"[{first}, {last + 1}]", reason, saved, learns_otherwise=True)


def fewer_trained_steps(facts: Facts) -> Suggestion | None:
    """An update that dominates."""
    spent, steps = facts.spent(stage="update", kind=TRANSFORMER), len(facts.plan.trained_steps)
    if facts.recipe.update.step_fraction < 1 or steps < 2 or spent < facts.seconds / 2:
        return None
    other = facts.changed("update", step_fraction=0.6)
    if other is None:
        return None
    fewer = facts.rows_of(facts.plan.counts)[1] - facts.rows_of(other.first_plan.counts)[1]
    saved = fewer * facts.train
    if not facts.tells(saved):
        return None
    reason = f"training passes take {spent / facts.seconds:.0%} of the iteration, of {steps} steps for every sample"
    return Suggestion("update.step_fraction", "0.6", reason, saved, learns_otherwise=True)


def fewer_updates(facts: Facts) -> Suggestion | None:
    """Optimiser steps that dominate."""
    spent, updates, update = facts.spent(kind=OPTIMIZER), facts.plan.updates, facts.recipe.update
    if updates == 1 or spent < _STEPS * facts.seconds:
        return None
    fewer = updates // 2
    reason = f"{updates} optimiser steps take {spent / facts.seconds:.0%} of the iteration"
    saved = spent * (1 - fewer / updates)
    if update.edges_per_update is not None:
        return Suggestion("update.edges_per_update", str(2 * update.edges_per_update), reason, saved, True)
    return Suggestion("update.updates_per_iteration", str(fewer), reason, saved, learns_otherwise=True)


RULES: tuple[Callable[[Facts], Suggestion | None], ...] = (
    sharing, graphs_of_the_rollout, recomputation, recorded_passes, larger_passes, more_prompts, compiled_blocks,
    half_precision, rewards, tiles, fewer_pictures, shorter_tail, unguided_steps, fewer_trained_steps, fewer_updates,
)  # fmt: skip
