"""Chroma."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from tiny_families.parts import autoencoder, lively, t5_config, tokenizer_of
from tiny_families.record import TinyFamily


def _chroma():
    tokenizer = tokenizer_of("tokenizer_3")
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder(),
        text_encoder=T5EncoderModel(t5_config(T5Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(transformer),
    )


def _call(guidance, prompts, model):
    return {"guidance_scale": guidance, "negative_prompt": [""] * prompts}


FAMILIES = (
    TinyFamily(
        "chroma",
        ChromaPipeline,
        {"adapter": "chroma", "height": 32, "width": 32, "text_tokens": 16},
        _chroma,
        _call,
        guidance=3.0,
        blocks=4,
        variant=True,
    ),
)
