"""Scoring beside the rollout: bounded, in order, with the scores of doing one after the other,
and with errors that are not lost.
"""

import threading
from contextlib import contextmanager

import pytest
import torch

from flowgrove.errors import UserError
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.rewards.registry import Rewards
from flowgrove.rewards.scoring import Scoring, score_leaves
from flowgrove.setup import Setup
from flowgrove.spans import listening, span
from flowgrove.update.updater import Updater
from policy_cases import CPU, TEXTS, policy_of, runner_of, small_recipe


class Remote:
    """A server's part: brightness, after a while; says when it works."""

    remote = True

    def __init__(self, wait=lambda: None, fails_at=None):
        self.wait, self.fails_at, self.calls, self.threads = wait, fails_at, [], set()

    def __call__(self, pictures, prompts):
        self.calls.append(list(prompts))
        self.threads.add(threading.current_thread().name)
        self.wait()
        if len(self.calls) == self.fails_at:
            raise UserError("reward http: the server said 500")
        return pictures.mean((1, 2, 3))


def rewards_of(scorer):
    rewards = Rewards(small_recipe(), CPU)
    rewards.scorers, rewards.weights, rewards.remote = {"remote": scorer}, [1.0], getattr(scorer, "remote", False)
    return rewards


def latents(count, seed=0):
    return torch.randn(
        count, *policy_of().adapter.latent_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_scores_come_in_order_and_equal_those_of_one_call():
    policy, scorer = policy_of(), Remote()
    whole = latents(12)
    with Scoring(rewards_of(scorer), runner_of(policy_of()), CPU) as scoring:
        assert scoring.beside
        for start in range(0, 12, 3):
            scoring.submit(policy, whole[start : start + 3], [f"prompt {i}" for i in range(start, start + 3)])
        scores = scoring.scores()
    expected = score_leaves(policy, runner_of(policy), rewards_of(Remote()), whole, [f"prompt {i}" for i in range(12)])
    assert torch.allclose(scores, expected, rtol=0, atol=1e-12)
    assert [prompts[0] for prompts in scorer.calls] == ["prompt 0", "prompt 3", "prompt 6", "prompt 9"]
    assert scorer.threads == {"rewards_0"}


def test_the_rollout_does_not_wait_for_a_server_but_runs_at_most_two_ahead():
    policy, answered = policy_of(), threading.Event()
    scorer = Remote(wait=answered.wait)
    with Scoring(rewards_of(scorer), runner_of(policy_of()), CPU) as scoring:
        for _ in range(2):
            scoring.submit(policy, latents(1), ["a prompt"])  # returns, though nothing is answered yet
        assert not any(future.done() for future in scoring._futures)
        third = threading.Thread(target=scoring.submit, args=(policy, latents(1), ["a prompt"]))
        third.start()
        third.join(0.2)
        assert third.is_alive(), "two are waiting: the third rollout is not taken before one of them is scored"
        answered.set()
        third.join()
        assert scoring.scores().shape == (3, 1)


def test_waiting_for_the_thread_has_a_range_and_without_threads_there_is_none():
    for threaded in (True, False):
        scorer, names = Remote(), []

        @contextmanager
        def listen(one, names=names):
            names.append(one.path)
            yield

        with (
            listening(listen),
            span("rollout"),
            Scoring(rewards_of(scorer), runner_of(policy_of()), CPU, threaded=threaded) as scoring,
        ):
            assert scoring.beside, "the rollout goes by the same parts"
            for _ in range(3):
                scoring.submit(policy_of(), latents(1), ["a prompt"])
            scores = scoring.scores()
        assert scores.shape == (3, 1)
        assert names.count("rollout/wait") == (2 if threaded else 0), "one before the third, one for the rest"
        assert scorer.threads == {"rewards_0" if threaded else threading.current_thread().name}


def test_without_a_server_a_cpu_scores_when_it_is_asked():
    scorer = Remote()
    rewards = rewards_of(scorer)
    rewards.remote = False
    with Scoring(rewards, runner_of(policy_of()), CPU) as scoring:
        scoring.submit(policy_of(), latents(2), ["one", "two"])
        assert not scorer.calls
        assert scoring.scores().shape == (2, 1)
    assert scorer.threads == {threading.current_thread().name}


@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_error_of_a_reward_reaches_the_caller(fails_at):
    with Scoring(rewards_of(Remote(fails_at=fails_at)), runner_of(policy_of()), CPU) as scoring:

        def all_of_it():
            for _ in range(4):
                scoring.submit(policy_of(), latents(1), ["a prompt"])
            scoring.scores()

        with pytest.raises(UserError, match="the server said 500"):
            all_of_it()
    assert not any(thread.name.startswith("rewards") for thread in threading.enumerate())


def test_an_iteration_in_parts_equals_one_in_one():
    """Where scoring runs beside it the rollout goes some prompts at a time."""
    recipe = small_recipe(
        update={"updates_per_iteration": 1}, engine={"device": "cpu", "token_budget": 70, "reuse_rollout_graph": True}
    )
    lines = []
    for remote, threaded in ((False, True), (True, True), (True, False)):
        scorer = Remote()
        rewards = rewards_of(scorer)
        rewards.remote = remote
        policy = Policy.load(recipe, CPU)
        stages = Stages(Setup(recipe), policy, Updater(recipe, policy, runner_of(policy, recipe)), rewards)
        stages.scores_on_a_thread = threaded
        lines.append(stages.run(TEXTS, 0))
        assert len(scorer.calls) == (3 if remote else 1)
        assert scorer.threads == {"rewards_0" if remote and threaded else threading.current_thread().name}
    whole, parts, alone = lines
    assert alone["reward"] == parts["reward"]
    for key in ("reward", "advantage_by_step"):
        for name, value in whole[key].items():
            assert parts[key][name] == pytest.approx(value, rel=1e-9)
    for key in ("loss", "grad_norm", "approx_kl"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-8, abs=1e-12)
    assert parts["train_passes"] == whole["train_passes"]


def test_a_reward_without_room_is_given_fewer_pictures():
    sizes = []

    def scorer(pictures, prompts):
        if len(pictures) > 3:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(pictures))
        return pictures.mean((1, 2, 3))

    policy, whole = policy_of(), latents(7)
    scores = score_leaves(policy, runner_of(policy), rewards_of(scorer), whole, ["a prompt"] * 7)
    assert torch.allclose(
        scores,
        score_leaves(policy, runner_of(policy), rewards_of(Remote()), whole, ["a prompt"] * 7),
        rtol=0,
        atol=1e-12,
    )
    assert max(sizes) <= 3
    assert sum(sizes) == 7
