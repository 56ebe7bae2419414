"""The `flowgrove` command."""

import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial, wraps
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    raise SystemExit(f"error: the flowgrove command needs {error.name}: pip install 'flowgrove[train]'") from None

from flowgrove.errors import UserError, one_line
from flowgrove.paths import local
from flowgrove.process import is_first, rank_here, started

# its notes on optional packages and its loading bars are not about the user's run
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# what importing torchao writes about the C++ kernels that it lacks
for _talkative in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_talkative).setLevel(logging.ERROR)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Online reinforcement learning of flow-matching models.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure what the parts cost on this machine.")
app.add_typer(bench_app, name="bench")
_ON_RANKS = ("train", "sample", "eval")  # commands that several processes of torchrun run together
_console = Console(stderr=True, highlight=False, soft_wrap=True)

AllowPython = Annotated[
    bool, typer.Option("--allow-python", help="let a reward named python run the file that the recipe names")
]
RecipePath = Annotated[Path, typer.Argument(help="a recipe (YAML)", show_default=False)]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="all of them, as the page of the documentation")]
Which = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="N|best|PATH", help="after N iterations, best, or a folder; default: newest"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a recipe key; may be given several times")
]


def _command(function: Callable[..., None], group: typer.Typer = app) -> Callable[..., None]:
    """Registers a command whose user errors are one line and exit code 2, and whose interruption is exit code 130.

    Anything else is one line, a file with the trace, and exit code 1.
    """

    name = function.__name__.rstrip("_")

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if name not in _ON_RANKS and started() > 1:
                raise UserError(f"flowgrove {name} runs in one process, not in {started()}: leave torchrun out")
            function(*args, **_at_home(kwargs))
        except UserError as error:
            _fail(str(error), told=_told_by_the_first_rank(error))
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            hint = "; free some space and give the same command again" if error.errno == errno.ENOSPC else ""
            _fail(f"{place}{error.strerror or error}{hint}")
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, SystemExit) as error:
            from flowgrove.device import is_out_of_memory
            from flowgrove.run.last_resort import tell

            if getattr(error, "elsewhere", False):
                _leave(1)
            if not is_out_of_memory(error):
                _fail(tell(error), 1)
            _fail(
                "the GPU's memory is full: lower engine.token_budget or set model.gradient_checkpointing: "
                "full (a run goes on with either), "
                "or begin anew with fewer data.prompts_per_iteration"
            )
        except KeyboardInterrupt as interruption:
            with suppress(OSError):  # the terminal may be gone
                _say(f"interrupted{'' if not interruption.args else f' ({interruption})'}")
            _leave(getattr(interruption, "exit_code", 130))

    return group.command(name, help=_unwrapped(function.__doc__ or ""))(run)


