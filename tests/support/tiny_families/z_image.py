"""Z-Image-Turbo."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Model

from tiny_families.parts import autoencoder, chat_tokenizer, lively, qwen3_config
from tiny_families.record import TinyFamily


def _z_image():
    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=Qwen3Model(qwen3_config(tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(transformer),
    )


def _call(guidance, prompts, model):
    return {"guidance_scale": max(0, guidance - 1), "cfg_normalization": model.cfg_normalization or False}


FAMILIES = (
    TinyFamily(
        "z_image",
        ZImagePipeline,
        {"adapter": "z_image", "height": 32, "width": 32, "text_tokens": 80},
        _z_image,
        _call,
        guidance=4.0,
        blocks=5,
        silent="x_pad_token",  # 8×8 tokens are a multiple of 32
    ),
)
