"""Posting JSON to a server that may be slow, down, wrong, huge or talk nonsense: bounded time, bounded size, few tries,
and errors of one line.

Tried again, after growing waits: no connection, a broken one, no answer in time, 429 and 5xx. Anything else that is not
200 with JSON ends at once. Answers are cut off at a largest size; passwords and keys never stand in an error.
"""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from flowgrove.errors import UserError
from flowgrove.rewards.faults import RewardError

if TYPE_CHECKING:
    import httpx2

_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_CLOSE = 0.5, 30.0, 5.0
_SHOWN = 120  # characters of an answer in an error
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
Retries = Annotated[int, Field(ge=0, le=1000)]
Concurrency = Annotated[int, Field(ge=1, le=1024)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Megabytes = Annotated[float, Field(gt=0, le=1024)]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Endpoint:
    """One URL. `timeout`: seconds for one try, from connecting to the last byte.

    `key_variable`: the environment variable that holds a bearer token.
    """

    def __init__(
        self,
        reward: str,
        url: str,
        timeout: float,
        retries: int,
        max_answer_mb: float,
        concurrency: int,
        key_variable: str | None,
    ) -> None:
        import httpx2

        self.reward, self.url, self.timeout, self.retries, self.concurrency = reward, url, timeout, retries, concurrency
        self.max_bytes = int(max_answer_mb * 2**20)
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            parsed = httpx2.URL("")
        if parsed.userinfo or parsed.query:
            raise UserError(
                f"reward {reward}: url holds a password or a query: keep keys in an environment variable and name it "
                "as key_variable"
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"reward {reward}: url is {url!r}: write one like http://127.0.0.1:8000/score")
        self._key = None
        if key_variable is not None:
            self._key = os.environ.get(key_variable)
            if not self._key:
                raise UserError(
                    f"reward {reward}: the environment variable {key_variable} (key_variable) is not set: export it"
                )
            if not self._key.isascii() or not self._key.isprintable():
                raise UserError(
                    f"reward {reward}: the environment variable {key_variable} (key_variable) is no key: "
                    "it may hold printable ASCII only"
                )

    def map(self, ask: "Callable[[Connections, Item], Result]", items: Iterable[Item]) -> list[Result]:
        """`ask` for every item, at most `concurrency` at a time, in order. The first error stops what has not begun."""
        errors: list[Exception] = []

        def one(item: Item) -> Result:
            if errors:
                raise errors[0]
            try:
                return ask(client, item)
            except Exception as error:
                errors.append(error)
                raise

        with Connections(self._client()) as client, ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, items))

    def _client(self) -> "httpx2.AsyncClient":
        import httpx2

        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        limits = httpx2.Limits(max_connections=self.concurrency)
        try:
            return httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)
        except Exception:  # what it says may hold the proxy's password
            names = [name for name in os.environ if name.lower() in _PROXIES]
            what = f"the proxy that {' or '.join(names)} names cannot be used" if names else "no connection can be made"
            wanted = "write one like http://127.0.0.1:3128, or unset it"
            raise UserError(f"reward {self.reward}: {what}: {wanted}") from None

    def post(self, client: "Connections", content: dict[str, Any]) -> Any:
        """The JSON value that the server answers. Raises UserError with the URL and what was answered."""
        import httpx2

        body = json.dumps(content).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)))
            unreachable = True
            try:
                status, answer = self._try(client, body)
            except TimeoutError:
                trouble = f"did not answer within {self.timeout:g} s"
            except httpx2.TransportError as error:
                trouble = f"cannot be reached ({self._shown(str(error)) or type(error).__name__})"
            except UserError:
                raise
            except Exception as error:  # names and ports that the network's own functions refuse
                shown = self._shown(str(error))
                raise self.error(f"cannot be asked ({type(error).__name__}: {shown})") from None
            else:
                if status == 200:
                    return self._parse(answer)
                unreachable, trouble = False, f"answered {status} {self._shown(answer.decode('utf-8', 'replace'))!r}"
                if status != 429 and status < 500:
                    raise self.error(trouble)
        raise self.error(f"{trouble}, {self.retries + 1} times" if self.retries else trouble, unreachable)

    def error(self, trouble: str, unreachable: bool = False) -> RewardError:
        """What is told of an exchange that gave nothing, after all tries."""
        text = f"reward {self.reward}: {self.url} {trouble}: start or repair the server, or correct the recipe"
        return RewardError(text, asked_again=True, unreachable=unreachable)

    def nonsense(self, answer: Any, wanted: str) -> RewardError:
        """The error for an answer of another form than `wanted`."""
        try:
            text = answer if isinstance(answer, str) else json.dumps(answer)
        except RecursionError:
            text = "[[[..."
        return self.error(f"answered {self._shown(text)!r} instead of {wanted}")

    def _try(self, client: "Connections", body: bytes) -> tuple[int, bytes]:
        return client.run(self._exchange(client.client, body))

    async def _exchange(self, client: "httpx2.AsyncClient", body: bytes) -> tuple[int, bytes]:
        """Status and answer. Raises TimeoutError: a limit on each read would never end a server that drips."""
        parts, size, headers = [], 0, {"Content-Type": "application/json"}
        request = client.stream("POST", self.url, content=body, headers=headers)
        async with asyncio.timeout(self.timeout), request as response:
            async for part in response.aiter_raw():
                size += len(part)
                if size > self.max_bytes:
                    raise self.error(f"answered more than {self.max_bytes} bytes (max_answer_mb)")
                parts.append(part)
        return response.status_code, b"".join(parts)

    def _parse(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested beyond measure
            raise self.nonsense(answer.decode("utf-8", "replace"), "JSON") from None

    def _shown(self, text: str) -> str:
        """The beginning of a text in one line, without the key."""
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


class Connections:
    """A client that several threads use. Exchanges run in an event loop, where one limit of time bounds a whole one."""

    def __init__(self, client: "httpx2.AsyncClient") -> None:
        self.client, self._loop = client, asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)

    def __enter__(self) -> "Connections":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):  # every answer is there, or the error of one
            self.run(asyncio.wait_for(self.client.aclose(), _LONGEST_CLOSE))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
