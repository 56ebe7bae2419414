"""The HTTP reward against a real server on loopback: right, slow, down, wrong, huge, and talking nonsense."""

import math
import socket
import threading
import time
import zlib

import pytest
import torch

from flowgrove.rewards import endpoint
from flowgrove.rewards.pixels import to_bytes
from planner_cases import user_error
from reward_cases import pictures, pixels_of, reward_of, rewards_of, serving

PROMPTS = [f"prompt {number}" for number in range(7)]
SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_waiting_and_no_proxy(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def brightness(handler, content, number):
    """The mean pixel of every picture or video, plus the number of its prompt."""
    sent = content.get("images") or content["videos"]
    means = [
        torch.stack([pixels_of(png).float() for png in ([one] if isinstance(one, str) else one)]).mean().item()
        for one in sent
    ]
    handler.reply(
        {
            "scores": [
                mean + 1000 * int(prompt.split()[1]) for mean, prompt in zip(means, content["prompts"], strict=True)
            ]
        }
    )


def ones(handler, content, number):
    handler.reply({"scores": [1] * len(content["prompts"])})


def refused(url, count=7, **options):
    """The one line of a call that must fail."""
    scorer = reward_of(name="http", url=url, **options)
    return user_error(scorer, pictures(count, 8, 8), PROMPTS[:count])


# A server that does what it should


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_picture_is_scored_for_its_own_prompt_in_order(batch_size):
    batch = pictures(7, 12, 20)
    with serving(brightness) as server:
        scores = reward_of(name="http", url=f"{server.url}/score", batch_size=batch_size)(batch, PROMPTS)
    assert scores.dtype == torch.float64
    wanted = to_bytes(batch).double().mean((1, 2, 3)) + 1000 * torch.arange(7)
    torch.testing.assert_close(scores, wanted, atol=1e-3, rtol=0)
    assert len(server.asked) == math.ceil(7 / batch_size)
    assert {path for path, *_ in server.asked} == {"/score"}
    assert all(
        set(content) == {"prompts", "images"} and len(content["images"]) <= batch_size for *_, content in server.asked
    )


def test_the_pictures_that_arrive_are_those_that_were_sent_to_the_bit():
    batch = pictures(3, 13, 7)
    with serving(ones) as server:
        reward_of(name="http", url=server.url)(batch, PROMPTS[:3])
    ((_, headers, content),) = server.asked
    assert torch.equal(torch.stack([pixels_of(png) for png in content["images"]]), to_bytes(batch))
    assert headers["Content-Type"] == "application/json"


def test_videos_are_sent_whole_when_asked_for():
    videos = pictures(6, 8, 10).view(2, 3, 3, 8, 10)
    with serving(brightness) as server:
        whole = rewards_of({"name": "http", "url": server.url, "video": True})(videos, PROMPTS[:2])
        framewise = rewards_of({"name": "http", "url": server.url})(videos, PROMPTS[:2])
    wanted = to_bytes(videos).double().mean((1, 2, 3, 4)) + 1000 * torch.arange(2)
    for scores in (whole, framewise):
        torch.testing.assert_close(scores[:, 0], wanted, atol=1e-3, rtol=0)
    (first, second) = (content for *_, content in server.asked)
    assert [len(video) for video in first["videos"]] == [3, 3]
    assert torch.equal(torch.stack([pixels_of(png) for png in first["videos"][1]]), to_bytes(videos)[1])
    assert (len(second["images"]), second["prompts"]) == (6, ["prompt 0"] * 3 + ["prompt 1"] * 3)


def test_a_video_reward_of_a_picture_model_is_refused():
    with serving(ones) as server:
        text = user_error(
            rewards_of({"name": "http", "url": server.url, "video": True}), pictures(2, 8, 8), PROMPTS[:2]
        )
    assert "video" in text
    assert server.asked == []


def test_requests_run_at_the_same_time_up_to_the_limit():
    meeting = threading.Barrier(3, timeout=10)  # passed only if three requests are there at once
    most, now, lock = [0], [0], threading.Lock()

    def together(handler, content, number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        meeting.wait()
        with lock:
            now[0] -= 1
        ones(handler, content, number)

    with serving(together) as server:
        scores = reward_of(name="http", url=server.url, batch_size=1, concurrency=3)(pictures(6, 8, 8), PROMPTS[:6])
    assert scores.tolist() == [1.0] * 6
    assert most == [3]


def test_a_key_comes_from_the_environment_and_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    with serving(ones) as server:
        reward_of(name="http", url=server.url, key_variable="MY_KEY")(pictures(1, 8, 8), PROMPTS[:1])
        reward_of(name="http", url=server.url)(pictures(1, 8, 8), PROMPTS[:1])
    with_key, without = (headers for _, headers, _ in server.asked)
    assert with_key["Authorization"] == f"Bearer {SECRET}"
    assert "Authorization" not in without


# Down


def test_a_server_that_is_down_is_one_line_after_all_tries():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
        text = refused(url, retries=2)
    assert all(part in text for part in ("http", url, "3 times", "start"))


def test_a_server_that_hangs_up_is_tried_again():
    def hang_up(handler, content, number):
        if number <= 2:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            ones(handler, content, number)

    with serving(hang_up) as server:
        assert reward_of(name="http", url=server.url, retries=2)(pictures(1, 8, 8), PROMPTS[:1]).tolist() == [1.0]
        assert len(server.asked) == 3
    with serving(hang_up) as server:
        assert server.url in refused(server.url, count=1, retries=1)
        assert len(server.asked) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_overload_and_failures_are_tried_again_after_growing_waits(status, monkeypatch):
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)

    def busy(handler, content, number):
        handler.reply({"error": "busy"}, status) if number <= 3 else ones(handler, content, number)

    with serving(busy) as server:
        assert reward_of(name="http", url=server.url, retries=3)(pictures(1, 8, 8), PROMPTS[:1]).tolist() == [1.0]
    assert waits == [0.01, 0.02, 0.04]
    with serving(busy) as server:
        text = refused(server.url, count=1, retries=2)
    assert all(part in text for part in (str(status), "busy", server.url, "3 times"))


# Slow


def test_a_server_that_never_answers_is_given_up_in_time():
    release = threading.Event()
    with serving(lambda handler, content, number: release.wait(20)) as server:
        start = time.monotonic()
        text = refused(server.url, count=1, timeout=0.3, retries=1)
        taken = time.monotonic() - start
        release.set()
    assert len(server.asked) == 2
    assert all(part in text for part in ("0.3 s", server.url))
    assert taken < 5


def test_a_server_that_drips_is_given_up_in_time():
    """Every byte comes in time, the answer does not."""

    def drip(handler, content, number):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    with serving(drip) as server:
        start = time.monotonic()
        text = refused(server.url, count=1, timeout=0.4, retries=0)
        taken = time.monotonic() - start
    assert "0.4 s" in text
    assert taken < 3


def test_a_server_that_drips_its_headers_is_given_up_in_time():
    def drip(handler, content, number):
        for letter in "HTTP/1.1 200 OK\r\n" + "X-Slow: 1\r\n" * 100:
            handler.wfile.write(letter.encode())
            time.sleep(0.02)

    with serving(drip) as server:
        start = time.monotonic()
        text = refused(server.url, count=1, timeout=0.4, retries=1)
        taken = time.monotonic() - start
    assert "0.4 s" in text
    assert "2 times" in text
    assert taken < 3


def test_a_slow_server_that_is_in_time_is_fine():
    def slow(handler, content, number):
        time.sleep(0.3)
        ones(handler, content, number)

    with serving(slow) as server:
        assert reward_of(name="http", url=server.url, timeout=20)(pictures(2, 8, 8), PROMPTS[:2]).tolist() == [1.0, 1.0]
    assert len(server.asked) == 1


# Wrong


@pytest.mark.parametrize("status", [204, 301, 400, 401, 404, 422])
def test_an_answer_that_will_not_change_is_not_asked_for_again(status):
    def wrong(handler, content, number):
        handler.reply(b"" if status == 204 else b"no such thing", status, Location="http://127.0.0.1:1/elsewhere")

    with serving(wrong) as server:
        text = refused(server.url, count=1, retries=5)
    assert len(server.asked) == 1
    assert str(status) in text
    assert status == 204 or "no such thing" in text


def test_the_first_error_stops_the_requests_that_wait():
    with serving(lambda handler, content, number: handler.reply(b"no", 400)) as server:
        scorer = reward_of(name="http", url=server.url, batch_size=1, concurrency=2)
        assert "400" in user_error(scorer, pictures(1, 8, 8).repeat(200, 1, 1, 1), ["prompt 0"] * 200)
    assert len(server.asked) <= 4


def test_a_key_that_the_server_repeats_is_not_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)

    def repeat(handler, content, number):
        handler.reply(f"bad key {handler.headers['Authorization']}".encode(), 401)

    with serving(repeat) as server:
        text = refused(server.url, count=1, key_variable="MY_KEY")
    assert "bad key" in text
    assert SECRET not in text


