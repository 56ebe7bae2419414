"""Rewards that raise, hang or answer nonsense: the prompt at fault is left out, its neighbours keep their scores, and
no failure is ever a 0.
"""

import math
import threading
import time

import pytest
import torch

from flowgrove.errors import UserError
from flowgrove.rewards import endpoint, faults
from flowgrove.rewards.faults import Faults, RewardError, groups_of
from flowgrove.rewards.registry import Rewards
from planner_cases import user_error
from policy_cases import CPU, small_recipe
from reward_cases import pictures, reward_of, rewards_of, serving

GROUP, PROMPTS = 2, ["one", "two", "three", "four", "five"]
TEXTS = [prompt for prompt in PROMPTS for _ in range(GROUP)]
BATCH = pictures(len(TEXTS), 8, 8)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(faults, "_WAIT", 0.0)
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Picky:
    """Brightness; `refuses(prompts, call)` may raise, or give what is returned instead."""

    def __init__(self, refuses=lambda prompts, call: None):
        self.refuses, self.calls = refuses, []

    def __call__(self, pictures, prompts):
        self.calls.append(list(prompts))
        other = self.refuses(prompts, len(self.calls))
        return pictures.mean((1, 2, 3)) if other is None else other


def scored(*scorers, batch=BATCH, texts=TEXTS, found=None):
    """Scores [prompts · GROUP, rewards] and the faults."""
    rewards, found = Rewards(small_recipe(), CPU), Faults() if found is None else found
    rewards.scorers = {f"reward {number}": scorer for number, scorer in enumerate(scorers)}
    return rewards(batch, texts, found), found


CLEAN, _ = scored(Picky())


def left_out(scores):
    """The prompts without scores; all others have those of a run without faults."""
    lost = scores.isnan().any(1).view(-1, GROUP)
    assert bool((lost.all(1) == lost.any(1)).all())
    assert torch.equal(scores[~scores.isnan().any(1), 0], CLEAN[~scores.isnan().any(1), 0])
    return [prompt for prompt, gone in zip(PROMPTS, lost.any(1).tolist(), strict=True) if gone]


def throw(error):
    raise error


BAD = {
    "raises": lambda prompts: throw(RuntimeError("no such shape")),
    "raises a line for the user": lambda prompts: throw(RewardError("no two")),
    "gives NaN": lambda prompts: torch.full((len(prompts),), math.nan),
    "gives too many": lambda prompts: torch.ones(len(prompts) + 1),
}


def bad(kind):
    """A reward that does this for every call with a certain prompt in it."""
    return Picky(lambda prompts, call: BAD[kind](prompts) if "two" in prompts else None)


@pytest.mark.parametrize("kind", BAD)
def test_a_prompt_at_fault_costs_no_other(kind):
    scores, found = scored(bad(kind))
    assert left_out(scores) == ["two"]
    assert len(found.errors) == 1


def test_without_faults_a_reward_is_asked_once_for_all():
    picky = Picky()
    assert left_out(scored(picky)[0]) == []
    assert picky.calls == [TEXTS]


def test_an_error_that_passes_costs_nothing():
    for last in (1, 1 + 3):  # of all prompts together, and then of some alone
        scores, found = scored(Picky(lambda prompts, call, last=last: throw(OSError("busy")) if call <= last else None))
        assert left_out(scores) == []
        assert not found.errors


def test_a_reward_that_is_broken_is_not_asked_for_every_prompt():
    picky = Picky(lambda prompts, call: throw(ValueError("a mistake")))
    scores, found = scored(picky)
    assert left_out(scores) == PROMPTS
    assert len(picky.calls) == 1 + 2 * 3
    with pytest.raises(ValueError, match="a mistake"):
        found.raise_first()


def test_a_reward_that_scored_nothing_is_not_asked_for_the_rest_of_the_iteration():
    picky = Picky(lambda prompts, call: throw(ValueError("a mistake")))
    _, found = scored(picky)
    asked = len(picky.calls)
    assert left_out(scored(picky, found=found)[0]) == PROMPTS
    assert len(picky.calls) == asked
    scored(picky)
    assert len(picky.calls) == 2 * asked


def test_errors_that_lead_in_a_circle_are_errors():
    def circle(prompts, call):
        error = RuntimeError("round and round")
        error.__cause__ = ValueError("and")
        error.__cause__.__cause__ = error
        raise error

    assert left_out(scored(Picky(circle))[0]) == PROMPTS


