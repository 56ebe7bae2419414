"""`flowgrove watch`: the report of runs while they train, served to browsers on this machine and to nobody else."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
from urllib.parse import urlsplit

import pytest

from engine_cases import refuse
from flowgrove.report.content import run_content
from flowgrove.report.watching import serving
from report_cases import LINE, grids_in, synthetic_run
from subprocesses import FLOWGROVE, environment

NASTY = "a <b>square</b> <script>window.hacked = 1</script>"


def lines_of(count, **more):
    return [LINE | {"iteration": number, "eval_reward": 0.5 + number / 100} | more for number in range(count)]


def add(folder, *lines):
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def ask(server, path, method="GET", **headers):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def told(server):
    """The contents that a page gets."""
    return json.loads(ask(server, "/data.json")[2])


@pytest.fixture
def run(tmp_path):
    """A run that has trained two of its four iterations; (folder, recipe)."""
    recipe = synthetic_run(tmp_path / "run", lines_of(2), run={"iterations": 4})
    grids_in(tmp_path / "run", (0, [NASTY, "a blue square"], 2))
    return tmp_path / "run", recipe


def test_a_page_gets_what_the_report_shows(run):
    folder, recipe = run
    with serving([folder], 0) as server:
        (content,) = told(server)
        expected = run_content(recipe, folder, lambda done, picture, kind: picture.hex())
        for shown, grid in zip(content["pictures"]["grids"], expected["pictures"]["grids"], strict=True):
            status, headers, body = ask(server, shown["src"])
            assert (status, headers["Content-Type"], body.hex()) == (200, "image/png", grid["src"])
            shown["src"] = grid["src"]
        assert content == expected
        status, headers, body = ask(server, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert b"<script>window.hacked" not in body


def test_what_a_run_writes_is_told_and_nothing_else_is_sent_twice(run):
    folder, _ = run
    with serving([folder], 0) as server:
        tag = ask(server, "/data.json")[1]["ETag"]
        assert ask(server, "/data.json", **{"If-None-Match": tag})[::2] == (304, b"")
        add(folder, LINE | {"iteration": 2})
        status, headers, body = ask(server, "/data.json", **{"If-None-Match": tag})
        assert status == 200
        assert headers["ETag"] != tag
        assert json.loads(body)[0]["iterations"] == 3
        grids_in(folder, (3, [NASTY, "a blue square"], 2))
        assert [grid["done"] for grid in told(server)[0]["pictures"]["grids"]] == [0, 3]
        first = told(server)[0]["pictures"]["grids"][0]["src"]
        (folder / "samples" / "iteration_000000.png").unlink()
        told(server)
        assert ask(server, first)[0] == 404  # what is shown no more is kept no more


def test_a_grid_that_has_not_changed_is_not_read_again(run, monkeypatch):
    folder, _ = run
    with serving([folder], 0) as server:
        first = told(server)[0]["pictures"]
        monkeypatch.setattr("flowgrove.report.pictures.load_grid", lambda path: pytest.fail(f"{path} is read again"))
        add(folder, LINE | {"iteration": 2})
        assert told(server)[0]["pictures"] == first


def test_what_goes_wrong_with_one_run_is_told_and_the_others_are_shown(run, tmp_path, monkeypatch):
    synthetic_run(tmp_path / "other", lines_of(3))
    from flowgrove.report import watching

    real = watching.run_content

    def failing(recipe, folder, address):
        if folder == run[0]:
            raise ValueError("a forest has\ngone")
        return real(recipe, folder, address)

    monkeypatch.setattr(watching, "run_content", failing)
    with serving([run[0], tmp_path / "other"], 0) as server:
        first, second = told(server)
    assert first["error"] == "a forest has gone"
    assert second["iterations"] == 3


def test_runs_stand_beside_each_other(run, tmp_path):
    other = synthetic_run(tmp_path / "other", lines_of(3), update={"lr": 0.5})
    with serving([run[0], tmp_path / "other"], 0) as server:
        first, second = told(server)
    assert [first["name"], second["name"]] == ["run", "other"]
    differ = {key for key, value in first["recipe"]["settings"].items() if second["recipe"]["settings"][key] != value}
    assert "update.lr" in differ
    assert float(second["recipe"]["settings"]["update.lr"]) == other.update.lr == 0.5


def test_a_run_may_begin_later_or_be_unreadable_for_a_while(tmp_path, run):
    later = tmp_path / "later"
    later.mkdir()
    with serving([later, run[0]], 0) as server:
        waiting, content = told(server)
        assert "recipe.yaml" in waiting["error"]
        assert (waiting["iterations"], content["iterations"]) == (0, 2)
        (later / "recipe.yaml").write_text("model: [", encoding="utf-8")
        assert "\n" not in told(server)[0]["error"]
        shutil.copy(run[0] / "recipe.yaml", later)
        assert "error" not in told(server)[0]
        add(later, LINE)
        assert told(server)[0]["iterations"] == 1
        shutil.rmtree(later)
        assert "error" in told(server)[0]


def test_only_this_machine_is_answered_and_only_under_its_own_name(run):
    with serving([run[0]], 0) as server:
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", "localhost:1"):  # forwarded
            assert ask(server, "/data.json", Host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", f"localhost.evil.example:{port}", ""):
            status, _, body = ask(server, "/data.json", Host=host)
            assert (status, b"localhost" in body, b"iterations" in body) == (403, True, False), host


@pytest.mark.parametrize(
    "path", ["/recipe.yaml", "/../run/recipe.yaml", "/%2e%2e/recipe.yaml", "//etc/passwd", "/pictures/0/"]
)
def test_files_of_the_machine_are_not_served(run, path):
    with serving([run[0]], 0) as server:
        assert ask(server, path)[::2] == (404, b"")


def test_other_methods_change_nothing(run):
    with serving([run[0]], 0) as server:
        status, headers, body = ask(server, "/data.json", "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 100
        assert ask(server, "/data.json", "POST")[0] == 501


def test_mistakes_are_one_line(run, tmp_path):
    assert str(tmp_path / "none") in refuse("watch", tmp_path / "none")
    assert "named twice" in refuse("watch", run[0], f"{run[0]}/../run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in refuse("watch", run[0], "--port", taken.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_command_says_where_and_ends_quietly(run, number):
    command = [*FLOWGROVE, "watch", str(run[0]), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert str(run[0]) in process.stderr.readline()
            process.send_signal(number)
            assert (process.wait(60), process.stderr.read()) == (0, "")
        finally:
            process.kill()


# In a browser


@pytest.fixture
def visit():
    """Opens a page; at the end it may not have told of an error, but that a server has gone."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    said = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))

        def opened(server):
            page.on(
                "request",
                lambda request: (
                    None if request.url.startswith((server.url, "blob:", "data:")) else said.append(request.url)
                ),
            )
            page.goto(server.url)
            page.wait_for_selector("#live:not(:empty)")
            return page

        yield opened
        browser.close()
    assert [text for text in said if "ERR_CONNECTION_REFUSED" not in text] == []


