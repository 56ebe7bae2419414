"""`flowgrove compare` as a user meets it: whole comparisons of tiny runs, going on, interruptions, refusals."""

import importlib
import io
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from engine_cases import (
    contents,
    flowgrove,
    metrics_of,
    refuse,
    strict_json,
    succeed,
    timeless,
    tiny_recipe,
    write_lines,
)
from flowgrove.bench.table import read_columns
from flowgrove.compare import command
from flowgrove.compare.command import Result
from flowgrove.compare.curves import Curve, Point, summarise
from flowgrove.compare.processes import Failure, _Display
from flowgrove.compare.runs import comparison_of, cores
from flowgrove.compare.tables import write_tables
from flowgrove.errors import UserError
from flowgrove.run.finding import valid_checkpoints
from subprocesses import PYTHON, ROOT, environment

RUN = {"iterations": 2, "checkpoint_every": 0, "eval_every": 1, "eval": {"samples": 1}, "log": ["jsonl"]}
SEEDS = ("--seeds", "1,2")
DEADLINE = 120  # seconds


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A window that moves, and a tree, which costs less."""
    folder = tmp_path_factory.mktemp("recipes")
    window = tiny_recipe(folder, run=RUN).rename(folder / "window.yaml")
    tree = {"tree": {"splits": [0, 1], "fanout": 2}, "window": {"strategy": "frozen", "size": 2}}
    (folder / "tree.yaml").write_text(yaml.safe_dump({"extends": "window.yaml", "rollout": tree}), encoding="utf-8")
    return window, folder / "tree.yaml"


@pytest.fixture(scope="module")
def compared(recipes, tmp_path_factory):
    """(the folder of a comparison at equal cost, what the command printed)."""
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, succeed("compare", *recipes, *SEEDS, "--cost", "80,100", "--json", "--jobs", 2, "--out", out)


def spent(lines):
    return sum(line["rollout_forwards"] + 3 * line["train_passes"] for line in lines)


def test_every_run_trains_until_it_has_cost_so_much_and_no_longer(compared):
    out, _ = compared
    runs = sorted(path for path in (out / "runs").iterdir() if path.is_dir())
    assert [run.name for run in runs] == [f"{n}-lr0.0001-seed{s}" for n in ("tree", "window") for s in (1, 2)]
    for run in runs:
        lines = metrics_of(run)
        assert spent(lines[:-1]) < 100 <= spent(lines)
        assert (run / "report.html").exists(), "an ordinary run"
        assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["seed"] == int(run.name[-1])


def test_tables_hold_the_rewards_of_the_runs_at_both_costs(compared):
    out, told = compared
    rows = read_columns(out / "summary.csv")
    assert [(row["at"], row["cost"]) for row in rows] == [("weighted_passes", cost) for cost in (80, 80, 100, 100)]
    assert {row["recipe"] for row in rows} == {"window", "tree"}
    summary = strict_json(told.stdout)["summary"]
    assert [{key: str(row[key]) for key in row} for row in summary] == [
        {key: str(row[key] if row[key] is not None else "") for key in row} for row in rows
    ]
    points = read_columns(out / "curves.csv")
    for row in rows:
        rewards = []
        for seed in (1, 2):
            curve = [one for one in points if (one["recipe"], one["seed"]) == (row["recipe"], seed)]
            before = [one for one in curve if one["weighted_passes"] <= row["cost"]][-1]
            after = next(one for one in curve if one["weighted_passes"] >= row["cost"])
            width = after["weighted_passes"] - before["weighted_passes"]
            share = (row["cost"] - before["weighted_passes"]) / width if width else 0
            rewards.append(before["held_out_reward"] + share * (after["held_out_reward"] - before["held_out_reward"]))
        assert row["mean"] == pytest.approx(sum(rewards) / 2, abs=1e-4)
        assert row["rewards"].split() == [f"{reward:.4f}" for reward in rewards]
    for row in points:
        lines = metrics_of(out / "runs" / f"{row['recipe']}-lr0.0001-seed{row['seed']}")
        assert row["weighted_passes"] == spent(lines[: row["iteration"]])
    assert (out / "rewards.png").stat().st_size > 10_000
    assert strict_json(told.stdout)["failed"] == []


def test_a_second_start_trains_nothing_and_more_cost_goes_on(compared, recipes):
    out, _ = compared
    before = contents(out / "runs")
    again = succeed("compare", *recipes, *SEEDS, "--cost", "80,100", "--out", out)
    assert "4 of 4 runs are there already" in again.stderr
    assert "held-out reward at 100 weighted passes" in again.stdout
    assert contents(out / "runs") == before
    fewer = succeed("compare", *recipes, *SEEDS, "--cost", "70", "--out", out)
    assert "4 of 4 runs are there already" in fewer.stderr
    assert contents(out / "runs") == before


def test_what_has_changed_is_refused_before_anything_trains(compared, recipes):
    out, _ = compared
    before = contents(out)
    options = (*recipes, *SEEDS, "--cost", "100", "--out", out)
    line = refuse("compare", *options, "--set", "update.clip_range=0.01")
    assert "window-lr0.0001-seed1 holds a run of another recipe" in line
    assert "update.clip_range is 0.01 instead of the run's 0.001" in line
    line = refuse("compare", *options, "--set", "run.eval.samples=2")
    assert "run.eval.samples is 2 instead of the run's 1" in line
    assert contents(out) == before


REFUSED = {
    "--seeds 1,x": "write numbers like 1,2,3",
    "--seeds 1,1": "name every seed once",
    "--seeds 5000000000": "below 2³²",
    "--lr 1e-4,fast": "--lr is '1e-4,fast': write numbers above 0",
    "--lr 0": "above 0",
    "--lr 1e-4,0.0001": "each once",
    "--cost -5": "--cost is '-5'",
    "--cost 10 --seconds 5": "--cost and --seconds each say how long runs train",
    "--iterations 2 --cost 10": "give one of them",
    "--cost 10 --set update.lr_schedule=cosine": "give --iterations instead of --cost",
    "--seconds 10 --set update.lr_schedule=cosine": "give --iterations instead of --seconds",
    "--set run.eval_every=0": "no run.eval_every",
    "--set data.eval_prompts=null": "no data.eval_prompts",
    "--set update.lrr=1": "did you mean",
    "--set run.seed=5": "--set run.seed=5 would change nothing, as --seeds says it: give --seeds alone",
    "--lr 1e-4 --set update.lr=2e-4": "as --lr says it",
    "--cost 10 --set run.iterations=9": "as --cost says it",
    "--iterations 2 --set run.iterations=9": "as --iterations says it",
    "--search 5 --lr 1e-4,2e-4": "give --cost or --seconds too",
    "--search 5 --cost 10 --lr 1e-4": "give several",
    "--search 11 --cost 10 --lr 1e-4,2e-4": "at most 10",
    "--search 0 --cost 10 --lr 1e-4,2e-4": "write a number above 0",
}


@pytest.mark.parametrize("options", REFUSED)
def test_mistakes_are_one_line(options, recipes, tmp_path):
    assert REFUSED[options] in refuse("compare", *recipes, *options.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_of_one_name_or_with_other_judges_are_refused(recipes, tmp_path):
    window, _ = recipes
    (tmp_path / "window.yaml").write_text(f"extends: {window}\n", encoding="utf-8")
    assert "two recipes are named window" in refuse(
        "compare", window, tmp_path / "window.yaml", "--out", tmp_path / "out"
    )
    (tmp_path / "other.yaml").write_text(f"extends: {window}\nrun:\n  eval: {{samples: 3}}\n", encoding="utf-8")
    line = refuse("compare", window, tmp_path / "other.yaml", "--out", tmp_path / "out")
    assert "window and other have another run.eval" in line


OTHER_EVALUATIONS = {
    "rollout: {steps: 5}": "run.eval.steps",
    "rollout: {shift: 3.0}": "rollout.shift",
    "model: {guidance_scale: 2.0}": "run.eval.guidance_scale",
    "model: {height: 16, width: 16}": "model.height",
    "data: {eval_prompts: more.txt}": "data.eval_prompts",
}


@pytest.mark.parametrize("change", OTHER_EVALUATIONS)
def test_what_a_null_in_run_eval_stands_for_is_compared(change, recipes, tmp_path):
    window, _ = recipes
    write_lines(tmp_path / "more.txt", ["a red square at the centre"])
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {window}\n{change}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"window and other have another {OTHER_EVALUATIONS[change]}: "):
        comparison_of([window, other], tmp_path / "out")


def test_one_evaluation_written_in_two_ways_is_one(recipes, tmp_path):
    window, _ = recipes
    other = tmp_path / "other.yaml"
    changes = "rollout: {steps: 5}\nrun:\n  eval: {steps: 4, guidance_scale: 1.0}\nmodel: {guidance_scale: 2.0}\n"
    other.write_text(f"extends: {window}\n{changes}", encoding="utf-8")
    assert len(comparison_of([window, other], tmp_path / "out").runs) == 6


@pytest.mark.parametrize("kept", [True, False])
def test_held_out_prompts_count_by_their_text_wherever_they_lie(kept, compared, recipes, tmp_path):
    """A comparison from before evaluation.json was written knows the prompts by their path alone."""
    out = shutil.copytree(compared[0], tmp_path / "out")
    moved = [Path(shutil.copy(path, tmp_path)) for path in recipes]
    for name in ("train.txt", "eval.txt"):
        shutil.copy(recipes[0].parent / name, tmp_path)
    if not kept:
        (out / "evaluation.json").unlink()
    assert comparison_of(moved, out, seeds="1", cost="100").runs
    write_lines(tmp_path / "eval.txt", ["a red square at the centre"])
    with pytest.raises(UserError, match=r"judged otherwise: data\.eval_prompts holds other prompts than when it began"):
        comparison_of(moved, out, seeds="1", cost="100")


def test_learning_rates_that_differ_little_have_folders_of_their_own(recipes, tmp_path):
    runs = comparison_of([recipes[0]], tmp_path / "out", seeds="1", lrs="1e-4,1.0000001e-4").runs
    assert [run.folder.name for run in runs] == ["window-lr0.0001-seed1", "window-lr0.00010000001-seed1"]
    assert len({run.title for run in runs}) == 2


@pytest.mark.long
def test_a_run_that_fails_is_named_and_the_others_count(recipes, tmp_path):
    """Its training prompts are no sentences about shapes, which its process finds out."""
    window, tree = recipes
    write_lines(tmp_path / "dogs.txt", ["a photo of a dog"])
    (tmp_path / "dogs.yaml").write_text(f"extends: {window}\ndata:\n  prompts: dogs.txt\n", encoding="utf-8")
    result = flowgrove(
        "compare", tmp_path / "dogs.yaml", tree, "--seeds", 1, "--iterations", 2, "--out", tmp_path / "out"
    )
    assert result.exit_code == 2
    line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "1 of 2 runs failed: dogs, learning rate 0.0001, seed 1: prompt 'a photo of a dog'" in line
    assert [row["recipe"] for row in read_columns(tmp_path / "out" / "summary.csv")] == ["tree"]


@contextmanager
def started(*arguments, background=False):
    """The command in a process of its own, ended with what it has begun when the block ends. With `background` it
    ignores SIGINT, as a shell's background jobs do.
    """
    handler = "signal.SIG_IGN" if background else "signal.default_int_handler"
    heard = f"import signal; signal.signal(signal.SIGINT, {handler})"
    process = subprocess.Popen(
        [PYTHON, "-c", f"{heard}; from flowgrove.cli import app; app()", "compare", *map(str, arguments)],
        env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(done):
    end = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def count(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_comparison_goes_on_where_it_was(number, recipes, tmp_path):
    """Ctrl+C leaves tables of what there is, and so does SIGTERM to a background job; after a kill the runs notice that
    they are alone, and save.
    """
    window, _ = recipes
    out = tmp_path / "out"
    run = out / "runs" / "window-lr0.0001-seed1"
    options = (window, "--seeds", 1, "--out", out, "--set", "run.eval_every=1000")
    with started(*options, "--iterations", 1000, background=number == signal.SIGTERM) as process:
        wait_until(lambda: count(run) >= 2)
        os.kill(process.pid, number)
        text = process.communicate(timeout=DEADLINE)[0]
    wait_until(lambda: valid_checkpoints(run) and not (run / ".lock").exists())
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "0 of 1 runs are whole: the same command goes on" in text
        assert "Traceback" not in text
        assert {row["iteration"] for row in read_columns(out / "curves.csv")} == {0}
    before = metrics_of(run)
    done = len(before)
    told = succeed(*("compare", *options), "--iterations", done + 1)
    after = metrics_of(run)
    assert "1 of 1 runs  window" in told.stderr
    assert len(after) == done + 1
    assert timeless(after)[: done - 1] == timeless(before)[: done - 1]
    assert [line["seconds"] for line in after[: done - 1]] == [line["seconds"] for line in before[: done - 1]], (
        "they were not run again"
    )


def test_a_search_asks_for_the_first_seed_and_then_for_the_best_rates(recipes, tmp_path, monkeypatch):
    """By hand: the tree learns more at the large rate, the window at the small one."""
    reached = {("tree", 1e-4): 0.6, ("tree", 1e-2): 0.7, ("window", 1e-4): 0.8, ("window", 1e-2): 0.5}
    asked = []

    def train_all(comparison, *_):
        asked.append((comparison.goal.amount, [(run.name, run.lr, run.seed) for run in comparison.runs]))
        return []

    def curve_of(run):
        points = [Point(0, 0, 0, 0.5, 0.5), Point(2, 160, 2, reached[run.name, run.lr], 0.5)]
        return Curve(run.name, run.lr, run.seed, points)

    monkeypatch.setattr(command, "train_all", train_all)
    monkeypatch.setattr(command, "curve_of", curve_of)
    options = {"seeds": "7,2", "lrs": "1e-4,1e-2", "cost": "160"}
    command.compare(
        comparison_of(list(recipes), tmp_path / "out", search=80, **options), 1, print, Console(file=io.StringIO())
    )
    first = [(name, lr, 7) for lr in (1e-4, 1e-2) for name in ("window", "tree")]
    best = [(name, lr, seed) for seed in (7, 2) for name, lr in (("window", 1e-4), ("tree", 1e-2))]
    assert asked[0] == (80, first)
    assert (asked[1][0], sorted(asked[1][1])) == (160, sorted(best))
    assert {row["lr"] for row in read_columns(tmp_path / "out" / "summary.csv") if row["recipe"] == "tree"} == {1e-2}
    # a run that goes on reads otherwise at the search's cost: that changes no choice
    reached["tree", 1e-2] = 0.55
    command.compare(
        comparison_of(list(recipes), tmp_path / "out", search=80, **options), 1, print, Console(file=io.StringIO())
    )
    assert asked[3] == asked[1]
    assert {row["lr"] for row in read_columns(tmp_path / "out" / "summary.csv") if row["recipe"] == "tree"} == {1e-2}
    (tmp_path / "out" / "learning_rates.json").write_text("{}")
    with pytest.raises(UserError, match="damaged: remove it"):
        command.compare(
            comparison_of(list(recipes), tmp_path / "out", search=80, **options), 1, print, Console(file=io.StringIO())
        )


@pytest.mark.long
def test_a_search_trains_other_seeds_at_the_best_learning_rate_alone(recipes, tmp_path):
    """The first seed shows every rate at the smaller cost; the best of them trains with both seeds to the larger."""
    out, rates = tmp_path / "out", {"0.0001": 1e-4, "0.01": 1e-2}
    options = (recipes[1], *SEEDS, "--lr", ",".join(rates), "--search", "80", "--cost", "160", "--out", out)
    told = succeed("compare", *options, "--json")
    first = {rate: out / "runs" / f"tree-lr{rate}-seed1" for rate in rates}
    points = read_columns(out / "curves.csv")

    def at_the_search(rate):
        curve = [one for one in points if (one["lr"], one["seed"]) == (rates[rate], 1)]
        return np.interp(80, [one["weighted_passes"] for one in curve], [one["held_out_reward"] for one in curve])

    best, other = sorted(rates, key=at_the_search, reverse=True)
    assert at_the_search(best) > at_the_search(other)
    assert spent(metrics_of(first[best])) >= 160 > spent(metrics_of(first[other])) >= 80
    assert spent(metrics_of(out / "runs" / f"tree-lr{best}-seed2")) >= 160
    assert not (out / "runs" / f"tree-lr{other}-seed2").exists()
    (row,) = strict_json(told.stdout)["summary"]
    assert (row["lr"], row["seeds"], row["tried"], row["untried"]) == (rates[best], "1 2", "0.0001 0.01", "")
    assert row["lr_chosen_by"] == "highest reward of seed 1 at 80 weighted passes"
    assert f"the best learning rates of seed 1: tree {best}" in told.stderr
    before = contents(out / "runs")
    assert "2 of 2 runs are there already" in succeed("compare", *options).stderr
    assert contents(out / "runs") == before


@pytest.mark.long
def test_seconds_end_a_run_too(recipes, tmp_path):
    window, _ = recipes
    out = tmp_path / "out"
    succeed("compare", window, "--seeds", 1, "--seconds", 1, "--out", out, "--set", "run.eval_every=1000")
    lines = metrics_of(out / "runs" / "window-lr0.0001-seed1")
    taken = [sum(line["seconds"].values()) for line in lines]
    assert sum(taken) >= 1
    assert len(lines) == 2 or sum(taken[:-1]) < 3, "no more than one look ahead"
    assert read_columns(out / "summary.csv")[0]["at"] == "seconds"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "profiling")
    return importlib.import_module("compare_recipes")


@pytest.mark.parametrize("task", ["shapes", "pairs"])
def test_the_shipped_recipes_are_compared_on_both_tasks(task, script, tmp_path, monkeypatch, capsys):
    """Without training: each recipe with every seed at every learning rate, on prompts that it does not evaluate on."""
    curves = [
        Curve(f"shapes_{name}", 1e-4, seed, [Point(0, 0, 0, 0.5, 0.5), Point(9, 100, 60, 0.7, 0.6)])
        for name in script.NAMES
        for seed in (1, 2, 3)
    ]
    asked = []

    def compared(comparison, *_):
        asked.append(comparison)
        found = summarise(curves, "weighted_passes", [50])
        comparison.out.mkdir(parents=True)
        write_tables(curves, found, "a machine", comparison.out)
        return Result(curves, found, [], "a machine")

    monkeypatch.setattr(script, "compare", compared)
    monkeypatch.setattr(script, "FIGURES", tmp_path)
    monkeypatch.setattr("sys.argv", ["compare_recipes.py", "rewards", "--task", task, "--runs", str(tmp_path / "runs")])
    script.main()
    runs = asked[0].runs
    assert {f"shapes_{name}" for name in script.NAMES} <= {run.name for run in runs}
    assert len(runs) == len({(run.name, run.lr, run.seed) for run in runs}) == 9 * len({run.name for run in runs})
    for run in runs:
        assert set(run.setup.prompts).isdisjoint(run.setup.eval_prompts)
        assert all((" at " in text) == (task == "shapes") for text in run.setup.prompts + run.setup.eval_prompts)
    assert sorted(path.name for path in tmp_path.glob("compare_*")) == [
        f"compare_{task}.csv",
        f"compare_{task}_curves.csv",
    ]
    assert "held-out reward at 50 weighted passes" in capsys.readouterr().out


def test_a_terminal_sees_how_far_the_runs_are(compared, recipes):
    out, _ = compared
    comparison = comparison_of(list(recipes), out, seeds="1,2", cost="100")
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    with _Display(comparison, comparison.runs[1:], console) as display:
        display.count(comparison.runs[1:3])
        task = display._progress.tasks[0]
        assert (task.completed, task.total) == (2, 3), "two that run are at their end"
        display.ended(comparison.runs[1], None)
        display.ended(comparison.runs[2], Failure(comparison.runs[2], "it broke"))
    text = console.file.getvalue()
    assert "2 of 4 runs  tree, learning rate 0.0001, seed 1: held-out reward 0." in text
    assert "2 of 4 runs  window, learning rate 0.0001, seed 2: it broke" in text


@pytest.mark.parametrize(
    ("kind", "jobs", "expected"), [("cpu", None, (cores(), 1)), ("cuda", None, (1, None)), ("cuda", 3, (3, None))]
)
def test_a_gpu_takes_one_run_at_a_time_unless_told_otherwise(kind, jobs, expected, recipes, tmp_path, monkeypatch):
    """A stand-in for the device: no process is started."""
    asked = []
    monkeypatch.setattr(command, "pick_device", lambda recipe: torch.device(kind))
    monkeypatch.setattr(command, "device_name", lambda device: f"a {device.type}")
    monkeypatch.setattr(command, "train_all", lambda comparison, *rest: asked.append(rest[:2]) or [])
    comparison = comparison_of(list(recipes), tmp_path / "out", cost="100")
    result = command.compare(comparison, jobs, lambda text: None, Console(file=io.StringIO()))
    assert asked == [expected]
    assert result.machine.startswith(f"a {kind}, {'one thread a run, ' if kind == 'cpu' else ''}torch ")
    assert not (tmp_path / "out" / "rewards.png").exists()
