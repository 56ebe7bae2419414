"""compat: the published trainers' steps give the numbers that those trainers give."""

import math

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from compat_cases import SCHEDULER, SIGMAS, TIMESTEPS, TRAINERS, Trainer, logp_of, mean_and_std
from flowgrove_kernels import NoiseKey, philox_normal
from flowgrove_kernels.compat import flow_grpo, tables
from flowgrove_kernels.compat.dance_grpo import flux_step
from flowgrove_kernels.compat.flow_grpo import sde_step_with_logprob
from flowgrove_kernels.compat.mix_grpo import dance_grpo_step, flow_grpo_step
from host_reads import DEVICE, HostWaits
from kernel_cases import randn

pytestmark = pytest.mark.usefixtures("backend")

SHAPE = (5, 4, 6, 7)
EACH = torch.tensor([2, 0, 4, 1, 3])
DTYPES = [  # of the state and of the velocity
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float64, None),
]
every_trainer = pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: f"{t.name} {t.kind}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(dtype=torch.float32, v_dtype=None) -> tuple[Tensor, Tensor]:
    return randn(*SHAPE, seed=1, dtype=dtype), randn(*SHAPE, seed=2, dtype=dtype).to(v_dtype or dtype)


def golden_cases(golden, kind):
    """(σ table, eta, step, σ' = 0?, x, v, z, x_next, mean, logp, std) of every stored step of a kind."""
    names = ("x", "v", "z", "x_next", "mean", "logp", "std")
    table = ("T", "shift", "eta", "i", "sigma", "sigma_next", "sigma_max")
    for number in (i for i in range(120) if str(golden[f"step{i:03d}/kind"]) == kind):
        case = {name: golden[f"step{number:03d}/{name}"] for name in (*names, *table)}
        t, shift = 1 - numpy.arange(int(case["T"]) + 1) / int(case["T"]), float(case["shift"])
        sigmas = torch.from_numpy((shift * t / ((1 - t) + shift * t)).astype(numpy.float32))
        i = int(case["i"])
        theirs = torch.tensor([float(case[name]) for name in ("sigma_max", "sigma", "sigma_next")])
        torch.testing.assert_close(sigmas[[1, i, i + 1]], theirs, rtol=0, atol=1e-6)
        sigmas[[1, i, i + 1]] = theirs
        yield sigmas, float(case["eta"]), i, sigmas[i + 1] == 0, *(torch.from_numpy(case[name]) for name in names)


