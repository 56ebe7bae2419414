"""Rows that hold more than a text: source pictures, negative prompts, metadata."""

import io
import json
import pickle

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from flowgrove.data.columns import Columns
from flowgrove.data.prompt import Picture, Prompt, conditional, encoding_key, metadata_of, pictures_of, unconditional
from flowgrove.data.prompts import prompts_of_iteration, read_prompts
from flowgrove.errors import UserError
from flowgrove.models.sources import check_sources, fitted, source_pictures
from flowgrove.recipe.schema import Model
from flowgrove.setup import Setup
from pictured import drawn_picture, saved
from planner_cases import user_error
from policy_cases import small_recipe

KEY = "data.prompts"
ALL = Columns(pictures=True, metadata="all")
KONTEXT = Model(adapter="flux_kontext", path="unused")


def rows_of(folder, rows, name="p.jsonl", columns=ALL):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(folder / name, KEY, None, columns)


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "a.png"
    path.write_bytes(drawn_picture("a", 0))
    return path


# What a row holds


def test_a_row_brings_its_pictures_its_negative_prompt_and_the_rest(tmp_path, picture):
    row = {"prompt": " make it  red ", "image": "pictures/a.png", "negative_prompt": "grey", "tag": "colour", "n": [1]}
    prompt, plain = rows_of(tmp_path, [row, {"prompt": "b"}])
    assert prompt == Prompt("make it red", pictures_of(prompt), "grey", {"tag": "colour", "n": [1]})
    assert [one.path for one in pictures_of(prompt)] == [picture]
    assert pictures_of(plain) == ()
    assert (plain.negative, metadata_of(plain)) == (None, {"tag": None, "n": None})


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "saved"])
def test_every_format_with_columns_has_them(tmp_path, picture, kind):
    columns = {"prompt": ["x", "y"], "image": [str(picture), "pictures/a.png"], "negative_prompt": ["n", "m"]}
    columns["tag"] = ["t", "u"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path = tmp_path / f"p.{kind}"
    if kind in ("csv", "tsv"):
        between = "," if kind == "csv" else "\t"
        lines = [between.join(columns), *(between.join(row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        saved(path, {**columns, "image": [{"bytes": None, "path": str(picture)}] * 2})
    first, second = read_prompts(path, KEY, None, ALL)
    for prompt, row in ((first, rows[0]), (second, rows[1])):
        assert str(prompt) == row["prompt"]
        assert prompt.negative == row["negative_prompt"]
        assert metadata_of(prompt) == {"tag": row["tag"]}
        assert [one.path for one in pictures_of(prompt)] == [picture]


def test_bytes_in_a_parquet_file_are_pictures(tmp_path):
    content = [drawn_picture("a", number) for number in range(3)]
    images = [
        [{"bytes": content[0], "path": None}],
        [{"bytes": content[1], "path": "x"}, {"bytes": content[2], "path": None}],
    ]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["one", "two"], "images": images}), tmp_path / "p.parquet")
    one, two = read_prompts(tmp_path / "p.parquet", KEY, None, ALL)
    assert [picture.content for picture in (*pictures_of(one), *pictures_of(two))] == content
    assert source_pictures(two, 40, 56)[1].tobytes() == Image.open(io.BytesIO(content[2])).tobytes()


def test_what_is_not_asked_for_is_not_read(tmp_path):
    rows = [{"prompt": "x", "image": "gone.png", "tag": "t", "more": {"a": 1}}]
    (plain,) = rows_of(tmp_path, rows, columns=Columns())
    assert type(plain) is str
    (tagged,) = rows_of(tmp_path, rows, columns=Columns(metadata=("tag",)))
    assert metadata_of(tagged) == {"tag": "t"}
    assert pictures_of(tagged) == ()


def test_columns_that_a_file_has_not_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.metadata: .* has no column kind, for data.prompts: write one of tag"):
        rows_of(tmp_path, [{"prompt": "x", "tag": "t"}], columns=Columns(metadata=("kind",)))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("gone.png", "row 2 of .* names the picture .*gone.png, which cannot be read"),
        ("pictures", "names the picture .*pictures, which cannot be read"),
        (5, "row 2 of .* has 5 in the column image: write the path"),
        ([{"path": None}], "in the column image"),
    ],
)
def test_a_picture_that_is_not_there_is_named_with_its_row(tmp_path, picture, value, told):
    with pytest.raises(UserError, match=told) as caught:
        rows_of(tmp_path, [{"prompt": "x", "image": "pictures/a.png"}, {"prompt": "y", "image": value}])
    assert "\n" not in str(caught.value)
    assert KEY in str(caught.value)


