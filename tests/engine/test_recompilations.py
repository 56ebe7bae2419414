"""engine.compile over whole runs: all graphs are compiled before the first iteration is over."""

import pytest

from engine_cases import tiny_recipe
from flowgrove.bench.recipes import RECIPES
from flowgrove.models import compiling
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from model_recipes import TRAIN_PROMPTS
from tiny_families import FAMILIES, MODELS

ONE_PROMPT = {"prompts": "train.txt", "eval_prompts": "eval.txt", "prompts_per_iteration": 1}
LORA = {"lora": {"rank": 2, "alpha": 4}, "dtype": "bf16", "gradient_checkpointing": True}
SHORT = {  # of bench engine's recipes, in 8 steps; windows move, so that other passes have one row than before
    "tree": {"splits": [0, 2], "fanout": 2},
    "progressive": {"strategy": "progressive", "size": 2, "start": 0, "every": 1},
    "random": {"strategy": "random", "size": 2, "range": [0, 4]},
    "frozen": {"strategy": "frozen", "size": 2, "start": 0},
    "all": {"strategy": "all"},
}


@pytest.fixture
def graphs(monkeypatch, kept, fresh_dynamo):
    """What torch.compile hands to its backend, which runs it as it is."""
    found = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: found.append(graph) or graph.forward)
    return found


def compiled_in(graphs, folder, algorithm, model, **changes):
    """How many graphs are compiled in the first iteration, and in two more with their evaluations."""
    rollout = {**RECIPES[algorithm], "steps": 8, "group_size": 4}
    rollout["window"] = SHORT[rollout["window"]["strategy"]]
    rollout |= {"tree": SHORT["tree"]} if "tree" in rollout else {}
    changes["rollout"] = rollout | changes.get("rollout", {})
    run = {"iterations": 3, "eval_every": 1, "checkpoint_every": 0}
    path = tiny_recipe(folder, model=model, engine={"compile": True}, run=run, **{"data": ONE_PROMPT, **changes})
    trainer, counts = Trainer(Setup(load_recipe(path, ())), folder / "run"), []
    iterate = trainer.iterate

    def counting(number):
        line = iterate(number)
        counts.append(len(graphs))
        return line

    trainer.iterate = counting
    trainer.run()
    return counts[0], len(graphs) - counts[0]


@pytest.mark.long
def test_a_run_compiles_in_its_first_iteration_alone(graphs, tmp_path):
    """Three kinds of block with and without a gradient, of one row and of more."""
    assert compiled_in(graphs, tmp_path, "branch_mix_flash", {}) == (12, 0)


@pytest.mark.long
@pytest.mark.parametrize("algorithm", [name for name in RECIPES if name != "branch_mix_flash"])
def test_every_algorithm_compiles_in_the_first_iteration_alone(graphs, tmp_path, algorithm):
    assert compiled_in(graphs, tmp_path, algorithm, {}) == (12, 0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "changes", "most"),
    [
        (LORA, {}, 12),
        (LORA, {"update": {"kl_weight": 0.1}}, 18),
        ({"dtype": "bf16"}, {"update": {"kl_weight": 0.1, "ema_decay": 0.9}}, 18),
        ({"guidance_scale": 3.0}, {"rollout": {"guidance_range": [2, 4]}}, 12),
        ({"guidance_scale": 3.0}, {}, 6),
    ],
)
def test_whatever_trains_and_guides_compiles_in_the_first_iteration_alone(graphs, tmp_path, model, changes, most):
    assert compiled_in(graphs, tmp_path, "mix", model, **changes) == (most, 0)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_every_family_compiles_in_the_first_iteration_alone(graphs, folders, tmp_path, name):
    told = {**MODELS[name], "path": folders[name], **LORA}
    files = {key: FAMILIES[name].write_prompts(tmp_path / key, TRAIN_PROMPTS) for key in ("prompts", "eval_prompts")}
    data = {**{key: str(file) for key, file in files.items()}, "prompts_per_iteration": 1}
    rollout = {"cache": {"interval": 2}} if name == "flux" else {}
    more = {"reward": [{"name": "jpeg_size"}], "rollout": rollout, "data": data}
    first, later = compiled_in(graphs, tmp_path, "mix", told, **more)
    assert 4 <= first <= 16
    assert later == 0
