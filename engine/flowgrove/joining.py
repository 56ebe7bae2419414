"""How the processes that torchrun has started become the ranks of a run."""

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flowgrove.errors import UserError
from flowgrove.process import rank_here, started, started_here
from flowgrove.pulse import OTHER, Pulse
from flowgrove.ranks import Ranks
from flowgrove.recipe.checks import shards_of
from flowgrove.recipe.schema import Engine

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# A rank waits for the slowest reward of all the others, and that is no fault; one that has died closes its connections.
_PATIENCE = timedelta(hours=12)
_ASK_AGAIN = 0.05  # seconds


@contextmanager
def joined(engine: Engine, device: torch.device) -> Iterator[Ranks]:
    """The ranks of this run, as the recipe's engine section has them, with the device of this process.

    Raises UserError where torchrun has started several processes of a run that is for one, or another number than the
    weights can be divided among.
    """
    if engine.distributed == "none" and started() > 1:
        raise UserError(
            f"engine.distributed is none, but torchrun started {started()} processes, each of which would train for "
            "itself: write ddp or fsdp2, or start the command without torchrun"
        )
    if engine.distributed == "none" or "RANK" not in os.environ:
        yield Ranks()
        return
    degree = shards_of(engine, started())
    if device.type == "cuda":
        here, gpus = started_here(), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"torchrun started {here} processes on a machine of {gpus} GPUs: --nproc-per-node {gpus}")
        torch.cuda.set_device(rank_here())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(agreed_name(store, rank, size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    mesh = _mesh(device, rank, size, degree) if engine.distributed == "fsdp2" else None
    if device.type == "cuda" and size > 1:  # NCCL takes its memory now, before anything is measured
        for group in (None, *(mesh.get_all_groups() if mesh is not None else ())):
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        torch.cuda.synchronize()
    with Pulse(store, rank, size, partial(_end_at_once, rank)):
        ranks = Ranks(rank, size, dist.new_group(backend="gloo", timeout=_PATIENCE), store, mesh)
        try:
            yield ranks
        except Exception as error:
            ranks.ended_by(error)
            raise
        ranks.most(0)  # nobody is missed who has only ended earlier
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may have gone


def agreed_name(store: dist.Store, rank: int, size: int) -> str:
    """A name that all ranks have now and none before them had: torchrun keeps its store when it starts all ranks anew,
    and what those before have written there. Its own count of restarts is not the same on all machines.

    Every rank says a word of its own; the first gives it the name for that word until it has taken it.
    """
    if rank:
        word = secrets.token_hex(8)
        store.set(f"word of {rank}", word)
        while True:
            if store.check([f"name for {rank}"]):
                for_word, _, name = store.get(f"name for {rank}").decode().partition(" ")
                if for_word == word:
                    store.set(f"taken by {rank}", name)
                    return name
            time.sleep(_ASK_AGAIN)
    name, missing = f"attempt {secrets.token_hex(8)}", set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"taken by {other}"]) and store.get(f"taken by {other}").decode() == name:
                missing.discard(other)
            elif store.check([f"word of {other}"]):  # perhaps one of those before
                store.set(f"name for {other}", f"{store.get(f'word of {other}').decode()} {name}")
        time.sleep(_ASK_AGAIN)
    return name


def _mesh(device: torch.device, rank: int, size: int, degree: int) -> "DeviceMesh":
    """The ranks as copies × shards, or as shards alone."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if degree == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    grid = torch.arange(size).view(-1, degree)
    rows, columns = ([dist.new_group(line.tolist(), timeout=_PATIENCE) for line in lines] for lines in (grid, grid.T))
    mine = [columns[rank % degree], rows[rank // degree]]
    return DeviceMesh.from_group(mine, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


def _end_at_once(rank: int, text: str) -> None:
    """Ends this process, whose main thread waits in a collective that will never be complete."""
    if text[0] != OTHER and rank == (1 if text[1:].startswith("rank 0 ") else 0):
        print(f"error: {text[1:]}", file=sys.stderr, flush=True)
    os._exit(1 if text[0] == OTHER else 2)
