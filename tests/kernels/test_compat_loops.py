"""recipes/compat.py: each trainer's loop gives the same numbers with its plain step and with the import changed."""

import pytest

from subprocesses import ROOT, python

SCRIPT = ROOT / "recipes" / "compat.py"
SMALL = ("--device", "cpu", "--steps", "5", "--samples", "4", "--rounds", "1", "--latents", "2", "3", "7", "5")
TRAINERS = ("flow_grpo", "dance_grpo", "mix_grpo", "diffusers")
# The script for one trainer after another in one process: it spends most of its time on imports.
ALL = """
import runpy, sys
script, trainers, *options = sys.argv[1:]
for trainer in trainers.split():
    sys.argv = [script, trainer, *options]
    runpy.run_path(script, run_name="__main__")
    print("=====")
"""


@pytest.fixture(scope="module")
def printed():
    """Trainer → what the script prints for it."""
    done = python("-c", ALL, SCRIPT, " ".join(TRAINERS), *SMALL, env={"OMP_NUM_THREADS": "1"})
    return dict(zip(TRAINERS, done.stdout.split("=====\n")[:-1], strict=True))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_both_loops_give_the_same_numbers(trainer, printed):
    numbers, times = printed[trainer].split("\n\n")
    rows = [line.rsplit(maxsplit=3) for line in numbers.splitlines()[1:]]
    assert [name for name, *_ in rows] == ["samples", "log-probabilities", "losses", "gradient of all weights"]
    for name, plain, compat, difference in rows:
        assert float(plain) > 0, name
        assert abs(float(plain) - float(compat)) <= 1e-3 * float(plain), name
        assert float(difference) <= 1e-5, name
    title, *timed = times.splitlines()
    assert "CPU, 1 threads" in title
    assert [line.rsplit(maxsplit=2)[0] for line in timed] == [
        "sampled [4, 4, 8, 8]",
        "scored, with its gradient [4, 4, 8, 8]",
        "sampled [2, 3, 7, 5]",
        "scored, with its gradient [2, 3, 7, 5]",
    ]
    assert all(float(number) > 0 for line in timed for number in line.rsplit(maxsplit=2)[1:])
