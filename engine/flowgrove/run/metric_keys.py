"""What every key of a metrics line means: `flowgrove metrics` prints it and `make docs` writes it to docs/metrics.md.

The lines are put together in iteration.py from summaries.py, credit.py and spans.py, and trainer.py adds what an
evaluation found.
"""

import difflib
from typing import NamedTuple

from flowgrove.errors import UserError


class Metric(NamedTuple):
    """A key of a metrics line: what it is with its unit, what is healthy, and what to do where it is not."""

    key: str
    meaning: str
    healthy: str
    otherwise: str


METRICS = (
    Metric(
        "iteration",
        "The number of the iteration, counted from 0.",
        "It rises by 1 from line to line, also in a run that was resumed.",
        "A gap: a line was damaged, and whoever reads the file passes over it.",
    ),
    Metric(
        "reward",
        "Of every reward, mean and standard deviation (of the population) over all samples of the iteration, without "
        "those of dropped_prompts, as {name: {mean, std, group_std}}: raw scores of pictures that were drawn with "
        "exploration noise. group_std is the mean of the standard deviations among the samples of a prompt, which is "
        "what advantages are made of.",
        "The mean rises over tens of iterations. It jumps with the prompts of an iteration and where the window moves, "
        "and need not lie near eval_reward, which has other prompts, no noise and often more steps.",
        "Flat: look at advantage_by_step and ratio_max, then raise update.lr or data.prompts_per_iteration. Falling: "
        "lower update.lr. A std that goes to 0: samples of a group no longer differ, raise rollout.noise_level or set "
        "update.kl_weight.",
    ),
    Metric(
        "zero_std_ratio",
        "The share of the prompts whose samples all score alike in every reward that has a weight: they have no "
        "advantage, and without update.kl_weight train nothing.",
        "0 for rewards with many steps. With a reward of few steps, such as right or wrong, it falls while the model "
        "learns its first prompts and rises when it has learnt most.",
        "Above a half: most of the rollout is for nothing. Take prompts that the model draws right now and then, raise "
        "rollout.group_size or rollout.noise_level, or take a reward with finer steps.",
    ),
    Metric(
        "dropped_prompts",
        "The prompts whose whole group was left out, as a picture of it was not finite or a reward gave no score for "
        "it after all tries; a warning says which and why. They enter no other number, and no normalisation.",
        "0 in nearly every iteration.",
        "See the warning: a server that is overloaded (lower concurrency, raise timeout and retries), a prompt that "
        "the reward refuses, or with `not numbers` a model that has diverged. If all prompts of an iteration are "
        "dropped the run saves and ends.",
    ),
    Metric(
        "eval_reward",
        "The weighted sum of the rewards on data.eval_prompts, mean over all pictures, which the plain ODE draws from "
        "fixed noise. In iterations that run.eval_every names, of the model before the iteration; on the last line, "
        "of the final model. The first is the base model's. With update.ema_decay the averaged weights are evaluated. "
        "Prompts that could not be scored are left out, with a warning; null: that was all of them.",
        "It rises with reward. This is the curve to judge a run by: prompts, noise and sampler stay the same.",
        "reward rises and eval_reward does not: the policy has learnt the training prompts or the noise; take more "
        "prompts, or fewer iterations. Both rise and pictures look worse: reward hacking; set update.kl_weight, add a "
        "second reward, or draw with run.eval.tuned_share 0.8. It jumps: raise run.eval.samples.",
    ),
    Metric(
        "eval_reward_confidence",
        "Half of the 95 % confidence interval of eval_reward, as `flowgrove eval` gives it: 1.96 standard errors of "
        "the mean over prompts, in which the pictures of a prompt count once. 0 with a single prompt, which tells "
        "nothing of the spread; null with eval_reward.",
        "Small beside what eval_reward gains over the run. Since prompts and noise stay the same, a change between two "
        "evaluations is known better than either of them.",
        "As wide as the gain: take more data.eval_prompts; a larger run.eval.samples helps less, since prompts differ "
        "more than pictures of one prompt.",
    ),
    Metric(
        "eval_rewards",
        "The same of every reward by itself, as {name: {mean, confidence}}: raw scores, not weighted; and of those "
        "that run.eval.rewards names, which nothing trains on.",
        "Every reward rises, or stays level where its weight is small, or nothing trains on it.",
        "One rises and another falls: the model trades one for the other; change the weights of reward. One that "
        "nothing trains on falls: the others are being hacked; set update.kl_weight, or end earlier.",
    ),
    Metric(
        "rollout_distance",
        "Where rollout.precision or rollout.attention is set and the iteration evaluates: how far they move final "
        "latents, as the distance to those of the same noise without them over their norm. It is a mean over the "
        "samples of the first four held-out prompts, rolled out by the plan of iteration 0.",
        "Level over the run: below 0.05 samples can hardly be told apart; below 0.3 they are other samples of the same "
        "model, whose rewards rank alike.",
        "Rising: weights have grown outliers that 8 bits do not resolve; compare a run with rollout.precision: null, "
        "or take it, which changes nothing else.",
    ),
    Metric(
        "ratio_mean",
        "The mean over all trained edges and updates of the policy ratio ρ = exp(logp_new - logp_old); logp is a mean "
        "over latent elements. Edges whose ratio is not finite are left out; null where there are no others. The same "
        "holds for the eight keys below.",
        "1 within update.clip_range, a little below rather than above. Exactly 1 with one update per iteration, since "
        "the first update of an iteration has ratio 1 by construction.",
        "Further away: lower update.lr, or have fewer updates an iteration. null together with train_passes above 0: "
        "no ratio was finite, see skipped_updates.",
    ),
    Metric(
        "ratio_min",
        "The smallest policy ratio of the iteration.",
        "Below 1 by at most a few times update.clip_range.",
        "Far below: single edges leave the trust region. Lower update.lr, or train fewer or noisier steps: a step's "
        "ratio is the more sensitive the less noise it has, 55 times over a schedule of 25 steps of flow_sde.",
    ),
    Metric(
        "ratio_max",
        "The largest policy ratio of the iteration.",
        "Above 1 by about update.clip_range, up to a few times that.",
        "Exactly 1 with several updates per iteration: the weights hardly move, raise update.lr. Far above: as for "
        "ratio_min.",
    ),
    Metric(
        "clipped_low",
        "The share of trained edges, over all updates, whose ratio is below 1 - ε_low of update.clip_range. Those "
        "with a negative advantage have no gradient from it.",
        "0 to 0.3, somewhat larger than clipped_high: ratios drift below 1, as their squared term is never positive. "
        "The first update is never clipped, so that of n updates at most about (n - 1)/n can be.",
        "Above a third: much of the rollout is not used; raise update.clip_range, lower update.lr, or "
        "have fewer updates an iteration.",
    ),
    Metric(
        "clipped_high",
        "The share of trained edges, over all updates, whose ratio is above 1 + ε_high of update.clip_range. Those "
        "with a positive advantage have no gradient from it.",
        "0 to 0.3, and above 0 in some iterations where there are several updates.",
        "Always 0 with a flat reward: updates are timid, raise update.lr. Above a third: as for clipped_low.",
    ),
    Metric(
        "approx_kl",
        "The mean over trained edges of ρ - 1 - ln ρ, with the ratio to the rollout's policy: an estimate of the "
        "divergence that the iteration's updates have made, per latent element (Schulman's k3).",
        "About half the square of a typical ratio - 1: 1e-9 at a clip range of 1e-4, 1e-7 at 1e-3. It stays level.",
        "Growing by orders of magnitude: the policy runs away before the reward shows it; lower update.lr.",
    ),
    Metric(
        "loss",
        "The sum over the iteration's updates of the clipped loss, with update.kl_weight times the divergence from "
        "the reference model.",
        "Around 0 and of either sign, because advantages of a group sum to 0; it need not fall. With update.kl_weight "
        "its mean rises slowly with the distance from the reference model.",
        "It says nothing about quality; null means that it was not finite, see skipped_updates.",
    ),
    Metric(
        "grad_norm",
        "The L2 norm of the gradient over all trained weights before clipping, mean over the updates "
        "that were not skipped.",
        "Level over the run, up to a factor of a few; its size depends on the model, and AdamW does not mind it.",
        "Single peaks are what update.max_grad_norm is for. A steady rise goes before a collapse: lower update.lr. "
        "null: every update was skipped, or nothing was trained. 0: no edge has an advantage, see advantage_by_step.",
    ),
    Metric(
        "logp_drift",
        "The largest |logp_train - logp_rollout| in the first update, where the weights are still the rollout's: the "
        "error that comes from computing the same state in another batch.",
        "0 where graphs of the rollout are reused or with engine.exact_replay; at most 5e-7 in fp32; in bf16 up to "
        "4e-5, and later updates compare with log-probabilities of their own batches there.",
        "Near or above update.clip_range in fp32: rollout and training do not compute the same. Try "
        "engine.exact_replay: true and engine.backend: reference, engine.compile: false, engine.attention: sdpa in "
        "turn; what makes it vanish is at fault.",
    ),
    Metric(
        "skipped_updates",
        "The updates whose gradient was not finite, so that they were skipped on all ranks: weights, moments, their "
        "count of steps and the average of update.ema_decay are what they were.",
        "0. A single one, once in a while, does no harm.",
        "In many iterations: lower update.lr, or take model.dtype fp32. After "
        "run.most_skipped_updates in a row the run saves and ends; resume from an earlier checkpoint, into another "
        "--out, with a lower update.lr.",
    ),
    Metric(
        "advantage_by_step",
        "The mean |advantage| of the edges that train, for every step of the schedule that has some, as {step: value}.",
        "0.6 to 0.9 for one reward of weight 1 (0.8 for normal scores) with credit.std: group or global and baseline: "
        "depth; a flat group of K with siblings has K/(K - 1) times that. With std: leaves it is smaller at splits "
        "that explain little, with none of the reward's own scale. With per_reward normalisation several rewards of "
        "weights that sum to 1 give less, the less they agree.",
        "Much less: in many groups all samples score alike; raise rollout.noise_level or rollout.group_size, or take "
        "a reward with finer steps. A step that should be there is missing: it was pruned. Empty: nothing was "
        "trained.",
    ),
    Metric(
        "tree_splits",
        "With rollout.tree.splits: auto, as the two keys below: the steps at which the trees of this iteration split.",
        "Others in each of the first rollout.tree.probe iterations, then always chosen_splits.",
        "Every step must be random only where it is a split: with the splits written in the recipe the key is missing.",
    ),
    Metric(
        "split_evidence",
        "In probing iterations, what every step has explained so far when it was a split, as {step: share}: the "
        "variance between siblings that the split's own noise causes, over that of a leaf that all splits of a tree "
        "cause together, both in the mean of the probed trees. Steps that were no split yet are missing.",
        "Positive for steps that matter, the larger the more; around 0, also below it, for those that do not. Those of "
        "a tree need not sum to 1, as trees differ.",
        "All steps alike within their scatter: more rollout.tree.probe or data.prompts_per_iteration tell them apart. "
        "Empty: rewards do not differ within groups; raise rollout.noise_level.",
    ),
    Metric(
        "chosen_splits",
        "In the last probing iteration: the steps at which the trees split from here on, which explain most in sum "
        "within rollout.tree.forwards.",
        "It stands once in a run, and in its checkpoints from there on.",
        "The latest splits that there are, at a large share of the budget: raise rollout.tree.forwards if early steps "
        "have the larger split_evidence.",
    ),
    Metric(
        "gradient_snr",
        "In iterations that run.gradient_noise_every names, as are the keys below: signal to noise of the gradient at "
        "the iteration's policy, for every trained step, and for all of them together under all, as {step: value}: the "
        "squared norm of the expected gradient over the expected squared distance from it, with this number of "
        "prompts. Estimated from inner products between prompts; null where their mean is not positive, missing where "
        "memory had no room for the measurement.",
        "all: 0.02 to 10, in the mean of several measurements, as single values jump and are often null. An update "
        "makes about snr / (1 + snr) of the progress that one without noise would make, and n of them add up to n "
        "times the signal to noise.",
        "Times run.iterations below 1: noise decides where the run goes; see gradient_leaf_share, and raise "
        "rollout.group_size or data.prompts_per_iteration. Far above 10: fewer prompts or samples do as well. A step "
        "far below the others: spend its passes elsewhere (rollout.window, rollout.tree.splits, credit.prune).",
    ),
    Metric(
        "gradient_snr_error",
        "The standard error of gradient_snr, for all and for every step, by leaving out one of up to 8 groups of "
        "prompts at a time (a jackknife); null with two prompts. A 95 % interval reaches 2.4 of them with 8 groups, "
        "4.3 with 3.",
        "Of the size of gradient_snr in a single measurement; it falls with the root of their number.",
        "Larger than the differences between steps: take the mean over more measurements, as the report does.",
    ),
    Metric(
        "gradient_signal",
        "The squared norm of the expected gradient, for all and for every step, estimated without bias: the mean inner "
        "product between the gradients of different prompts. It may be negative where there is next to no signal.",
        "Beyond twice gradient_signal_error, at least in the mean of several measurements.",
        "Within the error: take more prompts for an iteration, or the mean over more measurements, before you conclude "
        "that a step teaches nothing.",
    ),
    Metric(
        "gradient_signal_error",
        "The standard error that gradient_signal would have without any signal, for all and for every step.",
        "Below half of gradient_signal.",
        "Larger: as for gradient_signal.",
    ),
    Metric(
        "gradient_noise",
        "The noise of one prompt's gradient: its expected squared distance from the expected gradient (the trace of "
        "the covariance), for all and for every step.",
        "Level over the run, up to a factor of a few.",
        "It says little by itself: see gradient_snr and gradient_noise_scale.",
    ),
    Metric(
        "gradient_noise_scale",
        "The number of prompts with which signal and noise of the gradient are equal, gradient_noise over "
        "gradient_signal, for all and for every step; null where the signal is not positive.",
        "all: up to some tens of times data.prompts_per_iteration. It grows as a run gets better.",
        "Far above: as for a low gradient_snr. Far below: more prompts gain nothing.",
    ),
    Metric(
        "gradient_part",
        "What every step gives to the signal of all: the inner product of its expected gradient with that of all "
        "steps. They sum to gradient_signal's all, over which they are the steps' shares of it.",
        "Every step that costs passes has a share of some size, in the mean of several measurements. A negative one "
        "pulls against the others.",
        "Next to nothing at late steps: put splits or the window earlier (rollout.tree.splits, rollout.window).",
    ),
    Metric(
        "gradient_cosine",
        "The cosine between the gradients of the two halves of one prompt's leaves, for all and for the steps that "
        "have four nodes or more: how much of a prompt's gradient is its own and not the luck of its leaves.",
        "Above 0, and the larger the more leaves there are.",
        "Near 0: as for gradient_leaf_share.",
    ),
    Metric(
        "gradient_leaf_share",
        "The share of gradient_noise that comes from the leaves and not from the prompts, for all and for the steps "
        "that have four nodes or more; the rest is that prompts want different things.",
        "Anything up to 1; single values lie beyond that at times.",
        "Near 1 with a low gradient_snr: more leaves help as much as more prompts, and cost less where they share "
        "their steps; raise rollout.group_size. Near 0: only more prompts help (data.prompts_per_iteration).",
    ),
    Metric(
        "gradient_passes",
        "The rows whose backward ran for this measurement; train_passes does not count them.",
        "About as large as train_passes. They run in 16 passes a step with 8 groups, so that their seconds are several "
        "times those of the updates where passes are small.",
        "It grows with train_passes alone; raise run.gradient_noise_every where seconds.gradient_noise is too much.",
    ),
    Metric(
        "rollout_forwards",
        "The rows that the rollout runs through the transformer, for all prompts of the iteration, as `flowgrove "
        "plan` counts them: guidance does not double it, and evaluation is not in it.",
        "What the plan says. It changes with the position of the window.",
        "Too many: move the window or the splits to earlier steps and add rollout.tail. engine.share false counts "
        "every trajectory.",
    ),
    Metric(
        "train_passes",
        "The rows whose backward ran, in all updates, also where the rollout's graph was reused; rows of the "
        "reference model and recomputation are not counted.",
        "The plan's train passes times prompts, less those of edges without advantage.",
        "Far fewer: groups without a difference in reward train nothing, see advantage_by_step. 0: nothing was "
        "trained in this iteration.",
    ),
    Metric(
        "seconds",
        "The seconds of every stage, as {plan, rollout, reward, credit, update}, in some iterations gradient_noise, on "
        "a GPU between events of its stream. plan includes encoding the prompts. Where scoring runs beside the "
        "rollout, reward is what was left to wait for. Evaluations and checkpoints are not in it. Of several ranks "
        "each stage's is the slowest one's.",
        "rollout and update take nearly all of it; the first iteration is slower.",
        "reward large: the scorer is the bottleneck; raise its batch_size or concurrency, or its server's. rollout "
        "large: rollout.tail, an earlier window, engine.cuda_graphs. update large: fewer trained steps, "
        "model.gradient_checkpointing: none. `flowgrove tune` measures what else helps.",
    ),
    Metric(
        "samples_per_second",
        "The samples of the iteration over the sum of its stages' seconds.",
        "Level over the run for a window that stays; it rises where the window moves to earlier steps with a tail.",
        "Falling: look which of seconds grows; on a CPU other programs, on a GPU halved passes after memory ran out "
        "(a warning says so).",
    ),
    Metric(
        "peak_memory_bytes",
        "Bytes: on a GPU the most that PyTorch's allocator has held since the run began, on a CPU the largest "
        "resident set of the process. It never falls.",
        "Level after the first iterations and the first evaluation, at or below nine tenths of the GPU's memory.",
        "Still growing after that: a reward of yours keeps what it computes. Too close to the limit: lower "
        "engine.token_budget, set engine.reuse_rollout_graph: false, model.gradient_checkpointing: full or offload, or "
        "model.vae_tiling: true.",
    ),
)


def find_metric(key: str) -> Metric:
    """The metric of that key; of nested ones (seconds/update, reward.shapes.mean) the whole.
    Raises UserError naming the nearest.
    """
    known = {metric.key: metric for metric in METRICS}
    whole = key.strip().replace("/", ".").partition(".")[0]
    if whole not in known:
        near = difflib.get_close_matches(whole, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise UserError(f"unknown metric {key}: {hint}")
    return known[whole]
