"""A capture of Nsight Systems as the same trace that torch.profiler's is read as: phases from the NVTX ranges of
`flowgrove.spans`, and the GPU's work in the phase whose range the launch lay in.

Read is the SQLite file of `nsys export --type sqlite`: tables and columns are those of its published schema, of which a
file holds what was captured. Identifiers of processes, threads, launches and domains count within a process, and each
process (rank) has a trace of its own.
"""

import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowgrove.errors import UserError
from flowgrove.profiler.clock import Spent
from flowgrove.profiler.events import Busy, Event, Trace
from flowgrove.profiler.gaps import Idle, idle
from flowgrove.profiler.phases import Phase, phases_of
from flowgrove.spans import DOMAIN, SIZES, STAGE

COLUMNS = (
    "phase", "beside", "kind", "seconds", "share", "passes", "rows", "tokens", "gpu_seconds", "gpu_share", "launches",
    "waits", "idle_seconds",
)  # fmt: skip
Row = dict[str, Any]
_CATEGORY, _PUSH_POP, _DOMAIN_CREATE = 33, 59, 75  # NVTX_EVENTS.eventType
_THREAD_BITS = 24  # of globalTid; the rest is the process, and above its 24 bits the machine
_WORK = {  # table → category of torch.profiler, name of what has none
    "CUPTI_ACTIVITY_KIND_KERNEL": ("kernel", "kernel"),
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": ("kernel", "CUDA graph"),
    "CUPTI_ACTIVITY_KIND_MEMCPY": ("gpu_memcpy", "copy"),
    "CUPTI_ACTIVITY_KIND_MEMSET": ("gpu_memset", "fill"),
}
_CALLS = "CUPTI_ACTIVITY_KIND_RUNTIME"
_VERSION = re.compile(r"(_ptsz|_ptds)?_v\d+$")  # cudaLaunchKernel_v7000


@dataclass(frozen=True)
class Capture:
    """One process; its `process` bears the machine too. `spent`: the ranges of each path and thread; `iterations`: how
    many were captured whole.
    """

    process: int
    trace: Trace
    spent: list[Spent]
    iterations: int
    outside: int

    @property
    def number(self) -> int:
        """The process's number on its machine."""
        return self.process & 0xFFFFFF

    @property
    def idle(self) -> Idle:
        """The GPU's gaps, each in the phase of the launch that ends it."""
        return idle(self.trace.busy)

    def table(self) -> list[Row]:
        """A row per phase, means over the iterations, as COLUMNS names them. `seconds` are the host's and exclusive;
        `gpu_seconds` of the phases add up to the time in which the GPU was busy, since work on several streams at once
        shares that time.
        """
        phases = phases_of(self.spent, self.iterations)
        whole = sum(phase.seconds for phase in phases if not phase.beside)
        on_gpu, launches, waits, gaps = (
            shared(self.trace.busy), self.trace.launches(), self.trace.waits(), self.idle.gaps,
        )  # fmt: skip
        busy = sum(on_gpu.values())
        known = {phase.name for phase in phases}
        phases += [Phase(name, True, STAGE) for name in on_gpu if name not in known]
        rows: list[Row] = []
        seen: set[str] = set()
        for phase in phases:
            first = phase.name not in seen
            seen.add(phase.name)
            gpu = on_gpu.get(phase.name, 0.0) if first else 0.0
            gap = gaps[phase.name].total if first and phase.name in gaps else 0.0
            rows.append({
                "phase": phase.name, "beside": phase.beside, "kind": phase.kind, "seconds": phase.seconds,
                "share": phase.seconds / whole if whole else 0.0, "passes": phase.passes, "rows": phase.rows,
                "tokens": phase.tokens, "gpu_seconds": gpu / 1e6 / self.iterations,
                "gpu_share": gpu / busy if busy else 0.0,
                "launches": launches[phase.name] / self.iterations if first else 0,
                "waits": waits[phase.name] / self.iterations if first else 0,
                "idle_seconds": gap / 1e6 / self.iterations,
            })  # fmt: skip
        return rows


def shared(work: Iterable[Busy]) -> dict[str, float]:
    """Microseconds of the GPU by phase, every moment counted once: work that runs at the same time shares it evenly."""
    edges = sorted(edge for one in work for edge in ((one.start, 1, one.phase), (one.end, -1, one.phase)))
    found: defaultdict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    before = 0.0
    for moment, change, phase in edges:
        for name, count in running.items():
            found[name] += (moment - before) * count / running.total()
        running[phase] += change
        if not running[phase]:
            del running[phase]
        before = moment
    return dict(found)


