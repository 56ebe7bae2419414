"""Checkpoints of weights that are divided among ranks: written piece by piece, read on any number of ranks, never with
other weights (issue 15).
"""

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from divided import SHAPES, Divided, save, together
from flowgrove.errors import UserError
from flowgrove.run import tensor_files
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.run.finding import newest_checkpoint, valid_checkpoints
from flowgrove.run.manifest import DamagedError, verify
from flowgrove.run.tensor_files import TensorFiles

SIZES = (1, 2, 3)


def load(folder, size, **options):
    """Whether each of `size` ranks holds what was saved under its number of completed iterations."""

    def work(ranks):
        divided = Divided(ranks.rank, size, **options)
        completed, line = load_checkpoint(folder, divided.policy, divided, ranks)
        assert line == {"iteration": completed - 1}
        return divided.holds(completed)

    return together(size, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("before", SIZES)
def test_what_some_ranks_wrote_any_number_reads_to_the_bit(tmp_path, before, after, dtype):
    """Shapes of 7, 5, 2 and 1 rows: uneven pieces, and on three ranks empty ones."""
    folder = save(tmp_path, 3, before, dtype=dtype)
    assert load(folder, after, dtype=dtype) == [True] * after


def test_one_process_writes_one_file_of_each_kind_and_several_ranks_one_each(tmp_path):
    plain, sharded = save(tmp_path / "plain", 1, 1), save(tmp_path / "sharded", 1, 3)
    kinds, rest = ("ema", "optimizer", "weights"), ["manifest.json", "state.json"]
    assert files_of(plain) == sorted([*rest, *(f"{kind}.safetensors" for kind in kinds)])
    names = [f"{kind}/rank_0000{rank}.safetensors" for kind in kinds for rank in range(3)]
    assert files_of(sharded) == sorted([*rest, *names])
    formats = [json.loads((folder / "state.json").read_text())["format"] for folder in (plain, sharded)]
    assert formats == [2, 3]  # versions before sharding read format 2 and refuse 3 in words
    assert [list(verify(folder)) for folder in (plain, sharded)] == [list(verify(plain))] * 2


def files_of(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_a_piece_that_several_ranks_hold_is_written_once(tmp_path):
    """As with HSDP: four ranks, of which two and two hold the same."""
    folder = save(tmp_path, 2, 4, copies=2)
    assert [file.name for file in sorted((folder / "weights").iterdir())] == [
        "rank_00000.safetensors",
        "rank_00002.safetensors",
    ]
    assert load(folder, 1) == [True]
    assert load(folder, 4, copies=2) == [True] * 4


def test_torchs_own_reader_reads_a_kind(tmp_path):
    folder = save(tmp_path, 2, 3)
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder / "weights")), no_dist=True)
    whole = Divided().of(2)
    assert all(torch.equal(found[name], p.data) for name, p in whole.parameters.items())
    assert not list(folder.rglob("*.pkl"))


def test_whole_tensors_are_read_by_name_wherever_they_lie(tmp_path):
    plain, sharded = (save(tmp_path / str(size), 1, size) for size in (1, 3))
    for kind in ("weights", "optimizer", "ema"):
        expected, found = load_file(plain / f"{kind}.safetensors"), TensorFiles(sharded, kind).read()
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_rank_reads_only_its_rows(tmp_path, monkeypatch):
    folder = save(tmp_path, 1, 2)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(empty(*size, **options)) or made[-1])
    rows = {"a.weight": slice(4, 6), "one.weight": slice(0, 0)}
    found = TensorFiles(folder, "weights").read(rows)
    monkeypatch.undo()
    whole = Divided().of(1).parameters
    assert torch.equal(found["a.weight"], whole["a.weight"][4:6])
    assert found["one.weight"].shape == (0, 2, 2)
    assert sum(tensor.numel() for tensor in made) == 2 * 3 + 2 * 5 + 5 + 6


