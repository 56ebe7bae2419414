"""What profiling/signal_to_noise.py found of recipes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from doc_figures.registry import Rows, block, numbers, table

PER = 1000  # weighted passes
_COLUMNS = 3
_SIGNAL, _NOISE = "#1f4e8c", "#d9a441"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar for every recipe with its 95 % interval, the best first, and below the shares of signal and noise of its
    steps."""
    from flowgrove.report.figures import literal, pyplot, save_figure

    whole = _best_first(rows)
    names = [row["recipe"] for row in whole]
    down = math.ceil(len(names) / _COLUMNS)
    figure = pyplot.figure(figsize=(10, 3 + 1.5 * down), layout="constrained")
    grid = figure.add_gridspec(down + 1, _COLUMNS, height_ratios=[2, *[1] * down])
    bars = figure.add_subplot(grid[0, :])
    values, errors = ([float(row[f"{key}_per_{PER}"]) for row in whole] for key in ("snr", "interval"))
    bars.bar(range(len(names)), values, yerr=errors, color=_SIGNAL, ecolor="#666666", capsize=3)
    bars.set_xticks(range(len(names)), [name.removeprefix("shapes_") for name in names], fontsize=8)
    bars.set_ylabel(f"signal to noise\nper {PER:,} weighted passes", fontsize=9)
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + place // _COLUMNS, place % _COLUMNS])
        steps = [row for row in rows if row["recipe"] == name and str(row["step"]) != "all"]
        for shift, (key, colour) in zip((-0.2, 0.2), (("signal", _SIGNAL), ("noise", _NOISE)), strict=True):
            at = [int(row["step"]) + shift for row in steps]
            shares = [100 * float(row[f"{key}_share"]) for row in steps]
            axes.bar(at, shares, width=0.4, color=colour, label=f"% of the {key}")
        axes.set_title(**literal(name.removeprefix("shapes_"), "label"), loc="left", fontsize=9)
        axes.set_xticks([int(row["step"]) for row in steps])
        axes.tick_params(labelsize=7)
        if place == 0:
            axes.legend(frameon=False, fontsize=7)
        if place // _COLUMNS == down - 1:
            axes.set_xlabel("step of the schedule", fontsize=8)
    save_figure(figure, path)


@block("docs/algorithms.md", "signal_to_noise.csv")
def signal_to_noise(rows: Rows) -> str:
    """The best first; of every recipe also the step with most of the noise."""
    lines = []
    for row in _best_first(rows):
        steps = [each for each in rows if each["recipe"] == row["recipe"] and str(each["step"]) != "all"]
        noisiest = max(steps, key=lambda each: float(each["noise_share"]))
        lines.append((
            f"`{row['recipe']}`", f"{row['weighted_passes']:,.0f}", f"{row['snr']:.3f} ± {row['interval']:.3f}",
            f"**{row[f'snr_per_{PER}']:.4f}** ± {row[f'interval_per_{PER}']:.4f}",
            f"{noisiest['step']}: {100 * noisiest['noise_share']:.0f} %, {100 * noisiest['signal_share']:.0f} %",
        ))  # fmt: skip
    return table(
        (
            "`recipes/`",
            "weighted passes of an iteration",
            "signal to noise of its gradient",
            f"per {PER:,} passes",
            "the noisiest step: its share of the noise, of the signal",
        ),
        lines,
    )


@numbers("docs/algorithms.md", "signal_to_noise.csv")
def signal_for_its_cost(rows: Rows) -> Iterator[tuple[str, ...]]:
    per = {row["recipe"].removeprefix("shapes_"): row[f"snr_per_{PER}"] for row in _best_first(rows)}
    told = "`shapes_grove` has {} times the signal to noise of `shapes_mix_flash` and {} times that of `shapes_dance`"
    yield told, f"{per['grove'] / per['mix_flash']:.1f}", f"{per['grove'] / per['dance']:.0f}"


def _best_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    whole = [row for row in rows if str(row["step"]) == "all"]
    return sorted(whole, key=lambda row: -float(row[f"snr_per_{PER}"]))
