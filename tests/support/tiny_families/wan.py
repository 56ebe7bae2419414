"""Wan2.1 and Wan2.2 text-to-video."""

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tiny_families.parts import VIDEO_STATISTICS, lively, t5_config, tokenizer_of
from tiny_families.record import TinyFamily


def _wan(vae=None, **options):
    tokenizer = tokenizer_of("tokenizer_3")
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        vae=vae or AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            **VIDEO_STATISTICS,
        ),
        text_encoder=UMT5EncoderModel(t5_config(UMT5Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(_transformer()),
        **options,
    )  # fmt: skip


def _transformer():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def _ti2v():
    """A time per token, and an autoencoder whose decoder draws patches."""
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8, **VIDEO_STATISTICS,
    )  # fmt: skip
    return _wan(vae, expand_timesteps=True)


def _a14b():
    """Two experts: high noise runs the first of four steps, where the shift is 3."""
    return _wan(transformer_2=lively(_transformer(), seed=2), boundary_ratio=0.875)


def _call(guidance, prompts, model):
    return {"guidance_scale": guidance, "num_frames": model.frames}


def _family(name, build, **options):
    model = {"adapter": "wan", "height": 32, "width": 32, "frames": 5, "text_tokens": 9}
    return TinyFamily(name, WanPipeline, model, build, _call, guidance=4.5, output="frames", flow_shift=3.0, **options)


FAMILIES = (
    _family("wan", _wan, blocks=2, swept=True),
    _family("wan_ti2v", _ti2v, blocks=2),
    _family("wan_a14b", _a14b, blocks=4, silent=r"transformer_2\..*"),
)
