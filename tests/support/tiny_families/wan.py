"""Wan2.1 and Wan2.2: from text, pictures and videos."""

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from flowgrove.data.prompt import pictures_of
from flowgrove.models.sources import source_mask, source_video
from tiny_families.parts import VIDEO_STATISTICS, lively, t5_config, tokenizer_of
from tiny_families.record import TinyFamily


def _wan(vae=None, pipeline=WanPipeline, transformer=None, **options):
    tokenizer = tokenizer_of("tokenizer_3")
    return pipeline(
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        vae=vae or AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            **VIDEO_STATISTICS,
        ),
        text_encoder=UMT5EncoderModel(t5_config(UMT5Config, tokenizer)),
        tokenizer=tokenizer,
        transformer=lively(transformer or _transformer()),
        **options,
    )  # fmt: skip


def _transformer(in_channels=4, kind=WanTransformer3DModel, **options):
    return kind(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=in_channels, out_channels=4,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, **options,
    )  # fmt: skip


def _ti2v(**options):
    """A time per token, and an autoencoder whose decoder draws patches."""
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8, **VIDEO_STATISTICS,
    )  # fmt: skip
    return _wan(vae, expand_timesteps=True, **options)


def _a14b():
    """Two experts: high noise runs the first of four steps, where the shift is 3."""
    return _wan(transformer_2=lively(_transformer(), seed=2), boundary_ratio=0.875)


def _i2v(**options):
    """The picture's latents and a mask beside the state's channels, and its CLIP embeddings."""
    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return _wan(
        pipeline=WanImageToVideoPipeline,
        transformer=_transformer(12, image_dim=16, added_kv_proj_dim=24, **options),
        image_encoder=CLIPVisionModel(clip),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    )


def _flf2v():
    """Positions for the CLIP embeddings of a first and a last picture."""
    pipe = _i2v(pos_embed_seq_len=2 * (2 * 2 + 1))
    torch.nn.init.normal_(pipe.transformer.condition_embedder.image_embedder.pos_embed)
    return pipe


def _i2v_a14b():
    low = lively(_transformer(12), seed=2)
    return _wan(
        pipeline=WanImageToVideoPipeline, transformer=_transformer(12), transformer_2=low, boundary_ratio=0.9
    )  # fmt: skip


def _vace():
    """Blocks of the second video beside both of the state's."""
    transformer = _transformer(kind=WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=2 * 4 + 64)
    return _wan(pipeline=WanVACEPipeline, transformer=transformer)


class _OneByOne(WanImageToVideoPipeline):
    """diffusers' pipeline draws one picture's videos in a call."""

    def __call__(self, prompt, ends, latents, **options):
        call, parts = super().__call__, zip(prompt, ends, latents.split(1), strict=True)
        named = [(p, dict(zip(("image", "last_image"), pictures, strict=False)), x) for p, pictures, x in parts]
        drawn = [call(prompt=p, latents=x, **pictures, **options).frames for p, pictures, x in named]
        return WanPipelineOutput(frames=torch.cat(drawn))


class _VaceOneByOne(WanVACEPipeline):
    """diffusers' pipeline draws one video in a call."""

    def __call__(self, prompt, latents, sources, **options):
        parts = zip(prompt, sources, latents.split(1), strict=True)
        call = super().__call__
        return WanPipelineOutput(
            frames=torch.cat([call(prompt=p, latents=x, **told, **options).frames for p, told, x in parts])
        )


def _filmed(prompts, model):
    """Pictures as they are in their files, which the pipeline scales itself; masks without the greys of scaling."""

    def of(prompt):
        pictures = [picture.load() for picture in pictures_of(prompt)]
        mask = source_mask(prompt, model.height, model.width)
        return {
            "video": source_video(prompt, model.height, model.width),
            "mask": mask and [frame.convert("L").point(lambda level: 255 * (level > 127)) for frame in mask],
            "reference_images": pictures or None,
        }

    return {"sources": [of(prompt) for prompt in prompts]}


def _call(guidance, prompts, model):
    return {"guidance_scale": guidance, "num_frames": model.frames}


def _animated(pictures, model):
    return {"ends": pictures}


def _with_first_frame(cond, latents):
    return torch.cat([cond.tensors["source_latents"], latents[:, :, 1:]], dim=2)


def _family(name, build, adapter="wan", text_tokens=9, sources=None, **options):
    model = {"adapter": adapter, "height": 32, "width": 32, "frames": 5, "text_tokens": text_tokens}
    model |= {} if sources is None else {"source_pictures": sources}
    pipeline = {"wan": WanPipeline, "wan_i2v": _OneByOne, "wan_vace": _VaceOneByOne}[adapter]
    if adapter == "wan_vace":
        options["filmed"] = _filmed
    elif adapter == "wan_i2v":
        options["pictured"] = _animated
    return TinyFamily(
        name, pipeline, model, build, _call, guidance=4.5, output="frames", flow_shift=3.0, **options
    )  # fmt: skip


FAMILIES = (
    _family("wan", _wan, blocks=2, swept=True),
    _family("wan_ti2v", _ti2v, blocks=2, variant=True),
    _family("wan_a14b", _a14b, blocks=4, silent=r"transformer_2\..*"),
    _family("wan_i2v", _i2v, "wan_i2v", 512, blocks=2, variant=True),
    _family("wan_flf2v", _flf2v, "wan_i2v", 512, sources=2, blocks=2, variant=True),
    _family("wan_i2v_a14b", _i2v_a14b, "wan_i2v", sources=2, blocks=4, variant=True, silent=r"transformer_2\..*"),
    _family("wan_i2v_5b", _ti2v, "wan_i2v", blocks=2, variant=True, as_leaves=_with_first_frame),
    _family("wan_vace", _vace, "wan_vace", sources=1, blocks=4, variant=True),
)
