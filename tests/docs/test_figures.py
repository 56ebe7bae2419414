"""README and docs show what profiling/figures/*.csv hold: tables, numbers in sentences, plots; nothing there is left
over, and a digit that was changed by hand is found. `make figures` writes all of it.
"""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from doc_figures import drawings, pages, plan_memory, plan_time, quickstart
from doc_figures.registry import BLOCKS, FOLDER, NUMBERS, only
from doc_pages import PAGES, ROOT
from flowgrove.bench.table import read_columns
from flowgrove.evaluation import Evaluated
from flowgrove.report.grids import save_grid

CSVS = sorted(path.name for path in (ROOT / FOLDER).glob("*.csv"))
PICTURES = sorted(path.name for path in (ROOT / FOLDER).glob("*.png"))
SHOWN = {name for entry in (*BLOCKS, *NUMBERS) for name in entry.csvs}
WRITTEN_FROM_CODE = ("docs/recipe.md", "docs/metrics.md")
_NUMBER = re.compile(r"\*{0,2}[\d.,]+( [^\w\s])?\*{0,2}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The pages and CSVs alone."""
    folder = tmp_path_factory.mktemp("copy")
    for name in pages.pages():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / FOLDER).mkdir(parents=True)
    for name in CSVS:
        shutil.copy(ROOT / FOLDER / name, folder / FOLDER / name)
    return folder


@contextmanager
def changed(path, text):
    """Inside, the file has another text."""
    before = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("page", pages.pages())
def test_a_page_says_what_its_csvs_hold(page):
    assert not list(pages.differences(page)), "make figures writes it"


# what is changed by hand is found


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_digit_that_is_changed_in_a_block_is_found(block, copy):
    path = copy / block.page
    text = path.read_text(encoding="utf-8")
    opening = text.index(f"<!-- figures: {block.name}, ")
    start, end = text.index("-->", opening), text.index("<!-- end -->", opening)
    last = re.findall(r"[\d━]", text[start:end])[-1]  # the forest has no digit
    place = text.rindex(last, start, end)
    other = text[:place] + ("1" if last == "0" else "0") + text[place + 1 :]
    with changed(path, other):
        assert list(pages.differences(block.page, copy))
    assert not list(pages.differences(block.page, copy))


@pytest.mark.parametrize("entry", NUMBERS, ids=lambda entry: f"{entry.page}-{entry.make.__name__}")
def test_a_digit_that_is_changed_in_a_sentence_is_found(entry, copy):
    path = copy / entry.page
    text = path.read_text(encoding="utf-8")
    for sentence, values in entry.sentences(copy):
        assert values
        start, end = pages.place_of(entry.page, text, sentence, len(values)).span(1)
        other = text[:start] + ("1" if text[start:end] != "1" else "2") + text[end:]
        with changed(path, other):
            assert list(pages.differences(entry.page, copy)), sentence


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_a_csv_that_was_measured_again_is_found(name, copy):
    """Every number half as large again: some page is no longer right, or a sentence no longer true."""
    path = copy / FOLDER / name
    lines = path.read_text(encoding="utf-8").splitlines()
    number = re.compile(r"(?<=[ ,])\d+(\.\d+)?(?=[ ,]|$)", re.MULTILINE)
    moved = number.sub(lambda found: f"{1.5 * float(found[0]):g}", "\n".join(lines[1:]))
    with changed(path, f"{lines[0]}\n{moved}\n"):
        told = []
        for page in sorted({entry.page for entry in (*BLOCKS, *NUMBERS) if name in entry.csvs}):
            try:
                told += pages.differences(page, copy)
            except ValueError as error:
                told.append(str(error))
    assert told


def test_one_digit_in_a_csv_is_found(copy):
    path = copy / FOLDER / "engine_tiny_cpu.csv"
    text = path.read_text(encoding="utf-8")
    seconds = only(read_columns(path), recipe="mix", lever="+ fused ops")["seconds"]
    with changed(path, text.replace(str(seconds), str(seconds + 0.1))):
        told = list(pages.differences("docs/performance.md", copy))
    of_table = [line[0] + line[1:].split(" | ")[2] for line in told if line[1:].startswith("| `mix` |")]
    assert of_table == ["-3.27", "+3.37"]  # as it stands there, and as it should


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("<!-- figures: ops-on-a-gpu,", "<!-- figures: ops-on-gpus,", "registered are"),
        ("<!-- end -->", "", "behind the block"),
        ("Such a step is", "This step is", "0 sentences"),
    ],
)
def test_what_a_page_has_lost_is_named(before, after, says, copy):
    path = copy / "docs/ops.md"
    lost = path.read_text(encoding="utf-8").replace(before, after, 1)
    with changed(path, lost), pytest.raises(ValueError, match=says):
        pages.renewed("docs/ops.md", copy)


# nothing is left over


@pytest.mark.parametrize("name", CSVS)
def test_a_csv_is_shown_or_said_to_be_raw(name):
    shown = name in SHOWN or drawings.plotter(name) is not None
    assert shown != (name in drawings.RAW), (
        "register a table or sentence of it (profiling/doc_figures/registry.py), or a plot (DRAWN in its drawings.py), "
        "or say in RAW there why there is none; not both"
    )


