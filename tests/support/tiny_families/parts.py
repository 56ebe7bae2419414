"""Parts that several tiny pipelines have: small encoders, autoencoders and tokenizers, and lively weights."""

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer

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


def bytes_tokenizer(**options):
    """Qwen's kind of tokenizer without merges: every byte a token, and the template's markers."""
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bytes_.train_from_iterator([], trainer)
    special = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=bytes_.get_vocab(), merges=[], extra_special_tokens=special, **options)


def lively(transformer):
    """Weights large enough that prompt, time and place all matter:
    real initialisation makes a tiny model almost constant.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / parameter[0].numel() ** 0.5)
    return transformer
