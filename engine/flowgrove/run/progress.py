"""What a person sees while training: a progress bar, and one line per iteration."""

from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowgrove.recipe.schema import Recipe


class TrainingDisplay:
    """Context manager; `update` takes the metrics line of an iteration."""

    def __init__(self, console: Console, recipe: Recipe, completed: int) -> None:
        self.recipe = recipe
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("training", total=recipe.run.iterations, completed=completed)

    def __enter__(self) -> "TrainingDisplay":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal may be gone
            self.progress.stop()

    def update(self, line: dict[str, Any]) -> None:
        with suppress(OSError):  # a run outlives its terminal
            self.progress.console.print(format_line(line))
            self.progress.advance(self.task)


def format_line(line: dict[str, Any]) -> str:
    """One iteration on one line: reward, ratio, clip fractions, drift, passes, stage seconds, held-out reward."""
    rewards = "  ".join(f"{name} {r['mean']:.3f}±{r['std']:.3f}" for name, r in line["reward"].items())
    held_out = f"  [bold]held-out {_number(line['eval_reward'], '.3f')}[/]" if "eval_reward" in line else ""
    if line["ratio_mean"] is None:
        trained = "nothing trained: no advantage" if line["train_passes"] == 0 else "ratio not finite"
    else:
        trained = (
            f"ratio {line['ratio_mean']:.5f} ({line['ratio_min']:.4f}…{line['ratio_max']:.4f})  clipped "
            f"−{line['clipped_low']:.0%} +{line['clipped_high']:.0%}"
            f"  drift {_number(line['logp_drift'], '.0e')}  grad {_number(line['grad_norm'], '.2f')}"
        )
    if skipped := line.get("skipped_updates"):
        trained += f"  [bold]{skipped} update{'s' if skipped > 1 else ''} skipped[/]"
    if dropped := line.get("dropped_prompts"):
        trained += f"  [bold]{dropped} prompt{'s' if dropped > 1 else ''} dropped[/]"
    stages = " ".join(f"{stage} {seconds:.2f}" for stage, seconds in line["seconds"].items() if seconds >= 0.005)
    passes = f"{line['rollout_forwards']}+{line['train_passes']}"
    return f"{line['iteration']:4d}  {rewards}{held_out}  {trained}  passes {passes}  s: {stages}"


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
