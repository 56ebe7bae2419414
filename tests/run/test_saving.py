"""Checkpoints are written beside the training: what it changes meanwhile, what fails, and what a kill leaves
(issue 15).
"""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from divided import DEADLINE, Divided, save, together
from engine_cases import checkpoints, flowgrove, metrics_of, succeed, timeless, tiny_recipe, weights_of
from flowgrove.errors import UserError
from flowgrove.ranks import ElsewhereError
from flowgrove.run import saving
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.run.finding import newest_checkpoint, pointed_at, remove_older, remove_unfinished, valid_checkpoints
from flowgrove.run.host_copies import packed
from flowgrove.run.manifest import verify
from flowgrove.run.saving import CheckpointWriter
from flowgrove.run.tensor_files import write_tensors
from subprocesses import PYTHON, environment


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe of 3 iterations with a checkpoint after each, and a run of it."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny_recipe(folder, run={"checkpoint_every": 1, "eval_every": 0})
    succeed("train", recipe, "--out", folder / "whole")
    return recipe, folder / "whole"


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written until it is set."""
    opened, write = threading.Event(), CheckpointWriter._write_tensors

    def waiting(writer, job):
        assert opened.wait(DEADLINE)
        return write(writer, job)

    monkeypatch.setattr(CheckpointWriter, "_write_tensors", waiting)
    return opened


def begun(writer, divided, completed):
    return writer.begin(divided.policy, divided, completed, "print", {"iteration": completed - 1})


@pytest.mark.parametrize("size", [1, 2])
def test_what_the_training_changes_meanwhile_is_not_in_it(tmp_path, gate, size):
    def work(ranks):
        writer, divided = CheckpointWriter(tmp_path, 9, ranks), Divided(ranks.rank, size).of(1)
        line = {"iteration": 0}
        folder = writer.begin(divided.policy, divided, 1, "print", line)
        divided.of(2)
        line["eval_reward"] = 1.0
        assert not folder.exists()
        gate.set()
        writer.wait()
        assert load_checkpoint(folder, divided.policy, divided, ranks) == (1, {"iteration": 0})
        return divided.holds(1)

    assert together(size, work) == [True] * size


def test_one_is_written_at_a_time_and_none_is_lost(tmp_path, gate):
    writer, divided = CheckpointWriter(tmp_path, 9), Divided().of(1)
    begun(writer, divided, 1)
    threading.Timer(0.2, gate.set).start()
    second = begun(writer, divided.of(2), 2)  # once the first stands
    assert (tmp_path / "checkpoints" / "step_000001" / "manifest.json").exists()
    writer.close()
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step_000001", second.name]


def test_memory_for_the_copy_is_taken_once(tmp_path):
    writer, divided = CheckpointWriter(tmp_path, 9), Divided().of(1)
    begun(writer, divided, 1)
    kept = {name: copy.data_ptr() for name, copy in writer._copies._held.items()}
    assert set(kept) == set(divided.held())
    begun(writer, divided.of(2), 2)
    writer.wait()
    assert {name: copy.data_ptr() for name, copy in writer._copies._held.items()} == kept
    found = load_file(tmp_path / "checkpoints" / "step_000002" / "weights.safetensors")
    assert all(torch.equal(found[name], p.data) for name, p in divided.parameters.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_of_a_gpu_the_copy_is_pinned_and_made_before_the_training_goes_on(tmp_path):
    writer, divided = CheckpointWriter(tmp_path, 9), Divided(device="cuda").of(1)
    folder = begun(writer, divided, 1)
    divided.of(2)
    writer.wait()
    assert all(copy.is_pinned() for copy in writer._copies._held.values())
    load_checkpoint(folder, divided.policy, divided)
    assert divided.holds(1)


# What fails


def full(*_):
    raise OSError(28, "No space left on device", "file")


@pytest.mark.parametrize("where", ["tensors", "manifest"])
def test_an_error_of_the_thread_is_one_line_where_it_is_waited_for(tmp_path, monkeypatch, where):
    name = {"tensors": "write_tensors", "manifest": "write_manifest"}[where]
    save(tmp_path, 1, 1)
    writer, divided = CheckpointWriter(tmp_path, 9), Divided().of(2)
    with monkeypatch.context() as patched:
        patched.setattr(saving, name, full)
        begun(writer, divided, 2)
        with pytest.raises(UserError, match=r"cannot write .*step_000002.*free some space"):
            begun(writer, divided, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000001"]
    begun(writer, divided, 3)
    writer.wait()
    assert newest_checkpoint(tmp_path).name == "step_000003"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_on_one_rank_is_the_same_line_on_all(tmp_path, monkeypatch, failing):
    write = saving.write_pieces
    monkeypatch.setattr(saving, "write_pieces", lambda *given: full() if given[-1] == failing else write(*given))

    def work(ranks):
        try:
            return Divided(ranks.rank, 3).of(1).save(tmp_path, 1, ranks)
        except UserError as error:
            return str(error)

    found = together(3, work)
    assert len(set(found)) == 1
    assert "free some space" in found[0]
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_mistake_on_one_rank_is_told_by_that_rank(tmp_path, monkeypatch):
    write = saving.write_pieces
    monkeypatch.setattr(saving, "write_pieces", lambda *given: 1 / 0 if given[-1] == 1 else write(*given))

    def work(ranks):
        try:
            return Divided(ranks.rank, 2).of(1).save(tmp_path, 1, ranks)
        except Exception as error:
            return type(error)

    assert together(2, work) == [ElsewhereError, ZeroDivisionError]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("copies", [1, 2], ids=["divided", "whole"])
def test_after_an_error_ranks_that_have_written_wait_for_the_first(tmp_path, monkeypatch, copies, fails):
    """torchrun would end it soon after the first of them."""
    opened, write, closed = threading.Event(), saving.write_manifest, []

    def slow(*given):
        assert opened.wait(DEADLINE)
        return full() if fails else write(*given)

    monkeypatch.setattr(saving, "write_manifest", slow)

    def work(ranks):
        writer = CheckpointWriter(tmp_path, 9, ranks)
        begun(writer, Divided(ranks.rank, 2, copies=copies).of(1), 1)
        if not ranks.first:
            threading.Timer(0.3, lambda: (closed.append("opened"), opened.set())).start()
        writer.close()
        closed.append(ranks.rank)

    together(2, work)
    assert closed[0] == "opened"
    assert bool(valid_checkpoints(tmp_path)) != fails


def test_nobody_waits_long_for_a_first_rank_that_has_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_LONGEST", 0.3)
    opened, write = threading.Event(), saving.write_manifest
    monkeypatch.setattr(saving, "write_manifest", lambda *given: opened.wait(DEADLINE) and write(*given))

    def work(ranks):
        writer = CheckpointWriter(tmp_path, 9, ranks)
        begun(writer, Divided(ranks.rank, 2).of(1), 1)
        since = time.monotonic()
        writer.close()
        return time.monotonic() - since

    try:
        assert max(together(2, work)) < 5
    finally:
        opened.set()


def test_a_folder_that_was_taken_over_meanwhile_is_left_alone(tmp_path, gate):
    taken = []

    def check():
        if taken:
            raise UserError("was taken over")

    gate.set()
    save(tmp_path, 1, 1)
    gate.clear()
    writer = CheckpointWriter(tmp_path, 9, check=check)
    begun(writer, Divided().of(2), 2)
    taken.append(True)
    gate.set()
    with pytest.raises(UserError, match="was taken over"):
        writer.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_the_user_is_told_of_a_full_disk_and_the_run_goes_on_later(whole, tmp_path, monkeypatch):
    recipe, expected = whole
    write, written = saving.write_manifest, []

    def second_fails(*given):
        written.append(given)
        return full() if len(written) == 2 else write(*given)

    monkeypatch.setattr(saving, "write_manifest", second_fails)
    result = flowgrove("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "step_000002: [Errno 28] No space left on device" in line
    assert checkpoints(tmp_path / "run") == ["step_000001"]
    succeed("train", recipe, "--out", tmp_path / "run")
    assert_same(tmp_path / "run", expected)


def assert_same(run, whole):
    assert timeless(metrics_of(run)) == timeless(metrics_of(whole))
    expected = weights_of(whole, 3)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(run, 3).items())


# What is on disk when


@pytest.mark.parametrize("size", [1, 3])
def test_files_and_folders_are_on_disk_before_the_name_and_the_old_one_goes_last(tmp_path, monkeypatch, size):
    folder = save(tmp_path, 2, size)
    did, sync, rename, remove = [], os.fsync, Path.rename, shutil.rmtree
    names = {}

    def note_rename(path, target):
        did.append(("rename", path.name, Path(target).name))
        return rename(path, target)

    def note_sync(handle):
        names[handle] = place = os.readlink(f"/proc/self/fd/{handle}")
        did.append(("sync", place))
        sync(handle)

    def note_remove(path, **options):
        did.append(("remove", Path(path).name, [p.name for p in folder.parent.iterdir() if p.name[0] != "."]))
        remove(path, **options)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(shutil, "rmtree", note_remove)
    save(tmp_path, 2, size, seed=5)
    monkeypatch.undo()
    (aside, named) = [index for index, what in enumerate(did) if what[0] == "rename"]
    partial = did[named][1]
    assert did[aside] == ("rename", "step_000002", did[aside][2])
    assert did[named] == ("rename", partial, "step_000002")
    before = {what[1] for what in did[:aside] if what[0] == "sync"}
    inside = {file.relative_to(folder) for file in folder.rglob("*")} | {Path(".")}
    assert before >= {str(folder.parent / partial / file) for file in inside}
    assert ("sync", str(folder.parent)) in did[named:]
    (gone,) = [index for index, what in enumerate(did) if what[:2] == ("remove", did[aside][2])]
    assert gone > did.index(("sync", str(folder.parent)), named)
    assert did[gone][2] == ["step_000002"]
    assert [path.name for path in folder.parent.iterdir()] == ["step_000002"]
    divided = Divided()
    load_checkpoint(folder, divided.policy, divided)
    assert divided.holds(5)


def test_what_killed_ranks_left_goes_with_the_next_save(tmp_path):
    left = tmp_path / "checkpoints" / ".step_000004.77-00ff00ff.partial"
    for kind in ("weights", "ema"):
        (left / kind).mkdir(parents=True)
        (left / kind / "rank_00001.safetensors").write_bytes(b"half")
    save(tmp_path, 5, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000005"]


def test_a_checkpoint_that_goes_loses_its_name_first(tmp_path, monkeypatch):
    """A kill then leaves no half of one under that name, and whoever has the folder next removes the rest."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    save(tmp_path, 1, 2)
    save(tmp_path, 2, 2)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_older(tmp_path, tmp_path / "checkpoints" / "step_000002", 1)
    assert [path.name for path in valid_checkpoints(tmp_path)] == ["step_000002"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    remove_unfinished(tmp_path)
    assert checkpoints(tmp_path) == ["step_000002"]


def test_what_a_kill_has_left_of_checkpoints_goes_when_the_run_goes_on(whole, tmp_path):
    """Also where nothing is left to train and so nothing to save."""
    recipe, expected = whole
    run = tmp_path / "run"
    shutil.copytree(expected, run, symlinks=True)
    (run / "report.html").unlink()
    (run / "checkpoints" / ".step_000003.77-00ff00ff.partial").mkdir()
    assert checkpoints(expected) == ["step_000001", "step_000002", "step_000003"]
    succeed("train", recipe, "--set", "run.keep_last=1", "--out", run)
    assert checkpoints(run) == ["step_000003"]


KILLED = """
import os, sys, threading
from pathlib import Path
from flowgrove.run import saving
from divided import Divided, save, together
run, size, at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
save(run, 1, size)
count = [0]
fsync = os.fsync
def counted(handle):
    fsync(handle)
    count[0] += 1
    if count[0] == at:
        os.kill(os.getpid(), 9)
os.fsync = counted
save(run, 2, size)
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("size", "at"),
    [
        (1, 2),
        (2, 11),
        *(pytest.param(*each, marks=pytest.mark.long) for each in [(1, 1), (1, 6), (2, 5), (3, 1), (3, 14)]),
    ],
)
def test_a_kill_while_it_is_written_leaves_the_one_before(tmp_path, size, at):
    """At the fsync of this number."""
    run = tmp_path / "run"
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), environment()["PYTHONPATH"]])
    command = [PYTHON, "-c", KILLED, str(run), str(size), str(at)]
    killed = subprocess.run(
        command, env=environment(PYTHONPATH=path), timeout=DEADLINE, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert newest_checkpoint(run).name == pointed_at(run / "latest").resolve().name == "step_000001"
    verify(run / "checkpoints" / "step_000001")
    assert [path.name[0] for path in (run / "checkpoints").iterdir()].count(".") == 1
    divided = Divided()
    load_checkpoint(newest_checkpoint(run), divided.policy, divided)
    assert divided.holds(1)
    save(run, 2, size)
    assert [path.name for path in valid_checkpoints(run)] == sorted(p.name for p in (run / "checkpoints").iterdir())


WRITING = """
import os, sys, time
from flowgrove.run import saving
slow = saving.write_manifest
def wait(folder, state, files):
    if state["completed_iterations"] == 2:
        print("writing", flush=True)
        time.sleep(600)
    slow(folder, state, files)
saving.write_manifest = wait
from flowgrove.cli import app
app()
"""


@pytest.mark.long
def test_a_run_killed_while_its_thread_writes_goes_on_to_the_same_bits(whole, tmp_path):
    """Its metrics are ahead of its newest checkpoint then."""
    (recipe, expected), run = whole, tmp_path / "run"
    with subprocess.Popen(
        [PYTHON, "-c", WRITING, "train", recipe, "--out", run], stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            until = time.monotonic() + DEADLINE
            while len(metrics_of(run)) < 2 and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            process.kill()
    assert len(metrics_of(run)) == 2
    assert newest_checkpoint(run).name == "step_000001"
    succeed("train", recipe, "--out", run)
    assert_same(run, expected)


def test_copies_of_a_gpus_tensors_lie_in_few_blocks_of_a_power_of_two():
    """Each is in one block, none overlap, and little is left over."""
    generator = random.Random(0)
    for _ in range(20):
        sizes = [generator.randrange(1, 3 << 28) for _ in range(generator.randrange(1, 60))]
        blocks, places = packed(sizes)
        assert all(block & (block - 1) == 0 for block in blocks)
        taken = sorted(
            (place.block, place.start, place.start + size) for size, place in zip(sizes, places, strict=True)
        )
        assert all(end <= blocks[block] for block, _, end in taken)
        assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(taken))
    small = [generator.randrange(1, 1 << 26) for _ in range(400)]
    blocks, _ = packed(small)
    assert sum(blocks) < 1.1 * sum(small) + (1 << 29)


def test_a_checkpoint_is_written_from_parts_of_one_block(tmp_path):
    block = torch.zeros(4096, dtype=torch.uint8)
    tensors = {"a": block[:12].view(torch.float32), "b": block[512:552].view(torch.float32).view(2, 5)}
    tensors["a"].fill_(1.0)
    tensors["b"].fill_(2.0)
    write_tensors(tmp_path, "weights", tensors)
    found = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "weights.safetensors").stat().st_size < 1024