def test_a_negative_prompt_that_is_no_text_is_named(tmp_path):
    assert "write a text, or null" in user_error(rows_of, tmp_path, [{"prompt": "x", "negative_prompt": 3}])


# What a prompt is


def test_prompts_are_equal_if_all_of_their_row_is(picture):
    pictures = (Picture("a.png", "a.png", picture),)
    every = [
        Prompt("a"), Prompt("b"), Prompt("a", pictures), Prompt("a", (*pictures, *pictures)), Prompt("a", negative=""),
        Prompt("a", negative="b"), Prompt("a", metadata={"t": 1}), Prompt("a", metadata={"t": 2}),
    ]  # fmt: skip
    for number, one in enumerate(every):
        assert [one == other for other in every] == [number == place for place in range(len(every))]
        assert [one != other for other in every] == [number != place for place in range(len(every))]
        again = pickle.loads(pickle.dumps(one))
        assert again == one
        assert hash(again) == hash(one)
        assert pictures_of(again) == pictures_of(one)
    assert len(set(every)) == len(every)
    assert Prompt("a") == "a"
    assert hash(Prompt("a")) == hash("a")
    assert Prompt("a", negative="") != "a"
    assert type(str(every[-1])) is str


def test_what_is_encoded_does_not_depend_on_metadata(picture):
    pictures = (Picture("a.png", "a.png", picture),)
    one, other = (Prompt("a", pictures, negative, {"t": negative}) for negative in ("x", None))
    assert conditional(one) == conditional(other) == Prompt("a", pictures)
    assert unconditional(one, "z") == Prompt("x", pictures)
    assert unconditional(other, "z") == Prompt("z", pictures)
    assert type(conditional(Prompt("a", negative="x"))) is str
    assert unconditional("a", "z") == "z"


def test_files_of_embeddings_are_named_by_text_and_picture(tmp_path, picture):
    plain, pictured = encoding_key("a"), encoding_key(Prompt("a", (Picture("a", "a", picture),)))
    assert plain == encoding_key(Prompt("a", metadata={"t": 1}))
    assert pictured not in (plain, encoding_key(Prompt("b", (Picture("a", "a", picture),))))
    picture.write_bytes(drawn_picture("another", 0, 60, 60))
    assert encoding_key(Prompt("a", (Picture("a", "a", picture),))) != pictured


def test_iterations_hand_whole_prompts_on():
    prompts = [Prompt("a", metadata={"t": n}) for n in range(4)]
    taken = prompts_of_iteration(prompts, 0, 4, 0)
    assert sorted(metadata_of(prompt)["t"] for prompt in taken) == [0, 1, 2, 3]


# Fingerprints, which decide whether a run may go on


def fingerprint(tmp_path, rows, **data):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = small_recipe(data={"prompts": str(tmp_path / "p.jsonl"), **data})
    return Setup(recipe).fingerprint


def test_a_run_is_another_with_other_negative_prompts_or_metadata(tmp_path):
    plain = fingerprint(tmp_path, [{"prompt": "a", "tag": "t"}])
    assert plain == fingerprint(tmp_path, [{"prompt": "a", "tag": "u"}]), "nothing reads it"
    assert plain != fingerprint(tmp_path, [{"prompt": "a", "negative_prompt": "b"}])
    tagged = fingerprint(tmp_path, [{"prompt": "a", "tag": "t"}], metadata=["tag"])
    assert tagged != fingerprint(tmp_path, [{"prompt": "a", "tag": "u"}], metadata=["tag"])


# Pictures


def test_a_picture_is_scaled_to_cover_and_cropped_at_its_middle():
    whole = np.zeros((40, 80, 3), np.uint8)
    whole[:, 20:60] = 255
    found = np.asarray(fitted(Image.fromarray(whole), 20, 20))
    assert found.shape == (20, 20, 3)
    assert found[:, 2:-2].min() > 250  # its filter reaches over the edge


