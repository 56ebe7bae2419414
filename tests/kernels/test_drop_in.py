"""recipes/drop_in.py: the plain loop and the one with fused ops give the same numbers."""

from subprocesses import ROOT, python

SCRIPT = ROOT / "recipes" / "drop_in.py"


def test_both_loops_give_the_same_numbers():
    done = python(SCRIPT, "--device", "cpu", "--steps", "4", "--samples", "6")
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[1:]]
    assert [name for name, *_ in rows] == ["samples", "log-probabilities", "loss", "gradient of all weights"]
    for name, plain, fused, difference in rows:
        assert float(plain) > 0, name
        assert abs(float(plain) - float(fused)) <= 1e-3 * float(plain), name
        assert float(difference) <= 1e-5, name
