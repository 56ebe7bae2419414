"""One command that says whether this repository works on the GPU at hand, and how
fast, within minutes and without network.

    make gpu-kit                       # before, where there is a network: what the GPU machine lacks, in .gpu-kit/
    python3 profiling/gpu_check.py 1   # there: are the kernels right, how fast are they (at most 6 minutes)
    python3 profiling/gpu_check.py 2   # whatever was mended, then the engine on a slim FLUX (at most 5.5 minutes)
    python3 profiling/gpu_check.py 1 --dry-run   # the same rows on a CPU, with tiny shapes

Every step is a row: a name, the seconds it may take and a command, in a process group of its own; one that fails or
hangs stops none of the others. What they print goes to gpu_check_N.log in $OUT (default: runs/gpu_check), figures
beside it. The last lines printed are a table.
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from gpu_kit import KIT, LIBRARIES, ROOT, sources_digest

FAILURES = "failures.txt"
MOST_CHARACTERS = 11_500  # of the last lines
MOST_LOG = 15 * 2**20
PACKAGE = ROOT / "kernels" / "flowgrove_kernels"
_PROFILE = 32  # lines: the table of phases, memory, idle gaps and advice
_GRACE = 5  # seconds between asking a step to end and ending it


class Step(NamedTuple):
    """`seconds`: what it may take."""

    name: str
    seconds: float
    command: list[str]
    environment: Mapping[str, str] = MappingProxyType({})


class Outcome(NamedTuple):
    """`code`: the exit status, or why there is none."""

    step: Step
    code: int | str
    seconds: float
    output: str

    @property
    def told(self) -> str:
        """In a word."""
        return "ok" if self.code == 0 else f"exit {self.code}" if isinstance(self.code, int) else self.code


def main() -> None:
    """Runs the steps of one call and prints the table; ends with 1 if a step did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", type=int, choices=(1, 2))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes: shows that every row runs")
    parser.add_argument("--only", help="steps by name, with commas between")
    parser.add_argument("--pytest", default="-m gpu tests", help="what call 2 tests again")
    parser.add_argument(
        "--dtypes", default="bf16,fp32", help="of the velocity, where ops are measured beside compiled ones"
    )
    parser.add_argument("--seconds", type=float, help="what all steps may take together; default: 360 and 330")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / FAILURES).unlink(missing_ok=True)
    began = time.time()
    deadline = time.monotonic() + (options.seconds or {1: 360, 2: 330}[options.call])
    python, environment = prepared(out, options.dry_run)
    wanted = (options.only or "").split(",")
    steps = [step for step in all_steps(options, python, out) if not options.only or step.name in wanted]
    with (out / f"gpu_check_{options.call}.log").open("w", encoding="utf-8") as log:
        outcomes = [run(step, environment, log, deadline) for step in steps]
    table = "\n".join(report(outcomes, out, began))
    _pack_plots(out)
    (out / f"gpu_check_{options.call}.txt").write_text(table + "\n", encoding="utf-8")
    print(table if len(table) <= MOST_CHARACTERS else table[:MOST_CHARACTERS] + "\n(the rest is in the .txt)")
    sys.exit(any(outcome.code != 0 for outcome in outcomes))


# ---- before the steps: packages and libraries ----


