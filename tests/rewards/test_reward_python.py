"""The python reward: only with permission, whatever its function returns, and one line that says where it failed."""

import os

import pytest
import torch

from engine_cases import refuse, tiny_recipe
from planner_cases import user_error
from reward_cases import pictures, reward_of, rewards_of

PROMPTS = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setenv("FLOWGROVE_ALLOW_PYTHON", "1")


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "mine.py").write_text(text)
        return str(tmp_path / "mine.py")

    return write


RETURNS = [
    "pictures.mean((1, 2, 3))",
    "pictures.mean((1, 2, 3)).tolist()",
    "pictures.mean((1, 2, 3)).double().numpy()",
    "tuple(p.mean() for p in pictures)",
]


@pytest.mark.parametrize("returned", RETURNS)
def test_the_function_scores_tensors_arrays_and_lists(written, returned):
    path = written(f"def score(pictures, prompts):\n    return {returned}\n")
    batch = pictures(3, 8, 8)
    scores = rewards_of({"name": "python", "file": path})(batch, PROMPTS)
    torch.testing.assert_close(scores[:, 0], batch.mean((1, 2, 3)).double(), atol=1e-6, rtol=0)


def test_the_function_is_chosen_by_name_and_gets_the_prompts(written):
    path = written(
        "from math import nan\ndef other(pictures, prompts):\n    return [ord(p) for p in prompts]\ndef "
        "score(pictures, prompts):\n    return [nan]\n"
    )
    assert reward_of(name="python", file=path, function="other")(pictures(3, 8, 8), PROMPTS).tolist() == [97, 98, 99]


