"""update.optimizer: what each one computes, that a bad gradient skips its step without a host read, and that its state
survives a checkpoint bit for bit.

torchao is optional: without it the tests of adamw_8bit are skipped. NVIDIA's apex is never here: a stand-in with its
interface shows the wiring, no more.
"""

import math
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_cases import metrics_of, refuse, succeed, timeless, tiny_recipe
from flowgrove.recipe.schema import Update
from flowgrove.update.optimizers import is_unrelated_apex, load_state_tensors, make_optimizer, state_tensors
from host_reads import count_host_reads
from planner_cases import user_error

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed: pip install torchao")
KINDS = ["adamw", pytest.param("adamw_8bit", marks=needs_torchao), "apex_fused_adam"]
SHAPES = ((64, 256), (3, 5), (33, 129), (4096,), (1,))  # quantised: the first and the fourth

OTHERS = {"betas": (0.8, 0.95), "eps": 0.1}
FAKE_APEX = '''
import torch


class FusedAdam(torch.optim.Optimizer):
    """Counts, skips and steps as NVIDIA's does in its capturable mode, with plain tensors."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0, capturable=False
    ):
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if not (adam_w_mode and capturable):
            raise RuntimeError("only this mode decouples the decay and skips on the device")
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        (group,) = self.param_groups
        if "step" in group:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
        else:
            group["step"] = torch.tensor([1], dtype=torch.int)
        self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[group["params"][0].device])
        inverse = grad_scaler._get_scale_async().double().reciprocal().float()
        if int(self._dummy_overflow_buf) == 1:
            return
        low, high = group["betas"]
        for p in group["params"]:
            if p.grad is not None:
                m, v, g = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], p.grad * inverse
                m.mul_(low).add_(g, alpha=1 - low)
                v.mul_(high).addcmul_(g, g, value=1 - high)
                first, second = m / (1 - low ** group["step"]), v / (1 - high ** group["step"])
                p.sub_(group["lr"] * (first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p))
'''


@pytest.fixture
def install_apex(tmp_path, monkeypatch):
    """A function that puts a package `apex` with these files in front; it is gone after the test."""

    def install(files):
        folder = tmp_path / "packages" / "apex"
        for name, content in {"__init__.py": "", **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        monkeypatch.syspath_prepend(folder.parent)
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, name)

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def build(install_apex):
    """A function: (optimiser of that kind, its weights by name), with the stand-in for apex."""

    def make(kind, lr=1e-2, decay=0.1, **more):
        install_apex({"optimizers/__init__.py": FAKE_APEX})
        generator = torch.Generator().manual_seed(1)
        weights = {
            f"block.{n}": torch.nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in enumerate(SHAPES)
        }
        device = CUDA if kind == "apex_fused_adam" else CPU
        update = Update(optimizer=kind, lr=lr, weight_decay=decay, **more)
        return make_optimizer(update, weights.values(), device), weights

    return make


def train(optimizer, weights, numbers, bad=(), lr=1e-2):
    """Steps with gradients that depend on the step's number alone; those in `bad` hold one NaN or infinity."""
    for number in numbers:
        generator = torch.Generator().manual_seed(100 + number)
        for p in weights.values():
            p.grad = torch.randn(p.shape, generator=generator)
        if number in bad:
            list(weights.values())[number % len(weights)].grad.view(-1)[0] = (
                float("nan") if number % 2 else float("inf")
            )
        optimizer.found_inf = torch.tensor(float(number in bad))
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def snapshot(optimizer, weights):
    return {
        **{name: p.detach().clone() for name, p in weights.items()},
        **{k: t.clone() for k, t in state_tensors(optimizer, weights).items()},
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("settings", [{}, OTHERS], ids=["defaults", "others"])
def test_adamw_is_torchs_fused_one_bit_for_bit(build, settings):
    optimizer, weights = build("adamw", **settings)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in weights.values()]
    plain = torch.optim.AdamW(copies, lr=1e-2, weight_decay=0.1, fused=True, **settings)
    train(optimizer, weights, range(4))
    train(plain, dict(enumerate(copies)), range(4))
    assert all(torch.equal(p, q) for p, q in zip(weights.values(), copies, strict=True))


