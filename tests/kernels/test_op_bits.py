"""Results are the same bits in any batch, from run to run and in every op that computes them
(MATH §3 (a), DESIGN §3.1).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from flowgrove_kernels import flow_logprob, flow_step, grpo_loss, grpo_loss_and_grad
from kernel_backends import AND_EMULATED
from kernel_cases import randn, stochastic_rows
from op_calls import batch_of, different, every_op, rows_of

pytestmark = AND_EMULATED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIVE = ([0], [3], [4, 2, 0, 1, 3], [1, 1, 4])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1, torch.float32), (63, torch.bfloat16), *((1031, dtype) for dtype in DTYPES), (16_385, torch.bfloat16)],
)
def test_a_row_alone_permuted_or_repeated_has_the_bits_it_has_in_a_batch_of_five(size, dtype):
    batch = batch_of(5, size, fanout=3, dtype=dtype)
    together = every_op(batch)
    for index in FIVE:
        assert different(every_op(batch.rows(index)), rows_of(together, index, 3)) == []


@pytest.mark.parametrize("size", [3, 129, 1024])
def test_a_row_has_the_same_bits_in_a_batch_of_64(size):
    batch = batch_of(64, size, dtype=torch.bfloat16)
    together = every_op(batch)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    for index in ([63], [17, 40], list(range(8, 13)), shuffled):
        assert different(every_op(batch.rows(index)), rows_of(together, index, 2)) == []


@pytest.mark.parametrize(("rows", "size"), [(3, 1031), (5, 40_007)])
def test_results_do_not_depend_on_the_run(rows, size):
    batch = batch_of(rows, size, dtype=torch.bfloat16)
    assert different(every_op(batch), every_op(batch)) == []


def test_ops_called_from_several_threads_at_once_do_not_meet():
    batches = [batch_of(3, 1031, seed=10 * i) for i in range(3)]
    alone = [every_op(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(every_op, batches * 3))
    assert [different(ours, expected) for ours, expected in zip(together, alone * 3, strict=True)] == [[]] * 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 129, 1031])
def test_a_broken_row_leaves_the_others_alone(value, size):
    """A NaN or an infinity in everything that row 2 holds."""
    batch, others = batch_of(5, size), [0, 1, 3, 4]
    broken = replace(
        batch,
        **{
            name: getattr(batch, name).clone() for name in ("x", "v", "v_uncond", "v_ref", "history", "x_next", "noise")
        },
    )
    for name in ("x", "v", "v_uncond", "v_ref", "history"):
        getattr(broken, name)[2] = value
    for name in ("x_next", "noise"):
        getattr(broken, name)[4:6] = value
    found = every_op(broken)
    assert different(rows_of(found, others, 2), rows_of(every_op(batch), others, 2)) == []
    mine = rows_of(found, [2], 2)
    assert not any(
        torch.isfinite(mine[name]).any() for name in ("estimate", "given x_next", "given logp", "logp", "density kl")
    )
    if value != value:  # noqa: PLR0124 (NaN)
        assert all(torch.isnan(found[name]) for name in ("density loss", "guard loss"))


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16_384, 20_003])
def test_long_rows_have_the_log_probability_that_their_step_returned(size, dtype, guided, layout):
    """For fanout, for CSR offsets with childless parents,
    and for one row with all children of a batch of equal rows.
    """
    x, v, u = (randn(3, size, seed=i) for i in range(3))
    v, u, coef = v.to(dtype), u.to(dtype), stochastic_rows(3)
    if layout == "strided":
        x, v, u = (t.T.contiguous().T for t in (x, v, u))
    options = {"v_uncond": u, "guidance_scale": 3.7} if guided else {}
    x_next, logp = flow_step(x, v, coef, noise=randn(6, size, seed=5), fanout=2, **options)
    kept, offsets = torch.tensor([1, 4, 5]), torch.tensor([0, 1, 1, 3])
    ones = torch.ones(6)
    for edges, children in ((torch.arange(6), {"fanout": 2}), (kept, {"child_offsets": offsets})):
        steps, scores = (x, v, x_next[edges], coef), (logp[edges], ones[edges], ones[edges])
        assert torch.equal(flow_logprob(*steps, **children, **options), logp[edges])
        found, _, _ = grpo_loss_and_grad(*steps, *scores, clip_range=0.1, **children, **options)
        assert torch.equal(found.logp, logp[edges])
        assert torch.equal(found.ratio, ones[edges])  # so the ratio is exactly 1
        assert torch.equal(grpo_loss(*steps, *scores, clip_range=0.1, **children, **options).logp, logp[edges])


def test_a_hundred_children_of_one_row_have_the_bits_they_have_apart():
    x, v, coef = randn(1, 129, seed=1), randn(1, 129, seed=2), stochastic_rows(1)
    x_next, logp = flow_step(x, v, coef, noise=randn(100, 129, seed=3), fanout=100)
    apart = flow_logprob(x.expand(100, 129), v.expand(100, 129), x_next, coef[[0] * 100])
    assert torch.equal(flow_logprob(x, v, x_next, coef, fanout=100), logp)
    assert torch.equal(apart, logp)
    many = flow_logprob(
        x.expand(3, 129), v.expand(3, 129), x_next, coef[[0] * 3], child_offsets=torch.tensor([0, 0, 100, 100])
    )
    assert torch.equal(many, logp)
