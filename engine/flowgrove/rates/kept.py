"""What was measured on this machine, kept in the user's cache folder: rates of a device, and seconds of a model's
passes. `flowgrove tune` and `flowgrove profile` write it, `flowgrove plan --time` reads it.

A measurement holds for a device's name, torch's version, and on a CPU the number of threads. What cannot be read is as
if it had never been measured.
"""

import datetime
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowgrove.files import write_text
from flowgrove.machine import describe

_MOST_MODELS = 64  # of a device; the ones measured longest ago go first
_log = logging.getLogger("flowgrove")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)


class Rate(_Entry):
    """FLOPs or bytes per second, and the day on which it was measured."""

    rate: Positive
    date: str


class Passes(_Entry):
    """Seconds of whole passes by what a pass holds: states (with guidance both rows of each), or samples that are
    decoded together; `flops`: of one of them.
    """

    flops: Positive
    seconds: dict[Count, Positive] = Field(min_length=1)


class ModelTimes(_Entry):
    """What was measured of a model. `name`: for people; `architecture`, `size`, `dtype` and `settings`: what it holds
    for, see `flowgrove.plan.identity`; `source`: the command; `passes` by kind: `forward` (of the rollout), `kept` (a
    forward whose graph stays), `backward` (of such a graph, FLOPs with those that checkpointing runs again), `decode`,
    and forwards with rollout.precision and rollout.attention by the name that `cheap_forward` gives them; `update`:
    seconds of an optimiser's step with all that goes with it, over `trained` weights, and `step`: the name of what it
    was; `encode`: of a prompt; `score`: of a picture, by what the rewards are.
    """

    name: str
    architecture: str
    size: str
    dtype: str
    settings: dict[str, str]
    source: str
    date: str
    passes: dict[str, Passes]
    update: Positive | None = None
    trained: Count | None = None
    step: str = ""
    encode: Positive | None = None
    score: dict[str, Positive] = {}


class Rates(_Entry):
    """All that is kept of a device: `matrix` by dtype (bf16, fp32, fp64), `copied`, and models by their key,
    the one measured last at the end.
    """

    device: str
    matrix: dict[str, Rate] = {}
    copied: Rate | None = None
    models: dict[str, ModelTimes] = {}

    def __bool__(self) -> bool:
        return bool(self.models)


def today() -> str:
    """The date of a measurement that is made now."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def place_of(device: torch.device) -> str:
    """What measurements on `device` are kept under."""
    machine = describe(device)
    threads = f", {machine['threads']} threads" if device.type == "cpu" else ""
    return f"{machine['device']}{threads}, torch {machine['torch']}"


def rates_of(device: torch.device) -> Rates:
    """What is kept of a device; nothing where nothing was measured, or the file is damaged."""
    place = place_of(device)
    try:
        return Rates.model_validate(_read().get(place, {"device": place}))
    except ValidationError:
        return Rates(device=place)


def keep_rates(
    device: torch.device,
    matrix: Mapping[str, float] | None = None,
    copied: float | None = None,
    models: Mapping[str, ModelTimes] | None = None,
) -> None:
    """Adds measurements of today to what is kept of a device: FLOPs per second by dtype, bytes per second, models by
    their key. A folder that cannot be written is no error.
    """
    kept = rates_of(device)
    rates = {name: Rate(rate=rate, date=today()) for name, rate in (matrix or {}).items()}
    together = {key: times for key, times in kept.models.items() if key not in (models or {})} | dict(models or {})
    newest = dict(sorted(together.items(), key=lambda item: item[1].date)[-_MOST_MODELS:])
    changed = Rates(
        device=kept.device,
        matrix=kept.matrix | rates,
        copied=kept.copied if copied is None else Rate(rate=copied, date=today()),
        models=newest,
    )
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_text(_file(), json.dumps({**_read(), kept.device: changed.model_dump(mode="json")}, indent=1) + "\n")
    except OSError as error:
        _log.warning("cannot write %s (%s): what was measured is not kept", _file(), error.strerror)


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowgrove" / "rates.json"


def _read() -> dict[str, Any]:
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
