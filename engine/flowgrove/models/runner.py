"""What runs the passes of a policy: how large they are, CUDA graphs of them, cached attention. Rollout, update,
evaluation and tuning are handed one, and every pass of a run goes through it.
"""

import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, Self

from diffusers import TaylorSeerCacheConfig
from torch import Tensor, nn

from flowgrove.errors import UserError
from flowgrove.models.adapter import PIXELS_PER_DECODE
from flowgrove.models.compiling import eager_blocks
from flowgrove.models.experts import parts_of
from flowgrove.models.policy import Policy, Velocity
from flowgrove.models.prompts import Prompts
from flowgrove.passes.budget import PassBudget
from flowgrove.passes.out_of_memory import FEWER_SAMPLES, Shrink, retry_smaller
from flowgrove.passes.packing import Ints
from flowgrove.passes.recordings import Recordings, Tensors
from flowgrove.recipe.schema import Cache, Recipe
from flowgrove.spans import DECODE, span

CACHED_ATTENTION = r"(single_|vace_)?(transformer_)?blocks\.\d+\.attn\d?"  # the layers that rollout.cache extrapolates
_TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}  # engine.token_budget: auto


def tokens_per_pass(recipe: Recipe, device_type: str) -> int:
    """Tokens that a pass may hold."""
    budget = recipe.engine.token_budget
    return _TOKENS_PER_PASS[device_type] if budget == "auto" else budget


class PassRunner:
    """Runs passes of a policy, or of others that share its parts. `recordings`: of the rollout's passes; None: each is
    launched.
    """

    def __init__(self, budget: PassBudget, recordings: Recordings | None = None) -> None:
        self.budget, self.recordings = budget, recordings
        self._cached: list[Any] = []  # the transformers whose attention is cached
        self._failed = 0
        self._launches = False  # all, though it could record

    @classmethod
    def of(cls, recipe: Recipe, policy: Policy) -> Self:
        """What a recipe asks for. Raises UserError for a size that the model cannot draw, and CUDA graphs on a CPU."""
        device = policy.device
        row = max(policy.sized(sized).adapter.geometry.tokens for sized in recipe.at_sizes())
        if recipe.engine.cuda_graphs and device.type != "cuda":
            raise UserError(f"engine.cuda_graphs is true, but the run is on a {device.type}: write false")
        budget = PassBudget(tokens_per_pass(recipe, device.type), row, PIXELS_PER_DECODE[device.type])
        return cls(budget, Recordings(device) if recipe.engine.cuda_graphs else None)

    def velocity(
        self, policy: Policy, x: Tensor, sigma: Tensor, prompts: Prompts, prompt_of: Tensor, on_host: Ints | None = None
    ) -> Velocity:
        """One pass, as `Policy.velocity` has it."""
        return policy.velocity(x, sigma, prompts, prompt_of, on_host)

    def decode(self, policy: Policy, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], or videos [B, F, 3, H, W], in [0, 1] on the device, as many together as memory
        allows.
        """
        pixels = policy.adapter.geometry.pixels
        shrink = Shrink({FEWER_SAMPLES: lambda: self.budget.halve_samples(pixels)})
        with span("decode", DECODE, len(x)):
            return retry_smaller(lambda: policy.decode(x, self.budget.samples(pixels)), shrink)

    @property
    def records(self) -> bool:
        """Whether passes without a gradient are recorded; a cache decides on the host what a step computes."""
        return self.recordings is not None and not self._cached and not self._launches

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Inside the block no pass is recorded: for shapes that come too seldom to hold memory for them."""
        before, self._launches = self._launches, True
        try:
            yield
        finally:
            self._launches = before

    def replay(self, policy: Policy, key: Hashable, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        """`function(*inputs)` from a recording (see `Recordings`), which stands for what `policy` is now and `key`."""
        if self.recordings is None:
            raise ValueError("this runner records no passes")
        return self.recordings((policy.weights_in_use, policy.guidance_scale, key), function, inputs)

    @property
    def caches(self) -> bool:
        """Whether the block is one of `caching`."""
        return bool(self._cached)

    @contextmanager
    def caching(self, policy: Policy, cache: Cache) -> Iterator[None]:
        """Inside the block the attention layers of some steps are extrapolated from the steps before, those of an
        expert from its own, each pass under its `cache_name`. Compiled blocks run eagerly: what they compute changes
        from step to step.
        """
        config = TaylorSeerCacheConfig(
            cache_interval=cache.interval, disable_cache_before_step=cache.order + 1, max_order=cache.order,
            taylor_factors_dtype=policy.compute_dtype,
            cache_identifiers=[CACHED_ATTENTION],
        )  # fmt: skip
        transformer = policy.adapter.transformer
        self._cached = parts_of(transformer)
        for part in self._cached:
            part.enable_cache(config)
        try:
            with eager_blocks(transformer):
                yield
        finally:
            cached, self._cached = self._cached, []
            for part in cached:
                part.disable_cache()
                _take_back_forwards(part)

    @contextmanager
    def cache_name(self, name: str) -> Iterator[None]:
        """The passes of one name are successive steps of the same rows; none from before a failure."""
        with ExitStack() as contexts:
            for part in self._cached:
                contexts.enter_context(part.cache_context(f"{name}, attempt {self._failed}"))
            yield

    def forget(self) -> bool:
        """After a pass that had no room: recordings give their memory back, and what caches have taken in no longer
        counts. Returns True, as a remedy for full memory does.
        """
        self._failed += 1
        for part in self._cached:
            part._reset_stateful_cache()
        if self.recordings is not None:
            self.recordings.clear()
        return True


def cached_layers(transformer: nn.Module) -> list[nn.Module]:
    """The layers that rollout.cache extrapolates, of one transformer."""
    return [layer for name, layer in transformer.named_modules() if re.fullmatch(CACHED_ATTENTION, name)]


def _take_back_forwards(transformer: Any) -> None:
    """diffusers' hooks, once removed, leave modules the forward of their class as an attribute of their own, for which
    torch.compile would compile blocks anew.
    """
    for module in transformer.modules():
        own, of_class = vars(module).get("forward"), getattr(type(module), "forward", None)
        if isinstance(own, MethodType) and own.__self__ is module and own.__func__ is of_class:
            delattr(module, "forward")
