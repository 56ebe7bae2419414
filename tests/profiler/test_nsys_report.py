"""The table of a capture of Nsight Systems, of databases with its published export schema and known answers."""

import sqlite3
import struct
from contextlib import closing

import pytest

from flowgrove.profiler.events import Busy
from flowgrove.profiler.nsys import read_captures, shared
from planner_cases import user_error
from subprocesses import ROOT, python

REPORT = ROOT / "profiling" / "nsys_report.py"
SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER,
    int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT, binaryData BLOB);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
    globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
    gridX INTEGER, gridY INTEGER, gridZ INTEGER, blockX INTEGER, blockY INTEGER, blockZ INTEGER,
    graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
"""
RANGE, CATEGORY, DOMAIN, RANGE_OF_THREADS = 59, 33, 75, 60
PROCESS = 0x1A_02_001092  # 4242 on a machine whose own bits lie above
MAIN, REWARDS, AUTOGRAD = ((PROCESS << 24) | thread for thread in (7, 8, 9))
OURS, THEIRS = 3, 4  # domains
US = 1000  # nanoseconds


class Database:
    """Times are given in microseconds."""

    def __init__(self, path, schema=SCHEMA):
        self.path, self._strings = path, {}
        self._database = sqlite3.connect(path)
        self._database.executescript(schema)
        self._launches = 0

    def close(self):
        self._database.executemany("INSERT INTO StringIds VALUES (?, ?)", [(n, s) for s, n in self._strings.items()])
        self._database.commit()
        self._database.close()
        return self.path

    def string(self, text):
        return self._strings.setdefault(text, len(self._strings) + 1)

    def insert(self, table, **values):
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        self._database.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(values.values()))

    def named(self, kind, name, domain, thread=MAIN, category=None):
        self.insert("NVTX_EVENTS", start=0, eventType=kind, text=name, domainId=domain, globalTid=thread,
                    category=category)  # fmt: skip

    def range(self, name, start, end, thread=MAIN, domain=OURS, category=None, sizes=None, inline=False,
              kind=RANGE):  # fmt: skip
        """Registered names stand in StringIds; a payload lies behind a header of 32 bytes."""
        text = {"text": name} if inline else {"textId": self.string(name)}
        blob = None if sizes is None else struct.pack("<IIQQQqq", domain, 0, (1 << 32) + 2, 16, 48, *sizes)
        self.insert("NVTX_EVENTS", start=start * US, end=None if end is None else end * US, eventType=kind,
                    globalTid=thread, domainId=domain, category=category, binaryData=blob, **text)  # fmt: skip

    def call(self, name, start, thread=MAIN, end=None):
        self._launches += 1
        self.insert("CUPTI_ACTIVITY_KIND_RUNTIME", start=start * US, end=(end or start + 1) * US, eventClass=0,
                    globalTid=thread, correlationId=self._launches, nameId=self.string(name), returnValue=0,
                    )  # fmt: skip
        return self._launches

    def kernel(self, launched, start, end, name="gemm", thread=MAIN, stream=7, node=None):
        """`launched`: when, or the number of the call."""
        number = self.call("cudaLaunchKernel_v7000", launched, thread) if isinstance(launched, float) else launched
        self.insert("CUPTI_ACTIVITY_KIND_KERNEL", start=start * US, end=end * US, deviceId=0, contextId=1,
                    streamId=stream, correlationId=number, globalPid=thread >> 24 << 24, graphNodeId=node,
                    demangledName=self.string(f"void {name}()"), shortName=self.string(name))  # fmt: skip

    def copy(self, launched, start, end, thread=MAIN):
        number = self.call("cudaMemcpyAsync_v3020", launched, thread)
        self.insert("CUPTI_ACTIVITY_KIND_MEMCPY", start=start * US, end=end * US, deviceId=0, contextId=1, streamId=7,
                    correlationId=number, globalPid=thread >> 24 << 24, bytes=4, copyKind=1)  # fmt: skip


@pytest.fixture
def database(tmp_path):
    """With the domains and the categories of ours."""
    made = Database(tmp_path / "capture.sqlite")
    made.named(DOMAIN, "flowgrove", OURS)
    made.named(DOMAIN, "NCCL", THEIRS)
    for number, name in enumerate(("stage", "transformer", "ops"), 1):
        made.named(CATEGORY, name, OURS, category=number)
    return made


def an_iteration(database, number=2, begin=0.0):
    """1,000 µs: plan 100, a rollout of two steps, an update whose backward is launched by a thread of autograd."""

    def at(time):
        return begin + time

    root = f"iteration {number}"
    database.range(root, at(0), at(1000), category=1)
    database.range(f"{root}/plan", at(0), at(100), category=1)
    database.range(f"{root}/rollout", at(100), at(500), category=1)
    for step in range(2):
        start = 100 + 200 * step
        inside = f"{root}/rollout/step {step}"
        database.range(inside, at(start), at(start + 190), category=1)
        database.range(f"{inside}/transformer", at(start), at(start + 100), category=2, sizes=(3, 300))
        database.range(f"{inside}/flow_step", at(start + 100), at(start + 150), category=3, sizes=(3, 0), inline=True)
        database.kernel(at(start + 10.0), at(start + 20), at(start + 120))
        database.kernel(at(start + 110.0), at(start + 120), at(start + 140), "flow_step_kernel")
    database.range(f"{root}/update", at(500), at(1000), category=1)
    database.range(f"{root}/update/update 0", at(500), at(1000), category=1)
    database.range(f"{root}/update/update 0/pass 0", at(500), at(900), category=1, sizes=(6, 600))
    database.range(f"{root}/update/update 0/pass 0/backward", at(600), at(900), category=2, sizes=(6, 600))
    database.kernel(at(650.0), at(660), at(860), "gemm_backward", AUTOGRAD)
    database.call("cudaStreamSynchronize_v3020", at(910), end=at(990))


def by_phase(rows):
    return {(row["phase"], row["beside"]): row for row in rows}


def test_time_of_host_and_gpu_by_phase(database):
    for number in range(2):
        an_iteration(database, number, 2000.0 * number)
    (capture,) = read_captures(database.close())
    assert (capture.process, capture.iterations, capture.outside) == (PROCESS, 2, 0)
    rows = by_phase(capture.table())
    expected = {  # µs of the host, µs of the GPU, passes, rows, tokens, launches, waits
        "plan": (100, 0, 1, 0, 0, 0, 0),
        "rollout/transformer": (200, 200, 2, 6, 600, 2, 0),
        "rollout/flow_step": (100, 40, 2, 6, 0, 2, 0),
        "rollout/other": (100, 0, 0, 0, 0, 0, 0),
        "update/backward": (300, 200, 1, 6, 600, 1, 0),
        "update/other": (200, 0, 0, 0, 0, 0, 1),
        "between stages": (0, 0, 0, 0, 0, 0, 0),
    }
    assert {name for name, _ in rows} == set(expected)
    for name, (host, gpu, *counts) in expected.items():
        row = rows[name, False]
        assert row["seconds"] == pytest.approx(host / 1e6, abs=1e-9), name
        assert row["share"] == pytest.approx(host / 1000, abs=1e-6), name
        assert row["gpu_seconds"] == pytest.approx(gpu / 1e6, abs=1e-9), name
        assert row["gpu_share"] == pytest.approx(gpu / 440, abs=1e-6), name
        assert [row[key] for key in ("passes", "rows", "tokens", "launches", "waits")] == counts, name
    assert rows["rollout/transformer", False]["kind"] == "transformer"
    assert rows["rollout/flow_step", False]["kind"] == "ops"
    assert rows["plan", False]["kind"] == "stage"


def test_gaps_are_named_by_the_phase_whose_launch_ended_them(database):
    an_iteration(database)
    (capture,) = read_captures(database.close())
    idle = capture.idle
    assert (idle.span, idle.busy) == (pytest.approx(740), pytest.approx(440))  # from 120 to 860
    assert {name: (gaps.count, round(gaps.total)) for name, gaps in idle.gaps.items()} == {
        "rollout/transformer": (1, 80),  # 240 to 320
        "update/backward": (1, 220),  # 440 to 660
    }
    assert by_phase(capture.table())["update/backward", False]["idle_seconds"] == pytest.approx(220e-6)


def test_a_second_thread_with_its_own_ranges_and_stream(database):
    """What runs at the same time on two streams is counted once: half to each."""
    an_iteration(database)
    database.range("iteration 2/reward", 120, 320, REWARDS, category=1, sizes=(8, 0))
    database.range("iteration 2/reward/decode", 120, 300, REWARDS, category=2, sizes=(8, 0))
    database.kernel(125.0, 170, 270, "vae", REWARDS, stream=13)
    database.kernel(310.0, 900, 905, "mean", REWARDS, stream=13)
    (capture,) = read_captures(database.close())
    rows = by_phase(capture.table())
    assert rows["reward/decode", True]["seconds"] == pytest.approx(180e-6)
    assert rows["reward/decode", True]["rows"] == 8
    assert rows["reward/other", True]["gpu_seconds"] == pytest.approx(5e-6)
    # the picture: 170 to 220 beside a pass, to 240 beside a step's kernel, to 270 alone
    assert rows["reward/decode", True]["gpu_seconds"] == pytest.approx((50 / 2 + 20 / 2 + 30) * 1e-6)
    assert rows["rollout/transformer", False]["gpu_seconds"] == pytest.approx((200 - 25) * 1e-6)
    assert sum(row["gpu_seconds"] for row in rows.values()) == pytest.approx(capture.idle.busy / 1e6)
    assert capture.idle.busy == pytest.approx(475)
    assert sum(row["seconds"] for row in rows.values() if not row["beside"]) == pytest.approx(1e-3)


def test_work_outside_ranges_and_ranges_of_others_are_left_out(database):
    an_iteration(database)
    database.range("ncclAllReduce", 100, 500, domain=THEIRS)
    database.range("iteration 2/rollout/never ended", 110, None)
    database.range("iteration 2/rollout/of threads", 110, 400, kind=RANGE_OF_THREADS)
    database.kernel(1500.0, 1510, 1600, "before the next")
    (capture,) = read_captures(database.close())
    assert capture.outside == 1
    assert capture.idle.busy == pytest.approx(440)
    assert not any("nccl" in row["phase"] or "never" in row["phase"] or "threads" in row["phase"]
                   for row in capture.table())  # fmt: skip


def test_a_replayed_graph_belongs_to_the_range_that_launched_it(database):
    """Its kernels bear the number of that one call, and copies count as work."""
    database.range("iteration 0", 0, 400)
    database.range("iteration 0/rollout", 0, 400)
    database.range("iteration 0/rollout/step 0", 0, 400)
    database.range("iteration 0/rollout/step 0/transformer", 0, 100)
    number = database.call("cudaGraphLaunch_v10000", 10)
    for node in range(3):
        database.kernel(number, 100 + 50 * node, 140 + 50 * node, node=node)
    database.copy(50.0, 300, 310)
    (capture,) = read_captures(database.close())
    row = by_phase(capture.table())["rollout/transformer", False]
    assert (row["launches"], row["gpu_seconds"]) == (4, pytest.approx(130e-6))


def test_every_process_has_its_own_numbers(database):
    """Two ranks launch their first kernel under the same number, in other phases."""
    other = ((PROCESS + 1) << 24) | 7
    database.named(DOMAIN, "flowgrove", THEIRS, other)  # its domains are numbered otherwise
    for thread, domain, stage in ((MAIN, OURS, "rollout"), (other, THEIRS, "update")):
        database.range("iteration 0", 0, 100, thread, domain)
        database.range(f"iteration 0/{stage}", 0, 100, thread, domain)
        database._launches = 0
        database.kernel(10.0, 20, 60, thread=thread)
    first, second = read_captures(database.close())
    assert (first.process, second.process) == (PROCESS, PROCESS + 1)
    for capture, stage in ((first, "rollout"), (second, "update")):
        assert by_phase(capture.table())[stage, False]["gpu_seconds"] == pytest.approx(40e-6)


def test_an_iteration_whose_own_range_began_the_capture_and_is_not_in_it(database):
    database.range("iteration 2/plan", 0, 100)
    database.range("iteration 2/update", 100, 300)
    database.range("iteration 2/update/update 0", 100, 300)
    database.range("iteration 2/update/update 0/pass 0", 100, 300)
    database.range("iteration 2/update/update 0/pass 0/backward", 110, 250)
    database.kernel(150.0, 160, 200, thread=AUTOGRAD)
    (capture,) = read_captures(database.close())
    rows = by_phase(capture.table())
    assert capture.iterations == 1
    assert rows["update/backward", False]["gpu_seconds"] == pytest.approx(40e-6)
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(300e-6)


def test_tables_and_columns_that_a_capture_lacks_read_as_nothing(tmp_path):
    """Tables are made for what was captured; older exports have fewer columns."""
    made = Database(tmp_path / "old.sqlite", """
        CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE NVTX_EVENTS (start INT NOT NULL, end INT, eventType INT NOT NULL, category INT, color INT,
            text TEXT, globalTid INT, textId INT, domainId INT);
    """)  # fmt: skip
    made.named(DOMAIN, "flowgrove", OURS)
    made.insert("NVTX_EVENTS", start=0, end=1000, eventType=RANGE, text="iteration 0", globalTid=MAIN, domainId=OURS)
    (capture,) = read_captures(made.close())
    (row,) = capture.table()
    assert (row["phase"], row["seconds"], row["gpu_seconds"]) == ("between stages", pytest.approx(1e-6), 0)


@pytest.mark.parametrize(
    ("payload", "sizes"),
    [((3, 300), (3, 300)), ((3, 0), (3, 0)), ((3, 3), (3, 3)), ((4, 3), (0, 0)), ((-1, 3), (0, 0)), ((3, -1), (0, 0))],
)
def test_sizes_that_cannot_be_count_as_none(database, payload, sizes):
    database.range("iteration 0", 0, 100)
    database.range("iteration 0/rollout", 0, 100)
    database.range("iteration 0/rollout/transformer", 0, 50, sizes=payload)
    (capture,) = read_captures(database.close())
    row = by_phase(capture.table())["rollout/transformer", False]
    assert (row["rows"], row["tokens"], row["passes"]) == (*sizes, 1)


def test_shared_time_of_three_streams():
    work = [Busy(0, 30, "a"), Busy(10, 20, "a"), Busy(10, 40, "b"), Busy(50, 60, "b")]
    found = shared(work)
    assert found == {"a": pytest.approx(10 + 10 * 2 / 3 + 10 / 2), "b": pytest.approx(10 / 3 + 10 / 2 + 10 + 10)}
    assert sum(found.values()) == pytest.approx(50)


def test_a_file_that_is_no_capture_is_refused_in_one_line(tmp_path, database):
    (tmp_path / "notes.sqlite").write_text("not a database " * 100)
    assert "nsys export" in user_error(read_captures, tmp_path / "notes.sqlite")
    database.range("step", 0, 10, domain=THEIRS)
    line = user_error(read_captures, database.close())
    assert "has no NVTX ranges of the domain flowgrove; it has those of NCCL:" in line
    with closing(sqlite3.connect(tmp_path / "empty.sqlite")):
        pass
    assert "has no NVTX ranges" in user_error(read_captures, tmp_path / "empty.sqlite")
    assert "cannot be read" in user_error(read_captures, tmp_path / "missing.sqlite")


def test_the_script_prints_the_table_and_writes_it(database, tmp_path):
    an_iteration(database)
    path = database.close()
    done = python(REPORT, path, "--csv", tmp_path / "phases.csv", env={"COLUMNS": "160"})
    assert "process 4242: 0.001 s an iteration" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("rollout/transformer"))
    assert line.split() == ["rollout/transformer", "0.20", "20.0", "0.20", "45.5", "0.08", "2", "6", "600", "2"]
    assert "idle 0.22 ms before work of update/backward: 1 gaps, 1 of more than 20 µs" in done.stdout
    assert "gemm 0.2 ms" in done.stdout
    lines = (tmp_path / "phases.csv").read_text().splitlines()
    assert lines[0].startswith("process,phase,")
    assert len(lines) == 8
    refused = python(REPORT, tmp_path / "no.sqlite", check=False)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
