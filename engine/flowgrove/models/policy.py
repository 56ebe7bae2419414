"""The policy: an adapter with its weights, encoder, guidance and precision, as one value without state.

What runs its passes is `runner.PassRunner`, what trains `weights.Weights`. With model.dtype bf16 the passes run under
autocast, frozen weights are stored in bf16.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from flowgrove.data.prompt import conditional, unconditional
from flowgrove.device import allocated_memory, to_device, to_host
from flowgrove.models.adapter import Adapter
from flowgrove.models.attention import check_attention, use_attention
from flowgrove.models.checks import check_family, check_guidance_and_cache
from flowgrove.models.compiling import compile_blocks
from flowgrove.models.conditioning import Conditioning, padded_length
from flowgrove.models.embeddings import Encoder
from flowgrove.models.families import read_geometry
from flowgrove.models.folders import model_folder
from flowgrove.models.loading import encode_together, is_rounded_alone, load_model
from flowgrove.models.prompts import Prompts
from flowgrove.models.quantised import Precision
from flowgrove.models.weights import Weights
from flowgrove.passes.packing import Ints, runs_of_equal
from flowgrove.ranks import Ranks
from flowgrove.recipe.schema import Expert, Recipe
from flowgrove.spans import span

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Velocity(NamedTuple):
    """v [B, ...], and the unconditional velocity with the scale γ where the fused ops are to guide:
    v_u + γ(v − v_u).
    """

    v: Tensor
    uncond: Tensor | None = None
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class Policy:
    """Prompts in, velocity and pictures out, at one size and one guidance scale. Made by `load`; `sized`, `guided_by`
    and `reference` give another policy that shares its parts.
    """

    adapter: Adapter
    encoder: Encoder
    weights: Weights
    device: torch.device
    compute_dtype: torch.dtype
    guidance_scale: float
    negative_prompt: str  # of prompts that have none of their own
    bytes_when_loaded: int = 0  # on the device, with the models of rewards, which are loaded before it
    tuned: bool = True  # False: the reference model
    trains_unconditional: bool = True  # False: a constant in the gradient
    halves_apart: bool = False  # both halves of guidance in forwards of their own
    guidance_norm: float | None = None  # the most times the norm of v that a guided velocity may have
    precision: Precision | None = None  # of linear layers, where they are rounded
    low_guidance_scale: float | None = None  # of the low-noise expert; None: the same
    splits_lengths: bool = False  # rows of different lengths run apart, without masks

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        device: torch.device,
        texts: Iterable[str] | None = (),
        ranks: Ranks | None = None,
        trains: bool = True,
    ) -> "Policy":
        """The policy of a recipe. `texts`: prompts that will be asked for; None: only weights will. `ranks`: may
        divide the transformer's weights. `trains` False: it only draws, and has no masters.

        Raises UserError for a missing or unsuitable model folder.
        """
        model, compute = recipe.model, COMPUTE_DTYPES[recipe.model.dtype]
        check_family(recipe)
        if model.dtype == "fp32":  # TF32 would make a state's velocity depend on its batch
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        divided = ranks is not None and ranks.mesh is not None
        on_host = divided or model.base_precision is not None
        if not trains and texts is not None:
            on_host = on_host or is_rounded_alone(recipe, compute)
        adapter, encoder = load_model(recipe, device, compute, texts, on_host)
        use_attention(adapter, recipe.engine.attention, model, device, recipe.engine.split_lengths)
        check_guidance_and_cache(recipe, adapter)
        passes = texts is not None
        weights = Weights(recipe, adapter.transformer, adapter.lora_targets, compute, passes, device, ranks, trains)
        if recipe.engine.compile:
            for one in (adapter.transformer, weights.reference_copy):
                if one is not None:
                    compile_blocks(one, recipe.engine.compile)
        rolled = recipe.rollout
        if rolled.attention is not None:
            splits = recipe.engine.split_lengths
            check_attention(adapter, rolled.attention, model, device, "rollout.attention", splits)
        if rolled.cheapens and passes:
            weights.cheapen(rolled.precision, recipe.engine.compile, rolled.attention)
        loaded = allocated_memory(device)
        negative, detached = adapter.default_negative(model), recipe.update.detach_unconditional
        policy = cls(adapter, encoder, weights, device, compute, model.guidance_scale, negative, loaded)
        norm, scale_2 = model.cfg_normalization, model.guidance_scale_2
        return replace(
            policy, trains_unconditional=not detached, halves_apart=recipe.halves_apart, guidance_norm=norm,
            low_guidance_scale=scale_2, splits_lengths=recipe.engine.split_lengths,
        )  # fmt: skip

    @classmethod
    def load_together(
        cls, recipe: Recipe, device: torch.device, texts: Sequence[str] | None, ranks: Ranks, trains: bool = True
    ) -> "Policy":
        """`load` on every rank, after they have divided the encoding of the texts. An error of one ends all."""
        ranks.together(lambda: check_family(recipe))
        encode_together(recipe, device, COMPUTE_DTYPES[recipe.model.dtype], texts or (), ranks)
        return ranks.together(lambda: cls.load(recipe, device, texts, ranks, trains))

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of states and masters: fp32, or float64 for model.dtype fp64."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def transformer(self) -> Any:
        """The one that trains."""
        return self.weights.transformer

    def sized(self, recipe: Recipe) -> "Policy":
        """This policy at the height and width of `recipe`. Raises UserError."""
        if recipe.model.sizes is None:
            return self
        return replace(self, adapter=self.adapter.at(read_geometry(model_folder(recipe.model), recipe.model)))

    def guided_by(self, scale: float | None) -> "Policy":
        """This policy with another guidance scale; None: with its own."""
        return self if scale is None else replace(self, guidance_scale=scale, low_guidance_scale=None)

    def of_expert(self, expert: Expert | None) -> "Policy":
        """This policy for passes of one expert, at its guidance scale; None where there is one transformer."""
        if expert is None:
            return self
        scale = self.guidance_scale if expert == "high" or self.low_guidance_scale is None else self.low_guidance_scale
        return replace(self, adapter=self.adapter.of_expert(expert), guidance_scale=scale, low_guidance_scale=None)

    @contextmanager
    def reference(self) -> Iterator["Policy"]:
        """Inside the block, the policy of the model as it was before training."""
        with self.weights.reference():
            yield replace(self, adapter=self._reference_adapter, tuned=False)

    @cached_property
    def _reference_adapter(self) -> Adapter:
        copy = self.weights.reference_copy
        return self.adapter if copy is None else self.adapter.on(copy)

    def cheap(self) -> "Policy":
        """This policy in rollout.precision and with rollout.attention, for passes that nothing differentiates."""
        copy = self.weights.cheap
        return replace(self, adapter=copy.adapter(self.adapter), precision=copy.precision)

    def encode(self, texts: list[str]) -> Prompts:
        """Each distinct prompt is encoded once, and each distinct negative one where guidance needs it."""
        distinct, rows = _numbered([conditional(text) for text in texts])
        away, away_rows = (
            _numbered([unconditional(text, self.negative_prompt) for text in texts]) if self.doubles else ([], [])
        )
        with span("encode", rows=len(distinct)):
            whole = self.encoder([*distinct, *away])
        cond = whole[to_device(torch.tensor(rows), self.device)]
        lengths, size = cond.lengths(), self.adapter.geometry
        uncond = uncond_of = masked = None
        if self.doubles:
            uncond = whole[len(distinct) :].without_padding()
            uncond_of = to_device(torch.tensor(away_rows), self.device)
            lengths = np.maximum(lengths, uncond.lengths()[away_rows])
        # what a pass need not pad, it need not run
        shorter, halves = self.adapter.masks_prompts and size.text_tokens > 0, 2 if self.doubles else 1
        beside = padded_length(lengths) if shorter else np.full_like(lengths, size.text_tokens)
        tokens = (size.picture_tokens + size.source_tokens + beside) * halves
        if self.splits_lengths:
            each = whole.masked_lengths()
            masked = np.concatenate([each[rows], each[len(distinct) :][away_rows]], axis=1) if away else each[rows]
            if shorter:
                longest = self.adapter.blank(1, self.compute_dtype).masked_lengths().sum()
                tokens = (size.tokens - longest) * halves + masked.sum(1)
        return Prompts(texts, cond, uncond, uncond_of, lengths, tokens, masked)

    def blank_prompt(self) -> Prompts:
        """One prompt of the longest text, zeros in place of its embeddings: for passes that only cost."""
        size, blank = self.adapter.geometry, self.adapter.blank(1, self.compute_dtype).to(self.device)
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        uncond, uncond_of = (blank, first) if self.doubles else (None, None)
        halves = 2 if self.doubles else 1
        masked = np.tile(blank.masked_lengths(), (1, halves)) if self.splits_lengths else None
        lengths, tokens = np.array([size.prompt_tokens]), np.array([size.tokens * halves])
        return Prompts([""], blank, uncond, uncond_of, lengths, tokens, masked)

    @property
    def weights_in_use(self) -> tuple[int, ...]:
        """Names what a pass would run on now: the size, and the trained weights,
        their average or the reference model.
        """
        return (
            id(self.adapter.geometry),
            id(self.adapter.running),
            self.weights.identity if self.tuned else 0,
        )

    @property
    def doubles(self) -> bool:
        """Whether guidance needs an unconditional velocity, two rows for one."""
        return self.adapter.needs_uncond(self.guidance_scale)

    def velocity(
        self, x: Tensor, sigma: Tensor, prompts: Prompts, prompt_of: Tensor, on_host: Ints | None = None
    ) -> Velocity:
        """One pass: x [B, ...] at σ [B], row b for prompt prompt_of[b]; with guidance, one forward of 2B rows, or with
        `halves_apart` two of B. `on_host`: the same prompts there, by which texts are cut to the longest; None: they
        stay as they are. With `splits_lengths` rows run apart from those of other lengths, and without `on_host` the
        host asks for them.
        """
        longest = None if on_host is None else prompts.longest(on_host)
        with self._precision():
            cond = prompts.cond[prompt_of].trimmed(longest)
            away = prompts.uncond_rows(prompt_of)
            lengths: list[Ints] = []  # of the masked sequences of each half
            if prompts.masked_lengths is not None:
                rows = to_host(prompt_of).numpy() if on_host is None else on_host
                lengths = np.split(prompts.masked_lengths[rows], 1 if away is None else 2, axis=1)
            if away is None:
                return Velocity(self._forward(x, sigma, cond, lengths))
            away = away.trimmed(longest)
            if self.halves_apart:
                with torch.no_grad():
                    uncond = self._forward(x, sigma, away, lengths[1:])
                v = self._forward(x, sigma, cond, lengths[:1])
            else:
                twice = torch.cat([x, x]), torch.cat([sigma, sigma]), Conditioning.cat([cond, away])
                v, uncond = self._forward(*twice, lengths).chunk(2)
        uncond = uncond if self.trains_unconditional else uncond.detach()
        wide, wide_uncond = v.to(self.state_dtype), uncond.to(self.state_dtype)
        guided = self.adapter.guide(wide, wide_uncond, self.guidance_scale)
        if self.guidance_norm is not None:
            guided = wide_uncond + self.guidance_scale * (wide - wide_uncond) if guided is None else guided
            return Velocity(_limited(guided, wide, self.guidance_norm))
        return Velocity(v, uncond, self.guidance_scale) if guided is None else Velocity(guided)

    def _forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, lengths: list[Ints]) -> Tensor:
        """The velocity of rows whose masked sequences have these `lengths` [rows, masks], part after part; without any
        masks stay.
        """
        if not lengths:
            return self.adapter.velocity(x, sigma, cond, self.guidance_scale)
        return self._velocity_by_lengths(x, sigma, cond, np.concatenate(lengths))

    def _velocity_by_lengths(self, x: Tensor, sigma: Tensor, cond: Conditioning, lengths: Ints) -> Tensor:
        """The velocity of rows whose masked sequences have these `lengths` [B, masks]: a forward, without masks, of all
        rows that are alike.
        """
        runs, order = runs_of_equal(lengths), None
        if len(runs) > len(np.unique(lengths, axis=0)):  # some stand apart
            order = np.lexsort(lengths.T)
            index = to_device(torch.from_numpy(order), x.device)
            x, sigma, cond, lengths = x[index], sigma[index], cond[index], lengths[order]
            runs = runs_of_equal(lengths)

        def velocity(run: slice) -> Tensor:
            alike = cond[run].unmasked(lengths[run.start].tolist())
            return self.adapter.velocity(x[run], sigma[run], alike, self.guidance_scale)

        found = torch.cat([velocity(run) for run in runs])
        return found if order is None else found[to_device(torch.from_numpy(np.argsort(order)), x.device)]

    def idle_pass(self, backward: bool, rows: int = 1, lengths: Sequence[int] | None = None) -> None:
        """A pass of blank rows that counts for nothing, its gradients being 0: ranks that have divided the weights run
        their passes together, and one of them may have fewer. `lengths`: of the masked sequences, where passes are
        split by them; None: of the longest texts.
        """
        x = torch.zeros(rows, *self.adapter.latent_shape, dtype=self.state_dtype, device=self.device)
        blank = self.adapter.blank(1, self.compute_dtype).to(self.device)
        blank = blank[torch.zeros(rows, dtype=torch.int64, device=self.device)]
        blank = blank.unmasked(lengths) if self.splits_lengths else blank
        # an adapter of its own, since an adapter keeps what it finds of its transformer, which may lie in rows now
        adapter = self.adapter.on(self.adapter.transformer)
        with self._precision(), torch.set_grad_enabled(backward):
            sigma = torch.ones(rows, dtype=torch.float32, device=self.device)
            v = adapter.velocity(x, sigma, blank, self.guidance_scale)
        if backward:
            v.backward(torch.zeros_like(v))

    def decode(self, x: Tensor, together: int | None = None) -> Tensor:
        """Pictures [B, 3, H, W], or videos [B, F, 3, H, W], in [0, 1] on the device, `together` samples at a time."""
        parts = x.split(together or self.adapter.samples_per_decode(self.device.type))
        first = self.adapter.decode(parts[0])
        if len(parts) == 1:
            return first
        whole = first.new_empty(len(x), *first.shape[1:])  # filled part by part: never held twice
        for start, part in zip(range(0, len(x), len(parts[0])), parts, strict=True):
            whole[start : start + len(part)] = first if start == 0 else self.adapter.decode(part)
        return whole

    def _precision(self) -> AbstractContextManager[object]:
        if self.compute_dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def _numbered(texts: list[str]) -> tuple[list[str], list[int]]:
    """The distinct texts, and which of them each is."""
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return list(place), [place[text] for text in texts]


def _limited(guided: Tensor, v: Tensor, most: float) -> Tensor:
    """Guided velocities [B, ...], none of them longer than `most` times its v."""
    norm, limit = (vector_norm(one.flatten(1), dim=1) for one in (guided, v))
    shrunk = torch.where(norm > most * limit, most * limit / norm, 1.0)
    return guided * shrunk.view(-1, *[1] * (guided.ndim - 1))
