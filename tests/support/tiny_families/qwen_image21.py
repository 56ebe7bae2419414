"""Qwen-Image-2.1. Its processor needs torchvision: where that is not installed, there is no such tiny pipeline."""

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.utils import is_torchvision_available

from flowgrove.bench.models import byte_tokenizer
from tiny_families.parts import VIDEO_STATISTICS, lively
from tiny_families.record import TinyFamily

_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


class _OnWhite(QwenImage21Pipeline):
    """diffusers' pipeline, whose pictures have an alpha channel, and whose prompts may have any length."""

    def __call__(self, max_sequence_length, **options):
        result = super().__call__(**options)
        if options["output_type"] == "pt":
            result.images = result.images[:, :3] * result.images[:, 3:] + 1 - result.images[:, 3:]
        return result


def _tiny():
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": list(_MARKS)})
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor(), chat_template=_TEMPLATE)
    ids = dict(zip(_MARKS, tokenizer.convert_tokens_to_ids(list(_MARKS)), strict=True))
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer),
            "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        mlp_ratio=2, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, **VIDEO_STATISTICS
    )
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=vae,
        text_encoder=Qwen3VLForConditionalGeneration(config),
        processor=processor,
        transformer=lively(transformer),
    )


def _guided(guidance, prompts, model):
    return {"true_cfg_scale": guidance, "negative_prompt": [" "] * prompts} if guidance > 1 else {}


FAMILIES = (
    (
        TinyFamily(
            "qwen_image21",
            _OnWhite,
            {"adapter": "qwen_image21", "height": 32, "width": 32, "text_tokens": 539},
            _tiny,
            _guided,
            guidance=2.0,
            blocks=3,
            one_by_one=True,  # a batch has the places of its longest text in all rows
            sides=2,
            cuts_tokens=False,
        ),
    )
    if is_torchvision_available()
    else ()
)
