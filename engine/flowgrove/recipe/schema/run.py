"""What a recipe says of its length, folder, trackers and evaluation: `run`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from flowgrove.recipe.schema.credit import Reward
from flowgrove.recipe.schema.values import MOST_LEAVES, Count, Index, NotNegative, Section, Steps, Text


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

    rewards: list[Reward] = []
    """Rewards of evaluations beside those that train, given as there, without a weight.
    They stand in eval_rewards and in the report, and enter neither eval_reward nor what keep_best keeps. A reward that
    nothing is trained on shows whether those that are have been hacked.
    Source: PickScore, ImageReward and others on held-out prompts in Flow-GRPO (2505.05470) and MixGRPO (2507.21802).
    """

    @field_validator("rewards")
    @classmethod
    def _without_weights(cls, rewards: list[Reward]) -> list[Reward]:
        for reward in rewards:
            if reward.weight != 1:
                raise ValueError(f"{reward.title} has a weight, and is not summed: leave it out, or put it into reward")
        return rewards


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
