"""The forest as a browser draws it: every edge, its colour and its numbers, by mouse, finger and keyboard."""

import json
import shutil
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest

from flowgrove.report.forests import ForestEdges, ForestNumbers, ForestStep, PromptForest, forest_content, save_forest

NASTY = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script> & </script> \u202e{{7*7}}"
TEMPLATES = files("flowgrove.report") / "templates"
STYLE, SCRIPT = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("forest.css", "forest.js"))
PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>%s :root { --page: #fff; --ink: #111; }
@media (prefers-color-scheme: dark) { :root { --page: #111; --ink: #eee; } }
body { background: var(--page); } main { max-width: 60rem; margin: auto; }</style>
<main><section id="forest"></section></main><script>%s</script>
<script>const content = %s; flowgrove.drawForests(document.getElementById("forest"), content)</script>"""


def forest_of(iteration, fanouts=(2, 1, 2, 1, 1), noise=(0, 1, 2), roots=1, untrained=None, prompt=NASTY):
    """A forest of made-up numbers with pictures of leaves and of the states at splits; untrained: (step, child) →
    why.
    """
    random, steps, edges, nodes, untrained = np.random.default_rng(iteration), [], {}, roots, untrained or {}
    for index, fanout in enumerate(fanouts):
        children, noisy = nodes * fanout, index in noise
        steps.append(
            ForestStep(
                sigma=1 - index / len(fanouts), sigma_next=1 - (index + 1) / len(fanouts), solver="flow_sde",
                stochastic=noisy, window=index == 1, trained=noisy, fanout=fanout, nodes_in=nodes, nodes_out=children,
            )
        )  # fmt: skip
        if noisy:
            advantage = random.normal(size=children)
            edges[index] = ForestEdges(
                parent=[child // fanout for child in range(children)],
                advantage=[
                    None if untrained.get((index, child)) == "depth" else a for child, a in enumerate(advantage)
                ],
                logp=random.normal(size=children).tolist(),
                weight=[0.0 if (index, child) in untrained else 0.125 for child in range(children)],
                update=[child * 2 // children for child in range(children)],
                untrained=[untrained.get((index, child)) for child in range(children)],
            )
        nodes = children
    scores = random.random((nodes, 2))
    numbers = ForestNumbers(
        iteration=iteration, prompt=prompt, prompt_number=0, updates=2, rewards=[("shapes", 1.0), ("<i>tidy</i>", 0.5)],
        steps=steps, edges=edges, scores=scores.tolist(), totals=(scores @ [1.0, 0.5]).tolist(),
    )  # fmt: skip
    shown = [(len(steps), leaf) for leaf in range(nodes)]
    shown += [(at, node) for at, step in enumerate(steps) if step.fanout > 1 for node in range(step.nodes_in)]
    return PromptForest(numbers, {place: random.integers(0, 255, (16, 24, 3), dtype=np.uint8) for place in shown})


UNTRAINED = {(1, 1): "extreme", (2, 0): "step_fraction", (2, 2): "extreme", (2, 3): "depth"}
TREE = forest_of(7, untrained=UNTRAINED)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the path")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def drawn(browser, tmp_path):
    """Opens a page with these forests; whatever its console says fails the test."""
    said, pages = [], []

    def opened(*forests, **options):
        for forest in forests:
            save_forest(tmp_path, forest)
        content = json.dumps(forest_content(tmp_path)).replace("<", "\\u003c")
        (tmp_path / "page.html").write_text(PAGE % (STYLE, SCRIPT, content), encoding="utf-8")
        page = browser.new_page(**{"viewport": {"width": 1100, "height": 900}, **options})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        pages.append(page)
        return page

    yield opened
    assert said == []
    for page in pages:
        assert page.title() != "run"
        page.close()


def edge_of(page, forest, step, child):
    """The drawn item at the end of an edge with noise, found through its label."""
    leaf = step + 1 == len(forest.numbers.steps)
    return page.locator(f'.item[aria-label^="{"Leaf" if leaf else "Node"} {child}, step {step}"]')


def note_of(page):
    """The numbers that are shown, by their names."""
    note = page.locator(".forest-note")
    assert note.is_visible()
    return dict(zip(note.locator("dt").all_inner_texts(), note.locator("dd").all_inner_texts(), strict=True))


def four(value):
    """As the page writes numbers: four digits of five."""
    text = f"{float(format(float(format(value, '.5g')), '.4g')):.10f}".rstrip("0").rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}")


def test_every_edge_is_drawn_and_those_that_do_not_train_are_dashed(drawn):
    page = drawn(TREE)
    tree = page.locator(".forest-tree")
    noisy = [why for edges in TREE.numbers.edges.values() for why in edges.untrained]
    assert tree.locator(".edge.noise").count() == len(noisy) == 2 + 2 + 4
    assert tree.locator(".edge:not(.noise)").count() == 4  # two steps without noise are one line
    assert tree.locator(".edge.untrained").count() == sum(why is not None for why in noisy) == 4
    dashes = tree.locator(".edge.noise").evaluate_all(
        "all => all.map((each) => getComputedStyle(each).strokeDasharray)"
    )
    assert sum(each != "none" for each in dashes) == 4
    assert tree.locator("image").count() == len(TREE.pictures)
    assert page.locator(".forest-axis text").all_text_contents()[:4] == ["step 0", "split × 2", "step 1", "window"]
    assert "4 of 8 edges with noise train" in page.locator(".forest-facts").inner_text()
    assert "in 13 passes of the model instead of 20" in page.locator(".forest-facts").inner_text()


CHANNELS = """all => all.map((each) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const { stroke, strokeWidth } = getComputedStyle(each);
  canvas.fillStyle = stroke;
  canvas.fillRect(0, 0, 1, 1);
  return [each.dataset.advantage, parseFloat(strokeWidth), ...canvas.getImageData(0, 0, 1, 1).data];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_tell_the_sign_and_widths_the_size_of_an_advantage(drawn, scheme):
    page = drawn(TREE, color_scheme=scheme)
    found = page.locator(".forest-tree .edge.noise").evaluate_all(CHANNELS)
    known = [
        (float(advantage), width, red - blue) for advantage, width, red, _, blue, _ in found if advantage != "null"
    ]
    assert len(known) == 7
    neutral = next(red - blue for advantage, _, red, _, blue, _ in found if advantage == "null")
    assert all((warmth > neutral) == (advantage < 0) for advantage, _, warmth in known)
    widths = [width for _, width, _ in sorted(known, key=lambda each: abs(each[0]))]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    paper = page.evaluate("getComputedStyle(document.querySelector('.forest-axis')).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(17, 17, 17)")


def test_a_pointer_shows_the_numbers_of_an_edge(drawn):
    page, edges = drawn(TREE), TREE.numbers.edges[2]
    edge_of(page, TREE, 2, 1).locator("circle").hover()
    found = note_of(page)
    assert found["σ"] == "0.6 → 0.4"
    assert found["advantage"] == four(edges.advantage[1])
    assert found["log-probability"] == four(edges.logp[1])
    assert (found["trains in"], found["weight"]) == ("update 1 of 2", "0.125")
    edge_of(page, TREE, 2, 2).locator("circle").hover()
    assert note_of(page)["trains"] == "no: pruned, as no best or worst picture follows"
    edge_of(page, TREE, 2, 3).locator("circle").hover()
    assert note_of(page)["advantage"] == "not known"
    assert "depths are pruned" in note_of(page)["trains"]
    page.mouse.move(5, 5)
    assert not page.locator(".forest-note").is_visible()


def test_a_leaf_shows_its_rewards_and_its_picture(drawn):
    page, numbers = drawn(TREE), TREE.numbers
    page.locator('.item[aria-label^="Leaf 2"]').locator(".frame").hover()
    found = note_of(page)
    assert found["shapes"] == four(numbers.scores[2][0])
    assert found["<i>tidy</i> × 0.5"] == four(numbers.scores[2][1])
    assert found["weighted sum"] == four(numbers.totals[2])
    assert found["rank"] == f"{sorted(numbers.totals, reverse=True).index(numbers.totals[2]) + 1} of 4"
    assert page.locator(".forest-note image").get_attribute("href").startswith("data:image/png;base64,")
    assert page.locator(".forest-box .lit").count() == 1 + 4  # its way from the start


def test_the_keyboard_goes_from_node_to_node(drawn):
    page = drawn(TREE)
    page.keyboard.press("Tab")
    told = [page.locator(".forest-note b").inner_text()]
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
        told.append(page.locator(".forest-note b").inner_text())
    expected = [
        "Start 0",
        "Node 0, step 0",
        "Node 1, step 0",
        "Node 1, step 1",
        "Node 2, step 2",
        "Node 3, step 2",
        "Node 1, step 1",
    ]
    assert [text.removesuffix(", clean estimate") for text in told] == expected
    page.keyboard.press("Escape")
    assert not page.locator(".forest-note").is_visible()


def test_prompts_and_names_stay_text(drawn):
    page = drawn(TREE)
    assert page.locator(".forest-prompt").text_content() == f"“{NASTY}”"
    assert page.locator("#forest script, #forest i, .forest-prompt *").count() == 0


def test_a_choice_of_the_iteration_stands_above_several_forests(drawn):
    page = drawn(TREE, forest_of(9, prompt="the last"))
    assert page.locator(".forest-prompt").inner_text() == "“the last”"
    assert page.locator(".forest-tree .edge.untrained").count() == 0
    page.locator("select").select_option(label="7")
    assert page.locator(".forest-tree .edge.untrained").count() == 4
    page.evaluate("flowgrove.drawForests(document.getElementById('forest'), content)")
    assert page.locator(".forest-tree .edge.untrained").count() == 4  # the same content leaves the choice


def test_a_phone_shows_numbers_at_a_touch_and_scrolls_the_tree_alone(drawn):
    page = drawn(forest_of(1), viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.querySelector('.forest-box').scrollWidth") > 360
    page.locator('.item[aria-label^="Start 0"]').locator(".frame").tap()
    assert "their mean reward" in note_of(page)
    place = page.locator(".forest-note").bounding_box()
    assert place["x"] >= 0
    assert place["x"] + place["width"] <= 360
    page.locator(".forest-prompt").tap()
    assert not page.locator(".forest-note").is_visible()


@pytest.mark.parametrize("roots", [1, 64])
def test_sixty_four_leaves_have_their_own_pictures_and_rewards(drawn, roots):
    fanouts = (1, 1, 64 // roots, 1, 1)  # a window, with the start shared or not
    page = drawn(forest_of(3, fanouts, noise=(2, 3), roots=roots))
    tree = page.locator(".forest-tree")
    assert tree.locator(".edge:not(.noise)").count() == roots + 64  # before the window, and after it
    assert tree.locator(".edge.noise").count() == 128
    boxes = tree.locator(".frame").evaluate_all("all => all.map((each) => each.getBoundingClientRect().toJSON())")
    leaves = sorted((box for box in boxes if box["x"] == max(other["x"] for other in boxes)), key=lambda box: box["y"])
    assert len(leaves) == 64
    assert all(box["height"] >= 24 for box in leaves)
    assert all(above["bottom"] <= below["top"] for above, below in pairwise(leaves))
    assert page.evaluate("document.documentElement.scrollWidth") <= 1100
