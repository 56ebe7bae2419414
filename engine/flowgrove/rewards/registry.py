"""Rewards by the name that a recipe gives them. A reward takes pictures and prompts and returns one score each;
it knows nothing of trees.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Protocol

import torch
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.errors import UserError, one_line
from flowgrove.recipe.schema import Recipe, Reward
from flowgrove.rewards.aesthetic import AestheticReward
from flowgrove.rewards.clip_score import ClipScoreReward
from flowgrove.rewards.clip_similarity import ClipSimilarityReward
from flowgrove.rewards.diversity import DiversityReward
from flowgrove.rewards.faults import (
    Faults,
    RewardError,
    ask_for_each,
    fault_of,
    groups_of,
    named_if_slow,
    numbered,
    told_apart,
)
from flowgrove.rewards.geneval import GenEvalReward
from flowgrove.rewards.hpsv2 import HPSv2Reward
from flowgrove.rewards.http import HttpReward
from flowgrove.rewards.image_reward import ImageRewardReward
from flowgrove.rewards.jpeg_size import JpegSizeReward
from flowgrove.rewards.ocr import OcrReward
from flowgrove.rewards.pickscore import PickScoreReward
from flowgrove.rewards.python import PythonReward
from flowgrove.rewards.shapes import ShapesReward
from flowgrove.rewards.unified_reward import UnifiedReward
from flowgrove.rewards.video_quality import VideoQualityReward
from flowgrove.spans import REWARD, span


class Scorer(Protocol):
    """Made from the options of its recipe entry, and from `device` if its signature has one.

    With `remote` true a server does the work, and training goes on meanwhile. With `takes_video` true it is given
    videos [B, F, 3, H, W] whole; otherwise their frames, and its scores are averaged over them. With `groupwise` true
    all pictures of a prompt, which are neighbours, reach it in one call; `fewest`: how many it needs of each.
    `check(prompts)`, if it has one, raises UserError for prompts that it cannot score. What a prompt's row holds beside
    its text are attributes of the prompt (`data.prompt`).
    """

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """pictures [B, 3, H, W] in [0, 1], one prompt each → scores [B]."""
        ...


_REWARDS: dict[str, Callable[..., Scorer]] = {
    "shapes": ShapesReward,
    "hpsv2": HPSv2Reward,
    "pickscore": PickScoreReward,
    "image_reward": ImageRewardReward,
    "clip_score": ClipScoreReward,
    "aesthetic": AestheticReward,
    "unified_reward": UnifiedReward,
    "ocr": OcrReward,
    "geneval": GenEvalReward,
    "clip_similarity": ClipSimilarityReward,
    "diversity": DiversityReward,
    "video_quality": VideoQualityReward,
    "jpeg_size": JpegSizeReward,
    "http": HttpReward,
    "python": PythonReward,
}
_CPU = torch.device("cpu")
WEIGHTED_SUM = "weighted_sum"  # what that of all rewards is called beside them


def is_remote(name: str) -> bool:
    """Whether a server does a reward's work."""
    return bool(getattr(_REWARDS.get(name), "remote", False))


def scored_beside(recipe: Recipe, device_type: str) -> bool:
    """Whether a thread that decodes and scores beside the rollout gains something: on a GPU, and where a reward waits
    for a server.
    """
    return device_type == "cuda" or any(is_remote(reward.name) for reward in recipe.reward)


def is_groupwise(reward: Reward) -> bool:
    """Whether an entry of a recipe is a reward that needs all samples of a prompt in one call. Raises UserError for one
    that does not exist.
    """
    always = bool(getattr(_REWARDS.get(reward.name), "groupwise", False))
    return always or _options(reward).get("group") is True


