"""What the passes of a profile leave behind for each other, and on which thread they score."""

from types import SimpleNamespace

import pytest

from flowgrove.profiler.events import Trace
from flowgrove.profiler.session import Session
from policy_cases import CPU


def session_of(**parts):
    """One without a model."""
    session = Session.__new__(Session)
    vars(session).update(parts)
    return session


def test_passes_recorded_while_what_is_compiled_ran_eagerly_are_forgotten():
    done = []
    session = session_of(runner=SimpleNamespace(forget=lambda: done.append("forgotten")), run=done.append)
    assert session.counted(3) == {}
    assert done == [3, "forgotten"]


def test_only_the_traced_iterations_score_on_their_own_thread(tmp_path):
    threaded = []
    stages = SimpleNamespace(scores_on_a_thread=True)
    session = session_of(device=CPU, stages=stages, run=lambda _: threaded.append(stages.scores_on_a_thread))
    session.timed(1)
    session.traced(1, tmp_path / "trace.json.gz")
    session.timed(1)
    assert threaded == [True, False, True]
    assert not Trace.read(tmp_path / "trace.json.gz").on_gpu

    def fails(_):
        raise RuntimeError

    session.run = fails
    with pytest.raises(RuntimeError):
        session.traced(1, tmp_path / "trace.json.gz")
    assert stages.scores_on_a_thread