@pytest.mark.parametrize("video", [False, True])
def test_videos_come_frame_by_frame_or_whole(written, video):
    path = written("def score(pictures, prompts):\n    return [p.ndim + p.mean() for p in pictures]\n")
    videos = pictures(6, 8, 8).view(2, 3, 3, 8, 8)
    scores = rewards_of({"name": "python", "file": path, "video": video})(videos, PROMPTS[:2])
    torch.testing.assert_close(
        scores[:, 0], (4 if video else 3) + videos.mean((1, 2, 3, 4)).double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("value", [None, "0", "", "yes"])
def test_without_permission_nothing_runs(written, monkeypatch, tmp_path, value):
    path = written(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(pictures, prompts):\n    return []\n")
    monkeypatch.delenv("FLOWGROVE_ALLOW_PYTHON") if value is None else monkeypatch.setenv(
        "FLOWGROVE_ALLOW_PYTHON", value
    )
    text = user_error(rewards_of, {"name": "python", "file": path})
    assert all(part in text for part in (path, "--allow-python", "FLOWGROVE_ALLOW_PYTHON=1"))
    assert not (tmp_path / "ran").exists()


FAULTY = [
    ("def score(pictures, prompts):\n    x = 1\n    return 1 / 0\n", ["line 3", "ZeroDivisionError"]),
    ("def score(pictures):\n    return []\n", ["TypeError"]),
    ("def score(pictures, prompts):\n    return 'well'\n", ["TypeError"]),
    ("def score(pictures, prompts):\n    raise ValueError('two\\nlines')\n", ["line 2", "two lines"]),
]


@pytest.mark.parametrize(("text", "named"), FAULTY)
def test_a_function_that_fails_is_one_line_that_says_where(written, text, named):
    path = written(text)
    message = user_error(rewards_of({"name": "python", "file": path}), pictures(3, 8, 8), PROMPTS)
    assert all(part in message for part in (path, *named))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("def score(:\n", ["line 1", "SyntaxError"]),
        ("\nimport no_such_module_anywhere\n", ["line 2", "no_such_module_anywhere"]),
        ("def scores(pictures, prompts):\n    return []\n", ["score", "scores"]),
        ("score = 3\n", ["score"]),
        ("", ["score"]),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(written, text, named):
    path = written(text)
    message = user_error(rewards_of, {"name": "python", "file": path})
    assert all(part in message for part in (path, *named))


@pytest.mark.parametrize("name", ["absent.py", "folder.py", "notes.txt"])
def test_a_path_that_is_no_python_file_is_one_line(tmp_path, name):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "notes.txt").write_text("score")
    assert str(tmp_path / name) in user_error(rewards_of, {"name": "python", "file": str(tmp_path / name)})


@pytest.mark.parametrize("returned", ["[1.0, 2.0]", "[1.0, float('nan'), 2.0]", "[[1.0], [2.0], [3.0]]", "1.0"])
def test_scores_of_another_number_or_not_finite_are_refused(written, returned):
    path = written(f"def score(pictures, prompts):\n    return {returned}\n")
    assert "python" in user_error(rewards_of({"name": "python", "file": path}), pictures(3, 8, 8), PROMPTS)


WAYS_OUT = [
    ("import sys; sys.exit()", "SystemExit"),
    ("raise SystemExit(0)", "SystemExit"),
    ("exit(3)", "SystemExit"),
    ("import os; os._exit(0)", "os._exit"),
    ("import os; os.abort()", "os.abort"),
    ("raise GeneratorExit", "GeneratorExit"),
    ("raise type('Mute', (BaseException,), {'__str__': lambda self: 1 / 0})", "Mute"),
    ("return score(pictures, prompts)", "RecursionError"),
    ("return None", "NoneType"),
    ("return 'abc'", "str"),
    ("return ['1', '2', '3']", "str"),
    ("return pictures.mean((1, 2, 3))[:, None]", "shape [3, 1]"),
    ("return [1.0]", "shape [1]"),
    ("return range(10**12)", "shape [1000000000000]"),
    ("return (x for x in prompts)", "generator"),
    ("return {p: 1.0 for p in prompts}", "dict"),
    ("import torch; return torch.tensor([1j, 2, 3])", "complex"),
    ("import torch; return torch.ones(3, device='meta')", ""),
    ("return [1.0, float('nan'), float('inf')]", "2 of 3"),
]


@pytest.mark.parametrize(("line", "named"), WAYS_OUT, ids=lambda value: value[:40])
def test_every_way_out_but_scores_is_one_line(written, line, named):
    before = os._exit, os.abort
    path = written(f"def score(pictures, prompts):\n    {line}\n")
    message = user_error(rewards_of({"name": "python", "file": path}), pictures(3, 8, 8), PROMPTS)
    assert named in message
    assert "reward python" in message
    assert (os._exit, os.abort) == before


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise KeyError"])
def test_a_file_that_leaves_while_it_is_read_is_one_line(written, line):
    path = written(f"{line}\ndef score(pictures, prompts):\n    return [1.0] * len(prompts)\n")
    assert "line 1" in user_error(rewards_of, {"name": "python", "file": path})


def test_what_a_function_changes_is_its_own(written):
    path = written(
        "def score(pictures, prompts):\n    pictures.zero_(); prompts.clear(); return [0.0] * len(pictures)\n"
    )
    batch, prompts = pictures(3, 8, 8), list(PROMPTS)
    kept = batch.clone()
    rewards = rewards_of({"name": "python", "file": path}, {"name": "jpeg_size"})
    alone = rewards_of({"name": "jpeg_size"})(kept, prompts)
    torch.testing.assert_close(rewards(batch, prompts)[:, 1:], alone, atol=0, rtol=0)
    assert torch.equal(batch, kept)
    assert prompts == PROMPTS


def test_a_process_that_the_function_forks_may_leave(written):
    path = written(
        "import os\ndef score(pictures, prompts):\n    child = os.fork()\n    if child == 0:\n        os._exit(7)\n"
        "    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] * len(prompts)\n"
    )
    assert rewards_of({"name": "python", "file": path})(pictures(3, 8, 8), PROMPTS)[:, 0].tolist() == [7.0] * 3


@pytest.mark.parametrize("line", ["import sys; sys.exit()", "import os; os._exit(0)"])
def test_a_function_that_leaves_does_not_end_a_run_in_silence(written, tmp_path, line):
    path = written(f"def score(pictures, prompts):\n    {line}\n")
    recipe = tiny_recipe(tmp_path / "recipe", reward=[{"name": "python", "file": path}])
    assert "mine.py, line 2: SystemExit" in refuse("train", recipe, "--allow-python", "--out", tmp_path / "run")
