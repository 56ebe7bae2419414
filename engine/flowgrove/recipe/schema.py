"""What a recipe may say: its sections, their keys and defaults.

The text below a key is its documentation: `flowgrove recipe` prints it and `make docs` writes it to docs/recipe.md. Its
first line says what the key does, its last one where that comes from; a section needs no source of its own.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

LARGEST = 2**31 - 1  # numbers beyond it are mistakes that would cost memory or time before anything else noticed
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Index = Annotated[int, Field(ge=0, le=LARGEST)]
MOST_LEAVES = 4096  # of a prompt: groups that are published have up to 64, and a plan counts every edge
Steps = Annotated[int, Field(ge=2, le=1000)]  # the schedules that models are trained on have 1000
Share = Annotated[float, Field(gt=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=32_768)]
Text = Annotated[str, Field(min_length=1)]
Checkpointing = Literal["full", "selective", "none", "auto"]
Expert = Literal["high", "low"]  # of two transformers: that of states of high noise, and that of the others
# the registry of model families: modules of models/, one a line
AdapterName = Literal[
    "sd3",
    "flux",
    "flux_kontext",
    "qwen_image",
    "qwen_image_edit",
    "wan",
    "wan_i2v",
    "z_image",
    "flux2_klein",
    "flux2",
    "chroma",
    "ltx",
    "hunyuan_video15",
]


class _Said(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        takes = bool in (annotation, *getattr(annotation, "__args__", ()))
        if not takes and any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise ValueError("true and false are neither numbers nor text here: write what is meant")
        return value


class Section(_Said):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    null takes the adapter's: attn.to_q, attn.to_k, attn.to_v, attn.to_out.0, for sd3 and qwen_image also
    attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out; for wan and z_image the first four without attn;
    for flux2 and flux2_klein also attn.to_qkv_mlp_proj. Add feed-forward layers where attention alone does not learn
    what the reward asks for.
    Source: the published configurations of Flow-GRPO (2505.05470) and DanceGRPO (2505.07818).
    """


