"""The CUDA kernels on a GPU: against the reference and the emulated kernels (test_cuda_emulated.py), in graphs, on
streams, without synchronisation.

Accuracy for every op, mode, dtype and size is in test_every_backend.py, which takes the GPU too where there is one.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cuda_on_cpu.emulator import CXX, Emulator, compiled
from flowgrove_kernels import (
    NoiseKey,
    available_backends,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    native,
    philox_normal,
    use_backend,
)
from kernel_cases import LOSS_MODES, loss_arguments, randn, rollout, stochastic_rows
from layouts import every_second_row, one_element_off, rows_at_every_alignment, rows_in_wider_rows, transposed
from op_calls import CLIP, assert_close, batch_of, different, every_op, moved, rows_of
from subprocesses import python

HERE = torch.cuda.is_available() and "cuda" in available_backends()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="needs a GPU and the compiled CUDA ops"),
    pytest.mark.usefixtures("backend"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_SIZES = (1, 3, 63, 129, 1031, 20_003)
LATENT = 129_600  # 16 parts: one cluster a row


@pytest.fixture
def backend():
    torch.use_deterministic_algorithms(True)  # what torch.empty returns is NaN
    with use_backend("cuda"):
        yield "cuda"
    torch.use_deterministic_algorithms(False)


def on_gpu(batch):
    return replace(batch, **{f.name: getattr(batch, f.name).to("cuda") for f in fields(batch) if f.name != "fanout"})


def gpu_batch(*arguments, **options):
    return on_gpu(batch_of(*arguments, **options))


def has_clusters():
    return torch.cuda.get_device_capability()[0] >= 9


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*ODD_SIZES, 8, 1032, 66_000])
def test_results_are_those_of_the_reference(size, dtype):
    batch = gpu_batch(3, size, fanout=3, dtype=dtype)
    found = every_op(batch)
    with use_backend("reference"):
        expected = every_op(batch)
    assert_close(found, expected)


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1032, 20_003, 66_000])
def test_results_are_the_bits_of_the_emulated_kernels(size, dtype, kept, monkeypatch):
    """Only exp is rounded elsewhere than in these sources:
    ratios and what follows from them may differ in their last bit.
    """
    batch = batch_of(2, size, fanout=3, dtype=dtype)
    found = {name: value.cpu() for name, value in every_op(on_gpu(batch)).items()}
    Emulator(compiled(kept))
    monkeypatch.setattr(native, "_ops", torch.ops.flowgrove_emulated)
    with use_backend("cpu"):
        emulated = every_op(batch)
    rounded = {
        name
        for name in found
        if name.startswith(("density", "guard")) and name.split()[-1] not in ("logp", "kl", "clipped")
    }
    assert set(different(found, emulated)) <= rounded
    assert_close({name: found[name] for name in rounded}, {name: emulated[name] for name in rounded}, part=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", [transposed, every_second_row, rows_in_wider_rows, one_element_off, rows_at_every_alignment]
)
@pytest.mark.parametrize("shape", [(63,), (3, 7, 5), (4, 258), (2, 8200)])
def test_strided_and_unaligned_inputs_give_the_same_bits(shape, layout, dtype):
    if layout is transposed and len(shape) < 2:
        pytest.skip("one dimension has nothing to transpose")
    batch = gpu_batch(3, *shape, dtype=dtype)
    strided = replace(
        batch,
        **{
            name: layout(getattr(batch, name).cpu())
            for name in ("x", "v", "v_uncond", "v_ref", "history", "x_next", "noise")
        },
    )
    assert different(every_op(like(strided, batch)), every_op(batch)) == []


def like(strided, batch):
    """The tensors of `strided` on the GPU, with their strides and their place in a storage."""

    def moved(value):
        storage = torch.empty(value.untyped_storage().nbytes() // value.itemsize + 16, dtype=value.dtype, device="cuda")
        start = value.data_ptr() % 16 // value.itemsize
        return storage[start:].as_strided(value.shape, value.stride()).copy_(value)

    return replace(
        batch,
        **{
            name: moved(getattr(strided, name))
            for name in ("x", "v", "v_uncond", "v_ref", "history", "x_next", "noise")
        },
    )


# ---- the same bits in any batch and in every op ----


@pytest.mark.parametrize(
    ("size", "dtype"), [(63, torch.bfloat16), (1031, torch.float32), (16_385, torch.bfloat16), (66_000, torch.float16)]
)
def test_a_row_has_the_same_bits_in_any_batch(size, dtype):
    batch = gpu_batch(5, size, fanout=3, dtype=dtype)
    together = every_op(batch)
    for index in ([0], [3], [4, 2, 0, 1, 3], [1, 1, 4]):
        assert different(every_op(batch.rows(index)), rows_of(together, index, 3)) == []
    for _ in range(3):
        assert different(every_op(batch), together) == []


@pytest.mark.parametrize("size", [129, 20_003, LATENT, 540_672, 4_838_400])
def test_every_op_returns_the_log_probability_of_the_step(size):
    x, v, coef = randn(2, size, seed=1).cuda(), randn(2, size, seed=2).cuda().bfloat16(), stochastic_rows(2).to("cuda")
    key = NoiseKey(1, 2, 3, 4, torch.arange(6, device="cuda"))
    x_next, logp = flow_step(x, v, coef, key=key, fanout=3)
    assert torch.equal(x_next, flow_step(x, v, coef, noise=philox_normal(x_next.shape, key), fanout=3)[0])
    ones, kept = torch.ones(6, device="cuda"), [0, 3, 4]
    offsets = torch.tensor([0, 1, 3], device="cuda")
    assert torch.equal(flow_logprob(x, v, x_next, coef, fanout=3), logp)
    assert torch.equal(flow_logprob(x, v, x_next[kept], coef, child_offsets=offsets), logp[kept])
    out, _, _ = grpo_loss_and_grad(x, v, x_next, coef, logp, ones, ones, clip_range=0.1, fanout=3)
    assert torch.equal(out.logp, logp)
    assert torch.equal(out.ratio, ones)


@pytest.mark.parametrize("mode", ["density", "guard", "guard, kl, guidance"])
@pytest.mark.parametrize("children", [13, 70])
@pytest.mark.parametrize("size", [1032, 66_000])
def test_more_children_than_one_pass_takes(size, children, mode):
    """12 edges a pass (4 under guard), 64 slopes in shared memory;
    the log-probabilities are those of the edges alone.
    """
    with use_backend("reference"):  # on the CPU
        case = rollout([children, 0, 3], (size,), dtype=torch.float32)
    positional, options, _ = moved(loss_arguments(case, **LOSS_MODES[mode]), "cuda")
    found = grpo_loss_and_grad(*positional, **options)
    with use_backend("reference"):
        expected = grpo_loss_and_grad(*positional, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    again = grpo_loss_and_grad(*positional, **options)
    assert all(
        torch.equal(left, right) for left, right in zip((*found[0], found[1]), (*again[0], again[1]), strict=True)
    )
    apart = positional[0][case.parent], positional[1][case.parent], positional[2], positional[3][case.parent]
    assert torch.equal(flow_logprob(*apart), found[0].logp) or mode == "guard, kl, guidance"


def test_inputs_of_more_than_2_31_elements():
    """70,000 rows of 32,768 elements, every row the same one, read with stride 0."""
    rows, size = 70_000, 32_768
    x, v, x_next = (randn(1, size, seed=i).cuda() for i in range(3))
    coef = stochastic_rows(1).to("cuda")
    alone = flow_logprob(x, v, x_next, coef)
    spread = [t.expand(rows, size) for t in (x, v, x_next)]
    assert torch.equal(flow_logprob(*spread, coef[[0] * rows]), alone.expand(rows))


# ---- graphs, streams, devices ----


def test_a_captured_step_follows_its_key_and_coefficients():
    batch = gpu_batch(4, LATENT, fanout=2, dtype=torch.bfloat16)
    key = batch.key.packed(8, "cuda")

    def step():
        return flow_step(batch.x, batch.v, batch.coef, key=key, fanout=2, sibling_correlation=0.1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for change in (
        lambda: None,
        lambda: key.node.add_(7),
        lambda: key.step.fill_(9),
        lambda: batch.coef.std.mul_(1.5),
        lambda: batch.x.mul_(0.5),
    ):
        change()
        graph.replay()
        assert all(torch.equal(left, right) for left, right in zip(captured, step(), strict=True))


def test_a_captured_loss_follows_its_inputs():
    batch = gpu_batch(4, LATENT, fanout=2, dtype=torch.bfloat16)

    def loss():
        out, *gradients = grpo_loss_and_grad(
            *batch.steps, *batch.scores, clip_range=CLIP, fanout=2, v_ref=batch.v_ref, kl_weight=0.1, **batch.guidance
        )
        return [*out, *gradients]

    loss()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss()
    for change in (lambda: None, batch.advantage.neg_, lambda: batch.coef.v_coef.mul_(1.1), lambda: batch.v.mul_(1.01)):
        change()
        graph.replay()
        assert all(torch.equal(left, right) for left, right in zip(captured, loss(), strict=True))


def test_ops_run_on_the_current_stream():
    """Inputs that a side stream is still writing when the op is called there."""
    batch = gpu_batch(4, LATENT)
    expected = every_op(batch)
    waiting = replace(batch, x=torch.zeros_like(batch.x))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        waiting.x.copy_(batch.x)
        found = every_op(waiting)
    side.synchronize()
    assert different(found, expected) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_ops_run_on_the_device_of_their_tensors():
    batch = batch_of(3, 1031)
    there = replace(batch, **{f.name: getattr(batch, f.name).to("cuda:1") for f in fields(batch) if f.name != "fanout"})
    found = every_op(there)
    assert torch.cuda.current_device() == 0
    assert all(value.device.index == 1 for value in found.values())
    assert (
        different(
            {name: value.cpu() for name, value in found.items()},
            {name: value.cpu() for name, value in every_op(on_gpu(batch)).items()},
        )
        == []
    )


def test_no_call_synchronises():
    batch = gpu_batch(4, 66_000, fanout=2, dtype=torch.bfloat16)
    key = batch.key.packed(8, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        philox_normal(batch.noise.shape, key)
        clean_estimate(batch.x, batch.v, batch.sigma, **batch.guidance)
        flow_step(batch.x, batch.v, batch.multistep, key=key, fanout=2, history=batch.history, sibling_correlation=0.1)
        flow_logprob(*batch.steps, fanout=2)
        v = batch.v.detach().requires_grad_()
        grpo_loss(
            batch.x, v, *batch.steps[2:], *batch.scores, clip_range=CLIP, fanout=2, ratio="guard", key=key
        ).loss.backward()
        flow_logprob(batch.x, v, *batch.steps[2:], fanout=2).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(function):
    """Names of what a call launches, in order."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = sorted(
        (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA),
        key=lambda e: e.time_range.start,
    )
    return [e.name for e in events if "sync" not in e.name.lower()]


