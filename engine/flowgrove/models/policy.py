"""The policy: an adapter with trainable weights, guidance, precision and micro-batches. Rollout and update see only
this.

Whatever trains has fp32 master weights; with model.dtype bf16 the passes run under autocast on bf16 copies of them,
frozen weights are stored in bf16.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import TaylorSeerCacheConfig
from torch import Tensor, nn

from flowgrove.device import allocated_memory, to_device
from flowgrove.errors import UserError
from flowgrove.models.attention import use_attention
from flowgrove.models.compiling import compile_blocks
from flowgrove.models.conditioning import Conditioning, padded_length
from flowgrove.models.float64 import keep_float64
from flowgrove.models.loading import load_model
from flowgrove.models.masters import Masters
from flowgrove.models.trainable import choose_trainable
from flowgrove.passes.budget import PassBudget
from flowgrove.passes.out_of_memory import FEWER_SAMPLES, Shrink, retry_smaller
from flowgrove.passes.packing import Ints
from flowgrove.passes.recordings import Recordings
from flowgrove.recipe.schema import Cache, Recipe

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}  # engine.token_budget: auto


def tokens_per_pass(recipe: Recipe, device_type: str) -> int:
    """Tokens that a pass may hold."""
    budget = recipe.engine.token_budget
    return _TOKENS_PER_PASS[device_type] if budget == "auto" else budget


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: texts, their conditioning [P], and the unconditional one [1] where guidance needs it; on the
    host [P], `lengths` of the texts in tokens, and `tokens` that a row of each costs, picture and text, both rows of
    guidance.
    """

    texts: list[str]
    cond: Conditioning
    uncond: Conditioning | None
    lengths: Ints
    tokens: Ints

    def __len__(self) -> int:
        return len(self.texts)

    def unguided(self) -> "Prompts":
        """The same for passes without guidance."""
        return self if self.uncond is None else Prompts(self.texts, self.cond, None, self.lengths, self.tokens // 2)

    def longest(self, prompts: Ints) -> int:
        """Tokens of the longest text of these prompts."""
        return int(self.lengths[prompts].max())

    def __getitem__(self, some: slice) -> "Prompts":
        return Prompts(self.texts[some], self.cond[some], self.uncond, self.lengths[some], self.tokens[some])


class Velocity(NamedTuple):
    """v [B, ...], and the unconditional velocity with the scale γ where the fused ops are to guide:
    v_u + γ(v − v_u).
    """

    v: Tensor
    uncond: Tensor | None = None
    scale: float | None = None


class Policy:
    """Raises UserError for a missing or unsuitable model folder. `texts`: prompts that will be asked for; None:
    only weights will.
    """

    def __init__(self, recipe: Recipe, device: torch.device, texts: Iterable[str] | None = ()) -> None:
        model = recipe.model
        self.device = device
        self.compute_dtype = COMPUTE_DTYPES[model.dtype]
        self.state_dtype = torch.float64 if model.dtype == "fp64" else torch.float32
        self.guidance_scale = model.guidance_scale
        if model.dtype == "fp64" and model.adapter != "sd3":
            raise UserError(
                f"model.dtype is fp64: the {model.adapter} transformer computes positions and norms in fp32; write fp32"
            )
        if model.dtype == "fp32":  # TF32 would make a state's velocity depend on its batch
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.adapter, self.encoder = load_model(recipe, device, self.compute_dtype, texts)
        self.transformer = self.adapter.transformer
        use_attention(self.adapter, recipe.engine.attention, model, device)
        self._reference: Any = None
        self.caches = False
        self._check_cheaper_forwards(recipe)
        self._tuned = True  # False while the reference model runs
        self._masters: Masters | None = None
        self._prepare_weights(recipe)
        if self.compute_dtype == torch.bfloat16 and texts is not None:
            self._masters = Masters(self.transformer, self.compute_dtype)
        self._first_trained = next(iter(self.trainable().values()))
        if recipe.engine.compile:
            compile_blocks(self.transformer)
        self._samples_per_decode = self.adapter.samples_per_decode(device.type)
        self.budget = PassBudget(
            tokens_per_pass(recipe, device.type),
            max(self.sized(sized).adapter.geometry.tokens for sized in recipe.at_sizes()),
        )
        if recipe.engine.cuda_graphs and device.type != "cuda":
            raise UserError(f"engine.cuda_graphs is true, but the run is on a {device.type}: write false")
        self.recordings = Recordings(device) if recipe.engine.cuda_graphs else None
        self.bytes_when_loaded = allocated_memory(device)  # with the models of rewards, which are loaded before it

    def _prepare_weights(self, recipe: Recipe) -> None:
        lora = recipe.model.lora
        if self.state_dtype == torch.float64:
            keep_float64(self.transformer)
        if lora is None and (recipe.update.kl_weight > 0 or recipe.run.eval.tuned_share < 1):
            self._reference = copy.deepcopy(self.transformer).requires_grad_(False).to(self.compute_dtype)
        choose_trainable(self.transformer, lora, self.adapter.lora_targets, recipe.run.seed)
        master = self.state_dtype
        for parameter in self.trainable().values():
            parameter.data = parameter.data.to(master)
        if recipe.model.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def _check_cheaper_forwards(self, recipe: Recipe) -> None:
        if recipe.rollout.guidance_range is not None and not self.doubles:
            why = (
                "the model takes guidance as an input"
                if self.adapter.embeds_guidance
                else f"model.guidance_scale is {self.guidance_scale:g}"
            )
            raise UserError(f"rollout.guidance_range: {why}, so that no step has a second pass to leave out: remove it")
        if recipe.rollout.cache is not None and not hasattr(self.transformer, "enable_cache"):
            raise UserError(
                f"rollout.cache: diffusers has no cache for the {recipe.model.adapter} transformer: remove it"
            )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → master weight, in the transformer's order. Whoever changes one calls `refresh`."""
        masters = self._masters.of if self._masters is not None else {}
        return {name: masters.get(name, p) for name, p in self.transformer.named_parameters() if p.requires_grad}

    def drop_gradients(self) -> None:
        """Drops the gradients of masters, and of copies where a backward has failed on its way."""
        self.transformer.zero_grad(set_to_none=True)
        for master in self._masters.of.values() if self._masters is not None else ():
            master.grad = None

    def refresh(self) -> None:
        """The weights that passes read follow the masters."""
        if self._masters is not None:
            self._masters.refresh()

    def sized(self, recipe: Recipe) -> "Policy":
        """This policy at the height and width of `recipe`: the same weights and the same budget. Raises UserError."""
        if recipe.model.sizes is None:
            return self
        other = copy.copy(self)
        other.adapter = self.adapter.sized(recipe.model)
        other._samples_per_decode = other.adapter.samples_per_decode(self.device.type)
        return other

    def encode(self, texts: list[str]) -> Prompts:
        """Each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        rows = to_device(torch.tensor([place[text] for text in texts]), self.device)
        whole = self.encoder([*distinct, self.adapter.uncond_text] if self.doubles else distinct)
        cond, uncond = whole[rows], whole[len(distinct) :].without_padding() if self.doubles else None
        lengths, size = cond.lengths(), self.adapter.geometry
        longer = lengths if uncond is None else np.maximum(lengths, uncond.lengths())
        # what a pass need not pad, it need not run
        beside = padded_length(longer) if self.adapter.masks_prompts else np.full_like(lengths, size.text_tokens)
        return Prompts(texts, cond, uncond, lengths, (size.picture_tokens + beside) * (1 if uncond is None else 2))

    def forget_recordings(self) -> None:
        """Gives the memory of recorded passes back."""
        if self.recordings is not None:
            self.recordings.clear()

    @property
    def weights_in_use(self) -> tuple[int, ...]:
        """Names what a pass would run on now: the size, and the trained weights,
        their average or the reference model.
        """
        return (
            id(self.adapter.geometry),
            id(self.adapter.transformer),
            self._first_trained.data_ptr() if self._tuned else 0,
        )

    @property
    def doubles(self) -> bool:
        """Whether guidance needs an unconditional velocity, two rows for one."""
        return self.adapter.needs_uncond(self.guidance_scale)

    def velocity(
        self, x: Tensor, sigma: Tensor, prompts: Prompts, prompt_of: Tensor, longest: int | None = None
    ) -> Velocity:
        """One pass: x [B, ...] at σ [B], row b for prompt prompt_of[b]; with guidance, one forward of 2B rows.
        `longest`: the pass's longest text.
        """
        with self._precision():
            cond = prompts.cond[prompt_of].trimmed(longest)
            if prompts.uncond is None:
                return Velocity(self.adapter.velocity(x, sigma, cond, self.guidance_scale))
            both = Conditioning.cat([cond, prompts.uncond[torch.zeros_like(prompt_of)]])
            v, uncond = self.adapter.velocity(
                torch.cat([x, x]), torch.cat([sigma, sigma]), both, self.guidance_scale
            ).chunk(2)
        guided = self.adapter.guide(v.to(self.state_dtype), uncond.to(self.state_dtype), self.guidance_scale)
        return Velocity(v, uncond, self.guidance_scale) if guided is None else Velocity(guided)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model as it was before training, inside the block: LoRA switched off, or the frozen copy."""
        adapters_off = self._reference is None
        self._tuned = False
        if adapters_off:
            self.transformer.disable_adapters()
        else:
            self.adapter.transformer = self._reference
        try:
            yield
        finally:
            self._tuned = True
            self.adapter.transformer = self.transformer
            if adapters_off:
                self.transformer.enable_adapters()

    @contextmanager
    def caching(self, cache: Cache) -> Iterator[None]:
        """Inside the block the attention layers of some steps are extrapolated from the steps before,
        each pass under its `cache_name`.
        """
        config = TaylorSeerCacheConfig(
            cache_interval=cache.interval, disable_cache_before_step=cache.order + 1, max_order=cache.order,
            taylor_factors_dtype=self.compute_dtype,
            cache_identifiers=[r"(single_)?(transformer_)?blocks\.\d+\.attn\d?"],
        )  # fmt: skip
        self.transformer.enable_cache(config)
        self.caches = True
        try:
            yield
        finally:
            self.caches = False
            self.transformer.disable_cache()

    def cache_name(self, name: str) -> AbstractContextManager[object]:
        """The passes of one name are successive steps of the same rows."""
        context: AbstractContextManager[object] = self.transformer.cache_context(name) if self.caches else nullcontext()
        return context

    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], or videos [B, F, 3, H, W], in [0, 1] on the device."""
        return retry_smaller(lambda: self._decode(x), Shrink({FEWER_SAMPLES: self._decode_fewer}))

    def _decode(self, x: Tensor) -> Tensor:
        parts = x.split(self._samples_per_decode)
        first = self.adapter.decode(parts[0])
        if len(parts) == 1:
            return first
        whole = first.new_empty(len(x), *first.shape[1:])  # filled part by part: never held twice
        for start, part in zip(range(0, len(x), len(parts[0])), parts, strict=True):
            whole[start : start + len(part)] = first if start == 0 else self.adapter.decode(part)
        return whole

    def _decode_fewer(self) -> bool:
        several = self._samples_per_decode > 1
        self._samples_per_decode = max(1, self._samples_per_decode // 2)
        return several

    @contextmanager
    def guided_by(self, scale: float | None) -> Iterator[None]:
        """Another guidance scale inside the block (None: the recipe's), for evaluation."""
        kept = self.guidance_scale
        self.guidance_scale = kept if scale is None else scale
        try:
            yield
        finally:
            self.guidance_scale = kept

    def _precision(self) -> AbstractContextManager[object]:
        if self.compute_dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()
