"""engine.cuda_graphs: a pass recorded once and replayed for every timestep, prompt and key gives the eager results.

Without a GPU the recording is a function that runs again on the recording's own tensors: what a replay would miss,
because it did not come in as a tensor, is missed here too.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from flowgrove.data.prompt import Prompt
from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.recordings import Recordings, _Recorded
from flowgrove.rollout.loop import rollout
from flowgrove.update.ema import Ema
from policy_cases import CPU, TEXTS, plan_and_coefficients, policy_of, runner_of, small_recipe
from rollout_cases import CPS, FLAT, TAIL, TREE
from tiny_families import MODELS, write_pipeline

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
RANGE = {"rollout": {"guidance_range": [0, 2]}}
MODEL = {"adapter": "sd3", "path": "tiny", "gradient_checkpointing": False}


class Replayed(Recordings):
    """Runs the recorded function again instead of a graph, and counts."""

    replays = 0

    def _record(self, function, inputs):
        outputs = [None if tensor is None else tensor.clone() for tensor in function(*inputs)]

        def replay():
            self.replays += 1
            for place, tensor in zip(outputs, function(*inputs), strict=True):
                if place is not None:
                    place.copy_(tensor)

        return _Recorded(inputs, outputs, replay)


def policy_on(device, dtype="fp32", **model):
    policy = Policy.load(
        small_recipe(model={**MODEL, "dtype": dtype, **model}, engine={"device": device}), torch.device(device)
    )
    graphs = Recordings(policy.device) if device == "cuda" else Replayed(policy.device)
    return policy, graphs, *runners(policy, graphs)


def runners(policy, graphs):
    """One that launches the policy's passes, and one that records them."""
    plain = runner_of(policy)
    return plain, PassRunner(plain.budget, graphs)


def leaves_of(policy, runner, recipe, iteration=0, texts=TEXTS, seed=5, **options):
    plan, rows = plan_and_coefficients(recipe, iteration)
    forest = rollout(
        plan,
        rows.to(policy.device),
        policy,
        policy.encode(texts),
        runner,
        seed=seed,
        iteration=iteration,
        **options,
    )
    return forest.leaves, forest.logp


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sections", [FLAT, TREE, TAIL, CPS, RANGE], ids=["flat", "tree", "tail", "cps", "guidance_range"]
)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_replayed_rollouts_equal_eager_ones_for_other_seeds_prompts_and_iterations(device, sections, guidance):
    policy, graphs, plain, recording = policy_on(device, guidance_scale=guidance)
    recipe = small_recipe(**sections)
    for iteration, texts, seed in ((0, TEXTS, 5), (1, TEXTS[::-1], 6)):
        eager = leaves_of(policy, plain, recipe, iteration, texts, seed)
        recorded = leaves_of(policy, recording, recipe, iteration, texts, seed)
        assert all(torch.equal(one, other) for one, other in zip(eager, recorded, strict=True))
    plan, _ = plan_and_coefficients(recipe)
    assert 0 < len(graphs) < len(plan.steps) + 1, "a recording serves more than one timestep"


@pytest.mark.parametrize("device", DEVICES)
def test_replays_take_each_prompts_own_negative_one(device):
    policy, graphs, plain, recording = policy_on(device, guidance_scale=2.5)
    recipe = small_recipe()
    for away in (TEXTS, TEXTS[::-1], ["a green cross"] * len(TEXTS)):
        prompts = [Prompt(text, negative=other) for text, other in zip(TEXTS, away, strict=True)]
        eager = leaves_of(policy, plain, recipe, texts=prompts)
        recorded = leaves_of(policy, recording, recipe, texts=prompts)
        assert all(torch.equal(one, other) for one, other in zip(eager, recorded, strict=True))
    assert len(graphs) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_replay_follows_trained_weights_their_average_and_the_reference_model(device, dtype):
    policy, _, plain, recording = policy_on(device, dtype, lora={"rank": 4, "alpha": 8})
    recipe = small_recipe()
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.normal_(std=0.05)
    ema = Ema(policy.weights, 0.9)
    kinds = []
    for move in (0.0, 0.02):
        with torch.no_grad():
            for parameter in policy.weights.trainable().values():
                parameter.add_(move)
        policy.weights.refresh()

        def three(runner):
            trained = leaves_of(policy, runner, recipe)[0]
            with ema.swapped_in():
                average = leaves_of(policy, runner, recipe)[0]
            return trained, average, leaves_of(policy, runner, recipe, tuned_steps=0)[0]

        eager = three(plain)
        assert all(torch.equal(one, other) for one, other in zip(eager, three(recording), strict=True))
        kinds.append(eager)
    assert not torch.allclose(kinds[0][0], kinds[1][0], atol=1e-3), "training moved the leaves"
    assert torch.equal(kinds[0][1], kinds[1][1])
    assert torch.equal(kinds[0][2], kinds[1][2])


def test_prompts_of_other_lengths_are_other_recordings(tmp_path):
    model = {
        **MODELS["qwen_image"],
        "path": str(write_pipeline("qwen_image", tmp_path / "qwen")),
        "dtype": "fp32",
        "gradient_checkpointing": False,
    }
    recipe = small_recipe(model=model)
    policy, graphs = Policy.load(recipe, CPU, TEXTS), Replayed(CPU)
    plain, recording = runners(policy, graphs)
    for texts in (TEXTS, ["a red circle " * 12, "a cross"], TEXTS[::-1]):
        eager, recorded = (leaves_of(policy, runner, recipe, texts=texts) for runner in (plain, recording))
        assert all(torch.equal(one, other) for one, other in zip(eager, recorded, strict=True))
    assert graphs.replays == 3 * len(plan_and_coefficients(recipe)[0].steps)