def published_steps(kind, sigmas, eta, i, v, x, prev_sample):
    """What every function of this kind returns: (prev_sample, log_prob with constants, mean, std or None)."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    t, sde_type = scheduler.timesteps[i].unsqueeze(0), "cps" if kind == "cps" else "sde"
    if kind in ("flow_sde", "cps"):
        given = {"sde_type": sde_type, "return_sqrt_dt": True}
        *out, std, sqrt_dt = sde_step_with_logprob(scheduler, v, t, x, eta, prev_sample, **given)
        yield *out, std if kind == "cps" else std * sqrt_dt
        out = flow_grpo_step(v, x, eta, sigmas, i, prev_sample, sde_type=sde_type, noise_level=eta)
        yield out[0], out[2], out[3], out[4]
    s = eta * math.sqrt(sigmas[i].item() - sigmas[i + 1].item())
    constants = -math.log(s) - 0.5 * math.log(2 * math.pi) if kind == "dance_sde" else 0.0
    if kind in ("dance_sde", "cps"):
        out = dance_grpo_step(v, x, 9.0, sigmas, i, prev_sample, True, True, sde_type, eta)
        mean = dance_grpo_step(v, x, 9.0, sigmas, i, None, False, True, sde_type, eta)[0]
        yield out[0], out[2] + constants, mean, None
    if kind == "dance_sde":
        out = flux_step(v, x, eta, sigmas, i, prev_sample, True, True)
        yield out[0], out[2] + constants, flux_step(v, x, eta, sigmas, i, None, False, True)[0], None


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_steps_of_public_implementations(golden, kind, monkeypatch):
    cases = list(golden_cases(golden, kind))
    assert len(cases) == 30
    for sigmas, eta, i, last, x, v, z, x_next, mean, logp, std in cases:
        monkeypatch.setattr(torch, "randn", lambda *_, z=z, **__: z)
        for prev_sample in (None, x_next):
            for ours, our_logp, our_mean, our_std in published_steps(kind, sigmas, eta, i, v, x, prev_sample):
                torch.testing.assert_close(ours, x_next, rtol=0, atol=2e-6)
                torch.testing.assert_close(our_mean, mean, rtol=0, atol=2e-6)
                torch.testing.assert_close(our_logp, logp, rtol=0, atol=1e-4 if last else 2e-6)
                if our_std is not None:
                    torch.testing.assert_close(our_std.flatten(), std.float().reshape(1), rtol=1e-5, atol=1e-7)


def test_deterministic_steps_of_public_implementations(golden):
    cases = list(golden_cases(golden, "ode"))
    assert len(cases) == 30
    for sigmas, _, i, _, x, v, _, x_next, *_ in cases:
        for ours in (
            flux_step(v, x, 0.3, sigmas, i, None, False, False)[0],
            dance_grpo_step(v, x, 0.3, sigmas, i, None, True, False)[0],
            flow_grpo_step(v, x, 0.3, sigmas, i, None, determistic=True)[0],
        ):
            torch.testing.assert_close(ours, x_next, rtol=0, atol=2e-6)


@every_trainer
@pytest.mark.parametrize("index", [0, 3, EACH], ids=["first", "later", "each its own"])
def test_a_generator_gives_the_sample_that_the_formulas_give(trainer, index):
    x, v = states()
    out = trainer.step(v, x, index, generator=generator(7))
    steps = index if isinstance(index, Tensor) else torch.full((5,), index)
    mean, std = mean_and_std(trainer.kind, x, v, steps, trainer.eta)
    expected = mean + std * torch.randn(SHAPE, generator=generator(7))
    torch.testing.assert_close(out["prev_sample"].double(), expected, rtol=0, atol=2e-6)
    logp = logp_of(trainer.kind, mean, std, out["prev_sample"])
    torch.testing.assert_close(out["log_prob"].double(), logp, rtol=2e-6, atol=2e-6)
    if "mean" in out:
        torch.testing.assert_close(out["mean"].double(), mean, rtol=0, atol=2e-6)
    if "original" in out:
        clean = x - SIGMAS[steps].view(-1, 1, 1, 1) * v
        torch.testing.assert_close(out["original"], clean, rtol=0, atol=1e-6)
    assert all(value.dtype == torch.float32 for value in out.values())


@every_trainer
def test_gradients_are_those_of_the_formulas_and_of_their_closed_form(trainer):
    x, v = states()
    x_next = trainer.step(v, x, EACH, generator=generator())["prev_sample"]
    moved = (v + 0.1 * randn(*SHAPE, seed=3)).requires_grad_()
    upstream = randn(5, seed=4)
    logp = trainer.step(moved, x, EACH, x_next)["log_prob"]
    (ours,) = torch.autograd.grad(logp, moved, upstream)

    free = moved.detach().double().requires_grad_()
    mean, std = mean_and_std(trainer.kind, x, free, EACH, trainer.eta)
    expected = logp_of(trainer.kind, mean, std, x_next)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    (by_autograd,) = torch.autograd.grad(expected, free, upstream.double(), retain_graph=True)
    (slope,) = torch.autograd.grad(mean.sum(), free)  # b, the same for every element of a sample
    precision = torch.ones_like(std) if trainer.kind == "cps" else 1 / (2 * std**2)
    closed = 2 * precision * slope / x[0].numel() * (x_next - mean) * upstream.double().view(-1, 1, 1, 1)
    for reference in (by_autograd, closed):
        assert (ours - reference).norm() <= 2e-5 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_and_clean_estimates_carry_gradients_too(dtype):
    x, v = states(v_dtype=dtype)
    v.requires_grad_()
    weights = randn(*SHAPE, seed=5)
    means = {
        "flow_sde": sde_step_with_logprob(SCHEDULER, v, TIMESTEPS[EACH], x, 0.7, x)[2],
        "dance_sde": flux_step(v, x, 0.3, SIGMAS, EACH, None, False, True)[0],
    }
    for (kind, mean), eta in zip(means.items(), (0.7, 0.3), strict=True):
        free = v.detach().double().requires_grad_()
        expected = mean_and_std(kind, x, free, EACH, eta)[0]
        (ours,) = torch.autograd.grad((weights * mean).sum(), v)
        (theirs,) = torch.autograd.grad((weights * expected).sum(), free)
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * theirs.norm()
        with torch.no_grad():
            again = sde_step_with_logprob(SCHEDULER, v, TIMESTEPS[EACH], x, 0.7, x)[2] if kind == "flow_sde" else None
        assert again is None or torch.equal(again, mean)  # the bits do not depend on whether a gradient is wanted
    original = flux_step(v, x, 0.3, SIGMAS, EACH, x, True, True)[1]
    (grad,) = torch.autograd.grad(original.sum(), v)
    torch.testing.assert_close(grad.float(), -SIGMAS[EACH].view(-1, 1, 1, 1).expand(SHAPE), rtol=4e-3, atol=0)


@every_trainer
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_replay_gives_the_log_probability_of_sampling_to_the_last_bit(trainer, dtypes):
    x, v = states(*dtypes)
    with torch.no_grad():
        sampled = trainer.step(v, x, EACH, generator=generator())
    assert sampled["log_prob"].isfinite().all()
    v.requires_grad_()
    in_training = trainer.step(v, x, EACH, generator=generator())
    replayed = trainer.step(v, x, EACH, sampled["prev_sample"])
    order = torch.tensor([3, 1, 4])
    part = trainer.step(v[order], x[order], EACH[order], sampled["prev_sample"][order])
    for again in (in_training, replayed):
        assert again["log_prob"].requires_grad
        assert torch.equal(again["log_prob"], sampled["log_prob"])
        assert torch.equal(again["prev_sample"], sampled["prev_sample"])
        assert not again["prev_sample"].requires_grad
    assert torch.equal(part["log_prob"], sampled["log_prob"][order])


@every_trainer
def test_half_precision_inputs_promote_as_theirs_do(trainer):
    x, v = states(torch.float32, torch.bfloat16)
    in_flow = trainer.name == "flow_grpo"
    out = trainer.step(v, x, EACH, generator=generator())
    assert out["prev_sample"].dtype == out["log_prob"].dtype == torch.float32
    noise_dtype = torch.bfloat16 if trainer.name == "mix_grpo flow" else torch.float32
    noise = torch.randn(SHAPE, generator=generator(), dtype=noise_dtype)
    mean, std = mean_and_std(trainer.kind, x, v, EACH, trainer.eta)
    expected = mean + std * noise.double()  # of v as it is: no product is rounded to bf16
    torch.testing.assert_close(out["prev_sample"].double(), expected, rtol=0, atol=2e-6)
    both = trainer.step(v, x.bfloat16(), EACH, generator=generator())
    assert both["prev_sample"].dtype == (torch.float32 if in_flow else torch.bfloat16)
    assert both["log_prob"].dtype == torch.float32
    doubled = trainer.step(v.double(), x.double(), EACH, generator=generator())
    assert doubled["log_prob"].dtype == (torch.float32 if in_flow else torch.float64)


@every_trainer
def test_steps_of_each_sample_are_those_taken_alone(trainer):
    x, v = states()
    together = trainer.step(v, x, EACH, generator=[generator(i) for i in range(5)])
    for row, i in enumerate(EACH.tolist()):
        alone = trainer.step(v[row : row + 1], x[row : row + 1], i, generator=generator(row))
        for name in ("prev_sample", "log_prob"):
            assert torch.equal(alone[name], together[name][row : row + 1])


@every_trainer
def test_a_step_may_be_a_tensor_of_no_dimension(trainer):
    """The published training loops take it from a permutation: `perms[i][j]`."""
    x, v = states()
    wanted, found = (trainer.step(v, x, i, generator=generator()) for i in (2, torch.tensor(2)))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    std = [flow_grpo_step(v, x, 0.7, SIGMAS, i, x)[4] for i in (2, torch.tensor(2))]
    assert std[0].shape == std[1].shape == ()
    assert torch.equal(*std)


@every_trainer
def test_without_a_generator_torchs_own_is_drawn_from(trainer):
    x, v = states()
    torch.manual_seed(11)
    ours = trainer.step(v, x, 2)["prev_sample"]
    after = torch.rand(())
    assert torch.equal(ours, trainer.step(v, x, 2, generator=generator(11))["prev_sample"])
    torch.manual_seed(11)
    torch.randn(SHAPE)
    assert torch.rand(()) == after


@every_trainer
def test_a_key_draws_the_noise_that_it_names(trainer):
    x, v = states()
    key = NoiseKey(1, 2, 3, 4, torch.arange(5))
    out = trainer.step(v, x, EACH, key=key)
    mean, std = mean_and_std(trainer.kind, x, v, EACH, trainer.eta)
    torch.testing.assert_close(out["prev_sample"].double(), mean + std * philox_normal(SHAPE, key), rtol=0, atol=4e-6)
    assert torch.equal(out["log_prob"], trainer.step(v, x, EACH, out["prev_sample"])["log_prob"])


def test_mix_grpos_deterministic_steps():
    x, v = states()
    euler = x + (SIGMAS[3] - SIGMAS[2]) * v
    first, second = generator(3), generator(3)
    flow = flow_grpo_step(v, x, 0.7, SIGMAS, 2, None, first, determistic=True)
    flow_grpo_step(v, x, 0.7, SIGMAS, 2, None, second)
    assert torch.equal(first.get_state(), second.get_state())  # it draws, and leaves what it drew
    torch.testing.assert_close(flow[0], euler, rtol=0, atol=1e-6)
    steps = torch.full((5,), 2)
    mean, std = mean_and_std("flow_sde", x, v, steps, 0.7)
    torch.testing.assert_close(flow[2].double(), logp_of("flow_sde", mean, std, flow[0]), rtol=1e-6, atol=2e-6)
    assert flow[4].shape == ()
    torch.testing.assert_close(flow[4].double(), std.flatten()[0], rtol=1e-6, atol=0)

    untouched = torch.get_rng_state()
    dance = dance_grpo_step(v, x, 0.3, SIGMAS, 2, None, True, False)
    assert torch.equal(torch.get_rng_state(), untouched)
    torch.testing.assert_close(dance[0], euler, rtol=0, atol=1e-6)
    assert torch.equal(dance[2], torch.zeros(5))
    scored = dance_grpo_step(v, x, 0.3, SIGMAS, 2, x, True, False)[2]
    expected = logp_of("dance_ode", *mean_and_std("dance_ode", x, v, steps, 0.3), x)
    torch.testing.assert_close(scored.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_deterministic_step_in_half_precision_scores_the_sample_that_it_returns():
    x, v = states(torch.bfloat16)
    euler = flow_grpo_step(v.float(), x.float(), 0.7, SIGMAS, 2, None, determistic=True)[0]
    sample, _, logp, *_ = flow_grpo_step(v, x, 0.7, SIGMAS, 2, None, determistic=True)
    assert sample.dtype == torch.bfloat16
    assert torch.equal(sample, euler.bfloat16())
    assert torch.equal(logp, flow_grpo_step(v, x, 0.7, SIGMAS, 2, sample)[2])


def test_defaults_are_the_published_ones():
    x, v = states()
    draw = generator
    implied = sde_step_with_logprob(SCHEDULER, v, TIMESTEPS[1:2], x, generator=draw())
    said = sde_step_with_logprob(SCHEDULER, v, TIMESTEPS[1:2], x, 0.7, generator=draw(), sde_type="sde")
    assert torch.equal(implied[0], said[0])
    for sde_type, level in (("sde", 0.4), ("cps", 0.8)):
        for step in (flow_grpo_step, dance_grpo_step):
            rest = {"generator": draw()} | ({} if step is flow_grpo_step else {"grpo": True, "sde_solver": True})
            implied = step(v, x, 0.4, SIGMAS, 1, None, sde_type=sde_type, **rest)[0]
            rest |= {"generator": draw(), "noise_level": level}
            assert torch.equal(implied, step(v, x, 9.0, SIGMAS, 1, None, sde_type=sde_type, **rest)[0])


def test_steps_without_noise():
    x, v = states()
    euler = x + (SIGMAS[3] - SIGMAS[2]) * v
    sample, logp, mean, std, sqrt_dt = sde_step_with_logprob(SCHEDULER, v, TIMESTEPS[2:3], x, 0.0, return_sqrt_dt=True)
    torch.testing.assert_close(sample, euler, rtol=0, atol=1e-6)
    assert torch.equal(sample, mean)
    assert torch.equal(logp, torch.zeros(5))
    assert std.shape == sqrt_dt.shape == (1, 1, 1, 1)
    assert std == 0
    torch.testing.assert_close(sqrt_dt.flatten(), (SIGMAS[2:3] - SIGMAS[3:4]).sqrt(), rtol=1e-6, atol=0)
    v.requires_grad_()
    last = sde_step_with_logprob(SCHEDULER, v, TIMESTEPS[5:], x, 0.7, x, sde_type="cps")[1]  # s = 0, yet scored
    torch.testing.assert_close(last, -(v * SIGMAS[5]).square().flatten(1).mean(1), rtol=1e-6, atol=0)
    assert last.requires_grad


def test_cps_takes_noise_levels_beyond_one():
    x, v = states()
    out = Trainer("flow_grpo", "cps", 1.3).step(v, x, EACH, generator=generator())
    mean, std = mean_and_std("cps", x, v, EACH, 1.3)
    torch.testing.assert_close(out["mean"].double(), mean, rtol=0, atol=2e-6)
    noise = torch.randn(SHAPE, generator=generator())
    torch.testing.assert_close(out["prev_sample"].double(), mean + std * noise, rtol=0, atol=2e-6)


def test_a_timestep_may_be_said_in_several_ways():
    x, v = states()
    wanted = sde_step_with_logprob(SCHEDULER, v, TIMESTEPS[2].expand(5), x, prev_sample=x)[1]
    entry = TIMESTEPS[2]
    for t in (
        entry,
        entry.view(1),
        entry.double(),
        entry.item(),
        [entry],
        [entry.item()] * 5,
        (entry,),
        entry.numpy(),
        entry.expand(5).numpy(),
    ):
        assert torch.equal(sde_step_with_logprob(SCHEDULER, v, t, x, prev_sample=x)[1], wanted)


def test_a_noise_level_may_be_a_tensor_on_the_host():
    x, _ = states()
    for name, argument in (("flow_grpo", "noise_level"), ("dance_grpo", "eta"), ("mix_grpo flow", "noise_level")):
        wanted, found = (call(name, prev_sample=x, **{argument: level}) for level in (0.5, torch.tensor(0.5)))
        assert all(torch.equal(left, right) for left, right in zip(wanted, found, strict=True))


def test_of_equal_timesteps_the_second_counts_as_in_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.timesteps = torch.tensor([9.0, 7.0, 7.0, 5.0, 5.0, 5.0, 2.0])
    for t in (9.0, 7.0, 5.0, 2.0):
        assert tables.index_of(scheduler.timesteps, torch.tensor(t)) == scheduler.index_for_timestep(t)
    assert tables.index_of(scheduler.timesteps, torch.tensor([5.0, 9.0])).tolist() == [4, 0]


def test_a_table_is_made_once_and_again_when_it_changes(monkeypatch):
    made = []
    rows = flow_grpo._ROWS["sde"]
    monkeypatch.setitem(flow_grpo._ROWS, "sde", lambda *a: made.append(1) or rows(*a))
    sigmas, (x, v) = SIGMAS.clone(), states()
    for i in (0, 1, torch.tensor([1]), EACH):
        flow_grpo_step(v, x, 0.7, sigmas, i, None)
    assert len(made) == 1
    before = flow_grpo_step(v, x, 0.7, sigmas, 3, x)[2]
    sigmas[4] = 0.5
    after = flow_grpo_step(v, x, 0.7, sigmas, 3, x)[2]
    assert len(made) == 2
    assert not torch.equal(before, after)
    flow_grpo_step(v, x, 0.5, sigmas, 3, x)
    assert len(made) == 3
    alive = len(tables._made)
    del sigmas
    assert len(tables._made) == alive - 1


@pytest.mark.parametrize("write", [lambda t: t.data, lambda t: t.numpy()], ids=["data", "numpy"])
def test_a_table_on_the_host_is_made_again_however_it_was_written_to(write):
    sigmas, (x, v) = SIGMAS.clone(), states()
    flow_grpo_step(v, x, 0.7, sigmas, 3, x)
    write(sigmas)[4] = 0.5
    wanted = flow_grpo_step(v, x, 0.7, sigmas.clone(), 3, x)[2]
    assert torch.equal(flow_grpo_step(v, x, 0.7, sigmas, 3, x)[2], wanted)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("index", [2, EACH], ids=["one", "each"])
def test_whoever_writes_to_a_result_changes_no_later_step(sde_type, index):
    x, v = states()
    t = TIMESTEPS[index] if isinstance(index, Tensor) else TIMESTEPS[index : index + 1]

    def steps():
        scored = {"prev_sample": x, "sde_type": sde_type}
        flow = sde_step_with_logprob(SCHEDULER, v, t, noise_level=0.7, return_sqrt_dt=True, **{"sample": x} | scored)
        return *flow[1:], *flow_grpo_step(v, x, 0.7, SIGMAS, index, noise_level=0.7, **scored)[1:]

    found = steps()
    before = [value.clone() for value in found]
    for value in found:
        value.zero_()
    assert all(torch.equal(left, right) for left, right in zip(steps(), before, strict=True))


def test_a_table_first_used_in_inference_mode_serves_training():
    sigmas, (x, v) = SIGMAS.clone(), states()
    with torch.inference_mode():
        flow_grpo_step(v, x, 0.7, sigmas, 1, None)
        made_there = SIGMAS.clone()
        flow_grpo_step(v, x, 0.7, made_there, 1, None)
    v.requires_grad_()
    for table in (sigmas, made_there):
        flow_grpo_step(v, x, 0.7, table, 1, x)[2].sum().backward()
    assert v.grad.isfinite().all()


def test_a_table_that_misses_one_by_rounding_is_taken_as_one():
    x, v = states()
    wanted = flow_grpo_step(v, x, 0.7, SIGMAS, 0, x)[2]
    for off in (-1.2e-7, 1.2e-7):
        sigmas = SIGMAS.clone()
        sigmas[0] += off
        assert torch.equal(flow_grpo_step(v, x, 0.7, sigmas, 0, x)[2], wanted)
    shorter = SIGMAS[1:].clone()  # begins below 1: no step is capped
    assert torch.equal(flow_grpo_step(v, x, 0.7, shorter, 0, x)[2], flow_grpo_step(v, x, 0.7, SIGMAS, 1, x)[2])
    only = torch.tensor([1.0, 0.0])
    mean, std = mean_and_std("flow_sde", x, v, torch.zeros(5, dtype=torch.int64), 0.7, only)
    one_step = flow_grpo_step(v, x, 0.7, only, 0, x)
    torch.testing.assert_close(one_step[2].double(), logp_of("flow_sde", mean, std, x), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_loop_may_hold_the_steps():
    x, v = states()

    def score(v, index):
        return 2 * flux_step(v, x, 0.3, SIGMAS, index, x, True, True)[2] + flow_grpo_step(v, x, 0.7, SIGMAS, 2, x)[2]

    compiled = torch.compile(score, backend="eager")
    for index in (1, EACH):
        ours, expected = v.clone().requires_grad_(), v.clone().requires_grad_()
        logp, wanted = compiled(ours, index), score(expected, index)
        assert torch.equal(logp, wanted)
        for value in (logp, wanted):
            value.sum().backward()
        assert torch.equal(ours.grad, expected.grad)


def test_nothing_waits_for_the_device():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    x, v, index = (value.to(DEVICE) for value in (*states(), EACH))
    timesteps, host = scheduler.timesteps.to(DEVICE), scheduler.timesteps
    scheduler.timesteps = timesteps

    def every_step(steps, timestep):
        sde_step_with_logprob(scheduler, v, timestep, x)
        sde_step_with_logprob(scheduler, v, timestep, x, prev_sample=x)
        flow_grpo_step(v, x, 0.7, scheduler.sigmas, steps, None)
        dance_grpo_step(v, x, 0.7, scheduler.sigmas, steps, None, True, True)
        flux_step(v, x, 0.3, scheduler.sigmas, steps, x, True, True)

    every_step(1, timesteps[index])  # tables are made
    scheduler.timesteps = host
    with HostWaits() as waits:
        every_step(2, host[2])
        scheduler.timesteps = timesteps
        every_step(index, timesteps[index])
        every_step(2, timesteps[2])
    assert waits.noted == []


def call(name: str, **changed):
    x, v = states()
    if name == "flow_grpo":
        given = {"self": SCHEDULER, "model_output": v, "timestep": TIMESTEPS[:1], "sample": x}
        return sde_step_with_logprob(**given | changed)
    given = {"model_output": v, "latents": x, "eta": 0.7, "sigmas": SIGMAS, "index": 0, "prev_sample": None} | changed
    if name == "mix_grpo flow":
        return flow_grpo_step(**given)
    return (flux_step if name == "dance_grpo" else dance_grpo_step)(grpo=True, sde_solver=True, **given)


KEY = NoiseKey(0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "changed", "text"),
    [
        ("flow_grpo", {"timestep": torch.tensor([1.0])}, "timestep 1 is not in scheduler.timesteps: call"),
        ("flow_grpo", {"timestep": TIMESTEPS[:3]}, "timestep lists 3: pass one, or one for each of the 5 samples"),
        ("flow_grpo", {"timestep": TIMESTEPS.view(2, 3)}, r"timestep is .* \[2, 3\]: pass .* one for each"),
        ("flow_grpo", {"timestep": None}, "timestep is None: pass an entry of scheduler.timesteps"),
        ("flow_grpo", {"timestep": ["a"]}, r"timestep is \['a'\]: pass an entry of scheduler.timesteps"),
        ("flow_grpo", {"timestep": TIMESTEPS[:3].tolist()}, "timestep lists 3: pass one, or one for each of the 5"),
        ("flow_grpo", {"timestep": []}, "timestep lists 0: pass one, or one for each of the 5 samples"),
        ("flow_grpo", {"generator": generator(), "prev_sample": torch.zeros(SHAPE)}, "generator and prev_sample both"),
        ("flow_grpo", {"generator": 3}, "generator is 3: pass a torch.Generator"),
        ("flow_grpo", {"model_output": None}, "model_output is None: pass a dense torch tensor"),
        ("flow_grpo", {"sample": numpy.zeros(SHAPE)}, "sample is a ndarray: pass a dense torch tensor"),
        ("flow_grpo", {"noise_level": "0.7"}, "noise_level is '0.7': write a number >= 0"),
        ("flow_grpo", {"noise_level": 1e-30}, "noise_level 1e-30 gives a row that torch.float32 cannot hold"),
        ("dance_grpo", {"eta": 1e-25}, "noise_level 1e-25 gives a row that torch.float32 cannot hold"),
        ("flow_grpo", {"noise_level": torch.tensor(True)}, "noise_level is True: write a number >= 0"),
        ("flow_grpo", {"noise_level": torch.ones(1)}, r"noise_level is torch.float32 \[1\]: write a number >= 0"),
        ("flow_grpo", {"noise_level": torch.tensor(0.7, device="meta")}, "noise_level is torch.float32 .*: write a"),
        ("flow_grpo", {"timestep": numpy.full((2, 3), 600.0)}, "timestep is .*: pass .* one for each"),
        ("dance_grpo", {"eta": math.nan}, "eta is nan: write a number >= 0"),
        ("dance_grpo", {"index": None}, r"index is None: pass an int, or an int64 tensor \[5\]"),
        ("dance_grpo", {"index": 1.0}, r"index is 1.0: pass an int, or an int64 tensor \[5\]"),
        ("dance_grpo", {"index": [0, 1]}, r"index is \[0, 1\]: pass an int, or an int64 tensor \[5\]"),
        ("dance_grpo", {"generator": generator(), "prev_sample": torch.zeros(SHAPE)}, "generator and prev_sample both"),
        ("flow_grpo", {"sde_type": "ode"}, "unknown sde_type 'ode': write 'sde' or 'cps'"),
        ("flow_grpo", {"noise_level": -1.0}, "noise_level is -1.0: write a number >= 0"),
        ("flow_grpo", {"model_output": torch.zeros(4, 4, 6, 7)}, r"model_output is .*: pass .* on cpu, like sample"),
        ("flow_grpo", {"prev_sample": torch.zeros(SHAPE).long()}, "prev_sample is torch.int64 .*: pass floating-point"),
        ("flow_grpo", {"sample": torch.zeros(SHAPE, requires_grad=True)}, r"sample requires grad: pass sample.detach"),
        ("flow_grpo", {"key": KEY, "generator": generator()}, "key and generator both say"),
        ("flow_grpo", {"key": KEY, "prev_sample": torch.zeros(SHAPE)}, "key and prev_sample both say"),
        ("flow_grpo", {"generator": [generator()] * 2}, "generator lists 2: pass one, or one for each of"),
        ("dance_grpo", {"index": 6}, r"step 6 is not in the sigma table: write an index in \[0, 6\)"),
        ("dance_grpo", {"index": -1}, "step -1 is not in the sigma table"),
        ("dance_grpo", {"index": torch.tensor([0, 1, 2, 3, 6])}, r"index holds steps .*: write indices in \[0, 6\)"),
        ("dance_grpo", {"index": EACH.int()}, r"index is torch.int32 \[5\]: pass an int, or an int64 tensor \[5\]"),
        ("dance_grpo", {"latents": torch.zeros(5)}, r"latents is torch.float32 \[5\]: pass floating-point \[B, ...\]"),
        ("dance_grpo", {"sigmas": SIGMAS.tolist()}, "sigmas is not a table: pass a 1-D float tensor"),
        ("dance_grpo", {"sigmas": SIGMAS.flip(0)}, r"sigmas does not fall within \[1, 0\]: pass the table"),
        ("mix_grpo flow", {"generator": generator(), "prev_sample": torch.zeros(SHAPE)}, "and prev_sample both say"),
        ("mix_grpo flow", {"sde_type": ["sde"]}, "unknown sde_type .'sde'.: write 'sde' or 'cps'"),
        ("mix_grpo flow", {"sde_type": "dpm"}, "unknown sde_type 'dpm'"),
        ("mix_grpo dance", {"sde_type": "dpm"}, "unknown sde_type 'dpm'"),
    ],
)  # fmt: skip
def test_errors_say_what_to_write_instead(name, changed, text):
    with pytest.raises(ValueError, match=text) as error:
        call(name, **changed)
    assert "\n" not in str(error.value)


def test_states_of_any_rank_and_no_samples_at_all():
    for shape in ((2, 9), (3, 16, 8), (1, 2, 3, 4, 5), (0, 4, 2, 2)):
        x, v = randn(*shape, seed=1), randn(*shape, seed=2)
        out = Trainer("flow_grpo", "flow_sde", 0.7).step(v, x, 1)
        assert out["prev_sample"].shape == shape
        assert out["log_prob"].shape == shape[:1]
