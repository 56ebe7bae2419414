"""Commands that make a run and use what it has made."""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer

from flowgrove.commands.options import AllowPython, Overrides, RecipePath, Which
from flowgrove.commands.shell import allow, console, say
from flowgrove.process import started


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
    allow(allow_python)
    from flowgrove.recipe.loading import load_recipe

    settings = load_recipe(recipe, tuple(set_ or ()))  # before the slow imports: a mistake is answered at once
    from flowgrove.device import pick_device
    from flowgrove.joining import joined
    from flowgrove.report.page import write_report
    from flowgrove.run.progress import TrainingDisplay
    from flowgrove.run.resume import command_again, finished
    from flowgrove.run.stopping import Stopped, Stopping
    from flowgrove.setup import Setup
    from flowgrove.trainer import Trainer

    setup, folder = Setup(settings), out or Path(settings.run.out)
    done = f"{folder} is finished: {settings.run.iterations} iterations; see {folder / 'report.html'}"
    if resume == "auto" and started() == 1 and finished(setup, folder):
        say(done)
        return
    with joined(settings.engine, pick_device(settings)) as ranks, Stopping() as stopping:
        # other machines may not see the folder: the first rank looks for all
        if ranks.size > 1 and resume == "auto" and ranks.most(int(ranks.first and finished(setup, folder))):
            say(done)
            return
        try:
            trainer = Trainer(setup, folder, resume, stopping, say, ranks, force)
            with TrainingDisplay(console, settings, trainer.completed) if ranks.first else nullcontext() as display:
                trainer.run(display.update if display is not None else lambda line: None)
        except Stopped:
            with suppress(OSError):
                say(
                    f"saved {stopping.saved}: {command_again(resume)} goes on from it"
                    if stopping.saved
                    else "nothing to save yet"
                )
            raise
    if ranks.first:
        say(f"report: {write_report(settings, trainer.out)}")


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
    """Draw with a trained or a base model: NNNN_K.png (or .mp4) for sample K of prompt N, as many as run.eval.samples
    says, and prompts.jsonl; with --compare also NNNN_K_base.png and pages compare_PP.png.

    `--set run.eval.tuned_share=0.8` lets the trained model run the first 80 % of the steps and the base model the rest.
    """
    from flowgrove.report.samples import write_samples
    from flowgrove.run.finished_runs import joined_for

    with joined_for(source, tuple(set_ or ())) as ranks:
        count = write_samples(source, tuple(set_ or ()), prompts, out, compare, checkpoint, ranks)
    say(f"wrote {count} samples to {out}")


def eval_(
    run: Annotated[Path, typer.Argument(help="a run folder", show_default=False)],
    checkpoint: Which = None,
    set_: Overrides = None,
    allow_python: AllowPython = False,
) -> None:
    """Score a checkpoint on the held-out prompts: mean and 95 % interval of every reward; also written to eval.json."""
    allow(allow_python)
    from flowgrove.run.finished_runs import evaluate_run, joined_for

    with joined_for(run, tuple(set_ or ())) as ranks:
        result = evaluate_run(run, tuple(set_ or ()), checkpoint, ranks)
    for name, found in result.items() if ranks.first else ():
        typer.echo(f"{name:<16}{found['mean']:.4f} ± {found['confidence']:.4f}")


def export(
    run: Annotated[Path, typer.Argument(help="a run folder", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder to write to")],
    checkpoint: Which = None,
    form: Annotated[str, typer.Option("--format", help="diffusers; or comfyui, for a LoRA")] = "diffusers",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp16 or fp32; default: a LoRA in fp32, a pipeline in bf16 where a bf16 run found it so"
        ),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write the trained weights as diffusers loads them: a LoRA for `load_lora_weights`, or a whole pipeline for
    `from_pretrained`.

    A LoRA may also be written as ComfyUI loads it. It needs no base model.
    """
    from flowgrove.run.finished_runs import export_run

    say(export_run(run, out, tuple(set_ or ()), checkpoint, form, dtype))


def watch(
    runs: Annotated[list[Path], typer.Argument(help="run folders", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="on this machine's own address; 0: any free one")] = 8420,
) -> None:
    """Serve the report of runs while they train, beside each other where they are several; to browsers on this
    machine only.
    """
    from flowgrove.report.watching import watch_runs

    watch_runs(runs, port, say)
