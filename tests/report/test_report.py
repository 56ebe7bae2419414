"""The report of a run: pictures that show something, one page that needs no other file,
and sample grids that can be read back (issue 2, DESIGN §3.3).
"""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from engine_cases import EVAL_PROMPTS, metrics_of, succeed, tiny_recipe
from flowgrove.errors import UserError
from flowgrove.evaluation import Evaluated
from flowgrove.report.figures import literal, pyplot, save_figure
from flowgrove.report.grids import Grid, in_common, load_grid, save_grid
from flowgrove.report.lines import evaluations
from flowgrove.report.page import write_report
from flowgrove.report.side_by_side import draw_side_by_side
from report_cases import LINE, grids_in, synthetic_run


class Page(HTMLParser):
    """What a browser makes of a page before any script runs: its tags, all its links, its title, the scripts' texts,
    and the run that its JSON tells of.
    """

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.title, self.scripts, self.inside = [], [], "", [], None
        self.feed(path.read_text(encoding="utf-8"))
        (data,) = (text for text in self.scripts if text.startswith("{"))
        (self.run,) = json.loads(data)["runs"]
        self.facts = {name: f"{value} ({note})" for name, value, note in self.run["facts"]}

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.inside == "title":
            self.title += data
        if self.inside == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self.inside = None


def shows_something(path):
    """Large enough to look at, many shades, and not all but white."""
    picture = Image.open(path).convert("RGB")
    shades = picture.getcolors(picture.width * picture.height)
    return min(picture.size) >= 100 and len(shades) > 20 and max(shades)[0] < 0.995 * picture.width * picture.height


NASTY = "a<b>&\"'<script>{{7*7}}"  # the name of a folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / NASTY
    recipe = tiny_recipe(folder, run={"iterations": 3, "eval_every": 2, "eval": {"samples": 2}, "checkpoint_every": 0})
    succeed("train", recipe, "--out", folder / f"run {NASTY}")
    return folder / f"run {NASTY}"


# The page


def test_the_two_pictures_are_there_and_not_blank(run):
    pictures = {path.name for path in run.glob("*.png")}
    assert pictures == {"reward.png", "before_after.png"}
    for name in pictures:
        assert shows_something(run / name), name
    assert len({(run / name).read_bytes() for name in pictures}) == len(pictures)


def test_the_page_needs_no_other_file(run):
    page = Page(run / "report.html")
    assert page.links == ["data:,"]  # no icon, for which a browser would ask
    assert "img" not in page.tags
    assert all(grid["src"].startswith("data:image/png;base64,") for grid in page.run["pictures"]["grids"])


def test_the_library_inside_the_page_comes_with_its_licence(run):
    library = max(Page(run / "report.html").scripts, key=len)
    assert library.lstrip().startswith("/**\n* plotly.js")
    assert "Licensed under the MIT license" in library[:400]


def test_text_of_the_recipe_and_names_of_folders_are_text_and_not_markup(run):
    page = Page(run / "report.html")
    assert {tag: page.tags.count(tag) for tag in ("script", "b")} == {"script": 7, "b": 0}
    assert page.run["recipe"]["yaml"] == (run / "recipe.yaml").read_text(encoding="utf-8")
    assert NASTY in yaml.safe_load(page.run["recipe"]["yaml"])["data"]["prompts"]
    assert page.title == f"run {NASTY} · Flowgrove"
    assert page.run["name"] == f"run {NASTY}"


def test_the_page_tells_the_held_out_reward_before_and_after(run):
    lines, told = metrics_of(run), Page(run / "report.html").facts["Held-out reward"]
    assert f"{lines[0]['eval_reward']:.3f} → {lines[-1]['eval_reward']:.3f}" in told
    assert f"± {lines[-1]['eval_reward_confidence']:.3f}" in told.replace("\N{NO-BREAK SPACE}", " ")


def test_a_run_that_never_evaluated_has_a_report_without_a_before_and_after(tmp_path):
    recipe = synthetic_run(tmp_path / "run", [LINE | {"iteration": n} for n in range(3)])
    assert write_report(recipe, tmp_path / "run") == tmp_path / "run" / "report.html"
    page = Page(tmp_path / "run" / "report.html")
    assert page.run["pictures"] == {"grids": [], "common": [], "changed": False}
    assert page.facts["Held-out reward"].startswith("not evaluated")
    assert [path.name for path in (tmp_path / "run").glob("*.png")] == ["reward.png"]
    assert shows_something(tmp_path / "run" / "reward.png")


