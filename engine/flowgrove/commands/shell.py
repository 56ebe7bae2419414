"""How a command begins, speaks and ends."""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import cleandoc
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from flowgrove.errors import UserError, one_line
from flowgrove.paths import local
from flowgrove.process import is_first, rank_here, started

_ON_RANKS = ("train", "sample", "eval")  # commands that several processes of torchrun run together
console = Console(stderr=True, highlight=False, soft_wrap=True)


def register(function: Callable[..., None], group: typer.Typer) -> None:
    """Registers a command of `group`: its user errors are one line and exit code 2, its interruption is exit code 130,
    anything else is one line, a file with the trace, and exit code 1.
    """

    name = function.__name__.rstrip("_")

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if name not in _ON_RANKS and started() > 1:
                raise UserError(f"flowgrove {name} runs in one process, not in {started()}: leave torchrun out")
            function(*args, **_at_home(kwargs))
        except UserError as error:
            _fail(str(error), told=_told_by_the_first_rank(error))
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            hint = "; free some space and give the same command again" if error.errno == errno.ENOSPC else ""
            _fail(f"{place}{error.strerror or error}{hint}")
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, SystemExit) as error:
            from flowgrove.device import is_out_of_memory
            from flowgrove.run.last_resort import tell

            if getattr(error, "elsewhere", False):
                _leave(1)
            if not is_out_of_memory(error):
                _fail(tell(error), 1)
            _fail(
                "the GPU's memory is full: lower engine.token_budget or set model.gradient_checkpointing: "
                "full or offload (a run goes on with any of them), "
                "or begin anew with fewer data.prompts_per_iteration"
            )
        except KeyboardInterrupt as interruption:
            with suppress(OSError):  # the terminal may be gone
                say(f"interrupted{'' if not interruption.args else f' ({interruption})'}")
            _leave(getattr(interruption, "exit_code", 130))

    group.command(name, help=_unwrapped(function.__doc__ or ""))(run)


def allow(python: bool) -> None:
    """Lets rewards named python run files, if `python`."""
    if python:
        os.environ["FLOWGROVE_ALLOW_PYTHON"] = "1"


def say(text: str) -> None:
    """Of several ranks of a run the first one speaks."""
    if is_first():
        console.print(text, markup=False)


def _unwrapped(docstring: str) -> str:
    """Its paragraphs as a line each: the terminal wraps them by itself."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(docstring).split("\n\n"))


def _at_home(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command; in paths `~` is the home folder, as in recipes. Raises UserError."""
    texts = ("resume", "checkpoint")  # paths, or words

    def at_home(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [at_home(name, each) for each in value]
        is_place = isinstance(value, Path) or (name in texts and isinstance(value, str))
        return type(value)(local(value, name)) if is_place else value

    return {name: at_home(name, value) for name, value in given.items()}


def _fail(text: str, code: int = 2, told: bool = False) -> NoReturn:
    if not told:
        console.print(f"[bold red]error:[/] {escape(one_line(text))}")
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the command. A rank of several leaves at once: groups of ranks some of which have gone do not come apart."""
    torch = sys.modules.get("torch")
    if started() > 1 and torch is not None and torch.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    raise typer.Exit(code) from None


def _told_by_the_first_rank(error: UserError) -> bool:
    """Whether another rank has the same error and tells it: all of a machine have until they are joined."""
    if is_first():
        return False
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_initialized()
    return error.everywhere or (not joined and rank_here() != 0)
