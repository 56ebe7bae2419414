"""The `flowgrove` command."""

import logging
import os

try:
    import typer

    from flowgrove.commands.benchmarks import engine, ops, rows, scaling
    from flowgrove.commands.comparisons import compare
    from flowgrove.commands.measurements import profile, tune
    from flowgrove.commands.plans import plan
    from flowgrove.commands.references import doctor, metrics, recipe_
    from flowgrove.commands.runs import eval_, export, sample, train, watch
    from flowgrove.commands.shell import register
except ModuleNotFoundError as error:
    raise SystemExit(f"error: the flowgrove command needs {error.name}: pip install 'flowgrove[train]'") from None

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
bench = typer.Typer(no_args_is_help=True, help="Measure what the parts cost on this machine.")
app.add_typer(bench, name="bench")

for _command in (train, plan, recipe_, metrics, sample, eval_, watch, compare, export, tune, profile, doctor):
    register(_command, app)
for _command in (ops, engine, scaling, rows):
    register(_command, bench)
