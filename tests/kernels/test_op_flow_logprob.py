"""flow_logprob: the log-probability of given steps, bit-equal to the one of flow_step, and its gradient."""

import pytest
import torch

from flowgrove_kernels import NoiseKey, flow_logprob, flow_step, grpo_loss, grpo_loss_and_grad
from kernel_backends import AND_EMULATED
from kernel_cases import ODD_SIZES, mean_and_logp, randn, rollout, stochastic_rows

pytestmark = AND_EMULATED

TREES = {"fanout 1": [1, 1, 1], "fanout 2": [2, 2, 2], "uneven": [2, 0, 3, 1]}


def scored(x, v, x_next, coef, guidance, **children):
    """The logp of the four routes that return it from given steps."""
    edges = torch.ones(x_next.shape[0])
    yield flow_logprob(x, v, x_next, coef, **children, **guidance)
    yield grpo_loss(x, v, x_next, coef, edges, edges, edges, clip_range=0.1, **children, **guidance).logp
    yield grpo_loss(
        x,
        v,
        x_next,
        coef,
        None,
        edges,
        edges,
        clip_range=0.1,
        kl_weight=0.1,
        v_ref=torch.zeros_like(v),
        **children,
        **guidance,
    ).logp
    yield grpo_loss_and_grad(x, v, x_next, coef, edges, edges, edges, clip_range=0.1, **children, **guidance)[0].logp


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("elements", ODD_SIZES)
def test_all_ops_return_the_same_bits_for_the_same_velocity(elements, dtype, guided):
    """MATH §3 (a), for any batch, order, fanout and child_offsets."""
    batch, fanout = 5, 3
    x, v, u, coef = *(randn(batch, elements, seed=i) for i in range(3)), stochastic_rows(batch)
    v, u = v.to(dtype), u.to(dtype)

    def guide(rows):
        return {"v_uncond": u[rows], "guidance_scale": 3.7} if guided else {}

    everything = torch.arange(batch)
    x_next, logp = flow_step(
        x, v, coef, key=NoiseKey(1, 2, 3, 4, torch.arange(batch * fanout)), fanout=fanout, **guide(everything)
    )
    assert logp.unique().numel() == batch * fanout

    for route in scored(x, v, x_next, coef, guide(everything), fanout=fanout):
        assert torch.equal(route, logp)

    order = torch.tensor([4, 1, 3, 0, 2])
    edges = (order[:, None] * fanout + torch.arange(fanout)).flatten()
    for route in scored(x[order], v[order], x_next[edges], coef[order], guide(order), fanout=fanout):
        assert torch.equal(route, logp[edges])

    # children kept of parents 0, 2, 2, 2, 3, 3, 4
    kept = torch.tensor([1, 6, 7, 8, 9, 11, 14])
    offsets = torch.tensor([0, 1, 1, 4, 6, 7])
    for route in scored(x, v, x_next[kept], coef, guide(everything), child_offsets=offsets):
        assert torch.equal(route, logp[kept])

    for e in range(batch * fanout):
        p = torch.tensor([e // fanout])
        for route in scored(x[p], v[p], x_next[e : e + 1], coef[p], guide(p)):
            assert torch.equal(route, logp[e : e + 1])


def test_large_samples_sum_in_one_order_for_any_batch_and_thread_count():
    """Reductions follow a partition that depends on D alone (DESIGN §3.1)."""
    x, v, z, coef = randn(3, 70_001, seed=1), randn(3, 70_001, seed=2), randn(3, 70_001, seed=3), stochastic_rows(3)
    x_next, logp = flow_step(x, v, coef, noise=z)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for p in range(3):
                row = slice(p, p + 1)
                assert torch.equal(flow_step(x[row], v[row], coef[row], noise=z[row])[1], logp[row])
                assert torch.equal(flow_logprob(x[row], v[row], x_next[row], coef[row]), logp[row])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("children", TREES.values(), ids=TREES)
def test_values_and_gradients_equal_autograd_of_the_formula(children):
    case = rollout(children, (3, 21))
    upstream = randn(len(case.parent), seed=9, dtype=torch.float64)
    ours, naive = (case.v.clone().requires_grad_() for _ in range(2))
    logp = flow_logprob(case.x, ours, case.x_next, case.coef, **case.children)
    expected = mean_and_logp(case.x, naive, case.x_next, case.coef, case.parent)[1]
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)
    logp.backward(upstream)
    expected.backward(upstream)
    assert naive.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("children", TREES.values(), ids=TREES)
def test_gradcheck(children, guided):
    case = rollout(children, (5,))
    velocities = [case.v, randn(len(children), 5, seed=9, dtype=torch.float64)] if guided else [case.v]

    def logp(v, u=None):
        return flow_logprob(
            case.x, v, case.x_next, case.coef, **case.children, v_uncond=u, guidance_scale=3.5 if guided else None
        )

    assert torch.autograd.gradcheck(logp, [t.requires_grad_() for t in velocities])


def test_a_parent_without_children_has_gradient_zero():
    case = rollout([2, 0, 1], (63,), dtype=torch.float32)
    v = case.v.requires_grad_()
    flow_logprob(case.x, v, case.x_next, case.coef, **case.children).sum().backward()
    assert torch.equal(v.grad[1], torch.zeros(63))
    assert (v.grad[[0, 2]].abs().amax(1) > 0).all()


def test_guidance_splits_the_gradient():
    case, gamma = rollout([2, 1], (63,)), 3.5
    u = randn(2, 63, seed=9, dtype=torch.float64)
    v, u = case.v.requires_grad_(), u.requires_grad_()
    mixed = (u + gamma * (v - u)).detach().requires_grad_()
    flow_logprob(case.x, v, case.x_next, case.coef, **case.children, v_uncond=u, guidance_scale=gamma).sum().backward()
    flow_logprob(case.x, mixed, case.x_next, case.coef, **case.children).sum().backward()
    torch.testing.assert_close(v.grad, gamma * mixed.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(u.grad, (1 - gamma) * mixed.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_half_precision_velocity_is_the_rounded_fp32_gradient(dtype):
    case = rollout([2, 1, 2], (63,), dtype=torch.float32, v_dtype=dtype)
    half, full = case.v.clone().requires_grad_(), case.v.float().requires_grad_()
    for v in (half, full):
        flow_logprob(case.x, v, case.x_next, case.coef, **case.children).sum().backward()
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, full.grad.to(dtype))


def test_gradients_are_the_same_bits_in_any_batch():
    case = rollout([2, 1, 3, 2], (1031,), dtype=torch.float32)
    v = case.v.requires_grad_()
    flow_logprob(case.x, v, case.x_next, case.coef, **case.children).sum().backward()
    for p in range(4):
        alone = case.v[p : p + 1].detach().requires_grad_()
        mine = case.parent == p
        flow_logprob(
            case.x[p : p + 1], alone, case.x_next[mine], case.coef[[p]], fanout=int(mine.sum())
        ).sum().backward()
        assert torch.equal(alone.grad[0], v.grad[p])


def test_strided_inputs_equal_contiguous_ones():
    x, v, x_next = (randn(3, 7, 5, 4, seed=i).permute(0, 3, 1, 2)[:, ::2, :, 1:] for i in range(3))
    v, dense = v.requires_grad_(), v.detach().contiguous().requires_grad_()
    ours = flow_logprob(x, v, x_next, stochastic_rows(3))
    expected = flow_logprob(x.contiguous(), dense, x_next.contiguous(), stochastic_rows(3))
    assert not x.is_contiguous()
    assert torch.equal(ours, expected)
    assert torch.equal(torch.autograd.grad(ours.sum(), v)[0], torch.autograd.grad(expected.sum(), dense)[0])


@pytest.mark.parametrize(
    ("batch", "children"), [(0, {}), (0, {"fanout": 3}), (3, {"child_offsets": torch.zeros(4, dtype=torch.int64)})]
)
def test_no_edges(batch, children):
    v = torch.zeros(batch, 4, 3, requires_grad=True)
    logp = flow_logprob(torch.zeros(batch, 4, 3), v, torch.zeros(0, 4, 3), stochastic_rows(3)[:batch], **children)
    assert logp.shape == (0,)
    logp.sum().backward()
    assert torch.equal(v.grad, torch.zeros(batch, 4, 3))


X, COEF = torch.zeros(4, 3, 5), stochastic_rows(4)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("x", {"x": X.half()}),
        ("v", {"v": X[:3]}),
        ("v", {"v": X.to("meta")}),
        ("coef", {"coef": COEF[:3]}),
        ("x_next", {"x_next": torch.zeros(3, 3, 5)}),
        ("x_next", {"x_next": X, "fanout": 2}),
        ("x_next", {"x_next": torch.zeros(4, 3, 4)}),
        ("x_next", {"x_next": X.double()}),
        ("x_next", {"x_next": X.to("meta")}),
        ("fanout", {"fanout": 0}),
        ("fanout", {"fanout": 2, "child_offsets": torch.arange(5)}),
        ("child_offsets", {"child_offsets": torch.arange(4)}),
        ("child_offsets", {"child_offsets": torch.arange(5, dtype=torch.int32)}),
        ("child_offsets", {"child_offsets": torch.arange(5, device="meta")}),
        ("guidance_scale", {"v_uncond": X}),
    ],
)
def test_wrong_arguments_are_named(argument, changes):
    flow_logprob(x=X, v=X, x_next=X, coef=COEF)
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        flow_logprob(**{"x": X, "v": X, "x_next": X, "coef": COEF} | changes)


@pytest.mark.parametrize("offsets", [[0, 1, 2, 3, 3], [0, 1, 2, 3, 5], [1, 1, 2, 3, 4], [0, 2, 1, 3, 4]])
def test_child_offsets_rise_from_zero_to_the_number_of_edges(offsets):
    with pytest.raises((ValueError, RuntimeError), match="child_offsets"):
        flow_logprob(X, X, X, COEF, child_offsets=torch.tensor(offsets))
