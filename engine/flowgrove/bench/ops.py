"""The op benchmark: the published loops' PyTorch, the same compiled, and every backend, in one interleaved run.

Everything of one case, shape and dtype is built, checked against the formulas in float64, warmed up, and timed in
rounds together with a copy of as many bytes as the case has to move. A contender that is wrong, or does not fit into
memory, gets no row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowgrove import machine
from flowgrove.bench.cases import CASES, Case, Contender, contenders
from flowgrove.bench.counting import footprint
from flowgrove.bench.inputs import DTYPES, SHAPES, SMALL, Inputs, Shape, find_shape, make_inputs
from flowgrove.bench.table import read_columns, write_columns
from flowgrove.bench.timing import (
    Graph,
    Spread,
    calls_per_graph,
    copier,
    interleave,
    interleave_graphs,
    make_clock,
    record,
)
from flowgrove.device import is_out_of_memory, release_memory
from flowgrove.errors import UserError
from flowgrove_kernels import available_backends, use_backend
from flowgrove_kernels.backends import takes

COLUMNS = (
    "op", "case", "shape", "rows", "elements", "dtype", "contender", "median_us", "q10_us", "q90_us", "rounds", "bytes",
    "gb_per_s", "copy_gb_per_s", "percent_of_copy", "speedup_vs_eager", "speedup_vs_compiled", "graph_us",
    "graph_gb_per_s", "graph_copy_gb_per_s", "graph_percent_of_copy", "graph_speedup_vs_eager",
    "graph_speedup_vs_compiled", "launches", "launches_are", "peak_bytes", "output_bytes", "peak_extra_bytes", "device",
    "threads", "torch", "triton", "compiler", "date",
)  # fmt: skip
_BYTES_PER_ELEMENT = 80  # at the peak: inputs 20, the buffers of the copy 16, and the hungriest contender 32

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured; see `settings_of`."""

    device: torch.device
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    contenders: tuple[str, ...]
    cases: tuple[Case, ...]
    rounds: int
    keep: bool = False  # rows of the CSV that is there, of what is not measured now


@dataclass
class Result:
    """Rows as `COLUMNS` names them, and a line for each contender that was wrong."""

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class _Refusal(NamedTuple):
    """Why a contender gets no row."""

    reason: str
    wrong: bool = False


def settings_of(
    *, shapes: str | None = None, dtypes: str | None = None, contenders: str | None = None, only: str | None = None,
    rounds: int = 50, device: str = "auto", keep: bool = False,
) -> Settings:  # fmt: skip
    """Settings from comma-separated names; None is all, on a CPU without the two largest shapes.
    Raises UserError for a name that there is not.
    """
    place = machine.pick_device(device)
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: write an integer >= 1")
    here = available_contenders(place)
    wanted = _split(shapes) or (SMALL if place.type == "cpu" else tuple(SHAPES))
    picked_ops = _names("--only", only, tuple(dict.fromkeys(case.op for case in CASES)))
    settings = Settings(
        device=place,
        shapes=tuple(find_shape(name) for name in wanted),
        dtypes=_names("--dtypes", dtypes, tuple(DTYPES)),
        contenders=_names("--contenders", contenders, here),
        cases=tuple(case for case in CASES if case.op in picked_ops),
        rounds=rounds,
        keep=keep,
    )
    if shapes is not None:
        _require_memory(settings)
    return settings


def available_contenders(device: torch.device) -> tuple[str, ...]:
    """eager, compiled, and the backends that compute on that device; interpreted Triton is no measurement."""
    ours = (
        name
        for name in available_backends()
        if takes(name, device.type) and not (name == "triton" and device.type == "cpu")
    )
    return "eager", "compiled", *ours