# Huge


@pytest.mark.parametrize("told", [True, False])
def test_an_answer_without_end_is_cut_off(told):
    """Whether the server says beforehand how much will come, or just goes on."""
    sent = [0]

    def endless(handler, content, number):
        handler.send_response(200)
        handler.send_header(*(("Content-Length", str(10**12)) if told else ("Connection", "close")))
        handler.end_headers()
        handler.close_connection = True
        while sent[0] < 2**28:
            handler.wfile.write(b" " * 2**16)
            sent[0] += 2**16

    with serving(endless) as server:
        text = refused(server.url, count=1, max_answer_mb=0.5, retries=3, timeout=20)
    assert "max_answer_mb" in text
    assert len(server.asked) == 1
    assert sent[0] < 2**25  # what the sockets between them hold


def test_a_compressed_bomb_stays_small():
    """Compression is not asked for, so it is not undone."""
    with serving(
        lambda handler, content, number: handler.reply(zlib.compress(b" " * 2**24), Content_Encoding="deflate")
    ) as server:
        assert "instead of JSON" in refused(server.url, count=1)
    assert server.asked[0][1]["Accept-Encoding"] == "identity"


def test_a_long_answer_is_shown_by_its_beginning():
    with serving(lambda handler, content, number: handler.reply(b"<html>\n" + b"x" * 100_000)) as server:
        text = refused(server.url, count=1)
    assert "<html>" in text
    assert len(text) < 500


