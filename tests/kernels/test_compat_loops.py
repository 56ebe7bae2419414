"""recipes/compat.py: each trainer's loop gives the same numbers with its plain step and with the import changed."""

import pytest

from subprocesses import ROOT, python

SCRIPT = ROOT / "recipes" / "compat.py"
SMALL = ("--device", "cpu", "--steps", "5", "--samples", "4", "--rounds", "1", "--latents", "2", "3", "7", "5")


@pytest.mark.parametrize("trainer", ["flow_grpo", "dance_grpo", "mix_grpo", "diffusers"])
def test_both_loops_give_the_same_numbers(trainer):
    numbers, times = python(SCRIPT, trainer, *SMALL, env={"OMP_NUM_THREADS": "1"}).stdout.split("\n\n")
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