class InitLora(Section):
    path: Text
    """The LoRA: a .safetensors file, a folder that holds one, or OWNER/NAME in the local Hugging Face cache.
    Layers are found under the names of diffusers and peft, of kohya's scripts and of ComfyUI, as far as diffusers
    converts them. It must fit: a layer that the transformer lacks, or another shape, is an error that names it. A
    folder is sought as model.path is.
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
    sd3: Stable Diffusion 3 and 3.5; flux: FLUX.1-dev and FLUX.1-schnell; flux_kontext: FLUX.1-Kontext-dev;
    qwen_image: Qwen-Image; qwen_image_edit: Qwen-Image-Edit, -2509 and -2511; wan: Wan2.1 and Wan2.2 text-to-video;
    wan_i2v: their image-to-video; z_image: Z-Image and Z-Image-Turbo; flux2_klein: FLUX.2-klein, distilled and base;
    flux2: FLUX.2-dev; chroma: Chroma; ltx: LTX-Video text-to-video; hunyuan_video15: HunyuanVideo-1.5 text-to-video.
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
    int8 halves the memory of bf16, nf4 takes little more than a quarter, so that a LoRA of FLUX.1 or Qwen-Image fits 24
    GB (`flowgrove plan --memory`). The linear layers of the blocks are rounded once, as they load; passes still compute
    in model.dtype, a little slower, and pictures are those of the rounded model. int8 is nearly exact; fp8 is coarser
    and needs no more; nf4 changes pictures visibly. int8 and fp8 need torchao, nf4 bitsandbytes. The exported LoRA is
    drawn best over the same precision. It goes with neither rollout.precision nor fsdp2.
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
    prompt has as many. A source is scaled to cover model.height × model.width, and what hangs over is cropped. Each
    adds tokens to every pass where the model reads it beside the picture that it draws.
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
    It must be a multiple of the pixels per token and side, which is 16 for the published models. The cost of a pass
    grows with height × width: published runs train at 512 or 720.
    Source: the pipeline's configuration.
    """

    width: Pixels | None = None
    """The width of a picture or frame, in pixels; null: the pipeline's default.
    What model.height says holds for it too.
    Source: the pipeline's configuration.
    """

    frames: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """The frames of a video; null: 81, of Wan2.2's TI2V-5B 121. Only models of videos take it.
    It must be a multiple of 4 plus one, since the autoencoder joins 4 frames. Cost grows linearly with it, attention
    faster: Flow-GRPO trains Wan2.1 on 33.
    Source: Wan2.1's pipeline in diffusers.
    """

    sizes: Annotated[list[tuple[Pixels, Pixels]], Field(min_length=1)] | None = None
    """Several [height, width] that the prompts of an iteration take in turn; null: one size.
    Prompt i takes size i modulo their number, and all sizes train in the same updates. Evaluation draws at the first
    size, unless model.height and model.width are given. Take it where the model must keep drawing other aspect ratios.
    Source: ours.
    """

    text_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """The longest prompt that the model reads, in tokens of its last text encoder; null: the pipeline's own limit.
    That is 512, for sd3 256. What is longer is cut, with a warning where prompts become equal by it. Lower it to save
    tokens of every pass where all prompts are short.
    Source: the pipelines' max_sequence_length in diffusers.
    """

    gradient_checkpointing: Checkpointing = "full"
    """What a training pass computes again in its backward instead of keeping it.
    full: all but the inputs of each block, which saves most of the memory of activations for one more forward per
    training pass. selective: all but these and what attention and large matrix products give, which leaves element by
    element work to compute again. none: nothing. auto: of these the one with which, with the rollout's graphs that then
    fit, updates are predicted to be fastest. true is full, false is none. The gradient is the same. `flowgrove plan
    --memory` predicts the peak and tells what auto weighs; `flowgrove tune --checkpointing` measures. selective does
    not go with engine.compile.
    Source: Chen et al. (1604.06174); selective: Korthikanti et al. (2205.05198).
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


class Data(Section):
    prompts: Text
    """The prompts that are trained on: a file, a folder of a dataset, or the name of a public set.
    Formats: text (a prompt per line), jsonl, json, csv, tsv, parquet, a folder of datasets.save_to_disk. Sets: hpdv2,
    hpdv2_benchmark, pickapic_v1, pickapic_v1_test, pickapic_v2, pickapic_v2_test, drawbench, parti_prompts, from the
    local Hugging Face cache. Every pass over the prompts takes a new seeded order.
    Source: ours.
    """

    eval_prompts: Text | None = None
    """Held-out prompts that evaluations draw, in any format of data.prompts; null: no evaluation.
    Each evaluation draws all of them, so some dozens to a few hundred are enough. Take prompts that data.prompts does
    not hold: else the curve does not tell learning from memorising.
    Source: ours.
    """

    prompts_per_iteration: Annotated[int, Field(ge=1, le=100_000)] = 8
    """The prompts of an iteration, each with a group of rollout.group_size samples.
    All of them enter every update, so that more of them make the gradient less noisy; cost and stored states grow
    linearly with it. Published runs take 32 to 48; raise it before update.lr where the reward jumps up and down.
    Source: GRPO (2402.03300), the batch of questions.
    """

    prompt_key: str | None = None
    """The column or field that holds the prompt; null: prompt, caption or text, whichever comes first.
    Text files and public sets have no use for it. It holds for data.prompts and data.eval_prompts.
    Source: ours.
    """

    metadata: list[Text] | Literal["all"] | None = None
    """The other columns of a prompt's row that reach its rewards: names, or all; null: none.
    Rewards that take them say which they read; GenEval's are tag, include and exclude. Columns that hold pictures or
    negative prompts are no metadata. It holds for data.prompts and data.eval_prompts.
    Source: ours.
    """

    embedding_cache: Text = "auto"
    """Where embeddings of prompts are kept on disk: auto, none or a folder.
    auto: text encoders whose files hold up to 1 GiB stay on the device, as all do with none. Of larger ones every
    prompt is encoded once, into flowgrove/embeddings in the user's cache folder (XDG_CACHE_HOME or ~/.cache), and they
    are freed; where that would take more than 20 GiB of disk, they wait in host memory instead. Name a folder to share
    embeddings between runs of several machines, or to allow more than 20 GiB.
    Source: ours.
    """


class Window(Section):
    strategy: Literal["all", "progressive", "random", "decay", "exp_decay", "frozen", "none"] = "all"
    """Where the window stands in an iteration.
    all: every step but the last (of window.range, if given). progressive: it moves by stride every `every` iterations.
    decay, exp_decay: the same, but later positions are kept for fewer iterations. random: a new seeded position in
    every iteration. frozen: it stays at start. none: no window, so that only tree.splits are stochastic. Early steps
    decide composition and carry most of the reward: progressive is the safe choice, frozen at 0 the cheapest with a
    tail.
    Source: MixGRPO (2507.21802), sliding window; all: DanceGRPO and Flow-GRPO; random: Flow-GRPO-Fast.
    """

    size: Count = 4
    """The number of steps in the window; all and none have no use for it.
    Training passes grow linearly with it. MixGRPO takes 4 of 25 steps, Flow-GRPO-Fast 3 and Qwen-Image runs 2 of 10.
    Source: MixGRPO (2507.21802), window size w.
    """

    every: Count = 25
    """How many iterations a position is kept: by progressive always, by decay and exp_decay at first.
    Choose it so that the window crosses its range once within run.iterations, or comes round several times; a value
    above run.iterations never moves it.
    Source: MixGRPO (2507.21802), shift interval τ.
    """

    stride: Count = 1
    """The steps that the window moves at a time (progressive, decay, exp_decay).
    A stride up to window.size trains every step of the range in turn.
    Source: MixGRPO (2507.21802), window stride s.
    """

    start: Index = 0
    """The first position of the window, counted from the beginning of its range.
    random, all and none have no use for it. 0 is the noisiest step, where changes are largest.
    Source: MixGRPO (2507.21802), sliding window.
    """

    range: tuple[int, int] | None = None
    """The steps [lo, hi) that the window may cover, with 0 <= lo < hi <= rollout.steps - 1; null: all but the last.
    The last step is never stochastic, as no noise may be left at its end. [0, 5] of 10 steps keeps training to the
    first, noisy half.
    Source: Flow-GRPO-Fast, in the released code of Flow-GRPO (2505.05470).
    """

    wrap: bool = True
    """Whether a moving window begins anew after its last position; false: it stays there.
    It matters only in runs that are longer than one crossing of the range.
    Source: ours.
    """

    min_every: Count = 1
    """The fewest iterations that decay keeps a position.
    From `every` at the first position the stay falls linearly to it at the last.
    Source: MixGRPO (2507.21802), decaying shift interval.
    """

    decay_rate: NotNegative = 0.1
    """The rate k of exp_decay, per position: stay = ceil(every · exp(-k · max(0, position - decay_after))).
    0 makes it progressive; the larger it is, the sooner late, low-noise steps are left again.
    Source: MixGRPO (2507.21802), exponentially decaying shift interval.
    """

    decay_after: Annotated[int, Field(ge=-LARGEST, le=LARGEST)] = 13
    """The position after which exp_decay begins to shorten the stay.
    13 is about half of the published 25 steps: change it with rollout.steps.
    Source: MixGRPO (2507.21802), exponentially decaying shift interval.
    """


class Tree(Section):
    splits: Literal["auto"] | list[int] = [0, 3, 6, 9]
    """The steps at which every trajectory splits into `fanout`, in rising order; they are stochastic and train.
    Early splits give different compositions, late ones finer credit. No split may be the last step. Below each root a
    tree has fanout^n leaves, with n splits. auto: the run chooses them. In its first `probe` iterations all steps take
    turns as splits; then it keeps the n steps whose noise explains most of the differences in reward, among those that
    `forwards` allows. It needs rollout.window.strategy: none.
    Source: BranchGRPO (2509.06040), branching steps; auto: ours.
    """

    fanout: Annotated[int, Field(ge=2, le=MOST_LEAVES)] = 2
    """The children K of every node at a split.
    rollout.group_size must be K^n with n splits, or without shared noise a multiple of it. 3 with 4 splits makes 81
    leaves.
    Source: BranchGRPO (2509.06040), branch factor K.
    """

    forwards: Count | None = None
    """The most rollout forwards of a prompt that a tree with splits: auto may cost, while probing and after it.
    null: what a tree costs that begins with step 0 and splits at equal distances, n splits over all steps but the last.
    More lets more of the splits be early, which costs forwards, but never leaves or training passes; `flowgrove plan`
    shows what a tree costs.
    Source: ours.
    """

    probe: Annotated[int, Field(ge=1, le=1000)] = 10
    """The iterations, from the first on, in which steps take turns as splits, with splits: auto.
    They train like all others. Every step is a split equally often, as far as `forwards` allows: take as many that
    probe · n is some times the number of steps. More tell the steps apart more surely.
    Source: ours.
    """

    sibling_correlation: Annotated[float, Field(ge=0, le=1)] = 0.0588
    """The correlation ρ between the noises of siblings; each of them alone stays N(0, I).
    ρ = 1/(1 + s²) for the paper's mixing strength s = 4. 0: independent siblings, which differ most; 1: equal siblings,
    which have no advantage.
    Source: BranchGRPO (2509.06040), branch noise.
    """

    split_noise_scale: Positive = 1.0
    """What the noise at splits is multiplied by, while its density stays that of scale 1.
    4 with sibling_correlation 0 repeats BranchGRPO's released code; there log-probabilities are no longer those of the
    sampled noise, so leave it at 1 unless you compare with that code.
    Source: BranchGRPO's released code.
    """

    @model_validator(mode="after")
    def _splits_rise(self) -> "Tree":
        if self.splits == "auto":
            return self
        if not self.splits or self.splits != sorted(set(self.splits)) or self.splits[0] < 0:
            raise ValueError("splits must be steps in rising order, like [0, 3, 6, 9], or auto")
        if self.forwards is not None:
            raise ValueError("forwards is the budget of splits: auto, and the splits are given: remove one of them")
        return self


class Tail(Section):
    solver: Literal["dpmpp_2m"] = "dpmpp_2m"
    """The solver of the steps after the last stochastic one: DPM-Solver++ 2M, midpoint.
    It is of second order from its second step on; the first, and the last to σ = 0, are Euler's.
    Source: DPM-Solver++ (2211.01095), algorithm 2; MixGRPO-Flash (2507.21802).
    """

    compress: Share = 0.4
    """The share of the remaining steps that are taken, rounded to the nearest whole number and at least one.
    The rollout's forwards fall with it: 0.4 in MixGRPO-Flash, 0.2 with its frozen window. Lower values blur training
    pictures, so that rewards no longer rank what the full schedule would draw. 1 changes the solver alone.
    Source: MixGRPO-Flash (2507.21802).
    """


class Cache(Section):
    """diffusers' TaylorSeer cache (Liu et al. 2503.06923)."""

    interval: Annotated[int, Field(ge=2, le=LARGEST)] = 3
    """The steps from one computation of the attention layers to the next.
    In between they are extrapolated. Larger saves more of each forward and changes pictures more.
    Source: TaylorSeer (2503.06923), interval N.
    """

    order: Annotated[int, Field(ge=0, le=3)] = 1
    """The order of the Taylor extrapolation between two computations; 0 reuses the last value.
    The first order + 1 steps of the cached part are computed. Each order holds one more tensor per layer and row.
    Source: TaylorSeer (2503.06923), order O.
    """


