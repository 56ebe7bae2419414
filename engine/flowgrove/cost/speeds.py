"""How long a pass takes: as measured on this machine, or at a stated share of a published peak rate.

What was measured is a curve, seconds over the FLOPs of a pass, since small passes do not fill a device: between two
measured passes a straight line, beyond them the utilisation of the nearest. So times of one model serve another one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from flowgrove.cost.passes import Pass
from flowgrove.errors import UserError
from flowgrove.models.families import family_of
from flowgrove.plan.flops import Flops
from flowgrove.plan.identity import Identity
from flowgrove.plan.optimizer_step import OptimizerStep
from flowgrove.rates.kept import ModelTimes, Passes, Rates
from flowgrove.rates.published import Device
from flowgrove.recipe.schema import Recipe


class Speeds(Protocol):
    """Seconds of what a run does; None where they are not known. `rests_on`: a line for every number's origin;
    `knows_cheap`: whether cheap passes are charged as such, and not as forwards.
    """

    rests_on: dict[str, str]
    knows_cheap: bool

    def passes(self, one: Pass, flops: Flops) -> float:
        """A pass of the transformer."""
        ...

    def decode(self, samples: int, flops: Flops) -> float | None:
        """Decoding so many samples together."""
        ...

    def encode(self, flops: Flops) -> float | None:
        """Encoding a prompt."""
        ...

    def update(self, trained: int) -> float | None:
        """An optimiser's step over so many weights."""
        ...

    def score(self, key: str) -> float | None:
        """Scoring a picture by the rewards of `key`."""
        ...

    def matrix_rate(self) -> float | None:
        """FLOPs per second that utilisation is a share of."""
        ...


_PARTS = ("train", "half")  # kinds that are a forward and a backward


def flops_of(one: Pass, flops: Flops) -> int:
    """FLOPs of a pass as it runs."""
    of_a_row = {
        "extrapolated": flops.extrapolated,
        "reference": flops.reference,
        "backward": flops.backward + flops.recomputed,
    }
    if one.kind in _PARTS:
        return sum(flops_of(part, flops) for part in _parts(one))
    return one.states * one.rows * of_a_row.get(one.kind, flops.forward)


def _parts(one: Pass) -> tuple[Pass, Pass]:
    """A training pass as forward and backward, which runs through all of a state's rows or, of a half, through one."""
    return one._replace(kind="kept"), Pass("backward", one.states, 1 if one.kind == "half" else one.rows)


def seconds_at(curve: Passes, flops: float) -> float:
    """Seconds of a pass of so many FLOPs."""
    points = sorted((states * curve.flops, seconds) for states, seconds in curve.seconds.items())
    below = [point for point in points if point[0] <= flops]
    above = [point for point in points if point[0] >= flops]
    if not below or not above:
        nearest = points[0] if not below else points[-1]
        return nearest[1] * flops / nearest[0]
    (x, t), (x_next, t_next) = below[-1], above[0]
    return t if x_next == x else t + (t_next - t) * (flops - x) / (x_next - x)


class Found(NamedTuple):
    """A model whose measurements serve, and how near it is to the one that is asked for."""

    times: ModelTimes
    relation: str
    distance: tuple[float, ...]


