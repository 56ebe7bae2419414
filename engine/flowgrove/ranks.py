"""The processes that share a run, as torchrun starts them: rank r of n rolls out and trains its part of the prompts.

What all must know (scores, errors, signals) they tell each other through host memory (gloo); gradients go where they
lie (NCCL on GPUs). A run of one process is a world of one, in which nothing is sent.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowgrove.device import is_out_of_memory
from flowgrove.errors import UserError, one_line
from flowgrove.process import shares_of
from flowgrove.pulse import ENDED, GONE, NOTES, OTHER, USER, gone_line
from flowgrove.spans import COMMUNICATION, span

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")


class ElsewhereError(RuntimeError):
    """What went wrong on another rank, which tells of it itself."""

    elsewhere = True


class LostError(UserError):
    """Another rank can no longer be reached: nothing may wait for it."""


class Ranks:
    """One rank's view of them all. `control`: their group for tensors in host memory; `store`: where they leave notes
    for each other; None: a world of one. `mesh`: of those that divide the weights, if any do.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        control: "dist.ProcessGroup | None" = None,
        store: "dist.Store | None" = None,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        self.rank, self.size, self._control, self.mesh = rank, size, control, mesh
        self._notes = dist.PrefixStore(NOTES, store or dist.HashStore())
        self._told: Exception | None = None  # an error of this rank that all others have been told

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of `count` things that is this rank's: in order, each within one of the rest."""
        return self.shares([count])[0]

    def shares(self, counts: Sequence[int], rank: int | None = None) -> list[slice]:
        """The share of every part of an iteration that is a rank's, by default this one's: of all parts together, too,
        each rank's is within one of the rest.
        """
        return shares_of(counts, self.rank if rank is None else rank, self.size)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors [n, ...] of all ranks, in host memory, in their order; n may differ, the rest may not."""
        if self.size == 1:
            return [mine]
        with span("gather", COMMUNICATION):
            return self._gathered(mine.contiguous())

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._reaching():
            dist.all_gather(counts, torch.tensor([len(mine)]), group=self._control)
        longest = max(int(count) for count in counts)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in range(self.size)]
        with self._reaching():
            dist.all_gather(found, padded, group=self._control)
        return [tensor[: int(count)] for tensor, count in zip(found, counts, strict=True)]

    def gather_parts(self, mine: Sequence[Tensor], counts: Sequence[int], each: int = 1) -> list[Tensor]:
        """For every part of an iteration the whole tensor, from the ranks' shares of it.

        `mine`: this rank's share [shares(counts)[part] · each, ...] of every part, whose `counts` all ranks know.
        """
        if self.size == 1:
            return list(mine)
        found = self.gather(torch.cat(list(mine)))
        parts: list[list[Tensor]] = [[] for _ in counts]
        for rank, tensor in enumerate(found):
            lengths = [each * (share.stop - share.start) for share in self.shares(counts, rank)]
            for part, piece in zip(parts, tensor.split(lengths), strict=True):
                part.append(piece)
        return [torch.cat(part) for part in parts]

    def gather_all(self, mine: Sequence[Tensor]) -> Tensor:
        """All tensors [n, ...] of all ranks as one, in host memory, in their order; a rank may have none."""
        if self.size == 1:
            return torch.cat(list(mine))
        kinds = self.tell(json.dumps([str(mine[0].dtype)[6:], *mine[0].shape[1:]]) if mine else "")
        dtype, *shape = json.loads(max(kinds))
        return torch.cat(self.gather(torch.cat([*mine, torch.empty(0, *shape, dtype=getattr(torch, dtype))])))

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return max(int(found) for found in self.gather(torch.tensor([number])))

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers."""
        return sum(int(found) for found in self.gather(torch.tensor([number])))

    def sum(self, mine: Tensor) -> Tensor:
        """The sum of all ranks' tensors, which have one shape, in host memory."""
        if self.size == 1:
            return mine
        whole = mine.clone()
        with span("sum", COMMUNICATION), self._reaching():
            dist.all_reduce(whole, group=self._control)
        return whole

    def chosen(self, text: str | None) -> str | None:
        """What the first rank says."""
        if self.size == 1:
            return text
        found = self.tell("" if text is None else f"={text}")[0]
        return found[1:] if found else None

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns here, once it has ended on every rank.

        An error on some of them ends all, with that of the lowest such rank: a UserError is the same everywhere, of
        any other the rest get an ElsewhereError.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        mine = "" if error is None else self._telling(error)
        told = self.tell(mine)
        for rank, text in enumerate(told):
            if not text:
                continue
            if text[0] == OTHER and error is not None and rank == self.rank:
                self._told = error
                raise error
            raise _told_elsewhere(text) from error
        return result

    def by_first(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns on the first rank, which alone does it; None on the others. Its error ends all."""
        return self.together(lambda: work() if self.first else None)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Inside the block the ranks wait for each other in collectives, which an error on one of them would leave for
        ever: it ends all, with that rank's error.
        """
        try:
            with self._reaching():
                yield
        except Exception as error:
            self.ended_by(error)
            raise

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Around collectives. Raises LostError where the ranks can no longer reach each other, or the error that has
        ended one of them.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            told = self._ended()
            raise (_gone(error) if told is None else _told_elsewhere(told)) from error

    def ended_by(self, error: Exception) -> None:
        """Leaves word of an error that ends this rank and that the others do not have. That one of them has gone, each
        finds out for itself or, if it waits where nothing tells it, by this.
        """
        known = isinstance(error, ElsewhereError) or (isinstance(error, UserError) and error.everywhere)
        if self.size == 1 or known or error is self._told:
            return
        with suppress(RuntimeError):  # whoever kept the notes may have gone
            if self.note(ENDED) is None:
                self.leave_note(ENDED, self._telling(error))
        if isinstance(error, UserError) and not isinstance(error, LostError):
            error.everywhere = True

    def _ended(self) -> str | None:
        """The note of what has ended the run; None: there is none, or whoever kept the notes has gone."""
        try:
            return self.note(ENDED)
        except RuntimeError:
            return None

    def _telling(self, error: Exception) -> str:
        if isinstance(error, UserError):
            return USER + str(error)
        return f"{OTHER}rank {self.rank}: {type(error).__name__}: {one_line(str(error), 500)}"

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes every gradient the sum of all ranks', in one reduction; one that no rank has stays None.

        Weight decay would move a weight whose gradient is 0 instead.
        """
        if self.size > 1:
            with span("sum_gradients", COMMUNICATION):
                self._sum_gradients(parameters)

    def _sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        with self._reaching():
            dist.all_reduce(has, dist.ReduceOp.MAX, group=self._control)
        some = [parameter for parameter, there in zip(parameters, has.tolist(), strict=True) if there]
        if not some:
            return
        # a copy of all gradients: where one rank has no room for it, no other may wait for that one's
        whole = self.together(
            lambda: torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some])
        )
        with self._reaching():
            dist.all_reduce(whole)
        for parameter, part in zip(some, whole.split([p.numel() for p in some]), strict=True):
            parameter.grad = part.view_as(parameter)

    def leave_note(self, key: str, text: str) -> None:
        """Leaves `text` under `key` for all ranks, from any thread; nobody waits."""
        self._notes.set(key, text)

    def note(self, key: str) -> str | None:
        """What a rank has left under `key`; None: nothing yet. From any thread, at once."""
        return self._notes.get(key).decode() if self._notes.check([key]) else None

    def tell(self, text: str) -> list[str]:
        """What every rank says."""
        found = self.gather(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else _NOTHING)
        return [bytes(tensor.tolist()).decode() for tensor in found]


def _gone(error: BaseException) -> "LostError":
    return LostError(f"{gone_line('another rank')} ({one_line(str(error), 200)})")


def _is_lost(error: Exception) -> bool:
    """Whether a collective has failed because another rank has gone, and not for want of memory here."""
    lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    return lost and not is_out_of_memory(error)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _told_elsewhere(text: str) -> Exception:
    """The error that another rank has told: the first rank tells it to the user if it is his."""
    if text[0] == OTHER:
        return ElsewhereError(text[1:])
    error = LostError(text[1:]) if text[0] == GONE else UserError(text[1:])
    error.everywhere = True
    return error
