"""The CUDA kernels on the CPU: the sources that nvcc compiles, compiled by g++ and run with a fiber per thread
(cuda_on_cpu/README.md says what that shows).

The tests of the ops run on them too, as the backend "emulated cuda" (kernel_backends.AND_EMULATED). What is written
here is about parts of rows, passes, paths, threads, launches and traps.
"""

import itertools
import re
import subprocess
from functools import cache

import pytest
import torch

from cuda_on_cpu.emulator import CXX, FAIR, FLAGS, GREEDY, SHUFFLED, SM_80, SM_90
from flowgrove_kernels import (
    NoiseKey,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
    use_backend,
)
from kernel_backends import EMULATED, runs_on
from kernel_cases import LOSS_MODES, loss_arguments, randn, rollout, stochastic_rows
from layouts import one_element_off, rows_at_every_alignment, rows_in_wider_rows
from op_calls import CLIP, assert_close, batch_of, different, every_op

SMALL_CLUSTERS = (9, 232_448, 8)  # the capability, shared memory and cluster size of a device
# shared memory for some of what grpo_loss keeps, and for little or nothing
SOME_ROOM = (9, 48_000, 16)
LITTLE_ROOM = (9, 20_000, 16)
FEW = (9, 232_448, 16, 1)  # multiprocessors, so that a block takes several parts of a row
DEVICES = {
    "sm_80": SM_80,
    "small clusters": SMALL_CLUSTERS,
    "some room": SOME_ROOM,
    "little room": LITTLE_ROOM,
    "few multiprocessors": FEW,
}
pytestmark = runs_on(EMULATED)


def test_the_fibers_are_compiled_without_checked_jumps():
    """A compiler that fortifies by default, as some distributions' do, ended the first run of these tests there."""
    macros = subprocess.run(
        [str(CXX), "-O2", "-D_FORTIFY_SOURCE=2", *FLAGS, "-dM", "-E", "-x", "c++", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_FORTIFY_SOURCE" not in macros.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 63, 1032, 20_003, 66_000])
def test_results_are_as_close_to_those_of_the_reference_as_a_gpu_is_asked_for(size, dtype):
    batch = batch_of(3, size, fanout=3, dtype=dtype)
    found = every_op(batch)
    with use_backend("reference"):
        assert_close(found, every_op(batch))


@cache
def case(rows, size, **options):
    """(a batch, what the ops return for it on an sm_90), once for all tests of that batch."""
    batch = batch_of(rows, size, **options)
    return batch, every_op(batch)


# 1, 1, 2, 5 and 16 parts; 540,672 elements make 17, more than a cluster has
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("size", [129, 1032, 4104, 20_000, 66_000])
def test_every_device_gives_the_same_bits(size, name, emulator):
    """Clusters or a second kernel, residuals kept or computed again."""
    batch, expected = case(2, size, fanout=3, dtype=torch.bfloat16)
    with emulator(DEVICES[name]):
        assert different(every_op(batch), expected) == []


@pytest.mark.parametrize("multiprocessors", [2, 1])
@pytest.mark.parametrize("capability", [8, 9])
def test_a_block_that_takes_several_parts_of_a_row_gives_the_same_bits(capability, multiprocessors, emulator):
    """24 and 12 blocks keep them busy: of 13 rows with 9 parts one block takes 8 and the other 1, or one takes all."""
    batch, expected = case(13, 17_264, fanout=2, dtype=torch.bfloat16)
    with emulator((capability, 232_448, 16, multiprocessors)):
        assert different(every_op(batch), expected) == []


@pytest.mark.parametrize("mode", LOSS_MODES.values(), ids=LOSS_MODES)
@pytest.mark.parametrize("size", [63, 4104])
def test_every_device_gives_the_same_losses(size, mode, emulator):
    case = rollout([2, 0, 5, 1, 0], (size,), dtype=torch.float32)
    positional, options, _ = loss_arguments(case, **mode)

    def results():
        out, *gradients = grpo_loss_and_grad(*positional, **options)
        return dict(
            enumerate(
                [*out, *gradients[: 2 if "guidance_scale" in mode else 1], grpo_loss(*positional, **options).loss]
            )
        )

    expected = results()
    assert torch.equal(expected[0], expected[len(expected) - 1])
    assert all(torch.count_nonzero(gradient[[1, 4]]) == 0 for gradient in list(expected.values())[5:-1])
    for device in DEVICES.values():
        with emulator(device):
            assert different(results(), expected) == []


@pytest.mark.parametrize("device", [SM_80, SM_90, SOME_ROOM])
def test_the_order_in_which_threads_run_does_not_matter(device, emulator):
    for size, fanout in ((129, 3), (4104, 14)):
        batch = batch_of(2, size, fanout=fanout)
        with emulator(device):
            expected = every_op(batch)
        for order in (GREEDY, SHUFFLED):
            with emulator(device, order):
                assert different(every_op(batch), expected) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 1032, 4104])
