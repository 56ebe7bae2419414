"""A function of your own as a reward. It runs whatever its file says, so it takes more than a recipe:
FLOWGROVE_ALLOW_PYTHON=1, which `--allow-python` sets.

It gets copies, and every way out of it but scores is an error of one line, `sys.exit` and `os._exit` too.
"""

import difflib
import importlib.util
import inspect
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowgrove.device import is_out_of_memory, to_host
from flowgrove.errors import UserError, one_line
from flowgrove.paths import local
from flowgrove.rewards.endpoint import Seconds
from flowgrove.rewards.faults import RewardError, groups_of
from flowgrove.rewards.rows import metadata_rows, source_rows, source_video_rows

ALLOW = "FLOWGROVE_ALLOW_PYTHON"
_ROWS: dict[str, Callable[[list[str]], list[Any]]] = {
    "metadata": metadata_rows, "sources": source_rows, "source_videos": source_video_rows,
}  # fmt: skip
_EXITS = {name: getattr(os, name) for name in ("_exit", "abort")}


class PythonReward:
    """`file`: a Python file; `function`: its function (pictures [B, 3, H, W] in [0, 1], prompts) → B numbers, as a
    tensor, an array or a list.

    Pictures are fp32 on the run's device, some of an iteration's at a time. With `video: true` it gets videos [B, F, 3,
    H, W] whole. In a parameter `metadata` it gets the prompts' rows, a dict each, in `sources` their source
    pictures, a list of PIL pictures each, and in `source_videos` the frames of their source videos, as many as the
    model reads, or None. With `group: true` it is called once for each prompt, with all of its
    pictures. `timeout`: seconds after which a call is left to itself, in a thread that nothing can end, and its
    pictures have no score; null: it may take as long as it likes.
    """

    def __init__(
        self,
        file: str,
        function: str = "score",
        video: bool = False,
        timeout: Seconds | None = None,
        group: bool = False,
    ) -> None:
        if os.environ.get(ALLOW) != "1":
            raise UserError(
                f"reward python runs the code in {file}: if you trust it, pass --allow-python or set {ALLOW}=1"
            )
        self.path, self.takes_video = local(file, "reward python: file"), video
        self.function, self.timeout, self.groupwise = self._load(function), timeout, group
        self._rows = {name: rows for name, rows in _ROWS.items() if name in _parameters(self.function)}

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        if self.timeout is None:
            return self._score(pictures, prompts)
        stream = torch.cuda.current_stream(pictures.device) if pictures.device.type == "cuda" else None
        found: Future[Tensor] = Future()

        def work() -> None:  # a thread has its own device, stream and gradient mode
            try:
                with torch.no_grad(), torch.cuda.stream(stream):
                    found.set_result(self._score(pictures, prompts))
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=work, name="reward python", daemon=True).start()
        try:
            return found.result(self.timeout)
        except TimeoutError:
            trouble = f"gave nothing within {self.timeout:g} s (timeout) and is left to itself"
            raise RewardError(f"reward python: {self.path} {trouble}", asked_again=True) from None

    def _score(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        try:
            with _no_way_out():
                together = groups_of(prompts) if self.groupwise else [slice(0, len(prompts))]
                return torch.cat([self._ask(pictures[some], prompts[some]) for some in together])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if is_out_of_memory(error):  # fewer pictures at a time may fit
                raise
            raise RewardError(self._failed(error)) from error

    def _ask(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        more = {name: rows(prompts) for name, rows in self._rows.items()}
        # what it changes is its own
        return _numbers(self.function(pictures.clone(), [str(prompt) for prompt in prompts], **more), len(prompts))

    def _load(self, function: str) -> Callable[[Tensor, list[str]], Any]:
        spec = importlib.util.spec_from_file_location(f"flowgrove_reward_{self.path.stem}", self.path)
        if spec is None or spec.loader is None or not self.path.is_file():
            raise UserError(
                f"reward python: file {self.path} is not a Python file: write the path of one that ends in .py"
            )
        module = importlib.util.module_from_spec(spec)
        try:
            with _no_way_out():
                spec.loader.exec_module(module)
                found = getattr(module, function, None)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(self._failed(error)) from error
        if not callable(found):
            defined = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            near = difflib.get_close_matches(function, defined, n=1) or defined[:1]
            raise UserError(
                f"reward python: {self.path} has no function {function}: "
                + (f"did you mean {near[0]}?" if near else "define one")
            )
        return found

    def _failed(self, error: BaseException) -> str:
        """One line that says where in the file it happened."""
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)
        ]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"{self.path}, line {line}" if line else str(self.path)
        try:
            text = one_line(str(error), 200)
        except Exception:  # an exception of its own may not even have a text
            text = ""
        return f"reward python: {where}: {type(error).__name__}: {text}"


def _parameters(function: Callable[..., Any]) -> list[str]:
    """The names that a function takes; none of one that has no signature."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _numbers(scores: Any, count: int) -> Tensor:
    """What a function returned, as float64 [count] on the CPU. Raises TypeError or ValueError that says what it is."""
    wanted = f"return {count} numbers, as a tensor, an array or a list"
    if isinstance(scores, str | bytes | dict | set) or not hasattr(scores, "__len__"):
        raise TypeError(f"it returned {type(scores).__name__}: {wanted}")
    shape = list(getattr(scores, "shape", (len(scores),)))
    if shape != [count]:
        raise ValueError(f"it returned {type(scores).__name__} of shape {shape}: {wanted}")
    host = to_host(torch.as_tensor(scores).detach())
    if host.is_complex() or host.shape != (count,):
        raise ValueError(f"it returned {host.dtype} of shape {list(host.shape)}: {wanted}")
    return torch.tensor(host.double().tolist(), dtype=torch.float64)


_guarded: dict[int, int] = {}  # threads, and the process that each is one of
_guarding = threading.Lock()


def _refusing(name: str) -> Callable[..., None]:
    def leave(*arguments: Any) -> None:
        if _guarded.get(threading.get_ident()) != os.getpid():  # another thread, or a child that the function forked
            _EXITS[name](*arguments)
        raise SystemExit(f"it called os.{name}")

    return leave


_REFUSED = {name: _refusing(name) for name in _EXITS}


@contextmanager
def _no_way_out() -> Iterator[None]:
    """Inside it this thread's os._exit and os.abort raise SystemExit: they would end the run without a word. Several
    threads may be inside, those that were left to themselves too.
    """
    thread = threading.get_ident()
    with _guarding:
        _guarded[thread] = os.getpid()
        for name, refused in _REFUSED.items():
            setattr(os, name, refused)
    try:
        yield
    finally:
        with _guarding:
            del _guarded[thread]
            if not _guarded:
                for name, function in _EXITS.items():
                    setattr(os, name, function)
