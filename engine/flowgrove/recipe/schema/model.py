"""What a recipe says of the model: `model`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flowgrove.recipe.schema.values import NotNegative, Pixels, Positive, Section, Text

Checkpointing = Literal["full", "selective", "none", "offload", "auto"]
Expert = Literal["high", "low"]  # of two transformers: that of states of high noise, and that of the others
# the registry of model families: modules of models/, one a line
AdapterName = Literal[
    "sd3",
    "flux",
    "flux_kontext",
    "qwen_image",
    "qwen_image_edit",
    "qwen_image21",
    "wan",
    "wan_i2v",
    "wan_vace",
    "z_image",
    "flux2_klein",
    "flux2",
    "chroma",
    "ltx",
    "hunyuan_video15",
]


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=100_000)]
    """The rank r of the two factors of each adapted layer.
    Trained weights, their optimiser state and the exported file grow linearly with it. Published runs take 32 (SD3.5
    Medium, Wan2.1), 64 (Qwen-Image) and 128 (FLUX.1-dev); raise it where the reward saturates early.
    Source: LoRA (2106.09685), §4.1.
    """

    alpha: Positive
    """The numerator of the scale alpha/rank that a layer's update is multiplied by.
    Twice the rank is usual. Changing it has the effect of another learning rate, so leave it and change update.lr.
    Source: LoRA (2106.09685), §4.1.
    """

    targets: Annotated[list[Text], Field(min_length=1)] | None = None
    """The names of the transformer's modules that get LoRA layers, as peft matches them: whole names or their ends.
    null takes the adapter's: attn.to_q, attn.to_k, attn.to_v, attn.to_out.0; of sd3, qwen_image, qwen_image_edit and
    hunyuan_video15 also attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out, of flux2 and flux2_klein
    also attn.to_qkv_mlp_proj. Of z_image, qwen_image21, ltx and all wan the first four without attn. Add feed-forward
    layers where attention alone does not learn what the reward asks for.
    Source: the published configurations of Flow-GRPO (2505.05470) and DanceGRPO (2505.07818).
    """


class InitLora(Section):
    path: Text
    """The LoRA: a .safetensors file, a folder that holds one, or OWNER/NAME in the local Hugging Face cache.
    Layers are found under the names of diffusers and peft, of kohya's scripts and of ComfyUI, as far as diffusers
    converts them. It must fit: a layer that the transformer lacks, or another shape, is an error that names it. A
    folder is sought as model.path is. Two experts that train take a file each, from a folder as `flowgrove export`
    writes it, that of the low-noise one by low in its name.
    Source: diffusers' load_lora_weights.
    """

    merge: bool = False
    """Whether the LoRA becomes part of the frozen weights; false: it is trained on, as model.lora says.
    false: the file must hold a layer for each module that model.lora.targets adapts and none besides, of
    model.lora.rank; its alpha may differ, since B is scaled so that the first pictures are those of the file. true: any
    rank and modules; a new model.lora, or all weights, train on top, and who loads the exported LoRA loads this one
    below it. Merge distilled and style LoRAs that the run shall keep, train on what it shall change.
    Source: diffusers' fuse_lora.
    """

    strength: float = 1.0
    """What the LoRA's change of the weights is multiplied by.
    1 is the file as its loaders draw with it; take less where pictures are drawn with less.
    Source: diffusers' lora_scale.
    """


class Model(Section):
    adapter: AdapterName
    """The model family, which must be that of the pipeline in model.path.
    sd3: Stable Diffusion 3 and 3.5; flux: FLUX.1-dev and FLUX.1-schnell; flux_kontext: FLUX.1-Kontext-dev; qwen_image:
    Qwen-Image; qwen_image_edit: Qwen-Image-Edit, -2509 and -2511; qwen_image21: Qwen-Image-2.1 from text; wan: Wan2.1
    and Wan2.2 text-to-video; wan_i2v: their image-to-video; wan_vace: Wan2.1 VACE, videos from videos; z_image: Z-Image
    and Z-Image-Turbo; flux2_klein: FLUX.2-klein, distilled and base; flux2: FLUX.2-dev; chroma: Chroma; ltx: LTX-Video
    text-to-video; hunyuan_video15: HunyuanVideo-1.5 text-to-video.
    Source: diffusers' pipelines of these families.
    """

    path: Text
    """The diffusers pipeline: a folder, OWNER/NAME in the local Hugging Face cache, or `tiny`.
    A folder is sought beside the recipe and then in the working folder; `tiny` is the embedded pipeline. Nothing is
    downloaded: what is missing is an error with the command that fetches it.
    Source: ours.
    """

    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    """The number format that the transformer computes in.
    Trained weights, their optimiser state, states and log-probabilities are fp32 under bf16 and fp32 alike; bf16 reads
    copies of the weights that are rounded once per update. fp32 switches TF32 off and needs about twice the memory of
    frozen weights: take it for small models, or to see whether rounding is at fault. fp64 computes everything in
    float64 on the reference backend, for tests and for sd3 only.
    Source: ours.
    """

    lora: Lora | None = None
    """LoRA layers that train beside the frozen transformer; null trains all of its weights.
    With LoRA the reference model is the same transformer with the layers switched off (with model.init_lora, as they
    start), and gradients and optimiser state shrink to the layers. Full training takes a lower update.lr (published for
    FLUX.1-dev: 1e-5 against 3e-4).
    Source: LoRA (2106.09685).
    """

    base_precision: Literal["int8", "fp8", "nf4"] | None = None
    """The precision that the frozen weights under model.lora are stored in; null: that of model.dtype.
    int8 halves the memory of bf16, nf4 takes little more than a quarter, so that a LoRA of FLUX.1 fits 24 GB and one of
    Qwen-Image 32 (`flowgrove plan --memory`). The linear layers of the blocks are rounded once, as they load; passes
    still compute in model.dtype, a little slower, and pictures are those of the rounded model. int8 is nearly exact;
    fp8 is coarser and needs no more; nf4 changes pictures visibly. int8 and fp8 need torchao, nf4 bitsandbytes. The
    exported LoRA is drawn best over the same precision. It goes with neither rollout.precision nor fsdp2.
    Source: QLoRA (2305.14314); int8 and fp8: torchao.
    """

    init_lora: InitLora | None = None
    """A LoRA that the run starts from, merged into the frozen weights or trained on; null: the model as it is.
    The reference model of update.kl_weight and run.eval.tuned_share is the model as it is when training starts, with
    this LoRA. What the file holds enters the run's identity: a run goes on only with the same content. `flowgrove
    export` of a run that trains it on writes the whole LoRA, without need of this one.
    Source: ours.
    """

    guidance_scale: NotNegative = 1.0
    """The scale γ of classifier-free guidance in rollout, training and evaluation; 1 or less is none.
    Models without a guidance input run a second, unconditional row per state, which doubles the cost of every pass, and
    gradients go through both rows. FLUX.1-dev takes γ as an input at no cost. Write what the model will be drawn with;
    what Z-Image's pipeline calls guidance_scale is γ − 1.
    Source: classifier-free guidance (2207.12598).
    """

    negative_prompt: str | None = None
    """What guidance leads away from; null: the model's own, an empty text for most.
    A prompt whose row has a column negative_prompt takes that instead. Only models that run an unconditional row for
    guidance have a use for it.
    Source: the pipelines' negative_prompt in diffusers.
    """

    source_pictures: Annotated[int, Field(ge=0, le=16)] | None = None
    """How many source pictures a prompt has, which the model edits or animates; null: as few as the model allows.
    They stand in the column image or images of the prompt files, as paths relative to the file or as bytes, and every
    prompt has as many. A source is scaled to cover model.height × model.width, and what hangs over is cropped;
    wan_vace has its reference pictures whole, on white. Each adds tokens to every pass where the model reads it beside
    the picture that it draws.
    Source: the pipelines' image in diffusers.
    """

    cfg_normalization: Positive | None = None
    """The most times the norm of the prompt's velocity that a sample's guided velocity may have; null: no limit.
    A longer one is scaled down to it. 1 tames the burnt colours of large scales; what is trained must be drawn with it.
    For models whose guidance takes a second row.
    Source: diffusers' ZImagePipeline, cfg_normalization.
    """

    guidance_scale_2: NotNegative | None = None
    """The guidance scale of the low-noise expert; null: that of model.guidance_scale.
    Only models with two experts take it (Wan2.2's A14B), and both scales are above 1 or neither. Its authors draw
    with 4 and 3.
    Source: guidance_scale_2 of Wan2.2's pipeline in diffusers.
    """

    trained_experts: Literal["both", Expert] = "both"
    """Which of two experts train: both, high or low; the other one is frozen.
    Only models with two experts take it (Wan2.2's A14B): high runs the steps whose σ is at least the pipeline's
    boundary_ratio, low those after them, as `flowgrove plan` shows. Steps of a frozen expert are rolled out, but never
    trained, so every window must reach a step of the other one. An expert that has no trained step in an iteration
    stays as it is, with its moments: nothing decays. One LoRA instead of two halves what trains; both are loaded.
    Source: ours.
    """

    height: Pixels | None = None
    """The height of a picture or frame, in pixels; null: the pipeline's default.
    It must be a multiple of the pixels per token and side: 16 of most published models, 32 of LTX-Video, Wan2.2's
    TI2V-5B and Qwen-Image-2.1. The cost of a pass grows with height × width: published runs train at 512 or 720.
    Source: the pipeline's configuration.
    """

    width: Pixels | None = None
    """The width of a picture or frame, in pixels; null: the pipeline's default.
    What model.height says holds for it too.
    Source: the pipeline's configuration.
    """

    frames: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """The frames of a video; null: the pipeline's default. Only models of videos take it.
    That is 81 of Wan, 121 of its TI2V-5B and of HunyuanVideo-1.5, 161 of LTX-Video. It must be a multiple of 4 plus
    one, of LTX-Video of 8, since the autoencoder joins so many frames. Cost grows linearly with it, attention faster:
    Flow-GRPO trains Wan2.1 on 33.
    Source: the pipelines in diffusers.
    """

    sizes: Annotated[list[tuple[Pixels, Pixels]], Field(min_length=1)] | None = None
    """Several [height, width] that the prompts of an iteration take in turn; null: one size.
    Prompt i takes size i modulo their number, and all sizes train in the same updates. Evaluation draws at the first
    size, unless model.height and model.width are given. Take it where the model must keep drawing other aspect ratios.
    Source: ours.
    """

    text_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """The longest prompt that the model reads, in tokens of its last text encoder; null: the pipeline's own limit.
    That is 512 of most, 256 of sd3, 128 of ltx, 1000 of hunyuan_video15, 1024 of qwen_image21. What is longer is cut,
    with a warning where prompts become equal by it. Lower it to save tokens of every pass where all prompts are short.
    Source: the pipelines' max_sequence_length in diffusers.
    """

    gradient_checkpointing: Checkpointing = "full"
    """What a training pass computes again in its backward instead of keeping it.
    full: all but the inputs of each block, which saves most of the memory of activations for one more forward per
    training pass. selective: all but these and what attention and large matrix products give, which leaves element by
    element work to compute again. none: nothing. auto: of these the one with which, with the rollout's graphs that then
    fit, updates are predicted to be fastest. offload: as full, with the inputs of blocks in pinned host memory until
    their backward, of which each rank takes its own; for videos and pictures whose passes fit in no other way. true is
    full, false is none. The gradient is the same. `flowgrove plan --memory` predicts the peak and tells what auto
    weighs; `flowgrove tune --checkpointing` measures. selective does not go with engine.compile and engine.distributed:
    fsdp2 together.
    Source: Chen et al. (1604.06174); selective: Korthikanti et al. (2205.05198); offload: Rajbhandari et al.
    (1910.02054), P_a+cpu.
    """

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @property
    def trains_initial_lora(self) -> bool:
        """Whether model.lora starts from another LoRA."""
        return self.init_lora is not None and not self.init_lora.merge

    vae_tiling: bool = False
    """Whether the autoencoder decodes in tiles, as diffusers' enable_tiling does.
    It bounds the memory of decoding large pictures and long videos, is slower, and may change pictures at tile borders:
    switch it on where decoding runs out of memory.
    Source: diffusers.
    """
