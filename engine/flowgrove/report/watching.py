"""`flowgrove watch`: the reports of runs while they train, served to browsers on this machine."""

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flowgrove.errors import UserError, one_line
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.content import readable, run_content, unread_content
from flowgrove.report.page import report_page

HOST = "127.0.0.1"
PORT = 8420
# what a page may load: itself and this server, whatever a prompt or a recipe says
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


_ELSEWHERE = b"flowgrove watch answers as 127.0.0.1 or localhost, on any forwarded port: open it under one of these.\n"


class Answer(NamedTuple):
    """What a path gives: its bytes and their media type. `tag` changes with them."""

    body: bytes
    kind: str
    tag: str

    @classmethod
    def of(cls, body: bytes, kind: str) -> "Answer":
        return cls(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


class WatchedRun:
    """One run folder, which need not have trained yet; `number` names it in addresses. Read anew only where it has
    changed.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.folder = number, folder
        self.pictures: dict[str, Answer] = {}  # by path
        self._seen: object = None
        self._content: dict[str, Any] = {}

    def content(self) -> dict[str, Any]:
        """What the page draws (`run_content`). `error`: why there is nothing yet."""
        seen = self._signature()
        if seen != self._seen:
            shown: dict[str, Answer] = {}
            self._content = self._read(shown)
            self.pictures, self._seen = shown, seen
        return self._content

    def _read(self, shown: dict[str, Answer]) -> dict[str, Any]:
        def address(done: int, picture: bytes, kind: str) -> str:
            answer = Answer.of(picture, f"image/{kind}")
            place = f"/pictures/{self.number}/{done}-{answer.tag.strip(chr(34))[:16]}.{kind}"
            shown[place] = answer
            return place

        name = readable(self.folder.resolve().name)
        file = self.folder / "recipe.yaml"
        if not file.exists():
            return unread_content(name, "not begun: there is no recipe.yaml yet")
        try:
            return run_content(load_recipe(file), self.folder, address)
        except Exception as error:  # files may go or change while they are read: the next look may find them whole
            return unread_content(name, one_line(str(error)) or type(error).__name__)

    def _signature(self) -> object:
        """What changes when a run writes: names, times and sizes of the files that a page shows."""
        files = [self.folder / "recipe.yaml", self.folder / "metrics.jsonl"]
        for folder in ("samples", "forests"):
            with suppress(OSError):
                files += sorted((self.folder / folder).iterdir())
        found = []
        for file in files:
            with suppress(OSError):
                told = file.stat()
                found.append((file.name, told.st_mtime_ns, told.st_size))
        return found


class Watch:
    """The runs of a page, and the answer to every path."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises UserError for what is no folder, or is named twice."""
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder: give the folder of a run, which `flowgrove train` makes")
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise UserError("a run is named twice: give every folder once")
        self.runs = [WatchedRun(number, folder) for number, folder in enumerate(folders)]
        self._lock = threading.Lock()

    def answer(self, path: str) -> Answer | None:
        """What to send for `path`; None: there is no such thing."""
        for run in self.runs:  # no page waits for another's contents to see a picture
            if (picture := run.pictures.get(path)) is not None:
                return picture
        with self._lock:
            if path == "/":
                names = ", ".join(run.folder.resolve().name for run in self.runs)
                page = report_page(self._contents(), names, live=True)
                return Answer.of(page.encode(), "text/html; charset=utf-8")
            if path == "/data.json":
                return Answer.of(json.dumps(self._contents(), allow_nan=False).encode(), "application/json")
        return None

    def _contents(self) -> list[dict[str, Any]]:
        return [run.content() for run in self.runs]


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD for browsers that have reached this server under a name of its own: another site's page, which may
    let its name point here, gets nothing.
    """

    server: "Server"
    timeout = 60  # seconds that a connection may be silent

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").lower().rpartition(":")[0]  # a forwarded port may be another
        if host not in (HOST, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, Answer.of(_ELSEWHERE, "text/plain; charset=utf-8"))
            return
        answer = self.server.watch.answer(urlsplit(self.path).path)
        if answer is None:
            self._send(HTTPStatus.NOT_FOUND)
        elif self.headers.get("If-None-Match") == answer.tag:
            self._send(HTTPStatus.NOT_MODIFIED, answer)
        else:
            self._send(HTTPStatus.OK, answer)

    do_HEAD = do_GET

    def _send(self, status: HTTPStatus, answer: Answer | None = None) -> None:
        body = answer.body if answer is not None and status != HTTPStatus.NOT_MODIFIED else b""
        self.send_response(status)
        if answer is not None:
            self.send_header("ETag", answer.tag)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Cache-Control", "no-cache")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # a page that was closed meanwhile
                self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a page asks every few seconds."""


class Server(ThreadingHTTPServer):
    """Answers on this machine's own address only. Raises UserError where the port is taken."""

    daemon_threads = True

    def __init__(self, watch: Watch, port: int = PORT) -> None:
        self.watch = watch
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"port {port} cannot be had ({reason}): give another with --port; 0 takes any") from None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


@contextmanager
def serving(folders: Sequence[Path], port: int = PORT) -> Iterator[Server]:
    """A server in a thread of its own, until the block ends."""
    server = Server(Watch(folders), port)
    thread = threading.Thread(target=server.serve_forever, name="watch", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def watch_runs(folders: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serves until it is interrupted or told to end, also where whoever has started it ignores interruptions."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with serving(folders, port) as server, suppress(KeyboardInterrupt):
        say(f"watching {', '.join(str(folder) for folder in folders)} at {server.url} (Ctrl+C ends it)")
        threading.Event().wait()
