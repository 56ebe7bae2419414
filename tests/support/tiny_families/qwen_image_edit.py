"""Qwen-Image-Edit, and its successors that take several pictures. Their processor needs torchvision: where that is not
installed, there are no such tiny pipelines.
"""

from functools import partial

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from transformers.utils import is_torchvision_available

from flowgrove.bench.models import byte_tokenizer
from tiny_families.qwen_image import UNUSED, parts, true_guidance
from tiny_families.record import TinyFamily

_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
# with this much of it as one token the template's head has the 64 tokens that the pipelines drop
_HEAD = _SYSTEM[: -(64 - 17)]
_PICTURE = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


class _Edit(QwenImageEditPipeline):
    """diffusers' pipeline with the source's latents at the size that is drawn; what the encoder gets is as large as
    ever.
    """

    def __call__(self, height, width, **options):
        with _sizes(edit, lambda area, ratio: (width, height, None)):
            return super().__call__(height=height, width=width, **options)

    def encode_prompt(self, image, **options):
        width, height, _ = _PLAIN[edit](1024 * 1024, image.width / image.height)
        return super().encode_prompt(image=self.image_processor.resize(image, height, width), **options)


class _EditPlus(QwenImageEditPlusPipeline):
    """The same of several sources."""

    def __call__(self, height, width, **options):
        def sizes(area, ratio):
            return (width, height) if area == edit_plus.VAE_IMAGE_SIZE else _PLAIN[edit_plus](area, ratio)

        with _sizes(edit_plus, sizes):
            return super().__call__(height=height, width=width, **options)


_PLAIN = {module: module.calculate_dimensions for module in (edit, edit_plus)}


class _sizes:
    def __init__(self, module, function):
        self.module, self.function = module, function

    def __enter__(self):
        self.module.calculate_dimensions = self.function

    def __exit__(self, *_):
        self.module.calculate_dimensions = _PLAIN[self.module]


def _tiny(kind, zero_cond_t=False):
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", *_PICTURE, _HEAD]})
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 6}
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(size=sizes), tokenizer, Qwen2VLVideoProcessor())
    start, _, image, video = tokenizer.convert_tokens_to_ids(list(_PICTURE))
    ids = {"vision_start_token_id": start, "image_token_id": image, "video_token_id": video}
    return kind(processor=processor, **parts(tokenizer, zero_cond_t, **ids))


def _edited(pictures, model):
    (own,) = pictures
    return {"image": own if len(own) > 1 else own[0]}


def _family(name, pipeline, real, zero_cond_t=False, **others):
    return TinyFamily(
        name, pipeline, {"adapter": "qwen_image_edit", "height": 32, "width": 32, "text_tokens": 576, **others},
        partial(_tiny, real, zero_cond_t), true_guidance, guidance=2.0, blocks=2, pictured=_edited, one_by_one=True,
        silent=rf"transformer_blocks\.1\..*({UNUSED}).*", cuts_tokens=False, variant=name != "qwen_image_edit",
    )  # fmt: skip


FAMILIES = (
    (
        _family("qwen_image_edit", _Edit, QwenImageEditPipeline),
        _family("qwen_image_edit_plus", _EditPlus, QwenImageEditPlusPipeline, source_pictures=2),
        _family("qwen_image_edit_2511", _EditPlus, QwenImageEditPlusPipeline, True, source_pictures=2),
    )
    if is_torchvision_available()
    else ()
)