def test_accesses_of_16_bytes_and_of_one_element_give_the_same_bits(size, dtype):
    batch = batch_of(2, size, dtype=dtype)
    expected = every_op(batch)
    for layout in (one_element_off, rows_at_every_alignment, rows_in_wider_rows):
        assert different(every_op(batch.laid_out(layout)), expected) == []


@pytest.mark.parametrize("mode", ["density", "guard", "guard, kl, guidance"])
@pytest.mark.parametrize("children", [13, 70])
def test_more_children_than_one_pass_takes(children, mode, emulator):
    """12 edges a pass (4 under guard), 64 slopes in shared memory."""
    case = rollout([children, 0, 3], (1032,), dtype=torch.float32)
    positional, options, _ = loss_arguments(case, **LOSS_MODES[mode])
    out, grad, *_ = grpo_loss_and_grad(*positional, **options)
    with use_backend("reference"):
        expected, expected_grad, *_ = grpo_loss_and_grad(*positional, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)
    for device in DEVICES.values():
        with emulator(device):
            again, grad_again, *_ = grpo_loss_and_grad(*positional, **options)
        assert all(torch.equal(left, right) for left, right in zip((*again, grad_again), (*out, grad), strict=True))
    apart = positional[0][case.parent], positional[1][case.parent], positional[2], positional[3][case.parent]
    assert torch.equal(flow_logprob(*apart), out.logp) or mode == "guard, kl, guidance"


