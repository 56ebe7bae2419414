"""What profiling/gradient_variance.py found."""

from collections.abc import Iterator
from pathlib import Path

from doc_figures.registry import Row, Rows, numbers, only

CSV = "gradient_variance.csv"
_COLOURS = ("#000000", "#e69f00", "#0072b2", "#009e73", "#d55e00")
_MARKERS = ("o", "D", "^", "s", "v")
_MUTED = "#666666"
_EARLY = ("Mix, the same, flow_sde", "Mix, splits 0, 1 into 4")
_PANELS = (
    ("passes_to_signal", "weighted passes until\nnoise equals signal", "cheaper ←"),
    ("cosine", "cosine with the true gradient\nof its own sampler", "→ truer"),
    ("cosine_ode", "cosine with the true gradient\nof the plain ODE", "→ truer"),
)


def plot(rows: Rows, path: Path) -> None:
    """A panel for the noise and one for each direction; a line for each way to draw, a marker for each credit."""
    from flowgrove.report.figures import pyplot, save_figure

    rollouts, credits = (list(dict.fromkeys(row[key] for row in rows)) for key in ("rollouts", "credit"))
    lowest = min(row[key] - 1.96 * row[f"{key}_error"] for row in rows for key in ("cosine", "cosine_ode"))
    figure, panels = pyplot.subplots(1, 3, figsize=(10.5, 5.2), layout="constrained", sharey=True)
    for axes, (key, label, better) in zip(panels, _PANELS, strict=True):
        for row in rows:
            number = credits.index(row["credit"])
            height = rollouts.index(row["rollouts"]) + 0.15 * (number - (len(credits) - 1) / 2)
            axes.errorbar(
                row[key], height, xerr=1.96 * row[f"{key}_error"], color=_COLOURS[number], marker=_MARKERS[number],
                ms=6, lw=0, elinewidth=1, label=row["credit"] if row["rollouts"] == "BranchGRPO" else None,
            )  # fmt: skip
        for between in range(1, len(rollouts)):
            axes.axhline(between - 0.5, color="#e6e6e6", lw=0.8)
        axes.set_xlabel(label)
        axes.set_title(better, fontsize=9, color=_MUTED, loc="left" if "←" in better else "right")
        axes.grid(axis="x", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if key == "passes_to_signal":
            axes.set_xscale("log")
            ticks = [tick for tick in (1000, 2000, 5000, 10_000, 20_000, 50_000) if _within(tick, rows)]
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.set_xticks([], minor=True)
        else:
            axes.axvline(1, color=_MUTED, lw=0.8)
            axes.set_xlim(lowest - 0.03, 1.05)
    panels[0].set_yticks(range(len(rollouts)), rollouts)
    panels[0].set_ylim(len(rollouts) - 0.5, -0.5)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    save_figure(figure, path)


def _within(tick: int, rows: Rows) -> bool:
    values = [row["passes_to_signal"] for row in rows]
    return 0.8 * min(values) <= tick <= 1.25 * max(values)


@numbers("docs/algorithms.md", CSV)
def known_gradient(rows: Rows) -> Iterator[tuple[str, ...]]:
    def of(rollouts: str, credit: str = "as published") -> Row:
        return only(rows, rollouts=rollouts, credit=credit)

    best, next_best = of("BranchGRPO-Mix", "std: none"), of("MixGRPO", "std: none")
    straight = [row for row in rows if row["credit"] in ("std: none", "std: global")]
    others = [row for row in straight if row["rollouts"] not in ("BranchGRPO-Mix", "MixGRPO")]
    if not best["passes_to_signal"] < next_best["passes_to_signal"] < min(row["passes_to_signal"] for row in others):
        raise ValueError("docs/algorithms.md says that BranchGRPO-Mix has the least noise for its cost, MixGRPO next")
    turned = [row["cosine"] for row in rows if row["credit"] == "as published" and row["rollouts"] != "Flow-GRPO"]
    yield "have a cosine of {} to {} with the true gradient", _short(min(turned)), _short(max(turned))
    yield "all are at {} or above", f"{min(row['cosine'] for row in straight):.3f}"
    yield (
        "noise equals signal after {} weighted passes with `std: none`, after {} in MixGRPO",
        *(f"{row['passes_to_signal']:,}" for row in (best, next_best)),
    )
    siblings = of("BranchGRPO-Mix", "siblings, std: none, by leaves")
    yield "In BranchGRPO-Mix it takes {} passes instead", f"{siblings['passes_to_signal']:,}"
    early = (of(name, "std: none") for name in _EARLY)
    yield "takes {} passes with `flow_sde` and {} with `dance_sde`", *(f"{row['passes_to_signal']:,}" for row in early)


def _short(value: float) -> str:
    return f"{value:.2f}"
