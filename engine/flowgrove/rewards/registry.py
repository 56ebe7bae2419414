"""Rewards by the name that a recipe gives them. A reward takes pictures and prompts and returns one score each; it knows nothing of trees."""

import difflib
import inspect
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.recipe import Recipe, Reward
from flowgrove.rewards.jpeg_size import JpegSizeReward
from flowgrove.rewards.shapes import ShapesReward


class Scorer(Protocol):
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """pictures [B, 3, H, W] in [0, 1], one prompt each → scores [B]."""
        ...


_REWARDS: dict[str, Callable[..., Scorer]] = {"shapes": ShapesReward, "jpeg_size": JpegSizeReward}


class Rewards:
    """All rewards of a recipe. Raises UserError for a name or an option that does not exist."""

    def __init__(self, recipe: Recipe) -> None:
        names = [reward.name for reward in recipe.reward]
        if len(set(names)) < len(names):
            raise UserError(f"reward lists {', '.join(names)}: give each name once")
        self.weights = [reward.weight for reward in recipe.reward]
        self.scorers = {reward.name: _build(reward) for reward in recipe.reward}

    def check(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt that a reward cannot judge, before anything is trained on it."""
        for scorer in self.scorers.values():
            if isinstance(scorer, ShapesReward):
                scorer.check(prompts)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Scores float64 [B, rewards] on the CPU. Raises UserError for pictures or scores that are not finite: never a silent 0."""
        if not bool(torch.isfinite(pictures).all()):
            raise UserError("the model drew pictures that are not numbers: resume from an earlier checkpoint with a lower update.lr")
        columns = []
        for name, scorer in self.scorers.items():
            scores = scorer(pictures, prompts).to("cpu", torch.float64)
            if scores.shape != (len(prompts),) or not bool(torch.isfinite(scores).all()):
                raise UserError(
                    f"reward {name} gave {list(scores.shape)} scores, not all finite, for {len(prompts)} pictures: it must give one finite number each"
                )
            columns.append(scores)
        return torch.stack(columns, dim=1)


def _build(reward: Reward) -> Scorer:
    if reward.name not in _REWARDS:
        raise UserError(f"reward name {reward.name!r} is not known: write one of {', '.join(_REWARDS)}")
    options, known = reward.model_extra or {}, inspect.signature(_REWARDS[reward.name]).parameters
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, ("weight", *known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(('weight', *known))}"
            raise UserError(f"reward {reward.name} does not take {option}: {hint}")
    return _REWARDS[reward.name](**options)
