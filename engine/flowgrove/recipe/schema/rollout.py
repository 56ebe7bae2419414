"""What a recipe says of how samples are drawn: `rollout`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowgrove.recipe.schema.values import (
    LARGEST,
    MOST_LEAVES,
    Count,
    Index,
    NotNegative,
    Positive,
    Section,
    Share,
    Steps,
    Text,
)


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
    is to be drawn with the pipeline's own schedule; a pipeline that lists its σ (Qwen-Image-2.1 may) then has as many
    steps as it lists.
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
    """The steps [lo, hi) of rollout.steps with guidance; other steps of the ODE run unguided. null: all are guided.
    A step of a compressed tail counts by where it begins in that schedule. Stochastic steps are always guided. It
    halves the cost of a step without guidance, changes training pictures, and is for models whose guidance takes a
    second row. Evaluation is guided throughout. Not together with rollout.cache.
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
    model.dtype fp64, model.base_precision and engine.distributed: fsdp2.
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
