"""How much of a wanted text a picture shows, read by RapidOCR (`pip install rapidocr onnxruntime`, whose models come
with it).

    score = 1 − min(d, n) / n        d: edit distance of what is read to the wanted text of n letters; 0 if it holds it

Both without blanks and in lower case, as the reward of Flow-GRPO (2505.05470) compares them.
"""

import logging
import re
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flowgrove.data.prompt import metadata_of
from flowgrove.errors import UserError, one_line
from flowgrove.rewards.pixels import to_bytes

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OcrReward:
    """`column`: of the prompt's row, which holds the wanted text (data.metadata); null: the first that stands in quotes
    in the prompt.
    """

    def __init__(self, column: str | None = None) -> None:
        self.column = column
        try:
            engine = import_module("rapidocr").RapidOCR
        except ImportError as error:
            missing = getattr(error, "name", None) or "rapidocr"
            what = f"reward ocr reads pictures with RapidOCR, and {missing} is not installed"
            raise UserError(f"{what}: pip install rapidocr onnxruntime") from None
        self._read = engine(params={"Global.log_level": "critical"})
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)  # a picture without a text is no warning

    def check(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt that asks for no text."""
        for prompt in prompts:
            self._wanted(prompt)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores float64 [B] from 0 to 1, on the CPU."""
        pairs = zip(to_bytes(pictures), prompts, strict=True)
        scores = [likeness(self._text(picture), self._wanted(prompt)) for picture, prompt in pairs]
        return torch.tensor(scores, dtype=torch.float64)

    def _text(self, picture: Tensor) -> str:
        """What stands in uint8 [H, W, 3]; the library takes colours as OpenCV orders them."""
        found: Any = self._read(picture.flip(-1).numpy())
        return "".join(found.txts or ())

    def _wanted(self, prompt: str) -> str:
        if self.column is not None:
            text = metadata_of(prompt).get(self.column)
            fix = f"give it one, and write data.metadata: [{self.column}]"
        else:
            match = _QUOTED.search(prompt)
            text, fix = match and (match[1] or match[2]), 'write it in "quotes", or name its column as column'
        if not isinstance(text, str) or not plain(text):
            where = "in quotes" if self.column is None else f"in the column {self.column}"
            raise UserError(f"reward ocr: {one_line(prompt, 60)!r} has no wanted text {where}: {fix}")
        return text


def plain(text: str) -> str:
    """Without blanks, in lower case."""
    return "".join(text.split()).lower()


def likeness(read: str, wanted: str) -> float:
    """1: all of the wanted text was read; 0: as many mistakes as it has letters, or more."""
    read, wanted = plain(read), plain(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(one: str, other: str) -> int:
    """Letters that are put in, left out or exchanged to make one text of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for above, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], above
        for place, wanted in enumerate(other, 1):
            least = min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != wanted))
            diagonal, row[place] = row[place], least
    return row[-1]
