"""What a recipe may say: its sections, their keys and defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

_LARGEST = 2**31 - 1  # numbers beyond it are mistakes that would cost memory or time before anything else noticed
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Index = Annotated[int, Field(ge=0, le=_LARGEST)]
MOST_LEAVES = 4096  # of a prompt: groups that are published have up to 64, and a plan counts every edge
Steps = Annotated[int, Field(ge=2, le=1000)]  # the schedules that models are trained on have 1000
Share = Annotated[float, Field(gt=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=32_768)]
Text = Annotated[str, Field(min_length=1)]


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
    alpha: Positive
    targets: Annotated[list[Text], Field(min_length=1)] | None = None  # null: the adapter's published ones


class Model(Section):
    adapter: Literal["sd3", "flux", "qwen_image", "wan"]
    path: Text
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    lora: Lora | None = None
    guidance_scale: NotNegative = 1.0
    height: Pixels | None = None
    width: Pixels | None = None
    frames: Annotated[int, Field(ge=1, le=10_000)] | None = None
    sizes: Annotated[list[tuple[Pixels, Pixels]], Field(min_length=1)] | None = (
        None  # heights and widths that the prompts of an iteration take in turn
    )
    text_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = (
        None  # longest prompt that the model reads; null: the pipeline's own
    )
    gradient_checkpointing: bool = True
    vae_tiling: bool = False


class Data(Section):
    prompts: Text
    eval_prompts: Text | None = None
    prompts_per_iteration: Annotated[int, Field(ge=1, le=100_000)] = 8
    prompt_key: str | None = (
        None  # the column of a jsonl, csv, tsv, parquet or datasets file; null: prompt, caption or text
    )
    embedding_cache: Text = "auto"  # auto, none or a folder


class Window(Section):
    strategy: Literal["all", "progressive", "random", "decay", "exp_decay", "frozen", "none"] = "all"
    size: Count = 4
    every: Count = 25
    stride: Count = 1
    start: Index = 0
    range: tuple[int, int] | None = None
    wrap: bool = True
    min_every: Count = 1
    decay_rate: NotNegative = 0.1
    decay_after: Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)] = 13


class Tree(Section):
    splits: list[int] = [0, 3, 6, 9]
    fanout: Annotated[int, Field(ge=2, le=MOST_LEAVES)] = 2
    sibling_correlation: Annotated[float, Field(ge=0, le=1)] = 0.0588
    split_noise_scale: Positive = 1.0

    @model_validator(mode="after")
    def _splits_rise(self) -> "Tree":
        if not self.splits or self.splits != sorted(set(self.splits)) or self.splits[0] < 0:
            raise ValueError("splits must be steps in rising order, like [0, 3, 6, 9]")
        return self


class Tail(Section):
    solver: Literal["dpmpp_2m"] = "dpmpp_2m"
    compress: Share = 0.4


class Cache(Section):
    """diffusers' TaylorSeer cache (Liu et al. 2503.06923)."""

    interval: Annotated[int, Field(ge=2, le=_LARGEST)] = (
        3  # steps from one computation of the attention layers to the next
    )
    order: Annotated[int, Field(ge=0, le=3)] = 1  # of the extrapolation between them


class Rollout(Section):
    steps: Steps = 25
    shift: Annotated[float, Field(ge=1e-6, le=100)] | None = 3.0  # beyond it steps fall together
    dynamics: Literal["flow_sde", "dance_sde", "wan_sde", "cps"] = "flow_sde"
    noise_level: Positive = 0.7
    group_size: Annotated[int, Field(ge=1, le=MOST_LEAVES)] = 12
    shared_initial_noise: bool = True
    window: Window = Window()
    tree: Tree | None = None
    tail: Tail | None = None
    guidance_range: tuple[Index, Count] | None = None  # [lo, hi): other steps without noise run unguided
    cache: Cache | None = None  # attention of the steps after the last stochastic one

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
    weight: float = 1.0


class Prune(Section):
    """`depth` takes depths, first, stop, every, direction; `extreme` takes keep; `parent_top1` nothing."""

    kind: Literal["depth", "parent_top1", "extreme"]
    depths: Count = 4
    first: Index = 10
    stop: Index = 19
    every: Count = 30
    direction: Literal["later", "earlier"] = "later"
    keep: Count = 4

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
    std: Literal["group", "global"] = "group"
    fusion_beta: float = 0.0
    adv_clip: Positive = 5.0
    prune: Prune | None = None


class Update(Section):
    optimizer: Literal["adamw", "adamw_8bit", "apex_fused_adam"] = "adamw"
    lr: Positive = 1.0e-5
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup: Index = 0
    weight_decay: NotNegative = 1.0e-4
    clip_range: Share | tuple[Share, Positive] = 1.0e-4
    kl_weight: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    updates_per_iteration: Count = 4
    partition: Literal["trajectories", "parents"] = "trajectories"
    step_fraction: Share = 1.0
    step_weight: Literal["uniform", "tempflow", "guard"] = "uniform"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class Engine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    token_budget: Literal["auto"] | Count = (
        "auto"  # of a pass; auto: on a GPU measured when a run begins, on a CPU 4096
    )
    share: bool = True
    exact_replay: bool = False
    attention: str = "auto"  # sdpa, flash, flash3, xformers, or another name of diffusers' attention dispatch
    compile: bool = False  # torch.compile of each transformer block
    cuda_graphs: bool = False  # of the rollout's passes
    reuse_rollout_graph: Literal["auto"] | bool = (
        "auto"  # the rollout's forward of trained steps serves the first update, where memory allows
    )
    # another value is refused until there is code behind it
    distributed: Literal["none"] = "none"


class Evaluation(Section):
    steps: Steps | None = None  # null: rollout.steps
    guidance_scale: NotNegative | None = None  # null: model.guidance_scale
    samples: Annotated[int, Field(ge=1, le=MOST_LEAVES)] = 1  # pictures per held-out prompt
    tuned_share: Annotated[float, Field(ge=0, le=1)] = (
        1.0  # of the steps: the tuned model runs these, the reference model the rest
    )


class Run(Section):
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 300
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    out: Text = "runs/NAME"
    checkpoint_every: Index = 50
    keep_last: Count = 3
    keep_best: bool = False  # also the checkpoint of the best held-out reward, made when it is found
    eval_every: Index = 25
    eval: Evaluation = Evaluation()
    log: list[Literal["jsonl", "tensorboard"]] = ["jsonl", "tensorboard"]


class Recipe(Section):
    """One run."""

    model: Model
    data: Data
    rollout: Rollout = Rollout()
    reward: Annotated[list[Reward], Field(min_length=1)]
    credit: Credit = Credit()
    update: Update = Update()
    engine: Engine = Engine()
    run: Run = Run()

    def at_sizes(self) -> list["Recipe"]:
        """This recipe once for each of model.sizes, with that height and width; without sizes, itself."""
        sizes = self.model.sizes
        if sizes is None:
            return [self]
        return [
            self.model_copy(update={"model": self.model.model_copy(update={"height": height, "width": width})})
            for height, width in sizes
        ]
