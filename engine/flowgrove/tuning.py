"""How large a pass should be: engine.token_budget: auto, on a GPU settled once per run by timing passes of the run's own model.

On a CPU it is a fixed number of tokens, so that runs repeat to the last bit.
"""

import gc
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.memory import predict_memory
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.policy import Policy, Prompts
from flowgrove.plan import make_plan
from flowgrove.recipe import Recipe
from flowgrove.sigmas import recipe_sigmas

NEAR = 0.03  # of the best: what differs less is taken for equally fast
_REPEATS = 3
_log = logging.getLogger("flowgrove")
Key = TypeVar("Key")


class Timed(NamedTuple):
    """Seconds per row of a pass: of the rollout, and of training (forward and backward)."""

    forward: float
    train: float


class Work(NamedTuple):
    """Rows that iteration 0 of a recipe runs through the transformer, all prompts: in the rollout, in training, and the most that stand beside each other."""

    forwards: int
    passes: int
    widest: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Work":
        """Raises UserError for a plan that cannot be made."""
        counts, prompts = make_plan(recipe, 0, recipe_sigmas(recipe)).counts, recipe.data.prompts_per_iteration
        forwards, passes = counts.rollout_forwards, counts.train_passes
        if not recipe.engine.share:
            forwards, passes = counts.unshared_rollout_forwards, counts.unshared_train_passes
        return cls(prompts * forwards, prompts * passes, prompts * counts.leaves)

    def seconds(self, row: Timed) -> float:
        """Predicted, of an iteration's passes."""
        return self.forwards * row.forward + self.passes * row.train


def first_near_best(seconds: Mapping[Key, float]) -> Key:
    """The first of those that take at most NEAR longer than the fastest."""
    best = min(seconds.values())
    return next(key for key, spent in seconds.items() if spent <= (1 + NEAR) * best)


