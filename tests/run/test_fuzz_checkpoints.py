"""Damaged checkpoints: a run goes on with the one before, bit for bit and by name, or ends in one line;
never with other weights (issue 13).
"""

import json
import os
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import Trained
from divided import Divided, save
from flowgrove.errors import UserError
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.run.finding import newest_checkpoint

ROUNDS, CASES, SECONDS = 12, 30, 10
TENSORS = ".safetensors"
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**30,
    1.5,
    float("nan"),
    "",
    "\ud800",
    "print",
    [],
    [[]],
    {},
    {"iteration": 0},
    {"iteration": 7},
)


@pytest.fixture(scope="module", params=["one process", "two ranks"])
def two(tmp_path_factory, request):
    """A run folder with the checkpoints of 1 and 2 iterations, what each of them holds, and a policy to load them."""
    run, kept = tmp_path_factory.mktemp("two") / "run", {}
    if request.param == "two ranks":
        for completed in (1, 2):
            save(run, completed, 2)
        return Divided().of(0), run, {1: 1, 2: 2}
    trained = Trained.small()
    for completed in (1, 2):
        trained.advance(completed)
        trained.save(run, completed)
        kept[completed] = trained.kept()
    return trained, run, kept


def files_of(folder, ending=""):
    return sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name.endswith(ending)
    )


# Each damages `new`, beside the whole checkpoint `old`, and may leave it as it was


def flip(rng, new, old):
    file = new / rng.choice(files_of(new))
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 9))):
        place = rng.randrange(rng.choice((len(content), min(len(content), 400))))
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def overwrite(rng, new, old):
    file = new / rng.choice(files_of(new))
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    end = rng.randrange(start, len(content)) + 1
    content[start:end] = bytes(end - start) if rng.random() < 0.5 else rng.randbytes(end - start)
    file.write_bytes(content)


def resize(rng, new, old):
    file = new / rng.choice(files_of(new))
    content = file.read_bytes()
    file.write_bytes(
        rng.choice(
            (b"", content[: rng.randrange(len(content))], content + rng.randbytes(rng.randrange(1, 99)), content * 2)
        )
    )


def vanish(rng, new, old):
    for name in rng.sample(files_of(new), rng.randrange(1, 5)):
        (new / name).unlink()


def take_from_the_other(rng, new, old):
    for name in rng.sample(files_of(new), rng.randrange(1, 6)):
        shutil.copy(old / name, new / name)


def swap(rng, new, old):
    first, second = rng.sample(files_of(new, TENSORS), 2)
    content = (new / first).read_bytes()
    (new / first).write_bytes((new / second).read_bytes())
    (new / second).write_bytes(content)


def rewrite(rng, new, old):
    """A whole file of other tensors."""
    file = new / rng.choice(files_of(new, TENSORS))
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kinds = {
        "zeros": lambda: {name: torch.zeros_like(tensor)},
        "all zeros": lambda: {n: torch.zeros_like(t) for n, t in [*tensors.items(), (name, tensor)]},
        "bf16": lambda: {name: tensor.bfloat16()}, "int64": lambda: {name: tensor.long()},
        "fp64": lambda: {name: tensor.double()}, "flat": lambda: {name: tensor.reshape(-1).clone()},
        "renamed": lambda: {f"{name}2": tensor}, "gone": dict, "more": lambda: {name: tensor, "more": torch.ones(3)},
        "nan": lambda: {name: torch.full_like(tensor, float("nan"))}, "negative": lambda: {name: -tensor},
        "all bf16": lambda: {n: t.bfloat16() for n, t in [*tensors.items(), (name, tensor)]},
    }  # fmt: skip
    tensors.update(kinds[rng.choice(sorted(kinds))]())
    save_file(tensors, file)


def edit(rng, new, old):
    """JSON with another value, a key less or a key more."""
    file = new / rng.choice(("state.json", "manifest.json"))
    content = json.loads(file.read_text())
    place = content
    while True:
        key = rng.choice([*sorted(place), "more"])
        if isinstance(place.get(key), dict) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        break
    if rng.random() < 0.3:
        place.pop(key, None)
    else:
        place[key] = rng.choice(VALUES)
    file.write_text(json.dumps(content))


