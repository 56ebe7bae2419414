"""The fused ops and the phases of the transformer against what the device can do: a copy and a matrix product, both
measured here. Writes profiling/figures/roofline_DEVICE.csv and .png.

    python profiling/roofline.py                      # ops measured now, with few rounds
    python profiling/roofline.py --ops committed      # ops from the committed table of this device

A phase's bytes are what it has to move at least: the transformer's weights once a pass, states and velocities, and in
the backward the gradients. So a phase may lie further left than it is drawn, never further right. Run it on an idle
machine.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from flowgrove.bench.models import NAMES
from flowgrove.bench.ops import bench_ops, settings_of
from flowgrove.bench.recipes import RECIPES
from flowgrove.bench.table import read_columns, write_results
from flowgrove.machine import describe, file_stem, pick_device
from flowgrove.plan.unloaded import UnloadedModel
from flowgrove.profiler.command import Profile, profile_recipe
from flowgrove.report.figures import pyplot, save_figure
from flowgrove.setup import Setup
from profile_model import bench_setup

FIGURES = Path(__file__).parent / "figures"
COLUMNS = (
    "name", "kind", "detail", "dtype", "gflop", "bytes", "seconds", "intensity", "tflop_per_s", "gb_per_s",
    "percent_of_roof", "bound_by", "copy_gb_per_s", "matrix_tflop_per_s", "device", "threads", "torch", "date",
)  # fmt: skip
# Per element: a·x + b·v is 3, + s·z is 2, the squared residual and its sum 3, its gradient 1; noise that a kernel draws
# is not counted.
_STEP, _LOGP, _GRADIENT = 8, 6, 1
_FLOPS = {
    ("flow_step", "noise drawn"): _STEP,
    ("flow_step", "noise given"): _STEP,
    ("flow_logprob", "forward"): _LOGP,
    ("flow_logprob", "forward+backward"): _LOGP + _GRADIENT,
    ("grpo_loss", "forward+backward"): _LOGP + _GRADIENT,
}
_BACKENDS = ("cuda", "triton", "cpu")  # whose figure is drawn: the first that was measured
_PHASES = ("rollout/transformer", "update/transformer", "update/backward")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
Row = dict[str, Any]


def main() -> None:
    """Measures, writes and says where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, help="default: flux_slim on a GPU, sd3_mid on a CPU")
    parser.add_argument("--recipe", choices=list(RECIPES), default="branch_mix_flash")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--ops", default="fresh", help="fresh, committed, or a CSV of `flowgrove bench ops`")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV and the picture")
    options = parser.parse_args()
    device = pick_device("auto")
    model = options.model or ("flux_slim" if device.type == "cuda" else "sd3_mid")
    with (
        tempfile.TemporaryDirectory() as folder,
        bench_setup(model, options.recipe, options.prompts, device, {}) as setup,
    ):
        name = f"{options.recipe} on {model}"
        found = profile_recipe(name, setup, Path(folder), options.iterations, 1, print)
        points = phase_points(found, *minimum(setup))
    if found.matrix_rate is None or found.copy_rate is None:
        raise SystemExit("the GPU's memory has no room to measure its rates beside the model: take a smaller --model")
    points += op_points(_ops(options.ops, device))
    rows = [against_roof(row, found.copy_rate, found.matrix_rate) | _where(device, row) for row in points]
    print(write_results(rows, COLUMNS, plot_roofline, options.out / file_stem("roofline", device)))


def _where(device: torch.device, row: Row) -> Row:
    """Where a point was measured; an op of a table says so itself."""
    here = describe(device)
    return {key: row.get(key, here[key]) for key in ("device", "threads", "torch", "date")}


def _ops(source: str, device: torch.device) -> list[Row]:
    """Rows of the op benchmark."""
    committed = FIGURES / f"{file_stem('ops', device)}.csv"
    if source != "fresh":
        return read_columns(committed if source == "committed" else Path(source))
    names = ",".join(name for name in (("triton", "cuda") if device.type == "cuda" else ("cpu",)))
    return bench_ops(settings_of(contenders=names, dtypes="bf16", rounds=20), print).rows


def minimum(setup: Setup) -> tuple[int, int, int]:
    """Bytes of the transformer's weights in the dtype of passes, of those that train, and of a state and its velocity
    together.
    """
    model = UnloadedModel(setup.recipe)
    weights = list(model.transformer.parameters())
    size = model.compute.itemsize
    whole, trained = (
        size * sum(each.numel() for each in weights if each.requires_grad or not only) for only in (False, True)
    )
    elements = torch.Size(model.geometry.latent_shape).numel()
    return whole, trained, elements * (model.master.itemsize + size)