def test_recordings_are_counted_by_shape():
    policy, graphs, _, recording = policy_on("cpu")
    recipe = small_recipe(rollout={"steps": 8, "window": {"strategy": "frozen", "size": 2, "start": 3}})
    for seed in range(3):
        leaves_of(policy, recording, recipe, seed=seed)
    # one state per prompt without noise; with noise, four children each; four states with noise; four without
    assert len(graphs) == 4
    assert graphs.replays == 3 * 8


def test_cuda_graphs_without_a_gpu_are_refused():
    with pytest.raises(UserError, match="cuda_graphs"):
        PassRunner.of(small_recipe(engine={"device": "cpu", "cuda_graphs": True}), policy_of())


# Captures that fail


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins for streams and captures. `ends`: what the capture's end raises; `current`: the stream; `ended`: pools
    whose recording was ended by hand."""
    gpu = SimpleNamespace(current="caller", ends=None, ended=[], pools=iter(range(100)))

    class Stream:
        def __init__(self, device):
            self.name = "side"

        def wait_stream(self, other):
            """Nothing is queued."""

    streams = {"caller": SimpleNamespace(name="caller", wait_stream=lambda other: None)}

    @contextmanager
    def stream(wanted):
        before, gpu.current = gpu.current, wanted.name
        streams[wanted.name] = wanted
        try:
            yield
        finally:
            gpu.current = before

    class Graph:
        """As torch.cuda.graph: where the capture's end raises, its own stream stays current."""

        def __init__(self, graph, pool, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            self.before, gpu.current = gpu.current, self.stream.name

        def __exit__(self, *error):
            if gpu.ends is not None:
                raise gpu.ends
            gpu.current = self.before

    stands_in = {
        "Stream": Stream, "stream": stream, "graph": Graph, "current_stream": lambda device=None: streams[gpu.current],
        "graph_pool_handle": lambda: next(gpu.pools), "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "current_device": lambda: 0,
    }  # fmt: skip
    for name, thing in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, thing)
    end = "_cuda_endAllocateToPool"
    monkeypatch.setattr(torch._C, end, lambda device, pool: gpu.ended.append((device, pool)), raising=False)
    return gpu


def failing(error):
    """Runs twice, then fails: its capture."""
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) > 2:
            raise error
        return [x]

    return function


INVALID = RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("ends", [None, INVALID], ids=["its end works", "its end fails"])
def test_a_failed_capture_is_one_line_and_leaves_stream_and_allocator_as_they_were(gpu, ends):
    graphs, gpu.ends = Recordings(torch.device("cuda")), ends
    with pytest.raises(UserError, match=r"engine\.cuda_graphs: false"):
        graphs("key", failing(RuntimeError("operation not permitted when stream is capturing")), [torch.ones(2)])
    assert gpu.current == "caller"
    assert gpu.ended == [(0, 0)], "the allocator records into the pool no more"
    assert (graphs._pool, len(graphs)) == (1, 0), "the next recording has a pool of its own"
    gpu.ends = None
    (result,) = graphs("key", lambda x: [x + 1], [torch.ones(2)])
    assert result.tolist() == [2, 2]


@pytest.mark.parametrize("ends", [None, INVALID], ids=["its end works", "its end fails"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_a_capture_without_room_says_so_whatever_its_end_says(gpu, ends, error):
    graphs, gpu.ends = Recordings(torch.device("cuda")), ends
    with pytest.raises(RuntimeError) as caught:
        graphs("key", failing(error), [torch.ones(2)])
    assert caught.value is error
    assert gpu.current == "caller"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_goes_on_after_a_failed_capture():
    device = torch.device("cuda")
    graphs, before, x = Recordings(device), torch.cuda.current_stream(), torch.ones(1000, device="cuda")
    with pytest.raises(UserError, match=r"engine\.cuda_graphs: false"):
        graphs("reads", lambda x: [x * x.sum().item()], [x])
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    (result,) = graphs("works", lambda x: [x * 2], [x])
    assert bool((result == 2).all())


@pytest.mark.parametrize("device", DEVICES)
def test_recordings_are_of_one_precision_each_and_follow_rounded_weights(device):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    policy, graphs, plain, recording = policy_on(device)
    policy.weights.cheapen("int8")
    recipe = small_recipe(rollout={"precision": "int8"})
    for factor in (1.0, 1.02, 0.97):
        with torch.no_grad():
            for weight in policy.weights.trainable().values():
                weight.mul_(factor)
        policy.weights.refresh()
        eager, replayed = (leaves_of(policy, runner, recipe)[0] for runner in (plain, recording))
        assert torch.equal(eager, replayed)
        count = len(graphs)
    full = leaves_of(policy, recording, small_recipe())[0]
    assert not torch.equal(full, replayed)
    steps = [(len(TEXTS), False), (len(TEXTS), True), (4 * len(TEXTS), False), (4 * len(TEXTS), True)]
    assert count == len(steps)  # rows of a pass, and whether it is in 8 bits
