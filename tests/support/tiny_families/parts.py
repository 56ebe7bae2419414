"""Parts that several tiny pipelines have: small encoders, autoencoders and tokenizers, and lively weights."""

import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, Qwen3Config

from flowgrove.bench.models import byte_tokenizer
from flowgrove.models.folders import TINY

VIDEO_STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}


def tokenizer_of(part):
    """A tokenizer of the embedded pipeline: "tokenizer" is CLIP's, "tokenizer_3" T5's."""
    return AutoTokenizer.from_pretrained(TINY / part)


def t5_config(kind, tokenizer):
    return kind(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_heads=4,
        num_layers=2,
        pad_token_id=tokenizer.pad_token_id,
    )


def autoencoder():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12,
    )  # fmt: skip


def chat_tokenizer():
    """The same with a chat template as Qwen3 has one."""
    tokenizer = byte_tokenizer(pad_token="<|im_end|>", eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    return tokenizer


def qwen3_config(tokenizer, layers=3):
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def lively(transformer, seed=1):
    """Weights large enough that prompt, time and place all matter:
    real initialisation makes a tiny model almost constant.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / parameter[0].numel() ** 0.5)
    return transformer