@pytest.mark.long
def test_the_page_updates_by_itself_and_keeps_what_was_chosen(run, visit):
    folder, _ = run
    with serving([folder], 0) as server:
        page = visit(server)
        assert "2 of 4" in page.inner_text("header.top")
        page.click('[data-value="seconds"]')
        curve = '[data-key="reward"] .plot'
        points = f"document.querySelector('{curve}').data.at(-1).x.length"
        before = page.evaluate(points)
        add(folder, LINE | {"iteration": 2, "eval_reward": 0.9}, LINE | {"iteration": 3, "eval_reward": 0.95})
        page.wait_for_selector('header.top:has-text("4 of 4")')
        assert page.evaluate(points) == before + 2
        assert page.get_attribute('[data-value="seconds"]', "aria-pressed") == "true"
        assert page.inner_text("#live").startswith("Live")
        assert NASTY in page.inner_text("#samples")
        assert page.evaluate("window.hacked") is None
    page.wait_for_selector("#live.lost")
    assert "4 of 4" in page.inner_text("header.top")


def test_several_runs_share_curves_and_show_in_which_keys_they_differ(run, tmp_path, visit):
    synthetic_run(tmp_path / "other", lines_of(3), update={"lr": 0.5})
    later = tmp_path / "later"
    later.mkdir()
    with serving([run[0], tmp_path / "other", later], 0) as server:
        page = visit(server)
        names = page.evaluate(
            "document.querySelector('[data-key=\"ratio\"] .plot').data.map((trace) => trace.name).filter(Boolean)"
        )
        assert {"run", "other"} <= set(names)
        assert "later: not begun" in page.inner_text("header.top")
        keys = page.inner_text("#recipe table")
        assert "update.lr" in keys
        assert "0.5" in keys
        assert "rollout.steps" not in keys
