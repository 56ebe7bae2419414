"""Weights that are divided among ranks as FSDP2 divides them, and ranks that are threads of one process."""

import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from flowgrove.models.masters import Piece
from flowgrove.ranks import Ranks
from flowgrove.run.saving import CheckpointWriter
from flowgrove.update.ema import Ema

DEADLINE = 60  # seconds
SHAPES = {"a.weight": (7, 3), "b.weight": (2, 5), "a.bias": (5,), "one.weight": (1, 2, 2), "norm.weight": (6,)}
WHOLE = ("norm.weight",)  # on every rank


class _Ranks(Ranks):
    """One of several in one process: all that ranks say goes through `gather`."""

    def __init__(self, rank, size, meeting, said, store):
        super().__init__(rank, size, store=store)
        self._meeting, self._said = meeting, said

    def gather(self, mine):
        self._said[self.rank] = mine.clone()
        self._meeting.wait()
        found = list(self._said)
        self._meeting.wait()
        return found


def together(size, work):
    """What `work(ranks)` returns on each of `size` ranks, in their order; the first one's error if there is one."""
    meeting, store = threading.Barrier(size, timeout=DEADLINE), dist.HashStore()
    said, results, errors = [None] * size, [None] * size, [None] * size

    def run(rank):
        try:
            results[rank] = work(_Ranks(rank, size, meeting, said, store))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    for error in errors:
        if error is not None:
            raise error
    return results


class Divided:
    """The part that one of `size` ranks has of a policy and its updater; with a size of 1 all of it. What it holds of a
    tensor is the rows of one that depends on `seed` and the name alone.
    """

    def __init__(self, rank=0, size=1, dtype=torch.float32, average=True, copies=1, device="cpu"):
        self.rank, self.size = rank // copies, size // copies
        self.pieces, parameters = {}, {}
        for name, shape in SHAPES.items():
            start, end = (0, shape[0]) if name in WHOLE or self.size == 1 else self._rows(shape[0])
            parameters[name] = nn.Parameter(torch.zeros(end - start, *shape[1:], dtype=dtype, device=device))
            if self.size > 1 and name not in WHOLE:
                self.pieces[name] = Piece(torch.Size(shape), start)
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters.values(), fused=True)
        self.policy = SimpleNamespace(weights=self, device=torch.device(device))
        self.ema = Ema(self, 0.5) if average else None
        self.runner = SimpleNamespace(budget=SimpleNamespace(tokens=4096))

    def _rows(self, count):
        each = -(-count // self.size)
        return min(self.rank * each, count), min((self.rank + 1) * each, count)

    def trainable(self):
        return self.parameters

    @torch.no_grad()
    def load(self, tensors):
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def held(self):
        """All that a checkpoint keeps, by name; these are the tensors themselves."""
        found = {f"weights/{name}": p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            found |= {f"optimizer/{name}/{key}": tensor for key, tensor in self.optimizer.state[p].items()}
        return found | ({f"ema/{name}": tensor for name, tensor in self.ema.average.items()} if self.ema else {})

    def of(self, seed):
        """Whoever trained to `seed` holds this."""
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        for name, tensor in self.held().items():
            tensor.copy_(self._wanted(name, seed))
        return self

    def holds(self, seed):
        """To the bit."""
        held = self.held()
        return len(self.optimizer.state) == len(SHAPES) and all(
            tensor.dtype == self._wanted(name, seed).dtype and torch.equal(tensor.cpu(), self._wanted(name, seed))
            for name, tensor in held.items()
        )

    @property
    def updater(self):
        return self

    def scramble(self):
        """What a checkpoint does not put back stays 7."""
        for tensor in self.held().values():
            tensor.fill_(7)

    def _wanted(self, name, seed):
        kind, weight, *rest = name.split("/")
        if rest == ["step"]:
            return torch.tensor(float(seed))
        parameter, shape = self.parameters[weight], SHAPES[weight]
        generator = torch.Generator().manual_seed(hash_of(f"{kind}/{weight}/{rest}/{seed}"))
        whole = torch.rand(shape, generator=generator, dtype=parameter.dtype)
        start = self.pieces[weight].start if weight in self.pieces else 0
        return whole[start : start + len(parameter)]

    def save(self, run, completed, ranks=None, keep_last=9):
        """Returns the folder once it stands."""
        writer = CheckpointWriter(run, keep_last, ranks)
        folder = writer.begin(self.policy, self, completed, "print", {"iteration": completed - 1})
        writer.wait()
        return folder


def hash_of(text):
    """The same in every process."""
    return int.from_bytes(text.encode(), "little") % (2**31 - 1)


def save(run, completed, size, seed=None, **options):
    """A checkpoint of `completed` iterations by so many ranks, of what depends on `seed` (default: `completed`)."""

    def work(ranks):
        divided = Divided(ranks.rank, size, **options).of(completed if seed is None else seed)
        return divided.save(run, completed, ranks)

    return together(size, work)[0]
