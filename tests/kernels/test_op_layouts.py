"""Inputs may lie in memory in any way and have any size:
results are those of contiguous tensors, and nothing beyond the outputs is written.
"""

from dataclasses import replace

import pytest
import torch

from flowgrove_kernels import (
    StepCoefficients,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
)
from kernel_backends import AND_EMULATED
from kernel_cases import randn, rollout, row, stochastic_rows
from layouts import LAYOUTS
from op_calls import batch_of, different, every_op

pytestmark = AND_EMULATED

GUARD = 64  # elements


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((63,), torch.float32), ((3, 7, 5), torch.bfloat16), ((2, 515), torch.float16)]
)
def test_strided_inputs_equal_contiguous_ones(shape, layout, dtype):
    batch = batch_of(3, *shape, dtype=dtype)
    strided = batch.laid_out(layout)
    assert torch.equal(strided.x, batch.x)
    found = every_op(strided)
    assert different(found, every_op(batch)) == []
    assert all(value.is_contiguous() for value in found.values())


def test_channels_last_inputs():
    batch = batch_of(3, 4, 5, 6, dtype=torch.bfloat16)
    found = every_op(batch.laid_out(lambda t: t.contiguous(memory_format=torch.channels_last)))
    assert different(found, every_op(batch)) == []
    assert all(value.is_contiguous() for value in found.values())


@pytest.mark.parametrize("shape", [(63,), (3, 43), (1031,)])
def test_expanded_inputs_equal_their_copies(shape):
    """Stride 0 over rows, and over the elements of a row."""
    batch = batch_of(3, *shape)
    for spread in (
        lambda t: t[:1].expand(t.shape),
        lambda t: t[..., :1].expand(t.shape),
        lambda t: t.flatten()[0].expand(t.shape),
    ):
        assert (
            different(
                every_op(batch.laid_out(spread)),
                every_op(batch.laid_out(lambda t, spread=spread: spread(t).contiguous())),
            )
            == []
        )


def test_values_per_row_and_edge_may_be_strided():
    batch = batch_of(4, 129)

    def spread(value):
        return torch.stack([value, torch.full_like(value, 77)], dim=1)[:, 0]

    def spread_rows(coef):
        return StepCoefficients(*(spread(column) for column in coef.tensors()))

    scores = {name: spread(getattr(batch, name)) for name in ("sigma", "node", "old_logp", "advantage", "weight")}
    strided = replace(batch, **scores, coef=spread_rows(batch.coef), multistep=spread_rows(batch.multistep))
    assert not strided.node.is_contiguous()
    assert different(every_op(strided), every_op(batch)) == []


def test_child_offsets_may_be_strided():
    case = rollout([2, 0, 3, 1], (63,), dtype=torch.float32)
    offsets = torch.stack([case.children["child_offsets"], torch.full((5,), -1)], dim=1)[:, 0]
    ours = grpo_loss_and_grad(*case.positional(), clip_range=0.1, child_offsets=offsets)
    expected = grpo_loss_and_grad(*case.positional(), clip_range=0.1, **case.children)
    assert not offsets.is_contiguous()
    assert torch.equal(ours[1], expected[1])
    assert torch.equal(flow_logprob(case.x, case.v, case.x_next, case.coef, child_offsets=offsets), expected[0].logp)


def test_velocities_of_several_dtypes_are_promoted():
    """A reference velocity in fp32 beside one in bf16;
    float64 velocities, which are rounded to the fp32 of the state.
    """
    batch = batch_of(3, 129, dtype=torch.bfloat16)
    expected = every_op(batch)
    assert different(every_op(replace(batch, v_ref=batch.v_ref.float())), expected) == []
    wide = replace(batch, **{name: getattr(batch, name).double() for name in ("v", "v_uncond", "v_ref")})
    found = every_op(wide)
    assert all(found[name].dtype == torch.float64 for name in found if "grad" in name)
    full = every_op(replace(batch, **{name: getattr(batch, name).float() for name in ("v", "v_uncond", "v_ref")}))
    assert (
        different({name: value.float() if value.is_floating_point() else value for name, value in found.items()}, full)
        == []
    )


