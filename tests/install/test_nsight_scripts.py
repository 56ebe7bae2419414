"""profiling/nsys.sh and profiling/ncu.sh with stand-ins for Nsight's commands, which write down what they are given."""

import shutil
import subprocess

import pytest

from engine_cases import metrics_of, tiny_recipe
from subprocesses import PYTHON, ROOT, environment

BASH = shutil.which("bash")
STAND_IN = """#!{bash}
printf '%s\\n' "$(basename "$0")" "$@" --- >> {log}
{then}
"""
RUN = """
while [ $# -gt 0 ] && [ "$1" != {python} ]; do shift; done
[ $# -eq 0 ] || "$@"
"""

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash here")


@pytest.fixture
def nsight(tmp_path):
    """Puts stand-ins on PATH that run the program which they are to profile; returns a function that runs a script."""
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    for name in ("nsys", "ncu"):
        then = RUN.format(python=PYTHON)
        (tools / name).write_text(STAND_IN.format(bash=BASH, log=log, then=then))
        (tools / name).chmod(0o755)

    def run(script, *arguments, without=None, **env):
        if without is not None:
            (tools / without).unlink()
        done = subprocess.run(
            [BASH, ROOT / "profiling" / script, *map(str, arguments)],
            env=environment(PATH=f"{tools}:/usr/bin:/bin", PYTHON=PYTHON, OMP_NUM_THREADS="1", **env),
            capture_output=True,
            check=False,
            text=True,
            cwd=tmp_path,
        )
        calls = [call.splitlines() for call in log.read_text().split("---\n")[:-1]] if log.exists() else []
        return done, calls

    return run


@pytest.mark.long
def test_nsys_captures_one_iteration_and_asks_for_what_the_report_reads(nsight, tmp_path):
    recipe = tiny_recipe(tmp_path, run={"iterations": 7, "eval_every": 1, "checkpoint_every": 1})
    done, (profile, export) = nsight(
        "nsys.sh", recipe, "--set", "data.prompts_per_iteration=1", ITERATION="1", OUT=str(tmp_path / "out"),
        NSYS_OPTIONS="--gpu-metrics-devices=all --stats=true",
    )  # fmt: skip
    assert profile[:2] == ["nsys", "profile"]
    options = profile[2 : profile.index(PYTHON)]
    assert {
        "--capture-range=nvtx", "--nvtx-capture=iteration 1@flowgrove", "--capture-range-end=stop",
        "--cuda-graph-trace=node", "--gpu-metrics-devices=all", "--stats=true",
        f"--output={tmp_path}/out/iteration_1",
    } <= set(options)  # fmt: skip
    (trace,) = (option for option in options if option.startswith("--trace="))
    assert {"cuda", "nvtx"} <= set(trace.removeprefix("--trace=").split(","))
    assert export == [
        "nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={tmp_path}/out/iteration_1.sqlite",
        f"{tmp_path}/out/iteration_1.nsys-rep",
    ]  # fmt: skip
    (run,) = (tmp_path / "out").glob("run_*")
    assert [line["iteration"] for line in metrics_of(run)] == [0, 1], "it ends with the iteration that is captured"
    assert not list(run.glob("samples/*.png"))
    assert done.returncode == 2, "the stand-in has exported nothing"
    assert done.stderr.splitlines()[-1].startswith(f"{tmp_path}/out/iteration_1.sqlite cannot be read")


@pytest.mark.long
def test_ncu_measures_the_op_inside_its_range(nsight, tmp_path):
    done, (measure, show) = nsight("ncu.sh", "flow_step", "3x1031", DTYPE="fp32", BACKEND="reference")
    assert done.returncode == 0, done.stderr
    options = measure[1 : measure.index(PYTHON)]
    assert options[options.index("--nvtx-include") + 1] == "flowgrove@flow_step/"
    assert options[options.index("--export") + 1] == "ncu/flow_step_3x1031_fp32_reference"
    assert {"SpeedOfLight", "SpeedOfLight_RooflineChart", "MemoryWorkloadAnalysis"} <= set(options)
    assert show == ["ncu", "--import", "ncu/flow_step_3x1031_fp32_reference.ncu-rep", "--page", "details"]
    # x, the velocity and the next state in fp32, and six numbers a row
    assert f"has to move {3 * 1031 * 12 + 3 * 24:,} bytes" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "env", "line"),
    [
        ("nsys.sh", (), {}, "usage: profiling/nsys.sh RECIPE [--set KEY=VALUE …]"),
        ("nsys.sh", ("--set",), {}, "usage: profiling/nsys.sh RECIPE [--set KEY=VALUE …]"),
        ("nsys.sh", ("recipe.yaml",), {"ITERATION": "two"}, "ITERATION is 'two': write a whole number from 0 up"),
        ("ncu.sh", (), {}, "usage: profiling/ncu.sh OP [SHAPE]"),
        ("ncu.sh", ("flow_step", "flux_721"), {"BACKEND": "cpu"}, "there is no shape 'flux_721'"),
        ("ncu.sh", ("flow_step",), {"BACKEND": "none"}, "is 'none': write one of "),
        ("ncu.sh", ("flow_stop",), {}, "the op is 'flow_stop': write one of flow_step, flow_logprob, grpo_loss"),
    ],
)
def test_a_mistake_is_one_line(nsight, script, arguments, env, line):
    done, calls = nsight(script, *arguments, **env)
    assert (done.returncode, calls) == (2, [])
    (told,) = done.stderr.splitlines()
    assert line in told


@pytest.mark.parametrize(
    ("script", "tool", "argument"), [("nsys.sh", "nsys", "a.yaml"), ("ncu.sh", "ncu", "grpo_loss")]
)
def test_a_missing_tool_is_one_line(nsight, script, tool, argument):
    done, calls = nsight(script, argument, without=tool)
    assert (done.returncode, calls) == (2, [])
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"{tool} is not on PATH: install Nsight")
