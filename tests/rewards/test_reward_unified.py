"""unified_reward against a chat server on loopback: what it is asked, what is read from its answers,
and what becomes of answers without a score.
"""

import pytest
import torch

from flowgrove.rewards import endpoint
from flowgrove.rewards.pixels import to_bytes
from flowgrove.rewards.unified_reward import read_score
from planner_cases import user_error
from reward_cases import pictures, pixels_of, reward_of, rewards_of, serving

PROMPTS = ["a red cat", "two {prompt} dogs", 'a "quoted"\nline', "a red cat"]


@pytest.fixture(autouse=True)
def no_waiting_and_no_proxy(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def parts(content):
    """The picture, uint8 [H, W, 3], and the text of a chat request."""
    (message,) = content["messages"]
    assert message["role"] == "user"
    by_type = {part["type"]: part for part in message["content"]}
    assert set(by_type) == {"image_url", "text"}
    start, png = by_type["image_url"]["image_url"]["url"].split(",")
    assert start == "data:image/png;base64"
    return pixels_of(png), by_type["text"]["text"]


def saying(text):
    return lambda handler, content, number: handler.reply(
        {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    )


def by_darkness(handler, content, number):
    """A score between 1 and 5 that tells which picture was seen."""
    pixels, _ = parts(content)
    saying(f"The picture fits.\nFinal Score: {1 + 4 * pixels.float().mean() / 255:.4f}")(handler, content, number)


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_every_picture_is_scored_in_order(ending):
    batch = pictures(4, 9, 12)
    with serving(by_darkness) as server:
        scores = reward_of(name="unified_reward", url=server.url + ending, concurrency=3)(batch, PROMPTS)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, 1 + 4 * to_bytes(batch).double().mean((1, 2, 3)) / 255, atol=1e-4, rtol=0)
    assert {path for path, *_ in server.asked} == {"/v1/chat/completions"}


def test_a_request_holds_model_question_and_picture(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    batch = pictures(4, 9, 12)
    with serving(saying("Final Score: 3")) as server:
        scorer = reward_of(
            name="unified_reward", url=server.url, model="mine", max_tokens=77, key_variable="MY_KEY", concurrency=1
        )
        assert scorer(batch, PROMPTS).tolist() == [3.0] * 4
    for (_, headers, content), prompt, picture in zip(server.asked, PROMPTS, to_bytes(batch), strict=True):
        pixels, text = parts(content)
        assert torch.equal(pixels, picture)
        assert f"[{prompt}]" in text
        assert "Final Score:" in text
        assert (content["model"], content["max_tokens"], content["temperature"]) == ("mine", 77, 0)
        assert headers["Authorization"] == "Bearer sk-secret"


def test_the_question_can_be_changed():
    with serving(saying("Final Score: 3")) as server:
        reward_of(name="unified_reward", url=server.url, instruction="Rate {prompt}!")(pictures(1, 8, 8), ["a {cat}"])
    assert parts(server.asked[0][2])[1] == "Rate a {cat}!"


def test_frames_of_a_video_are_averaged():
    videos = pictures(6, 8, 10).view(2, 3, 3, 8, 10)
    with serving(by_darkness) as server:
        scores = rewards_of({"name": "unified_reward", "url": server.url})(videos, PROMPTS[:2])
    torch.testing.assert_close(
        scores[:, 0], 1 + 4 * to_bytes(videos).double().mean((1, 2, 3, 4)) / 255, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4.0),
        ("Final Score: 4.25", 4.25),
        ("**Final Score:** 3.5/5", 3.5),
        ("**Final Score: 3.5**", 3.5),
        ("final score = 2", 2.0),
        ("Final Score:\n\n5.", 5.0),
        ("Final Score: [1]", 1.0),
        ("Final Score: 3,5", 3.5),
        ("Final Score: 2. On reflection, Final Score: 4", 4.0),
        ("Final Score: 4, because 5 would be too much", 4.0),
        ("A score of 4", None),
        ("Final Score: none", None),
        ("Final Score: 7", None),
        ("Final Score: 45", None),
        ("Final Score: 0", None),
        ("Final Score: -3", None),
        ("Final Score: 1-5", None),
        ("Final Score: 4.5 - 5", None),
        ("Final Score (1-5): 4", None),
        ("", None),
    ],
)
def test_the_last_final_score_counts_if_it_is_one(text, score):
    assert read_score(text) == score


@pytest.mark.parametrize("text", ["I cannot judge this picture.", "Final Score: 11", ""])
def test_an_answer_without_a_score_is_one_line_that_shows_it(text):
    with serving(saying(text)) as server:
        message = user_error(reward_of(name="unified_reward", url=server.url), pictures(1, 8, 8), PROMPTS[:1])
    assert all(part in message for part in ("unified_reward", server.url, text, "Final Score:"))


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        3,
        None,
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": {"content": None}}]},
        {"choices": {"0": 1}},
        {"error": {"message": "x"}},
    ],
)
def test_an_answer_that_is_no_chat_completion_is_one_line(answer):
    with serving(lambda handler, content, number: handler.reply(answer)) as server:
        assert "chat completion" in user_error(
            reward_of(name="unified_reward", url=server.url), pictures(1, 8, 8), PROMPTS[:1]
        )


def test_a_server_that_refuses_is_one_line_without_the_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(lambda handler, content, number: handler.reply({"error": "invalid key sk-secret"}, 401)) as server:
        text = user_error(
            reward_of(name="unified_reward", url=server.url, key_variable="MY_KEY"), pictures(1, 8, 8), PROMPTS[:1]
        )
    assert "401" in text
    assert "sk-secret" not in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "url"),
        ({"url": "http://127.0.0.1:1", "instruction": "Rate it"}, "{prompt}"),
        ({"url": "http://127.0.0.1:1", "api_key": "x"}, "api_key"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(options, named):
    assert named in user_error(rewards_of, {"name": "unified_reward", **options})