def other_text(rng, new, old):
    file = new / rng.choice(("state.json", "manifest.json"))
    file.write_bytes(
        rng.choice(
            (
                b"[]",
                b"null",
                b"3",
                b'"',
                b"\xff\xfe",
                b"\x00" * 99,
                b"[" * 200_000,
                b'{"a":' * 200_000,
                b"9" * 6000,
                b"{}",
            )
        )
    )


def misplace(rng, new, old):
    """Something that is no file, or one more."""
    file = new / rng.choice(files_of(new))
    kind = rng.randrange(5)
    if kind == 4:
        shutil.copy(file, new / rng.choice(("more.safetensors", "notes.txt")))
        return
    file.unlink()
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        file.symlink_to(file.name)
    elif kind == 2:
        file.symlink_to(old / file.name)
    else:
        os.mkfifo(file)


def replace(rng, new, old):
    """The whole folder."""
    shutil.rmtree(new)
    kind = rng.randrange(3)
    if kind == 0:
        new.mkdir()
    elif kind == 1:
        new.write_text("mine")
    else:
        shutil.copytree(old, new)


DAMAGES = (
    flip,
    flip,
    overwrite,
    resize,
    vanish,
    take_from_the_other,
    swap,
    rewrite,
    rewrite,
    edit,
    edit,
    other_text,
    misplace,
    replace,
)


def damaged(two, tmp_path, rng):
    """A copy of the run whose newer checkpoint is damaged."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(two[1], run, symlinks=True)
    new, old = (run / "checkpoints" / f"step_{completed:06d}" for completed in (2, 1))
    kind = rng.choice(DAMAGES)
    kind(rng, new, old)
    return run, new, kind.__name__


def used(trained, find):
    """The completed iterations of what `find` gives and is loaded, and None; or None and the error's text."""
    trained.scramble()
    try:
        return load_checkpoint(find(), trained.policy, trained.updater)[0], None
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.long) for number in range(1, ROUNDS))])
def test_a_damaged_checkpoint_never_gives_other_weights(two, tmp_path, number):
    trained, _, kept = two
    fallen_back = 0
    for case in range(CASES):
        run, new, kind = damaged(two, tmp_path, random.Random(f"checkpoints/{number}/{case}"))
        what, begun, said = (number, case, kind), time.monotonic(), []
        completed, error = used(trained, lambda: newest_checkpoint(run, said.append))  # noqa: B023 (called at once)
        assert error is None, (what, error)
        assert trained.holds(kept[completed]), what
        passed_over = completed == 1 and new.is_dir()
        assert [new.name in text for text in said] == [True] * passed_over, (what, said)
        assert not any("\n" in text for text in said)
        direct, error = used(trained, lambda: new)  # noqa: B023
        assert direct == (2 if completed == 2 else None), (what, error)
        assert error is None or "\n" not in error
        assert direct is None or trained.holds(kept[2]), what
        assert time.monotonic() - begun < SECONDS, what
        fallen_back += completed == 1
    assert fallen_back > CASES / 2  # else nothing would have been damaged


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.long) for number in range(1, 3))])
def test_where_both_are_damaged_it_is_one_line_or_the_weights(two, tmp_path, number):
    trained, whole, kept = two
    for case in range(CASES):
        rng = random.Random(f"both/{number}/{case}")
        run, _, kind = damaged(two, tmp_path, rng)
        second = rng.choice((flip, resize, vanish, swap, rewrite, edit))
        second(rng, run / "checkpoints" / "step_000001", whole / "checkpoints" / "step_000002")
        completed, error = used(trained, lambda: newest_checkpoint(run, lambda _: None))  # noqa: B023
        assert trained.holds(kept[completed]) if error is None else "\n" not in error and "step_00000" in error, (
            number,
            case,
            kind,
            error,
        )
