"""From ranges to the table of phases: whose seconds are whose, what they add up to, and the rates that come of them."""

import threading
from contextvars import copy_context
from itertools import count

import pytest
import torch

from flowgrove.profiler import clock
from flowgrove.profiler.clock import Spent, Stopwatch
from flowgrove.profiler.phases import BETWEEN, Names, phases_of
from flowgrove.profiler.table import Measured, phase_table, utilisation
from flowgrove.spans import DECODE, OPS, REWARD, STAGE, TRANSFORMER, listening, span

CPU = torch.device("cpu")


def spent(path, seconds, kind=STAGE, rows=0, tokens=0, passes=1, beside=False):
    return Spent(path, beside, kind, passes, rows, tokens, seconds)


# 10 s, of which 0.5 lie between the stages
ITERATION = [
    spent("iteration 3", 10.0),
    spent("iteration 3/plan", 0.5),
    spent("iteration 3/rollout", 4.0),
    spent("iteration 3/rollout/step 0", 1.0),
    spent("iteration 3/rollout/step 0/transformer", 0.75, TRANSFORMER, rows=2, tokens=20),
    spent("iteration 3/rollout/step 1", 2.5),
    spent("iteration 3/rollout/step 1/transformer", 1.25, TRANSFORMER, rows=6, tokens=60, passes=3),
    spent("iteration 3/rollout/step 1/flow_step", 0.5, OPS, rows=6, passes=3),
    spent("iteration 3/reward", 1.0),
    spent("iteration 3/reward/shapes", 0.25, REWARD, rows=8),
    spent("iteration 3/update", 4.0),
    spent("iteration 3/update/update 0", 3.5),
    spent("iteration 3/update/update 0/pass 0", 3.0, rows=5, tokens=50),
    spent("iteration 3/update/update 0/pass 0/backward", 2.5, TRANSFORMER, rows=5, tokens=50),
    spent("iteration 3/reward", 9.0, beside=True),
    spent("iteration 3/reward/decode", 2.0, DECODE, rows=8, beside=True),
]


def seconds_by_name(phases, beside=False):
    return {phase.name: phase.seconds for phase in phases if phase.beside == beside}


def test_the_phases_of_an_iteration_are_exclusive_and_add_up_to_it():
    phases = phases_of(ITERATION)
    assert seconds_by_name(phases) == {
        "plan": 0.5,
        "rollout/transformer": 2.0,
        "rollout/flow_step": 0.5,
        "rollout/other": pytest.approx(0.5 + 0.25 + 0.75),
        "reward/shapes": 0.25,
        "reward/other": 0.75,
        "update/backward": 2.5,
        "update/other": pytest.approx(0.5 + 0.5 + 0.5),
        BETWEEN: pytest.approx(0.5),
    }
    assert sum(seconds_by_name(phases).values()) == pytest.approx(10.0)
    assert seconds_by_name(phases, beside=True) == {"reward/decode": 2.0}, "not the iteration's own time"
    assert phases[-1].beside
    assert list(seconds_by_name(phases))[-1] == BETWEEN


def test_passes_rows_and_tokens_are_counted_where_the_work_is():
    by_name = {phase.name: phase for phase in phases_of(ITERATION)}
    forward, other = by_name["rollout/transformer"], by_name["update/other"]
    assert (forward.passes, forward.rows, forward.tokens) == (4, 8, 80)
    assert (other.passes, other.rows, other.tokens) == (0, 0, 0), "pass 0 says again what is in it"


def test_several_iterations_become_one_of_their_mean():
    second = [one._replace(path=one.path.replace("iteration 3", "iteration 4")) for one in ITERATION]
    once, mean = phases_of(ITERATION), phases_of([*ITERATION, *second], iterations=2)
    assert mean == once


def test_a_name_may_hold_a_slash_and_stages_need_no_iteration():
    names = Names(["iteration 0/credit", "iteration 0/rollout/step 1/reward/a", "rollout/step 2/transformer"])
    assert names.of("iteration 0/credit") == "credit"
    assert names.of("iteration 0/rollout/step 1/reward/a") == "rollout/reward/a"
    assert names.of("iteration 0/rollout/step 1") == "rollout/other"
    assert names.of("rollout/step 2/transformer") == "rollout/transformer"
    assert names.of("iteration 0") == names.of(None) == BETWEEN


def test_the_stopwatch_adds_up_what_the_clock_says_on_every_thread(monkeypatch):
    """Each reading of the clock is a second after the one before."""
    ticks = count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))
    watch = Stopwatch(CPU)

    def beside():
        with span("decode", DECODE, 2):
            pass

    with listening(watch), span("iteration 0"):
        for rows in (3, 4):
            with span("transformer", TRANSFORMER, rows, 10 * rows):
                pass
        thread = threading.Thread(target=copy_context().run, args=(beside,))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError), span("failed", TRANSFORMER, 8):
            raise RuntimeError
    assert watch.read() == [
        Spent("iteration 0", False, STAGE, 1, 0, 0, 8.0),
        Spent("iteration 0/transformer", False, TRANSFORMER, 2, 7, 70, 2.0),
        Spent("iteration 0/decode", True, DECODE, 1, 2, 0, 1.0),
    ]


class FakeEvent:
    """An event of a GPU whose clock is one second on at every record."""

    ticks = count()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "a stream of cuda:0"
        self.time = next(self.ticks)

    def synchronize(self):
        assert self.time is not None

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


def test_on_a_gpu_ranges_lie_between_events_of_their_stream_and_nothing_waits_before_they_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"a stream of {device}")
    watch = Stopwatch(torch.device("cuda", 0))
    with listening(watch), span("iteration 0"):
        for _ in range(2):
            with span("transformer", TRANSFORMER, 3):
                pass
    assert [(one.path, one.seconds, one.rows) for one in watch.read()] == [
        ("iteration 0", 5.0, 0),
        ("iteration 0/transformer", 2.0, 6),
    ]
    assert [one.seconds for one in watch.read()] == [5.0, 2.0], "read once more"


def test_rates_are_work_over_exclusive_seconds_and_shares_of_what_the_device_can_do():
    path = "iteration 3/rollout/step {}/transformer"
    measured = Measured(
        spent=ITERATION,
        seconds=10.0,
        iterations=1,
        flops={(path.format(0), False): 1e12, (path.format(1), False): 3e12, ("iteration 3/reward/decode", True): 8e12},
        bytes_of={"iteration 3/rollout/step 1/flow_step": 10**9, "iteration 3/rollout": 5},
        launches={"rollout/transformer": 40},
        waits={"reward/decode": 2},
    )
    rows = {(row["phase"], row["beside"]): row for row in phase_table(measured, matrix_rate=8e12, copy_rate=4e9)}
    forward = rows["rollout/transformer", False]
    assert (forward["tflop"], forward["tflop_per_s"], forward["utilisation"]) == (4.0, 2.0, 0.25)
    assert (forward["share"], forward["launches"], forward["gb"]) == (0.2, 40, None)
    step = rows["rollout/flow_step", False]
    assert (step["gb"], step["gb_per_s"], step["share_of_copy"]) == (1.0, 2.0, 0.5)
    assert step["tflop_per_s"] is None
    decode = rows["reward/decode", True]
    assert (decode["tflop_per_s"], decode["utilisation"], decode["waits"]) == (4.0, 0.5, 2)
    assert rows["rollout/other", False]["gb"] is None, "bytes of calls that stand in no range of an op"
    assert utilisation(list(rows.values()), 8e12) == pytest.approx(4 / 2.0 / 8), "of the transformer alone"
    assert utilisation([], 8e12) is None
