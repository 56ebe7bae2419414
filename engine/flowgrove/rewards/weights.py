"""Where a reward's weights lie: a local folder, a file, or a repository in the hub cache. A run downloads nothing: what
is absent is one line to paste.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.hub import cached_snapshot

DType = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """What a reward needs: the option that says where it is, the public repository that has it, the files (patterns;
    `|` between alternatives) and, for the error, how to ask `hf download` for them.
    """

    reward: str
    option: str
    repository: str
    files: tuple[str, ...]
    fetch: str

    def folder(self, place: str) -> Path:
        """The folder that `place`, a folder or a repository of the hub cache, means.
        Raises UserError unless all files are there.
        """
        local = Path(place).expanduser()
        if local.is_dir():
            folder = local
        elif place.count("/") != 1 or place.startswith((".", "~", "/")):  # not the form owner/name
            raise UserError(
                f"reward {self.reward}: {self.option} {place} is not there: "
                f"run `{self._command(self.repository, local)}`"
            )
        else:
            folder = self._cached(place)
        missing = [pattern for pattern in self.files if not _matches(folder, pattern)]
        if missing:
            command = self._command(self.repository, local) if local.is_dir() else self._command(place)
            raise UserError(
                f"reward {self.reward}: {self.option} {place} holds no {missing[0].replace('|', ' or ')}: "
                f"run `{command}`"
            )
        return folder

    def file(self, place: str) -> Path:
        """The one file that `place` is, or that the folder or repository `place` holds."""
        if (local := Path(place).expanduser()).is_file():
            return local
        return _matches(self.folder(place), self.files[0])[0]

    def _cached(self, repository: str) -> Path:
        folder = cached_snapshot(repository)
        if folder is None:
            command = self._command(repository)
            raise UserError(
                f"reward {self.reward} needs {repository}, which is not in the hub cache: run `{command}`, "
                f"or give its folder as {self.option}"
            )
        return folder

    def _command(self, repository: str, folder: Path | None = None) -> str:
        return f"hf download {repository} {self.fetch}" + (f" --local-dir {folder}" if folder else "")


def _matches(folder: Path, pattern: str) -> list[Path]:
    return [path for choice in pattern.split("|") for path in sorted(folder.glob(choice)) if path.is_file()]


def read_json(file: Path, reward: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"reward {reward}: cannot read {file} ({_first_line(error)}): fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"reward {reward}: {file} holds no settings: fetch it again")
    return content


def read_state(file: Path, reward: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file (plain or under `state_dict`), as fp32 on the CPU.
    Runs no code of the file.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own, down to struct.error
        raise UserError(
            f"reward {reward}: {file} is not a file of weights ({_first_line(error)}): fetch it again"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"reward {reward}: {file} holds no table of weights: fetch it again")
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


def misfit(reward: str, place: object, detail: object) -> UserError:
    """The error for weights that were read but are not those of this reward."""
    what = f"no {detail.args[0]}" if isinstance(detail, KeyError) else _first_line(detail)
    return UserError(
        f"reward {reward}: the weights in {place} are not those of this reward ({what}): "
        "fetch them again or correct the path"
    )


def _first_line(text: object) -> str:
    line = (str(text).strip().splitlines() or [type(text).__name__])[0]
    return line if len(line) < 160 else line[:157] + "..."
