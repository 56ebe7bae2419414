"""LTX-Video."""

from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import tensor
from transformers import T5Config, T5EncoderModel

from tiny_families.parts import VIDEO_STATISTICS, lively, t5_config, tokenizer_of
from tiny_families.record import TinyFamily


def ltx(**vae):
    """The pipeline; `vae`: what is special about its autoencoder."""
    tokenizer = tokenizer_of("tokenizer_3")
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    dynamic = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "shift_terminal": 0.1}
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True), down_block_types=("LTXVideoDownBlock3D",) * 2,
        **{"decoder_inject_noise": (False,) * 3, "upsample_residual": (False,) * 2, "upsample_factor": (1, 1)} | vae,
    )  # fmt: skip
    for name, values in VIDEO_STATISTICS.items():
        getattr(autoencoder, name).copy_(tensor(values))
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **dynamic),
        vae=autoencoder,
        text_encoder=T5EncoderModel(t5_config(T5Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(transformer),
    )


def _call(guidance, prompts, model):
    return {"guidance_scale": guidance, "num_frames": model.frames}


FAMILIES = (
    TinyFamily(
        "ltx",
        LTXPipeline,
        {"adapter": "ltx", "height": 32, "width": 32, "frames": 5, "text_tokens": 16},
        ltx,
        _call,
        guidance=3.0,
        blocks=2,
        output="frames",
        sides=2,
        variant=True,
    ),
)
