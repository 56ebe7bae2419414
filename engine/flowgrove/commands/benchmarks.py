"""What the parts cost on this machine: `flowgrove bench`."""

from pathlib import Path
from typing import Annotated

import typer

from flowgrove.commands.shell import say

RowsAsJson = Annotated[bool, typer.Option("--json", help="the rows as JSON on stdout")]
Named = Annotated[
    str, typer.Option(help="tiny; with random weights sd3_mid or qwen_mid, or on a GPU flux_slim, flux or qwen_slim")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Drawn = Annotated[Path | None, typer.Option(help="folder for a CSV and a plot named after model and device")]


def ops(
    as_json: RowsAsJson = False,
    out: Annotated[Path | None, typer.Option(help="folder for a CSV and a plot named after the device")] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="names, or ROWSxELEMENTS, with commas between; on a CPU the two largest only if named"),
    ] = None,
    dtypes: Annotated[str | None, typer.Option(help="of the velocity: bf16,fp32")] = None,
    contenders: Annotated[
        str | None, typer.Option(help="eager, compiled and backends, with commas between; default: all there are")
    ] = None,
    only: Annotated[str | None, typer.Option(help="ops, with commas between; default: all")] = None,
    rounds: Annotated[int, typer.Option(help="timed calls of each contender")] = 50,
    keep: Annotated[
        bool, typer.Option("--keep", help="leave rows of the CSV in --out that are not measured again")
    ] = False,
    device: Device = "auto",
) -> None:
    """Time step, log-probability and loss: the published loops' PyTorch, the same compiled, and every backend. Exit
    code 1 if one of them is wrong.
    """
    from flowgrove.bench.ops import bench_ops, settings_of
    from flowgrove.bench.table import draw_rows, print_rows

    settings = settings_of(
        shapes=shapes, dtypes=dtypes, contenders=contenders, only=only, rounds=rounds, device=device, keep=keep
    )
    result = bench_ops(settings, say, out)
    print_rows(result.rows, as_json, draw_rows)
    if result.wrong:
        raise typer.Exit(1)


def engine(
    as_json: RowsAsJson = False,
    out: Drawn = None,
    model: Named = "tiny",
    recipes: Annotated[
        str, typer.Option(help="algorithms, with commas between; with levers of their own as in dance:published,mix")
    ] = "dance,flow,flow_fast,mix,mix_flash,branch,branch_mix,branch_mix_flash,grove",
    levers: Annotated[str, typer.Option(help="all; ends: the published loop and the default; published; ours")] = "all",
    prompts: Annotated[int, typer.Option(min=1, help="prompts of an iteration, 16 pictures each")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="timed iterations of each lever")] = 3,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="also with engine.compile, which takes minutes to warm up")
    ] = False,
    precision: Annotated[str | None, typer.Option(help="also with rollout.precision: fp8 or int8")] = None,
    attention: Annotated[
        str | None, typer.Option(help="also with rollout.attention: a kernel, alone and with --precision")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="also with model.gradient_checkpointing: full and selective")
    ] = False,
    device: Device = "auto",
) -> None:
    """Time iterations of the published loop, at its own batch and sharing, and of Flowgrove with each lever added."""
    from flowgrove.bench.engine import bench_engine, settings_of
    from flowgrove.bench.table import draw_engine, print_rows

    settings = settings_of(
        model, recipes, levers, prompts, rounds, compiled, device, precision, checkpointing, attention
    )
    print_rows(bench_engine(settings, say, out), as_json, draw_engine)


def scaling(
    as_json: RowsAsJson = False,
    out: Drawn = None,
    model: Named = "tiny",
    leaves: Annotated[
        str, typer.Option(help="pictures per prompt, with commas between; for 2 prompts")
    ] = "1,2,4,8,16,32,64,128,256",
    prompts: Annotated[
        str, typer.Option(help="prompts of an iteration, with commas between; of 16 pictures each")
    ] = "1,2,4,8,16,32,64",
    rounds: Annotated[int, typer.Option(min=1, help="timed iterations of each")] = 5,
    device: Device = "auto",
) -> None:
    """Time iterations over leaves and over prompts:
    seconds, and what the engine spends per node outside the transformer.
    """
    from flowgrove.bench.scaling import bench_scaling, settings_of
    from flowgrove.bench.table import draw_scaling, print_rows

    rows = bench_scaling(settings_of(model, leaves, prompts, rounds, device), say, out)
    print_rows(rows, as_json, draw_scaling)


def rows(
    as_json: RowsAsJson = False,
    out: Annotated[Path | None, typer.Option(help="folder for a CSV named after model and device")] = None,
    model: Named = "tiny",
    rows_: Annotated[str, typer.Option("--rows", help="rows of a pass, with commas between")] = "1,2,4,8",
    modes: Annotated[
        str | None,
        typer.Option(
            help="eager, recorded (CUDA graphs), split (without masks), compiled, fp8, int8 (rollout.precision), "
            "fp8+recorded, fp8+compiled, …, attention (every kernel of it that runs here) or one by name; default: "
            "eager, and recorded on a GPU"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed passes of each")] = 5,
    device: Device = "auto",
) -> None:
    """Time passes of a transformer: milliseconds of a row over rows in a pass;
    of a slim FLUX or Qwen-Image also what the whole one would take.
    """
    from flowgrove.bench.row_times import bench_rows, settings_of
    from flowgrove.bench.table import draw_row_times, print_rows

    found = bench_rows(settings_of(model, rows_, modes, repeats, device), say, out)
    print_rows(found, as_json, draw_row_times)
