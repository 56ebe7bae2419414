"""What a recipe says of rewards and of what they become: `reward` and `credit`."""

import re
from typing import Literal

from pydantic import ConfigDict, field_validator, model_validator

from flowgrove.recipe.schema.values import Count, Index, NotNegative, Positive, Said, Section, Text


class Reward(Said):
    """name, weight, and what the reward of that name takes besides."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    name: str
    """The reward; what else it takes stands beside name, label and weight.
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

    label: Text | None = None
    """What metrics, reports and pictures call the reward; null: its name.
    It tells rewards of one name apart: two servers, two functions, one judge with two instructions.
    Source: ours.
    """

    weight: float = 1.0
    """The weight of the reward in the sum of several; negative: less of it is better.
    With credit.normalise per_reward it weighs advantages, whose scale is the same for all rewards; with weighted_sum it
    weighs raw scores, whose scales differ. eval_reward is the weighted sum of raw scores under both.
    Source: DanceGRPO (2505.07818) and MixGRPO (2507.21802), several rewards.
    """

    @field_validator("label")
    @classmethod
    def _plain(cls, label: str | None) -> str | None:
        if label is not None and not re.fullmatch(r"\w([\w. -]*\w)?", label):
            raise ValueError(
                f"{label!r} is no label: write letters and digits, with spaces, dots, - and _ between them"
            )
        return label

    @property
    def title(self) -> str:
        """What it is called: no two rewards of a recipe are called alike."""
        return self.label or self.name


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
    Source: BranchGRPO (2509.06040), depth pruning; earlier: its released code.
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