@pytest.mark.parametrize("size", [1, 3])
def test_weights_are_read_some_at_a_time(tmp_path, monkeypatch, size):
    folder = save(tmp_path, 1, size)
    monkeypatch.setattr(tensor_files, "_AT_ONCE", 100)
    files, reads = TensorFiles(folder, "weights"), []
    expected, read = files.read(), TensorFiles.read

    def counted(self, rows, only):
        reads.append(list(only))
        return read(self, rows, only)

    monkeypatch.setattr(TensorFiles, "read", counted)
    rows = {"a.weight": slice(2, 5)}
    found = files.in_parts(reversed(expected), rows)
    assert list(found) == list(reversed(expected))
    assert all(torch.equal(found[name], expected[name][rows.get(name, slice(None))]) for name in found)
    assert [name for some in reads for name in some] == list(found)
    assert len(reads) > 1
    before, divided = len(reads), Divided(average=False)
    load_checkpoint(folder, divided.policy, None)
    assert len(reads) > before + 1, "so is what a checkpoint puts back"


def test_evaluation_takes_the_averages(tmp_path):
    folder, policy = save(tmp_path, 1, 2), Divided()
    load_checkpoint(folder, policy.policy, None)
    trained = Divided().of(1)
    assert all(torch.equal(p, trained.ema.average[name]) for name, p in policy.parameters.items())


def test_other_shapes_and_averages_that_are_missing_are_refused(tmp_path, monkeypatch):
    folder = save(tmp_path, 1, 2, average=False)
    with pytest.raises(UserError, match=r"update.ema_decay: .* holds no averaged weights"):
        load(folder, 2)
    assert load(folder, 3, average=False) == [True] * 3
    monkeypatch.setitem(SHAPES, "a.weight", (8, 3))
    with pytest.raises(UserError, match="holds other weights than this recipe trains"):
        load(folder, 2, average=False)


FIRST, SECOND = "weights/rank_00000.safetensors", "weights/rank_00001.safetensors"


def flip(new, old):
    content = bytearray((new / SECOND).read_bytes())
    content[-3] ^= 4
    (new / SECOND).write_bytes(content)


def swap(new, old):
    (new / FIRST).rename(new / "kept")
    (new / SECOND).rename(new / FIRST)
    (new / "kept").rename(new / SECOND)


DAMAGES = {
    "a flipped bit": flip,
    "a file cut short": lambda new, old: (new / SECOND).write_bytes((new / SECOND).read_bytes()[:-8]),
    "the first file missing": lambda new, old: (new / FIRST).unlink(),
    "the last file missing": lambda new, old: (new / SECOND).unlink(),
    "no moments of a rank": lambda new, old: (new / "optimizer" / "rank_00001.safetensors").unlink(),
    "no weights at all": lambda new, old: shutil.rmtree(new / "weights"),
    "two ranks' files swapped": swap,
    "one file more": lambda new, old: shutil.copy(new / SECOND, new / "weights" / "rank_00002.safetensors"),
    "a whole file too": lambda new, old: shutil.copy(new / SECOND, new / "weights.safetensors"),
    "averages as weights": lambda new, old: shutil.copy(new / "ema" / "rank_00000.safetensors", new / FIRST),
    "a rank's file of another run": lambda new, old: shutil.copy(old / SECOND, new / SECOND),
    "all weights of another run": lambda new, old: shutil.copytree(
        old / "weights", new / "weights", dirs_exist_ok=True
    ),
    "the manifest of another run": lambda new, old: shutil.copy(old / "manifest.json", new),
    "no manifest": lambda new, old: (new / "manifest.json").unlink(),
    "a link to nothing": lambda new, old: ((new / FIRST).unlink(), (new / FIRST).symlink_to("gone")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, damage):
    for completed in (1, 2):
        save(tmp_path / "run", completed, 2)
    other = save(tmp_path / "other", 2, 2, seed=7)
    old, new = valid_checkpoints(tmp_path / "run")
    verify(new)
    DAMAGES[damage](new, other)
    said = []
    assert newest_checkpoint(tmp_path / "run", said.append) == old
    assert said[0].startswith(f"{new} is damaged")
    assert load(old, 3) == [True] * 3
    with pytest.raises(UserError, match="step_000002 is damaged"):
        load(new, 2)


@pytest.mark.parametrize("name", [FIRST, SECOND, "optimizer/rank_00001.safetensors"])
def test_a_missing_file_that_the_manifest_does_not_miss_is_never_other_weights(tmp_path, name):
    """Torch's reader alone would leave those rows as they were."""
    folder = save(tmp_path, 1, 2)
    (folder / name).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((DamagedError, UserError), match="step_000001"):
        load(folder, 1)