class Rollout(Section):
    steps: Steps = 25
    """The denoising steps T of a training sample.
    Forwards of the rollout grow linearly with it. Few steps are enough to rank samples: Flow-GRPO trains SD3.5 with 10
    and evaluates with 40 (run.eval.steps), MixGRPO trains FLUX.1-dev with 25.
    Source: Flow-GRPO (2505.05470), denoising reduction.
    """

    shift: Annotated[float, Field(ge=1e-6, le=100)] | None = 3.0  # beyond it steps fall together
    """The shift of the noise levels, σ = shift·t/((1 - t) + shift·t); null: the table of the pipeline's scheduler.
    Above 1 more steps are spent at high noise, as large pictures need; 1 is uniform. Take null where the trained model
    is to be drawn with the pipeline's own schedule.
    Source: Esser et al. (2403.03206), resolution-dependent shift.
    """

    dynamics: Literal["flow_sde", "dance_sde", "wan_sde", "cps"] = "flow_sde"
    """The law of the noise in stochastic steps.
    flow_sde: standard deviation rate g = η·sqrt(σ/(1 - σ)), much noise early; dance_sde: g = η at every step; wan_sde:
    g = σ·σ_1, with the table's second entry σ_1 and without η; cps: coefficients-preserving sampling, which leaves
    exactly the noise that the next step expects, where the others leave some too much (visible as grain). Its
    log-probability is no density, so update.clip_range means something else with it.
    Source: Flow-GRPO (2505.05470); DanceGRPO (2505.07818); Flow-GRPO's code for Wan; CPS (2509.05952).
    """

    noise_level: Positive = 0.7
    """The noise level η of stochastic steps; at most 1 with cps, without effect on wan_sde.
    More explores more and gives noisier samples, which rewards score lower. Published: flow_sde 0.7 (Qwen-Image 1.2),
    dance_sde 0.3, cps 0.8. Raise it where the samples of a group score alike.
    Source: Flow-GRPO (2505.05470), noise level a; DanceGRPO (2505.07818), ε_t; CPS (2509.05952), η.
    """

    group_size: Annotated[int, Field(ge=1, le=MOST_LEAVES)] = 12
    """The samples G (leaves) of a prompt, which are compared with each other.
    More give advantages of less noise at linear cost. Published: 12 to 24. With a tree it is the number of leaves:
    fanout^n with n splits, or a multiple of it without shared noise.
    Source: GRPO (2402.03300), group size G.
    """

    shared_initial_noise: bool = True
    """Whether the samples of a prompt begin with the same noise.
    Then they are one state up to the first stochastic step, which saves its forwards, and differences in reward come
    from the trained steps alone. false (Flow-GRPO) gives more varied groups; a tree may then have several roots.
    Source: DanceGRPO (2505.07818), shared initialization noise.
    """

    window: Window = Window()
    """Which steps are stochastic and train; the others are steps of the ODE.
    Source: MixGRPO (2507.21802), sliding window.
    """

    tree: Tree | None = None
    """A tree of trajectories that split at chosen steps; null: a flat group.
    Trajectories share their states up to a split, and every edge gets an advantage from the leaves below it. The
    window's steps are stochastic besides the splits.
    Source: BranchGRPO (2509.06040).
    """

    tail: Tail | None = None
    """Fewer steps of a higher-order solver after the last stochastic step; null: the schedule's own ODE steps.
    It saves the larger part of the rollout's forwards where the window is early. Evaluation does without it.
    Source: MixGRPO-Flash (2507.21802).
    """

    guidance_range: tuple[Index, Count] | None = None
    """The steps [lo, hi) with guidance; other steps of the ODE run unguided. null: all are guided.
    Stochastic steps are always guided. It halves the cost of a step without guidance, changes training pictures, and is
    for models whose guidance takes a second row. Evaluation is guided throughout. Not together with rollout.cache.
    Source: Kynkäänniemi et al. (2404.07724).
    """

    cache: Cache | None = None
    """Extrapolated attention in the steps after the last stochastic one; null: every step is computed.
    It changes training pictures and so their rewards; no extrapolated step trains. CUDA graphs leave these steps alone.
    Evaluation does without it.
    Source: TaylorSeer (2503.06923), as diffusers has it.
    """

    precision: Literal["fp8", "int8"] | None = None
    """The precision of linear layers in steps that do not train; null: that of all other passes.
    fp8 (float8 e4m3, on GPUs from compute capability 8.9 on) or int8 (everywhere) rounds the weights of the
    transformer's blocks per output channel and activations per token, by torchao and torch's own kernels. The rounded
    weights take a byte each beside the others. It changes training pictures a little (rollout_distance of metrics);
    steps with a gradient or a log-probability that counts, evaluation and samples are in full precision. Not for
    model.dtype fp64 and engine.distributed: fsdp2.
    Source: torchao's dynamic quantisation; LLM.int8 (2208.07339) and FP8 formats (2209.05433).
    """

    attention: Text | None = None
    """The attention kernel of steps that do not train; null: engine.attention.
    The names of engine.attention but those of a hub, and those that have no backward or none to trust: sage and its
    kind, which round queries and keys to 8 bits, and cudnn. It changes training pictures a little (rollout_distance of
    metrics); the steps are those of rollout.precision, with which it goes together. `flowgrove bench rows --modes
    eager,attention` measures what runs here. Not for adapter sd3 and engine.distributed: fsdp2.
    Source: diffusers' attention dispatch; SageAttention (2410.02367).
    """

    @property
    def cheapens(self) -> bool:
        """Whether steps that do not train run otherwise than those that do."""
        return self.precision is not None or self.attention is not None

    @model_validator(mode="after")
    def _cps_noise(self) -> "Rollout":
        if self.dynamics == "cps" and self.noise_level > 1:
            raise ValueError("noise_level is at most 1 with dynamics: cps")
        return self

    @model_validator(mode="after")
    def _one_saving(self) -> "Rollout":
        if self.cache is not None and self.guidance_range is not None:
            raise ValueError(
                "cache and guidance_range do not go together, since guided passes have other rows: remove one of them"
            )
        return self


