"""The small head of two rewards: linear maps one after the other, trained with dropout between them and without
activations, so at scoring time one line.
"""

import re

import torch
from torch import Tensor
from torch.nn.functional import linear

from flowgrove.rewards.weights import misfit


class LinearHead:
    """The layers `layers.N.weight` [out, in] and `layers.N.bias` of a state dict,
    in the order of N (numbers between them were dropout). fp32.
    """

    def __init__(self, state: dict[str, Tensor], inputs: int, device: torch.device, reward: str, place: object) -> None:
        numbers = sorted(int(found[1]) for name in state if (found := re.fullmatch(r"layers\.(\d+)\.weight", name)))
        if not numbers:
            raise misfit(reward, place, "no layers.0.weight")
        self.layers: list[tuple[Tensor, Tensor]] = []
        for number in numbers:
            weight, bias = state[f"layers.{number}.weight"], state.get(f"layers.{number}.bias")
            if weight.ndim != 2 or weight.shape[1] != inputs or bias is None or bias.shape != weight.shape[:1]:
                raise misfit(reward, place, f"layers.{number} does not take {inputs} values")
            self.layers.append((weight.to(device, torch.float32), bias.to(device, torch.float32)))
            inputs = weight.shape[0]
        if inputs != 1:
            raise misfit(reward, place, f"its last layer gives {inputs} values, not 1")

    def __call__(self, features: Tensor) -> Tensor:
        """[B, inputs] → [B]."""
        for weight, bias in self.layers:
            features = linear(features, weight, bias)
        return features.squeeze(-1)
