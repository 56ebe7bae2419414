"""The policy: an adapter with trainable weights, guidance, precision and micro-batches. Rollout and update see only this.

Whatever trains has fp32 master weights; with model.dtype bf16 the passes run in bf16 under autocast, frozen weights are stored in bf16.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter, Conditioning
from flowgrove.models.float64 import keep_float64
from flowgrove.models.folders import model_folder
from flowgrove.models.sd3 import SD3
from flowgrove.recipe import Recipe

_ADAPTERS = {"sd3": SD3}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}  # engine.token_budget: auto


class Prompts(NamedTuple):
    """Encoded prompts: texts, their conditioning [P], and the unconditional one [1] where guidance needs it."""

    texts: list[str]
    cond: Conditioning
    uncond: Conditioning | None


class Velocity(NamedTuple):
    """v [B, ...], and the unconditional velocity where guidance is on."""

    v: Tensor
    uncond: Tensor | None


class Policy:
    """Raises UserError for a missing or unsuitable model folder."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        model = recipe.model
        self.device = device
        self.compute_dtype = _DTYPES[model.dtype]
        self.state_dtype = torch.float64 if model.dtype == "fp64" else torch.float32
        self.guidance_scale = _unless_one(model.guidance_scale)
        if model.dtype == "fp32":  # TF32 would make a state's velocity depend on its batch
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        folder = model_folder(model)
        diffusers.utils.logging.disable_progress_bar()
        try:
            self.adapter: Adapter = _ADAPTERS[model.adapter](folder, model, device, self.compute_dtype)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"model.path {model.path} does not load as a {model.adapter} pipeline: {' '.join(str(error).split())[:300]}") from None
        self.transformer = self.adapter.transformer
        self._reference: Any = None
        self._prepare_weights(recipe)
        budget = recipe.engine.token_budget
        self.rows_per_pass = max(1, (_TOKENS_PER_PASS[device.type] if budget == "auto" else budget) // self.adapter.tokens)

    def _prepare_weights(self, recipe: Recipe) -> None:
        lora = recipe.model.lora
        if self.state_dtype == torch.float64:
            keep_float64(self.transformer)
        if recipe.update.kl_weight > 0 and lora is None:
            self._reference = copy.deepcopy(self.transformer).requires_grad_(False)
        if lora is None:
            self.transformer.requires_grad_(True)
        else:
            self.transformer.requires_grad_(False)
            config = LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets or list(self.adapter.lora_targets), init_lora_weights="gaussian"
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.run.seed)
                try:
                    self.transformer.add_adapter(config)
                except ValueError as error:
                    raise UserError(f"model.lora.targets: {' '.join(str(error).split())[:300]}") from None
        master = self.state_dtype
        for parameter in self.trainable().values():
            parameter.data = parameter.data.to(master)
        if recipe.model.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → parameter, in the transformer's order."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def encode(self, texts: list[str]) -> Prompts:
        """Each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(text) for text in texts], device=self.device)
        cond = Conditioning.cat([self.adapter.encode(distinct[i : i + self.rows_per_pass]) for i in range(0, len(distinct), self.rows_per_pass)])
        return Prompts(texts, cond[rows], None if self.guidance_scale is None else self.adapter.encode([""]))

    def velocity(self, x: Tensor, sigma: Tensor, prompts: Prompts, prompt_of: Tensor) -> Velocity:
        """One pass: x [B, ...] at σ [B], row b for prompt prompt_of[b]; with guidance, one forward of 2B rows."""
        with self._precision():
            cond = prompts.cond[prompt_of]
            if prompts.uncond is None:
                return Velocity(self.adapter.velocity(x, sigma, cond), None)
            both = Conditioning.cat([cond, prompts.uncond[torch.zeros_like(prompt_of)]])
            v, uncond = self.adapter.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return Velocity(v, uncond)

    def velocity_in_passes(self, x: Tensor, sigma: Tensor, prompts: Prompts, prompt_of: Tensor, most: int | None = None) -> Velocity:
        """`velocity` of any number of rows, in as few passes as the token budget (or `most` rows a pass) allows."""
        parts = [self.velocity(x[rows], sigma[rows], prompts, prompt_of[rows]) for rows in self.passes(len(x), most)]
        return Velocity(torch.cat([p.v for p in parts]), None if parts[0].uncond is None else torch.cat([p.uncond for p in parts if p.uncond is not None]))

    @torch.no_grad()
    def reference_velocity(self, x: Tensor, sigma: Tensor, prompts: Prompts, prompt_of: Tensor) -> Velocity:
        """The untouched model's velocity: LoRA switched off, or the frozen copy."""
        trained, adapters_off = self.adapter.transformer, self._reference is None
        if adapters_off:
            self.transformer.disable_adapters()
        else:
            self.adapter.transformer = self._reference
        try:
            return self.velocity(x, sigma, prompts, prompt_of)
        finally:
            self.adapter.transformer = trained
            if adapters_off:
                self.transformer.enable_adapters()

    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] on the device."""
        with self._precision():
            return torch.cat([self.adapter.decode(x[rows]) for rows in self.passes(len(x))])

    def passes(self, rows: int, most: int | None = None) -> Iterator[slice]:
        """Slices of at most `rows_per_pass` (or `most`) rows that differ by one in length."""
        fit = self.rows_per_pass if self.guidance_scale is None else max(1, self.rows_per_pass // 2)  # guidance runs two rows for one
        count = -(-rows // (most or fit))
        return (slice(rows * i // count, rows * (i + 1) // count) for i in range(count))

    @contextmanager
    def guided_by(self, scale: float | None) -> Iterator[None]:
        """Another guidance scale inside the block (None: the recipe's), for evaluation."""
        kept = self.guidance_scale
        self.guidance_scale = kept if scale is None else _unless_one(scale)
        try:
            yield
        finally:
            self.guidance_scale = kept

    def _precision(self) -> AbstractContextManager[object]:
        if self.compute_dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def _unless_one(scale: float) -> float | None:
    return None if scale == 1.0 else scale