class Reward(_Said):
    """name, weight, and what the reward of that name takes besides."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    name: str
    """The reward, each at most once; what else it takes stands beside name and weight.
    aesthetic (path, clip, batch_size, dtype): LAION's aesthetic predictor. clip_score (path, batch_size, dtype): 100 ·
    cosine of CLIP ViT-L/14. clip_similarity (source, path, batch_size, dtype): the same of result and source picture.
    diversity (path, batch_size, dtype): how far pictures of a prompt are apart, by CLIP. geneval (url, batch_size,
    timeout, retries, concurrency, max_answer_mb, key_variable): objects, counts, colours and places, by a server that
    gets the prompt's row. hpsv2 (path, processor, batch_size, dtype): HPSv2.1. http (url, video, batch_size, timeout,
    retries, concurrency, max_answer_mb, key_variable, metadata, sources, group): a server of yours. image_reward (path,
    tokenizer, batch_size, dtype): ImageReward-v1.0. jpeg_size (quality, bigger): kilobytes. ocr (column): how much of a
    quoted text is read in the picture, by RapidOCR. pickscore (path, processor, batch_size, dtype): PickScore. python
    (file, function, video, timeout, group): a function of yours, with --allow-python. shapes: the embedded pipeline's
    checker. unified_reward (url, model, instruction, max_tokens, timeout, retries, concurrency, key_variable): a judge
    behind an OpenAI-compatible server. video_quality (url, batch_size, timeout, retries, concurrency, max_answer_mb,
    key_variable): a server that judges whole videos.
    Source: HPSv2 (2306.09341), PickScore (2305.01569), ImageReward (2304.05977), CLIPScore (2104.08718), UnifiedReward
    (2503.05236), LAION-5B (2210.08402), GenEval (2310.11513), Flow-GRPO (2505.05470), ocr; http, python, jpeg_size,
    shapes, diversity: ours.
    """

    weight: float = 1.0
    """The weight of the reward in the sum of several; negative: less of it is better.
    With credit.normalise per_reward it weighs advantages, whose scale is the same for all rewards; with weighted_sum it
    weighs raw scores, whose scales differ. eval_reward is the weighted sum of raw scores under both.
    Source: DanceGRPO (2505.07818) and MixGRPO (2507.21802), several rewards.
    """


class Prune(Section):
    """`depth` takes depths, first, stop, every, direction; `extreme` takes keep; `parent_top1` nothing."""

    kind: Literal["depth", "parent_top1", "extreme"]
    """Which edges do not train; all of them are rolled out.
    depth: those of a window of steps. parent_top1: at the last split, of each parent's children all but the best and
    what follows from them. extreme: all that lead to none of the best and worst `keep` leaves of a prompt.
    Source: BranchGRPO (2509.06040), depth pruning and width pruning.
    """

    depths: Count = 4
    """The number of steps that depth pruning leaves out at a time.
    Training passes fall by about the edges of these steps.
    Source: BranchGRPO (2509.06040), depth pruning.
    """

    first: Index = 10
    """The first step that depth pruning leaves out at the beginning.
    10 is the first step after the splits of the published tree.
    Source: BranchGRPO (2509.06040), depth pruning.
    """

    stop: Index = 19
    """The step at which the pruned window stops moving.
    It stops when its last step has reached it, with direction earlier when its first step has; there it must be less
    than `first`, or the window does not move.
    Source: BranchGRPO (2509.06040), depth pruning.
    """

    every: Count = 30
    """How many iterations the pruned window stays before it moves by one step.
    Source: BranchGRPO (2509.06040), depth pruning.
    """

    direction: Literal["later", "earlier"] = "later"
    """Whether the pruned window moves to later steps (less noise) or to earlier ones.
    Source: BranchGRPO (2509.06040), depth pruning; earlier: ours.
    """

    keep: Count = 4
    """How many of the best and of the worst leaves of a prompt `extreme` trains on, each.
    Twice as many leaves train; where that is the whole group, nothing is pruned.
    Source: BranchGRPO (2509.06040), width pruning.
    """

    @model_validator(mode="after")
    def _own_keys(self) -> "Prune":
        """Keys of another kind at their defaults are those of a recipe that is written out in full."""
        own = {"depth": ("depths", "first", "stop", "every", "direction"), "extreme": ("keep",), "parent_top1": ()}[
            self.kind
        ]
        for key in type(self).model_fields:
            if key not in ("kind", *own) and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"kind {self.kind} does not take {key}: it takes {', '.join(own) or 'nothing'}")
        return self


class Credit(Section):
    normalise: Literal["per_reward", "weighted_sum"] = "per_reward"
    """Whether each reward is normalised for itself and the advantages are summed, or the weighted sum is normalised.
    per_reward lets rewards of different scales count by their weights alone. weighted_sum lets the one with the larger
    spread rule, and keeps agreement between rewards. With one reward of weight 1 both are the same.
    Source: MixGRPO's released code, aggregation of advantages or of rewards.
    """

    baseline: Literal["depth", "siblings"] = "depth"
    """What a node of a tree is compared with: the mean of its depth, or the mean of the other children of its parent.
    siblings credits a split with what it decides itself, not with how well its parent had done. Edges that follow a
    split have the split's advantage; before the first split the roots are compared, and below a single root nothing.
    With std: none the expected gradient is then the true one, at splits times 1 - ρ (rollout.tree.sibling_correlation;
    0 for an unbiased one). The mean of a depth holds the node itself: times 1 - (1 + (K - 1)·ρ)/n for n nodes, K of a
    parent. In a flat group of K siblings is K/(K - 1) times depth.
    Source: leave-one-out: Kool et al. 2019, RLOO (2402.14740); among siblings: TreeRPO (2506.05183); depth: BranchGRPO
    (2509.06040).
    """

    std: Literal["group", "global", "leaves", "none"] = "group"
    """Whose standard deviation divides the differences: the group's, that of all prompts, the leaves', or nobody's.
    group gives every prompt the same weight, also where its samples hardly differ, which turns the mean gradient;
    global and none let prompts whose samples differ more train more, and do not. At each depth of a tree the nodes of
    that depth are the group, so that two nodes always get ±0.71 (±1.41 with baseline: siblings), however little they
    differ. leaves divides every depth by the spread of the leaves' rewards: a split counts by how much of it it
    explains. In a flat group that is the same as group. none keeps the rewards' own scale, which adv_clip then has too,
    and lets them weigh by it; credit.normalise has no effect with it.
    Source: GRPO (2402.03300); global: Flow-GRPO's released code; leaves: ours; none: Dr. GRPO (2503.20783).
    """

    std_shrinkage: NotNegative = 0.0
    """How far the spread of a depth is drawn towards that of the prompt's leaves: a weight in nodes; 0: not at all.
    A depth of n nodes is divided by sqrt(((n - 1)·s² + k·s_leaves²)/(n - 1 + k)). It lies between std group (0) and
    leaves (large): 2 to 8 tames the depths of two to four nodes and hardly touches those of 16. For std: group only.
    Source: empirical Bayes variances: Smyth 2004 (limma), prior degrees of freedom; for depths of a tree: ours.
    """

    fusion_beta: float = 0.0
    """The β of the softmax over path log-probabilities that weighs the leaves below a node; 0: their plain mean.
    Log-probabilities are means over D latent elements, so that β must be of the order of sqrt(D) to matter; it then
    prefers leaves of small noise. Without a tree it has no effect.
    Source: BranchGRPO (2509.06040), path-probability reward fusion.
    """

    adv_clip: Positive = 5.0
    """The largest magnitude of an advantage, in standard deviations (std: none: in rewards); what is beyond is clamped.
    It bounds what one outlier of a reward can do. In groups of 12 no advantage of one reward exceeds 3.2.
    Source: DanceGRPO's released code.
    """

    prune: Prune | None = None
    """Which edges are left out of training to save passes; null: none.
    Source: BranchGRPO (2509.06040), pruning.
    """

    @model_validator(mode="after")
    def _shrinks_a_group(self) -> "Credit":
        if self.std_shrinkage > 0 and self.std != "group":
            raise ValueError(f"std_shrinkage goes with std: group, not with {self.std}: write 0, or std: group")
        return self


class Update(Section):
    optimizer: Literal["adamw", "adamw_8bit", "apex_fused_adam"] = "adamw"
    """The optimiser: PyTorch's fused AdamW, torchao's 8-bit AdamW, or NVIDIA apex's FusedAdam (on a GPU).
    State per trained weight: 8 bytes, 2 bytes, 8 bytes. Take adamw_8bit where all weights train and memory is short;
    with LoRA it saves nothing that counts.
    Source: AdamW (1711.05101); 8-bit optimisers (2110.02861).
    """

    lr: Positive = 1.0e-5
    """The learning rate, per optimiser update.
    Published: 1e-5 for all weights, 1e-4 to 3e-4 for LoRA. Lower it where the reward collapses, pictures break or
    clipped fractions exceed a third; raise it where ratios stay at 1 and the reward is flat.
    Source: MixGRPO (2507.21802) and Flow-GRPO (2505.05470), training settings.
    """

    lr_schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate develops: constant, or a half cosine that falls to 0 at the end of the run.
    With cosine the weights depend on run.iterations, so that it cannot be changed when a run is resumed.
    Source: SGDR (1608.03983), without restarts.
    """

    warmup: Index = 0
    """The optimiser updates over which the learning rate rises linearly to update.lr.
    Those of earlier iterations count as if each had had as many as the present one. Some tens help where the first
    iterations are the worst.
    Source: Goyal et al. (1706.02677), §2.2.
    """

    weight_decay: NotNegative = 1.0e-4
    """The decoupled weight decay: every update shrinks trained weights by the share lr · weight_decay.
    At these learning rates its effect is small; published runs keep 1e-4.
    Source: AdamW (1711.05101); MixGRPO (2507.21802), training settings.
    """

    clip_range: Share | tuple[Share, Positive] = 1.0e-4
    """How far the policy ratio may leave 1 before its edge stops training: ε, or [ε_low, ε_high].
    Log-probabilities are means over latent elements, so that useful values are far below the 0.2 of language models:
    1e-5 (cps) to 1e-3 (trees, tiny models). An edge of positive advantage is clipped above 1 + ε_high, one of negative
    below 1 - ε_low. Raise it where clipped_low and clipped_high exceed a third, lower it where updates run away. The
    first update of an iteration has ratio 1 and is never clipped.
    Source: PPO (1707.06347), §3; a pair: DAPO (2503.14476), clip-higher.
    """

    kl_weight: NotNegative = 0.0
    """The weight β of the divergence from the reference model, in velocity space; 0: none is computed.
    It is the KL of the two Gaussian steps per latent element. Each training pass then runs the reference model's
    forward too, and edges without advantage train as well; without LoRA a frozen copy of the transformer is held. Raise
    it (published runs: 0.004 in this scale) against reward hacking: pictures that score higher and look worse.
    Source: Flow-GRPO (2505.05470), KL in closed form.
    """

    max_grad_norm: Positive = 1.0
    """The L2 norm over all trained weights that a gradient is scaled down to where it is larger.
    A gradient that is not finite skips its update. AdamW is almost blind to a constant scale, so that this only tames
    outliers; grad_norm is the norm before scaling.
    Source: Pascanu et al. (1211.5063); 1.0: DanceGRPO and MixGRPO.
    """

    updates_per_iteration: Count = 4
    """The optimiser updates of an iteration, each on its share of every prompt's samples.
    At most the samples of a group. More make better use of a rollout, and all but the first are off-policy, which
    clip_range bounds; each holds fewer samples, and states that they share are run again. 1 is on-policy throughout:
    ratios are 1 and nothing is clipped.
    Source: MixGRPO (2507.21802), training settings: 4 updates of 3 of 12 trajectories.
    """

    edges_per_update: Count | None = None
    """The edges of a prompt that an update trains, drawn by seed; null: those of updates_per_iteration.
    The iteration then has as many updates as all trained edges take, the last with what is left, and
    updates_per_iteration says nothing. Edges that pruning by reward or step_fraction leaves out are missing in their
    updates. BranchGRPO's code steps after 12 edges of a GPU's two trees, 6 of each: 34 updates an iteration without
    pruning, 6 with a window of 4. Many small updates move the weights further at the same learning rate, and run shared
    states again.
    Source: BranchGRPO's released code (2509.06040).
    """

    partition: Literal["trajectories", "parents"] = "trajectories"
    """How edges are divided over the updates: with their trajectory, or with their siblings.
    trajectories is what the published loops do, and runs a state once for each update that has one of its children.
    parents runs every state once: fewer training passes, at updates of less equal size. With edges_per_update the edges
    are drawn one by one, or as siblings.
    Source: trajectories: the published loops; parents: ours.
    """

    step_fraction: Share = 1.0
    """The share of the stochastic steps that each sample trains on, drawn anew by seed for every sample.
    Training passes fall with it, but less where samples share states, since each draws for itself.
    Source: DanceGRPO (2505.07818), timestep selection: 0.6.
    """

    step_weight: Literal["uniform", "tempflow", "guard", "leaves"] = "uniform"
    """How much the edges of each step count in the loss.
    uniform: 1. tempflow: its noise's standard deviation, with mean 1 over the trained steps, so that noisy early steps
    count more. guard: 1/Δσ, with a ratio whose mean does not drift below 1 and whose spread is more equal over steps;
    its ratios have another scale, so that clip_range has to be set anew. leaves: the leaves below each edge, with mean
    1 over the edges of the trained steps: all steps of a tree then count alike, as in its policy gradient, where
    uniform lets late ones count more, which have more edges. In a flat group it is uniform.
    Source: tempflow: TempFlow-GRPO (2508.04324); guard: GRPO-Guard (2510.22319); leaves: ours, the gradient's own.
    """

    detach_unconditional: bool = False
    """Whether the unconditional half of guidance is a constant in the gradient.
    The guided velocity is the same, and only its conditional half trains, as in flow_grpo's loop for SD3. It is for
    repeating such runs, on models whose guidance takes a second row.
    Source: Flow-GRPO's released code (2505.05470).
    """

    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The decay of an average of the trained weights, per update; null: none.
    Evaluation, sampling and export then use the average, training does not. It holds one more fp32 copy of the trained
    weights. 0.9 to 0.99 smooths a jumpy curve; 0.999 needs thousands of updates to follow.
    Source: Polyak averaging; Flow-GRPO's released code.
    """


class Engine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the run computes; auto takes a CUDA GPU where torch sees one.
    Source: ours.
    """

    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """The implementation of the fused step, log-probability and loss.
    auto leaves it to the variable FLOWGROVE_BACKEND, else to the device. reference is PyTorch and the specification of
    the others; all agree up to rounding. Name one to rule the others out when a run misbehaves; `flowgrove doctor` says
    which are available.
    Source: ours.
    """

    token_budget: Literal["auto"] | Count = "auto"
    """The most tokens of a pass: rows × (picture + text tokens of the longest), both rows of guidance counted.
    Rollout, training and evaluation fill passes up to it. auto: on a CPU 4096; on a GPU the fastest that fits, measured
    when a run begins and remembered in the user's cache folder. Where memory runs out passes are halved and the run
    goes on. Change it after `flowgrove tune`, or to leave room for others.
    Source: ours.
    """

    share: bool = True
    """Whether a state that several trajectories share is computed once.
    false runs every trajectory and edge for itself, as the published loops do: the same samples, losses and gradients
    up to rounding, at their cost. It is for comparisons.
    Source: ours; sharing in the rollout: BranchGRPO (2509.06040).
    """

    exact_replay: bool = False
    """Whether training repeats the rollout's passes row by row, so that logp_drift is exactly 0.
    Rows that do not train run along, and the first update does not reuse the rollout's graphs. Switch it on to see
    whether rounding in other batches is what hurts; it needs share.
    Source: ours.
    """

    attention: str = "auto"
    """The attention kernel: auto, sdpa, flash, flash3, xformers, cudnn, or another name of diffusers' dispatch.
    auto and sdpa are PyTorch's own without cuDNN's kernels, whose backward has read outside its memory on an H200;
    cudnn asks for them all the same. `flowgrove doctor` says which can run here, `flowgrove tune` measures them and
    refuses those whose results differ.
    Source: diffusers' attention dispatch.
    """

    compile: bool | Literal["max-autotune-no-cudagraphs"] = False
    """Whether torch.compile compiles each transformer block, and how.
    true: a handful of graphs, for passes of any rows and lengths, before the first iteration: minutes that pay in long
    runs, and less the next time, since compiled code stays in the user's cache folder (TORCHINDUCTOR_CACHE_DIR).
    max-autotune-no-cudagraphs: it also times several kernels for each product, which takes longer. CUDA graphs are
    engine.cuda_graphs, which goes with either. `flowgrove tune --compile` measures it.
    Source: PyTorch's regional compilation; the modes are torch.compile's.
    """

    cuda_graphs: bool = False
    """Whether the rollout's passes are recorded as CUDA graphs and replayed, one per shape; on a GPU only.
    It helps where launching kernels takes longer than running them: small models, few rows. Recordings hold memory.
    Source: PyTorch's CUDA graphs.
    """

    reuse_rollout_graph: Literal["auto"] | bool = "auto"
    """Whether the rollout's forward of trained steps serves the backward of the first update, whose policy it shares.
    It saves those forwards and makes their logp_drift 0, and holds their activations through the rollout. auto: as many
    as by prediction fit into the GPU's memory, or a quarter of the machine's, and only of passes that fill a quarter of
    the token budget; none with pruning by reward. true: all of them, until memory runs out. false: none.
    Source: ours.
    """

    ahead: bool = False
    """Whether the next iteration's prompts are encoded while this one's updates run.
    Its states and rewards must wait for the new weights; texts and source pictures need not. It helps where encoders
    stay loaded (data.embedding_cache) and `flowgrove profile` shows time in encode; what a prompt's encoding takes then
    comes on top of an update's memory. Encoders that wait in host memory stay there. The result is the same.
    Source: ours.
    """

    distributed: Literal["none", "ddp", "fsdp2"] = "none"
    """How a run is spread over the processes that torchrun starts, one for each device.
    Each trains on its share of an iteration's prompts, and gradients are added up; the result is that of one process.
    ddp: every device holds the whole model, and one reduction adds up the gradients of an update; made for LoRA. fsdp2:
    weights, gradients, moments and averages are divided among the devices; made for full fine-tuning, and for LoRA on
    models that fill a device.
    Source: PyTorch Distributed (2006.15704), PyTorch FSDP (2304.11277); the division of prompts is ours.
    """

    reshard_after_forward: Literal["auto"] | bool = "auto"
    """Whether fsdp2 frees a block's gathered weights when a training pass has left it, and gathers them again.
    false: they stay gathered until they change, one gather an update, with the whole model in model.dtype on every
    device. true: one block at a time, two gathers a pass. auto: false where the memory prediction says that it fits.
    Rollouts and evaluations run gathered in any case.
    Source: PyTorch FSDP2's fully_shard.
    """

    shard_degree: Count | None = None
    """Among how many devices fsdp2 divides the weights; null: all of them.
    The number of devices of a machine, on several machines, divides within each and adds up gradients between them
    (HSDP): gathers then stay on the fast links, and every machine holds all weights once.
    Source: PyTorch FSDP (2304.11277), hybrid sharding.
    """

    @field_validator("compile", mode="before")
    @classmethod
    def _mode_of_compile(cls, value: Any) -> Any:
        if value in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"{value} records CUDA graphs of its own, which passes whose graphs are kept would overwrite: write "
                "true or max-autotune-no-cudagraphs, and engine.cuda_graphs: true"
            )
        return value