def phase_points(found: Profile, weights: int, trained: int, state: int) -> list[Row]:
    """The transformer's phases of a profile. A backward reads the weights once more and writes the gradients."""
    points = []
    for row in found.rows:
        if row["phase"] not in _PHASES or not row["tflop"]:
            continue
        extra = trained if row["phase"].endswith("backward") else 0
        moved = row["passes"] * (weights + extra) + row["rows"] * state
        points.append({
            "name": row["phase"], "kind": "phase", "detail": found.recipe, "dtype": found.dtype,
            "gflop": 1e3 * row["tflop"], "bytes": moved, "seconds": row["seconds"],
        })  # fmt: skip
    return points


def op_points(rows: list[Row]) -> list[Row]:
    """Of every op and case its largest shape by our fastest kind of backend; on a GPU inside a CUDA graph, where that
    was measured.
    """
    points = []
    for (op, case), flops in _FLOPS.items():
        some = [row for row in rows if (row["op"], row["case"]) == (op, case) and row["dtype"] == "bf16"]
        ours = next((found for name in _BACKENDS if (found := [r for r in some if r["contender"] == name])), None)
        if not ours:
            continue
        row = max(ours, key=lambda row: row["bytes"])
        graphed = row.get("graph_us") is not None
        spent = row["graph_us"] if graphed else row["median_us"]
        points.append({
            "name": f"{op}, {case}", "kind": "op", "detail": f"{row['rows']}x{row['elements']} {row['contender']}",
            "dtype": row["dtype"], "gflop": 1e-9 * flops * row["rows"] * row["elements"], "bytes": row["bytes"],
            "seconds": 1e-6 * spent,
            **{key: row[key] for key in ("device", "threads", "torch", "date")},
        })  # fmt: skip
    return points


def against_roof(row: Row, copy: float, matrix: float) -> Row:
    """A point with its rates and its share of what the device could do at that intensity, by a copy of `copy` bytes per
    second and a product of `matrix` FLOPs per second.
    """
    flops = 1e9 * row["gflop"]
    intensity = flops / row["bytes"]
    roof = min(matrix, intensity * copy)
    return {
        **row, "intensity": intensity, "tflop_per_s": flops / row["seconds"] / 1e12,
        "gb_per_s": row["bytes"] / row["seconds"] / 1e9, "percent_of_roof": 100 * flops / row["seconds"] / roof,
        "bound_by": "copy" if intensity * copy < matrix else "matrix", "copy_gb_per_s": copy / 1e9,
        "matrix_tflop_per_s": matrix / 1e12,
    }  # fmt: skip


def plot_roofline(rows: list[Row], path: Path) -> None:
    """Points under the roof of this device, on two logarithmic axes; the legend says how near each comes to it."""
    copy, matrix = rows[0]["copy_gb_per_s"], rows[0]["matrix_tflop_per_s"]
    ridge = 1e3 * matrix / copy
    left = min(row["intensity"] for row in rows) / 5
    right = max(10 * ridge, *(row["intensity"] * 3 for row in rows))
    figure, axes = pyplot.subplots(figsize=(10, 5.2), layout="constrained")
    axes.plot([left, ridge, right], [left * copy / 1e3, matrix, matrix], color="#444444", linewidth=1.6)
    speed = f"{copy:.3g}" if copy < 1000 else f"{copy:,.0f}"
    axes.annotate(f"copy {speed} GB/s", (ridge / 2, matrix / 2), (-8, 4), textcoords="offset points", fontsize=9,
                  color="#444444", ha="right")  # fmt: skip
    axes.annotate(f"matrix product {_rate(matrix)}", (right, matrix), (0, 5), textcoords="offset points", fontsize=9,
                  color="#444444", ha="right")  # fmt: skip
    markers = {"op": "os^Dv", "phase": "P*Xhd"}
    seen = {"op": 0, "phase": 0}
    for number, row in enumerate(rows):
        marker = markers[row["kind"]][seen[row["kind"]] % 5]
        seen[row["kind"]] += 1
        label = f"{row['name']} ({row['dtype']}): {row['percent_of_roof']:.0f} % of the {row['bound_by']} rate"
        size, colour = 80 if row["kind"] == "op" else 130, _COLOURS[number % len(_COLOURS)]
        axes.scatter(row["intensity"], row["tflop_per_s"], s=size, marker=marker, color=colour, edgecolor="white",
                     linewidth=0.6, zorder=3, label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOPs per byte that has to be moved", fontsize=9)
    axes.set_ylabel("TFLOP/s", fontsize=9)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(_title(rows), fontsize=9, parse_math=False)
    save_figure(figure, path, dpi=120)


def _rate(tflops: float) -> str:
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.3g} GFLOP/s"


def _title(rows: list[Row]) -> str:
    phases = next((row for row in rows if row["kind"] == "phase"), rows[0])
    threads = "" if "NVIDIA" in str(phases["device"]) else f", {phases['threads']} threads"
    ops = sorted({f"{row['torch']}, {row['date']}" for row in rows if row["kind"] == "op"})
    measured = f"phases of {phases['detail']} with torch {phases['torch']}, {phases['date']}"
    return f"{phases['device']}{threads}\n{measured}" + (f"; ops with torch {'; '.join(ops)}" if ops else "")


if __name__ == "__main__":
    main()
