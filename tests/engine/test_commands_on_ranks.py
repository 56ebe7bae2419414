"""`flowgrove eval` and `flowgrove sample` on several ranks: what one process gives, each text encoded once.

In float64: in fp32 the last bit of a product depends on how many rows the pass has.
"""

from itertools import chain
from types import SimpleNamespace

import pytest

from engine_cases import contents, metrics_of, succeed, tiny_recipe, weights_of, write_lines
from torchrun import torchrun

HELD_OUT = ["a purple square at the centre", "a red cross at the top left", "a blue circle at the bottom right"]
COUNTED = """
import os, sys
from pathlib import Path
from flowgrove.cli import app
from flowgrove.models.families.sd3 import FAMILY

encode = FAMILY.encode

def counted(self, texts):
    with Path(sys.argv[1], os.environ["RANK"]).open("a") as file:
        file.writelines(f"{text}\\n" for text in texts)
    return encode(self, texts)

FAMILY.encode = counted
app(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with embeddings in a folder, three held-out prompts and two samples of each."""
    folder = tmp_path_factory.mktemp("trained")
    run = {"iterations": 1, "checkpoint_every": 0, "eval_every": 0, "eval": {"samples": 2}}
    model = {"dtype": "fp64"}
    recipe = tiny_recipe(folder, model=model, data={"embedding_cache": str(folder / "embeddings")}, run=run)
    write_lines(folder / "eval.txt", HELD_OUT)
    succeed("train", recipe, "--out", folder / "run")
    return SimpleNamespace(recipe=recipe, run=folder / "run", folder=folder)


def counted(ranks, folder, *arguments):
    """What a command prints on several ranks, and the texts that each of them encoded."""
    (folder / "counted.py").write_text(COUNTED)
    (folder / "texts").mkdir()
    text = torchrun(ranks, folder / "counted.py", folder / "texts", *arguments, output=folder / "log")
    return text, [file.read_text().splitlines() for file in sorted((folder / "texts").iterdir())]


@pytest.mark.long
def test_ranks_evaluate_as_one_process_and_encode_each_text_once(trained, tmp_path):
    told = succeed("eval", trained.run).stdout
    alone = (trained.run / "eval.json").read_bytes()
    (trained.run / "eval.json").unlink()
    cache = f"data.embedding_cache={tmp_path / 'embeddings'}"
    text, encoded = counted(2, tmp_path, "eval", trained.run, "--set", cache)
    assert (trained.run / "eval.json").read_bytes() == alone
    assert text.count(told) == 1, text
    assert sorted(chain(*encoded)) == sorted([*HELD_OUT, ""])
    assert [len(texts) for texts in encoded] == [2, 2]


@pytest.mark.long
def test_ranks_sample_as_one_process(trained, tmp_path):
    prompts = write_lines(tmp_path / "prompts.txt", HELD_OUT)
    succeed("sample", trained.run, "--prompts", prompts, "--out", tmp_path / "one", "--compare")
    arguments = ("sample", trained.run, "--prompts", prompts, "--out", tmp_path / "two", "--compare")
    text = torchrun(2, "-m", "flowgrove", *arguments, output=tmp_path / "log")
    assert text.count("wrote 6 samples") == 1, text
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) == 2 * 6 + 2 + 1
    assert one == two


@pytest.mark.long
def test_fewer_prompts_than_ranks_are_sampled_and_evaluated(trained, tmp_path):
    prompts = write_lines(tmp_path / "prompts.txt", HELD_OUT[:1])
    for ranks in (1, 3):
        out = ("--prompts", prompts, "--out", tmp_path / str(ranks), "--compare")
        torchrun(ranks, "-m", "flowgrove", "sample", trained.run, *out, output=tmp_path / "log")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    held_out = f"data.eval_prompts={prompts}"
    succeed("eval", trained.run, "--set", held_out)
    alone = (trained.run / "eval.json").read_bytes()
    torchrun(3, "-m", "flowgrove", "eval", trained.run, "--set", held_out, output=tmp_path / "log")
    assert (trained.run / "eval.json").read_bytes() == alone


@pytest.mark.long
def test_ranks_train_from_embeddings_that_each_has_stored_a_share_of(trained, tmp_path):
    options = ("--set", "engine.distributed=ddp", "--set", "run.eval_every=1")
    recipe = trained.recipe
    succeed("train", recipe, *options, "--out", tmp_path / "one")
    for name in ("shared", "divided"):
        (tmp_path / name).mkdir()
        cache = ("--set", f"data.embedding_cache={tmp_path / name / 'embeddings'}")
        _, encoded = counted(2, tmp_path / name, "train", recipe, *options, *cache, "--out", tmp_path / name / "run")
        every = list(chain(*encoded))
        assert len(every) == len(set(every)), "each once"
        assert abs(len(encoded[0]) - len(encoded[1])) <= 1
        left, right = (metrics_of(tmp_path / folder) for folder in ("one", f"{name}/run"))
        assert [line["reward"] for line in left] == [line["reward"] for line in right]
        weights = [weights_of(tmp_path / folder, 1) for folder in ("one", f"{name}/run")]
        assert max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0]) < 1e-10


@pytest.mark.long
def test_an_error_of_a_command_on_ranks_is_told_once(trained, tmp_path):
    for arguments, words in (
        (("eval", trained.run, "--checkpoint", "7"), "has no such checkpoint"),
        (("eval", trained.run, "--set", "data.eval_prompts=null"), "nothing to evaluate on"),
        (("eval", trained.recipe), "is not a run folder"),
        (("sample", trained.recipe, "--prompts", trained.folder / "eval.txt", "--out", tmp_path, "--compare"),
         "--compare sets"),
        (("export", trained.run, "--out", tmp_path / "export"), "runs in one process, not in 2"),
    ):  # fmt: skip
        text = torchrun(2, "-m", "flowgrove", *arguments, output=tmp_path / "log", code=1)
        assert text.count("error: ") == text.count(words) == 1, text