def bench_ops(settings: Settings, say: Say, out: Path | None = None) -> Result:
    """Measures everything; `say` gets lines on how it goes.
    With `out`, a CSV there grows with each group, and a plot against eager follows.
    """
    result, where = Result(), machine.describe(settings.device)
    stem, before = machine.file_stem("ops", settings.device), list[Row]()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        before = read_columns(out / f"{stem}.csv") if settings.keep and (out / f"{stem}.csv").exists() else []
    for shape in settings.shapes:
        release_memory(settings.device)
        if (problem := _too_large(shape, settings.device)) is not None:
            say(f"{shape.name} is left out: {problem}")
            continue
        for dtype in settings.dtypes:
            inputs = make_inputs(shape, dtype, settings.device)
            for case in settings.cases:
                rows = _measure(case, inputs, settings, result.wrong, say)
                result.rows += [{**row, **where} for row in rows]
                if out is not None and rows:
                    write_csv(_together(before, result.rows), out / f"{stem}.csv")
            del inputs
    if out is not None and result.rows:
        say(f"wrote {out / stem}.csv")
    if out is not None and any(row["contender"] != "eager" and row["speedup_vs_eager"] for row in result.rows):
        from flowgrove.bench.plot import plot_ops

        plot_ops(_together(before, result.rows), out / f"{stem}.png")
        say(f"wrote {out / stem}.png")
    return result


def _together(before: list[Row], rows: list[Row]) -> list[Row]:
    """The rows of an earlier run and those of this one, which replace what they measure again;
    in the order of SHAPES.
    """

    def what(row: Row) -> tuple[Any, ...]:
        return row["op"], row["case"], row["shape"], row["dtype"]

    new = {what(row) for row in rows}
    order = list(SHAPES)
    place = {
        name: order.index(name) if name in order else len(order) for name in (row["shape"] for row in (*before, *rows))
    }
    return sorted([row for row in before if what(row) not in new] + rows, key=lambda row: place[row["shape"]])


def write_csv(rows: list[Row], path: Path) -> None:
    """One line per contender."""
    write_columns(rows, COLUMNS, path)


def _measure(case: Case, inputs: Inputs, settings: Settings, wrong: list[str], say: Say) -> list[Row]:
    """Rows of one case, shape and dtype, without the columns of the machine."""
    if "compiled" in settings.contenders:
        torch._dynamo.reset()
    title = f"{case.op}, {case.name}, {inputs.shape.name}, {inputs.dtype}"
    entrants = []
    for contender in contenders(case, inputs, settings.contenders):
        refusal = _refusal(case, inputs, contender)
        if refusal is None:
            entrants.append(contender)
            continue
        line = f"{contender.name} is left out of {title}: {refusal.reason}"
        say(line)
        if refusal.wrong:
            wrong.append(line)
    if not entrants:
        return []
    traffic = case.traffic(inputs)
    times = interleave([*entrants, copier(traffic, inputs.device)], make_clock(inputs.device), settings.rounds)
    replays = _replays(case, inputs, settings, {contender.name for contender in entrants}, say)
    rows = []
    for contender in entrants:
        used, spent = footprint(contender, inputs.device), times[contender.name]
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "shape": inputs.shape.name,
                "rows": inputs.shape.rows,
                "elements": inputs.shape.elements,
                "dtype": inputs.dtype,
                "contender": contender.name,
                **{f"{name}_us": _figure(value) for name, value in spent._asdict().items()},
                "rounds": settings.rounds,
                "bytes": traffic,
                **_compared(times, contender.name, traffic),
                "graph_us": _figure(replays[contender.name].median) if contender.name in replays else None,
                **{f"graph_{name}": value for name, value in _compared(replays, contender.name, traffic).items()},
                "launches": used.launches,
                "launches_are": "kernels" if inputs.device.type == "cuda" else "op calls",
                "peak_bytes": used.peak_bytes,
                "output_bytes": used.output_bytes,
                "peak_extra_bytes": used.peak_bytes - used.output_bytes,
            }
        )
    say(f"{title}: " + ", ".join(f"{row['contender']} {row['median_us']:,.0f} µs" for row in rows))
    return rows


