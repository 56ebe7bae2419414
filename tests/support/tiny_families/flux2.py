"""FLUX.2-dev, and FLUX.2-klein, base and distilled."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3ForCausalLM,
)

from flowgrove.bench.models import byte_tokenizer
from tiny_families.parts import chat_tokenizer, lively, qwen3_config
from tiny_families.record import TinyFamily

MODEL = {"height": 32, "width": 32, "text_tokens": 64}


def _shared(guidance_embeds):
    """Transformer, VAE and scheduler."""
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"transformer": lively(transformer), "vae": vae, "scheduler": scheduler}


def _dev():
    """With the processor's tokenizer alone: the processor itself needs torchvision."""
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content[0].text }}[/I]{% endif %}{% endfor %}"
    )
    text = Mistral3Config(
        text_config={
            "model_type": "mistral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 30,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer),
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 2,
        },
        image_token_index=1,
    )  # fmt: skip
    return Flux2Pipeline(text_encoder=Mistral3ForConditionalGeneration(text), tokenizer=tokenizer, **_shared(True))


def _klein():
    tokenizer = chat_tokenizer()
    encoder = Qwen3ForCausalLM(qwen3_config(tokenizer, layers=27))
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **_shared(False))


def _call(guidance, prompts, model):
    return {"guidance_scale": guidance}


def _spread(pipe, model, x):
    return x.transpose(1, 2).unflatten(2, (model.height // 4, model.width // 4))


def _packed(pipe, model, x):
    """What klein's pipeline returns for output_type "latent" as it was before the VAE's batch norm and patches."""
    norm = pipe.vae.bn
    x = pipe._patchify_latents(x)
    x = (x - norm.running_mean.view(1, -1, 1, 1)) / (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()
    return x.flatten(2).transpose(1, 2)


def _edited(pictures, model):
    """The pipeline gives all prompts of a call the same pictures."""
    Flux2ImageProcessor.check_image_input = staticmethod(lambda image: image)  # it takes no side below 64 pixels
    (own,) = pictures
    return {"image": own}


FAMILIES = (
    TinyFamily(
        "flux2", Flux2Pipeline, {"adapter": "flux2", **MODEL}, _dev, _call, guidance=2.5, blocks=4, as_theirs=_spread,
        variant=True,
    ),
    TinyFamily(
        "flux2_klein", Flux2KleinPipeline, {"adapter": "flux2_klein", **MODEL}, _klein, _call, guidance=4.0, blocks=4,
        as_theirs=_spread, as_ours=_packed,
    ),
    TinyFamily(
        "flux2_klein_edit", Flux2KleinPipeline, {"adapter": "flux2_klein", "source_pictures": 2, **MODEL}, _klein,
        _call, guidance=4.0, blocks=4, pictured=_edited, as_theirs=_spread, as_ours=_packed, one_by_one=True,
        variant=True,
    ),
)  # fmt: skip