def test_pictures_are_upright_and_on_white(tmp_path):
    path = tmp_path / "a.png"
    turned = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(path, exif=exif)
    found = Picture("a", "a", path).load()
    assert found.mode == "RGB"
    assert found.size == (4, 8)
    assert np.asarray(found).min() == 255


@pytest.mark.parametrize("content", [b"", b"no picture", drawn_picture("a", 0)[:200]])
def test_a_damaged_picture_is_named_before_a_model_loads(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    prompts = [Prompt("x", (Picture("bad.png", str(path), path),))]
    assert str(path) in user_error(check_sources, KONTEXT, prompts)


def test_prompts_without_as_many_pictures_as_the_model_takes_are_named(picture):
    one = Picture("a", "a", picture)
    check_sources(KONTEXT, [Prompt("x", (one,))])
    assert "'y' has 0 source pictures, and flux_kontext takes 1" in user_error(check_sources, KONTEXT, ["y"])
    assert "has 2 source pictures" in user_error(check_sources, KONTEXT, [Prompt("x", (one, one))])
    sizes = KONTEXT.model_copy(update={"sizes": [(32, 32), (16, 48)]})
    assert "model.sizes" in user_error(check_sources, sizes, [Prompt("x", (one,))])


def test_a_number_of_pictures_that_a_family_does_not_take_is_named():
    for adapter, takes in (("flux", "takes 0"), ("flux_kontext", "takes 1")):
        model = Model(adapter=adapter, path="unused", source_pictures=2)
        assert f"model.source_pictures is 2: {adapter} {takes}" in user_error(check_sources, model, [])


def test_a_run_is_another_with_another_picture_under_the_same_name(tmp_path, folders):
    path = tmp_path / "a.png"
    path.write_bytes(drawn_picture("a", 0))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "a.png"}\n')
    recipe = small_recipe(
        model={"adapter": "flux_kontext", "path": str(folders["flux_kontext"]), "dtype": "fp32"},
        data={"prompts": str(tmp_path / "p.jsonl")},
    )
    before = Setup(recipe).fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("a.png", "p.jsonl"):
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    elsewhere = recipe.model_copy(update={"data": recipe.data.model_copy(update={"prompts": str(moved / "p.jsonl")})})
    assert Setup(elsewhere).fingerprint == before
    path.write_bytes(drawn_picture("another", 1, 200, 100))
    assert Setup(recipe).fingerprint != before


def test_metadata_that_json_has_not_is_its_text(tmp_path):
    table = pyarrow.table({"prompt": ["a"], "when": pyarrow.array([0], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    recipe = small_recipe(data={"prompts": str(tmp_path / "p.parquet"), "metadata": "all"})
    assert len(Setup(recipe).fingerprint) == 64


def test_a_column_that_is_all_null_makes_no_other_run(tmp_path):
    plain = fingerprint(tmp_path, [{"prompt": "a"}])
    assert fingerprint(tmp_path, [{"prompt": "a", "negative_prompt": None}]) == plain


def test_an_empty_cell_of_a_table_is_no_negative_prompt(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na,\nb,grey\n")
    assert [prompt.negative for prompt in read_prompts(tmp_path / "p.csv", KEY)] == [None, "grey"]


def test_half_a_character_in_a_negative_prompt_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "negative_prompt": "\\ud800"}\n')
    assert "row 1" in user_error(read_prompts, tmp_path / "p.jsonl", KEY)


def test_pictures_in_all_files_of_a_set_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr("flowgrove.data.columns._MOST_BYTES", 3 * len(drawn_picture("a", 0)))
    for shard in range(4):
        held = [{"bytes": drawn_picture("a", 0), "path": None}]
        table = pyarrow.table({"prompt": ["a"], "image": held})
        pyarrow.parquet.write_table(table, tmp_path / f"train-{shard:05d}-of-00004.parquet")
    assert "GiB of pictures" in user_error(read_prompts, tmp_path, KEY, None, ALL)


def test_a_picture_of_more_than_8_bits_is_named(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    assert "8 bits" in user_error(check_sources, KONTEXT, [Prompt("x", (Picture("deep.png", str(path), path),))])
