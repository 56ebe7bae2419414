"""A plan as a person reads it, and as JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.planner import RolloutPlan, Step, weighted_passes
from flowgrove.recipe.schema import Recipe

if TYPE_CHECKING:  # predicting memory needs torch, drawing a plan does not
    from flowgrove.plan.communication import Prediction
    from flowgrove.plan.rounding import Rounding
    from flowgrove.tuning.checkpointing import Way

_DRAWN_LEAVES = 32
_GPUS = (12, 16, 24, 32, 40, 48, 80, 96, 141, 180)  # GB, of GPUs that are sold
_STEP = ("index", "sigma", "sigma_next", "solver", "stochastic", "fanout", "trained", "nodes_in", "nodes_out")


def plan_json(plan: RolloutPlan, recipe: Recipe, division: Division = ALONE) -> dict[str, Any]:
    """The object that `flowgrove plan --json` prints; of several ranks with what the one with the most prompts and the
    one with the fewest do.
    """
    content = {
        "iteration": plan.iteration,
        "window": list(plan.window),
        "steps": [
            {key: getattr(step, key) for key in _STEP} | ({"expert": step.expert} if step.expert else {})
            for step in plan.steps
        ],
        "counts": asdict(plan.counts),
    }
    if division.ranks > 1:
        most, fewest = division.work(recipe, plan)
        content["ranks"] = {**asdict(division), "most": asdict(most), "fewest": asdict(fewest)}
    return content


def memory_json(predictions: "list[Prediction]") -> dict[str, Any]:
    """What `--memory` adds to it: a list, since divided weights can be gathered in two ways."""
    return {
        "memory": [
            {
                "reshard_after_forward": found.reshard,
                "peak": found.memory.peak,
                **asdict(found.memory),
                "sent": found.communication.iteration,
                "sent_in_evaluation": found.communication.evaluation,
            }
            for found in predictions
        ]
    }


def draw_plan(plan: RolloutPlan, recipe: Recipe, console: Console, schedule: str) -> None:
    """Steps, forest, counts and the cost against the unshared loop. `schedule`: where the σ table comes from."""
    window = f"window {plan.window[0]}…{plan.window[-1]}" if plan.window else "no window"
    table = Table(
        title=f"iteration {plan.iteration}: {window}, per prompt",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    cheaper = [_cheaper(plan, step, recipe) for step in plan.steps]
    told = {"expert": [str(step.expert or "") for step in plan.steps], "cheaper": cheaper}
    others = {name: column for name, column in told.items() if any(column)}
    for name in ("step", "σ", "σ′", "solver", "nodes", "fanout", "trained", *others):
        table.add_column(name, justify="left" if name in ("solver", "trained", *others) else "right")
    for step in plan.steps:
        fanout = f"×{step.fanout}" if step.fanout > 1 else ""
        kind = f"[bold]{step.solver}[/]" if step.stochastic else step.solver
        frozen = step.expert is not None and recipe.model.trained_experts not in ("both", step.expert)
        trained = "yes" if step.trained else "" if not step.stochastic else "frozen" if frozen else "pruned"
        cells = (
            str(step.index),
            f"{step.sigma:.4f}",
            f"{step.sigma_next:.4f}",
            kind,
            str(step.nodes_in),
            fanout,
            trained,
        )
        table.add_row(*cells, *(column[step.index] for column in others.values()))
    console.print(table)
    console.print(f"[dim]σ: {schedule}[/]")
    console.print()
    for line in forest_lines(plan):
        console.print(line)
    console.print()
    counts, prompts = plan.counts, recipe.data.prompts_per_iteration
    console.print(f"{'':<18}{'per prompt':>12}{'per iteration':>15}{'unshared loop':>15}")
    for name, count, unshared in (
        ("leaves", counts.leaves, counts.leaves),
        ("rollout forwards", counts.rollout_forwards, counts.unshared_rollout_forwards),
        ("edges", counts.edges, None),
        ("trained edges", counts.trained_edges, counts.unshared_train_passes),
        ("train passes", counts.train_passes, counts.unshared_train_passes),
    ):
        other = "" if unshared is None else f"{unshared * prompts:,}"
        console.print(f"{name:<18}{count:>12,}{count * prompts:>15,}{other:>15}")
    console.print(f"{'updates':<18}{'':>12}{plan.updates if plan.trained_steps else 0:>15,}")
    shared = weighted_passes(counts.rollout_forwards, counts.train_passes)
    loop = weighted_passes(counts.unshared_rollout_forwards, counts.unshared_train_passes)
    console.print(f"cost against the unshared loop: {shared / loop:.0%} (one train pass counted as three forwards)")


def _cheaper(plan: RolloutPlan, step: Step, recipe: Recipe) -> str:
    """What a step leaves out of its forward."""
    unguided = "unguided" if recipe.model.guidance_scale > 1 and not plan.guided(step) else ""
    cheaper = [plan.precision, plan.attention] if plan.cheap(step) else []
    return ", ".join(part for part in (unguided, "cached" if plan.extrapolates(step) else "", *cheaper) if part)


def draw_rounding(plan: RolloutPlan, rounding: "Rounding | None", console: Console) -> None:
    """Which forwards run in rollout.precision, and what each of them saves; None: not known without the model."""
    if plan.precision is None:
        return
    steps, forwards = sum(plan.cheap(step) for step in plan.steps), plan.cheap_forwards()
    of = f"{steps} of {len(plan.steps)} steps, {forwards:,} of {plan.counts.rollout_forwards:,} rollout forwards"
    console.print(f"{plan.precision} in {of} per prompt")
    if rounding is not None:
        flops, share = rounding.flops / 1e12, rounding.rounded_flops / rounding.flops
        weights = f"{_size(rounding.rounded_bytes)} of weights instead of {_size(rounding.full_bytes)}"
        layers = f"{rounding.layers} linear layers in 8 bits, {share:.0%} of its {flops:.3g} TFLOP"
        console.print(f"such a forward of a row runs {layers}, and reads {weights}")


def rounding_json(plan: RolloutPlan, rounding: "Rounding | None") -> dict[str, Any]:
    """What rollout.precision adds to the object of `flowgrove plan --json`."""
    if plan.precision is None:
        return {}
    steps = [step.index for step in plan.steps if plan.cheap(step)]
    counts = {"precision": plan.precision, "steps": steps, "rollout_forwards": plan.cheap_forwards()}
    return {"rounding": {**({} if rounding is None else asdict(rounding)), **counts}}


def draw_ranks(plan: RolloutPlan, recipe: Recipe, division: Division, console: Console) -> None:
    """What each rank does."""
    console.print(f"\n{f'each of {division.ranks} ranks':<18}{'most':>12}{'fewest':>15}")
    for part in zip(*(asdict(work).items() for work in division.work(recipe, plan)), strict=True):
        (name, most), (_, fewest) = part
        console.print(f"{name.replace('_', ' '):<18}{most:>12,}{fewest:>15,}")


def draw_memory(predictions: "list[Prediction]", device_type: str, division: Division, console: Console) -> None:
    """What stays, what each stage needs beside it, and of several ranks what one sends; a column for each way to gather
    divided weights.
    """
    memories = [found.memory for found in predictions]
    one = f"one {device_type} device" + (f" of {division.ranks}" if division.ranks > 1 else "")
    console.print(f"\npredicted memory of {one} ({memories[0].rows} rows a pass, text encoders freed)")

    def draw(title: str, parts: list[dict[str, int]]) -> None:
        for number, name in enumerate(name for name in parts[0] if any(part[name] for part in parts)):
            row(f"{'' if number else title:<11}{name}", [part[name] for part in parts])

    def row(name: str, sizes: list[int], style: str = "none") -> None:
        console.print(f"  [{style}]{name:<37}{''.join(f'{_size(size):>14}' for size in sizes)}[/]")

    if len(predictions) > 1:
        console.print(f"  [dim]{'engine.reshard_after_forward':<37}{'false':>14}{'true':>14}[/]")
    draw("stays", [memory.resident for memory in memories])
    draw("beside it", [memory.stages for memory in memories])
    row("peak", [memory.peak for memory in memories], "bold")
    if device_type == "cuda":
        cards = "".join(f"{_card(memory.peak):>14}" for memory in memories)
        console.print(f"  {'smallest usual GPU that holds it':<37}{cards}")
    if any(memory.host for memory in memories):
        row("host memory of blocks' inputs", [memory.host for memory in memories])
    row("a state whose graph is kept", [memory.graph for memory in memories])
    if division.ranks > 1:
        console.print("\npredicted bytes that it sends")
        draw("iteration", [found.communication.iteration for found in predictions])
        row("evaluation", [found.communication.evaluation for found in predictions])


def draw_ways(found: "list[Way] | None", recipe: Recipe, console: Console) -> None:
    """What model.gradient_checkpointing: auto has weighed, and what was taken for it; nothing if nothing was. None:
    there is no such device here to weigh it for.
    """
    if found is None:
        kind = recipe.model.gradient_checkpointing
        console.print(f"model.gradient_checkpointing: auto is weighed where the run trains, and shown as {kind} here")
    if not found:
        return
    console.print("\nmodel.gradient_checkpointing: auto weighs")
    least = min(way.flops for way in found)
    for way in found:
        kept = f"graphs of {way.kept:,} states of the rollout beside it, {_size(way.need.graph)} each"
        more = f"{(way.flops - least) / 1e12:.3g} TFLOP more an iteration than the least"
        console.print(
            f"  {way.need.kind:<10}{_size(way.need.peak):>11}{'' if way.fits else ', too much'}; {kept}; {more}"
        )
    console.print(f"taken here: {recipe.model.gradient_checkpointing}")


def _card(peak: int) -> str:
    from flowgrove.plan.memory import GPU_SHARE

    return next((f"{size} GB" for size in _GPUS if peak <= GPU_SHARE * (size << 30)), "none")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def forest_lines(plan: RolloutPlan) -> list[str]:
    """The forest of one prompt as text: a row per leaf, ━ trained, ─ not, splits as branches."""
    if plan.leaves > _DRAWN_LEAVES:
        return [f"({plan.leaves} leaves: too many to draw)"]
    lines = []
    for leaf in range(plan.leaves):
        cells = []
        for step in plan.steps:
            width = plan.leaves // step.nodes_out
            below_parent = width * step.fanout
            dash = "━" if step.trained else "─"
            if leaf % width == 0:
                first, last = leaf % below_parent == 0, leaf % below_parent == below_parent - width
                joint = (dash if step.fanout == 1 else "┬") if first else ("╰" if last else "├")
                cells.append(joint + dash * 2)
            else:
                cells.append(("│" if step.fanout > 1 and leaf % below_parent < below_parent - width else " ") + "  ")
        lines.append("".join(cells) + "●")
    return lines
