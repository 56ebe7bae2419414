"""UnifiedReward (Wang et al. 2503.05236): a vision-language model that is asked for a score from 1 to 5, behind any
OpenAI-compatible server (vLLM, SGLang).

One chat request per picture, several at a time. The score is what stands after the last "Final Score:" of the answer.
"""

import re
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.recipe.schema import Count
from flowgrove.rewards.endpoint import Concurrency, Connections, Endpoint, Retries, Seconds
from flowgrove.rewards.pictures import png_base64
from flowgrove.rewards.pixels import to_bytes

LOWEST, HIGHEST = 1.0, 5.0
INSTRUCTION = """Judge a picture that was generated from a text caption, by two criteria:
1. Alignment with the caption: are the objects, their attributes and their relations those that the caption describes?
2. Quality of the picture: is it clear, detailed, true in its colours and pleasing to look at?
Give one score from 1 to 5 for both together, written after 'Final Score:'.
Text Caption: [{prompt}]"""
# a number on its own: neither the start of a range such as 1-5 nor negative by accident
_SCORE = re.compile(r"final\s++score[\s:*_=\[]*+(-?\d++(?:[.,]\d++)?+)(?![\d.,]*+\s*+[-–]\s*+\d)", re.IGNORECASE)


class UnifiedReward:
    """`url`: the server, with or without /v1; `model`: its name there; `instruction`: the question, with {prompt} in it
    (the default says in our words what the model was trained on; a model card's own wording goes here).
    """

    remote: ClassVar = True

    def __init__(
        self,
        url: str,
        model: str = "UnifiedReward-7b-v1.5",
        instruction: str = INSTRUCTION,
        max_tokens: Count = 1024,
        timeout: Seconds = 120.0,
        retries: Retries = 3,
        concurrency: Concurrency = 16,
        key_variable: str | None = None,
    ) -> None:
        if "{prompt}" not in instruction:
            raise UserError(
                "reward unified_reward: instruction does not say where the prompt goes: write {prompt} in it"
            )
        base = url.rstrip("/").removesuffix("/v1")
        self.endpoint = Endpoint(
            "unified_reward", f"{base}/v1/chat/completions", timeout, retries, 4.0, concurrency, key_variable
        )
        self.model, self.instruction, self.max_tokens = model, instruction, max_tokens

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores float64 [B] from 1 to 5, on the CPU."""
        pairs = list(zip(to_bytes(pictures), prompts, strict=True))
        return torch.tensor(self.endpoint.map(self._ask, pairs), dtype=torch.float64)

    def _ask(self, client: Connections, pair: tuple[Tensor, str]) -> float:
        picture, prompt = pair
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64(picture)}"}}
        question = {"type": "text", "text": self.instruction.replace("{prompt}", prompt)}
        content = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": [image, question]}],
        }
        answer = self.endpoint.post(client, content)
        text = _text(answer)
        if text is None:
            raise self.endpoint.nonsense(answer, "a chat completion")
        if (score := read_score(text)) is None:
            raise self.endpoint.nonsense(text, "a text with 'Final Score:' and a number from 1 to 5")
        return score


def read_score(text: str) -> float | None:
    """The last final score of an answer, or None if there is none from 1 to 5."""
    found = _SCORE.findall(text)
    score = float(found[-1].replace(",", ".")) if found else None
    return score if score is not None and LOWEST <= score <= HIGHEST else None


def _text(answer: Any) -> str | None:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None
