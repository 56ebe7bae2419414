"""grpo_loss over batches: siblings merged or apart, any batch, no edges, and arguments that do not fit together."""

import pytest
import torch

from flowgrove_kernels import NoiseKey, grpo_loss, grpo_loss_and_grad
from kernel_backends import AND_EMULATED
from kernel_cases import LOSS_MODES, TREES, loss_arguments, rollout, row, stochastic_rows

pytestmark = AND_EMULATED


@pytest.mark.parametrize("mode", LOSS_MODES.values(), ids=LOSS_MODES)
def test_merged_siblings_equal_separate_rows(mode):
    """DESIGN §2: one row with K children has the loss and the summed gradient of K rows with one child each."""
    case = rollout(TREES["uneven"], (129,))
    positional, ours, _ = loss_arguments(case, **mode)
    x, v, x_next, coef, *per_edge = positional
    merged, grad, _ = grpo_loss_and_grad(*positional, **ours)
    apart = {name: ours[name] if ours[name] is None else ours[name][case.parent] for name in ("v_ref", "v_uncond")}
    options = {name: value for name, value in ours.items() if name != "child_offsets"} | apart
    separate, rows, _ = grpo_loss_and_grad(
        x[case.parent], v[case.parent], x_next, coef[case.parent], *per_edge, **options
    )
    torch.testing.assert_close(separate.loss, merged.loss, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(torch.zeros_like(v).index_add_(0, case.parent, rows), grad, rtol=1e-12, atol=1e-15)
    for left, right in zip(separate[1:], merged[1:], strict=True):
        assert torch.equal(left, right)
    assert not grad[1].any()  # no child, no gradient


@pytest.mark.parametrize("mode", LOSS_MODES.values(), ids=LOSS_MODES)
@pytest.mark.parametrize("size", [1, 63, 1031])
def test_every_row_is_the_same_bits_in_any_batch(size, mode):
    case = rollout(TREES["uneven"], (size,), dtype=torch.float32)
    positional, ours, _ = loss_arguments(case, **mode)
    out, grad, _ = grpo_loss_and_grad(*positional, **ours)
    x, v, x_next, coef, old_logp, advantage, weight = positional
    for p in range(len(x)):
        mine, here = case.parent == p, slice(p, p + 1)
        options = {name: value for name, value in ours.items() if name != "child_offsets"} | {
            "fanout": max(int(mine.sum()), 1)
        }
        options |= {name: ours[name] if ours[name] is None else ours[name][here] for name in ("v_ref", "v_uncond")}
        options |= {"noise": ours["noise"] if ours["noise"] is None else ours["noise"][mine]}
        if not mine.any():
            continue
        alone, alone_grad, _ = grpo_loss_and_grad(
            x[here],
            v[here],
            x_next[mine],
            coef[[p]],
            old_logp if old_logp is None else old_logp[mine],
            advantage[mine],
            weight[mine],
            **options,
        )
        assert torch.equal(alone_grad[0], grad[p])
        assert all(torch.equal(left, right[mine]) for left, right in zip(alone[1:], out[1:], strict=True))


@pytest.mark.parametrize(
    ("batch", "children"), [(0, {}), (0, {"fanout": 2}), (3, {"child_offsets": torch.zeros(4, dtype=torch.int64)})]
)
def test_no_edges(batch, children):
    x, none = torch.zeros(batch, 4, 3), torch.zeros(0)
    v = torch.zeros_like(x).requires_grad_()
    out = grpo_loss(
        x,
        v,
        torch.zeros(0, 4, 3),
        stochastic_rows(3)[:batch],
        none,
        none,
        none,
        clip_range=0.1,
        v_ref=x,
        kl_weight=0.1,
        **children,
    )
    assert out.loss.item() == 0
    assert out.loss.shape == ()
    assert all(t.shape == (0,) for t in out[1:])
    assert out.clipped.dtype == torch.int8
    out.loss.backward()
    assert torch.equal(v.grad, x)


X, EDGES, COEF = torch.zeros(4, 3, 5), torch.ones(4), stochastic_rows(4)
GOOD = {
    "x": X,
    "v": X,
    "x_next": X,
    "coef": COEF,
    "old_logp": EDGES,
    "advantage": EDGES,
    "weight": EDGES,
    "clip_range": 0.1,
}
KEY = NoiseKey(1, 2, 3, 4, torch.arange(4))


@pytest.mark.parametrize("function", [grpo_loss, grpo_loss_and_grad])
@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("x", {"x": X.half()}),
        ("v", {"v": X[..., :4]}),
        ("v", {"v": X.to("meta")}),
        ("x_next", {"x_next": X[:3]}),
        ("x_next", {"x_next": X.double()}),
        ("coef", {"coef": row(1, -0.1, 0, 0.1, 50, 0)}),
        ("old_logp", {"old_logp": torch.ones(3)}),
        ("old_logp", {"old_logp": EDGES.to("meta")}),
        ("advantage", {"advantage": torch.ones(4, 1)}),
        ("advantage", {"advantage": torch.ones(4, dtype=torch.int64)}),
        ("weight", {"weight": torch.ones(())}),
        ("weight", {"weight": EDGES.to("meta")}),
        ("clip_range", {"clip_range": -0.1}),
        ("clip_range", {"clip_range": (0.1, -0.1)}),
        ("fanout", {"fanout": 0}),
        ("x_next", {"fanout": 2}),
        ("child_offsets", {"child_offsets": torch.arange(4)}),
        ("child_offsets", {"child_offsets": torch.arange(5), "fanout": 2}),
        ("ratio", {"ratio": "importance"}),
        ("noise", {"ratio": "guard"}),
        ("noise", {"noise": X}),
        ("key", {"key": KEY}),
        ("key", {"ratio": "guard", "key": KEY, "noise": X}),
        ("noise", {"ratio": "guard", "noise": X[:3]}),
        ("node", {"ratio": "guard", "key": NoiseKey(1, 2, 3, 4, torch.arange(3))}),
        ("sibling_correlation", {"ratio": "guard", "key": KEY, "sibling_correlation": 0.5}),
        ("v_ref", {"kl_weight": 0.1}),
        ("v_ref", {"kl_weight": 0.1, "v_ref": X[:3]}),
        ("kl_weight", {"kl_weight": -0.1, "v_ref": X}),
        ("v_uncond", {"guidance_scale": 2.0}),
        ("guidance_scale", {"v_uncond": X}),
    ],
)
def test_wrong_arguments_are_named(function, argument, changes):
    function(**GOOD)
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        function(**GOOD | changes)
