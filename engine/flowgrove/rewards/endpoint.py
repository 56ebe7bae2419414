"""Posting JSON to a server that may be slow, down, wrong, huge or talk nonsense: bounded time, bounded size, few tries, and errors of one line.

Tried again, after growing waits: no connection, a broken one, no answer in time, 429 and 5xx. Anything else that is not 200 with JSON ends at once. Answers are
cut off at a largest size; passwords and keys never stand in an error.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from flowgrove.errors import UserError

if TYPE_CHECKING:
    import httpx2

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_SHOWN = 120  # characters of an answer in an error
Retries = Annotated[int, Field(ge=0)]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Endpoint:
    """One URL. `timeout`: seconds for one try, from connecting to the last byte. `key_variable`: the environment variable that holds a bearer token."""

    def __init__(self, reward: str, url: str, timeout: float, retries: int, max_answer_mb: float, concurrency: int, key_variable: str | None) -> None:
        import httpx2

        self.reward, self.url, self.timeout, self.retries, self.concurrency = reward, url, timeout, retries, concurrency
        self.max_bytes = int(max_answer_mb * 2**20)
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            parsed = httpx2.URL("")
        if parsed.userinfo or parsed.query:
            raise UserError(f"reward {reward}: url holds a password or a query: keep keys in an environment variable and name it as key_variable")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"reward {reward}: url is {url!r}: write one like http://127.0.0.1:8000/score")
        self._key = None
        if key_variable is not None:
            self._key = os.environ.get(key_variable)
            if not self._key:
                raise UserError(f"reward {reward}: the environment variable {key_variable} (key_variable) is not set: export it")
            if not self._key.isascii() or not self._key.isprintable():
                raise UserError(f"reward {reward}: the environment variable {key_variable} (key_variable) is no key: it may hold printable ASCII only")

    def map(self, ask: "Callable[[httpx2.Client, Item], Result]", items: Iterable[Item]) -> list[Result]:
        """`ask` for every item, at most `concurrency` at a time, in order. The first error stops what has not begun."""
        import httpx2

        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        limits = httpx2.Limits(max_connections=self.concurrency)
        errors: list[Exception] = []

        def one(item: Item) -> Result:
            if errors:
                raise errors[0]
            try:
                return ask(client, item)
            except Exception as error:
                errors.append(error)
                raise

        with httpx2.Client(headers=headers, timeout=self.timeout, limits=limits) as client, ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, items))

    def post(self, client: "httpx2.Client", content: dict[str, Any]) -> Any:
        """The JSON value that the server answers. Raises UserError with the URL and what was answered."""
        import httpx2

        body = json.dumps(content).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)))
            try:
                status, answer = self._try(client, body)
            except httpx2.TimeoutException:
                trouble = f"did not answer within {self.timeout:g} s"
            except httpx2.TransportError as error:
                trouble = f"cannot be reached ({self._shown(str(error)) or type(error).__name__})"
            else:
                if status == 200:
                    return self._parse(answer)
                trouble = f"answered {status} {self._shown(answer.decode('utf-8', 'replace'))!r}"
                if status != 429 and status < 500:
                    raise self.error(trouble)
        raise self.error(f"{trouble}, {self.retries + 1} times" if self.retries else trouble)

    def error(self, trouble: str) -> UserError:
        return UserError(f"reward {self.reward}: {self.url} {trouble}: start or repair the server, or correct the recipe")

    def nonsense(self, answer: Any, wanted: str) -> UserError:
        """The error for an answer of another form than `wanted`."""
        return self.error(f"answered {self._shown(answer if isinstance(answer, str) else json.dumps(answer))!r} instead of {wanted}")

    def _try(self, client: "httpx2.Client", body: bytes) -> tuple[int, bytes]:
        import httpx2

        end, parts, size = time.monotonic() + self.timeout, [], 0
        with client.stream("POST", self.url, content=body, headers={"Content-Type": "application/json"}) as response:
            for part in response.iter_raw():
                size += len(part)
                if size > self.max_bytes:
                    raise self.error(f"answered more than {self.max_bytes} bytes (max_answer_mb)")
                if time.monotonic() > end:  # the client's own limit is per read: a server that drips would never reach it
                    raise httpx2.ReadTimeout("the answer came too slowly")
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
