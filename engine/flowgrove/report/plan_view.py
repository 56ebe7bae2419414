"""A plan as a person reads it, and as JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.recipe.schema import Recipe

if TYPE_CHECKING:  # predicting memory needs torch, drawing a plan does not
    from flowgrove.plan.memory import Memory

_DRAWN_LEAVES = 32
_STEP = ("index", "sigma", "sigma_next", "solver", "stochastic", "fanout", "trained", "nodes_in", "nodes_out")


def plan_json(plan: RolloutPlan) -> dict[str, Any]:
    """The object that `flowgrove plan --json` prints."""
    return {
        "iteration": plan.iteration,
        "window": list(plan.window),
        "steps": [{key: getattr(step, key) for key in _STEP} for step in plan.steps],
        "counts": asdict(plan.counts),
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
    for name in ("step", "σ", "σ′", "solver", "nodes", "fanout", "trained", *(["cheaper"] if any(cheaper) else [])):
        table.add_column(name, justify="left" if name in ("solver", "trained", "cheaper") else "right")
    for step in plan.steps:
        fanout = f"×{step.fanout}" if step.fanout > 1 else ""
        kind = f"[bold]{step.solver}[/]" if step.stochastic else step.solver
        trained = "yes" if step.trained else "pruned" if step.stochastic else ""
        cells = (
            str(step.index),
            f"{step.sigma:.4f}",
            f"{step.sigma_next:.4f}",
            kind,
            str(step.nodes_in),
            fanout,
            trained,
        )
        table.add_row(*cells, *([cheaper[step.index]] if any(cheaper) else []))
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
    # a training pass costs about three forwards: forward, and a backward twice as dear
    shared, loop = (
        f + 3 * p
        for f, p in (
            (counts.rollout_forwards, counts.train_passes),
            (counts.unshared_rollout_forwards, counts.unshared_train_passes),
        )
    )
    console.print(f"cost against the unshared loop: {shared / loop:.0%} (one train pass counted as three forwards)")


def _cheaper(plan: RolloutPlan, step: Step, recipe: Recipe) -> str:
    """What a step leaves out of its forward."""
    unguided = "unguided" if recipe.model.guidance_scale > 1 and not plan.guided(step) else ""
    return ", ".join(part for part in (unguided, "cached" if plan.extrapolates(step) else "") if part)


def draw_memory(memory: "Memory", device_type: str, console: Console) -> None:
    """What stays and what each stage needs beside it."""
    console.print(f"\npredicted memory of one {device_type} device ({memory.rows} rows a pass, text encoders freed)")
    for title, parts in (("stays", memory.resident), ("beside it", memory.stages)):
        for number, (name, size) in enumerate((name, size) for name, size in parts.items() if size):
            console.print(f"  {'' if number else title:<11}{name:<20}{_size(size):>12}")
    console.print(f"  [bold]{'peak':<31}{_size(memory.peak):>12}[/]")
    console.print(f"  {'a state whose graph is kept':<31}{_size(memory.graph):>12}")


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
