"""Hostile prompt files, folders and hub caches: every one is a list of clean prompts, or one line (issue 13)."""

import csv
import io
import json
import os
import random
import shutil

import pytest

from flowgrove.data.prompts import NAMED_SETS, cut_alike, prompts_of_iteration, read_prompts
from hostile import NASTY, damaged, outcome

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FIRST, ALL = 150, 1500
WORDS = (
    *("a red cat", "ein grüner Kreis", "😀", "\u2028", "a\x0bb", "", " ", '"', ",", "\t", "1/2 $x$", "\r", "\x1c"),
    *NASTY,
)
COLUMNS = ("prompt", "caption", "text", "id", "", "prompt ", "PROMPT", "a,b", "\u2028")
VALUES = (None, True, 0, -1.5, 10**400, float("nan"), [], ["a"], {}, {"prompt": "a"}, "\ud800", *WORDS)


def texts(draw, most=6):
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(3))) for _ in range(draw.randrange(most))]


def plain(draw):
    return draw.choice(("\n", "\r\n", "\r", "\u2028")).join(texts(draw)).encode("utf-8", "surrogatepass")


def objects(draw):
    def row():
        return {draw.choice(COLUMNS): draw.choice(VALUES) for _ in range(3)}

    rows = [draw.choice((draw.choice(VALUES), row())) for _ in range(draw.randrange(5))]
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
    deep = draw.choice(("[", '{"prompt":')) * draw.choice((5, 99_999))
    return draw.choice(("\n".join(lines), "\n".join(lines), f"[{','.join(lines)}]", deep)).encode(
        "utf-8", "surrogatepass"
    )


def table(draw, comma):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=comma, quoting=draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
    names = [draw.choice(COLUMNS) for _ in range(draw.randint(1, 4))]
    writer.writerow(names)
    for _ in range(draw.randrange(5)):
        writer.writerow((texts(draw, 2) or ["x"])[0] for _ in range(draw.choice((len(names), len(names), 1, 5))))
    return out.getvalue().encode("utf-8", "surrogatepass")


def arrow(draw):
    kinds = {
        pa.string(): draw.choice(("a cat", "", None, "x" * draw.choice((10, 100_000)), "a\0b")),
        pa.large_string(): "a dog",
        pa.int64(): 3,
        pa.binary(): b"\xff",
        pa.list_(pa.string()): ["a"],
        pa.null(): None,
        pa.struct([("a", pa.string())]): {"a": "b"},
    }
    kind, value = draw.choice(list(kinds.items()))
    column = pa.array([value] * draw.choice((0, 1, 5, 3000)), kind)
    if kind == pa.string() and draw.random() < 0.3:
        column = column.dictionary_encode()
    return pa.table({draw.choice(COLUMNS): column, "other": pa.array([1] * len(column))})


def parquet(draw):
    sink = pa.BufferOutputStream()
    pq.write_table(arrow(draw), sink, compression=draw.choice(("none", "snappy", "zstd")))
    return sink.getvalue().to_pybytes()


def stream(draw):
    sink, content = pa.BufferOutputStream(), arrow(draw)
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "p.txt": plain,
    "p": plain,
    "p.jsonl": objects,
    "p.json": objects,
    "p.csv": lambda draw: table(draw, ","),
    "p.tsv": lambda draw: table(draw, "\t"),
    "p.parquet": parquet,
}
FILES = ([], "x", [{}], [{"filename": 3}], [{"filename": "../" * 9 + "dev/zero"}], [{"filename": "a\0"}], None)
GOOD = {"_data_files": [{"filename": "data.arrow"}]}
STATES = (GOOD, *({"_data_files": files} for files in FILES), {"_indices_data_files": 1}, [], None, 3, "x")
SPLITS = (*({"splits": splits} for splits in (["train"], ["test"], [], "train", [None])), [], {}, None)
SHARDS = ("train-00000-of-00001.parquet", "test-00000-of-00002.parquet", "a.parquet", "train-00001-of-00002-x.parquet")
NO_FILES = ("", "~", "~nobody-here/x", "a\0b", "\ud800", "x" * 5000, "/", ".", "/dev/zero", "https://example.com/p.txt")
LINKS = ("odd.txt", "gone", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/")


def maybe_damaged(draw, content):
    return damaged(draw, content) if draw.random() < 0.4 else content


def in_folder(draw, folder):
    """A folder as datasets or the hub leave it, more or less."""
    folder.mkdir()
    if draw.random() < 0.3:
        (folder / "dataset_dict.json").write_bytes(maybe_damaged(draw, json.dumps(draw.choice(SPLITS)).encode()))
        folder = folder / draw.choice(("train", "test"))
        folder.mkdir()
    if draw.random() < 0.7:
        state = draw.choice((GOOD, *STATES))
        (folder / "state.json").write_bytes(maybe_damaged(draw, json.dumps(state).encode()))
        (folder / "dataset_info.json").write_text("{}")
        (folder / "data.arrow").write_bytes(maybe_damaged(draw, stream(draw)))
    for name in draw.sample(SHARDS, draw.randrange(3)):
        (folder / name).write_bytes(maybe_damaged(draw, parquet(draw)))


def in_cache(draw, root):
    """A named set in the hub's cache; returns its name."""
    name = draw.choice(list(NAMED_SETS))
    named = NAMED_SETS[name]
    place = root / f"datasets--{named.repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_bytes(maybe_damaged(draw, b"0" * 40))
    for pattern in named.files:
        shard = draw.choice(("00000-of-00001", "00000-of-00002", "x"))
        file = place / "snapshots" / ("0" * 40) / pattern.replace("*", shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        if draw.random() < 0.8:
            writer = WRITERS[f"p{file.suffix}"]
            file.write_bytes(maybe_damaged(draw, writer(draw)))
        elif draw.random() < 0.5:
            file.mkdir()
        else:
            file.symlink_to(draw.choice(("gone", file.name, "/dev/zero")))
    return name


def odd(draw, folder):
    """Something that is no file."""
    path = folder / "odd.txt"
    match draw.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(draw.choice(LINKS))
        case 2:
            with path.open("wb") as file:
                file.truncate(1 << 42)
        case 3:
            return draw.choice(NO_FILES)
        case _:
            path.mkdir()
    return path


def case(number, folder, hub):
    draw = random.Random(f"prompts/{number}")
    key = draw.choice((None, None, *COLUMNS))
    match number % 10:
        case 8:
            in_folder(draw, folder / "set")
            return folder / "set", key
        case 9:
            return (odd(draw, folder) if draw.random() < 0.5 else in_cache(draw, hub)), key
        case _:
            name = draw.choice(list(WRITERS))
            (folder / name).write_bytes(maybe_damaged(draw, WRITERS[name](draw)))
            return folder / name, key


def read(path, key):
    prompts = read_prompts(path, "data.prompts", key)
    assert prompts
    for prompt in prompts:
        assert prompt == " ".join(prompt.split()) != ""
        prompt.encode()
    assert set(prompts_of_iteration(prompts, 3, 4, 5)) <= set(prompts)
    cut_alike(prompts, lambda prompt: prompt[:5])
    return prompts


REST = pytest.param(range(FIRST, ALL), marks=pytest.mark.long)


@pytest.mark.parametrize("numbers", [range(FIRST), REST], ids=["sample", "all"])
def test_hostile_prompts_end_in_prompts_or_in_one_line(tmp_path, monkeypatch, numbers):
    from huggingface_hub import constants

    good = 0
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        path, key = case(number, folder, folder / "hub")
        good += outcome(f"prompts {number}", read, path, key)[1] is None
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert 0 < good < len(numbers)
