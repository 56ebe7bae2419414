"""Prompts from jsonl, json, parquet, datasets folders and the named sets:
what is read, in which order, and what the errors say.
"""

import json
import sys

import pytest

from engine_cases import TRAIN_PROMPTS, metrics_of, succeed, timeless, tiny_recipe, weights_of, write_lines
from flowgrove.data.prompts import NAMED_SETS, read_prompts
from pictured import saved
from planner_cases import user_error

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RAW = ["a red  circle", " ein grüner\u2028Kreis ○\n", "", "  \t ", "a red  circle", 'with "quotes", commas\tand tabs']
READ = ["a red circle", "ein grüner Kreis ○", "a red circle", 'with "quotes", commas and tabs']
KEY = "data.prompts"


def jsonl(path, rows):
    return write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def saved_splits(folder, **splits):
    for name, texts in splits.items():
        saved(folder / name, {"prompt": texts})
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


WRITERS = {
    "jsonl": lambda folder, columns: jsonl(folder / "p.jsonl", _rows(columns)),
    "json lines": lambda folder, columns: jsonl(folder / "p.json", _rows(columns)),
    "json list": lambda folder, columns: write_lines(folder / "p.json", [json.dumps(_rows(columns), indent=1)]),
    "parquet": lambda folder, columns: parquet(folder / "p.parquet", columns, row_group_size=2),
    "saved": lambda folder, columns: saved(folder / "set", columns, shards=2),
    "parquet folder": lambda folder, columns: (
        parquet(folder / "set" / "data" / "train-00000-of-00001-abc.parquet", columns).parent.parent
    ),
}


def _rows(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """A function that writes a table in one of the formats and returns its path."""
    return lambda columns: WRITERS[request.param](tmp_path, columns)


# What is read


def test_every_format_gives_the_same_prompts_in_their_order(write):
    path = write({"id": list(range(len(RAW))), "prompt": RAW})
    assert read_prompts(path, KEY) == READ
    assert read_prompts(str(path), KEY) == READ


def test_nulls_are_dropped(write):
    assert read_prompts(write({"prompt": ["a", None, "b", None, None, "c"]}), KEY) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("columns", "taken"),
    [(("text", "caption", "prompt"), "prompt"), (("text", "id", "caption"), "caption"), (("id", "text"), "text")],
)
def test_without_a_key_prompt_comes_before_caption_before_text(write, columns, taken):
    assert read_prompts(write({name: [f"{name} {n}" for n in range(3)] for name in columns}), KEY) == [
        f"{taken} {n}" for n in range(3)
    ]


def test_the_key_names_the_column(write):
    path = write({"prompt": ["no", "no"], "Prompts": ["yes", "too"]})
    assert read_prompts(path, KEY, "Prompts") == ["yes", "too"]


def test_text_files_have_no_columns(tmp_path):
    path = write_lines(tmp_path / "p.prompts", ["a", '{"prompt": "b"}'])
    assert read_prompts(path, KEY, "caption") == ["a", '{"prompt": "b"}']


