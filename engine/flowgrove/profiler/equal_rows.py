"""Rows that an iteration computes twice: of every pass each row by all that goes into it, and of every decode each
latent. Where two are equal the second is waste, unless there is a reason.
"""

import hashlib
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrove.device import pick_backend, to_host
from flowgrove.evaluation import evaluate
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.policy import Policy, Velocity
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.passes.budget import PassBudget
from flowgrove.passes.packing import Ints
from flowgrove.passes.recordings import Recordings
from flowgrove.profiler.session import Session
from flowgrove.recipe.schema import Recipe
from flowgrove.setup import Setup
from flowgrove.spans import current_path

ROLLOUT, DECODING, NOISE, RENEWED, UPDATE, EVALUATION = (
    "rollout", "decoding", "gradient noise", "old log-probability", "update ", "evaluation",
)  # fmt: skip
REFERENCE = ", reference"  # behind the stage that the reference model runs for
_STAGES = {"rollout": ROLLOUT, "reward": DECODING, "gradient_noise": NOISE}  # by what their ranges are called


class Repeated(NamedTuple):
    """`rows` that the stage `again` has computed although `first` had; `reason`: why they are; None: for none."""

    first: str
    again: str
    rows: int
    reason: str | None


class RowLog(PassRunner):
    """Notes what its passes compute inside iterations and evaluations, from an untouched model on. Recorded passes are
    launched, since a replay tells nothing. `computed`: rows by stage.
    """

    def __init__(self, budget: PassBudget, recordings: Recordings | None = None) -> None:
        super().__init__(budget)
        self.computed: Counter[str] = Counter()
        self._first: dict[bytes, str] = {}  # the stage that has computed a row first
        self._repeated: Counter[tuple[str, str]] = Counter()
        self._untouched = b""
        self._texts: tuple[Any, tuple[list[bytes], list[bytes]]] = (None, ([], []))  # of the prompts that came last

    def velocity(
        self, policy: Policy, x: Tensor, sigma: Tensor, prompts: Prompts, prompt_of: Tensor, on_host: Ints | None = None
    ) -> Velocity:
        """One pass, whose rows are noted; with guidance, two of each state."""
        found = super().velocity(policy, x, sigma, prompts, prompt_of, on_host)
        if stage := stage_of(current_path()):
            stage = stage if policy.tuned or stage == EVALUATION else stage + REFERENCE
            scale = policy.guidance_scale if policy.adapter.embeds_guidance else None
            model = self._model(policy) + f"{policy.adapter.geometry}{scale}{policy.precision}".encode()
            texts, away = self._embedded(prompts)
            for state, at, prompt in zip(x, sigma, prompt_of.tolist(), strict=True):
                for text in (texts[prompt], *away[prompt : prompt + 1]):
                    self._note(stage, model + text + _bytes(state) + _bytes(at))
        return found

    def decode(self, policy: Policy, x: Tensor) -> Tensor:
        """Pictures or videos, whose latents are noted."""
        if stage_of(current_path()):
            for latent in x:
                self._note(DECODING, _bytes(latent))
        return super().decode(policy, x)

    def repeated(self, recipe: Recipe) -> list[Repeated]:
        """What has been computed again, the most rows first."""
        return [Repeated(*stages, rows, reason_of(recipe, *stages)) for stages, rows in self._repeated.most_common()]

    def _note(self, stage: str, row: bytes) -> None:
        self.computed[stage] += 1
        key = hashlib.blake2b(row, digest_size=16).digest()
        if key in self._first:
            self._repeated[self._first[key], stage] += 1
        else:
            self._first[key] = stage

    def _model(self, policy: Policy) -> bytes:
        """Names what a policy's weights hold: an optimiser may step and change none. The reference model's are those
        that come first.
        """
        if policy.tuned:
            with torch.no_grad():
                held = torch.stack([_sums(master) for master in policy.weights.trainable().values()])
            named = hashlib.blake2b(_bytes(held)).digest()
            self._untouched = self._untouched or named
            return named
        return self._untouched

    def _embedded(self, prompts: Prompts) -> tuple[list[bytes], list[bytes]]:
        """Names each prompt by its embedding, and by its unconditional one, if it has any."""
        if self._texts[0] is not prompts:
            named, away = [_name(cond) for cond in prompts.cond.split()], list[bytes]()
            if prompts.uncond is not None and prompts.uncond_of is not None:
                distinct = [_name(cond) for cond in prompts.uncond.split()]
                away = [distinct[which] for which in prompts.uncond_of.tolist()]
            self._texts = prompts, (named, away)
        return self._texts[1]


def stage_of(path: str) -> str | None:
    """The stage of a range by its path; None: of none that counts."""
    if path.startswith(EVALUATION):
        return EVALUATION
    names = path.split("/")
    if not names[0].startswith("iteration ") or len(names) == 1:
        return None
    if names[1] == "update" and len(names) > 2:
        return RENEWED if "old_logp" in names else names[2]
    return _STAGES.get(names[1])


def reason_of(recipe: Recipe, first: str, again: str) -> str | None:
    """Why rows of `first` are computed again; None: for no reason."""
    noisy, references = recipe.model.dtype == "bf16", again.endswith(REFERENCE)
    reasons = {
        "engine.share: false computes what the published loops do": not recipe.engine.share,
        "in the first iteration alone the model is its own reference": first == ROLLOUT and references,
        "it takes gradients of its own, by halves of the leaves (run.gradient_noise_every)": again == NOISE,
        "no update before it has trained: it needs graphs, and the rollout has not kept these": (
            first == ROLLOUT and again.startswith(UPDATE) and not references
        ),
        "in bf16 a log-probability depends on its batch: it is taken in the one that trains": noisy
        and again == RENEWED,
        "in bf16 a velocity depends on its batch: it is compared in the one that trains": noisy and references,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def log_rows(setup: Setup, iterations: int) -> RowLog:
    """Runs some iterations from the first one on, between two evaluations where there are held-out prompts. Raises
    UserError as `flowgrove train` does.
    """
    held_out = setup.eval_prompts
    session = Session(setup, iterations, RowLog, held_out)
    session.stages.scores_on_a_thread = False  # where ranges have their whole path
    log = session.runner
    with pick_backend(setup.recipe):
        for run in (lambda: None, lambda: session.run(iterations)):
            run()
            if held_out:
                evaluate(setup, session.policy, log, session.rewards, held_out)
    return log


def _sums(tensor: Tensor) -> Tensor:
    """The sum of its values and that of their squares, in float64."""
    wide = tensor.double()
    return torch.stack([wide.sum(), wide.square().sum()])


def _name(cond: Conditioning) -> bytes:
    parts = [name.encode() + str(tuple(t.shape)).encode() + _bytes(t) for name, t in sorted(cond.tensors.items())]
    return hashlib.blake2b(b"".join(parts)).digest()


def _bytes(tensor: Tensor) -> bytes:
    """A tensor's values."""
    return bytes(to_host(tensor.detach()).contiguous().view(-1).view(torch.uint8).numpy().data)
