"""HunyuanVideo-1.5 text-to-video."""

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

from tiny_families.parts import chat_tokenizer, lively, t5_config
from tiny_families.record import TinyFamily


class _Called(HunyuanVideo15Pipeline):
    """diffusers' pipeline holds these two as attributes, and its VAE decodes one video at a time. A scale below 1
    guides there; here it is no guidance, as in other families.
    """

    def __call__(self, max_sequence_length, guidance_scale, **options):
        self.tokenizer_max_length = max_sequence_length
        self.guider = ClassifierFreeGuidance(guidance_scale=max(1.0, guidance_scale))
        self.vae.enable_slicing()
        return super().__call__(**options)


def _hunyuan_video15():
    tokenizer, bytes_ = chat_tokenizer(), ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = tokenizer.chat_template.replace(  # the 108 tokens that the pipeline cuts off
        "message.content", "(message.content if message.role == 'user' else message.content[:92])"
    )
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, rope_theta=1e6,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_refiner_layers=1,
        text_embed_dim=16, text_embed_2_dim=32, image_embed_dim=8, rope_axes_dim=(4, 4, 4), task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4
    )
    return HunyuanVideo15Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=Qwen2_5_VLTextModel(text),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5_config(T5Config, bytes_)),
        tokenizer_2=bytes_,
        transformer=lively(transformer),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def _call(guidance, prompts, model):
    return {"guidance_scale": guidance, "num_frames": model.frames}


UNUSED = "add_q_proj|norm_added_q|to_add_out|ff_context"  # the last block drops its text stream

FAMILIES = (
    TinyFamily(
        "hunyuan_video15",
        _Called,
        {"adapter": "hunyuan_video15", "height": 32, "width": 32, "frames": 5, "text_tokens": 64},
        _hunyuan_video15,
        _call,
        guidance=6.0,
        blocks=2,
        output="frames",
        variant=True,
        # they read first frames, and what prompts quote
        silent=rf"transformer_blocks\.1\..*({UNUSED}).*|(image_embedder|context_embedder_2)\..*",
        cuts_tokens=False,  # a template stands around a prompt
    ),
)
