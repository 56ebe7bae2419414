"""Models that a benchmark times without downloading any:
the embedded pipeline, and larger transformers with random weights.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import torch

from flowgrove.errors import UserError
from flowgrove.models.folders import ARCHITECTURES, TINY

# The architecture of SD3 at a size that two CPU cores can train: 12 M weights, 64 picture tokens.
_MID = {
    "num_layers": 6,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "caption_projection_dim": 384,
    "sample_size": 16,
}
# FLUX.1-dev's width at a seventh of its depth, with its ratio of double to single blocks about kept: 1.9 B weights.
_SLIM = {"num_layers": 3, "num_single_layers": 6}
_FLUXES: dict[str, dict[str, Any]] = {"flux": {}, "flux_slim": _SLIM}
_SLIM_QWEN = {"num_layers": 6}  # a tenth of Qwen-Image's depth: 2.0 B weights
# Qwen-Image's architecture at the size of sd3_mid
_MID_QWEN = {
    "num_layers": 5, "num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": [8, 28, 28],
    "joint_attention_dim": 64,
}  # fmt: skip
_MID_VAE = {"base_dim": 8, "num_res_blocks": 1}
NAMES = ("tiny", "sd3_mid", "qwen_mid", *_FLUXES, "qwen_slim")
_LORA = {"rank": 32, "alpha": 64}


@contextmanager
def bench_model(name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The `model` section of a recipe for the model `name`; what it writes is gone after it. Raises UserError."""
    plain = {"adapter": "sd3", "dtype": "fp32" if device.type == "cpu" else "bf16", "gradient_checkpointing": "none"}
    if name == "tiny":
        yield {**plain, "path": "tiny"}
    elif name == "sd3_mid":
        with _written(write_mid) as path:
            yield {**plain, "path": path, "height": 64, "width": 64}
    elif name == "qwen_mid":
        with _written(lambda folder: write_qwen(folder, _MID_QWEN, device, _MID_VAE)) as path:
            yield {**plain, "adapter": "qwen_image", "path": path, "height": 128, "width": 128, "text_tokens": 64}
    elif name not in NAMES:
        raise UserError(f"--model is {name}: write one of {', '.join(NAMES)}")
    elif device.type != "cuda":
        raise UserError(f"--model {name} has billions of weights, which wants a GPU: write --model sd3_mid")
    elif name in _FLUXES:
        with _written(lambda folder: write_flux(folder, _FLUXES[name], device)) as path:
            sizes = {"height": 720, "width": 720, "guidance_scale": 3.5}
            yield {"adapter": "flux", "path": path, "dtype": "bf16", **sizes, "lora": _LORA}
    else:
        with _written(lambda folder: write_qwen(folder, _SLIM_QWEN, device)) as path:
            sizes = {"height": 1024, "width": 1024, "text_tokens": 256}
            yield {"adapter": "qwen_image", "path": path, "dtype": "bf16", **sizes, "lora": _LORA}


@contextmanager
def _written(write: Callable[[Path], None]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "pipeline")
        yield str(Path(folder) / "pipeline")


def write_mid(folder: Path) -> None:
    """The embedded pipeline with a larger transformer of seeded random weights."""
    from diffusers import SD3Transformer2DModel

    copytree(TINY, folder, ignore=ignore_patterns("transformer"))
    config = json.loads((TINY / "transformer" / "config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SD3Transformer2DModel.from_config({**config, **_MID}).save_pretrained(folder / "transformer")


def write_flux(folder: Path, changes: dict[str, Any], device: torch.device) -> None:
    """FLUX.1-dev with random weights: its transformer (with `changes` to its configuration) and VAE, and text encoders
    of one layer, since a run encodes a text once.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    settings = {**_config("flux1_dev", "transformer"), **changes}
    transformer = _random(FluxTransformer2DModel, settings, device)
    clip, t5 = (AutoTokenizer.from_pretrained(TINY / name) for name in ("tokenizer", "tokenizer_3"))
    width = settings["pooled_projection_dim"]
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(
            _config("flux1_dev", "scheduler", "scheduler_config.json")
        ),
        vae=AutoencoderKL.from_config(_config("flux1_dev", "vae")).to(torch.bfloat16),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            vocab_size=len(clip), hidden_size=width, intermediate_size=width, num_attention_heads=width // 64,
            num_hidden_layers=1, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5), d_model=settings["joint_attention_dim"], d_ff=64, d_kv=64, num_heads=1, num_layers=1
            )
        ),
        tokenizer_2=t5, transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip


def write_qwen(folder: Path, changes: dict[str, Any], device: torch.device, vae: dict[str, Any] | None = None) -> None:
    """Qwen-Image with random weights: its transformer and VAE (with `changes` and `vae` to their configurations), and a
    text encoder of one layer.
    """
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    settings = {**_config("qwen_image", "transformer"), **changes}
    width, words = settings["joint_attention_dim"], 1024
    head = width // 2
    text = {
        "vocab_size": words, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [head // 8, head // 8, head // 4], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(
            _config("qwen_image", "scheduler", "scheduler_config.json")
        ),
        vae=AutoencoderKLQwenImage.from_config({**_config("qwen_image", "vae"), **(vae or {})}).to(torch.bfloat16),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, hidden_size=width, vocab_size=words)
        ),
        tokenizer=None,
        transformer=_random(QwenImageTransformer2DModel, settings, device),
    )
    # words of what stands around a prompt are tokens, as Qwen's own tokenizer has them: the pipeline counts them
    pipe.register_modules(tokenizer=byte_tokenizer([pipe.prompt_template_encode], words))
    pipe.save_pretrained(folder)


def byte_tokenizer(texts: Sequence[str] = (), words: int = 258, **options: Any) -> Any:
    """Qwen's kind of tokenizer: bytes, two markers of a chat, and up to `words` tokens with what stands in `texts`.
    `options`: of transformers' Qwen2Tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    found, markers = Tokenizer(models.BPE()), ["<|im_start|>", "<|im_end|>"]
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = words - len(markers)
    found.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    merges = [tuple(pair) for pair in json.loads(found.to_str())["model"]["merges"]]
    return Qwen2Tokenizer(vocab=found.get_vocab(), merges=merges, extra_special_tokens=markers, **options)


def _config(architecture: str, part: str, file: str = "config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ARCHITECTURES / architecture / part / file).read_text(encoding="utf-8"))
    return content


def _random(kind: Any, settings: dict[str, Any], device: torch.device) -> Any:
    """A transformer in bf16 whose weights are drawn on `device`, in host memory."""
    with torch.device("meta"):
        empty = kind.from_config(settings)
    transformer = empty.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return transformer.cpu()