class Rewards:
    """All rewards of a recipe, with their models on `device`.
    Raises UserError for a name, an option or weights that do not exist.
    """

    def __init__(self, recipe: Recipe, device: torch.device = _CPU) -> None:
        training, evaluating = recipe.reward, recipe.run.eval.rewards
        _check_titles([*training, *evaluating])
        self.weights = [reward.weight for reward in training]
        # a mistake in the last entry is told before the first one's model is read
        prepared = [(reward, _options(reward)) for reward in (*training, *evaluating)]
        for reward, _ in prepared:
            _check_evaluation(reward.name, recipe)
        self._device = device
        self.scorers = self._built(prepared[: len(training)])
        self._evaluating = prepared[len(training) :]
        self.remote = any(getattr(scorer, "remote", False) for scorer in self.scorers.values())

    def _built(self, prepared: list[tuple[Reward, dict[str, Any]]]) -> dict[str, Scorer]:
        return {reward.title: _build(reward.name, options, self._device) for reward, options in prepared}

    @cached_property
    def of_evaluations(self) -> "Rewards":
        """These and those that only evaluations give, which have no weights and whose models are read when first asked
        for.
        """
        if not self._evaluating:
            return self
        rewards = copy(self)
        rewards.scorers = self.scorers | self._built(self._evaluating)
        rewards._evaluating = []
        return rewards

    @property
    def groupwise(self) -> bool:
        """Whether a reward needs all samples of a prompt in one call."""
        return any(getattr(scorer, "groupwise", False) for scorer in self.scorers.values())

    def check(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt that a reward cannot score, before anything is trained on it."""
        for scorer in self.scorers.values():
            if (check := getattr(scorer, "check", None)) is not None:
                check(prompts)

    @torch.no_grad()
    def __call__(
        self,
        pictures: Tensor,
        prompts: list[str],
        faults: Faults | None = None,
        finite: Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1] → scores float64 [B, rewards] on the CPU.

        Neighbours of one prompt are its group; `numbers`, one for each sample, tell groups of equal prompts apart. With
        `faults` a group that has no finite score from every reward, or a
        picture that is not finite, has NaN, and why is noted there; without, it is the error. `finite` [B] on the
        device: whether the pictures' latents are. Raises UserError for mistakes in the recipe.
        """
        drawn = torch.isfinite(pictures).flatten(1).all(1)
        drawn = to_host(drawn if finite is None else drawn & finite)
        numbers = list(numbers) if numbers is not None else numbered(prompts)
        groups = groups_of(numbers)
        good = [group for group in groups if bool(drawn[group].all())]
        if len(good) < len(groups):
            lost = UserError(
                "the model drew pictures that are not numbers: resume from an earlier checkpoint with a lower update.lr"
            )
            if faults is None:
                raise lost
            faults.note(lost)
            scores = torch.full((len(prompts), len(self.scorers)), torch.nan, dtype=torch.float64)
            rows = [row for group in good for row in range(group.start, group.stop)]
            if rows:
                scores[rows] = self._of_finite(
                    pictures[rows], [prompts[row] for row in rows], [numbers[row] for row in rows], faults
                )
            return scores
        return self._of_finite(pictures, prompts, numbers, faults)

    def _of_finite(self, pictures: Tensor, prompts: list[str], numbers: list[int], faults: Faults | None) -> Tensor:
        columns, groups = [], groups_of(numbers)
        apart = told_apart(prompts, groups)
        for name, scorer in self.scorers.items():

            def ask(some: slice, name: str = name, scorer: Scorer = scorer) -> Tensor:
                whole = some.stop - some.start == len(prompts)
                parts = apart if whole and getattr(scorer, "groupwise", False) else [some]
                with span(name, REWARD, len(prompts[some])), named_if_slow(name):
                    return torch.cat([_scores(name, scorer, pictures[part], prompts[part]) for part in parts])

            if faults is not None and name in faults.given_up:
                columns.append(torch.full((len(prompts),), torch.nan, dtype=torch.float64))
                continue
            try:
                columns.append(ask(slice(0, len(prompts))))
            except Exception as error:
                if faults is None:
                    raise
                columns.append(ask_for_each(name, ask, groups, fault_of(error), faults))
        return torch.stack(columns, dim=1)


def _scores(name: str, scorer: Scorer, pictures: Tensor, prompts: list[str]) -> Tensor:
    """One finite float64 score per prompt, on the CPU."""
    whole, frames = getattr(scorer, "takes_video", False), pictures.shape[1] if pictures.ndim == 5 else 1
    if whole and pictures.ndim == 4:
        raise UserError(f"reward {name} has video: true, but the model makes pictures: leave it out")
    if pictures.ndim == 5 and not whole and getattr(scorer, "groupwise", False):  # frames of one time are compared
        return torch.stack([_checked(name, scorer, pictures[:, frame], prompts) for frame in range(frames)]).mean(0)
    if pictures.ndim == 5 and not whole:
        pictures, prompts = pictures.flatten(0, 1), [prompt for prompt in prompts for _ in range(frames)]
    scores = _checked(name, scorer, pictures, prompts)
    return scores if whole else scores.view(-1, frames).mean(1)


def _checked(name: str, scorer: Scorer, pictures: Tensor, prompts: list[str]) -> Tensor:
    """What a scorer gives: one finite float64 score each, on the CPU."""
    scores = to_host(scorer(pictures, prompts).detach()).double()
    if scores.shape != (len(prompts),):
        shape = list(scores.shape)
        what = f"scores of shape {shape} for {len(prompts)} pictures"
        raise RewardError(f"reward {name} gave {what}: it must give one finite number each")
    if wrong := [(number, score) for number, score in enumerate(scores.tolist()) if not math.isfinite(score)]:
        number, score = wrong[0]
        first = f"the first {score} for {one_line(prompts[number], 60)!r}"
        what = f"{len(wrong)} of {len(prompts)} scores that are not finite, {first}"
        raise RewardError(f"reward {name} gave {what}: it must give one finite number each")
    return scores


def _check_titles(rewards: Sequence[Reward]) -> None:
    """Raises UserError where two rewards are called alike."""
    titles = [reward.title for reward in rewards]
    twice = next((title for number, title in enumerate(titles) if title in titles[:number]), None)
    if twice is not None:
        raise UserError(f"two rewards are called {twice}: write label: ... beside name, another for each")
    if WEIGHTED_SUM in titles:
        raise UserError(f"a reward is called {WEIGHTED_SUM}, as their sum is: write another label")


def _check_evaluation(name: str, recipe: Recipe) -> None:
    """Raises UserError where evaluations draw fewer pictures of a prompt than a reward compares."""
    fewest, drawn = getattr(_REWARDS[name], "fewest", 1), recipe.run.eval.samples
    if drawn < fewest and recipe.data.eval_prompts and recipe.run.eval_every:
        what = f"reward {name} compares the pictures of a prompt, and run.eval.samples is {drawn}"
        raise UserError(f"{what}: write {fewest} or more, or run.eval_every: 0")


def _options(reward: Reward) -> dict[str, Any]:
    """What the recipe says besides name and weight, as the types that the reward's signature asks for."""
    if reward.name not in _REWARDS:
        raise UserError(f"reward name {reward.name!r} is not known: write one of {', '.join(_REWARDS)}")
    given = reward.model_extra or {}
    known = {
        name: parameter
        for name, parameter in inspect.signature(_REWARDS[reward.name]).parameters.items()
        if name != "device"
    }
    for option in given:
        if option not in known:
            near = difflib.get_close_matches(option, ("label", "weight", *known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(('label', 'weight', *known))}"
            raise UserError(f"reward {reward.name} does not take {option}: {hint}")
    fields: dict[str, Any] = {
        name: (p.annotation, ... if p.default is p.empty else p.default) for name, p in known.items()
    }
    try:
        checked = create_model("Options", __config__=ConfigDict(allow_inf_nan=False), **fields)(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        if first["type"] == "missing":
            raise UserError(
                f"reward {reward.name} needs {option}: write {{name: {reward.name}, {option}: ...}}"
            ) from None
        raise UserError(
            f"reward {reward.name}: {option} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
    return {option: getattr(checked, option) for option in given}


def _build(name: str, options: dict[str, Any], device: torch.device) -> Scorer:
    reward = _REWARDS[name]
    return reward(**options, **({"device": device} if "device" in inspect.signature(reward).parameters else {}))
