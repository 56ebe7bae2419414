"""What is data stays data: the sources open no pickle, run no text, and no folder of a model brings a program.

CONTRIBUTING.md (Security) says where the boundaries run.
"""

import ast
import json
import shutil
from contextlib import suppress

import pytest
import torch

from flowgrove.errors import UserError
from flowgrove.hub import named_program
from flowgrove.models.folders import TINY
from flowgrove.models.parts import part_class
from flowgrove.models.policy import Policy
from flowgrove.rewards.clip import load_tokenizer
from policy_cases import CPU, TEXTS, small_recipe
from subprocesses import ROOT

SOURCES = sorted((ROOT / "engine").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# what runs a text, or a program that a text names
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"}
# modules of the engine → the calls that may stand there, with what they run
ALLOWED = {
    ("machine.py", "subprocess.run"),  # the C++ compiler, asked for its version
    ("processes.py", "subprocess.Popen"),  # this Python with compare/worker.py, for a run of a comparison
    ("remote.py", "subprocess.Popen"),  # this Python with run/trackers/child.py, for a tracker that run.log names
    ("python.py", "importlib.util.spec_from_file_location"),  # a reward named python, behind --allow-python
}


def name_of(node):
    """`a.b.c` of a call's function; "" for any other expression."""
    if isinstance(node, ast.Attribute):
        inner = name_of(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls_of(tree):
    return [(name_of(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.fixture(scope="module")
def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def test_no_module_imports_a_pickle(trees):
    found = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {(path.name, name) for name in names if name.split(".")[0] in PICKLES}
    assert found == set()


def test_torch_files_are_read_as_weights_only_and_arrays_without_objects(trees):
    for path, tree in trees.items():
        for name, call in calls_of(tree):
            options = {option.arg: option.value for option in call.keywords}
            if name == "torch.load":
                assert isinstance(options.get("weights_only"), ast.Constant), path
                assert options["weights_only"].value is True, path
            assert "allow_pickle" not in options, path
            assert not name.endswith("_object") or not name.startswith("dist."), f"{path}: ranks send tensors"


def test_nothing_runs_a_text(trees):
    found = set()
    for path, tree in trees.items():
        for name, call in calls_of(tree):
            if name in RUNS or name.startswith("subprocess.") or name.endswith("spec_from_file_location"):
                found.add((path.name, name))
            shell = [option for option in call.keywords if option.arg == "shell"]
            assert not shell, path
            assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), path
    assert found == ALLOWED


def test_nothing_trusts_remote_code_or_downloads(trees):
    """`from_pretrained` and `snapshot_download` look at this machine alone."""
    own = (("models.py", "AutoTokenizer.from_pretrained"),)  # of the embedded pipeline
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                raise AssertionError(f"{path}: flowgrove.hub says it for all")
        for name, call in calls_of(tree):
            if name.endswith(("from_pretrained", "snapshot_download")) and (path.name, name) not in own:
                spelt = ast.unparse(call)
                assert any(told in spelt for told in ("local_files_only", "**options", "DATA_ONLY")), f"{path}: {spelt}"


@pytest.fixture
def copied(tmp_path):
    """The embedded pipeline, with a program that leaves a file behind when it runs."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    for place in (folder, folder / "transformer", folder / "tokenizer", folder / "text_encoder"):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    return folder


def change(file, **content):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | content))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model_index.json", {"_class_name": ["evil", "Evil"]}),
        ("model_index.json", {"transformer": ["evil", "Evil"]}),
        ("transformer/config.json", {"auto_map": {"AutoModel": "evil.Evil"}, "_class_name": ["evil", "Evil"]}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}),
        ("text_encoder/config.json", {"attn_implementation": "evil/kernel"}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    ],
)
def test_a_model_folder_runs_no_program(copied, tmp_path, monkeypatch, file, content):
    """Whether it is refused or loads as what it is without the program."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    change(copied / file, **content)
    recipe = small_recipe(model={"adapter": "sd3", "path": str(copied), "dtype": "fp32"})
    with suppress(UserError):
        Policy.load(recipe, CPU, TEXTS)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_a_reward_runs_no_program(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    change(
        copied / "tokenizer" / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    with pytest.raises(UserError, match="no tokenizer can be read"):
        load_tokenizer("clip_score", copied / "tokenizer")
    assert not (tmp_path / "ran").exists()


def test_whole_pipelines_and_auto_classes_are_no_parts(copied):
    for named in (["transformers", "AutoModel"], ["transformers", "pipeline"], ["diffusers", "DiffusionPipeline"]):
        change(copied / "model_index.json", text_encoder=named)
        with pytest.raises(UserError):
            part_class(copied, "text_encoder")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"attn_implementation": "sdpa"}, None),
        ({"text_config": {"attn_implementation": "some/kernel@1:flash"}}, "some/kernel@1:flash"),
        ([{"_attn_implementation": {"": "some/kernel"}}], "{'': 'some/kernel'}"),
        ("no JSON", None),
    ],
)
def test_kernels_of_the_hub_are_found_in_configurations(tmp_path, config, found):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert named_program(tmp_path) == found


class Program:
    """Pickles that run something when they are opened."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_a_pickle_among_the_weights_runs_nothing(copied, tmp_path, part):
    (weights,) = (copied / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"weight": Program(tmp_path / "ran")}, copied / part / name)
    recipe = small_recipe(model={"adapter": "sd3", "path": str(copied), "dtype": "fp32"})
    with pytest.raises(UserError):
        Policy.load(recipe, CPU, TEXTS)
    assert not (tmp_path / "ran").exists()
