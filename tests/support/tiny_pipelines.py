"""Tiny pipelines of every model family in the folder layout of the real ones: random weights, seeded;
tokenizers of the embedded pipeline.
"""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from flowgrove.models.folders import TINY

FAMILIES = ("flux", "flux_schnell", "qwen_image", "wan")
PIPELINES = {"flux": FluxPipeline, "flux_schnell": FluxPipeline, "qwen_image": QwenImagePipeline, "wan": WanPipeline}
MODELS = {  # what a recipe says of each
    "flux": {"adapter": "flux", "height": 32, "width": 32, "text_tokens": 9},
    "flux_schnell": {"adapter": "flux", "height": 32, "width": 32, "text_tokens": 9},
    "qwen_image": {"adapter": "qwen_image", "height": 32, "width": 32, "text_tokens": 64},
    "wan": {"adapter": "wan", "height": 32, "width": 32, "frames": 5, "text_tokens": 9},
}


def write_pipeline(name, folder):
    """Saves the tiny pipeline `name` of FAMILIES into `folder`."""
    torch.manual_seed(0)
    {"flux": _flux, "flux_schnell": _flux, "qwen_image": _qwen_image, "wan": _wan}[name](name).save_pretrained(folder)
    return folder


def _flux(name):
    clip, t5 = AutoTokenizer.from_pretrained(TINY / "tokenizer"), AutoTokenizer.from_pretrained(TINY / "tokenizer_3")
    text = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=32, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=name == "flux",
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=name == "flux", shift=3.0 if name == "flux" else 1.0
        ),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config(T5Config, t5)),
        tokenizer_2=t5,
        transformer=lively(transformer),
    )


def _qwen_image(name):
    tokenizer = _bytes_tokenizer()
    text = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
        },
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        hidden_size=16, vocab_size=len(tokenizer),
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
    vae = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True], **statistics
    )
    dynamic = {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    }
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=tokenizer,
        transformer=lively(transformer),
    )


def _wan(name):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer_3")
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **statistics,
    )
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        vae=vae,
        text_encoder=UMT5EncoderModel(t5_config(UMT5Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(transformer),
    )


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


def _bytes_tokenizer():
    """Qwen's kind of tokenizer without merges: every byte a token, and the template's markers."""
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bytes_.train_from_iterator([], trainer)
    special = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=bytes_.get_vocab(), merges=[], extra_special_tokens=special)


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
