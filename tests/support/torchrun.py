"""Several ranks of one run, each a process, with a deadline for all of them together."""

import os
import signal
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

from subprocesses import PYTHON, environment

DEADLINE = 150  # seconds: two cores import torch for every rank


@contextmanager
def started(ranks, *arguments, output, options=("--standalone",)):
    """torchrun with `ranks` processes of `python ARGUMENTS`, which ends with the block; what all print is in `output`.
    Yields its Popen.
    """
    torchrun = [PYTHON, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
    with output.open("w") as file:
        process = subprocess.Popen(
            [*torchrun, *map(str, arguments)],
            env=environment(OMP_NUM_THREADS="1"),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def torchrun(ranks, *arguments, output, code=0):
    """Runs to the end; torchrun ends with 1 whatever its ranks end with. Returns what all printed."""
    with started(ranks, *arguments, output=output) as process:
        found = process.wait(DEADLINE)
    text = output.read_text()
    assert found == code, text
    return text


def train(ranks, recipe, *options, output, code=0, distributed="ddp", **engine):
    """`flowgrove train` of a recipe on `ranks` ranks with engine.distributed and other keys of that section."""
    keys = {"distributed": distributed, **engine}
    sets = [word for key, value in keys.items() for word in ("--set", f"engine.{key}={str(value).lower()}")]
    return torchrun(ranks, "-m", "flowgrove", "train", recipe, *sets, *options, output=output, code=code)


def process_of(rank, torchrun):
    """The process of a rank that torchrun, itself process `torchrun`, has started."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"\0RANK=%d\0" % rank in Path(f"/proc/{pid}/environ").read_bytes()]
    return found


@contextmanager
def started_by_hand(ranks, *arguments, folder):
    """`ranks` processes of `python ARGUMENTS` that nothing watches, as where each is on a machine of its own; what
    rank N prints is in FOLDER/N.log. They end with the block. Yields their Popen.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    try:
        for rank in range(ranks):
            numbers = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": str(ranks)}
            env = environment(OMP_NUM_THREADS="1", MASTER_ADDR="localhost", MASTER_PORT=port, **numbers)
            with (folder / f"{rank}.log").open("w") as file:
                command = [PYTHON, *map(str, arguments)]
                processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
