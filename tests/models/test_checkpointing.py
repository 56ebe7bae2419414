"""What training passes keep for their backward: the gradient stays, memory and the work that is repeated do not."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrove.errors import UserError
from flowgrove.models import checkpointing, compiling
from flowgrove.models.checkpointing import checkpoint_blocks
from flowgrove.models.policy import Policy
from flowgrove.plan.allocations import graph_bytes
from flowgrove.plan.flops import count_flops
from flowgrove.plan.memory import MemoryModel
from flowgrove.recipe.checks import check_meaning
from flowgrove.recipe.loading import parse_recipe
from flowgrove.tuning.graph_room import NO_ROOM, GraphRoom
from planner_cases import user_error
from policy_cases import CPU, encoded, plan_and_coefficients, small_recipe

TINY = {"adapter": "sd3", "path": "tiny", "dtype": "fp64"}
LORA = {"rank": 4, "alpha": 8}
KINDS = ("none", "selective", "full")
ALL = (*KINDS, "offload")


def policy_of(kind, **model):
    return Policy.load(small_recipe(model={**TINY, "gradient_checkpointing": kind, **model}), CPU)


def velocity(policy, rows=2):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *policy.adapter.latent_shape, generator=draw).to(policy.state_dtype)
    prompt = torch.zeros(rows, dtype=torch.int64)
    return policy.velocity(x, torch.linspace(0.7, 0.3, rows), encoded(policy), prompt).v


class Ops(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def in_backward(kind, **model):
    """How often each op runs in the backward of a pass."""
    v = velocity(policy_of(kind, **model))
    with Ops() as ops:
        v.square().sum().backward()
    return ops.count


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_gradient_is_the_same_in_float64(lora):
    gradients = []
    for kind in ALL:
        policy = policy_of(kind, lora=lora)
        for number, weight in enumerate(policy.weights.trainable().values()):
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(number))
        velocity(policy).square().sum().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in policy.weights.trainable().values()]))
    norm = float(gradients[0].norm())
    assert norm > 1e-6
    for other in gradients[1:]:
        assert float((gradients[0] - other).norm()) <= 1e-12 * norm


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_attention_and_products_do_not_run_again(dtype):
    counts = {kind: in_backward(kind, dtype=dtype) for kind in KINDS}
    attention = next(name for name in counts["full"] if "scaled_dot_product" in name and "backward" not in name)
    assert counts["none"][attention] == counts["selective"][attention] == 0 < counts["full"][attention]
    for product in ("aten.addmm.default", "aten.mm.default"):
        assert counts["none"][product] == counts["selective"][product]
    assert counts["none"]["aten.addmm.default"] < counts["full"]["aten.addmm.default"]
    assert counts["none"]["aten.gelu.default"] < counts["selective"]["aten.gelu.default"]


def test_the_second_product_of_lora_runs_again():
    """It takes rank numbers an element, and keeping it would take as much memory as the layer's own."""
    counts = {kind: in_backward(kind, lora=LORA) for kind in KINDS}
    layers = sum("lora_B" in name for name in policy_of("none", lora=LORA).weights.trainable())
    again = counts["selective"]["aten.addmm.default"] - counts["none"]["aten.addmm.default"]
    # the last layer of a block need not run again, nor what no later op of it needs
    assert layers // 2 <= again <= layers
    assert counts["none"]["aten.mm.default"] == counts["selective"]["aten.mm.default"]


def test_it_holds_less_than_everything_and_more_than_the_inputs_of_blocks():
    none, selective, full = (graph_bytes(partial(velocity, policy_of(kind, dtype="fp32"))) for kind in KINDS)
    assert full < selective < none


def test_inputs_of_blocks_that_have_a_gradient_go_to_the_host_and_others_stay(monkeypatch):
    sent, inner = [], checkpointing._to_host

    def noting(x):
        kept = inner(x)
        sent.append((kept is not x, x.requires_grad, tuple(x.shape)))
        return kept

    monkeypatch.setattr(checkpointing, "_to_host", noting)
    policy = policy_of("offload", lora=LORA)
    for parameter in policy.weights.trainable().values():
        torch.nn.init.normal_(parameter, std=0.05)
    v = velocity(policy)
    blocks = len(policy.transformer.transformer_blocks)
    assert all(goes == differentiable for goes, differentiable, _ in sent)
    # the first block's inputs come from frozen layers
    assert Counter(goes for goes, *_ in sent)[True] == 2 * (blocks - 1)
    count = len(sent)
    v.square().sum().backward()
    assert len(sent) == count, "the block that runs again keeps what it needs where it is"


def test_a_prediction_counts_nothing_that_lies_in_host_memory():
    full, offload = (
        MemoryModel(recipe, plan_and_coefficients(recipe)[0], "cuda")
        for recipe in (
            small_recipe(model={**TINY, "lora": LORA, "gradient_checkpointing": kind}) for kind in ("full", "offload")
        )
    )
    assert offload.graph < 0.5 * full.graph
    assert offload.at(400).peak <= full.at(400).peak
    size, rows = offload.geometry, offload.at(400).rows
    width, blocks = offload.transformer.inner_dim, len(offload.transformer.transformer_blocks)
    states = (rows * tokens * width * 8 for tokens in (size.picture_tokens, size.tokens - size.picture_tokens))
    held = (blocks - 1) * sum(1 << (count - 1).bit_length() for count in states)
    assert (full.at(400).host, offload.at(400).host) == (0, held)