class Evaluation(Section):
    steps: Steps | None = None
    """The denoising steps of evaluations and `flowgrove sample`; null: rollout.steps.
    Write what the model will be drawn with: 40 to 50 for models that train with 10 to 25.
    Source: Flow-GRPO (2505.05470), denoising reduction.
    """

    guidance_scale: NotNegative | None = None
    """The guidance scale of evaluations and `flowgrove sample`; null: model.guidance_scale.
    A model that was trained without guidance may draw better with some, and the other way round. Both experts of a
    model that has two are drawn with it.
    Source: classifier-free guidance (2207.12598).
    """

    samples: Annotated[int, Field(ge=1, le=MOST_LEAVES)] = 1
    """The pictures of every held-out prompt, each from a fixed noise of its own.
    More make eval_reward less noisy at linear cost; with few prompts take 4.
    Source: ours.
    """

    tuned_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share of the steps, from the first, that the trained model runs; the reference model runs the rest.
    0.8 leaves fine detail to the reference model, which takes back some of what a hacked reward has done to it. Without
    LoRA a frozen copy of the transformer is held.
    Source: MixGRPO (2507.21802), hybrid inference.
    """


class Tracking(Section):
    project: Text | None = None
    """The project that the run belongs to; MLflow calls it an experiment.
    null takes what WANDB_PROJECT, SWANLAB_PROJ_NAME or MLFLOW_EXPERIMENT_NAME says, and else flowgrove.
    Source: ours.
    """

    name: Text | None = None
    """The run's name there; null: that of the run's folder.
    A run that goes on is the same one there whatever its name.
    Source: ours.
    """

    entity: Text | None = None
    """The user, team or workspace that the project belongs to, of wandb and swanlab; null: yours.
    Keys never stand in a recipe: the packages read them from where their own login leaves them.
    Source: ours.
    """

    group: Text | None = None
    """The group of runs that this one belongs to, such as one recipe with several seeds.
    Source: ours.
    """

    tags: list[Text] = []
    """Words by which runs are found.
    Source: ours.
    """

    mode: Literal["online", "offline"] | None = None
    """Whether what is tracked is sent or kept on this machine, to be sent later.
    null leaves it to the package: WANDB_MODE, SWANLAB_MODE, and where its own variables say that a server is.
    Source: ours.
    """


class Run(Section):
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 300
    """The iterations of the run: each a rollout, its rewards and its updates.
    A finished run goes on where a larger number is given with the same run.out, unless update.lr_schedule is cosine.
    Source: MixGRPO (2507.21802), training settings.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """What decides all random choices: noise, order of prompts, random windows and steps, LoRA's first weights.
    On a CPU the same seed and recipe give the same weights to the last bit. Evaluation noise depends on it too, so
    compare recipes at equal seeds, and over several.
    Source: ours.
    """

    out: Text = "runs/NAME"
    """The folder of the run, relative to the working folder; NAME stands for the recipe's file name without suffix.
    A folder holds one run: the same command goes on with it.
    Source: ours.
    """

    checkpoint_every: Index = 50
    """The iterations between two checkpoints; 0: only the last.
    A run that is stopped by a signal saves besides. A crash loses what came after the last one.
    Source: ours.
    """

    keep_last: Count = 3
    """How many of the newest checkpoints are kept.
    One holds the trained weights in fp32 and the optimiser's state: 12 bytes per trained weight with adamw, so 0.2 to
    2.5 GB for the shipped LoRA recipes, and 143 GB for all weights of FLUX.1-dev.
    Source: ours.
    """

    keep_best: bool = False
    """Whether the checkpoint of the best held-out reward is kept too; it is written when it is found.
    It needs evaluations. `--checkpoint best` of sample, eval and export takes it.
    Source: ours.
    """

    eval_every: Index = 25
    """The iterations between two evaluations on data.eval_prompts; 0: none.
    The base model and the final one are evaluated too. An evaluation draws prompts × run.eval.samples pictures; see
    that it takes a small share of the run's time.
    Source: ours.
    """

    forest_every: Index | None = None
    """The iterations between two pictures of a forest; 0: none, null: those of run.eval_every.
    Of the first scored prompt of such an iteration, and of the last iteration, the run's forests/ gets all advantages,
    log-probabilities and rewards, with small pictures of leaves and inner nodes, for the report. It costs the decoding
    of up to 128 pictures, fewer where they are large, or of 4 videos; it changes nothing that trains, and keeps at most
    64 forests, of groups of up to 256 leaves.
    Source: ours.
    """

    gradient_noise_every: Count | None = None
    """The iterations between two measurements of the gradient's signal and noise; null: none.
    Measured are gradient_snr and the numbers beside it in metrics.jsonl, of every trained step, which the report draws
    and judges: they tell why a recipe learns slowly. A measurement runs the rows of all
    updates of the iteration once more, in many small passes: it takes several times their seconds where passes are
    small, and `flowgrove plan --time` leaves it out. It changes nothing that trains, so that it may be switched on when
    a run goes on, and is left out with a warning where memory has no room for it. Only with engine.distributed: fsdp2 a
    memory that is full in it ends the run, as in an update. 5 to 10 is often enough.
    Source: the gradient noise scale (1812.06162), of steps and halves of the leaves: ours.
    """

    most_skipped_updates: Count = 10
    """How many updates in a row may be skipped, because their gradient was not finite, before the run saves and ends.
    A skipped update leaves weights, moments and averages as they are, and single ones do no harm; counted are those of
    iterations none of whose updates came through.
    Source: ours.
    """

    eval: Evaluation = Evaluation()
    """How evaluations and `flowgrove sample` draw: with the plain ODE, from fixed noise."""

    log: list[Literal["jsonl", "tensorboard", "wandb", "swanlab", "trackio", "mlflow"]] = ["jsonl", "tensorboard"]
    """Where metrics and sample grids go besides the screen and the run's folder, which always gets metrics.jsonl.
    Trackers need their packages, as by pip install wandb; `flowgrove doctor` says which are there. None of them stops a
    run or holds it up.
    Source: ours.
    """

    tracking: Tracking = Tracking()
    """What the trackers in run.log are told of the run besides its recipe; TensorBoard needs none of it."""

    def measures_noise(self, iteration: int) -> bool:
        """Whether this iteration measures the gradient's noise."""
        return self.gradient_noise_every is not None and iteration % self.gradient_noise_every == 0