def prepared(out: Path, dry: bool) -> tuple[str, dict[str, str]]:
    """(the interpreter, the environment of every step): the kit's wheels on the path, op libraries in place."""
    roots = [
        str(ROOT / "engine"),
        str(ROOT / "kernels"),
        str(ROOT / "profiling"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    quiet = {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    quiet["FIRST_FAILURES"] = str(out / FAILURES)
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(roots), "TERM": "dumb", "COLUMNS": "200"}
    if dry:
        return sys.executable, {**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    site = Path("/tmp/flowgrove-site")
    wheels = sorted(map(str, (KIT / "wheels").glob("*.whl")))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    install += ["--no-cache-dir", "--upgrade", "--target", str(site)]
    began = time.monotonic()
    if wheels and subprocess.run([*install, *wheels], check=False).returncode:
        print("the kit's wheels cannot be installed: the steps run with what this Python has")
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *roots])
    print(f"{len(wheels)} wheels: {time.monotonic() - began:.0f} s; {_libraries(environment, out)}", flush=True)
    return sys.executable, environment


def _libraries(environment: dict[str, str], out: Path) -> str:
    """Puts the prebuilt op libraries where the package looks, or builds them for the visible card; says which."""
    if _suits(environment):
        for name in LIBRARIES:
            shutil.copy2(KIT / "lib" / name, PACKAGE)
        if _loads(environment):
            return "prebuilt libraries load"
    began = time.monotonic()
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with (out / "build.log").open("w", encoding="utf-8") as log:
        insisting = {**environment, "FLOWGROVE_CUDA": "1", "MAX_JOBS": "16"}
        subprocess.run(build, cwd=ROOT, env=insisting, stdout=log, stderr=subprocess.STDOUT, check=False)
    loaded = _loads(environment)
    if loaded:
        (out / "build.log").unlink()
    told = "load" if loaded else "do not load, see build.log"
    return f"libraries built here in {time.monotonic() - began:.0f} s: they {told}"


def _suits(environment: dict[str, str]) -> bool:
    """Whether the kit's libraries are of these sources, this torch and this card."""
    try:
        kit = json.loads((KIT / "kit.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    asked = "import torch; print(torch.__version__.split('+')[0], *torch.cuda.get_device_capability(), sep='.')"
    told = _told(asked, environment)
    return kit["sources"] == sources_digest() and told == f"{kit['torch']}.{kit['architecture'].rstrip('a')}"


def _loads(environment: dict[str, str]) -> bool:
    return "'cuda'" in _told("import flowgrove_kernels as fk; print(fk.available_backends())", environment)


def _told(program: str, environment: dict[str, str]) -> str:
    """What a line of Python prints in that environment."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


# ---- the steps ----


def all_steps(options: argparse.Namespace, python: str, out: Path) -> list[Step]:
    """The rows of a call."""
    return (_first if options.call == 1 else _second)(options, python, out)


def _first(options: argparse.Namespace, python: str, out: Path) -> list[Step]:
    dry = options.dry_run
    command, script = [python, "-m", "flowgrove"], lambda name: [python, str(ROOT / "profiling" / name)]
    ops = [*command, "bench", "ops", "--out", str(out)]
    recipe = [*command, "train", str(ROOT / "recipes" / "quickstart.yaml")]
    recipe += ["--out", tempfile.mkdtemp(prefix="flowgrove-")]
    short = ["run.iterations=1", "run.eval_every=0", "run.checkpoint_every=0", "data.prompts_per_iteration=1"]
    short += ["rollout.group_size=2", "rollout.steps=3", "rollout.window.size=1", "update.updates_per_iteration=1"]
    short += ["rollout.tree={splits: [0], fanout: 2}"]
    long = ["engine.device=cuda", "engine.cuda_graphs=true", "run.iterations=30"]
    engine = [*command, "bench", "engine", "--out", str(out), "--rounds", "1"]
    smoke = [*script("gpu_smoke.py"), "--plain"]
    families = [*smoke, "--families", "--rows", "2", "--sizes"]
    counters = ["gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "dram__bytes.sum"]
    counters += ["sm__warps_active.avg.pct_of_peak_sustained_active", "launch__registers_per_thread"]
    counters += ["sm__throughput.avg.pct_of_peak_sustained_elapsed", "launch__cluster_size"]
    ncu = ["ncu", "--clock-control", "none", "--metrics", ",".join(counters), "--launch-count", "3"]
    ncu += ["--kernel-name", "regex:^(flow_step|grpo_loss)"]
    sanitizer = ["compute-sanitizer", "--print-limit", "3", "--error-exitcode", "9"]
    # Racecheck is the slowest of the three, and Triton's compiler places the barriers of its kernels itself.
    ours = ["--ops", "flow_step,grpo_loss", *([] if dry else ["--backends", "cuda"])]
    tools = ("memcheck", "racecheck", "synccheck")
    memory, races, barriers = ([] if dry else [*sanitizer, "--tool", tool] for tool in tools)
    mid = ["--model", "sd3_mid", "--recipes", "mix,branch_mix", "--levers", "ends"]
    if dry:
        mid = ["--recipes", "branch_mix_flash:ours"]
    return [
        Step("ceilings", 40, script("gpu_ceilings.py")),
        Step("smoke", 60, [*script("gpu_smoke.py"), *(["--sizes", "63"] if dry else [])]),
        *_op_steps(ops, dry, "sd35_512,wan_480p81,wide", "bf16,fp32"),
        Step("tests", 150, _pytest(python, dry, "-m gpu tests"), {"OMP_NUM_THREADS": "1"}),
        Step("recipe", 60, [*recipe, *(word for key in (short if dry else long) for word in ("--set", key))]),
        Step("engine sd3_mid", 60, [*engine, "--prompts", "1", *mid]),
        Step("counters", 40, [*([] if dry else ncu), *smoke, "--rows", "16", "--sizes", "63" if dry else "129600"]),
        Step("sanitizer", 60, [*memory, *families, "63" if dry else "63,1032,66000"]),
        Step("races", 60, [*races, *families, "63" if dry else "1032,66000", *ours]),
        Step("barriers", 40, [*barriers, *families, "63" if dry else "66000"]),
    ]


def _second(options: argparse.Namespace, python: str, out: Path) -> list[Step]:
    dry = options.dry_run
    command = [python, "-m", "flowgrove"]
    bench = [*command, "bench"]
    model = "sd3_mid" if dry else "flux_slim"
    # the cheapest first: in it the default lever warms up
    recipes = ["branch_mix_flash", *([] if dry else ["grove", "branch_mix", "mix"]), "dance:published"]
    engine = ["--model", "tiny" if dry else model, "--recipes", ",".join(recipes), "--levers", "ends"]
    engine += ["--precision", "int8" if dry else "fp8"]
    every = ["--prompts", "1", "--rounds", "1", "--out", str(out)]
    script = [python, str(ROOT / "profiling" / "profile_model.py")]
    profile = [*script, "--model", "tiny" if dry else model, "--prompts", "1"]
    scaling = ["--leaves", "1,4,16,64,256", "--prompts", "1,4,16,64"]
    eager = ["--modes", "eager,recorded,fp8,fp8+recorded,attention", "--rows", "1,2,4,8", "--repeats", "5"]
    compiled = ["--modes", "compiled,fp8+compiled", "--rows", "1,4"]
    if dry:
        scaling = ["--leaves", "1,2,4", "--prompts", "1,2,3"]
        eager, compiled = (
            ["--modes", modes, "--rows", "1", "--repeats", "1"] for modes in ("eager,int8,_native_math", "eager")
        )
    rows = [*bench, "rows", "--model", model]
    masked = "tiny" if dry else "qwen_slim"
    split = ["--modes", "eager,split" if dry else "eager,split,attention", "--rows", "1" if dry else "1,2,4"]
    split += ["--repeats", "1" if dry else "5"]
    return [
        Step("ceilings", 40, [python, str(ROOT / "profiling" / "gpu_ceilings.py")]),
        *_op_steps([*bench, "ops", "--out", str(out)], dry, "sd35_512,wan_480p81,wide,row_64m", options.dtypes),
        Step("engine", 210, [*bench, "engine", *engine, *every]),
        Step("tests", 150, _pytest(python, dry, options.pytest), {"OMP_NUM_THREADS": "1"}),
        Step("rows", 100, [*rows, *eager, "--out", str(out)]),
        Step("profile", 75, profile),
        Step("rows compiled", 120, [*rows, *compiled, "--json"]),
        Step("rows of masked texts", 90, [*bench, "rows", "--model", masked, *split, "--out", str(out)]),
        Step("scaling", 40, [*bench, "scaling", *scaling, "--rounds", "1" if dry else "3", "--out", str(out)]),
    ]


def _op_steps(ops: list[str], dry: bool, shapes: str, dtypes: str) -> list[Step]:
    """Compiled at one shape only, for each is compiled anew."""
    if dry:
        some = [*ops, "--keep", "--contenders", "eager,cpu", "--rounds", "2", "--dtypes", "bf16", "--shapes"]
        return [Step("ops compiled", 70, [*some, "2x63", "--only", "grpo_loss"]), Step("ops", 75, [*some, "3x63"])]
    compiled = ["--keep", "--contenders", "eager,compiled,triton,cuda", "--shapes", "flux_720", "--dtypes", dtypes]
    return [
        Step("ops compiled", 70, [*ops, *compiled]),
        Step("ops", 75, [*ops, "--keep", "--contenders", "eager,triton,cuda", "--shapes", shapes, "--rounds", "30"]),
    ]


def _pytest(python: str, dry: bool, what: str) -> list[str]:
    """The GPU's tests on most cores, each worker with one thread of its own."""
    plugin = ["-p", "no:cacheprovider", "-p", "gpu_tests", "--tb=short"]
    if dry:
        return [python, "-m", "pytest", *plugin, "tests/engine/test_spans.py", "-m", "not gpu and not long"]
    return [python, "-m", "pytest", *plugin, "-n", "14", "--durations", "15", *what.split()]


# ---- running and telling ----


def run(step: Step, environment: dict[str, str], log, deadline: float) -> Outcome:
    """Runs a step in a process group of its own, at most as long as it and the whole call may take."""
    seconds = min(step.seconds, deadline - time.monotonic())
    if seconds < 1:
        return Outcome(step, "no time left", 0, "")
    print(f"{step.name} …", flush=True)
    began = time.monotonic()
    output = Path(log.name).with_suffix(".step")
    code: int | str
    with output.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**environment, **step.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step, f"not found: {error.filename}", 0, "")
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"over {seconds:.0f} s"
        finally:
            _end(process)
    spent, told = time.monotonic() - began, output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    if log.tell() < MOST_LOG:
        log.write(f"\n===== {step.name}: {' '.join(step.command)}\n{told[-(2**21) :]}\n")
        log.write(f"===== {step.name}: {code} after {spent:.1f} s\n")
        log.flush()
    return Outcome(step, code, spent, told)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of a step's process group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue


def report(outcomes: list[Outcome], out: Path, began: float = 0.0) -> Iterator[str]:
    """The lines of the table; figures of files written since `began`, in seconds of the clock."""
    by_name = {outcome.step.name: outcome for outcome in outcomes}
    yield "==== gpu_check"
    if "ceilings" in by_name:
        yield " ".join(by_name["ceilings"].output.strip().splitlines()[-1:])
    for outcome in outcomes:
        last = next((line for line in reversed(outcome.output.splitlines()) if line.strip()), "")
        yield f"{outcome.step.name:16} {outcome.told:14} {outcome.seconds:6.1f} s  {last.strip()[:110]}"
    for outcome in outcomes:
        yield from _failures(outcome)
    if (out / FAILURES).exists():
        told = (out / FAILURES).read_text(encoding="utf-8").splitlines()
        yield f"{len(told)} tests failed; the first lines:"
        yield from (f"  {line[:230]}" for line in told[:30])
    yield from _ops(out, began)
    yield from _engine(out, began)
    yield from _rows(out, began)
    if "counters" in by_name:
        yield from _counters(by_name["counters"].output)
    if "profile" in by_name:
        yield from (line[:160] for line in by_name["profile"].output.splitlines()[-_PROFILE:])


def _pack_plots(out: Path) -> None:
    """All plots as one file: some machines send back eight files at most."""
    with zipfile.ZipFile(out / "plots.zip", "w") as packed:
        for path in sorted(out.rglob("*.png")):
            packed.write(path, path.relative_to(out))
            path.unlink()


def _failures(outcome: Outcome) -> Iterator[str]:
    """The first line of each failed test, and the lines that say wrong."""
    lines = outcome.output.splitlines()
    found = [line for line in lines if re.match(r"ERROR |WRONG|.* is left out", line)]
    if outcome.code != 0 and not found:
        found = [line for line in lines if line.strip()][-6:]
    yield from (f"  {outcome.step.name}: {line[:220]}" for line in found[:25])
    if len(found) > 25:
        yield f"  {outcome.step.name}: and {len(found) - 25} more"


def _tables(out: Path, pattern: str, began: float) -> Iterator[dict[str, str]]:
    for path in sorted(path for path in out.rglob(pattern) if path.stat().st_mtime >= began):
        with path.open(encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _ops(out: Path, began: float) -> Iterator[str]:
    """By graph replay all but the first figure, where there is one."""
    rows = list(_tables(out, "ops_*.csv", began))
    if rows:
        figures = "      us graph us    GB/s % copy x eager x compiled"
        yield f"{'op':13} {'case':17} {'shape':11} v    {'contender':14} {figures}"
    for row in rows:
        prefix = "graph_" if row["graph_us"] else ""
        figures = [
            row[f"{prefix}{name}"]
            for name in ("gb_per_s", "percent_of_copy", "speedup_vs_eager", "speedup_vs_compiled")
        ]
        yield (
            f"{row['op']:13} {row['case']:17} {row['shape']:11} {row['dtype']} {row['contender']:14} "
            f"{row['median_us']:>8} {row['graph_us']:>8} " + " ".join(f"{figure:>7}" for figure in figures)
        )


def _engine(out: Path, began: float) -> Iterator[str]:
    """What the published loop was not run for stays empty."""
    rows = list(_tables(out, "engine_*.csv", began))
    if rows:
        told = "passes         s  rows× perrow×     × predicted dance rows× dance× outside    GiB"
        yield f"{'recipe':17} {'lever':20} {told}"
    for row in rows:
        passes = f"{float(row['rollout_forwards']):.0f}+{float(row['train_passes']):.0f}"
        gib = f"{float(row['peak_memory_bytes']) / 2**30:.1f}" if row["peak_memory_bytes"] else ""
        widths = {"rows_speedup": 6, "per_row_speedup": 7, "speedup": 5, "predicted_speedup": 9}
        widths |= {"rows_over_dance": 11, "over_dance": 6}
        ratios = " ".join(f"{row[key] and format(float(row[key]), '.2f'):>{width}}" for key, width in widths.items())
        told = f"{passes:9} {float(row['seconds']):6.3f} {ratios} {float(row['percent_outside']):6.1f}% {gib:>6}"
        yield f"{row['recipe']:17} {row['lever']:20} {told}"


def _rows(out: Path, began: float) -> Iterator[str]:
    rows = list(_tables(out, "rows_*.csv", began))
    if rows:
        yield "blocks  rows mode          forward ms  train ms  TFLOP/s"
    for row in rows:
        figures = [
            f"{float(row[key]):9.3f}" if row[key] else " " * 9
            for key in ("forward_ms", "train_ms", "forward_tflop_per_s")
        ]
        derived = "derived" if row["derived"] == "True" else ""
        yield f"{row['blocks']:7} {row['rows']:>4} {row['mode']:13} {' '.join(figures)} {derived}"


def _counters(output: str) -> Iterator[str]:
    for line in output.splitlines():
        if re.match(r"\s+(gpu__|dram__|sm__|launch__)", line) or re.match(r"\s+\w+_kernel", line):
            yield " ".join(line.split())[:150]


if __name__ == "__main__":
    main()
