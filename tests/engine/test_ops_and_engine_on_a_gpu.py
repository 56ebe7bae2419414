"""What only a CUDA GPU can show of the ops and of the engine: `make test-gpu`."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from flowgrove.credit import assign_credit
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.rewards.registry import Rewards
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from flowgrove_kernels import (
    NoiseKey,
    StepCoefficients,
    available_backends,
    flow_logprob,
    flow_step,
    grpo_loss_and_grad,
    philox_normal,
    use_backend,
)
from kernel_cases import randn, stochastic_rows
from op_calls import CLIP, GPU_SIZES, assert_close, batch_of, different, every_op, rows_of
from policy_cases import TEXTS, plan_and_coefficients, runner_of, small_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
FUSED = [name for name in ("triton", "cuda") if name in available_backends()]


@pytest.fixture(params=FUSED)
def fused(request):
    with use_backend(request.param):
        yield request.param


def on_gpu(value):
    if isinstance(value, torch.Tensor | StepCoefficients):
        return value.to("cuda")
    return replace(value, **{f.name: on_gpu(getattr(value, f.name)) for f in fields(value) if f.name != "fanout"})


@pytest.fixture
def no_syncs():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_both_fused_backends_are_here():
    assert FUSED == ["triton", "cuda"], (
        "make install compiles the CUDA ops where torch is a CUDA build and nvcc is found"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", GPU_SIZES)
def test_every_op_agrees_with_the_reference(elements, dtype, fused):
    batch = on_gpu(batch_of(3, elements, dtype=dtype))
    ours = every_op(batch)
    with use_backend("reference"):
        expected = every_op(batch)
    assert_close(ours, expected)


@pytest.mark.parametrize("elements", GPU_SIZES)
def test_rows_have_the_same_bits_in_any_batch_and_in_every_run(elements, fused):
    batch = batch_of(5, elements, dtype=torch.bfloat16)
    together = every_op(on_gpu(batch))
    assert different(every_op(on_gpu(batch)), together) == []
    for row in (0, 3):
        alone = rows_of(every_op(on_gpu(batch.rows([row]))), [0], batch.fanout)
        expected = rows_of({name: value.cpu() for name, value in together.items()}, [row], batch.fanout)
        assert different({name: value.cpu() for name, value in alone.items()}, expected) == []


@pytest.mark.parametrize("elements", GPU_SIZES)
def test_all_ops_return_the_same_log_probability(elements, fused):
    b = on_gpu(batch_of(4, elements, dtype=torch.bfloat16))
    x_next, logp = flow_step(b.x, b.v, b.coef, key=b.key, fanout=2)
    assert torch.equal(flow_logprob(b.x, b.v, x_next, b.coef, fanout=2), logp)
    result, *_ = grpo_loss_and_grad(b.x, b.v, x_next, b.coef, logp, b.advantage, b.weight, clip_range=CLIP, fanout=2)
    assert torch.equal(result.logp, logp)
    assert torch.equal(result.ratio, torch.ones_like(logp))


@pytest.mark.skipif(
    "cuda" not in FUSED or "cpu" not in available_backends(), reason="compares the two compiled backends"
)
def test_compiled_noise_is_the_same_bits_on_cpu_and_gpu():
    key = NoiseKey(1, 2, 3, 4, torch.arange(3))
    with use_backend("cpu"):
        expected = philox_normal((3, 100_003), key)
    with use_backend("cuda"):
        assert torch.equal(philox_normal((3, 100_003), key, device="cuda").cpu(), expected)


def test_a_captured_graph_follows_new_keys_and_coefficients(fused):
    b, coef = on_gpu(batch_of(4, 4096)), stochastic_rows(8).to("cuda")
    key = replace(b.key, node=torch.arange(4), parent=None).packed(4, "cuda")
    rows, x, x_next = coef[:4], b.x.clone(), torch.empty_like(b.x)

    def work():
        sample, logp = flow_step(x, b.v, rows, key=key)
        x_next.copy_(sample)
        return logp, *grpo_loss_and_grad(x, b.v, x_next, rows, logp, b.advantage[:4], b.weight[:4], clip_range=CLIP)[
            1:2
        ]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = work()
    for step in (5, 6):
        key.step.fill_(step)
        for ours, other in zip(rows.tensors(), coef[4:].tensors(), strict=True):
            ours.copy_(other)
        graph.replay()
        found = [t.clone() for t in captured]
        assert all(torch.equal(left, right) for left, right in zip(found, work(), strict=True))


def test_a_side_stream_is_used(fused):
    b, stream = on_gpu(batch_of(4, 20_000)), torch.cuda.Stream()
    expected = flow_step(b.x, b.v, b.coef, noise=b.noise, fanout=2)[0]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x = b.x + 0
        found = flow_step(x, b.v, b.coef, noise=b.noise, fanout=2)[0]
    stream.synchronize()
    assert torch.equal(found, expected)


def test_no_op_waits_for_the_gpu(fused, no_syncs):
    b = batch_of(4, 4096)
    torch.cuda.set_sync_debug_mode("default")  # copies of the inputs wait
    b = on_gpu(b)
    every_op(b)  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    every_op(b)


def test_log_probabilities_of_more_than_2_31_elements(fused):
    x, v, x_next = (randn(1, 32_768, seed=i).cuda() for i in range(3))
    many, coef = 70_000, stochastic_rows(1).to("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logp = flow_logprob(
        x.expand(many, -1), v.expand(many, -1), x_next.expand(many, -1), coef[torch.zeros(many, dtype=torch.int64)]
    )
    assert torch.equal(logp, flow_logprob(x, v, x_next, coef).expand(many))
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.skipif("cuda" not in FUSED, reason="the CUDA ops are not here")
@pytest.mark.parametrize("elements", [4096, 65_536, 129_600, 131_072])
def test_a_step_is_one_launch_where_a_row_fits_a_cluster(elements):
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no thread-block clusters")
    b = on_gpu(batch_of(4, elements))
    key = b.key.packed(8, "cuda")
    with use_backend("cuda"):
        flow_step(b.x, b.v, b.coef, key=key, fanout=2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            flow_step(b.x, b.v, b.coef, key=key, fanout=2)
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    assert "flow_step" in kernels[0]


def test_rollout_and_update_never_wait_for_the_gpu(no_syncs):
    torch.cuda.set_sync_debug_mode("default")
    recipe = small_recipe(
        model={"adapter": "sd3", "path": "tiny", "dtype": "bf16", "gradient_checkpointing": False},
        engine={"device": "cuda"},
    )
    policy = Policy.load(recipe, torch.device("cuda"))
    prompts, updater = policy.encode(TEXTS), Updater(recipe, policy, runner_of(policy, recipe))
    plan, rows = plan_and_coefficients(recipe)
    rows = rows.to("cuda")
    for mode in ("default", "error"):  # the first round loads and compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=0, iteration=0)
        torch.cuda.set_sync_debug_mode("default")
        credit = assign_credit(
            plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0]
        )
        torch.cuda.set_sync_debug_mode(mode)
        stats = updater.run([Rolled(policy, forest, prompts, credit, rows)])
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack([t.double().sum() for t in stats.loss]).isfinite().all()


def test_a_whole_iteration_never_waits_for_the_gpu_unasked(no_syncs, tmp_path):
    """Decoding, a reward on the host, credit, the gradient's noise and metrics included: what they read is copied
    beside the queue.
    """
    torch.cuda.set_sync_debug_mode("default")
    recipe = small_recipe(
        model={"adapter": "sd3", "path": "tiny", "dtype": "bf16", "gradient_checkpointing": False},
        data={"prompts": "unused.txt", "embedding_cache": str(tmp_path)},  # encoders read their own tokens back
        reward=[{"name": "jpeg_size"}],
        engine={"device": "cuda"},
        run={"gradient_noise_every": 1},
    )
    policy = Policy.load(recipe, torch.device("cuda"), TEXTS)
    stages = Stages(
        Setup(recipe), policy, Updater(recipe, policy, runner_of(policy, recipe)), Rewards(recipe, policy.device)
    )
    for mode in ("default", "error"):  # the first round loads and compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        line = stages.run(TEXTS, 0)
    torch.cuda.set_sync_debug_mode("default")
    assert line["train_passes"] > 0
    assert line["loss"] is not None
    assert line["gradient_noise"]["all"] > 0
    assert all(seconds >= 0 for seconds in line["seconds"].values())