def test_lines_of_json_may_be_strings_and_lack_the_column(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", ['"a"', "", '{"prompt": "b", "id": 1}', '{"id": 2}', '"c"'])
    assert read_prompts(path, KEY) == ["a", "b", "c"]


def test_text_types_of_arrow_are_all_read(tmp_path):
    for number, kind in enumerate(
        (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
    ):
        texts = pa.array(["a", None, "b", "a"], pa.string())
        values = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
        assert read_prompts(saved(tmp_path / str(number), {"prompt": values}), KEY) == ["a", "b", "a"]
    assert read_prompts(
        parquet(tmp_path / "p.parquet", {"prompt": pa.array(["a", "b", "a"]).dictionary_encode()}), KEY
    ) == ["a", "b", "a"]


def test_columns_that_are_not_asked_for_are_not_read(tmp_path):
    """Pictures beside the prompts, broken on purpose."""
    path = parquet(
        tmp_path / "p.parquet",
        {"prompt": ["a", "b"], "picture": [b"\x01" * 999, b"\x02" * 999]},
        use_dictionary=False,
        compression="none",
    )
    content = path.read_bytes()
    place = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    path.write_bytes(content[:place] + b"\xff" * 64 + content[place + 64 :])
    with pytest.raises((OSError, ValueError)):
        pq.read_table(path)
    assert read_prompts(path, KEY) == ["a", "b"]


# Folders


def test_of_several_splits_train_is_taken_and_others_by_their_path(tmp_path):
    folder = saved_splits(tmp_path / "set", test=["c"], train=["a", "b"])
    assert read_prompts(folder, KEY) == ["a", "b"]
    assert read_prompts(folder / "test", KEY) == ["c"]


def test_splits_without_train_are_named_in_the_error(tmp_path):
    text = user_error(read_prompts, saved_splits(tmp_path / "set", test=["c"], validation=["d"]), KEY)
    assert "test, validation" in text
    assert str(tmp_path / "set" / "test") in text


def test_shards_of_a_parquet_folder_are_read_in_order_and_other_splits_left(tmp_path):
    data = tmp_path / "set" / "data"
    for number in (1, 0, 2):
        parquet(data / f"train-{number:05d}-of-00003-{9 - number}.parquet", {"caption": [f"{number}a", f"{number}b"]})
    parquet(data / "test-00000-of-00001.parquet", {"caption": ["test"]})
    expected = ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert read_prompts(tmp_path / "set", KEY) == expected
    assert read_prompts(data, KEY) == expected
    (data / "train-00001-of-00003-8.parquet").unlink()
    assert "2 of the shards" in user_error(read_prompts, data, KEY)


def test_parquet_files_of_any_name_in_a_folder_are_all_read(tmp_path):
    for name in ("b", "a"):
        parquet(tmp_path / f"{name}.parquet", {"text": [name]})
    assert read_prompts(tmp_path, KEY) == ["a", "b"]


def test_several_splits_and_none_of_them_train_is_an_error(tmp_path):
    for split in ("test", "validation"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", {"text": [split]})
    assert "train" in user_error(read_prompts, tmp_path, KEY)


# Errors


def refused(path, prompt_key=None):
    text = user_error(read_prompts, path, "data.eval_prompts", prompt_key)
    assert text.startswith("data.eval_prompts: ")
    assert str(path) in text
    return text


def test_a_column_that_is_not_there_is_an_error_that_lists_the_columns(write):
    path = write({"id": [1, 2], "title": ["a", "b"]})
    for prompt_key in (None, "prompt"):
        text = refused(path, prompt_key)
        assert "data.prompt_key" in text
        assert "id, title" in text


def test_a_column_of_something_else_is_an_error(write):
    assert "column prompt" in refused(write({"prompt": [1, 2]}))
    assert "column id" in refused(write({"prompt": ["a", "b"], "id": [[1], [2]]}), "id")


def test_a_file_without_prompts_is_an_error(write):
    assert "no prompt" in refused(write({"prompt": ["", "  ", None]}))


@pytest.mark.parametrize(("name", "content", "says"), [
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3"),
    ("p.jsonl", '{"prompt": "a"}, {"prompt": "b"}\n', "line 1"),
    ("p.jsonl", '{"prompt": "a"}\n7\n', "entry 2"),
    ("p.json", '[{"prompt": "a"},', "not JSON"),
    ("p.json", '{\n"prompt": "a"\n}', "line 1"),
    ("p.jsonl", "", "no prompt"),
    ("p.parquet", "PAR1 and no more", "cannot read"),
])  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_text(content)
    assert says in refused(path)


def test_a_broken_or_strange_folder_is_one_line(tmp_path):
    folder = saved(tmp_path / "cut", {"prompt": ["a"] * 100})
    arrow = folder / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:50])
    refused(folder)
    arrow.unlink()
    refused(folder)
    (folder / "state.json").write_text("{}")
    refused(folder)
    assert "save_to_disk" in refused(
        saved(tmp_path / "selected", {"prompt": ["a"]}, _indices_data_files=[{"filename": "indices.arrow"}])
    )
    (tmp_path / "empty").mkdir()
    assert "save_to_disk" in refused(tmp_path / "empty")


def test_jsonl_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "grün"}\n'.encode("latin-1"))
    assert "UTF-8" in refused(tmp_path / "p.jsonl")


def test_without_pyarrow_the_error_says_how_to_get_it_and_json_is_read(tmp_path, monkeypatch):
    paths = [parquet(tmp_path / "p.parquet", {"prompt": ["a"]}), saved(tmp_path / "set", {"prompt": ["a"]})]
    lines = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for path in paths:
        assert "pip install pyarrow" in refused(path)
    assert read_prompts(lines, KEY) == ["a"]


