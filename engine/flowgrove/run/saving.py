"""Checkpoints are written beside the training, from a copy in host memory, and bear their name only when they are
complete and on disk.
"""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.files import follow_umask, partial_name
from flowgrove.models.masters import Piece
from flowgrove.models.policy import Policy
from flowgrove.pulse import ENDED
from flowgrove.ranks import Ranks
from flowgrove.run.checkpoint import held_tensors
from flowgrove.run.finding import point_latest, remove, remove_older, remove_unfinished
from flowgrove.run.host_copies import HostCopies
from flowgrove.run.manifest import SHARDED, WHOLE, Files, described, write_manifest
from flowgrove.run.tensor_files import piece_of, write_pieces, write_tensors
from flowgrove.spans import span
from flowgrove.update.updater import Updater

_ASK_AGAIN = 0.02  # seconds until a thread or another rank's note is looked for again
# seconds that a run of several ranks which ends with an error gives its checkpoint; one that leaves others in a
# collective, whose processes soon end, has less time
_LONGEST, _LONGEST_IN_A_MEETING = 60.0, 8.0
_FAILED = ""  # the note of a rank that has an error, which it tells itself


@dataclass(frozen=True)
class _Job:
    """A checkpoint in the making: its `folder`, the name that it has until it is complete, this rank's tensors, and the
    ranks that write.
    """

    folder: Path
    partial: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    pieces: dict[str, Piece]
    writers: list[int]