@pytest.mark.parametrize("clip", [1e-3, [1e-4, 5e-4]])
def test_a_run_that_never_trained_still_has_a_report(tmp_path, clip):
    """Every group without an advantage: no ratio, no gradient."""
    nothing = dict.fromkeys(
        ("ratio_mean", "ratio_min", "ratio_max", "clipped_low", "clipped_high", "approx_kl", "grad_norm", "logp_drift")
    )
    recipe = synthetic_run(
        tmp_path / "run", [LINE | nothing | {"train_passes": 0, "eval_reward": 0.5}], update={"clip_range": clip}
    )
    write_report(recipe, tmp_path / "run")
    assert shows_something(tmp_path / "run" / "reward.png")


def test_the_reward_curve_shows_the_rewards(tmp_path):
    """Runs with other rewards have other curves; the same run has the same."""
    curves = []
    for name, last in (("a", 0.9), ("b", 0.2), ("c", 0.9)):
        lines = [
            LINE | {"iteration": n, "reward": {"shapes": {"mean": mean, "std": 0.1}}}
            for n, mean in enumerate((0.5, 0.6, last))
        ]
        recipe = synthetic_run(tmp_path / name, lines)
        write_report(recipe, tmp_path / name)
        curves.append((tmp_path / name / "reward.png").read_bytes())
    assert curves[0] == curves[2]
    assert curves[0] != curves[1]


def test_evaluations_stand_where_their_model_stood():
    """An evaluation comes before its line's update, the last one after it."""
    lines = [LINE | {"iteration": n} | ({"eval_reward": n / 10} if n in (0, 2, 4) else {}) for n in range(5)]
    assert evaluations(lines) == [(0, 0.0), (2, 0.2), (5, 0.4)]
    assert evaluations(lines[:4]) == [(0, 0.0), (2, 0.2)]  # a run that was cut off
    assert evaluations(lines, 5) == evaluations(lines)
    assert evaluations(lines, 9) == [(0, 0.0), (2, 0.2), (4, 0.4)]  # one that still runs, or was stopped
    assert evaluations([LINE]) == evaluations([]) == []


# Grids


def evaluated(prompts, samples, rewards=1, size=(8, 12)):
    count = prompts * samples
    pictures = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(prompts))
    scores = torch.rand(count, rewards, dtype=torch.float64, generator=torch.Generator().manual_seed(samples))
    return Evaluated(pictures, [f"prompt {n // samples} ○<&" for n in range(count)], scores)


@pytest.mark.parametrize(("prompts", "samples"), [(1, 1), (2, 1), (1, 3), (8, 4), (5, 2)])
def test_a_grid_comes_back_as_it_was_saved(tmp_path, prompts, samples):
    given, weights = evaluated(prompts, samples, rewards=2), [0.5, 2.0]
    save_grid(tmp_path / "deep" / "grid.png", given, samples, weights)
    grid = load_grid(tmp_path / "deep" / "grid.png")
    assert grid.tiles.shape == (prompts, samples, 8, 12, 3)
    assert grid.tiles.dtype == np.uint8
    assert grid.prompts == [f"prompt {n} ○<&" for n in range(prompts)]
    for row in range(prompts):
        for column in range(samples):
            index = row * samples + column
            expected = given.pictures[index].permute(1, 2, 0).numpy() * 255
            assert np.abs(grid.tiles[row, column] - expected).max() <= 0.5 + 1e-4
            assert grid.scores[row, column] == pytest.approx(
                0.5 * given.scores[index, 0].item() + 2.0 * given.scores[index, 1].item()
            )


def test_a_grid_is_a_picture_of_its_tiles(tmp_path):
    save_grid(tmp_path / "grid.png", evaluated(3, 2), 2, [1.0])
    grid, pixels = load_grid(tmp_path / "grid.png"), np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (3 * 8, 2 * 12, 3)
    assert np.array_equal(pixels[8:16, 12:24], grid.tiles[1, 1])
    assert len({tile.tobytes() for row in grid.tiles for tile in row}) == 6


