"""What happens when the device's memory is full: something is given up, and the work is repeated, until it fits.

The order is the same wherever it happens. At every failure the first remedy that has something left is taken, and
recordings are forgotten in any case. Passes and decoding stay as small for the rest of the run; graphs are retained
again in the next iteration.

    remedy                           rollout  update  decoding  scoring  what it costs
    retained graphs are dropped         x        x                       the first update runs their forwards again
    recordings are forgotten            x        x                       they are recorded again
    passes are halved                   x        x                       time, where passes were not too full already
    fewer samples are taken at once                      x         x     time, where samples were few already
    the error is raised                 x        x       x         x     the run: its last checkpoint is what is left

A rollout repeats one step, an update all of its passes without a gradient from before, decoding and scoring the samples
that were asked for. A measurement of the gradient's noise halves passes of its own, keeps the rollout's graphs, and is
left out where not one row fits. Evaluation and sampling are rollouts that retain nothing, with decoding after them.
None of it changes what is computed but for the order of sums.
Where ranks have divided the weights (engine.distributed: fsdp2) a training pass is a meeting of all, which one of them
cannot repeat: a memory that is full ends the run, and the same command goes on from its newest checkpoint with smaller
passes. Where sizes are measured (engine.token_budget: auto, `flowgrove tune`) a size that does not fit is the end of
the sizes that are tried, and nothing is repeated.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch

from flowgrove.device import is_out_of_memory, release_memory
from flowgrove.errors import UserError

Result = TypeVar("Result")


class PassTooLargeError(UserError):
    """The memory of a rank was full in a pass of up to `before` tokens that all ran together. `tokens`: of the passes
    with which the run is to go on; None: they had one row.
    """

    def __init__(self, rank: int, before: int, tokens: int | None) -> None:
        self.tokens = tokens
        what = f"the GPU's memory is full on rank {rank} in a training pass"
        if tokens is None:
            ways = "set engine.reshard_after_forward: true or model.gradient_checkpointing: offload, or take more GPUs"
            super().__init__(f"{what} of one row: {ways}")
        else:
            super().__init__(
                f"{what} of up to {before} tokens: the same command goes on from the newest checkpoint with passes of "
                f"{tokens}"
            )


class Remedy(NamedTuple):
    """A line of the table above. `alone`: whether the work is worth another attempt when nothing else was given up;
    if not, it is taken beside the others at every failure.
    """

    name: str
    alone: bool = True


DROP_GRAPHS = Remedy("retained graphs are dropped")
FORGET_RECORDINGS = Remedy("recordings are forgotten", alone=False)
HALVE_PASSES = Remedy("passes are halved")
FEWER_SAMPLES = Remedy("fewer samples are taken at once")
ORDER = (DROP_GRAPHS, FORGET_RECORDINGS, HALVE_PASSES, FEWER_SAMPLES)


class Shrink:
    """What a stage can give up. `remedies`: for each of those that it has, what does it, which returns whether there
    was anything left to give up.
    """

    def __init__(self, remedies: Mapping[Remedy, Callable[[], bool]]) -> None:
        self.remedies = remedies

    def __call__(self) -> bool:
        """Gives the next thing up; False if nothing is left, so that another attempt would fail as the last one did."""
        helped = False
        for remedy in ORDER:
            if remedy in self.remedies and not (helped and remedy.alone):
                gave = self.remedies[remedy]()
                helped = helped or (gave and remedy.alone)
        return helped


def retry_smaller(work: Callable[[], Result], shrink: Callable[[], bool]) -> Result:
    """What `work` returns, repeated after `shrink` as often as the device's memory is too small for it.

    Raises the error of the last attempt (see `is_out_of_memory`) when `shrink` finds nothing more to make smaller.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            full = error.with_traceback(None)  # its frames hold the failed attempt's tensors, as do those before it
            full.__context__ = full.__cause__ = None
        if torch.cuda.is_available():
            release_memory(torch.device("cuda"))
        if not shrink():
            raise full