class Recipe(Section):
    """One run."""

    model: Model
    """The pipeline, what of it trains, in which precision, and the size of its samples."""

    data: Data
    """The prompts, and how many an iteration takes."""

    rollout: Rollout = Rollout()
    """How training samples are drawn: schedule, noise, groups, and which steps are stochastic and train."""

    reward: Annotated[list[Reward], Field(min_length=1)]
    """The rewards, a list of {name, weight, options}; --set reads reward.0.weight and the like."""

    credit: Credit = Credit()
    """How rewards become advantages of edges."""

    update: Update = Update()
    """The loss, the optimiser, and how an iteration's edges are divided into updates."""

    engine: Engine = Engine()
    """How it is computed: speed and memory, not what is learnt."""

    run: Run = Run()
    """Length, seed, folder, checkpoints and evaluation."""

    @property
    def largest_guidance(self) -> float:
        """The larger guidance scale of training and evaluation."""
        return max(self.model.guidance_scale, self.run.eval.guidance_scale or 0.0)

    @property
    def uses_reference(self) -> bool:
        """Whether anything is compared with the model as it was before training, or drawn with it."""
        return self.update.kl_weight > 0 or self.run.eval.tuned_share < 1

    def at_sizes(self) -> list["Recipe"]:
        """This recipe once for each of model.sizes, with that height and width; without sizes, itself."""
        sizes = self.model.sizes
        if sizes is None:
            return [self]
        return [
            self.model_copy(update={"model": self.model.model_copy(update={"height": height, "width": width})})
            for height, width in sizes
        ]