def test_of_a_long_evaluation_some_rows_are_kept_whole(tmp_path):
    """Whatever is kept, a row's prompt, pictures and scores belong together,
    and two grids of one length keep the same rows.
    """
    kept = []
    for name in ("before.png", "after.png"):
        given = evaluated(40, 6)
        save_grid(tmp_path / name, given, 6, [1.0])
        grid = load_grid(tmp_path / name)
        assert 2 <= len(grid.prompts) <= 40
        for row, prompt in enumerate(grid.prompts):
            first = given.prompts.index(prompt)
            for column in range(grid.tiles.shape[1]):
                assert grid.scores[row, column] == given.scores[first + column, 0].item()
                assert (
                    np.abs(
                        grid.tiles[row, column] - given.pictures[first + column].permute(1, 2, 0).numpy() * 255
                    ).max()
                    <= 0.5 + 1e-4
                )
        kept.append(grid.prompts)
    assert kept[0] == kept[1]
    assert len(set(kept[0])) == len(kept[0])


def test_the_grids_of_a_run_hold_the_same_prompts_before_and_after(run):
    grids = [load_grid(path) for path in sorted((run / "samples").glob("*.png"))]
    assert len(grids) == 3
    assert all(grid.prompts == list(EVAL_PROMPTS) for grid in grids)
    assert all(grid.tiles.shape == (2, 2, 32, 32, 3) for grid in grids)
    assert not np.array_equal(grids[0].tiles, grids[-1].tiles)


# Evaluations of other prompts, and what others wrote