def test_graphs_of_a_rollout_are_not_kept_in_host_memory():
    model = {**TINY, "gradient_checkpointing": "offload"}
    assert GraphRoom.asked(small_recipe(model=model), False, lambda: 100) is NO_ROOM
    assert "reuse_rollout_graph" in user_error(
        lambda: check_meaning(small_recipe(model=model, engine={"device": "cpu", "reuse_rollout_graph": True}))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu_inputs_in_host_memory_give_the_same_bits_without_a_wait():
    found = {}
    for kind in ("full", "offload"):
        recipe = small_recipe(model={**TINY, "dtype": "bf16", "lora": LORA, "gradient_checkpointing": kind})
        policy = Policy.load(recipe, torch.device("cuda"))
        for number, weight in enumerate(policy.weights.trainable().values()):
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator("cuda").manual_seed(number))
        policy.weights.refresh()
        x = torch.randn(
            2, *policy.adapter.latent_shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda"
        )
        sigma, prompt = torch.tensor([0.7, 0.3], device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
        prompts, held = encoded(policy), []
        try:
            for mode in ("default", "error"):  # the first round loads kernels and pins memory
                policy.weights.drop_gradients()
                torch.cuda.set_sync_debug_mode(mode)
                v = policy.velocity(x, sigma, prompts, prompt).v
                held.append(torch.cuda.memory_allocated())
                v.square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gradients = [weight.grad.clone() for weight in policy.weights.trainable().values()]
        found[kind] = v.detach().clone(), gradients, held[-1]
    (v, gradients, held), (others, theirs, more) = found["offload"], found["full"]
    assert torch.equal(v, others)
    assert all(torch.equal(one, other) for one, other in zip(gradients, theirs, strict=True))
    assert held < more


@pytest.mark.long
def test_what_runs_again_is_counted():
    none, selective, full, offload = (
        count_flops(small_recipe(model={**TINY, "gradient_checkpointing": kind, "lora": LORA}))[0] for kind in ALL
    )
    assert offload == full
    assert none.train == selective.train == full.train
    assert none.recomputed == 0 < selective.recomputed < 0.1 * full.recomputed
    assert full.recomputed > 0.8 * full.forward


@pytest.mark.parametrize(("written", "read"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_true_and_false_are_full_and_none(written, read):
    recipe = small_recipe(model={**TINY, "gradient_checkpointing": written})
    assert recipe.model.gradient_checkpointing == read
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.fixture
def divided_graphs(monkeypatch, fresh_dynamo, kept):
    """Forward and backward graphs of whatever is compiled, divided by torch's own partitioner and run as they are."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))
    found = {"forward": [], "backward": []}

    def keep(part):
        return lambda graph, inputs: found[part].append(graph.graph) or make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )
    monkeypatch.setattr(compiling, "BACKEND", backend)
    return found


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.back = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.back(nn.functional.gelu(self.wide(self.norm(x))))


def test_a_compiled_checkpoint_runs_no_product_again(divided_graphs):
    taken = []
    checkpoint_blocks(SimpleNamespace(enable_gradient_checkpointing=taken.append), "selective", True)
    block, x = Block(), torch.randn(3, 5, 8, requires_grad=True)
    block(x).square().sum().backward()
    expected, x.grad = x.grad, None
    taken[0](block, x).square().sum().backward()
    assert torch.allclose(x.grad, expected, rtol=1e-6, atol=1e-6)
    forward, backward = (Counter(str(node.target) for node in graphs[0].nodes) for graphs in divided_graphs.values())
    assert forward["aten.addmm.default"] == 2
    assert backward["aten.addmm.default"] == 0 < backward["aten.gelu.default"]


@pytest.mark.long
def test_compiled_blocks_keep_what_eager_ones_do(divided_graphs):
    """The same products run in the backward, the gradient is the same, and another number of rows compiles nothing."""
    recipe = small_recipe(
        model={**TINY, "gradient_checkpointing": "selective", "lora": LORA}, engine={"device": "cpu", "compile": True}
    )
    compiled, eager = Policy.load(recipe, CPU), policy_of("selective", lora=LORA)
    gradients = []
    for policy in (eager, compiled):
        for number, weight in enumerate(policy.weights.trainable().values()):
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(number))
        velocity(policy).square().sum().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in policy.weights.trainable().values()]))
    assert float((gradients[0] - gradients[1]).norm()) <= 1e-12 * float(gradients[0].norm())
    forward, again = (
        Counter(str(node.target) for graph in divided_graphs[part] for node in graph.nodes)
        for part in ("forward", "backward")
    )
    attention = next(name for name in forward if "scaled_dot_product" in name)
    assert again[attention] == again["aten.addmm.default"] == 0 < forward["aten.addmm.default"]
    assert again["aten.native_layer_norm.default"] > 0
    graphs = len(divided_graphs["backward"])
    assert graphs > 0
    for rows in (3, 5):
        velocity(compiled, rows).square().sum().backward()
    assert len(divided_graphs["backward"]) == graphs


def test_selective_checkpoints_are_compiled_unless_ranks_gather_weights():
    model, engine = {**TINY, "gradient_checkpointing": "selective"}, {"compile": True}
    check_meaning(small_recipe(model=model, engine=engine))
    with pytest.raises(UserError, match=r"engine\.compile.*fsdp2.*write full or none"):
        check_meaning(small_recipe(model=model, engine={**engine, "distributed": "fsdp2"}))