def read_captures(path: Path, domain: str = DOMAIN) -> list[Capture]:
    """The processes that have ranges of the domain, in the order of their numbers. Raises UserError for a file that is
    no export of Nsight Systems, or without such ranges.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return _Export(database).captures(path, domain)
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{path} cannot be read ({error}): give what `nsys export --type sqlite CAPTURE.nsys-rep` has written"
        ) from None


class _Export:
    """The tables of an export; what an older or a newer version of Nsight Systems lacks reads as nothing."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._strings = dict(self._rows("StringIds", "id", "value"))

    def captures(self, path: Path, domain: str) -> list[Capture]:
        """See `read_captures`."""
        ranges, domains = self._ranges(domain)
        if not ranges:
            others = ", ".join(sorted(domains - {domain}))
            there = f"; it has those of {others}" if others else ""
            raise UserError(
                f"{path} has no NVTX ranges of the domain {domain}{there}: capture with --trace=cuda,nvtx, as "
                "profiling/nsys.sh does"
            )
        rest: defaultdict[int, list[Event]] = defaultdict(list)
        for process, event in (*self._calls(), *self._work()):
            rest[process].append(event)
        return [_capture(process, some, rest[process]) for process, some in sorted(ranges.items())]

    def _rows(self, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
        there = {row[1] for row in self._database.execute(f'PRAGMA table_info("{table}")')}
        if not there:
            return iter(())
        read = ", ".join(f'"{column}"' if column in there else "NULL" for column in columns)
        return iter(self._database.execute(f'SELECT {read} FROM "{table}"'))

    def _text(self, text: Any, text_id: Any) -> str:
        """Names stand in the row, or as a number in StringIds."""
        return str(text if text is not None else self._strings.get(text_id, ""))

    def _ranges(self, domain: str) -> tuple[dict[int, list[Event]], set[str]]:
        """The domain's ranges of every process, and the names of all domains."""
        columns = "start", "end", "eventType", "text", "textId", "domainId", "globalTid", "category", "binaryData"
        rows = list(self._rows("NVTX_EVENTS", *columns))
        wanted, domains = set(), set()
        for _, _, kind, text, text_id, number, thread, *_ in rows:
            if kind == _DOMAIN_CREATE:
                domains.add(name := self._text(text, text_id))
                if name == domain:
                    wanted.add((_process(thread), number))
        categories = {
            (_process(thread), number, category): self._text(text, text_id)
            for _, _, kind, text, text_id, number, thread, category, _ in rows
            if kind == _CATEGORY
        }
        found: defaultdict[int, list[Event]] = defaultdict(list)
        for start, end, kind, text, text_id, number, thread, category, sizes in rows:
            key = (_process(thread), number)
            if kind == _PUSH_POP and key in wanted and end is not None:
                event = _event("user_annotation", self._text(text, text_id), start, end, thread)
                event["kind"] = categories.get((*key, category), STAGE)
                event["sizes"] = _sizes(sizes)
                found[key[0]].append(event)
        return dict(found), domains

    def _calls(self) -> Iterator[tuple[int, Event]]:
        columns = "start", "end", "globalTid", "correlationId", "nameId"
        for start, end, thread, correlation, name in self._rows(_CALLS, *columns):
            event = _event("cuda_runtime", _VERSION.sub("", self._strings.get(name, "")), start, end, thread)
            event["args"] = {"correlation": correlation}
            yield _process(thread), event

    def _work(self) -> Iterator[tuple[int, Event]]:
        """What the GPU did; kernels of a CUDA graph bear the number of the call that launched the graph."""
        for table, (category, name) in _WORK.items():
            columns = "start", "end", "globalPid", "correlationId", "streamId", "shortName"
            for start, end, process, correlation, stream, short in self._rows(table, *columns):
                event = _event(category, self._strings.get(short, name), start, end, stream)
                event["args"] = {"correlation": correlation}
                yield _process(process), event


def _process(identifier: int) -> int:
    return int(identifier) >> _THREAD_BITS


def _event(category: str, name: str, start: int, end: int, thread: Any) -> Event:
    return {"cat": category, "name": name, "ts": start / 1e3, "dur": (end - start) / 1e3, "tid": thread, "args": {}}


def _sizes(payload: Any) -> tuple[int, int]:
    """Rows and tokens: what ends the bytes in which Nsight Systems keeps a structured payload, after their header. Of
    values that cannot be sizes there are none.
    """
    if not isinstance(payload, bytes) or len(payload) < SIZES.itemsize:
        return 0, 0
    found = np.frombuffer(payload[-SIZES.itemsize :], SIZES)[0]
    rows, tokens = int(found["rows"]), int(found["tokens"])
    return (0, 0) if min(rows, tokens) < 0 or (tokens and rows > tokens) else (rows, tokens)


def _capture(process: int, ranges: list[Event], others: list[Event]) -> Capture:
    ranges = [*ranges, *_missing_roots(ranges)]
    trace = Trace([*ranges, *others])
    roots = [event for event in ranges if "/" not in event["name"]]
    own = next((event["tid"] for event in roots if event["name"].startswith("iteration")), None)
    sums: dict[tuple[str, bool], Spent] = {}
    for event in sorted(ranges, key=lambda event: event["ts"]):
        key = (event["name"], event["tid"] != own)
        before = sums.get(key, Spent(*key, event["kind"], 0, 0, 0, 0.0))
        rows, tokens = event["sizes"]
        sums[key] = before._replace(
            passes=before.passes + 1, rows=before.rows + rows, tokens=before.tokens + tokens,
            seconds=before.seconds + event["dur"] / 1e6,
        )  # fmt: skip
    iterations = sum(event["name"].startswith("iteration") for event in roots)
    on_gpu = sum(event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset") for event in others)
    return Capture(process, trace, list(sums.values()), max(iterations, 1), on_gpu - len(trace.busy))


def _missing_roots(ranges: list[Event]) -> list[Event]:
    """A capture that an iteration's range began may lack that range itself: from its first range to its last."""
    there = {event["name"] for event in ranges}
    first: dict[str, Event] = {}
    for event in sorted(ranges, key=lambda event: event["ts"]):
        root = event["name"].partition("/")[0]
        if root in there or not root.startswith("iteration"):
            continue
        made = first.setdefault(
            root, {**event, "name": root, "kind": STAGE, "sizes": (0, 0), "dur": 0.0}
        )  # the first of an iteration is on its own thread
        if event["tid"] == made["tid"]:
            made["dur"] = max(made["dur"], event["ts"] + event["dur"] - made["ts"])
    return list(first.values())