@pytest.mark.parametrize("size", [1032, LATENT, 540_672])
def test_launches(size):
    """One where a row fits a cluster (or one block), and one that adds up the loss."""
    torch.use_deterministic_algorithms(False)  # it would fill outputs with NaN, one launch each
    batch = gpu_batch(4, size, fanout=2, dtype=torch.bfloat16)
    key, one = batch.key.packed(8, "cuda"), torch.ones((), device="cuda")
    at_once = size == 1032 or (size == LATENT and has_clusters())
    calls = {
        "flow_step": (lambda: flow_step(batch.x, batch.v, batch.coef, key=key, fanout=2), 1 if at_once else 2),
        "flow_logprob": (lambda: flow_logprob(*batch.steps, fanout=2), 1 if at_once else 2),
        "grpo_loss": (lambda: grpo_loss(*batch.steps, *batch.scores, clip_range=CLIP, fanout=2), 2 if at_once else 3),
        "grpo": (lambda: torch.ops.flowgrove.grpo_loss_and_grad(one, *op_arguments(batch)), 2 if at_once else 4),
    }
    for name, (call, count) in calls.items():
        launched = kernels(call)
        assert len(launched) == count, launched
        assert any(name in kernel for kernel in launched)


def op_arguments(batch):
    c, nothing = batch.coef, None
    rows = (batch.x, batch.v, batch.x_next, c.x_coef, c.v_coef, c.prev_coef, c.std, c.precision, c.log_norm)
    return *rows, *batch.scores, nothing, nothing, nothing, nothing, nothing, False, *CLIP, batch.fanout, 0.0, 0.0, 1.0


