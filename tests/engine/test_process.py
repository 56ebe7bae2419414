"""What importing flowgrove settles before torch is loaded: the allocator's segments, how threads wait, and where
Triton keeps what it compiles.
"""

import json
import os

import pytest

from subprocesses import python

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
TRITON = "TRITON_CACHE_DIR"
NAMES = (*ALLOCATOR, *WAITING, TRITON)
VALUES = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "GOMP_SPINCOUNT": "10000"}


def found_after(imported, **given):
    values = f"{{name: os.environ.get(name) for name in {NAMES}}}"
    code = f"import {imported}, os, sys, json; print(json.dumps([{values}, 'torch' in sys.modules]))"
    return json.loads(python("-c", code, env={**dict.fromkeys(NAMES), **given}).stdout)


@pytest.mark.parametrize("imported", ["flowgrove.cli", "flowgrove.recipe.schema"])
def test_what_the_user_has_not_set_is_settled_before_torch_is_loaded(imported):
    found, has_torch = found_after(imported)
    assert found == {**dict.fromkeys(NAMES), **VALUES}
    assert not has_torch, "flowgrove itself loads no torch"


@pytest.mark.parametrize(
    ("given", "value"), [(name, "max_split_size_mb:64") for name in ALLOCATOR] + [(name, "1") for name in WAITING]
)
def test_what_the_user_has_set_stays(given, value):
    found, _ = found_after("flowgrove", **{given: value})
    other = {name: value for name, value in VALUES.items() if (name in ALLOCATOR) != (given in ALLOCATOR)}
    assert found == {**dict.fromkeys(NAMES), **other, given: value}


def test_whoever_loads_torch_first_has_settled_it():
    found, has_torch = found_after("torch, flowgrove")
    assert found == dict.fromkeys(NAMES)
    assert has_torch


MACHINES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("imported", ["flowgrove", "torch, flowgrove"])
def test_of_several_machines_each_keeps_kernels_in_a_folder_of_its_own(imported, tmp_path):
    folder = tmp_path / f"flowgrove_triton_{os.getuid()}"
    found, _ = found_after(imported, **MACHINES, TMPDIR=str(tmp_path))
    assert found[TRITON] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert found_after(imported, **MACHINES, TRITON_CACHE_DIR="/mine")[0][TRITON] == "/mine"
    assert found_after(imported, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")[0][TRITON] is None


def test_a_folder_for_kernels_that_others_may_write_into_is_not_taken(tmp_path):
    folder = tmp_path / f"flowgrove_triton_{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert found_after("flowgrove", **MACHINES, TMPDIR=str(tmp_path))[0][TRITON] is None