def test_the_other_rewards_are_not_asked_again():
    good = Picky()
    scores, _ = scored(good, bad("raises"))
    assert left_out(scores) == ["two"]
    assert good.calls == [TEXTS]
    assert torch.isfinite(scores[:, 0]).all()


@pytest.mark.parametrize("error", [UserError("no such file"), torch.OutOfMemoryError("out of memory")])
def test_what_is_no_answer_of_a_reward_ends_the_run(error):
    picky = Picky(lambda prompts, call: throw(error))
    with pytest.raises(type(error), match=str(error)):
        scored(picky)
    assert len(picky.calls) == 1


def test_an_interruption_that_a_reward_makes_an_error_of_its_own_is_still_one():
    def swallow(prompts, call):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("it was stopped") from None

    with pytest.raises(KeyboardInterrupt):
        scored(Picky(swallow))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pictures_that_are_not_finite_are_not_scored(value):
    batch, picky = BATCH.clone(), Picky()
    batch[2, 0, 3, 4] = value
    scores, found = scored(picky, batch=batch)
    assert left_out(scores) == ["two"]
    assert picky.calls == [[text for text in TEXTS if text != "two"]]
    assert "not numbers" in next(iter(found.errors))
    assert "not numbers" in user_error(rewards_of({"name": "jpeg_size"}), batch, TEXTS)


def test_groups_are_of_equal_neighbours():
    assert groups_of(["a", "a", "b", "a"]) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert groups_of([]) == []


def test_what_was_left_out_is_one_warning(caplog):
    _, found = scored(bad("raises"))
    scored(bad("gives NaN"), found=found)
    found.tell("iteration 7", 1)
    (line,) = caplog.messages
    assert "iteration 7 leaves out 1 prompt: reward reward 0: RuntimeError: no such shape (and 1 more reason)" in line


def test_a_slow_reward_is_named_and_waited_for(caplog, monkeypatch):
    monkeypatch.setattr(faults, "_SLOW", 0.05)
    scores, _ = scored(Picky(lambda prompts, call: time.sleep(0.3)))
    assert left_out(scores) == []
    assert [message for message in caplog.messages if "reward reward 0 has been at work" in message]
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


# Servers


def refusing(handler, content, number):
    """A server that fails whenever a picture of one prompt is among those it gets."""
    if "two" in content["prompts"]:
        handler.reply({"error": "I will not"}, 500)
    else:
        handler.reply({"scores": [1.0] * len(content["prompts"])})


def test_a_server_that_fails_for_one_prompt_is_asked_for_each_of_the_others():
    with serving(refusing) as server:
        scores, found = scored(reward_of(name="http", url=server.url, retries=1, batch_size=3))
    assert scores[:, 0].isnan().tolist() == [text == "two" for text in TEXTS]
    assert "I will not" in next(iter(found.errors))


def test_a_server_that_is_gone_is_not_asked_for_every_prompt():
    tries = []
    scorer = reward_of(name="http", url="http://127.0.0.1:9/score", retries=1, concurrency=1)
    exchange = scorer.endpoint._try
    scorer.endpoint._try = lambda client, body: tries.append(1) or exchange(client, body)
    scores, _ = scored(scorer)
    assert left_out(scores) == PROMPTS
    assert len(tries) == 4  # two of all, two of the first prompt


# Functions of the user's own

HANGS = """
import threading
from pathlib import Path

def score(pictures, prompts):
    if "two" in prompts:
        threading.Event().wait()
    return pictures.mean((1, 2, 3))
"""


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWGROVE_ALLOW_PYTHON", "1")
    (tmp_path / "mine.py").write_text(HANGS)
    return str(tmp_path / "mine.py")


def test_a_function_that_hangs_is_left_to_itself_after_its_timeout(hanging):
    scores, found = scored(reward_of(name="python", file=hanging, timeout=0.5))
    assert left_out(scores) == ["two"]
    (error,) = found.errors
    assert all(part in error for part in ("reward python", "0.5 s", hanging))


def test_a_function_with_a_timeout_gives_what_it_gives_without(hanging):
    texts = ["one"] * len(TEXTS)
    whole = reward_of(name="python", file=hanging)(BATCH, texts)
    assert torch.equal(reward_of(name="python", file=hanging, timeout=60)(BATCH, texts), whole)


def test_a_timeout_is_a_time():
    assert "timeout" in user_error(rewards_of, {"name": "python", "file": "x.py", "timeout": 0})