@pytest.mark.parametrize("settings", [{}, OTHERS], ids=["defaults", "others"])
@pytest.mark.parametrize(
    ("kind", "bound"), [pytest.param("adamw_8bit", 0.03, marks=needs_torchao), ("apex_fused_adam", 1e-4)]
)
def test_every_optimiser_follows_adamw(build, kind, bound, settings):
    """Also through a learning rate that changes;
    with 8-bit moments within 3 % of the way that the weights have gone.
    """
    exact, expected = build("adamw", **settings)
    start = {name: p.detach().clone() for name, p in expected.items()}
    optimizer, weights = build(kind, **settings)
    train(exact, expected, range(5))
    train(optimizer, weights, range(5))
    for name, p in weights.items():
        way = float((expected[name] - start[name]).detach().norm())
        off = float((p - expected[name]).detach().norm())
        assert way > 0
        assert off <= bound * way


@needs_torchao
def test_moments_of_large_tensors_are_8_bit_and_those_of_small_ones_are_not(build):
    optimizer, weights = build("adamw_8bit")
    train(optimizer, weights, range(1))
    tensors = state_tensors(optimizer, weights)
    for name, p in weights.items():
        quantised = p.numel() >= 4096 and p.numel() % 256 == 0
        moments = [t for key, t in tensors.items() if key.startswith(f"{name}/exp_avg")]
        nbytes = sum(t.nbytes for t in moments) - (2 * 256 * 4 if quantised else 0)  # less the two tables of 256 values
        assert nbytes == (2 * (p.numel() + 4 * p.numel() // 256) if quantised else 8 * p.numel())
    assert sum(t.dtype == torch.uint8 for t in tensors.values()) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [{0}, {2}, {1, 2}])
def test_a_bad_gradient_leaves_weights_and_state_and_the_rest_goes_on_as_if_it_had_not_been(build, kind, bad):
    optimizer, weights = build(kind)
    other, expected = build(kind)
    for number in range(4):
        before = snapshot(optimizer, weights)
        train(optimizer, weights, [number], bad)
        if number in bad and number:
            assert_equal(snapshot(optimizer, weights), before)
    train(other, expected, [number for number in range(4) if number not in bad])
    assert_equal(snapshot(optimizer, weights), snapshot(other, expected))
    assert all(torch.isfinite(p).all() for p in weights.values())


@pytest.mark.parametrize("kind", ["adamw", pytest.param("adamw_8bit", marks=needs_torchao)])
def test_a_step_reads_nothing_on_the_host(build, kind):
    optimizer, weights = build(kind)
    train(optimizer, weights, range(1))
    assert count_host_reads(lambda: train(optimizer, weights, range(1, 3), bad={2})) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [set(), {2}])
def test_state_through_a_file_gives_the_uninterrupted_run_bit_for_bit(build, kind, bad, tmp_path):
    optimizer, weights = build(kind)
    train(optimizer, weights, range(3), bad)
    save_file(state_tensors(optimizer, weights), tmp_path / "state.safetensors")
    resumed, copies = build(kind)
    with torch.no_grad():
        for name, p in copies.items():
            p.copy_(weights[name])
    load_state_tensors(resumed, copies, load_file(tmp_path / "state.safetensors"))
    assert_equal(snapshot(resumed, copies), snapshot(optimizer, weights))
    for one, its in ((optimizer, weights), (resumed, copies)):
        train(one, its, range(3, 6), {4})
    assert_equal(snapshot(resumed, copies), snapshot(optimizer, weights))


