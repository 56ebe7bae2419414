"""What no op can take is a ValueError of one line that names the argument and says what to pass instead."""

import math
from dataclasses import replace

import numpy
import pytest
import torch

from flowgrove_kernels import (
    NoiseKey,
    StepCoefficients,
    clean_estimate,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
    step_coefficients,
)
from op_calls import CLIP, batch_of
from subprocesses import python

B = batch_of(4, 3, 5, fanout=1)
GIVEN = {
    "x": B.x, "v": B.v, "x_next": B.x_next, "coef": B.coef, "old_logp": B.old_logp, "advantage": B.advantage,
    "weight": B.weight, "clip_range": CLIP,
}  # fmt: skip
KEY = NoiseKey(1, 2, 3, 4, torch.arange(4), 0)
ONE = torch.tensor(0.5)
nan = math.nan


def refused(call, name, text=""):
    with pytest.raises(ValueError, match=f"^{name} .*{text}") as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("clip_range", [ONE, (0.1,), (0.1, 0.2, 0.3), "0.1", True, None, nan, (0.1, nan), (ONE, 0.1)])
@pytest.mark.parametrize("function", [grpo_loss, grpo_loss_and_grad])
def test_clip_range_is_a_number_or_a_pair(function, clip_range):
    refused(lambda: function(**GIVEN | {"clip_range": clip_range}), "clip_range", "write a number in")


def test_numbers_of_numpy_are_numbers():
    wanted = grpo_loss(**GIVEN | {"clip_range": 0.25, "fanout": 1})
    found = grpo_loss(**GIVEN | {"clip_range": numpy.float32(0.25), "fanout": numpy.int64(1)})
    assert torch.equal(found.loss, wanted.loss)
    grpo_loss(**GIVEN | {"clip_range": [0.1, math.inf]})
    assert step_coefficients("ode", numpy.float32(0.75), numpy.float64(0.5)).v_coef == -0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fanout", 10**30),
        ("fanout", 2.0), ("fanout", True), ("fanout", None), ("kl_weight", nan), ("kl_weight", "1"), ("kl_weight", -1),
        ("guidance_scale", nan), ("guidance_scale", ONE), ("guidance_scale", math.inf), ("sibling_correlation", nan),
        ("sibling_correlation", ONE), ("coef", (1.0, 2.0)), ("coef", None), ("v", None), ("x", B.x.numpy()),
        ("x", B.x.to_sparse()), ("v", B.v.to_sparse()), ("x_next", None), ("x_next", ONE), ("advantage", None),
        ("weight", [1.0] * 4), ("child_offsets", [0, 1, 2, 3, 4]), ("v_ref", B.v_ref.numpy()), ("key", 3),
        ("noise", 0.0),
    ],
)  # fmt: skip
def test_wrong_kinds_of_arguments(name, value):
    more = {"v_uncond": B.v_uncond} if name == "guidance_scale" else {}
    more |= {"ratio": "guard"} if name in ("key", "noise") else {}
    for function in (grpo_loss, grpo_loss_and_grad):
        refused(lambda f=function: f(**GIVEN | more | {name: value}), name)
    if name in ("fanout", "coef", "v", "x", "guidance_scale", "sibling_correlation", "key", "noise"):
        more = {} if name in ("key", "noise") else more
        states = {key: GIVEN[key] for key in ("x", "v", "coef")}
        refused(lambda: flow_step(**states | more | {name: value}), name)


@pytest.mark.parametrize(
    "sigma", [[0.9] * 4, numpy.full(4, 0.9), None, "0.9", nan, torch.ones(4, dtype=torch.bool), ONE.to(torch.complex64),
              torch.ones(4).to_sparse(), torch.ones(3)]
)  # fmt: skip
def test_sigma_is_a_number_or_a_floating_point_tensor(sigma):
    refused(lambda: clean_estimate(B.x, B.v, sigma), "sigma")


@pytest.mark.parametrize("field", ["v_coef", "prev_coef", "std", "precision", "log_norm"])
def test_rows_lie_together(field):
    """Else an op would read memory of another device."""
    for other in (getattr(B.coef, field).to("meta"), getattr(B.coef, field).double(), getattr(B.coef, field)[:3], 0.0):
        refused(lambda value=other: replace(B.coef, **{field: value}), f"StepCoefficients.{field}")
    with torch._subclasses.FakeTensorMode() as mode:
        here = [mode.from_tensor(column) for column in B.coef.tensors()]
        index = list(vars(B.coef)).index(field)
        there = [*here[:index], here[index].to("meta"), *here[index + 1 :]]
        StepCoefficients(*here)
        refused(lambda: StepCoefficients(*there), f"StepCoefficients.{field}")


def test_types_are_listed_once():
    with pytest.raises(ValueError, match=r"old_logp is .*: pass float32 \[4\] on cpu$"):
        grpo_loss(**GIVEN | {"old_logp": B.old_logp.half()})
    with pytest.raises(ValueError, match=r"v_ref is .*: pass bfloat16 or float32 \["):
        grpo_loss(**GIVEN | {"v": B.v.bfloat16(), "v_ref": B.v_ref.half(), "kl_weight": 0.1})


@pytest.mark.parametrize("word", [1.5, 1.0, "1", True, numpy.arange(4), [1] * 4])
def test_words_of_a_key_are_integers(word):
    refused(lambda: philox_normal((4, 3), replace(KEY, step=word)), "NoiseKey.step", "write an integer in")
    assert torch.equal(
        philox_normal((4, 3), replace(KEY, step=numpy.int64(7))), philox_normal((4, 3), replace(KEY, step=7))
    )


def test_a_key_without_values_is_refused():
    key = replace(KEY, node=KEY.node.to("meta"))
    refused(lambda: flow_step(B.x, B.v, B.coef, key=key), "NoiseKey.node", "on meta")
    assert philox_normal((4, 3), replace(KEY, node=0, parent=KEY.node.to("meta"))).is_meta


@pytest.mark.parametrize("shape", [(-1, 3), (4, -1), (4, 1.5), (), 4, None])
def test_shapes_of_noise_are_counts(shape):
    refused(lambda: philox_normal(shape, KEY), "the shape of philox_normal")


def test_another_default_device_changes_nothing():
    """The package is imported there too."""
    program = """
import torch
torch.set_default_device("meta")
import flowgrove_kernels as fk
rows = fk.StepCoefficients.cat([fk.step_coefficients("flow_sde", 0.9, 0.5, noise_level=0.7)] * 2)
x = fk.philox_normal((2, 3), fk.NoiseKey(1, 2, 3, 4, 5))
x_next, logp = fk.flow_step(x, x, rows, key=fk.NoiseKey(1, 2, 3, 4, torch.arange(2, device="cpu"), 0))
loss = fk.grpo_loss_and_grad(x, x, x_next, rows, logp, logp, logp, clip_range=0.1)[0].loss
multistep = fk.dpmpp_2m_coefficients(0.9, 0.8, 0.7).x_coef
print(*(float(t.sum()) for t in (x, x_next, logp, loss, multistep, fk.clean_estimate(x, x, 0.5))))
"""
    told = [python("-c", text).stdout for text in (program, program.replace('torch.set_default_device("meta")', ""))]
    assert told[0] == told[1] != ""
