"""Where an op is called does not change what it returns:
autocast, no_grad, inference_mode, torch.compile, threads, the choice of a backend.
"""

import pytest
import torch

from flowgrove_kernels import (
    available_backends,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    use_backend,
)
from flowgrove_kernels.backends import automatic, implementation, takes
from kernel_cases import randn
from op_calls import CLIP, batch_of, different, every_loss, every_op, every_step

BF16 = torch.bfloat16


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("autocast_dtype", [BF16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_autocast_changes_nothing(dtype, autocast_dtype):
    """States stay fp32 in the forward and gradients in the dtype of v, with the bits they have outside."""
    batch = batch_of(3, 129, dtype=dtype)
    expected = every_op(batch)
    with torch.autocast("cpu", dtype=autocast_dtype):
        found = every_op(batch)
    assert different(found, expected) == []
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in expected.items()
    }


@pytest.mark.usefixtures("backend")
def test_training_a_layer_under_autocast():
    """v leaves a linear layer as bf16; weights, fp32,
    get the gradient that the op gives outside autocast for the same v.
    """
    batch, layer = batch_of(3, 4, 32), torch.nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight.copy_(randn(32, 32, seed=1) / 32**0.5)
        layer.bias.zero_()
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", dtype=BF16):
            v = layer(batch.x)
        with torch.autocast("cpu", dtype=BF16, enabled=inside):
            out = grpo_loss(batch.x, v, batch.x_next, batch.coef, *batch.scores, clip_range=10.0 * CLIP[0], fanout=2)
            x_next, _ = flow_step(batch.x, v, batch.coef, noise=batch.noise, fanout=2)
        assert v.dtype == BF16
        assert out.loss.dtype == x_next.dtype == torch.float32
        grads.append(torch.autograd.grad(out.loss, layer.parameters()))
    assert grads[0][0].abs().max() > 0
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_grad_and_inference_mode_change_nothing(context):
    batch = batch_of(3, 129, dtype=BF16)
    expected = every_step(batch) | every_loss(batch, gradients=False)
    with context():
        found = every_step(batch) | every_loss(batch, gradients=False)
        assert different(found, expected) == []
        made_inside = batch_of(3, 129, dtype=BF16)  # inference tensors
        assert different(every_step(made_inside) | every_loss(made_inside, gradients=False), expected) == []
    assert different(every_step(made_inside), {name: expected[name] for name in every_step(batch)}) == []


@pytest.fixture
def wanting():
    """A batch in which every tensor requires a gradient."""
    batch = batch_of(3, 63)
    for name in LEAVES:
        setattr(batch, name, getattr(batch, name).clone().requires_grad_())
    return batch


LEAVES = ("x", "v", "v_uncond", "v_ref", "history", "x_next", "noise", "sigma", "old_logp", "advantage", "weight")


@pytest.mark.usefixtures("backend")
def test_flow_step_is_not_differentiable_whatever_requires_a_gradient(wanting):
    outputs = flow_step(
        wanting.x,
        wanting.v,
        wanting.multistep,
        noise=wanting.noise,
        history=wanting.history,
        fanout=2,
        **wanting.guidance,
    )
    assert torch.equal(outputs[0], every_step(batch_of(3, 63))["given x_next"])
    assert [t.requires_grad for t in outputs] == [False, False]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("noise", [{}, {"ratio": "guard"}])
def test_the_single_pass_is_not_differentiable_whatever_requires_a_gradient(wanting, noise):
    options = wanting.guidance | {"clip_range": CLIP, "fanout": 2, "v_ref": wanting.v_ref, "kl_weight": 0.3}
    options |= {"ratio": "guard", "noise": wanting.noise} if noise else {}
    found, *grads = grpo_loss_and_grad(*wanting.steps, *wanting.scores, **options)
    assert [t.requires_grad for t in (*found, *grads)] == [False] * 7


@pytest.mark.usefixtures("backend")
def test_only_the_velocities_get_a_gradient(wanting):
    options = wanting.guidance | {"clip_range": CLIP, "fanout": 2, "v_ref": wanting.v_ref, "kl_weight": 0.3}
    out = grpo_loss(*wanting.steps, *wanting.scores, **options)
    assert [t.requires_grad for t in out] == [True, False, False, False, False]
    out.loss.backward()
    flow_logprob(*wanting.steps, fanout=2).sum().backward()
    assert [name for name in LEAVES if getattr(wanting, name).grad is not None] == ["v", "v_uncond"]


@pytest.mark.usefixtures("backend")
def test_only_one_of_the_two_velocities_may_want_a_gradient():
    batch = batch_of(3, 63)
    both = every_loss(batch)["logp grad v"], every_loss(batch)["logp grad v_uncond"]
    for i, name in enumerate(("v", "v_uncond")):
        wants = batch_of(3, 63)
        leaf = getattr(wants, name).requires_grad_()
        logp = flow_logprob(*wants.steps, fanout=2, **wants.guidance)
        assert torch.equal(torch.autograd.grad(logp, leaf, batch.advantage)[0], both[i])


def every_call(velocities, batch):
    """(what is differentiable, everything else that the ops return); a pair (v, v_uncond) for each of four calls."""
    pairs = iter(velocities)

    def call(function, *arguments, **options):
        v, u = next(pairs)
        return function(batch.x, v, *arguments, v_uncond=u, guidance_scale=2.5, **options)

    steps = (batch.x_next, batch.coef)
    logp = call(flow_logprob, *steps, fanout=2)
    density = call(grpo_loss, *steps, *batch.scores, clip_range=CLIP, v_ref=batch.v_ref, kl_weight=0.3, fanout=2)
    guard = call(
        grpo_loss,
        *steps,
        *batch.scores,
        clip_range=CLIP,
        ratio="guard",
        key=batch.key,
        sibling_correlation=0.1,
        fanout=2,
    )
    estimate = call(clean_estimate, batch.sigma)
    single_pass, *grads = grpo_loss_and_grad(
        *batch.steps, None, *batch.scores[1:], clip_range=CLIP, fanout=2, **batch.guidance
    )
    return [logp, density.loss, guard.loss, estimate], [
        *density[1:],
        *guard[1:],
        *single_pass,
        *grads,
        *every_step(batch).values(),
    ]


def with_gradients(function, batch):
    velocities = [(batch.v.clone().requires_grad_(), batch.v_uncond.clone().requires_grad_()) for _ in range(4)]
    differentiable, others = function(velocities, batch)
    gradients = torch.autograd.grad(
        differentiable, [t for pair in velocities for t in pair], [torch.full_like(t, 3.0) for t in differentiable]
    )
    return [*differentiable, *others, *gradients]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_calls_equal_eager_ones(compiler):
    """Every op, forward and backward, in one graph for all backends: an op chooses its backend when it runs.
    A second size makes sizes vary.
    """
    compiled = torch.compile(every_call, fullgraph=True, backend=compiler)
    results = {}
    for rows, size in ((3, 129), (5, 1031)):
        batch = batch_of(rows, size, dtype=BF16)
        for name in [name for name in available_backends() if takes(name, "cpu")]:
            with use_backend(name):
                results[name], expected = with_gradients(compiled, batch), with_gradients(every_call, batch)
            assert [
                i for i, pair in enumerate(zip(results[name], expected, strict=True)) if not torch.equal(*pair)
            ] == []
    # the choice was followed
    assert all(not torch.equal(results[name][0], results["reference"][0]) for name in results if name != "reference")


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_around_one_call():
    batch = batch_of(3, 129)
    compiled = torch.compile(flow_step, fullgraph=True, backend="inductor")
    ours, expected = (
        function(batch.x, batch.v, batch.coef, noise=batch.noise, fanout=2) for function in (compiled, flow_step)
    )
    assert all(torch.equal(left, right) for left, right in zip(ours, expected, strict=True))


@pytest.mark.parametrize("how", ["use_backend", "environment", "nothing"])
def test_auto_is_the_best_backend_for_the_device(how, monkeypatch):
    batch = batch_of(2, 63)
    with use_backend(automatic("cpu")):
        expected, chosen = every_op(batch), implementation("flow_step", batch.x)
    monkeypatch.delenv("FLOWGROVE_BACKEND", raising=False)
    if how == "use_backend":
        monkeypatch.setenv("FLOWGROVE_BACKEND", "reference")
        with use_backend("reference"), use_backend("auto"):
            assert implementation("flow_step", batch.x) is chosen
            found = every_op(batch)
    else:
        if how == "environment":
            monkeypatch.setenv("FLOWGROVE_BACKEND", "auto")
        assert implementation("flow_step", batch.x) is chosen
        found = every_op(batch)
    assert different(found, expected) == []


@pytest.fixture
def threads():
    """Sets the number of threads; puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in available_backends(), reason='the "cpu" backend is not compiled here')
@pytest.mark.parametrize(("rows", "size"), [(1, 200_000), (5, 40_007), (7, 1031)])
def test_results_do_not_depend_on_the_number_of_threads(rows, size, threads):
    """A thread takes rows, or parts of a row where there are few rows."""
    batch, found = batch_of(rows, size, dtype=torch.bfloat16), []
    with use_backend("cpu"):
        for count in (1, 2):
            threads(count)
            found.append(every_op(batch))
    assert different(*found) == []
