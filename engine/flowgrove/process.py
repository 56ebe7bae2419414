"""A process: what it needs in its environment before torch is loaded, which reads it once; which it is of how many."""

import os
import stat
import sys
from collections.abc import Sequence

# torch's names of its allocator's settings; PYTORCH_ALLOC_CONF is the newer one for every kind of device
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# what says how threads of OpenMP wait for each other: the standard's name, GNU's and Intel's
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def settle() -> None:
    """Sets what the user has not set, unless torch is loaded already, but for TRITON_CACHE_DIR, which is read late.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: passes differ in size, and segments that cannot grow leave memory
    between them that no pass fits into. GOMP_SPINCOUNT=10000: by default a thread that has reached a barrier of GNU's
    OpenMP spins there for up to some milliseconds, also while the processor runs another program instead of the thread
    that it waits for. So short a spin costs nothing on a quiet machine, where sleeping at once would cost half again;
    profiling/figures/busy_machine.csv has the measurements. TRITON_CACHE_DIR, where torchrun has started processes on
    several machines: a folder of this machine, as the home folder may be one that they share, whose files change under
    those that read them.
    """
    if on_several_machines() and "TRITON_CACHE_DIR" not in os.environ:
        folder = _folder_here()
        if folder is not None:
            os.environ["TRITON_CACHE_DIR"] = folder
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _folder_here() -> str | None:
    """A folder of this user for what Triton compiles, in this machine's own one for temporary files; None: there is
    none that only this user writes into.
    """
    import tempfile

    folder = os.path.join(tempfile.gettempdir(), f"flowgrove_triton_{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if mine else None


def started() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share_of(count: int, rank: int, size: int) -> slice:
    """The part of `count` things that is rank `rank`'s of `size`: in order, each within one of the rest."""
    return shares_of([count], rank, size)[0]


def shares_of(counts: Sequence[int], rank: int, size: int) -> list[slice]:
    """The same of several lists of things: of each list, and of all together, what the ranks have is within one of the
    rest. What a list leaves over is dealt to the ranks before those that the list before has dealt its own to.
    """
    shares, dealt_to = [], size
    for count in counts:
        each, over = divmod(count, size)
        dealt_to -= over
        more = [(of_rank - dealt_to) % size < over for of_rank in range(rank + 1)]
        start = each * rank + sum(more[:rank])
        shares.append(slice(start, start + each + more[rank]))
    return shares


def is_first() -> bool:
    """Whether this is the one of them that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def started_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_several_machines() -> bool:
    """Whether some of them run on another machine than this one."""
    return started() > started_here()


def rank_here() -> int:
    """Which of those this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))
