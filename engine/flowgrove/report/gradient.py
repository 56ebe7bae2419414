"""Signal and noise of the gradient over several measurements (`run.gradient_noise_every`): one alone tells little where
an iteration has few prompts, since the mean of what it estimates without bias is what becomes sure.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowgrove.recipe.schema import Recipe
from flowgrove.report.lines import Line
from flowgrove.update.noise_estimates import MOST_GROUPS, jackknife, student

LATEST = 20  # measurements that speak for how the run is now
_SURE = 2  # standard errors
_SPREAD = 5  # measurements whose spread tells by itself how far their mean may be off
_POINTS = 200  # of a curve
_TOLD = ("gradient_signal", "gradient_signal_error", "gradient_noise", "gradient_part", "gradient_leaf_share")


class Pooled(NamedTuple):
    """Means over so many `measurements`, in which an iteration had `prompts`: the squared norm of the expected
    gradient, its standard error without any signal, and the noise of a prompt's gradient. `interval`: half of the 95 %
    interval of `snr`, infinite where it is not known.
    """

    measurements: int
    prompts: float
    signal: float
    error: float
    noise: float
    interval: float

    @property
    def snr(self) -> float:
        """Signal to noise of an iteration's gradient, which may be negative where there is no signal."""
        return self.prompts * self.signal / self.noise

    @property
    def measurable(self) -> bool:
        """Whether there is a signal beyond doubt."""
        return self.signal > _SURE * self.error


def measured(lines: Iterable[Line]) -> list[Line]:
    """The lines that tell of signal and noise."""
    return [line for line in lines if all(isinstance(line.get(name), dict) for name in _TOLD)]


def pooled(recipe: Recipe, lines: list[Line], key: str = "all") -> Pooled | None:
    """Of all steps together, or of one; None: no line tells of it, or there is no noise."""
    found, errors = [], []
    for line in lines:
        told = [line[name].get(key) for name in _TOLD[:3]]
        if all(isinstance(value, int | float) for value in told):
            found.append((recipe.data.prompts_per_iteration - (line.get("dropped_prompts") or 0), *told))
            errors.append(line.get("gradient_snr_error", {}).get(key))
    count = len(found)
    if not count or sum(noise for *_, noise in found) <= 0:
        return None
    prompts, signal, _, noise = (sum(column) / count for column in zip(*found, strict=True))
    error = sum(error**2 for _, _, error, _ in found) ** 0.5 / count
    return Pooled(count, prompts, signal, error, noise, _interval(np.array(found, dtype=np.float64), errors))


def _interval(found: NDArray[np.float64], errors: list[float | None]) -> float:
    """Half of the 95 % interval of the signal to noise of measurements (prompts, signal, error, noise), each with the
    `errors` of its own groups: the wider one of what these and the measurements' spread give.
    """
    count, known = len(found), [error for error in errors if error is not None]
    groups = int(min(MOST_GROUPS, found[:, 0].min()))
    inside, among = math.nan, math.nan
    if len(known) == count and groups > 1:
        inside = student(count * (groups - 1)) * sum(error**2 for error in known) ** 0.5 / count
    if count >= _SPREAD or (count > 1 and math.isnan(inside)):
        prompts, signal, _, noise = (found.sum(0) - found).T
        with np.errstate(divide="ignore", invalid="ignore"):
            among = student(count - 1) * jackknife(prompts / (count - 1) * signal / noise)
    return max((each for each in (inside, among) if math.isfinite(each)), default=math.inf)


def pooled_steps(recipe: Recipe, lines: list[Line]) -> dict[int, Pooled]:
    """Of every step that they tell of."""
    keys = sorted({int(key) for line in lines for key in line["gradient_noise"] if key != "all"})
    return {key: found for key in keys if (found := pooled(recipe, lines, str(key))) is not None}


def noise_shares(steps: dict[int, Pooled]) -> dict[int, float]:
    """The steps' shares in the noise of all of them, which noise that steps have in common does not enter."""
    whole = sum(one.noise for one in steps.values())
    return {step: one.noise / whole for step, one in steps.items()}


def leaf_share(lines: list[Line]) -> float | None:
    """The share of the noise that comes from the leaves and not from the prompts, in the mean, between 0 and 1."""
    known = [share for line in lines if (share := line["gradient_leaf_share"].get("all")) is not None]
    return min(1.0, max(0.0, sum(known) / len(known))) if known else None


def gradient_content(recipe: Recipe, lines: list[Line], before: list[float]) -> dict[str, Any]:
    """What the page draws: by step the signal to noise with half of its 95 % interval, and the shares of signal and
    noise in the latest measurements; and over the run that of all steps. `before`: the seconds before every line.
    """
    found = measured(lines)
    latest = found[-LATEST:]
    steps, whole = pooled_steps(recipe, latest), pooled(recipe, latest)
    shares = noise_shares(steps)
    seconds = {line["iteration"]: before[place] for place, line in enumerate(lines)}
    over: list[tuple[float, ...]] = []
    each = max(1, -(-len(found) // _POINTS))
    for end in range(len(found), 0, -each):
        some = pooled(recipe, found[max(0, end - LATEST) : end])
        if some is not None and math.isfinite(some.interval):
            at = found[end - 1]["iteration"]
            over.append((at, seconds[at], some.snr, some.interval))
    over.reverse()
    return {
        "steps": list(steps),
        "snr": [one.snr for one in steps.values()],
        "interval": [one.interval if math.isfinite(one.interval) else None for one in steps.values()],
        "noise": [shares[step] for step in steps],
        "signal": [_part(latest, step) for step in steps] if whole is not None and whole.measurable else [],
        "over": {
            name: [point[place] for point in over]
            for place, name in enumerate(("iteration", "seconds", "snr", "interval"))
        },
    }


def _part(lines: list[Line], step: int) -> float:
    """The step's share in the signal of all."""
    parts = sum(line["gradient_part"].get(str(step)) or 0 for line in lines)
    whole: float = sum(line["gradient_signal"].get("all") or 0 for line in lines)
    return parts / whole