@pytest.mark.parametrize("name", PICTURES)
def test_a_plot_is_drawn_from_a_csv_as_it_is_or_comes_from_a_run(name):
    picture = ROOT / FOLDER / name
    csv = picture.with_suffix(".csv")
    if csv.name in CSVS and drawings.plotter(csv.name):
        assert drawings.told_source(picture) == drawings.source_of(csv), "make figures draws it"
    else:
        assert name in drawings.FROM_RUNS


def test_what_is_drawn_and_what_is_listed_exists():
    assert {path.with_suffix(".png").name for path in drawings.drawn_csvs()} | set(drawings.FROM_RUNS) == set(PICTURES)
    assert set(drawings.RAW) <= set(CSVS)
    for pattern in drawings.DRAWN:
        assert any(Path(name).match(pattern) for name in CSVS), pattern


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_names_a_csv_shows_figures_of_it(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {Path(link).name for link in re.findall(r"\]\(([^)\s]*profiling/figures/[\w.]+\.csv)\)", text)}
    assert named <= {name for entry in (*BLOCKS, *NUMBERS) if entry.page == page for name in entry.csvs}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WRITTEN_FROM_CODE])
def test_a_table_of_numbers_stands_in_a_block(page):
    text = re.sub(r"^<!-- figures: .*?^<!-- end -->$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert not [row for row in rows if sum(bool(_NUMBER.fullmatch(cell.strip())) for cell in row) > 1]


# plots


def test_a_plot_drawn_twice_is_the_same_and_stays_as_it_is(tmp_path):
    (tmp_path / FOLDER).mkdir(parents=True)
    csv = Path(shutil.copy(ROOT / FOLDER / "scaling_tiny_cpu.csv", tmp_path / FOLDER))
    assert drawings.redraw(tmp_path) == [csv.with_suffix(".png")]
    first = csv.with_suffix(".png").read_bytes()
    drawings.draw(csv, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first
    assert drawings.redraw(tmp_path) == []
    with Image.open(csv.with_suffix(".png")) as new, Image.open(ROOT / FOLDER / "scaling_tiny_cpu.png") as committed:
        assert new.size == committed.size
    other = csv.read_text(encoding="utf-8").replace("tiny,leaves,1,2,40", "tiny,leaves,1,2,41")
    csv.write_text(other, encoding="utf-8")
    assert drawings.redraw(tmp_path) == [csv.with_suffix(".png")]  # looks the same, but its CSV is another


def test_the_quickstarts_figures_are_taken_from_a_run(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (tmp_path / FOLDER).mkdir(parents=True)
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8").replace("run:\n", "run:\n  seed: 7\n")
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    lines = [
        {"iteration": done, "reward": {"shapes": {"mean": 0.5 + done / 10, "std": 0.1}}, "eval_reward": held_out}
        for done, held_out in enumerate((0.25, None, 0.75))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match="no two grids"):
        quickstart.take_run(run, tmp_path)
    for done, shade in ((0, 0.2), (3, 0.8)):
        pictures, scores = torch.full((4, 3, 32, 32), shade), torch.full((4, 1), shade, dtype=torch.float64)
        evaluated = Evaluated(pictures, ["a", "a", "b", "b"], scores)
        save_grid(run / "samples" / f"iteration_{done:06d}.png", evaluated, 2, [1.0])
    quickstart.take_run(run, tmp_path)
    rows = read_columns(tmp_path / FOLDER / quickstart.REWARD)
    assert [row["seed"] for row in rows] == [7, 7, 7, 7]
    assert [row["training_reward"] for row in rows] == [0.5, 0.6, 0.7, None]
    # the last line's evaluation comes after its update
    assert quickstart.rewards(rows, "held_out_reward") == [(0, 0.25), (3, 0.75)]
    shades = set(np.asarray(Image.open(tmp_path / FOLDER / quickstart.BEFORE_AFTER).convert("L")).ravel().tolist())
    assert {51, 204} <= shades
    drawings.draw(tmp_path / FOLDER / quickstart.REWARD, tmp_path / "curve.png")


# plans


@pytest.mark.long
@pytest.mark.parametrize(
    "planned", plan_memory.PLANNED, ids=lambda planned: " ".join([planned.recipe, *planned.settings])
)
def test_memory_is_predicted_as_it_stands(planned):
    """If not: make figures PREDICTIONS=1."""
    kept = plan_memory.predictions_in(read_columns(ROOT / FOLDER / plan_memory.MEMORY), planned)
    for now, then in zip(planned.predict(), kept, strict=True):
        assert (now.reshard, now.memory.rows) == (then.reshard, then.memory.rows)
        assert now.memory.resident == pytest.approx(then.memory.resident, rel=0.01)
        assert now.memory.stages == pytest.approx(then.memory.stages, rel=0.01)
        assert now.memory.graph == pytest.approx(then.memory.graph, rel=0.01)
        assert now.communication == then.communication


@pytest.mark.long
def test_time_is_predicted_as_it_stands():
    """If not: make figures PREDICTIONS=1."""
    assert plan_time.predicted() == read_columns(ROOT / FOLDER / plan_time.TIME)
