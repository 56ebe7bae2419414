"""Hostile servers and Python functions as rewards: every one ends in finite scores, or in one line (issue 13)."""

import json
import random
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch

from flowgrove.rewards import endpoint
from hostile import NASTY, damaged, outcome
from reward_cases import pictures, rewards_of

FIRST, ALL = 40, 300
COUNT = 3
PROMPTS = ["a red cat", "", "$_$ \u2028 😀"]
ODD = (None, True, "1", "", [], [1], {}, 1e400, -1e308, float("nan"), 10**400, 0, -1, 0.5, 5, {"a": 1})
NUMBERS = (
    b"1",
    b"0.5",
    b"-0",
    b"NaN",
    b"Infinity",
    b"1e999",
    b"9" * 400,
    b"9" * 5000,
    b"null",
    b'"1"',
    b"true",
    b"[1]",
)


@pytest.fixture(autouse=True)
def no_waiting_and_no_proxy(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def answering(chunks, pause, hang):
    """A server that reads a little and sends `chunks`, whatever it was asked; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve():
        while not over.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection):
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            for chunk in chunks:
                connection.sendall(chunk)
                time.sleep(pause)
            if hang:
                over.wait(15)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(0.5)
            while connection.recv(1 << 16):  # or the answer is lost with what was not read
                pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()


def body(draw, chat):
    """What a server answers, right or nearly so."""
    numbers = [
        draw.choice((b"1", b"2.5", b"0", draw.choice(NUMBERS))) for _ in range(draw.choice((COUNT, COUNT, COUNT, 0)))
    ]
    long = "Final Score: " + "1" * 100_000 + "-1"
    said = draw.choice(("Final Score: 4", "final score: **4,5**", "final score: 1-5", long, draw.choice(NASTY)))
    right = b'{"scores": [' + b", ".join(numbers) + b"]}"
    if chat:
        right = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
    odd = json.dumps(
        draw.choice(({"scores": draw.choice(ODD)}, {"choices": draw.choice(ODD)}, draw.choice(ODD)))
    ).encode()
    deep = draw.choice((b"[", b'{"scores":')) * draw.choice((10, 50_000))
    wrong = draw.choice((odd, deep, damaged(draw, right), draw.randbytes(50), b" " * (1 << 18)))
    return draw.choice((right, right, wrong))


def head(draw, size):
    """What stands before an answer of `size` bytes, right or nearly so."""
    status = draw.choice((200, 200, 200, 204, 301, 404, 429, 500, 999, 100, -1))
    length = draw.choice((size, size, size + 5, 1, -1, 10**30, "x"))
    coding = draw.choice(("", "", "Transfer-Encoding: chunked\r\n", "Content-Encoding: gzip\r\n"))
    extra = draw.choice(("", "", "X: \0\r\n", "X" * 70_000 + ": 1\r\n", "Location: /\r\n"))
    wrong = f"HTTP/1.1 {status} OK\r\nContent-Length: {length}\r\n{coding}{extra}\r\n".encode()
    right = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode()
    return draw.choice((right, right, wrong, damaged(draw, wrong), b""))


def answer(draw, chat):
    """(chunks, pause between them, whether it hangs at the end) of an HTTP answer."""
    content = body(draw, chat)
    whole = head(draw, len(content)) + draw.choice((content, content, content, b""))
    if draw.random() < 0.1:
        return [whole[at : at + 1] for at in range(min(len(whole), 400))], 0.02, False
    return [whole], 0, draw.random() < 0.1


def served(number):
    draw = random.Random(f"answers/{number}")
    chat = draw.random() < 0.4
    chunks, pause, hang = answer(draw, chat)
    with answering(chunks, pause, hang) as url:
        entry = {"name": "unified_reward"} if chat else {"name": "http", "max_answer_mb": 0.1}
        return scored({**entry, "url": url, "timeout": 0.3, "retries": draw.choice((0, 0, 1))})


RETURNS = (
    "None", "'abc'", "b'abc'", "prompts", "pictures", "[]", "[1.0]", "[1, 2, 3]", "(1, 2, 3)", "{1, 2, 3}", "1.0",
    "{0: 1, 1: 2, 2: 3}", "float('nan')", "[float('nan')] * 3", "[float('inf'), 1, 2]", "[10**400] * 3", "[None] * 3",
    "[True, False, True]", "['1'] * 3", "[[1]] * 3", "[[1], [2, 3], []]", "[1j] * 3", "range(3)", "range(10**15)",
    "(x for x in range(3))", "iter([1, 2, 3])", "map(len, prompts)", "lambda: 1", "object()", "type", "torch",
    "torch.ones(3)", "torch.ones(3, 1)", "torch.ones(1, 3)", "torch.ones(4)", "torch.ones(())", "torch.ones(0)",
    "torch.ones(3).to_sparse()", "torch.ones(3, device='meta')", "torch.ones(3, dtype=torch.int8)",
    "torch.ones(3, dtype=torch.bool)", "torch.ones(3, dtype=torch.complex64)", "torch.nn.Parameter(torch.ones(3))",
    "torch.ones(3, requires_grad=True) * 2", "torch.full((3,), 1e39, dtype=torch.float64)",
    "torch.full((3,), torch.nan)", "torch.ones(1).expand(3)", "torch.ones(10**12)",
    "torch.linalg.inv(torch.zeros(3, 3))", "torch.manual_seed(0)", "numpy.ones(3)", "numpy.ones((3, 1))",
    "numpy.array(['a', 'b', 'c'])", "numpy.array([None, 1, 2])", "[Odd()] * 3", "numpy.ones(3, numpy.float16)",
    "numpy.ones(3)[::-1]", "numpy.ma.masked_all(3)", "numpy.array([1, 2, 3], 'M8[s]')", "[torch.ones(())] * 3",
    "[torch.ones(2)] * 3", "[numpy.float64(1)] * 3", "Odd()", "exit()", "quit(3)", "os._exit(0)", "os.abort()",
    "sys.exit('bye')", "1 / 0", "score(pictures, prompts)", "prompts.clear()", "pictures.zero_().mean((1, 2, 3))",
    "pictures[9]", "open('/nowhere')", "undefined", "__import__('nowhere')", "exec('x = (')",
    "throw(KeyError(pictures))", "throw(SystemExit)", "throw(GeneratorExit)", "throw(StopIteration)",
    "throw(MemoryError)", "throw(Mute)", "throw(RuntimeError('\\ud800\\n\\x1b[2J'))", "throw(Warning)",
    "throw(ExceptionGroup('a', [ValueError()]))", "throw(UnicodeDecodeError('a', b'', 0, 1, 'b'))",
)  # fmt: skip
FILE = """
import os, sys, numpy, torch
class Odd:
    def __len__(self): return 3
    def __getitem__(self, at): raise OSError("odd")
    def __float__(self): raise SystemExit
class Mute(BaseException):
    def __str__(self): raise ValueError
def throw(error): raise error
def score(pictures, prompts):
    return {}
"""


def scored(entry):
    batch, prompts = pictures(COUNT, 8, 8), list(PROMPTS)
    kept = batch.clone()
    scores = rewards_of(entry)(batch, prompts)
    assert scores.shape == (COUNT, 1)
    assert bool(torch.isfinite(scores).all())
    assert torch.equal(batch, kept)
    assert prompts == PROMPTS
    return scores


REST = pytest.param(range(FIRST, ALL), marks=pytest.mark.long)


@pytest.mark.parametrize("numbers", [range(FIRST), REST], ids=["sample", "all"])
def test_hostile_servers_end_in_scores_or_in_one_line(numbers):
    good = sum(outcome(f"answer {number}", served, number)[1] is None for number in numbers)
    assert 0 < good < len(numbers)


def test_hostile_functions_end_in_scores_or_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWGROVE_ALLOW_PYTHON", "1")
    good = 0
    for number, returned in enumerate(RETURNS):
        path = tmp_path / f"r{number}.py"
        path.write_text(FILE.format(returned))
        good += outcome(returned, scored, {"name": "python", "file": str(path)})[1] is None
    assert 0 < good < len(RETURNS)


def test_hostile_files_of_functions_end_in_scores_or_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWGROVE_ALLOW_PYTHON", "1")
    draw, path = random.Random("files"), tmp_path / "r.py"
    whole = FILE.format("[1.0] * len(prompts)").encode()
    for number in range(60):
        path.write_bytes(damaged(draw, whole))
        outcome(f"file {number}", scored, {"name": "python", "file": str(path)})