class Fences:
    """Every new tensor lies between two fences of 77s; `broken` counts those that were written on."""

    def __init__(self, monkeypatch):
        self.storages = []
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
            monkeypatch.setattr(owner, name, self.fenced(getattr(owner, name)))

    def fenced(self, allocate):
        def between_fences(*args, **kwargs):
            plain = allocate(*args, **kwargs)
            storage = plain.new_full((plain.numel() + 2 * GUARD,), 77)
            self.storages.append(storage)
            return storage[GUARD : GUARD + plain.numel()].view(plain.shape)

        return between_fences

    def broken(self):
        return sum(bool((s[:GUARD] != 77).any() or (s[-GUARD:] != 77).any()) for s in self.storages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 63, 129, 1031, 16_385])
def test_nothing_is_written_beyond_an_output(size, dtype, backend, monkeypatch):
    batch = batch_of(3, size, dtype=dtype)
    with monkeypatch.context() as patch:
        fences = Fences(patch)
        found = every_op(batch)
        assert fences.broken() == 0
        torch.empty(3).as_strided((1,), (1,), GUARD + 3).zero_()
        assert fences.broken() == 1  # a write beyond an output is seen
    assert backend == "reference" or len(fences.storages) >= len(found) - 2
    assert different(found, every_op(batch)) == []


@pytest.mark.parametrize(("rows", "shape"), [(0, (5,)), (0, (3, 0)), (3, (0,)), (2, (4, 0))])
def test_batches_without_rows_or_without_elements(rows, shape):
    """Rows without elements have the log-probability of their normalisation alone."""
    batch = batch_of(3, 5).rows(range(rows)).laid_out(lambda t: t.new_zeros(t.shape[0], *shape))
    for name, value in every_op(batch).items():
        if "grad" in name or name == "estimate":
            assert value.shape == (rows, *shape)
        elif name == "noise" or "x_next" in name:
            assert value.shape == (2 * rows, *shape)
        elif "loss" in name:
            assert rows > 0 or value.item() == 0
        else:
            assert value.shape == (2 * rows,)
            assert "logp" not in name or torch.equal(value, batch.coef.log_norm.repeat_interleave(2))


def test_one_row_and_one_element():
    x, v, one = torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.ones(1)
    coef = row(0.5, -0.25, 0.0, 0.125, 32.0, 1.5)
    x_next, logp = flow_step(x, v, coef, noise=torch.tensor([[4.0]]))
    assert x_next.tolist() == [[0.75]]  # 1 − 0.75 + 0.5
    assert logp.tolist() == [-6.5]  # 1.5 − 32·0.25
    out, grad, _ = grpo_loss_and_grad(x, v, x_next, coef, None, one, one, clip_range=0.1)
    assert out.logp.tolist() == [-6.5]
    assert grad.tolist() == [[8.0]]  # −2κb·r = −2·32·(−0.25)·0.5
    assert clean_estimate(x, v, 0.5).tolist() == [[0.5]]


@pytest.mark.parametrize("function", [flow_logprob, grpo_loss])
def test_rows_may_lie_further_apart_than_a_32_bit_index_reaches(function):
    """The second row of v starts 2³¹ elements behind the first; of the 4 GB between them nothing is touched."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 63), (2**31, 1))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    far.copy_(randn(2, 63, seed=2))
    x, x_next, ones = randn(2, 63, seed=1), randn(2, 63, seed=3), torch.ones(2)
    scores = (ones, ones, ones) if function is grpo_loss else ()
    options = {"clip_range": 0.1} if function is grpo_loss else {}
    found, expected = (function(x, v, x_next, stochastic_rows(2), *scores, **options) for v in (far, far.contiguous()))
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_noise_of_a_shape_is_the_noise_of_its_elements():
    batch = batch_of(3, 3, 7, 5)
    flat = philox_normal((6, 105), batch.key)
    assert torch.equal(philox_normal((6, 3, 7, 5), batch.key), flat.view(6, 3, 7, 5))
    assert philox_normal((6,), batch.key).shape == (6,)