def fastest_rows(measure: Callable[[int], float], most: int) -> int:
    """Rows per pass: of 1, 2, 4, … up to `most` the fewest that are as fast as the fastest. `measure(rows)`: seconds per row.

    Ends where `measure` raises torch.OutOfMemoryError, or a doubling gains less than NEAR. Raises UserError if one row does not fit.
    """
    found: dict[int, float] = {}
    rows = 1
    while rows <= most:
        try:
            found[rows] = measure(rows)
        except torch.OutOfMemoryError:
            break
        if rows > 1 and found[rows] > (1 - NEAR) * found[rows // 2]:
            break
        rows *= 2
    if not found:
        raise no_room()
    return first_near_best(found)


def no_room() -> UserError:
    """What to say where not even a pass of one row fits."""
    return UserError(
        "the GPU's memory does not hold a training pass of one row: set model.gradient_checkpointing: true, give a model.lora, or lower model.height and width"
    )


class Passes:
    """Passes of a policy's transformer on rows of the longest prompt, states and embeddings drawn at random. `tokens`: what a row costs, with guidance both
    of its rows."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.device = policy, policy.device
        self._draw = torch.Generator(policy.device).manual_seed(0)
        size, cond = policy.adapter.geometry, self._longest()
        uncond = self._longest() if policy.doubles else None
        self.tokens = size.tokens * (2 if policy.doubles else 1)
        self.prompts = Prompts([""], cond, uncond, np.array([size.prompt_tokens]), np.array([self.tokens]))

    def states(self, rows: int) -> Tensor:
        """[rows, ...]."""
        return self._normal((rows, *self.policy.adapter.latent_shape), self.policy.state_dtype)

    def velocity(self, x: Tensor) -> Tensor:
        """Of states [B, ...]."""
        sigma = torch.full((len(x),), 0.5, device=self.device)
        return self.policy.velocity(x, sigma, self.prompts, torch.zeros(len(x), dtype=torch.int64, device=self.device)).v

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """A pass of the rollout."""
        self.velocity(x)

    def train(self, x: Tensor) -> None:
        """A training pass. Gradients are left behind."""
        v = self.velocity(x)
        v.backward(torch.ones_like(v))

    def timed(self, rows: int, repeats: int = 1) -> Timed:
        """Medians, after a pass of each kind that is not timed."""
        return Timed(self.seconds_per_row(self.forward, rows, repeats), self.seconds_per_row(self.train, rows, repeats))

    def seconds_per_row(self, run: Callable[[Tensor], object], rows: int, repeats: int = 1) -> float:
        """The median of `run` on `rows` states, after one call that is not timed."""
        x = self.states(rows)
        run(x)
        return statistics.median(self._clock(run, x) for _ in range(repeats)) / rows

    def release(self) -> None:
        """Gives gradients and, on a GPU, what a failed pass and the allocator hold back."""
        self.policy.transformer.zero_grad(set_to_none=True)
        for master in self.policy.trainable().values():
            master.grad = None
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _clock(self, run: Callable[[Tensor], object], x: Tensor) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            run(x)
            return time.perf_counter() - began
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(x)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def _longest(self) -> Conditioning:
        blank = self.policy.adapter.blank(1, self.policy.compute_dtype).tensors
        return Conditioning({name: self._normal(t.shape, t.dtype) if t.is_floating_point() else t.to(self.device) for name, t in blank.items()})

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self._draw)


def settle_token_budget(recipe: Recipe, policy: Policy, stored: int | None) -> None:
    """engine.token_budget: auto: `stored` by the run's checkpoint; else, on a GPU, what was found for this recipe on such a device before, or is found now.

    Raises UserError if a training pass of one row does not fit.
    """
    if recipe.engine.token_budget != "auto":
        return
    if stored is None and policy.device.type == "cuda":
        key = cache_key(recipe, torch.cuda.get_device_name(policy.device))
        stored = cached_budget(key)
        if stored is None:
            stored = measured_budget(recipe, policy)
            cache_budget(key, stored)
    policy.budget.tokens = policy.budget.tokens if stored is None else stored


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    """`recipe` with engine.token_budget settled."""
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"token_budget": tokens})})


def measured_budget(recipe: Recipe, policy: Policy) -> int:
    """Tokens per pass that take the passes of iteration 0 through the policy's model fastest, beside all that a run keeps in memory. Raises UserError."""
    work, passes = Work.of(recipe), Passes(policy)

    def measure(rows: int) -> float:
        passes.release()
        return work.seconds(passes.timed(rows, _REPEATS))

    try:
        beside = room_beside(recipe, policy)
        rows = fastest_rows(measure, work.widest)
        del beside
    except torch.OutOfMemoryError:
        raise no_room() from None
    finally:
        passes.release()
    _log.info("engine.token_budget: auto is %d tokens, %d rows per pass", rows * passes.tokens, rows)
    return rows * passes.tokens


def room_beside(recipe: Recipe, policy: Policy) -> Tensor:
    """As many bytes as a run keeps besides model and gradients: the optimiser's, averages, forest, prompts."""
    memory = predict_memory(recipe, make_plan(recipe, 0, recipe_sigmas(recipe)), policy.device.type)
    size = sum(memory.resident.values()) - memory.loaded - memory.resident["gradients"]
    return torch.empty(size, dtype=torch.uint8, device=policy.device)


def cache_key(recipe: Recipe, device_name: str) -> str:
    """Names what was measured: the recipe without `run`, on this device with this torch."""
    content = [recipe.model_dump(mode="json", exclude={"run"}), torch.__version__, device_name]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached_budget(key: str) -> int | None:
    """Tokens; None if none were written under `key`, or the file cannot be read."""
    tokens = _read_cache().get(key)
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def cache_budget(key: str, tokens: int) -> None:
    """Writes `tokens` down for later runs; a folder that cannot be written costs them the measurement, and is no error."""
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_text(_cache_file(), json.dumps({**_read_cache(), key: tokens}, indent=1) + "\n")
    except OSError as error:
        _log.warning("cannot write %s (%s): the next run measures engine.token_budget again", _cache_file(), error.strerror)


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowgrove" / "budgets.json"


def _read_cache() -> dict[str, Any]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