def test_rows_of_more_parts_than_a_cluster_has(emulator):
    size = 540_672
    x, v, coef = randn(1, size, seed=1), randn(1, size, seed=2), stochastic_rows(1)
    key = NoiseKey(1, 2, 3, 4, torch.arange(2))
    x_next, logp = flow_step(x, v, coef, key=key, fanout=2)
    with use_backend("reference"):
        expected, expected_logp = flow_step(x, v, coef, key=key, fanout=2)
    torch.testing.assert_close(x_next, expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(logp, expected_logp, rtol=0, atol=1e-6)
    assert torch.equal(flow_logprob(x, v, x_next, coef, fanout=2), logp)
    out, grad, _ = grpo_loss_and_grad(x, v, x_next, coef, logp, torch.ones(2), torch.ones(2), clip_range=0.1, fanout=2)
    assert torch.equal(out.logp, logp)
    assert torch.equal(out.ratio, torch.ones(2))
    slope = -2 * coef.precision * coef.v_coef / size
    residual = (x_next - (coef.x_coef * x + coef.v_coef * v)).sum(0)
    torch.testing.assert_close(grad[0], slope * residual, rtol=1e-3, atol=1e-8)


@cache
def calls(size):
    b = batch_of(2, size, fanout=2)
    return {
        "noise": lambda: philox_normal(b.noise.shape, b.key),
        "estimate": lambda: clean_estimate(b.x, b.v, b.sigma),
        "step": lambda: flow_step(b.x, b.v, b.coef, key=b.key, fanout=2),
        "logprob": lambda: flow_logprob(*b.steps, fanout=2),
        "loss": lambda: grpo_loss(*b.steps, *b.scores, clip_range=CLIP, fanout=2),
        "loss and gradient": lambda: grpo_loss_and_grad(*b.steps, *b.scores, clip_range=CLIP, fanout=2),
    }


@pytest.mark.parametrize(
    ("device", "size", "expected"),
    [
        (SM_90, 1032, (1, 1, 1, 1, 2, 2)),
        (SM_90, 66_000, (1, 1, 1, 1, 2, 2)),
        (SM_80, 1032, (1, 1, 1, 1, 2, 2)),
        (SM_80, 66_000, (1, 1, 2, 2, 3, 4)),
        (SMALL_CLUSTERS, 66_000, (1, 1, 2, 2, 3, 4)),
        (SM_90, 540_672, (1, 1, 2, 2, 3, 4)),
    ],
)
def test_launches(device, size, expected, emulator):
    """One where a row fits a cluster, and one that adds up the loss."""
    with emulator(device):
        assert tuple(emulator.launches(call) for call in calls(size).values()) == expected


FRESH = itertools.count(1)


@pytest.fixture
def unasked(emulator):
    """A device of which nothing was asked yet: answers are kept for the life of the process."""
    return SM_90[0], SM_90[1] - 16 * next(FRESH), SM_90[2]


# accesses of 16 bytes, and of one element as those of empty batches are
@pytest.mark.parametrize("size", [66_000, 66_001])
def test_an_empty_batch_first_leaves_one_pass_to_those_that_follow(size, unasked, emulator):
    batch, expected = case(2, size)
    empty = batch.rows([])
    with emulator(unasked):
        every_op(empty)
        assert different(every_op(batch), expected) == []
        assert tuple(emulator.launches(call) for call in calls(size).values()) == (1, 1, 1, 1, 2, 2)


def test_code_for_older_devices_makes_no_clusters_on_newer_ones(unasked, emulator):
    """It has no cluster barrier in it; the driver compiles it for the device that is there."""
    batch, expected = case(2, 66_000)
    with emulator(unasked):
        emulator.library.emulated_compile_for(80)
        try:
            found, launches = every_op(batch), tuple(emulator.launches(call) for call in calls(66_000).values())
        finally:
            emulator.library.emulated_compile_for(90)
    assert launches == (1, 1, 2, 2, 3, 4)
    assert different(found, expected) == []


@cache
def answered(name):
    """What a call returns of rows of 66,000 elements where the runtime answers all questions."""
    return calls(66_000)[name]()


@pytest.mark.parametrize("question", range(1, 14))
def test_a_question_that_the_runtime_does_not_answer_is_asked_again(question, unasked, emulator):
    """And what its failure leaves behind is not taken for the error of the next one that looks."""
    for name, at_once in (("step", 1), ("loss", 2)):
        call, expected = calls(66_000)[name], answered(name)
        with emulator(unasked):
            emulator.library.emulated_leave_unanswered(question)
            found = call()
            emulator.library.emulated_leave_unanswered(0)
            assert emulator.library.emulated_last_error() == 0
            assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
            assert emulator.launches(call) == at_once


TRAPS = {
    "NoiseKey.node holds a value outside [0, 2**32)": lambda b: philox_normal(
        (4, 3), NoiseKey(1, 2, 3, 4, torch.tensor([0, 1, 2, 2**32]))
    ),
    "NoiseKey.parent holds a value outside [0, 2**32)": lambda b: flow_step(
        b.x, b.v, b.coef, key=NoiseKey(1, 2, 3, 4, 5, torch.tensor([0, 0, -1, 0])), fanout=2
    ),
    "NoiseKey.step must be below 2**31 - 1 for correlated siblings": lambda b: flow_step(
        b.x, b.v, b.coef, key=NoiseKey(1, 2, torch.full((4,), 2**31 - 1), 4, 5, 6), fanout=2, sibling_correlation=0.5
    ),
    "these coefficients need history=, the previous clean estimate: prev_coef is not 0": lambda b: flow_step(
        b.x, b.v, b.multistep
    ),
    "child_offsets must rise from 0 to the number of rows of x_next": lambda b: flow_logprob(
        *b.steps, child_offsets=torch.tensor([0, 2**40, 4])
    ),
}


@pytest.mark.parametrize("device", [SM_80, SM_90])
@pytest.mark.parametrize("size", [3, 9000])
@pytest.mark.parametrize("message", TRAPS)
def test_a_kernel_ends_with_the_line_that_the_reference_says(message, size, device, emulator):
    batch = batch_of(2, size)
    with emulator(device), pytest.raises(RuntimeError, match=f"^{re.escape(message)}\n$"):
        TRAPS[message](batch)
    with use_backend("reference"), pytest.raises(RuntimeError, match=re.escape(message)):
        TRAPS[message](batch)


@pytest.mark.parametrize("order", [FAIR, GREEDY, SHUFFLED])
@pytest.mark.parametrize(("device", "blocks"), [(SM_80, 1), (SM_90, 5)])
@pytest.mark.parametrize("message", TRAPS)
def test_a_line_is_printed_at_most_once_a_block(message, device, blocks, order, emulator):
    """Though a trap takes a while to reach the other threads.
    Where edges have keys of their own, one thread checks each.
    """
    batch = batch_of(2, 9000)
    before = emulator.library.emulated_lines()
    with emulator(device, order), pytest.raises(RuntimeError, match=re.escape(message)):
        TRAPS[message](batch)
    edges_of_a_block = 2 if "parent" in message or "step" in message else 1
    assert 1 <= emulator.library.emulated_lines() - before <= edges_of_a_block * blocks
