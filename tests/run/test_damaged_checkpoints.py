"""Checkpoints are as they were written, or named as damaged; old ones still load;
permissions are no damage (issue 13, items 3, 10, 12, 15).
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import Trained, save_checkpoint
from flowgrove.errors import UserError
from flowgrove.files import write_file
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.run.finding import (
    best_checkpoint,
    find_checkpoint,
    mark_best,
    newest_checkpoint,
    pointed_at,
    valid_checkpoints,
)
from flowgrove.run.manifest import DamagedError, verify


@pytest.fixture(scope="module")
def trained():
    return Trained.small()


@pytest.fixture
def run(trained, tmp_path):
    """Checkpoints of 1 and 2 iterations in tmp_path/run."""
    for completed in (1, 2):
        trained.advance(completed)
        trained.save(tmp_path / "run", completed)
    return tmp_path / "run"


def flipped(new, _):
    content = bytearray((new / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (new / "weights.safetensors").write_bytes(content)


def swapped(new, _):
    (new / "weights.safetensors").rename(new / "kept")
    (new / "ema.safetensors").rename(new / "weights.safetensors")
    (new / "kept").rename(new / "ema.safetensors")


def cast(new, dtype, name="weights"):
    file = new / f"{name}.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)


def told(new, **changes):
    state = json.loads((new / "state.json").read_text())
    (new / "state.json").write_text(json.dumps({**state, **changes}))


DAMAGES = {
    "a flipped bit": flipped,
    "averages of another step": lambda new, old: shutil.copy(old / "ema.safetensors", new),
    "weights and averages swapped": swapped,
    "zeros": lambda new, _: save_file(
        {n: t * 0 for n, t in load_file(new / "weights.safetensors").items()}, new / "weights.safetensors"
    ),
    "bf16": lambda new, _: cast(new, torch.bfloat16),
    "int64 moments": lambda new, _: cast(new, torch.int64, "optimizer"),
    "another count": lambda new, _: told(new, completed_iterations=1),
    "another format": lambda new, _: told(new, format=99),
    "another line": lambda new, _: told(new, line={"iteration": 0}),
    "another budget": lambda new, _: told(new, token_budget=1),
    "no manifest": lambda new, _: (new / "manifest.json").unlink(),
    "one file more": lambda new, _: shutil.copy(new / "weights.safetensors", new / "more.safetensors"),
    "the folder of another step": lambda new, old: (shutil.rmtree(new), shutil.copytree(old, new)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(run, damage):
    old, new = valid_checkpoints(run)
    verify(new)
    DAMAGES[damage](new, old)
    said = []
    assert newest_checkpoint(run, said.append) == old
    (text,) = said
    assert text.startswith(f"{new} is damaged")
    assert text.endswith("going on from step_000001 instead")
    with pytest.raises(UserError, match="step_000002 is damaged"):
        verify(new)


def test_where_all_are_damaged_the_newest_is_named(run):
    for folder in valid_checkpoints(run):
        flipped(folder, None)
    with pytest.raises(
        UserError, match=r"step_000002 is damaged \(weights.safetensors has other content than was written\): remove it"
    ):
        newest_checkpoint(run)


def test_loading_verifies_too_and_changes_nothing_before(run, trained):
    kept = trained.kept()
    flipped(run / "checkpoints" / "step_000001", None)
    with pytest.raises(DamagedError):
        load_checkpoint(run / "checkpoints" / "step_000001", trained.policy, trained.updater)
    assert trained.holds(kept)


# Checkpoints of format 1


def test_checkpoints_from_before_manifests_still_load(trained, tmp_path):
    trained.advance(5)
    folder, kept = trained.save_as_before(tmp_path, 3), trained.kept()
    trained.scramble()
    assert newest_checkpoint(tmp_path) == folder
    assert load_checkpoint(folder, trained.policy, trained.updater) == (3, {"iteration": 2})
    assert trained.holds(kept)


OLD_DAMAGES = {
    "bf16 weights": lambda new: cast(new, torch.bfloat16),
    "int64 weights": lambda new: cast(new, torch.int64),
    "bf16 averages": lambda new: cast(new, torch.bfloat16, "ema"),
    "int64 moments": lambda new: cast(new, torch.int64, "optimizer"),
    "moments as averages": lambda new: shutil.copy(new / "optimizer.safetensors", new / "ema.safetensors"),
    "no averages": lambda new: (new / "ema.safetensors").unlink(),
    "a pipe": lambda new: ((new / "ema.safetensors").unlink(), os.mkfifo(new / "ema.safetensors")),
    "another count": lambda new: told(new, completed_iterations=1),
}


@pytest.mark.parametrize("damage", OLD_DAMAGES)
def test_of_those_too_what_can_be_seen_is_refused(trained, tmp_path, damage):
    trained.advance(5)  # whatever ran before, there are moments to compare with
    folder = trained.save_as_before(tmp_path, 3)
    OLD_DAMAGES[damage](folder)
    with pytest.raises(UserError, match="step_000003"):
        load_checkpoint(folder, trained.policy, trained.updater)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.int64, "numbers of another kind"),
        (torch.bfloat16, "numbers of another kind"),
        (torch.float64, "no state of this update.optimizer"),
    ],
)
def test_moments_of_another_dtype_are_refused_before_the_first_step_too(trained, tmp_path, dtype, said):
    trained.advance(5)
    folder, fresh = trained.save_as_before(tmp_path, 3), Trained.small()
    cast(folder, dtype, "optimizer")
    assert not fresh.updater.optimizer.state
    with pytest.raises(UserError, match=f"step_000003.*{said}"):
        load_checkpoint(folder, fresh.policy, fresh.updater)


# Permissions


@pytest.fixture
def public_run(trained):
    """A run folder that every user may enter; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        trained.save(Path(folder), 1)
        trained.save(Path(folder), 2)
        yield Path(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json", "."])
def test_a_checkpoint_that_may_not_be_read_is_good_and_stays(public_run, name):
    folder = public_run / "checkpoints" / "step_000002"
    (folder / name).chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(UserError, match="permission denied: make it readable") as caught:
            newest_checkpoint(public_run)
    finally:
        os.seteuid(user)
        (folder / name).chmod(0o755)
    assert not isinstance(caught.value, DamagedError)
    assert "remove" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_disk_that_fails_is_no_reason_to_remove_a_checkpoint(run, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", str(run / "checkpoints" / "step_000002" / "weights.safetensors"))

    monkeypatch.setattr("flowgrove.run.manifest._digest", fail)
    with pytest.raises(UserError, match="Input/output error; try again") as caught:
        newest_checkpoint(run)
    assert "remove" not in str(caught.value)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_users_umask(trained, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = trained.save(tmp_path, 1)
        write_file(tmp_path / "cache.safetensors", lambda partial: save_file({"a": torch.ones(1)}, partial))
    finally:
        os.umask(before)
    files = [*folder.iterdir(), tmp_path / "cache.safetensors"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


# Folders without links


def test_without_links_latest_is_a_text_file_that_reads_the_same(trained, tmp_path, monkeypatch):
    trained.save(tmp_path, 1)
    linked = pointed_at(tmp_path / "latest").resolve()

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    trained.save(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "checkpoints/step_000002\n"
    assert not (tmp_path / "latest").is_symlink()
    assert pointed_at(tmp_path / "latest") == tmp_path / "checkpoints" / "step_000002"
    assert linked == (tmp_path / "checkpoints" / "step_000001").resolve()
    monkeypatch.undo()
    trained.save(tmp_path, 3)
    assert (tmp_path / "latest").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "latest"]


@pytest.mark.parametrize("content", [b"", b"checkpoints/step_000009", b"\x00", b"\xff", b"x" * 5000])
def test_a_text_file_that_points_nowhere_is_one_line(tmp_path, content):
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(UserError, match="is not a checkpoint"):
        pointed_at(tmp_path / "latest")


# Which checkpoint


def test_a_checkpoint_is_found_by_number_path_and_name(run):
    first, second = valid_checkpoints(run)
    assert find_checkpoint(run, None) == second
    assert find_checkpoint(run, "1") == find_checkpoint(run, "0001") == first
    assert find_checkpoint(run, str(first)) == first
    assert find_checkpoint(run, str(run / "latest")).resolve() == second.resolve()
    for wrong, hint in (
        ("3", "give 1 or 2"),
        ("best", "run.keep_best: true"),
        ("9" * 5000, "give 1 or 2"),
        (str(run / "gone"), "no such folder"),
    ):
        with pytest.raises(UserError, match=hint):
            find_checkpoint(run, wrong)


def test_the_best_checkpoint_outlives_the_newest_ones(trained, tmp_path):
    trained.save(tmp_path, 1)
    mark_best(trained.save(tmp_path, 2), 0.5)
    for completed in (3, 4, 5):
        save_checkpoint(tmp_path, trained.policy, trained.updater, completed, "print", 2, {})
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step_000002", "step_000004", "step_000005"]
    assert find_checkpoint(tmp_path, "best").name == "step_000002"


def test_the_best_of_a_branch_that_was_left_goes_with_it(trained, tmp_path):
    """Else the run would go on from there."""
    trained.save(tmp_path, 1)
    mark_best(trained.save(tmp_path, 5), 0.5)
    trained.save(tmp_path, 2)
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step_000001", "step_000002"]
    assert best_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"completed_iterations": 1}',
        '{"completed_iterations": "x", "eval_reward": 1}',
        '{"completed_iterations": 1e999}',
    ],
)
def test_a_damaged_note_of_the_best_counts_as_none(trained, tmp_path, text):
    trained.save(tmp_path, 1)
    (tmp_path / "best.json").write_text(text)
    trained.save(tmp_path, 2)
    assert best_checkpoint(tmp_path) is None