@pytest.mark.parametrize("kind", ["adamw", "apex_fused_adam"])
def test_names_in_a_file_are_those_of_every_checkpoint_so_far(build, kind):
    optimizer, weights = build(kind)
    train(optimizer, weights, range(2))
    tensors = state_tensors(optimizer, weights)
    assert set(tensors) == {f"{name}/{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(tensors[f"{name}/step"].shape == () and float(tensors[f"{name}/step"]) == 2 for name in weights)


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def with_one_more(tensors):
    return {**tensors, "block.9/step": torch.zeros(())}


def of_another_shape(tensors):
    return {
        key: tensor[:1] if key == "block.0/exp_avg" or key.endswith("/codes") else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [without_one, with_one_more, of_another_shape])
def test_state_that_does_not_fit_is_refused(build, kind, change):
    optimizer, weights = build(kind)
    train(optimizer, weights, range(1))
    tensors = state_tensors(optimizer, weights)
    with pytest.raises(ValueError):
        load_state_tensors(build(kind)[0], weights, change(tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_another_dtype_is_refused_by_an_optimizer_that_has_not_stepped(build, kind):
    optimizer, weights = build(kind)
    train(optimizer, weights, range(1))
    tensors = state_tensors(optimizer, weights)
    for key, tensor in tensors.items():
        fresh, own = build(kind)
        with pytest.raises(ValueError, match=key):
            load_state_tensors(fresh, own, {**tensors, key: tensor.long()})
    fresh, own = build(kind)
    load_state_tensors(fresh, own, tensors)
    assert_equal(state_tensors(fresh, own), tensors)


@needs_torchao
def test_a_resumed_8_bit_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    recipe = tiny_recipe(
        tmp_path, update={"optimizer": "adamw_8bit", "lr": 1e-3}, run={"iterations": 2, "eval_every": 0}
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    succeed("train", recipe, "--out", whole)
    succeed("train", recipe, "--out", run, "--set", "run.iterations=1")
    succeed("train", recipe, "--out", run)
    assert timeless(metrics_of(run)) == timeless(metrics_of(whole))
    last = "checkpoints/step_000002"
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (run / last / name).read_bytes() == (whole / last / name).read_bytes()
    tensors = load_file(whole / last / "optimizer.safetensors")
    assert any(
        key.endswith("/exp_avg/codes") and tensor.dtype == torch.uint8 and tensor.any()
        for key, tensor in tensors.items()
    )
    assert str(whole) in refuse("train", recipe, "--out", whole, "--set", "update.optimizer=adamw"), (
        "moments of one are no use to the other"
    )


def test_without_torchao_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    text = user_error(make_optimizer, Update(optimizer="adamw_8bit"), [torch.nn.Parameter(torch.zeros(1))], CPU)
    assert "update.optimizer" in text
    assert "pip install torchao" in text


@pytest.mark.parametrize("kind", ["adamw_8bit", "apex_fused_adam"])
def test_float64_weights_need_adamw(kind):
    weights = [torch.nn.Parameter(torch.zeros(4096, dtype=torch.float64))]
    text = user_error(make_optimizer, Update(optimizer=kind), weights, CUDA)
    assert "fp64" in text
    assert "update.optimizer: adamw" in text


# apex


def ask_for_apex(device):
    return user_error(make_optimizer, Update(optimizer="apex_fused_adam"), [torch.nn.Parameter(torch.zeros(1))], device)


def test_apex_needs_a_gpu(build, tmp_path):
    build("apex_fused_adam")
    assert "CUDA" in ask_for_apex(CPU)
    text = refuse("train", tiny_recipe(tmp_path, update={"optimizer": "apex_fused_adam"}), "--out", tmp_path / "run")
    assert "update.optimizer" in text
    assert "adamw" in text


def test_without_apex_the_error_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    text = ask_for_apex(CUDA)
    assert "update.optimizer" in text
    assert "git clone https://github.com/NVIDIA/apex" in text
    assert "APEX_CUDA_EXT=1" in text
    assert "--build-option=--cuda_ext" in text
    assert "unrelated" not in text


def test_the_apex_of_pypi_is_named_and_never_imported(install_apex):
    install_apex({"__init__.py": "raise SystemExit('imported')", "models.py": ""})
    assert is_unrelated_apex()
    for device in (CPU, CUDA):
        assert "unrelated package of that name on PyPI" in ask_for_apex(device)


def test_nvidias_apex_is_told_from_it(install_apex):
    install_apex({"optimizers/__init__.py": ""})
    assert not is_unrelated_apex()


@pytest.mark.parametrize(
    "content",
    [
        "import amp_C_that_is_not_there",
        "def FusedAdam(*arguments, **options): raise RuntimeError('requires cuda extensions')",
    ],
)
def test_an_apex_without_its_extensions_is_told_to_be_built_with_them(install_apex, content):
    install_apex({"optimizers/__init__.py": content})
    text = ask_for_apex(CUDA)
    assert "APEX_CUDA_EXT=1" in text
    assert "unrelated" not in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("kind", ["adamw", pytest.param("adamw_8bit", marks=needs_torchao)])
def test_a_step_on_a_gpu_does_not_wait_and_skips(kind):
    weights = {
        "w": torch.nn.Parameter(torch.randn(64, 256, device="cuda")),
        "b": torch.nn.Parameter(torch.randn(33, device="cuda")),
    }
    optimizer = make_optimizer(Update(optimizer=kind, lr=1e-2), weights.values(), CUDA)

    def step(bad):
        for p in weights.values():
            p.grad = torch.full_like(p, math.nan) if bad else torch.ones_like(p)
        optimizer.found_inf = torch.full((), float(bad), device="cuda")
        optimizer.step()

    step(False)
    before = snapshot(optimizer, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(snapshot(optimizer, weights), before)
    step(False)
    assert not torch.equal(weights["w"], before["w"])