class CheckpointWriter:
    """Writes checkpoints/step_NNNNNN of a run (NNNNNN: completed iterations), moves `latest`, and removes all but the
    newest `keep_last` and the best.

    A thread writes while the training goes on, one checkpoint at a time. Of several `ranks` each writes its pieces (of
    copies the first) and the first rank what is whole and the manifest; their threads leave notes for the first one's,
    so that no collective runs beside the training's. `check` raises UserError where the run folder is no longer ours.
    All methods are for all ranks together.
    """

    def __init__(
        self, run: Path, keep_last: int, ranks: Ranks | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        self._run, self._keep_last, self._ranks, self._check = run, keep_last, ranks or Ranks(), check
        self._copies = HostCopies()
        self._pending = False
        self._thread: Thread | None = None  # of a rank that writes
        self._ended = ""  # the key of the note that the first rank leaves when it has done with what was begun
        self._error: Exception | None = None

    def begin(
        self,
        policy: Policy,
        updater: Updater,
        completed: int,
        fingerprint: str,
        line: dict[str, Any],
        splits: dict[str, Any] | None = None,
        initial_lora: str | None = None,
    ) -> Path:
        """Begins to write the present state; returns the folder, which is there once `wait` has returned. `splits`:
        that of the splits which the run chooses, if it does. `initial_lora`: SHA-256 of what the run started from.

        Raises UserError, also for what went wrong with the one before.
        """
        with span("checkpoint"):
            self.wait()
            ranks, pieces = self._ranks, dict(policy.weights.pieces)
            folder = self._run / "checkpoints" / f"step_{completed:06d}"
            state = {
                "format": SHARDED if pieces else WHOLE,
                "completed_iterations": completed,
                "recipe": fingerprint,
                "line": json.loads(json.dumps(line)),  # the last one gets an evaluation while this is written
                "token_budget": updater.runner.budget.tokens,
                **({} if splits is None else {"splits": splits}),
                **({} if initial_lora is None else {"initial_lora": initial_lora}),
            }
            parts = ranks.tell(_named(policy, pieces))
            writers = [rank for rank, part in enumerate(parts) if parts.index(part) == rank]
            writes = ranks.rank in writers
            made = ranks.by_first(lambda: self._make_room(folder))
            partial = folder.with_name(ranks.chosen(None if made is None else made.name) or "")
            tensors = ranks.together(lambda: self._copied(policy, updater) if writes else {})
            job = _Job(folder, partial, state, tensors, pieces, writers)
            self._pending, self._ended = True, f"{partial.name}/ended"
            self._thread = None
            if writes:
                self._thread = Thread(target=self._work, args=(job,), name="checkpoint", daemon=True)
                self._thread.start()
            return folder

    def wait(self) -> None:
        """Returns once what was begun stands on disk. Raises its error, on all ranks."""
        if not self._pending:
            return
        while self._ranks.most(int(self._writes())):  # a rank that has gone is noticed here
            pass
        self._pending = False
        self._ranks.together(self._tell)

    def close(self) -> None:
        """Lets what was begun end, for a run that ends with an error of its own; of several ranks one may have gone
        without a word, and then nobody waits for it for long. A rank that has no more to write waits for the first one:
        torchrun gives the others little time once a process has ended.
        """
        ranks = self._ranks
        longest = math.inf if ranks.size == 1 else _LONGEST if ranks.note(ENDED) is None else _LONGEST_IN_A_MEETING
        until = time.monotonic() + longest
        while (self._writes() or self._first_writes()) and time.monotonic() < until:
            pass

    def _writes(self) -> bool:
        """Whether this rank's thread is at work, after a while in which it may have ended."""
        if self._thread is not None:
            self._thread.join(_ASK_AGAIN)
        return self._thread is not None and self._thread.is_alive()

    def _first_writes(self) -> bool:
        """Whether the first rank is still at work on what was begun, after a while."""
        if self._ranks.first or not self._pending:
            return False
        time.sleep(_ASK_AGAIN)
        try:
            return self._ranks.note(self._ended) is None
        except RuntimeError:  # whoever kept the notes has gone
            return False

    def _tell(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _make_room(self, folder: Path) -> Path:
        with _one_line(folder):
            self._check()
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self._run)
            partial = partial_name(folder)
            partial.mkdir()
            return partial

    def _copied(self, policy: Policy, updater: Updater) -> dict[str, dict[str, Tensor]]:
        """What this rank writes, in host memory that is kept for the next time; on a GPU one wait for all."""
        pieces, found = policy.weights.pieces, held_tensors(policy, updater)
        mine = {
            (kind, name): tensor
            for kind, tensors in found.items()
            for name, tensor in tensors.items()
            if not pieces or (tensor.numel() and (self._ranks.first or piece_of(pieces, name, tensor.ndim) is not None))
        }
        copies = self._copies.of({f"{kind}/{name}": tensor for (kind, name), tensor in mine.items()})
        if policy.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        written: dict[str, dict[str, Tensor]] = {kind: {} for kind in found}
        for kind, name in mine:
            written[kind][name] = copies[f"{kind}/{name}"]
        return written

    def _work(self, job: _Job) -> None:
        """What the thread does: whatever goes wrong is told by `wait`."""
        try:
            with span("write_checkpoint"), _one_line(job.folder):
                self._write(job)
        except Exception as error:
            self._error = error

    def _write(self, job: _Job) -> None:
        if not self._ranks.first:
            note = _FAILED
            try:
                note = json.dumps(self._write_tensors(job))
            finally:
                self._ranks.leave_note(f"{job.partial.name}/{self._ranks.rank}", note)
            return
        try:
            try:
                mine = self._write_tensors(job)
            finally:  # nobody writes into a folder that is removed
                others = [self._note_of(rank, job) for rank in job.writers[1:]]
            if None not in others:
                self._complete(
                    job, {name: entry for files in (mine, *others) if files for name, entry in files.items()}
                )
        finally:
            shutil.rmtree(job.partial, ignore_errors=True)
            if self._ranks.size > 1:
                with suppress(RuntimeError):  # whoever kept the notes may have gone
                    self._ranks.leave_note(self._ended, "")

    def _write_tensors(self, job: _Job) -> Files:
        """Writes this rank's files, and returns what the manifest says of them once they are on disk."""
        names = []
        for kind, tensors in job.tensors.items():
            if not job.pieces:
                names.append(write_tensors(job.partial, kind, tensors))
            elif tensors:
                names.append(write_pieces(job.partial, kind, tensors, job.pieces, self._ranks.rank))
        follow_umask(job.partial)
        for name in names:
            _sync(job.partial / name)
        return described(job.partial, names)

    def _note_of(self, rank: int, job: _Job) -> Files | None:
        """What another rank has written; None: it has failed."""
        key = f"{job.partial.name}/{rank}"
        while (note := self._ranks.note(key)) is None:
            time.sleep(_ASK_AGAIN)
        return None if note == _FAILED else json.loads(note)

    def _complete(self, job: _Job, files: Files) -> None:
        """The folder takes its name when all of it is on disk, and one that had it goes then."""
        write_manifest(job.partial, job.state, files)
        follow_umask(job.partial)
        for place in (*job.partial.rglob("*"), job.partial):
            _sync(place)
        self._check()  # this machine may have slept
        before = None
        if job.folder.exists() or job.folder.is_symlink():
            before = job.folder.rename(partial_name(job.folder))
        job.partial.rename(job.folder)
        for place in (job.folder.parent, self._run):
            _sync(place)
        if before is not None:
            remove(before)
        point_latest(self._run, job.folder.name)
        remove_older(self._run, job.folder, self._keep_last)


def _named(policy: Policy, pieces: dict[str, Piece]) -> str:
    """Names the part of the weights that this rank has: ranks that hold the same part have the same name."""
    weights = policy.weights.trainable()
    text = json.dumps([(name, piece.start, len(weights[name])) for name, piece in sorted(pieces.items())])
    return sha256(text.encode()).hexdigest()


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Raises UserError for what a disk refuses."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        denied = "denied" in str(error)
        way = "make its folder writable" if denied else "free some space and give the same command again"
        raise UserError(f"cannot write {folder}: {error}; {way}") from None


def _sync(path: Path) -> None:
    """What is in a file, or which files are in a folder, is on disk; some network folders know nothing of that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
