"""The page as a person sees and uses it, in a real browser without a network. One page serves most tests, since opening
one takes seconds: they leave it as they found it.
"""

import json
import shutil
import time
from functools import partial

import pytest

from flowgrove.report.content import run_content
from flowgrove.report.page import report_page
from report_cases import LINE, grids_in, synthetic_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
NASTY = (
    "a <b>bold</b> <script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> ${7*7} {{7*7}} </script>"
)
SLOW = 300_000  # ms, for a machine that does much else
HELD_OUT = {"eval_reward": 0.5, "eval_reward_confidence": 0.05, "eval_rewards": {}}


def lines_of(count, every=4):
    return [
        LINE
        | {
            "iteration": n, "reward": {"shapes": {"mean": 0.5 + n / (2 * count), "std": 0.1}},
            "ratio_min": 0.999, "ratio_max": 1.001, "advantage_by_step": {str(n % 3): 0.8, "3": 0.7},
        }
        | (HELD_OUT | {"eval_reward": 0.4 + n / (2 * count)} if n % every == 0 or n == count - 1 else {})
        for n in range(count)
    ]  # fmt: skip


def page_of(folder, count, **changes):
    """A page of a run of `count` iterations with three grids."""
    recipe = synthetic_run(folder, lines_of(count), run={"iterations": count}, **changes)
    grids_in(folder, *((done, [NASTY, "a blue square"], 2) for done in (0, count // 2, count)))
    content = run_content(recipe, folder)
    (folder / "report.html").write_text(report_page([content], folder.name), encoding="utf-8")
    return folder / "report.html", content


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("page") / "run <script>window.hacked = 1<", 24)[0]


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Opens pages, and notes what none of them may do: tell of an error, or ask anyone for anything."""

    def __init__(self, browser):
        self.browser, self.told, self.contexts = browser, [], []

    def __call__(self, path, remembered=None, **settings):
        self.contexts.append(self.browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | settings)))
        for key, value in (remembered or {}).items():
            self.contexts[-1].add_init_script(f"localStorage.setItem('{key}', '{value}')")
        page = self.contexts[-1].new_page()
        page.set_default_timeout(SLOW)
        page.on("console", lambda each: self.told.append(each.text) if each.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.told.append(str(error)))
        inside = ("data:", "blob:", path.as_uri())
        page.on("request", lambda each: None if each.url.startswith(inside) else self.told.append(each.url))
        page.goto(path.as_uri())
        page.wait_for_selector("footer")
        return page


@pytest.fixture(scope="module")
def visitor(chromium):
    visitor = Visitor(chromium)
    yield visitor
    for context in visitor.contexts:
        context.close()


@pytest.fixture(scope="module")
def shared(visitor, page_file):
    return visitor(page_file)


@pytest.fixture
def page(shared, visitor):
    yield shared
    assert visitor.told == []


def draw(page, *contents):
    """Draws these runs in place of the page's own."""
    page.evaluate("runs => window.flowgrove.render(runs)", list(contents))


def draw_own(page):
    page.evaluate("() => window.flowgrove.render(JSON.parse(document.getElementById('content').textContent).runs)")


def until(look, wanted):
    """Waits; the page lets no one evaluate texts, which playwright's own way to wait needs."""
    end = time.monotonic() + SLOW / 1000
    while (found := look()) != wanted:
        assert time.monotonic() < end, found
        time.sleep(0.05)


def visibility(page):
    """Of the training reward: true, or "legendonly"."""
    return plot(page, "reward").evaluate("element => element._fullData[2].visible")


def plot(page, chart):
    return page.locator(f'[data-key="{chart}"] .plot')


def test_every_curve_is_drawn_under_a_heading(page, page_file):
    assert page.locator("h1").inner_text() == page_file.parent.name
    headings = page.locator("h2").all_inner_texts()
    assert headings == [
        "What the curves say", "What the model learned", "Before and after, on the same prompts and seeds",
        "Samples over the run", "How the policy moved", "What it cost", "Recipe: keys that differ from their defaults",
    ]  # fmt: skip
    charts = page.locator(".chart").evaluate_all("all => all.map(each => each.dataset.key)")
    assert charts == [
        "reward", "ratio", "clipped", "divergence", "gradient", "advantage 0", "stages", "passes", "memory",
    ]  # fmt: skip
    for chart in charts:
        assert plot(page, chart).locator(".main-svg").count() > 0
        assert page.locator(f'[data-key="{chart}"] h3').inner_text()
    assert "Healthy:" in page.locator('[data-key="ratio"] .healthy').text_content()


def test_signal_and_noise_of_the_gradient_are_drawn_where_they_are_measured(page, tmp_path):
    told = {
        "gradient_snr_error": {"all": 0.1, "0": 0.2, "3": 0.2},
        "gradient_signal": {"all": 4.0, "0": 1.0, "3": 2.0}, "gradient_signal_error": {"all": 1.0, "0": 0.5, "3": 0.5},
        "gradient_noise": {"all": 8.0, "0": 2.0, "3": 6.0}, "gradient_part": {"0": 1.0, "3": 3.0},
        "gradient_leaf_share": {},
    }  # fmt: skip
    lines = [line | (told if n % 2 == 0 else {}) for n, line in enumerate(lines_of(4))]
    content = run_content(synthetic_run(tmp_path / "run", lines, run={"iterations": 4}), tmp_path / "run")
    charts = ["snr", "snr by step", "noise by step"]
    draw(page, content)
    drawn = page.locator("#policy .chart").evaluate_all("all => all.map(each => each.dataset.key)")
    assert [key for key in drawn if key in charts] == charts
    bars = "element => element._fullData.map(each => [each.type, [...each.x], [...each.y]])"
    assert plot(page, "snr").evaluate(bars)[-1] == ["scatter", [0, 2], [1.0, 1.0]]  # 2 prompts · 4 / 8
    assert plot(page, "snr by step").evaluate(bars) == [["bar", [0, 3], [1.0, 2 * 2.0 / 6.0]]]
    assert plot(page, "noise by step").evaluate(bars) == [["bar", [0, 3], [0.25, 0.75]]] * 2
    draw(page, content, content | {"name": "other"})
    assert [len(plot(page, key).evaluate(bars)) for key in charts] == [6, 2, 2]
    draw_own(page)
    assert [plot(page, key).count() for key in charts] == [0, 0, 0]


def test_a_reward_that_only_evaluations_give_has_a_curve_of_held_out_means_alone(page, tmp_path):
    told = {"shapes": {"mean": 0.5, "confidence": 0.1}, "judge": {"mean": 0.75, "confidence": 0.25}}
    lines = [line | {"eval_reward": 0.5, "eval_rewards": told} for line in lines_of(2)]
    judge = [{"name": "jpeg_size", "label": "judge"}]
    recipe = synthetic_run(tmp_path / "run", lines, run={"iterations": 2, "eval": {"rewards": judge}})
    draw(page, run_content(recipe, tmp_path / "run"))
    curves = "element => element._fullData.filter(each => each.hoverinfo !== 'skip').map(each => [...each.y])"
    assert [plot(page, f"reward of {name}").count() for name in ("shapes", "judge")] == [0, 1], (
        "the one that trains is the sum"
    )
    assert plot(page, "reward of judge").evaluate(curves) == [[0.75, 0.75]]
    assert "nothing trains on" in page.locator('[data-key="reward of judge"]').text_content()
    draw_own(page)


def test_prompts_whose_samples_score_alike_are_drawn_where_there_are_any(page, tmp_path):
    contents = [
        run_content(
            synthetic_run(tmp_path / name, [line | {"zero_std_ratio": ratio} for line in lines_of(3)]), tmp_path / name
        )
        for name, ratio in (("some", 0.25), ("none", 0.0))
    ]
    for content, charts in zip(contents, (1, 0), strict=True):
        draw(page, content)
        assert plot(page, "alike").count() == charts
    draw_own(page)


def test_what_users_wrote_stays_text(page, page_file):
    assert page.evaluate("window.hacked") is None
    assert page.locator("#samples .prompt").first.inner_text() == NASTY
    assert page.locator("#comparison .prompt").first.inner_text() == NASTY
    assert page.locator("main b:not(.do b, .healthy b), main script, main img").count() == 0
    assert page.title() == f"{page_file.parent.name} · Flowgrove"


def test_the_slider_changes_the_pictures(page, page_file):
    tile = page.locator("#samples .tile > div").first
    slider, told = page.locator("#samples input[type=range]"), page.locator("#samples output")
    seen = set()
    for place, name in ((2, "After 24 iterations"), (1, "After 12 iterations"), (0, "Base model")):
        slider.evaluate("(input, at) => { input.value = at; input.dispatchEvent(new Event('input')); }", place)
        assert told.inner_text().startswith(name)
        seen.add(tile.screenshot())
    assert len(seen) == 3
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert told.inner_text().startswith("After 12 iterations")
    slider.evaluate("input => { input.value = 2; input.dispatchEvent(new Event('input')); }")


def test_every_tile_shows_its_own_part_of_the_grid(page, page_file, tmp_path):
    """The colour in the middle of each tile is the one that the grid has there."""
    from PIL import Image

    from flowgrove.report.grids import load_grid

    grid = load_grid(page_file.parent / "samples" / "iteration_000024.png")
    tiles = page.locator("#samples .tile > div")
    assert tiles.count() == 4
    for place in range(4):
        tiles.nth(place).screenshot(path=tmp_path / "tile.png")
        shown = Image.open(tmp_path / "tile.png").convert("RGB")
        row, column = divmod(place, 2)
        for x, y in ((0.29, 0.31), (0.71, 0.69)):
            expected = grid.tiles[row, column][int(y * 8), int(x * 12)]
            found = shown.getpixel((int(x * shown.width), int(y * shown.height)))
            assert max(abs(int(a) - int(b)) for a, b in zip(found, expected, strict=True)) <= 4


def test_base_and_tuned_model_stand_beside_each_other_or_take_turns(page, page_file):
    panel = page.locator("#comparison")
    assert panel.locator(".side-name").all_inner_texts() == ["base model", "after 24 iterations"] * 2
    assert panel.locator(".tile").count() == 8
    seen = set()
    for value in ("before", "after"):
        panel.locator(f"[data-value={value}]").click()
        assert panel.locator(".tile").count() == 4
        assert panel.locator(f"[data-value={value}]").get_attribute("aria-pressed") == "true"
        seen.add(panel.locator(".tile > div").first.screenshot())
    assert len(seen) == 2
    panel.locator("[data-value=both]").click()
    assert panel.locator(".tile").count() == 8


def test_hovering_shows_the_numbers_of_all_curves(page, page_file):
    plot(page, "reward").scroll_into_view_if_needed()
    box = plot(page, "reward").locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = plot(page, "reward").locator(".hoverlayer")
    hover.locator("text").first.wait_for()
    text = hover.text_content()
    assert "iteration 12" in text
    assert "0.75 ± 0.1" in text
    assert "0.65 ± 0.05" in text


def test_a_click_on_the_legend_hides_a_curve_and_its_band(page, page_file):
    shown = "element => element._fullData.filter(trace => trace.visible === true).map(trace => trace.legendgroup)"
    reward = plot(page, "reward")
    assert reward.evaluate(shown).count("train0") == 3
    for visible, left in (("legendonly", 0), (True, 3)):
        reward.locator(".legendtoggle").first.click()
        until(partial(visibility, page), visible)
        assert reward.evaluate(shown).count("train0") == left
        assert reward.evaluate(shown).count("held0") == 3


COLOURS = """() => [
    getComputedStyle(document.body).backgroundColor,
    document.querySelector('[data-key=reward] .plot')._fullLayout.font.color,
]"""


def test_colours_follow_the_system_and_the_switch(page):
    light = page.evaluate(COLOURS)
    page.emulate_media(color_scheme="dark")
    until(lambda: page.evaluate(COLOURS)[1] != light[1], True)
    dark = page.evaluate(COLOURS)
    background = [sum(map(int, colours[0][4:-1].split(","))) for colours in (light, dark)]
    assert background[0] > 600
    assert background[1] < 150
    page.locator(".switches [data-value=light]").click()
    assert page.evaluate(COLOURS) == light
    assert page.evaluate("localStorage.getItem('flowgrove-theme')") == "light"
    page.emulate_media(color_scheme="light")
    page.locator(".switches [data-value=dark]").click()
    assert page.evaluate(COLOURS) == dark
    page.locator(".switches [data-value=auto]").click()
    assert page.evaluate(COLOURS) == light


def test_the_axis_can_be_time(page, page_file):
    page.locator(".switches [data-value=seconds]").click()
    data = plot(page, "reward").evaluate(
        "element => [element._fullLayout.xaxis.title.text, element.data[2].x.slice(0, 3)]"
    )
    assert data == ["seconds in stages", [0, 1.5, 3]]
    page.locator(".switches [data-value=iteration]").click()
    assert plot(page, "reward").evaluate("element => element._fullLayout.xaxis.title.text") == "iteration"


def test_a_phone_has_the_page_in_its_width_and_in_the_colours_that_were_chosen(visitor, page_file):
    page = visitor(
        page_file, {"flowgrove-theme": "dark"},
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme="light",
    )  # fmt: skip
    for width in (390, 600):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        beyond = page.evaluate(
            "() => [...document.querySelectorAll('main *:not(.scroll *, pre, pre *, svg *)')]"
            ".filter(each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML)"
        )
        assert beyond == []
    assert sum(map(int, page.evaluate(COLOURS)[0][4:-1].split(","))) < 150
    assert plot(page, "reward").evaluate("element => element._fullLayout.dragmode") is False  # fingers scroll
    assert visitor.told == []


def test_a_warning_stands_above_the_curves_and_at_its_own(page, tmp_path):
    lines = [line | {"clipped_low": 0.45} for line in lines_of(24)]
    recipe = synthetic_run(tmp_path / "run", lines)
    draw(page, run_content(recipe, tmp_path / "run"))
    assert "45% of the ratios lie below the clip range" in page.locator("#finding-clipped").inner_text()
    assert "What to do: Raise update.clip_range" in page.locator("#finding-clipped").inner_text()
    assert page.locator('[data-key="clipped"] .mark').get_attribute("href") == "#finding-clipped"
    assert page.locator(".mark").count() == 1
    assert page.locator("#samples, #comparison, #forest").count() == 0
    draw_own(page)


def test_several_runs_stand_beside_each_other(page, tmp_path):
    contents = [
        page_of(tmp_path / name / name, 12, update={"lr": lr})[1] for name, lr in (("one", 1e-4), ("two", 3e-4))
    ]
    draw(page, *contents)
    names = plot(page, "reward").evaluate(
        "element => element.data.filter(trace => trace.showlegend !== false).map(trace => trace.name)"
    )
    assert names == [f"{run} · {what} prompts" for run in ("one", "two") for what in ("training", "held-out")]
    rows = page.locator("#recipe tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert ["update.lr", "0.0001", "0.0003"] in rows
    assert all(len(set(row[1:])) == 2 for row in rows)
    assert page.locator("#samples h3").all_inner_texts() == ["one", "two"]
    draw_own(page)


def test_drawing_anew_keeps_what_the_reader_has_set(page, page_file):
    """As when a run that is watched goes on."""
    page.locator("#samples input[type=range]").evaluate(
        "input => { input.value = 0; input.dispatchEvent(new Event('input')); }"
    )
    page.locator('[data-key="ratio"] summary').click()
    page.locator("#comparison [data-value=after]").click()
    plot(page, "reward").locator(".legendtoggle").first.click()
    until(lambda: visibility(page), "legendonly")
    page.evaluate(
        """() => {
            const [run] = JSON.parse(document.getElementById('content').textContent).runs;
            run.iterations = 25;
            run.x.iteration.push(24);
            run.x.seconds.push(36);
            run.series.reward.push(0.9);
            window.flowgrove.render([run]);
        }"""
    )
    assert "25 of 24 iterations" in page.locator(".top").inner_text()
    assert page.locator("#samples output").inner_text().startswith("Base model")
    assert page.locator('[data-key="ratio"] details').get_attribute("open") is not None
    assert page.locator("#comparison .tile").count() == 4
    assert visibility(page) == "legendonly"
    assert plot(page, "reward").evaluate("element => element.data[2].x.length") == 25


def test_a_page_of_1000_iterations_and_40_grids_is_bounded_and_drawn_within_seconds(visitor, tmp_path):
    folder = tmp_path / "run"
    recipe = synthetic_run(folder, lines_of(1000, every=25), run={"iterations": 1000}, rollout={"steps": 25})
    grids_in(folder, *((done, [f"prompt {n}" for n in range(8)], 2) for done in range(0, 1000, 25)), size=(96, 96))
    content = run_content(recipe, folder)
    text = report_page([content], "run")
    assert len(text.encode()) < 12e6
    assert len(json.dumps({key: value for key, value in content.items() if key != "pictures"})) < 1e6
    assert len(content["pictures"]["grids"]) == 24
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    page = visitor(tmp_path / "report.html")
    seconds = page.evaluate("window.flowgrove.seconds")
    assert 0 < seconds < 60  # some 2 where nothing else runs
    assert page.evaluate("document.querySelector('[data-key=reward] .plot').data[2].x.length") == 500
    assert visitor.told == []
