"""What only the values of tensors show is an error on every backend too, and names the argument; wrong shapes and
dtypes leave no trace behind.
"""

from dataclasses import replace

import pytest
import torch

from flowgrove_kernels import (
    INITIAL_STEP,
    NoiseKey,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
)
from kernel_backends import AND_EMULATED
from kernel_cases import stochastic_rows
from op_calls import CLIP, batch_of

pytestmark = AND_EMULATED

B = batch_of(4, 3, 5, fanout=1)
WORDS = ("seed", "iteration", "step", "prompt", "node", "parent")
CALLS = {  # the four ops that draw noise
    "philox_normal": lambda key, rho: philox_normal((4, 3, 5), key),
    "flow_step": lambda key, rho: flow_step(B.x, B.v, B.coef, key=key, sibling_correlation=rho),
    "grpo_loss": lambda key, rho: grpo_loss(
        *B.steps, *B.scores, clip_range=CLIP, ratio="guard", key=key, sibling_correlation=rho
    ),
    "grpo_loss_and_grad": lambda key, rho: grpo_loss_and_grad(
        *B.steps, *B.scores, clip_range=CLIP, ratio="guard", key=key, sibling_correlation=rho
    ),
}


def key_with(**changes):
    return NoiseKey(**dict.fromkeys(WORDS, 1) | changes)


@pytest.mark.parametrize("value", [-1, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_key_words_of_a_tensor_are_32_bit(function, word, value):
    for edge in (0, 3):
        words = torch.full((4,), 2**32 - 1)
        function(key_with(**{word: words}), 0.0)
        words[edge] = value
        with pytest.raises((ValueError, RuntimeError), match=rf"\b{word}\b"):
            function(key_with(**{word: words}), 0.0)


@pytest.mark.parametrize("step", [2**31 - 1, 2**31, INITIAL_STEP])
@pytest.mark.parametrize("name", ["flow_step", "grpo_loss", "grpo_loss_and_grad"])
def test_steps_of_correlated_siblings_lie_below_the_shared_words(name, step):
    last = torch.full((4,), 2**31 - 2)
    CALLS[name](key_with(step=last), 0.5)
    last[2] = step
    CALLS[name](key_with(step=last), 0.0)  # without correlation the word is free
    for wrong in (last, step):
        with pytest.raises((ValueError, RuntimeError), match=r"\bstep\b"):
            CALLS[name](key_with(step=wrong), 0.5)


@pytest.mark.parametrize("value", [1e-30, -0.5, float("nan")])
def test_multistep_rows_need_their_history(value):
    coef = stochastic_rows(4)
    coef.prev_coef[3] = value
    flow_step(B.x, B.v, coef, history=B.history)
    steps = B.x, B.v, B.x_next, coef
    for call in (
        lambda: flow_step(B.x, B.v, coef),
        lambda: flow_logprob(*steps),
        lambda: grpo_loss(*steps, *B.scores, clip_range=CLIP),
        lambda: grpo_loss_and_grad(*steps, *B.scores, clip_range=CLIP),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"\bhistory\b"):
            call()


def loss_of(batch):
    loss = grpo_loss(*batch.steps, *batch.scores, clip_range=CLIP).loss
    again = grpo_loss_and_grad(*batch.steps, *batch.scores, clip_range=CLIP)[0].loss
    assert torch.equal(loss.isnan(), again.isnan())
    return loss


def test_a_nan_in_a_velocity_or_a_score_shows_in_the_loss():
    for name, index in (("v", (2, 1, 3)), ("old_logp", 1), ("advantage", 3), ("weight", 0)):
        value = getattr(B, name).clone()
        value[index] = float("nan")
        assert loss_of(replace(B, **{name: value})).isnan(), name
    overflowing = replace(B, old_logp=torch.full((4,), -1e9), advantage=torch.zeros(4))
    assert loss_of(overflowing).isnan()  # 0·∞, which the clip would make 0


def test_what_a_call_fails_with_is_one_line_without_a_path():
    for call in (
        lambda: CALLS["philox_normal"](key_with(node=torch.tensor([0, 1, 2, -1])), 0.0),
        lambda: flow_step(B.x, B.v, B.multistep),
        lambda: flow_logprob(*B.steps, child_offsets=torch.tensor([0, 2, 1, 3, 4])),
    ):
        with pytest.raises(RuntimeError, match=r"^(NoiseKey.node|these coefficients|child_offsets)[^\n]*\n?$"):
            call()


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 1, 2, 3, 3],
        [0, 1, 2, 3, 5],
        [1, 1, 2, 3, 4],
        [0, 2, 1, 3, 4],
        [0, 5, 5, 5, 4],
        [0, -1, 2, 3, 4],
        [4, 3, 2, 1, 0],
    ],
)
@pytest.mark.parametrize("function", [flow_logprob, grpo_loss, grpo_loss_and_grad])
def test_child_offsets_rise_from_zero_to_the_number_of_edges(function, offsets):
    scores, options = ((), {}) if function is flow_logprob else (B.scores, {"clip_range": CLIP})
    function(*B.steps, *scores, **options, child_offsets=torch.tensor([0, 0, 3, 3, 4]))
    with pytest.raises((ValueError, RuntimeError), match=r"\bchild_offsets\b"):
        function(*B.steps, *scores, **options, child_offsets=torch.tensor(offsets))


