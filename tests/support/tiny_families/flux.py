"""FLUX.1-dev, FLUX.1-schnell and FLUX.1-Kontext-dev."""

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tiny_families.parts import autoencoder, lively, t5_config, tokenizer_of
from tiny_families.record import TinyFamily

MODEL = {"adapter": "flux", "height": 32, "width": 32, "text_tokens": 9}


def _flux(dev, kind=FluxPipeline):
    clip, t5 = tokenizer_of("tokenizer"), tokenizer_of("tokenizer_3")
    text = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=32, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=dev,
    )  # fmt: skip
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev, shift=3.0 if dev else 1.0),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config(T5Config, t5)),
        tokenizer_2=t5,
        transformer=lively(transformer),
    )


def _true_guidance(guidance, prompts, model):
    return {"true_cfg_scale": guidance, "negative_prompt": [""] * prompts}


def _edited(pictures, model):
    return {"image": [each for (each,) in pictures], "_auto_resize": False, "max_area": model.height * model.width}


FAMILIES = (
    TinyFamily(
        "flux", FluxPipeline, MODEL, partial(_flux, True), lambda guidance, *_: {"guidance_scale": guidance},
        guidance=3.5, blocks=4, swept=True,
    ),
    TinyFamily(
        "flux_schnell", FluxPipeline, MODEL, partial(_flux, False), _true_guidance,
        guidance=1.0, blocks=4,
    ),
    TinyFamily(
        "flux_kontext", FluxKontextPipeline, {**MODEL, "adapter": "flux_kontext"},
        partial(_flux, True, FluxKontextPipeline), lambda guidance, *_: {"guidance_scale": guidance},
        guidance=3.5, blocks=4, pictured=_edited,
    ),
)  # fmt: skip
