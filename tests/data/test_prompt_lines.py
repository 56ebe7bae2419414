"""Prompts that were misread: columns of csv and tsv, line ends, half characters,
prompts that no encoder tells apart (issue 13).
"""

import os
import time

import pytest

from flowgrove.data.prompts import cut_alike, read_prompts
from planner_cases import user_error

KEY = "data.prompts"


def read(folder, name, content, prompt_key=None):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(path, KEY, prompt_key)


def refused(folder, name, content, prompt_key=None):
    text = user_error(read, folder, name, content, prompt_key)
    assert text.startswith(f"{KEY}: ")
    assert name in text
    return text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "comma"), [("p.csv", ","), ("p.TSV", "\t")])
def test_tables_are_read_by_their_columns(tmp_path, name, comma, end):
    lines = ["\ufeffid,prompt,words", '1,"a ""red"", round circle",x', "", "2,ein grüner\u2028Kreis,y", "3,,z,,", "4"]
    content = end.join(line.replace(",", comma) if comma == "\t" else line for line in lines).replace(
        "\t round", ", round"
    )
    assert read(tmp_path, name, content) == ['a "red", round circle', "ein grüner Kreis"]
    assert read(tmp_path, name, content, "words") == ["x", "y", "z"]
    assert "id, prompt, words" in refused(tmp_path, name, content, "title")


def test_a_quoted_field_may_hold_line_ends(tmp_path):
    assert read(tmp_path, "p.csv", 'prompt\n"a\nb"\nc\n') == ["a b", "c"]


def test_tabs_without_quoting_keep_their_quotes(tmp_path):
    assert read(tmp_path, "p.tsv", 'prompt\tid\n"Hello" on a sign\t1\na 7" plate\t2\n') == [
        '"Hello" on a sign',
        'a 7" plate',
    ]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("prompt,id\na red, round circle,1\n", ["line 2", "3 fields", "quotes"]),
        ('prompt\n"never closed\nb\n', ["not CSV"]),
        ("prompt,prompt\na,b\n", ["2 columns prompt"]),
        ("a cat\na dog\n", ["no column prompt", "data.prompt_key", "a cat"]),
        ("prompt\n" + "x" * 200_000, ["not CSV", "limit"]),
        ("prompt;id\na;1\n", ["prompt;id"]),
        ("prompt\n\n", ["no prompt"]),
    ],
)
def test_tables_that_would_be_misread_are_one_line(tmp_path, content, named):
    text = refused(tmp_path, "p.csv", content)
    assert all(part in text for part in named), text


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r"])
def test_only_line_feeds_end_a_line(tmp_path, letter):
    assert read(tmp_path, "p.txt", f"a{letter}b\r\nc\nd") == ["a b", "c", "d"]


@pytest.mark.parametrize(
    ("name", "content"), [("p.jsonl", '{"prompt": "a \\ud83d"}\n'), ("p.json", '["a", "\\udc00 b"]')]
)
def test_half_a_character_is_one_line(tmp_path, name, content):
    assert "half a character" in refused(tmp_path, name, content)


def test_a_pair_of_halves_is_a_character(tmp_path):
    assert read(tmp_path, "p.jsonl", '"\\ud83d\\ude00"\n') == ["😀"]


@pytest.mark.parametrize("content", ["a\0b\n", "a red circle\n".encode("utf-16-le")])
def test_nul_is_no_text(tmp_path, content):
    assert "NUL" in refused(tmp_path, "p.txt", content)


def test_text_does_not_reach_from_one_line_of_json_into_the_next(tmp_path):
    assert "line 1" in refused(tmp_path, "p.jsonl", '"x\ny", "z"\n')


@pytest.mark.parametrize("content", ["[" * 100_000, '{"prompt": ' * 100_000, '["a", ' + "9" * 5000 + "]", "9" * 5000])
def test_json_beyond_measure_is_one_line(tmp_path, content):
    refused(tmp_path, "p.json", content)


def test_pipes_devices_loops_and_huge_files_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)
    start = time.monotonic()
    for path in (
        tmp_path / "pipe.txt",
        tmp_path / "loop.txt",
        tmp_path / "huge.txt",
        "/dev/zero",
        "nul\0",
        "~nobody-here/x",
        "x" * 5000,
        "\ud800",
    ):
        assert KEY in user_error(read_prompts, path, KEY)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.parquet"])
def test_a_pointer_of_git_lfs_is_no_file_of_prompts(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    assert "git lfs pull" in refused(tmp_path, name, pointer)


def test_pipes_in_place_of_tables_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "p.parquet")
    assert "pipe" in user_error(read_prompts, tmp_path / "p.parquet", KEY)
    assert "pipe" in user_error(read_prompts, tmp_path, KEY)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "p.parquet"}]}')
    assert "pipe" in user_error(read_prompts, tmp_path, KEY)


BROKEN = [
    "[]",
    "{}",
    '{"splits": 3}',
    '{"splits": []}',
    '{"splits": [1]}',
    '{"splits": "x"}',
    "[" * 100_000,
    "\xff",
    "null",
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:12])
@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json"])
def test_folders_of_broken_json_are_one_line(tmp_path, name, content):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / name).write_text(content, encoding="latin-1")
    user_error(read_prompts, tmp_path, KEY)


def test_a_text_that_stands_a_million_times_in_a_small_table_takes_no_memory(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array(["x" * 10_000]))
    pq.write_table(pa.table({"prompt": text}), tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").stat().st_size < 1 << 20
    assert "more than" in user_error(read_prompts, tmp_path / "p.parquet", KEY)


def test_many_nulls_are_not_much(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"prompt": ["x" * 100_000] + [None] * 200_000 + ["y"]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet", KEY) == ["x" * 100_000, "y"]


def test_prompts_that_the_encoders_do_not_tell_apart_are_counted():
    prompts = ["one two three", "one two four", "two", "one two five", "two"]
    text = cut_alike(prompts, lambda prompt: tuple(prompt.split()[:2]))
    assert text.startswith("2 prompts")
    assert all(part in text for part in ("one two four", "one two three", "model.text_tokens"))
    assert cut_alike(prompts, lambda prompt: prompt) is None