LETTERS = [f"a red circle, number {number}" for number in range(12)]
CHANGES = {
    "fewer prompts": ([(0, LETTERS[:4], 1), (3, LETTERS[:2], 1)], 2, True),
    "more prompts": ([(0, LETTERS[:2], 1), (3, LETTERS[:5], 1)], 2, True),
    "fewer samples": ([(0, LETTERS[:3], 4), (3, LETTERS[:3], 2)], 3, False),
    "other prompts": ([(0, LETTERS[:3], 1), (3, LETTERS[4:7], 1)], 0, True),
    "the same at other places, which have other seeds": ([(0, LETTERS[:3], 1), (3, LETTERS[1:4], 1)], 0, True),
    "none changed": ([(0, LETTERS[:3], 2), (3, LETTERS[:3], 2)], 3, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_before_and_after_show_what_has_the_same_prompts_and_seeds(tmp_path, change):
    saved, rows, told = CHANGES[change]
    run = tmp_path / "run"
    recipe = synthetic_run(run, [LINE | {"iteration": n, "eval_reward": 0.5} for n in range(3)])
    grids_in(run, *saved)
    write_report(recipe, run)
    page = Page(run / "report.html")
    assert len(page.run["pictures"]["common"]) == rows
    assert (run / "before_after.png").exists() == (rows > 0)
    assert ("the held-out prompts changed in between" in page.facts["Held-out reward"]) == told
    grids = page.run["pictures"]["grids"]
    assert all(grids[0]["prompts"][a] == grids[-1]["prompts"][b] for a, b in page.run["pictures"]["common"])
    common = in_common(*(load_grid(path) for path in sorted((run / "samples").glob("*.png"))))
    assert (0 if common is None else len(common[0].prompts)) == rows
    if common is not None:
        assert common[0].prompts == common[1].prompts
        assert common[0].tiles.shape == common[1].tiles.shape


def test_grids_from_before_numbers_were_kept_are_compared_where_their_prompts_are_the_same():
    old, new, other = (
        Grid(np.zeros((2, 1, 4, 4, 3), np.uint8), [*texts], np.zeros((2, 1)), numbers)
        for texts, numbers in (("ab", ()), ("ab", (0, 1)), ("ac", (0, 1)))
    )
    assert in_common(old, new)[1].prompts == ["a", "b"]
    assert in_common(old, other) is None


def test_a_run_that_resumes_with_fewer_held_out_prompts_ends_with_a_report(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"iterations": 1, "eval_every": 1})
    succeed("train", recipe, "--out", tmp_path / "run")
    (tmp_path / "eval.txt").write_text(EVAL_PROMPTS[1] + "\n")
    succeed("train", recipe, "--out", tmp_path / "run", "--set", "run.iterations=2")
    page = Page(tmp_path / "run" / "report.html")
    assert not (tmp_path / "run" / "before_after.png").exists()  # that prompt had another seed
    assert page.run["pictures"]["common"] == []
    assert "the held-out prompts changed in between" in page.facts["Held-out reward"]


FOREIGN = [
    "", "{", "[]", "null", "3", '"text"', "\x00", '{"iteration": "one"}', '{"iteration": true}', '{"iteration": 1}',
    '{"iteration": 9, "reward": {"shapes": 3}}',
    '{"iteration": 8, "reward": {"shapes": {"mean": "x", "std": 1}}, "seconds": {}}',
    json.dumps(LINE | {"iteration": 7, "seconds": [1]}), json.dumps(LINE | {"iteration": 7, "eval_reward": None}),
    json.dumps(LINE | {"iteration": 7, "advantage_by_step": {"x": 1}}), "[" * 100_000,
]  # fmt: skip


def test_lines_that_are_damaged_or_of_others_are_passed_over(tmp_path):
    """Wherever they stand; a line that was written twice counts once; U+2028 ends no line."""
    good = [LINE | {"iteration": n, "note": "a\u2028b\u0085c"} for n in range(3)]
    between = (FOREIGN[1:6], FOREIGN[6:9], FOREIGN[9:12], FOREIGN[12:])
    mixed = [FOREIGN[0], *(text for line, foreign in zip([*good, good[1]], between, strict=True)
                           for text in (json.dumps(line, ensure_ascii=False), *foreign))]  # fmt: skip
    pages = []
    for name, texts in (("plain", [json.dumps(line) for line in good]), ("mixed", mixed)):
        recipe = synthetic_run(tmp_path / name, [])
        (tmp_path / name / "metrics.jsonl").write_bytes("\n".join(texts).encode() + b"\n\xff\xfe\n")
        write_report(recipe, tmp_path / name)
        told = Page(tmp_path / name / "report.html").run
        pages.append({key: value for key, value in told.items() if key not in ("name", "recipe")})
    assert pages[0] == pages[1]


def test_without_a_line_there_is_one_line_of_error(tmp_path):
    recipe = synthetic_run(tmp_path / "run", [{"iteration": 0}])
    with pytest.raises(UserError, match="holds no line of this recipe"):
        write_report(recipe, tmp_path / "run")


def test_pictures_of_others_among_the_grids_are_passed_over(tmp_path):
    run = tmp_path / "run"
    recipe = synthetic_run(run, [LINE | {"iteration": n} for n in range(3)])
    grids_in(run, (0, LETTERS[:2], 1), (3, LETTERS[:2], 1))
    Image.new("RGB", (8, 8)).save(run / "samples" / "iteration_000001.png")
    Image.new("RGB", (8, 8)).save(run / "samples" / "iteration_last.png")
    (run / "samples" / "iteration_000009.png").write_bytes(b"no picture")
    write_report(recipe, run)
    assert [grid["done"] for grid in Page(run / "report.html").run["pictures"]["grids"]] == [0, 3]
    assert shows_something(run / "before_after.png")


# Text that users wrote


TEXTS = [
    "a cat with $_$ eyes",
    "$",
    "$$",
    "$\\frac{1}{2}$ of a cake",
    "100 % {x} \\n ^_",
    "a\x00b\x1b[0m",
    "漢字 🐱",
    "\ud800",
]


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_no_mathematics(tmp_path, text):
    grid = Grid(np.zeros((1, 1, 8, 8, 3), np.uint8), [text], np.zeros((1, 1)))
    draw_side_by_side(grid, grid, (text, text), tmp_path / "picture.png")
    assert shows_something(tmp_path / "picture.png")


def test_dollars_are_drawn_as_dollars(tmp_path):
    """Two of them around a letter would be an italic letter alone."""
    found = []
    for text in ("$a$", "a"):
        figure = pyplot.figure(figsize=(2, 1))
        figure.text(0.2, 0.5, **literal(text))
        save_figure(figure, tmp_path / "text.png")
        found.append(int((np.asarray(Image.open(tmp_path / "text.png").convert("L")) < 128).sum()))
    assert found[0] > 2 * found[1]


def test_a_run_of_such_prompts_has_a_report_and_pages(tmp_path):
    nasty = "a cat with $_$ eyes"
    recipe = tiny_recipe(tmp_path, reward=[{"name": "jpeg_size"}], run={"iterations": 1, "eval_every": 1})
    (tmp_path / "eval.txt").write_text(f"{nasty}\n")
    succeed("train", recipe, "--out", tmp_path / "run")
    assert shows_something(tmp_path / "run" / "before_after.png")
    succeed("sample", tmp_path / "run", "--prompts", tmp_path / "eval.txt", "--out", tmp_path / "out", "--compare")
    assert shows_something(tmp_path / "out" / "compare_00.png")
