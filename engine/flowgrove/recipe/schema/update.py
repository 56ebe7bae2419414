"""What a recipe says of the loss and the optimiser: `update`."""

from typing import Annotated, Literal

from pydantic import Field

from flowgrove.recipe.schema.values import Count, Index, NotNegative, Positive, Section, Share

Decay = Annotated[float, Field(gt=0, lt=1)]


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

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """The decays of AdamW's averages: of gradients, and of their squares.
    0.95 or 0.99 for the second follows gradients whose size changes from iteration to iteration sooner.
    Source: AdamW (1711.05101).
    """

    eps: Positive = 1.0e-8
    """What is added to the root of the second average before AdamW divides by it.
    Larger values, up to 1e-6, keep weights whose gradients are nearly 0 from steps as large as all others'.
    Source: AdamW (1711.05101).
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
    repeating such runs, on models whose guidance takes a second row. The halves then run one after the other, and only
    one has a backward and is held for it; with engine.distributed: fsdp2 and with rollout.cache they run together, and
    the backward of the other is computed for nothing.
    Source: Flow-GRPO's released code (2505.05470).
    """

    ema_decay: Decay | None = None
    """The decay of an average of the trained weights, per update; null: none.
    Evaluation, sampling and export then use the average, training does not. It holds one more fp32 copy of the trained
    weights. 0.9 to 0.99 smooths a jumpy curve; 0.999 needs thousands of updates to follow.
    Source: Polyak averaging; Flow-GRPO's released code.
    """
