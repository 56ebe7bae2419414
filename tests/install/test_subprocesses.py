"""The GPU tests are collected, and their programs start,
where neither this package nor everything it can use is installed.
"""

import ast
import sys
from pathlib import Path

import pytest

import subprocesses
from subprocesses import ROOT, python

# What every file may import at its top; anything else is imported where it is used.
EVERYWHERE = {
    "accelerate",
    "diffusers",
    "hypothesis",
    "jinja2",
    "matplotlib",
    "numpy",
    "peft",
    "PIL",
    "pyarrow",
    "pydantic",
    "pytest",
    "rich",
}
EVERYWHERE |= {"safetensors", "scipy", "tokenizers", "torch", "transformers", "triton", "typer", "yaml"}
ABSENT = ("av", "ftfy", "open_clip", "playwright", "ImageReward", "torchvision", "ninja", "ruff", "mypy")
COLLECT = f"""
import sys
from importlib.machinery import PathFinder
import pytest

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.exit(pytest.main(["--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("root", ["engine", "kernels", "tests"])
def test_files_import_at_their_top_only_what_is_everywhere(root):
    files = [path for path in (ROOT / root).rglob("*.py") if "fixtures" not in path.parts]
    own = {path.stem for path in files} | {"flowgrove", "flowgrove_kernels", "cuda_on_cpu"}
    own |= {path.parent.name for path in files if path.name == "__init__.py"}
    own |= {path.stem for path in (ROOT / "profiling").iterdir()}
    found = set()
    for path in files:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {
                (path.name, name)
                for name in names
                if name.partition(".")[0] not in EVERYWHERE | own | sys.stdlib_module_names
            }
    assert found == set()


@pytest.mark.long
def test_the_gpu_tests_are_collected_without_what_a_gpu_machine_lacks():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    done = python("-c", COLLECT, *map(str, marked), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "tests/engine/test_ops_and_engine_on_a_gpu.py" in done.stdout
    assert "error" not in done.stdout.lower().splitlines()[-1]


def test_programs_find_the_packages_of_this_checkout(tmp_path):
    program = "import flowgrove, flowgrove_kernels; print(flowgrove.__file__, flowgrove_kernels.__file__, sep='\\n')"
    done = python("-S", "-c", "import sys; print(*sys.path, sep='\\n')", cwd=tmp_path)
    assert [str(path) for path in subprocesses.SOURCES] == done.stdout.splitlines()[1:3]
    found = python("-c", program, cwd=tmp_path).stdout.split()
    assert [Path(name).parents[1] for name in found] == list(subprocesses.SOURCES)


def test_every_test_starts_python_through_this_helper():
    """`sys.executable` alone would leave the source roots out."""
    own = {"subprocesses.py", Path(__file__).name}
    assert [
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in own and "sys.executable" in path.read_text()
    ] == []


def test_no_test_imports_another():
    """What tests share lies in tests/support, the only place with a package; names are unique, for no room is one."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {(path.name, name) for name in names if name.startswith("test_")}
    assert found == set()
    assert len({path.name for path in files}) == len(files)
    support = ROOT / "tests" / "support"
    assert [path for path in (ROOT / "tests").rglob("__init__.py") if not path.is_relative_to(support)] == []