@pytest.mark.parametrize("offsets", [[1], [2]])
def test_child_offsets_of_no_parents(offsets):
    empty, edges = B.x[:0], B.x_next[: offsets[0]]
    with pytest.raises((ValueError, RuntimeError), match=r"\bchild_offsets\b"):
        flow_logprob(empty, empty, edges, B.coef[:0], child_offsets=torch.tensor(offsets))


STATES = {
    "x": [B.x[:3], B.x[..., :4], B.x.half(), B.x.long(), B.x[0, 0, 0], B.x.flatten(), B.x.to("meta")],
    "v": [B.v[:3], B.v[..., :4], B.v.flatten(1), B.v.long(), B.v.bool(), B.v.to("meta")],
    "x_next": [B.x_next[:3], B.x_next[..., :4], B.x_next.bfloat16(), B.x_next.double(), B.x_next.to("meta")],
    "coef": [B.coef[:3], B.coef[[0]], B.coef.to("meta")],
}
MIXED = {"x": ("x", "v")}  # a row missing in x shows as one too many in v


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name, values in STATES.items() for value in values])
@pytest.mark.parametrize("function", [flow_step, flow_logprob, grpo_loss, grpo_loss_and_grad])
def test_wrong_states_are_value_errors(function, argument, value):
    good = {"x": B.x, "v": B.v, "x_next": B.x_next, "coef": B.coef}
    scores = (
        {"old_logp": B.old_logp, "advantage": B.advantage, "weight": B.weight, "clip_range": CLIP}
        if function in (grpo_loss, grpo_loss_and_grad)
        else {}
    )
    if function is flow_step:
        good["noise"] = good.pop("x_next")
        argument = {"x_next": "noise"}.get(argument, argument)
    function(**good | scores)
    with pytest.raises(ValueError, match="|".join(rf"\b{name}\b" for name in MIXED.get(argument, (argument,)))):
        function(**good | scores | {argument: value})


COMPANIONS = [
    (name, wrong) for name in ("v_uncond", "v_ref", "history") for wrong in ("rows", "elements", "dtype", "device")
]


@pytest.mark.parametrize(("name", "wrong"), [*COMPANIONS, ("sigma", "rows"), ("sigma", "device")])
def test_wrong_companions_of_the_velocity_are_value_errors(name, wrong):
    good = {"v_uncond": B.v_uncond, "v_ref": B.v_ref, "history": B.history, "sigma": B.sigma}[name]
    value = {"rows": good[:3], "elements": good[..., :2], "dtype": good.long(), "device": good.to("meta")}[wrong]
    calls = {
        "v_uncond": lambda: flow_step(B.x, B.v, B.coef, v_uncond=value, guidance_scale=2.0),
        "v_ref": lambda: grpo_loss(*B.steps, *B.scores, clip_range=CLIP, v_ref=value, kl_weight=0.1),
        "history": lambda: flow_step(B.x, B.v, B.coef, history=value),
        "sigma": lambda: clean_estimate(B.x, B.v, value),
    }
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        calls[name]()


def test_a_failed_call_leaves_its_inputs_and_the_next_call_alone():
    batch = replace(B, x=B.x.clone(), v=B.v.clone(), x_next=B.x_next.clone())
    before = flow_logprob(*batch.steps)
    for _ in range(3):
        with pytest.raises((ValueError, RuntimeError)):
            flow_logprob(*batch.steps, child_offsets=torch.tensor([0, 1, 1, 9, 4]))
        with pytest.raises((ValueError, RuntimeError)):
            flow_step(batch.x, batch.v, batch.coef, key=key_with(node=torch.tensor([0, 1, 2, -3])))
    assert all(torch.equal(getattr(batch, name), getattr(B, name)) for name in ("x", "v", "x_next"))
    assert torch.equal(flow_logprob(*batch.steps), before)


def test_inputs_are_never_written():
    batch = batch_of(3, 1031, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    flow_step(batch.x, batch.v, batch.multistep, noise=batch.noise, history=batch.history, fanout=2, **batch.guidance)
    grpo_loss_and_grad(
        *batch.steps,
        *batch.scores,
        clip_range=CLIP,
        v_ref=batch.v_ref,
        kl_weight=1.0,
        ratio="guard",
        noise=batch.noise,
        fanout=2,
    )
    flow_logprob(*batch.steps, fanout=2)
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())
