"""Qwen-Image."""

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from flowgrove.bench.models import byte_tokenizer
from tiny_families.parts import VIDEO_STATISTICS, lively
from tiny_families.record import TinyFamily


def parts(tokenizer, zero_cond_t=False, **tokens):
    """Scheduler, VAE, text encoder (`tokens`: the ids of its marks), tokenizer and transformer."""
    text = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
        },
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        hidden_size=16, vocab_size=len(tokenizer), **tokens,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4), zero_cond_t=zero_cond_t,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        **VIDEO_STATISTICS,
    )  # fmt: skip
    dynamic = {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    }
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**dynamic),
        "vae": vae,
        "text_encoder": Qwen2_5_VLForConditionalGeneration(text),
        "tokenizer": tokenizer,
        "transformer": lively(transformer),
    }


def true_guidance(guidance, prompts, model):
    return {"true_cfg_scale": guidance, "negative_prompt": [" "] * prompts}


UNUSED = "add_q_proj|norm_added_q|to_add_out|txt_mlp|txt_mod"  # the last block drops its text stream

FAMILIES = (
    TinyFamily(
        "qwen_image",
        QwenImagePipeline,
        {"adapter": "qwen_image", "height": 32, "width": 32, "text_tokens": 64},
        lambda: QwenImagePipeline(**parts(byte_tokenizer())),
        true_guidance,
        guidance=4.0,
        blocks=2,
        swept=True,
        silent=rf"transformer_blocks\.1\..*({UNUSED}).*",
        cuts_tokens=False,  # a template stands around a prompt, and embeddings are cut, not tokens
    ),
)
