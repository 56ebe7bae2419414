"""The two towers of CLIP (Radford et al. 2103.00020) that several rewards share: unit embeddings of pictures and of
texts, and their cosines.

Texts go through their tower once per distinct prompt of a call; pictures go through theirs `batch_size` at a time, on
the device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flowgrove.device import to_device
from flowgrove.errors import UserError
from flowgrove.hub import DATA_ONLY, endless_count, named_program
from flowgrove.rewards.preprocess import read_preprocess
from flowgrove.rewards.weights import DTYPES, DType, Source, misfit

_MODEL = ("config.json", "model.safetensors|model-*.safetensors|pytorch_model.bin")
_PROCESSOR = ("preprocessor_config.json|processor_config.json", "tokenizer.json|vocab.json")
_TEXTS = '--include "*.json" --include "*.txt"'
VIT_L, VIT_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def model_source(reward: str, option: str, repository: str) -> Source:
    return Source(reward, option, repository, _MODEL, f'{_TEXTS} --include "*.safetensors"')


def processor_source(reward: str, option: str, repository: str) -> Source:
    return Source(reward, option, repository, _PROCESSOR, _TEXTS)


def clip_source(reward: str, option: str, repository: str) -> Source:
    """Model and processor in one."""
    return Source(reward, option, repository, _MODEL + _PROCESSOR, f'{_TEXTS} --include "*.safetensors"')


class Clip:
    """A `transformers` CLIPModel with its tokenizer and its preprocessing."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Callable[[Tensor], Tensor],
        device: torch.device,
        dtype: DType,
        batch_size: int,
    ) -> None:
        self.model = model.to(device, DTYPES[dtype]).eval().requires_grad_(False)
        self.tokenizer, self.preprocess, self.device, self.batch_size = tokenizer, preprocess, device, batch_size
        self.longest = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1], on any device → unit embeddings fp32 [B, D] on the model's."""
        embeddings = []
        for some in pictures.split(self.batch_size):
            pixels = self.preprocess(to_device(some, self.device).float())
            embeddings.append(_pooled(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype))))
        return normalize(torch.cat(embeddings).float(), dim=-1)

    def texts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings fp32 [B, D]; longer texts are cut at the tower's last position."""
        distinct = list(dict.fromkeys(prompts))
        embeddings = []
        for start in range(0, len(distinct), self.batch_size):
            words = self.tokenizer(
                distinct[start : start + self.batch_size],
                padding="max_length",
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            )
            numbers, mask = (to_device(tensor, self.device) for tensor in (words.input_ids, words.attention_mask))
            embeddings.append(_pooled(self.model.get_text_features(input_ids=numbers, attention_mask=mask)))
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        picked = to_device(torch.tensor([rows[prompt] for prompt in prompts]), self.device)
        return normalize(torch.cat(embeddings).float(), dim=-1)[picked]

    def cosines(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """The cosine of each picture and its own prompt, fp32 [B]."""
        return (self.pictures(pictures) * self.texts(prompts)).sum(-1)


def load_clip(reward: str, model: Path, processor: Path, device: torch.device, dtype: DType, batch_size: int) -> Clip:
    """A CLIPModel in `model`, read as `processor` says; both are folders in the layout of `transformers`."""
    from transformers import CLIPModel

    if (program := named_program(model)) is not None:
        raise misfit(reward, model, f"its config.json names {program} as attention, which would be downloaded")
    if (count := endless_count(model)) is not None:
        raise misfit(reward, model, f"its config.json says {count}, which no model has")
    loaded = load_strictly(reward, model, CLIPModel, model, local_files_only=True)
    return Clip(
        loaded, load_tokenizer(reward, processor), read_preprocess(processor, reward), device, dtype, batch_size
    )


def load_strictly(reward: str, place: object, kind: Any, *arguments: Any, **options: Any) -> Any:
    """`kind.from_pretrained(...)` in fp32; weights that are missing or do not fit are an error,
    where the library draws random ones.
    """
    try:
        model, told = kind.from_pretrained(
            *arguments, **options, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (
        Exception
    ) as error:  # OSError, RuntimeError, SafetensorError, pickle errors, by what is wrong with the folder
        raise misfit(reward, place, error) from None
    wrong = [f"{name} has another shape" for name, *_ in told["mismatched_keys"]] + [
        f"{name} is missing" for name in told["missing_keys"]
    ]
    if wrong:
        raise misfit(reward, place, sorted(wrong)[0])
    return model


def load_tokenizer(reward: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **DATA_ONLY)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"reward {reward}: no tokenizer can be read from {folder} ({' '.join(str(error).split())[:120]}): "
            "fetch it again"
        ) from None


def _pooled(output: Any) -> Tensor:
    """transformers 5 wraps the projected features, 4 gave them bare."""
    return output if isinstance(output, Tensor) else output.pooler_output