class Measured:
    """By what was measured on this machine: of this very model where it was, else of the nearest one in the same
    dtype. `cheap`: the name that `cheap_forward` gives; such a pass takes the share of a forward that it was measured
    to take. Raises UserError where nothing was measured.
    """

    def __init__(self, rates: Rates, identity: Identity, flops: Flops, cheap: str | None = None) -> None:
        self.rates, self.identity = rates, identity
        self.rests_on: dict[str, str] = {}
        # from the newest on, which the stable order keeps where two are as near
        alike = [times for times in reversed(rates.models.values()) if times.dtype == identity.dtype]
        self._models = sorted((self._near(times, flops) for times in alike), key=lambda found: found.distance)
        self._curves = {
            kind: self._curve(kind, name)
            for kind, name in (
                ("forward", "rollout"), ("kept", "rollout"), ("backward", "update"), ("decode", "decode"),
            )
        }  # fmt: skip
        if self._curves["forward"] is None or self._curves["backward"] is None:
            raise UserError(
                f"no {identity.dtype} model was measured on this machine ({rates.device}): run `flowgrove tune` on the "
                "recipe first, or give --device"
            )

        self._cheap = next((one for one in self._models if {cheap, "forward"} <= {*one.times.passes}), None)
        self._cheap_name, self.knows_cheap = cheap or "", self._cheap is not None
        if self._cheap is not None:
            self._tell(self._cheap_name, self._cheap)

    def _near(self, times: ModelTimes, flops: Flops) -> Found:
        same = times.architecture == self.identity.architecture
        size, settings = times.size == self.identity.size, times.settings == self.identity.settings
        forward = times.passes.get("forward")
        far = abs(math.log(forward.flops / (flops.doubled * flops.forward))) if forward else math.inf
        relation = (
            "another model" if not same
            else "this architecture at another size or guidance" if not size
            else "this model with other settings" if not settings
            else "this model"
        )  # fmt: skip
        return Found(times, relation, (not same, not size, not settings, far))

    def _curve(self, kind: str, stage: str) -> Passes | None:
        for found in self._models:
            if kind in found.times.passes:
                self._tell(stage, found)
                return found.times.passes[kind]
        return None

    def _tell(self, stage: str, found: Found) -> None:
        times = found.times
        which = found.relation if found.relation == "this model" else f"{found.relation} ({times.name})"
        self.rests_on[stage] = f"{which}, measured by {times.source} on {times.date}"

    def passes(self, one: Pass, flops: Flops) -> float:
        """A pass of the transformer."""
        forward, kept, backward = (self._curves[kind] for kind in ("forward", "kept", "backward"))
        if forward is None or backward is None:
            raise ValueError("nothing was measured")  # which the constructor has told
        if one.kind in _PARTS:
            return sum(self.passes(part, flops) for part in _parts(one))
        if one.kind == "cheap" and self._cheap is not None:
            there, work = self._cheap.times.passes, flops_of(one, flops)
            share = seconds_at(there[self._cheap_name], work) / seconds_at(there["forward"], work)
            return share * seconds_at(forward, work)
        curve = {"kept": kept or forward, "backward": backward}.get(one.kind, forward)
        return seconds_at(curve, flops_of(one, flops))

    def decode(self, samples: int, flops: Flops) -> float | None:
        """Decoding so many samples together."""
        curve = self._curves["decode"]
        return None if curve is None else seconds_at(curve, samples * flops.decode)

    def encode(self, flops: Flops) -> float | None:
        """Encoding a prompt: as measured of this architecture, else at the utilisation of a full forward."""
        if (seconds := self._of_this("encode", lambda times: times.encode)) is not None:
            return seconds
        forward = self._curves["forward"]
        if flops.encode is None or forward is None:
            return None
        self.rests_on["encode"] = "the utilisation of the largest forward measured"
        most = max(forward.seconds)
        return flops.encode * forward.seconds[most] / (most * forward.flops)

    def update(self, trained: int) -> float | None:
        """An optimiser's step: as the same one was measured of this architecture, in proportion to the weights, else by
        its bytes at the measured copy rate.
        """
        step = self.identity.step

        def in_proportion(times: ModelTimes) -> float | None:
            if times.update is None or times.trained is None or times.step != step.name:
                return None
            return times.update * trained / times.trained

        if (seconds := self._of_this("optimiser", in_proportion)) is not None:
            return seconds
        if self.rates.copied is None:
            return None
        each = step.bytes_per_weight
        self.rests_on["optimiser"] = f"{each} bytes a trained weight at the copy rate of {self.rates.copied.date}"
        return each * trained / self.rates.copied.rate

    def _of_this(self, stage: str, value: Callable[[ModelTimes], float | None]) -> float | None:
        for found in self._models:
            if found.times.architecture == self.identity.architecture and (seconds := value(found.times)) is not None:
                self._tell(stage, found)
                return seconds
        return None

    def score(self, key: str) -> float | None:
        """Scoring a picture by the rewards of `key`, as measured last, beside whichever model."""
        for times in reversed(self.rates.models.values()):
            if key in times.score:
                self.rests_on["rewards"] = f"these rewards, measured by {times.source} on {times.date}"
                return times.score[key]
        return None

    def matrix_rate(self) -> float | None:
        """FLOPs per second that a large product of the model's dtype was measured to reach."""
        rate = self.rates.matrix.get(self.identity.dtype)
        return None if rate is None else rate.rate


class Published:
    """At a share `utilisation` of a device's published peak rates. Raises UserError for a dtype without one."""

    knows_cheap = False  # what share of a rate for 8 bits a transformer reaches is not published

    def __init__(self, device: Device, recipe: Recipe, utilisation: float) -> None:
        self.device, self.utilisation, self._step = device, utilisation, OptimizerStep.of(recipe)
        dtype = recipe.model.dtype
        if dtype not in device.matrix:
            known = ", ".join(device.matrix)
            raise UserError(f"model.dtype is {dtype}, of which no rate of {device.name} is known: known are {known}")
        self._rate = device.matrix[dtype]
        # a VAE that stays in fp32 beside a bf16 transformer: torch convolves in TF32, at half the rate of bf16
        in_tf32 = dtype == "bf16" and family_of(recipe.model.adapter).vae_dtype is not None
        self._decode_rate = self._rate / 2 if in_tf32 else self._rate
        share = f"{utilisation:.0%} of {self._rate / 1e12:g} TFLOP/s ({dtype}, dense, published)"
        self.rests_on = {"passes, decode and encode": share} | (
            {"decode": "the same share of half that rate (TF32)"} if in_tf32 else {}
        )

    def passes(self, one: Pass, flops: Flops) -> float:
        """A pass of the transformer."""
        return flops_of(one, flops) / (self.utilisation * self._rate)

    def decode(self, samples: int, flops: Flops) -> float:
        """Decoding so many samples together."""
        return samples * flops.decode / (self.utilisation * self._decode_rate)

    def encode(self, flops: Flops) -> float | None:
        """Encoding a prompt."""
        return None if flops.encode is None else flops.encode / (self.utilisation * self._rate)

    def update(self, trained: int) -> float:
        """An optimiser's step, by its bytes at the published rate of the memory."""
        each = self._step.bytes_per_weight
        self.rests_on["optimiser"] = f"{each} bytes a trained weight at {self.device.copied / 1e9:g} GB/s (published)"
        return each * trained / self.device.copied

    def score(self, key: str) -> None:
        """Not known."""

    def matrix_rate(self) -> float:
        """The published peak."""
        return self._rate
