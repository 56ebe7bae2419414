"""The op benchmark as a picture: how many times as fast as the published code in eager PyTorch each contender is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flowgrove.bench.inputs import find_shape
from flowgrove.report.figures import pyplot, save_figure

_COLOURS = {
    "eager": "#888888",
    "compiled": "#d9a441",
    "reference": "#b9b9b9",
    "cpu": "#1f4e8c",
    "triton": "#5b9a55",
    "cuda": "#1f4e8c",
}
_MUTED = "#666666"
Row = dict[str, Any]


def plot_ops(rows: list[Row], path: Path) -> None:
    """One panel per case and dtype, one group of bars per shape, on a logarithmic axis. The rows have to tell speeds
    against eager.

    On a GPU inside CUDA graphs, where that was measured: the kernels alone, without the host's time of launching them.
    """
    replayed = any(row.get("graph_speedup_vs_eager") for row in rows)
    speed = "graph_speedup_vs_eager" if replayed else "speedup_vs_eager"
    cases, dtypes = _distinct((row["op"], row["case"]) for row in rows), _distinct(row["dtype"] for row in rows)
    shapes, names = _distinct(row["shape"] for row in rows), _contenders(rows)
    width = max(0.25 * len(shapes) * (len(names) + 1), 5)
    figure, grid = pyplot.subplots(
        len(cases),
        len(dtypes),
        figsize=(width * len(dtypes) + 1, 2.3 * len(cases) + 1.5),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    for line, (op, case) in zip(grid, cases, strict=True):
        for axes, dtype in zip(line, dtypes, strict=True):
            picked = [
                row for row in rows if (row["op"], row["case"], row["dtype"]) == (op, case, dtype) and row.get(speed)
            ]
            _panel(axes, picked, shapes, speed)
            axes.set_title(f"{op}, {case}, {dtype}", fontsize=9, loc="left")
        line[0].set_ylabel("× as fast as eager", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, **_style(name)) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.suptitle(_title(rows, replayed), fontsize=10)
    save_figure(figure, path, dpi=120)


def _panel(axes: Axes, rows: list[Row], shapes: list[str], key: str) -> None:
    """Bars go up from 1 where a contender is faster and down where it is slower; the number says how fast.
    A shape that was not measured has none.
    """
    names = _contenders(rows)
    axes.set_xlim(-1, len(shapes) * (len(names) + 1) - 1)
    for row in rows:
        speed = row[key]
        if row["contender"] == "eager":
            continue
        place = shapes.index(row["shape"]) * (len(names) + 1) + names.index(row["contender"])
        axes.bar(place, speed - 1, bottom=1, width=0.9, **_style(row["contender"]))
        axes.annotate(
            _number(speed), (place, speed), (0, 2 if speed >= 1 else -2), textcoords="offset points",
            ha="center", va="bottom" if speed >= 1 else "top", fontsize=7,
        )  # fmt: skip
    axes.axhline(1, color=_MUTED, linewidth=0.8)
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_tick_params(labelleft=True)
    axes.tick_params(labelsize=8)
    middle = (len(names) - 1) / 2
    axes.set_xticks(
        [group * (len(names) + 1) + middle for group in range(len(shapes))],
        [_label(name) for name in shapes],
        fontsize=8,
    )
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _style(name: str) -> dict[str, Any]:
    """A backend keeps its colour in all its ways of being called."""
    backend, _, way = name.partition(" ")
    return {"color": _COLOURS[backend], "alpha": 0.55 if way else 1.0}


def _label(name: str) -> str:
    shape = find_shape(name)
    size = f"{shape.rows} × {shape.elements:,}"
    return size if shape.title.replace(" ", "") == size.replace(" ", "").replace(",", "") else f"{shape.title}\n{size}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 2 else f"{value:.2f}".lstrip("0")


def _title(rows: list[Row], replayed: bool) -> str:
    row, rounds = rows[0], sorted({row["rounds"] for row in rows})
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}, " if row["launches_are"] == "op calls" else ""
    triton = f", triton {row['triton']}" if row["triton"] else ""
    how = "inside a CUDA graph, " if replayed else ""
    return (
        f"{row['device']}, {threads}torch {row['torch']}{triton}, {row['compiler']}\n"
        f"{how}median of {' or '.join(map(str, rounds))} interleaved rounds; eager (= 1): "
        "the published GRPO loops' PyTorch"
    )


def _contenders(rows: list[Row]) -> list[str]:
    """All but eager, the ways of calling a backend side by side."""
    names = _distinct(row["contender"] for row in rows if row["contender"] != "eager")
    order = _distinct(name.partition(" ")[0] for name in names)
    return sorted(names, key=lambda name: order.index(name.partition(" ")[0]))


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