# Nonsense

NONSENSE = [
    b"", b"ok", b"\xff\xfe\x00", b"null", b"3", b"[1.0]", b'{"scores": 1.0}', b'{"scores": []}', b'{"scores": [1, 2]}',
    b'{"score": [1]}', b'{"scores": ["1"]}', b'{"scores": [null]}', b'{"scores": [NaN]}', b'{"scores": [Infinity]}',
    b'{"scores": [-1e999]}', b'{"scores": [true]}', b'{"scores": [[1]]}', b'{"scores": {"0": 1}}',
    b'{"scores": [1' + b"0" * 400 + b"]}", b"[" * 100_000, b'{"scores": [1' + b"0" * 5000 + b"]}",
]  # fmt: skip


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: ascii(answer[:24]))
def test_nonsense_is_one_line_with_what_was_answered(answer):
    with serving(lambda handler, content, number: handler.reply(answer)) as server:
        text = refused(server.url, count=1, retries=3)
    assert len(server.asked) == 1
    assert server.url in text
    assert len(text) < 600


def test_a_failure_is_never_a_zero_among_good_scores():
    def one_bad(handler, content, number):
        handler.reply({"scores": [None]}) if content["prompts"] == ["prompt 5"] else ones(handler, content, number)

    with serving(one_bad) as server:
        assert "null" in refused(server.url, batch_size=1)


# Mistakes in the recipe


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ["url"]),
        ({"url": "127.0.0.1:8000"}, ["url"]),
        ({"url": "ftp://127.0.0.1/x"}, ["url", "http://"]),
        ({"url": "http://"}, ["url"]),
        ({"url": "http://[::1"}, ["url"]),
        ({"url": 8000}, ["url"]),
        ({"url": "http://user:hunter2@127.0.0.1/"}, ["password", "key_variable"]),
        ({"url": "http://127.0.0.1/?key=hunter2"}, ["query", "key_variable"]),
        ({"url": "http://127.0.0.1/", "timeout": 0}, ["timeout"]),
        ({"url": "http://127.0.0.1/", "timeout": "soon"}, ["timeout", "soon"]),
        ({"url": "http://127.0.0.1/", "retries": -1}, ["retries"]),
        ({"url": "http://127.0.0.1/", "batch_size": 0}, ["batch_size"]),
        ({"url": "http://127.0.0.1/", "concurrency": 0}, ["concurrency"]),
        ({"url": "http://127.0.0.1/", "max_answer_mb": -1}, ["max_answer_mb"]),
        ({"url": "http://127.0.0.1/", "key_variable": "NOT_SET_ANYWHERE"}, ["NOT_SET_ANYWHERE"]),
        ({"url": "http://127.0.0.1/", "time_out": 3}, ["time_out", "timeout"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(options, named):
    text = user_error(rewards_of, {"name": "http", **options})
    assert all(part in text for part in ("http", *named))
    assert "hunter2" not in text


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    text = user_error(rewards_of, {"name": "http", "url": "http://127.0.0.1/", "key_variable": "MY_KEY"})
    assert "MY_KEY" in text
    assert key not in text


@pytest.mark.parametrize(
    "proxy",
    [
        "nonsense",
        "ftp://127.0.0.1:1",
        "http://[::1",
        "socks5://user:hunter2@127.0.0.1:1",
        "://",
        "http://user:hunter2@",
    ],
)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "all_proxy"])
def test_a_proxy_that_cannot_be_used_is_one_line_without_its_password(monkeypatch, proxy, name):
    monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert "hunter2" not in refused("http://127.0.0.1:9/", count=1, retries=0)


@pytest.mark.parametrize(
    "url", [f"http://{'a' * 70}.example/", "http://127.0.0.1:99999/", "http://a..b/", "http://\ud800/", "http://a\0b/"]
)
def test_hosts_and_ports_that_cannot_be_are_one_line(url):
    def scored():
        reward_of(name="http", url=url, retries=0)(pictures(1, 8, 8), PROMPTS[:1])

    assert "reward http" in user_error(scored)


@pytest.mark.parametrize(
    "options", [{"max_answer_mb": 1e300}, {"retries": 10**9}, {"concurrency": 10**9}, {"timeout": 1e400}]
)
def test_options_beyond_reason_are_refused(options):
    assert next(iter(options)) in user_error(rewards_of, {"name": "http", "url": "http://127.0.0.1/", **options})
