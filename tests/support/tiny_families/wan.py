"""Wan2.1 text-to-video."""

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tiny_families.parts import VIDEO_STATISTICS, lively, t5_config, tokenizer_of
from tiny_families.record import TinyFamily


def _wan():
    tokenizer = tokenizer_of("tokenizer_3")
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **VIDEO_STATISTICS,
    )
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        vae=vae,
        text_encoder=UMT5EncoderModel(t5_config(UMT5Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(transformer),
    )


def _call(guidance, prompts, model):
    return {"guidance_scale": guidance, "num_frames": model.frames}


FAMILIES = (
    TinyFamily(
        "wan",
        WanPipeline,
        {"adapter": "wan", "height": 32, "width": 32, "frames": 5, "text_tokens": 9},
        _wan,
        _call,
        guidance=4.5,
        blocks=2,
        swept=True,
        output="frames",
        flow_shift=3.0,
    ),
)
