"""A function of your own as a reward. It runs whatever its file says, so it takes more than a recipe: FLOWGROVE_ALLOW_PYTHON=1, which `--allow-python` sets."""

import difflib
import importlib.util
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrove.device import is_out_of_memory, to_host
from flowgrove.errors import UserError

ALLOW = "FLOWGROVE_ALLOW_PYTHON"


class PythonReward:
    """`file`: a Python file; `function`: its function (pictures [B, 3, H, W] in [0, 1], prompts) → B numbers, as a tensor, an array or a list.

    Pictures are fp32 on the run's device, some of an iteration's at a time. With `video: true` it gets videos [B, F, 3, H, W] whole.
    """

    def __init__(self, file: str, function: str = "score", video: bool = False) -> None:
        if os.environ.get(ALLOW) != "1":
            raise UserError(f"reward python runs the code in {file}: if you trust it, pass --allow-python or set {ALLOW}=1")
        self.path, self.takes_video = Path(file).expanduser(), video
        self.function = self._load(function)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        try:
            return to_host(torch.as_tensor(self.function(pictures, prompts))).double()
        except Exception as error:
            if is_out_of_memory(error):  # fewer pictures at a time may fit
                raise
            raise self._failed(error) from error

    def _load(self, function: str) -> Callable[[Tensor, list[str]], Any]:
        spec = importlib.util.spec_from_file_location(f"flowgrove_reward_{self.path.stem}", self.path)
        if spec is None or spec.loader is None or not self.path.is_file():
            raise UserError(f"reward python: file {self.path} is not a Python file: write the path of one that ends in .py")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise self._failed(error) from error
        if not callable(found := getattr(module, function, None)):
            defined = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            near = difflib.get_close_matches(function, defined, n=1) or defined[:1]
            raise UserError(f"reward python: {self.path} has no function {function}: " + (f"did you mean {near[0]}?" if near else "define one"))
        return found

    def _failed(self, error: Exception) -> UserError:
        """One line that says where in the file it happened."""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"{self.path}, line {line}" if line else str(self.path)
        return UserError(f"reward python: {where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