# Named sets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and a working folder without files.
    Returns a function that puts a file of a dataset repository into the cache.
    """
    from huggingface_hub import constants

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository, name):
        place = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text("0" * 40)
        file = place / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    return put


def fill(file, column, texts):
    """Writes `texts` into `file` in the format of its suffix, as the public sets have it."""
    if file.suffix == ".parquet":
        parquet(file, {column: texts, "other": texts})
    elif file.suffix == ".json":
        file.write_text(
            json.dumps(texts if file.parent.name == "benchmark" else [{column: text, "rank": [1]} for text in texts])
        )
    else:
        tab = "\t" if file.suffix == ".tsv" else ","
        file.write_text("".join(f'"{text}"{tab}x\n' for text in (column, *texts)))


@pytest.mark.parametrize("name", NAMED_SETS)
def test_a_named_set_in_the_cache_is_read_and_each_prompt_counts_once(cache, name):
    named = NAMED_SETS[name]
    for number, pattern in enumerate(named.files):
        fill(
            cache(named.repository, pattern.replace("*", "00000-of-00001-abc")),
            named.column,
            [f"{number}, a", "same", " same ", f"{number} b"],
        )
    expected = list(
        dict.fromkeys(text for number in range(len(named.files)) for text in (f"{number}, a", "same", f"{number} b"))
    )
    assert read_prompts(name, KEY) == expected
    assert read_prompts(name, KEY, "a_column_of_the_other_file") == expected


@pytest.mark.parametrize("name", NAMED_SETS)
def test_a_named_set_that_is_not_in_the_cache_is_an_error_with_the_command(cache, name):
    named = NAMED_SETS[name]
    text = refused(name)
    assert f"hf download --repo-type dataset {named.repository} --include" in text
    assert all(pattern in text for pattern in named.files)
    cache(named.repository, "README.md").write_text("a card and nothing else")
    assert "hf download" in refused(name)


def test_a_named_set_of_which_a_shard_is_missing_is_not_in_the_cache(cache):
    named = NAMED_SETS["pickapic_v2"]
    fill(cache(named.repository, "data/train-00001-of-00002-abc.parquet"), "caption", ["b"])
    assert "hf download" in refused("pickapic_v2")
    fill(cache(named.repository, "data/train-00000-of-00002-def.parquet"), "caption", ["a"])
    assert read_prompts("pickapic_v2", KEY) == ["a", "b"]


def test_a_file_of_that_name_wins(cache, tmp_path):
    named = NAMED_SETS["drawbench"]
    fill(cache(named.repository, named.files[0]), named.column, ["of the set"])
    assert read_prompts("drawbench", KEY) == ["of the set"]
    write_lines(tmp_path / "work" / "drawbench", ["of the file"])
    assert read_prompts("drawbench", KEY) == ["of the file"]


def test_a_name_that_nobody_knows_is_an_error_that_lists_the_sets(cache):
    text = refused("hpdv9")
    assert all(name in text for name in NAMED_SETS)


# Whole runs


def test_a_run_on_parquet_is_the_run_on_text(tmp_path):
    """Every command that reads the prompts of a recipe asks for the recipe's column."""
    once = {"iterations": 1, "eval_every": 1}
    succeed("train", tiny_recipe(tmp_path, run=once), "--out", tmp_path / "text")
    parquet(tmp_path / "train.parquet", {"id": [1] * len(TRAIN_PROMPTS), "words": list(TRAIN_PROMPTS)})
    lines = (tmp_path / "eval.txt").read_text(encoding="utf-8").splitlines()
    jsonl(tmp_path / "eval.jsonl", [{"words": line} for line in lines])
    recipe = tiny_recipe(
        tmp_path, data={"prompts": "train.parquet", "eval_prompts": "eval.jsonl", "prompt_key": "words"}, run=once
    )
    succeed("train", recipe, "--out", tmp_path / "parquet")
    assert timeless(metrics_of(tmp_path / "parquet")) == timeless(metrics_of(tmp_path / "text"))
    found, expected = weights_of(tmp_path / "parquet", 1), weights_of(tmp_path / "text", 1)
    assert all((found[name] == weight).all() for name, weight in expected.items())
    assert "finished" in succeed("train", recipe, "--out", tmp_path / "parquet").stderr
    succeed("eval", tmp_path / "parquet")
    assert "mean" in (tmp_path / "parquet" / "eval.json").read_text()