def _unwrapped(docstring: str) -> str:
    """Its paragraphs as a line each: the terminal wraps them by itself."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(docstring).split("\n\n"))


def _at_home(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command; in paths `~` is the home folder, as in recipes. Raises UserError."""
    texts = ("resume", "checkpoint")  # paths, or words

    def at_home(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [at_home(name, each) for each in value]
        is_place = isinstance(value, Path) or (name in texts and isinstance(value, str))
        return type(value)(local(value, name)) if is_place else value

    return {name: at_home(name, value) for name, value in given.items()}


def _fail(text: str, code: int = 2, told: bool = False) -> NoReturn:
    if not told:
        _console.print(f"[bold red]error:[/] {escape(one_line(text))}")
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the command. A rank of several leaves at once: groups of ranks some of which have gone do not come apart."""
    torch = sys.modules.get("torch")
    if started() > 1 and torch is not None and torch.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    raise typer.Exit(code) from None


def _told_by_the_first_rank(error: UserError) -> bool:
    """Whether another rank has the same error and tells it: all of a machine have until they are joined."""
    if is_first():
        return False
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_initialized()
    return error.everywhere or (not joined and rank_here() != 0)


def _allow(python: bool) -> None:
    if python:
        os.environ["FLOWGROVE_ALLOW_PYTHON"] = "1"


def _say(text: str) -> None:
    """Of several ranks of a run the first one speaks."""
    if is_first():
        _console.print(text, markup=False)


@_command
def train(
    recipe: RecipePath,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default: the recipe's run.out")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="go on with changed rewards, learning rate and the like; the model stays")
    ] = False,
    allow_python: AllowPython = False,
) -> None:
    """Train a model as a recipe says."""
    _allow(allow_python)
    from flowgrove.recipe.loading import load_recipe

    settings = load_recipe(recipe, tuple(set_ or ()))  # before the slow imports: a mistake is answered at once
    from flowgrove.device import pick_device
    from flowgrove.joining import joined
    from flowgrove.report.page import write_report
    from flowgrove.run.progress import TrainingDisplay
    from flowgrove.run.resume import finished
    from flowgrove.run.stopping import Stopped, Stopping
    from flowgrove.setup import Setup
    from flowgrove.trainer import Trainer

    setup, folder = Setup(settings), out or Path(settings.run.out)
    done = f"{folder} is finished: {settings.run.iterations} iterations; see {folder / 'report.html'}"
    if resume == "auto" and started() == 1 and finished(setup, folder):
        _say(done)
        return
    with joined(settings.engine, pick_device(settings)) as ranks, Stopping() as stopping:
        # other machines may not see the folder: the first rank looks for all
        if ranks.size > 1 and resume == "auto" and ranks.most(int(ranks.first and finished(setup, folder))):
            _say(done)
            return
        try:
            trainer = Trainer(setup, folder, resume, stopping, _say, ranks, force)
            with TrainingDisplay(_console, settings, trainer.completed) if ranks.first else nullcontext() as display:
                trainer.run(display.update if display is not None else lambda line: None)
        except Stopped:
            with suppress(OSError):
                _say(
                    f"saved {stopping.saved}: the same command goes on from it"
                    if stopping.saved
                    else "nothing to save yet"
                )
            raise
    if ranks.first:
        _say(f"report: {write_report(settings, trainer.out)}")


@_command
def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    iteration: Annotated[int, typer.Option(min=0, max=999_999, help="which iteration, counted from 0")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="also predict the device's memory (takes half a minute)")
    ] = False,
    time: Annotated[
        bool, typer.Option("--time", help="also predict the seconds of an iteration and of the run (takes a minute)")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="with --time: at published rates of this device (h100, …); default: as measured here"),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="with --device: the share of the published rate; default 0.38"),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="plan for so many processes of torchrun; with --memory also what they send")
    ] = 1,
) -> None:
    """Show steps, tree, counts and cost of an iteration; loads no model."""
    if (device or utilisation) and not time:
        raise UserError(f"{'--device' if device else '--utilisation'} is for predicted seconds: give --time, too")
    if utilisation and not device:
        raise UserError("--utilisation is a share of a published rate: give --device, too, like h100")
    from flowgrove.plan.division import Division
    from flowgrove.recipe.loading import load_recipe
    from flowgrove.report.cost_view import draw_time, time_json
    from flowgrove.report.plan_view import (
        draw_memory,
        draw_plan,
        draw_ranks,
        draw_rounding,
        draw_ways,
        memory_json,
        plan_json,
        rounding_json,
    )  # fmt: skip
    from flowgrove.report.split_view import chosen_splits, draw_splits, split_json
    from flowgrove.run.metrics import read_metrics
    from flowgrove.setup import Setup

    settings = load_recipe(recipe, tuple(set_ or ()))
    setup, division = Setup(settings), Division.of(settings.engine, ranks)
    lines = read_metrics(recipe.parent) if setup.split_search is not None else []
    table, made = setup.table, setup.plan(iteration, chosen_splits(settings, lines))
    device_type = "cpu" if settings.engine.device == "cpu" else "cuda"  # planned here, trained there
    predicted = seconds = rounding = None
    weighed: list[Any] | None = []
    if made.precision is not None:
        from flowgrove.plan.rounding import count_rounding

        rounding = count_rounding(settings)
    if memory or time:
        from flowgrove.tuning.checkpointing import settled_here

        setup, weighed = settled_here(setup, device_type, division)
        settings = setup.recipe
    if memory:
        from flowgrove.plan.communication import predict

        predicted = predict(settings, made, device_type, division)
    if time:
        from flowgrove.cost.run_time import predict_time

        seconds = predict_time(setup, division, device, utilisation)
    if as_json:
        content = plan_json(made, settings, division) | (memory_json(predicted) if predicted else {})
        content |= (time_json(seconds) if seconds else {}) | split_json(settings, lines)
        content |= rounding_json(made, rounding)
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        draw_plan(made, settings, Console(highlight=False), table.source)
        draw_rounding(made, rounding, Console(highlight=False, soft_wrap=True))
        draw_splits(settings, lines, iteration, Console(highlight=False, soft_wrap=True))
        if division.ranks > 1:
            draw_ranks(made, settings, division, Console(highlight=False))
    if predicted is not None:
        draw_memory(predicted, device_type, division, Console(highlight=False, stderr=as_json))
    if predicted is not None or weighed is None:
        draw_ways(weighed, settings, Console(highlight=False, stderr=as_json, soft_wrap=True))
    if seconds is not None:
        draw_time(seconds, Console(highlight=False, stderr=as_json, soft_wrap=True))


@_command
def recipe_(
    key: Annotated[
        str | None, typer.Argument(help="a section or a key, like rollout.window", show_default=False)
    ] = None,
    markdown: AsMarkdown = False,
) -> None:
    """Explain recipe keys: all on a line each, the keys of a section, or one in full."""
    from flowgrove.report.reference import draw_recipe, recipe_page

    if markdown:
        sys.stdout.write(recipe_page())
    else:
        draw_recipe(key, Console(highlight=False))


@_command
def metrics(
    key: Annotated[str | None, typer.Argument(help="like ratio_mean; default: all", show_default=False)] = None,
    markdown: AsMarkdown = False,
) -> None:
    """Explain what a run writes of every iteration: meaning, what is healthy, what to do where it is not."""
    from flowgrove.report.reference import draw_metrics, metrics_page

    if markdown:
        sys.stdout.write(metrics_page())
    else:
        draw_metrics(key, Console(highlight=False))


@_command
def sample(
    source: Annotated[Path, typer.Argument(help="a run folder, or a recipe for its base model", show_default=False)],
    prompts: Annotated[Path, typer.Option(help="prompts, in any format that data.prompts takes")],
    out: Annotated[Path, typer.Option(help="folder for the pictures")],
    compare: Annotated[
        bool, typer.Option("--compare", help="also the base model's, and pages with both side by side")
    ] = False,
    checkpoint: Which = None,
    set_: Overrides = None,
) -> None:
    """Draw with a trained or a base model: NNNN_K.png (or .mp4) for sample K of prompt N, and prompts.jsonl.

    `--set run.eval.tuned_share=0.8` lets the trained model run the first 80 % of the steps and the base model the rest.
    """
    from flowgrove.report.samples import write_samples
    from flowgrove.run.finished_runs import joined_for

    with joined_for(source, tuple(set_ or ())) as ranks:
        count = write_samples(source, tuple(set_ or ()), prompts, out, compare, checkpoint, ranks)
    _say(f"wrote {count} samples to {out}")


@_command
def eval_(
    run: Annotated[Path, typer.Argument(help="a run folder", show_default=False)],
    checkpoint: Which = None,
    set_: Overrides = None,
    allow_python: AllowPython = False,
) -> None:
    """Score a checkpoint on the held-out prompts: mean and 95 % interval of every reward; also written to eval.json."""
    _allow(allow_python)
    from flowgrove.run.finished_runs import evaluate_run, joined_for

    with joined_for(run, tuple(set_ or ())) as ranks:
        result = evaluate_run(run, tuple(set_ or ()), checkpoint, ranks)
    for name, found in result.items() if ranks.first else ():
        typer.echo(f"{name:<16}{found['mean']:.4f} ± {found['confidence']:.4f}")


@_command
def watch(
    runs: Annotated[list[Path], typer.Argument(help="run folders", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="on this machine's own address; 0: any free one")] = 8420,
) -> None:
    """Serve the report of runs while they train, beside each other where they are several; to browsers on this
    machine only.
    """
    from flowgrove.report.watching import watch_runs

    watch_runs(runs, port, _say)


@_command
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="recipes (YAML)", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for runs, tables and picture; the same one goes on")],
    seeds: Annotated[str, typer.Option(help="of every recipe, with commas between")] = "1,2,3",
    lr: Annotated[
        str | None, typer.Option("--lr", help="learning rates, with commas between; default: each recipe's own")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=2, help="of every run; default: each recipe's own")] = None,
    cost: Annotated[
        str | None,
        typer.Option(help="weighted passes that every run trains to; where they are several, rewards are read at each"),
    ] = None,
    seconds: Annotated[str | None, typer.Option(help="the same in seconds of the stages, on a quiet machine")] = None,
    search: Annotated[
        float | None,
        typer.Option(help="try learning rates with the first seed up to this cost alone, and go on with the best"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="runs at a time; default: one a core on a CPU, one on a GPU")
    ] = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    allow_python: AllowPython = False,
) -> None:
    """Train recipes at several learning rates over seeds, and say what each reaches at equal cost and its own best one.

    Weighted passes are rollout forwards + 3 × train passes. Writes summary.csv, curves.csv, rewards.png and the runs.
    """
    _allow(allow_python)
    from flowgrove.compare.runs import comparison_of

    asked = comparison_of(recipes, out, tuple(set_ or ()), seeds, lr, iterations, cost, seconds, search)
    from flowgrove.compare.command import check, written
    from flowgrove.compare.command import compare as run
    from flowgrove.compare.tables import comparison_json, draw_comparison

    result = run(asked, jobs, _say, _console)
    if as_json:
        content = comparison_json(result.curves, result.found, result.failures, result.machine, out)
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        draw_comparison(result.found, Console(highlight=False))
    _say(written(out, result.found))
    check(result.failures, len(asked.runs))


@_command
def export(
    run: Annotated[Path, typer.Argument(help="a run folder", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder to write to")],
    checkpoint: Which = None,
    form: Annotated[str, typer.Option("--format", help="diffusers; or comfyui, for a LoRA")] = "diffusers",
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default: as trained; bf16 where a bf16 run found bf16 files")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write the trained weights as diffusers loads them: a LoRA for `load_lora_weights`, or a whole pipeline for
    `from_pretrained`.

    A LoRA may also be written as ComfyUI loads it. It needs no base model.
    """
    from flowgrove.run.finished_runs import export_run

    _say(export_run(run, out, tuple(set_ or ()), checkpoint, form, dtype))


@partial(_command, group=bench_app)
def ops(
    as_json: Annotated[bool, typer.Option("--json", help="the rows as JSON on stdout")] = False,
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
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Time step, log-probability and loss: the published loops' PyTorch, the same compiled, and every backend. Exit
    code 1 if one of them is wrong.
    """
    from flowgrove.bench.ops import bench_ops, settings_of
    from flowgrove.bench.table import draw_rows, print_rows

    settings = settings_of(
        shapes=shapes, dtypes=dtypes, contenders=contenders, only=only, rounds=rounds, device=device, keep=keep
    )
    result = bench_ops(settings, _say, out)
    print_rows(result.rows, as_json, draw_rows)
    if result.wrong:
        raise typer.Exit(1)


@partial(_command, group=bench_app)
def engine(
    as_json: Annotated[bool, typer.Option("--json", help="the rows as JSON on stdout")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for a CSV and a plot named after model and device")] = None,
    model: Annotated[
        str, typer.Option(help="tiny; with random weights sd3_mid, or on a GPU flux_slim or flux")
    ] = "tiny",
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
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="also with model.gradient_checkpointing: full and selective")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Time iterations of the published loop, at its own batch and sharing, and of Flowgrove with each lever added."""
    from flowgrove.bench.engine import bench_engine, settings_of
    from flowgrove.bench.table import draw_engine, print_rows

    settings = settings_of(model, recipes, levers, prompts, rounds, compiled, device, precision, checkpointing)
    print_rows(bench_engine(settings, _say, out), as_json, draw_engine)


@partial(_command, group=bench_app)
def scaling(
    as_json: Annotated[bool, typer.Option("--json", help="the rows as JSON on stdout")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for a CSV and a plot named after model and device")] = None,
    model: Annotated[
        str, typer.Option(help="tiny; with random weights sd3_mid, or on a GPU flux_slim or flux")
    ] = "tiny",
    leaves: Annotated[
        str, typer.Option(help="pictures per prompt, with commas between; for 2 prompts")
    ] = "1,2,4,8,16,32,64,128,256",
    prompts: Annotated[
        str, typer.Option(help="prompts of an iteration, with commas between; of 16 pictures each")
    ] = "1,2,4,8,16,32,64",
    rounds: Annotated[int, typer.Option(min=1, help="timed iterations of each")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Time iterations over leaves and over prompts:
    seconds, and what the engine spends per node outside the transformer.
    """
    from flowgrove.bench.scaling import bench_scaling, settings_of
    from flowgrove.bench.table import draw_scaling, print_rows

    rows = bench_scaling(settings_of(model, leaves, prompts, rounds, device), _say, out)
    print_rows(rows, as_json, draw_scaling)


@partial(_command, group=bench_app)
def rows(
    as_json: Annotated[bool, typer.Option("--json", help="the rows as JSON on stdout")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for a CSV named after model and device")] = None,
    model: Annotated[
        str, typer.Option(help="tiny; with random weights sd3_mid, or on a GPU flux_slim or flux")
    ] = "tiny",
    rows_: Annotated[str, typer.Option("--rows", help="rows of a pass, with commas between")] = "1,2,4,8",
    modes: Annotated[
        str | None,
        typer.Option(
            help="eager, recorded (CUDA graphs), compiled, fp8, int8 (rollout.precision), fp8+recorded, fp8+compiled, "
            "…, attention (every kernel of it that runs here) or one by name; default: eager, and recorded on a GPU"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed passes of each")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Time passes of a transformer: milliseconds of a row over rows in a pass;
    of a slim FLUX also what all of FLUX.1-dev would take.
    """
    from flowgrove.bench.row_times import bench_rows, settings_of
    from flowgrove.bench.table import draw_row_times, print_rows

    found = bench_rows(settings_of(model, rows_, modes, repeats, device), _say, out)
    print_rows(found, as_json, draw_row_times)


@_command
def tune(
    recipe: RecipePath,
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="the recipe to write; default: NAME_tuned.yaml beside NAME.yaml")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="also measure engine.compile, which takes minutes")
    ] = False,
    precision: Annotated[
        bool,
        typer.Option("--precision", help="also measure rollout.precision, which changes training pictures a little"),
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="also measure model.gradient_checkpointing, of which some may fit")
    ] = False,
) -> None:
    """Measure which engine settings run a recipe fastest on this machine,
    and write a recipe that extends it with them.

    What passes take is kept for `flowgrove plan --time`.
    """
    from flowgrove.tuning.tune import tune_recipe

    target = tune_recipe(recipe, tuple(set_ or ()), out, compiled, _say, precision, checkpointing)
    _say(f"wrote {target}: train with `flowgrove train {target}`")


@_command
def profile(
    recipe: RecipePath,
    set_: Overrides = None,
    iterations: Annotated[int, typer.Option(min=1, help="iterations that are timed, and again profiled")] = 1,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="iterations before them")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder for its files; default: profiles/NAME")] = None,
    equal_rows: Annotated[
        bool, typer.Option("--equal-rows", help="instead, list the rows that the iterations compute twice, and why")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    allow_python: AllowPython = False,
) -> None:
    """Say where the time and the memory of an iteration go on this machine, and what to try next.

    Writes the table of phases (CSV, JSON), a trace for Perfetto, and a timeline of memory; no run folder.
    """
    _allow(allow_python)
    from flowgrove.recipe.loading import load_recipe

    settings = load_recipe(recipe, tuple(set_ or ()))
    if equal_rows:
        from flowgrove.profiler.equal_rows import log_rows
        from flowgrove.profiler.show_rows import draw_rows
        from flowgrove.setup import Setup

        if as_json:
            raise UserError("--equal-rows prints a table: leave --json out")
        draw_rows(log_rows(Setup(settings), iterations), settings, Console(highlight=False))
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what the profiler notes of memory from before it
    from flowgrove.profiler.command import profile_recipe
    from flowgrove.profiler.show import draw_profile
    from flowgrove.setup import Setup

    folder = out or Path("profiles") / recipe.stem
    found = profile_recipe(recipe.name, Setup(settings), folder, iterations, warm_up, _say)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json()) + "\n")
    else:
        draw_profile(found, Console(highlight=False))


@_command
def doctor() -> None:
    """Say what this installation has: versions, devices, backends, and what is missing."""
    from flowgrove.doctor import findings

    console = Console(highlight=False, soft_wrap=True)
    for name, value in findings():
        console.print(f"[dim]{name:<22}[/]{escape(value)}")
