"""The memory of an iteration by kind: allocations of known sizes in known ranges, and a policy's own."""

import csv

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flowgrove.profiler.events import Trace
from flowgrove.profiler.memory import (
    ACTIVATIONS,
    GRADIENTS,
    GRAPHS,
    KINDS,
    LATENTS,
    OPTIMISER,
    OTHER,
    PICTURES,
    WEIGHTS,
    held,
    size_of,
    timeline,
)
from flowgrove.profiler.memory_plot import plot_memory
from flowgrove.spans import DECODE, OPS, OPTIMIZER, STAGE, TRANSFORMER, span
from flowgrove.update.updater import Updater
from policy_cases import CPU, policy_of, small_recipe

KIB = 2**10
PHASES = {
    "rollout/transformer": TRANSFORMER,
    "rollout/flow_step": OPS,
    "rollout/other": STAGE,
    "reward/decode": DECODE,
    "update/transformer": TRANSFORMER,
    "update/backward": TRANSFORMER,
    "update/optimizer": OPTIMIZER,
}


def kibibytes(count):
    return torch.empty(count * KIB, dtype=torch.uint8)


def an_iteration():
    """Allocates as the stages do, each time another number of KiB."""
    with span("iteration 0"):
        with span("rollout"):
            forest = kibibytes(1)
            with span("step 0"):
                with span("transformer", TRANSFORMER):
                    graph = kibibytes(2)
                    passing = kibibytes(4)
                    del passing
                with span("flow_step", OPS):
                    x_next = kibibytes(8)
        with span("reward"), span("decode", DECODE):
            pictures = kibibytes(16)
            del pictures
        with span("update"), span("update 0"):
            with span("pass 0"):
                with span("transformer", TRANSFORMER):
                    activations = kibibytes(32)
                with span("backward", TRANSFORMER):
                    del graph
                    gradient, passing = kibibytes(64), kibibytes(128)
                    del passing, activations
            with span("optimizer", OPTIMIZER):
                state = kibibytes(256)
                del gradient
    return forest, x_next, state


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = an_iteration()
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    del kept
    return timeline(Trace.read(path), {WEIGHTS: 1000 * KIB, OPTIMISER: 10 * KIB}, PHASES, CPU)


def test_every_block_is_of_the_kind_of_its_range_and_of_its_end(line):
    assert line.peaks == {
        WEIGHTS: 1000 * KIB,
        OPTIMISER: 266 * KIB,
        GRADIENTS: 64 * KIB,
        ACTIVATIONS: 160 * KIB,
        GRAPHS: 2 * KIB,
        LATENTS: 9 * KIB,
        PICTURES: 16 * KIB,
        OTHER: 0,
    }


def test_the_peak_is_of_one_moment_and_the_allocators_own(line):
    assert line.at_peak == {
        WEIGHTS: 1000 * KIB,
        OPTIMISER: 266 * KIB,
        GRADIENTS: 64 * KIB,
        ACTIVATIONS: 0,
        GRAPHS: 0,
        LATENTS: 9 * KIB,
        PICTURES: 0,
        OTHER: 0,
    }
    assert line.peak == sum(line.at_peak.values()) == line.told


def test_the_timeline_is_written_and_drawn(line, tmp_path):
    line.write(tmp_path / "memory.csv")
    with (tmp_path / "memory.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["seconds", *KINDS]
    assert max(sum(int(row[kind]) for kind in KINDS) for row in rows) == line.peak
    assert [float(row["seconds"]) for row in rows] == sorted(float(row["seconds"]) for row in rows)
    plot_memory(line, [("rollout", 0.0, float(line.seconds[-1]))], "memory of $1_000 a.yaml", tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def allocation(time, place, size, total, kind=1, number=0):
    args = {"Bytes": size, "Addr": place, "Total Allocated": total, "Device Type": kind, "Device Id": number}
    return {"name": "[memory]", "ts": time, "tid": 1, "args": args}


def test_on_a_gpu_its_own_blocks_count_and_what_was_there_before_may_go():
    root = {"cat": "user_annotation", "name": "iteration 0", "ts": 0, "dur": 100, "tid": 1}
    events = [
        root,
        allocation(1, 5, 100, 1100),
        allocation(2, 5, 7, 7, kind=0, number=-1),
        allocation(3, 6, 50, 50, number=1),
        allocation(4, 9, -300, 800),
        allocation(5, 5, -100, 700),
    ]
    line = timeline(Trace(events), {WEIGHTS: 600, OTHER: 400}, {}, torch.device("cuda", 0))
    assert (line.peak, line.told) == (1100, 1100)
    assert [int(line.bytes_of[OTHER][place]) for place in (0, -1)] == [400, 100]
    assert set(line.bytes_of[WEIGHTS].tolist()) == {600}


def test_what_stays_is_every_weight_once_and_the_optimisers_state():
    recipe, policy = small_recipe(), policy_of()
    updater = Updater(recipe, policy, None)
    pipe = policy.adapter.pipe
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert policy.transformer in modules
    weights = {
        tensor.data_ptr(): tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers())
    }
    assert held(policy, updater) == {WEIGHTS: sum(weights.values()), OPTIMISER: 0}
    trained = list(policy.weights.trainable().values())
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for group in updater.optimizer.param_groups:
        group["lr"] = 0.0
    updater.optimizer.step()
    policy.weights.drop_gradients()
    moments = 2 * sum(parameter.nbytes for parameter in trained)
    assert moments <= held(policy, updater)[OPTIMISER] <= moments + 8 * len(trained), "and a count of steps each"


def test_sizes_are_told_in_the_unit_that_fits():
    assert [size_of(count) for count in (12, 3 * KIB, 5 * 2**20, 2**31)] == ["12 bytes", "3 KiB", "5 MiB", "2 GiB"]
