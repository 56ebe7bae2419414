"""Decoding and rewards of finished leaves, beside the rollout of the next prompts where that gains something."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import torch
from torch import Tensor

from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.out_of_memory import FEWER_SAMPLES, Shrink, retry_smaller
from flowgrove.rewards.faults import Faults, groups_of, numbered
from flowgrove.rewards.registry import Rewards
from flowgrove.spans import WAIT, span

PIXELS_AT_ONCE = 1 << 25  # 400 MB of decoded pictures
_WAITING = 2  # rollouts whose leaves may wait to be scored


class Scoring:
    """One iteration's. On a GPU, and where a reward waits for a server, a thread does the work, on a GPU in `stream`,
    at most `_WAITING` rollouts behind; else, and without `threaded`, it is done when the scores are asked for: on a CPU
    two threads would only take each other's cores. `beside`: whether a thread gains something; with or without one the
    rollout goes by the same parts.

    A context manager: when the block ends nothing runs any more.
    """

    def __init__(
        self,
        rewards: Rewards,
        runner: PassRunner,
        device: torch.device,
        stream: "torch.cuda.Stream | None" = None,
        faults: Faults | None = None,
        threaded: bool = True,
    ) -> None:
        self.rewards, self.runner, self.device, self._stream = rewards, runner, device, stream
        self.faults = faults
        self.beside = device.type == "cuda" or rewards.remote
        self._pending: list[Callable[[], Tensor]] = []
        self._futures: list[Future[Tensor]] = []
        self._thread = ThreadPoolExecutor(1, "rewards", self._begin) if self.beside and threaded else None
        self._context = copy_context()  # of the iteration, not of the rollout that submits

    def _begin(self) -> None:
        """A new thread is on GPU 0, whichever this process's is."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def submit(self, policy: Policy, leaves: Tensor, prompts: list[str], each: int | None = None) -> None:
        """Clean latents with one prompt each, `each` of a group, or all neighbours of one prompt. Waits while
        `_WAITING` earlier ones are not scored; what went wrong with one of those is raised.
        """
        if self._thread is None:
            self._pending.append(partial(self._score, policy, leaves, prompts, each))
            return
        if len(self._futures) >= _WAITING:
            with span(WAIT):
                self._futures[-_WAITING].result()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        work = partial(self._context.run, self._score_beside, policy, leaves, prompts, each, ready)
        self._futures.append(self._thread.submit(work))

    def scores(self) -> Tensor:
        """The scores of everything submitted, in order: float64 [leaves, rewards] on the CPU. With `faults` those
        of prompts that could not be scored are NaN (see `Rewards`).
        """
        if self._thread is None:
            return torch.cat([work() for work in self._pending])
        with span(WAIT):
            return torch.cat([future.result() for future in self._futures])

    def _score(self, policy: Policy, leaves: Tensor, prompts: list[str], each: int | None) -> Tensor:
        return score_leaves(policy, self.runner, self.rewards, leaves, prompts, self.faults, each)

    def _score_beside(
        self, policy: Policy, leaves: Tensor, prompts: list[str], each: int | None, ready: "torch.cuda.Event | None"
    ) -> Tensor:
        with span("reward", rows=len(leaves)):
            if self._stream is None or ready is None:
                return self._score(policy, leaves, prompts, each)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                leaves.record_stream(self._stream)
                return self._score(policy, leaves, prompts, each)


def samples_at_once(pixels: int, group: int = 1) -> int:
    """How many samples of so many pixels are decoded and scored together, whole groups of them."""
    return max(1, PIXELS_AT_ONCE // pixels // group) * group


def rolled_together(tokens: int, narrowest: int) -> int:
    """How many prompts are rolled out together where scoring runs beside it: as many as fill half a pass of `tokens` at
    the forest's narrowest, where a prompt has so many.
    """
    return max(1, -(-tokens // (2 * narrowest)))


def score_leaves(
    policy: Policy,
    runner: PassRunner,
    rewards: Rewards,
    leaves: Tensor,
    prompts: list[str],
    faults: Faults | None = None,
    each: int | None = None,
) -> Tensor:
    """Scores float64 [leaves, rewards] on the CPU of clean latents with one prompt each, `each` of a group, or all
    neighbours of one prompt; decoded and scored some at a time. With `faults` those of prompts that could not be scored
    are NaN (see `Rewards`).
    """
    some, scores = samples_at_once(policy.adapter.geometry.pixels), []

    def score(mine: slice) -> Tensor:
        pictures = runner.decode(policy, leaves[mine])
        finite = torch.isfinite(leaves[mine]).flatten(1).all(1)
        return rewards(pictures, prompts[mine], faults, finite, numbers[mine])

    def fewer() -> bool:
        """Half as many, if that is another slice: a group is never cut."""
        nonlocal some
        before = next_end()
        while some > 1:
            some //= 2
            if next_end() < before:
                return True
        return False

    numbers = numbered(prompts, each)
    ends = [group.stop for group in groups_of(numbers)] if rewards.groupwise else range(1, len(leaves) + 1)

    def next_end() -> int:
        """As far as `some` leaves go, or a reward that compares groups needs them together."""
        left = [end for end in ends if end > done]
        return max((end for end in left if end <= done + some), default=left[0])

    done, shrink = 0, Shrink({FEWER_SAMPLES: fewer})
    while done < len(leaves):
        # called before the next slice
        scores.append(retry_smaller(lambda: score(slice(done, next_end())), shrink))  # noqa: B023
        done += len(scores[-1])
    return torch.cat(scores)
