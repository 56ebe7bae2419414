"""Tiny runs for the tests of whole commands: a recipe that takes seconds, the command line inside this process,
and what a run leaves on disk.
"""

import json
from pathlib import Path

import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from flowgrove.cli import app

TRAIN_PROMPTS = (
    "a red circle at the top left",
    "a blue square at the top right",
    "a green triangle at the bottom left",
    "a black cross at the centre",
    "a yellow circle at the bottom right",
)
EVAL_PROMPTS = ("a purple square at the centre", "a red cross at the top left")
UNTIMED = ("seconds", "samples_per_second", "peak_memory_bytes")  # what two equal runs may differ in


def tiny_recipe(folder, **changes):
    """Writes mine.yaml and its prompts into `folder`: 3 iterations of 2 prompts and 4 samples, with sections changed.
    Returns its path.
    """
    content = {
        "model": {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False},
        "data": {"prompts": "train.txt", "eval_prompts": "eval.txt", "prompts_per_iteration": 2},
        "rollout": {
            "steps": 4,
            "shift": 1.0,
            "group_size": 4,
            "window": {"strategy": "progressive", "size": 2, "every": 1},
        },
        "reward": [{"name": "shapes"}],
        "update": {"lr": 1e-4, "clip_range": 1e-3, "updates_per_iteration": 2},
        "engine": {"device": "cpu"},
        "run": {"iterations": 3, "checkpoint_every": 1, "eval_every": 2, "log": ["jsonl"]},
    }
    for section, change in changes.items():
        content[section] = {**content.get(section, {}), **change} if isinstance(change, dict) else change
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.txt", TRAIN_PROMPTS)
    write_lines(folder / "eval.txt", EVAL_PROMPTS)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def flowgrove(*arguments):
    """The command inside this process, where another test may have imported libraries before
    the command could silence them.
    """
    import diffusers
    import transformers

    for logging in (transformers.logging, diffusers.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = flowgrove(*arguments)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return result


def refuse(*arguments):
    """The line of a mistake that the user can cause:
    exit code 2, one line on stderr, nothing on stdout, and no exception but the exit.
    """
    result = flowgrove(*arguments)
    assert isinstance(result.exception, SystemExit), f"{result.exception!r} instead of an error line"
    assert result.exit_code == 2
    return error_line(result.stdout, result.stderr)


def error_line(stdout, stderr):
    assert stdout == ""
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    assert len(stderr.strip()) > len("error: ")
    return stderr.strip()


def strict_json(text):
    """One JSON value; NaN and Infinity, which are not JSON, are errors."""

    def refuse_constant(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse_constant)


def metrics_of(run):
    return [strict_json(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(lines):
    """Metrics lines without what the clock and the machine put in."""
    assert all(key in line for line in lines for key in UNTIMED)
    return [{key: value for key, value in line.items() if key not in UNTIMED} for line in lines]


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def weights_of(run, step):
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "weights.safetensors")


def contents(folder):
    """Relative path → bytes of every file, link target of every link."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in _files(folder)
    }


def _files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_symlink() or path.is_file()]