def _compared(times: dict[str, Spread], name: str, traffic: int) -> dict[str, float | None]:
    """Bandwidth and speed of a contender beside the copy, eager and compiled;
    nothing where it or the other was not timed.
    """

    def figure(value: Callable[[], float]) -> float | None:
        try:
            return _figure(value())
        except KeyError:
            return None

    return {
        "gb_per_s": figure(lambda: traffic / times[name].median / 1e3),
        "copy_gb_per_s": figure(lambda: traffic / times["copy"].median / 1e3),
        "percent_of_copy": figure(lambda: 100 * times["copy"].median / times[name].median),
        "speedup_vs_eager": figure(lambda: times["eager"].median / times[name].median),
        "speedup_vs_compiled": figure(lambda: times["compiled"].median / times[name].median),
    }


def _replays(case: Case, inputs: Inputs, settings: Settings, names: set[str], say: Say) -> dict[str, Spread]:
    """Times inside CUDA graphs, of the entrants that can be recorded and of the copy; nothing on a CPU."""
    if inputs.device.type != "cuda":
        return {}
    traffic = case.traffic(inputs)
    sets = [inputs, *(inputs.copy() for _ in range(calls_per_graph(traffic, inputs.device) - 1))]
    calls = [contenders(case, some, settings.contenders) for some in sets]
    graphs: list[Graph] = []
    for members in [[copier(traffic, inputs.device) for _ in sets], *map(list, zip(*calls, strict=True))]:
        if members[0].name not in names and members[0].name != "copy":
            continue
        try:
            graphs.append(record(members, inputs.device))
        except RuntimeError as error:
            say(
                f"{members[0].name} is left out of the graphs of {case.op}, {case.name}: "
                f"{str(error).strip().splitlines()[0]}"
            )
    return interleave_graphs(graphs, inputs.device, settings.rounds)


def _figure(value: float) -> float:
    """Four digits: timings hold no more."""
    return float(f"{value:.4g}")


def _refusal(case: Case, inputs: Inputs, contender: Contender) -> _Refusal | None:
    """Why a contender may not take part. Its first call, which compiles what is to be compiled,
    is the one that is checked.
    """
    try:
        with use_backend(contender.backend or "auto"):
            outputs = contender.run()
        deviations = case.check(inputs, outputs, contender)
    except torch._dynamo.exc.TorchDynamoException as error:
        return _Refusal(f"it cannot be compiled here ({str(error).strip().splitlines()[0]})")
    except RuntimeError as error:
        if is_out_of_memory(error):
            return _Refusal("the GPU's memory is too small for it")
        raise
    told = [
        f"{found.output} is off by {found.error:.3g}, tolerance {found.tolerance:.3g}"
        for found in deviations
        if found.wrong
    ]
    return _Refusal(f"it is wrong: {'; '.join(told)}", wrong=True) if told else None


def _require_memory(settings: Settings) -> None:
    for shape in settings.shapes:
        if (problem := _too_large(shape, settings.device)) is not None:
            raise UserError(
                f"--shapes: {shape.name}: {problem}: leave it out, or measure it where there is more memory"
            )


def _too_large(shape: Shape, device: torch.device) -> str | None:
    free, needed = machine.free_memory(device), shape.rows * shape.elements * _BYTES_PER_ELEMENT
    if free is None or needed <= free:
        return None
    return f"it needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def _split(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _names(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Those that `text` names, in the order of `known`."""
    picked = known if text is None else _split(text)
    if unknown := [name for name in picked if name not in known]:
        raise UserError(f"{option}: there is no {unknown[0]!r} here: write names out of {', '.join(known)}")
    if not picked:
        raise UserError(f"{option} is empty: write names out of {', '.join(known)}")
    return tuple(name for name in known if name in picked)