# ---- a user's mistakes: the kernel ends with one line, and with it the program's use of the GPU ----

MISTAKE = """
import torch
from flowgrove_kernels import NoiseKey, flow_logprob, flow_step, step_coefficients, use_backend
x = torch.zeros(4, 9000, device="cuda")
coef = step_coefficients("dance_sde", 0.9, 0.8, noise_level=0.3)[[0] * 4].to("cuda")
with use_backend("{backend}"):
    {call}
    torch.cuda.synchronize()
"""
MISTAKES = {
    "NoiseKey.node holds a value outside [0, 2**32)": (
        "flow_step(x, x, coef, key=NoiseKey(1, 2, 3, 4, torch.tensor([0, 1, 2, -1], device='cuda')))"
    ),
    "NoiseKey.step must be below 2**31 - 1": (
        "flow_step(x, x, coef, sibling_correlation=0.5, key=NoiseKey(1, 2, x[:, 0].long() + 2**31 - 1, 4, 0, 0))"
    ),
    "prev_coef is not 0": "coef.prev_coef.fill_(1); flow_step(x, x, coef)",
    "child_offsets must rise from 0": (
        "flow_logprob(x, x, x, coef, child_offsets=torch.tensor([0, 1, 2**40, 3, 4], device='cuda'))"
    ),
}


@pytest.mark.parametrize("with_kernels_of", ["cuda", "triton"])
@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_ends_the_kernel_with_a_line(message, with_kernels_of):
    if with_kernels_of not in available_backends():
        pytest.skip(f"{with_kernels_of} is not available here")
    done = python("-c", MISTAKE.format(call=MISTAKES[message], backend=with_kernels_of), check=False, timeout=300)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
