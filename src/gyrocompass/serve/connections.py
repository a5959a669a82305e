"""HTTP/1.1 connections to one server, kept open between questions.

    async with connections.ask("POST", "/v1/chat/completions", body) as reply:
        reply.status, reply.headers, await reply.read()

A gate asks as often as it is asked, so what a client does for each question is half of what the gate costs.
This one knows one server, one head for each path, and JSON; llhttp (by httptools) reads the answers. A
connection goes back when its answer is whole, and is closed when it is not, so leaving early tells the
server that nobody listens. Redirects, cookies, proxies and compressed answers are left out on purpose.

A server may close a connection that rests just as it is taken; if nothing came back on it, the question is
asked again on another one.
"""

from __future__ import annotations

import asyncio
import base64
import math
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import cast
from urllib.parse import unquote, urlsplit

from gyrocompass.core.errors import BadInput, MissingDependency

try:
    import httptools
except ImportError as error:
    raise MissingDependency("httptools", extra="serve", needed_for="an upstream") from error

_CONNECT_S = 10.0
_REST_S = 15.0
"""How long a connection may rest and still be taken."""
_MOST_HELD_BYTES = 2**18
"""Of a body that nobody reads; then the server has to wait."""


class NoAnswer(Exception):  # noqa: N818
    """The server cannot be reached, or broke off, or does not speak HTTP."""


class Silent(NoAnswer):
    """The server said nothing for too long."""


class Connections:
    """To one server.

    Args:
        url: http or https, host, port, a path that all others come after.
        headers: sent with every question.
        silent_s: how long the server may say nothing, seconds.
        most: questions at once; the rest wait here.

    Raises:
        BadInput: the URL is none of those, or a header cannot be sent.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str], silent_s: float, most: int) -> None:
        try:
            parts = urlsplit(url)
            port, host = parts.port, (parts.hostname or "").encode("idna").decode()
        except ValueError as error:
            raise BadInput(f"{url!r} is not a URL: {error}") from None
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not plain:
            raise BadInput(
                f"{url!r} is not the URL of a server", fix="give one like http://127.0.0.1:8000/v1"
            )
        self._host, self._port = host, port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        shown = f"[{host}]" if ":" in host else host
        told = {"Host": shown if port is None else f"{shown}:{port}", "Accept-Encoding": "identity"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            told["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        for name, value in headers.items():
            if not (value.isascii() and value.isprintable()):
                raise BadInput(
                    f"the header {name} for {url} holds what no header can: a line break, a letter like é"
                )
        self._prefix = parts.path.rstrip("/")
        self._told = "".join(f"{name}: {value}\r\n" for name, value in (told | dict(headers)).items())
        self._heads: dict[tuple[str, str], bytes] = {}
        self._silent_s, self._free = silent_s, asyncio.Semaphore(most)
        self._resting: deque[Reply] = deque()
        self._all: set[Reply] = set()
        self.busy = 0
        """Questions that wait, for a connection or for their answer."""

    def ask(self, method: str, path: str, body: bytes | None = None) -> Asking:
        """A question, asked when it is entered.

        Entering raises:
            NoAnswer: there is none. Reading the reply may raise it too.
        """
        head = self._heads.get((method, path))
        if head is None:
            head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._told}".encode("latin-1")
            self._heads[method, path] = head
        if body is None:
            return Asking(self, head + b"\r\n")
        length = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        return Asking(self, head + length + body)

    def close(self) -> None:
        """Close all of them; what is being asked fails."""
        for connection in list(self._all):
            connection.drop()

    async def take(self, question: bytes) -> Reply:
        """A reply whose head is here, to a question that is whole HTTP."""
        self.busy += 1
        has_place = False
        try:
            has_place = await self._free.acquire()
            while True:
                rested = self._rested()
                connection = rested or await self._opened()
                try:
                    await connection.ask(question)
                    return connection
                except BaseException as error:
                    was_closed = isinstance(error, NoAnswer) and not isinstance(error, Silent)
                    again = was_closed and rested is not None and not connection.heard
                    connection.drop()
                    if not again:
                        raise
        except BaseException:
            self.busy -= 1
            if has_place:
                self._free.release()
            raise

    def give_back(self, connection: Reply) -> None:
        """It is no longer read from."""
        self.busy -= 1
        self._free.release()
        if connection.may_rest():
            self._resting.append(connection)
        else:
            connection.drop()

    def forget(self, connection: Reply) -> None:
        """It is closed."""
        self._all.discard(connection)

    def _rested(self) -> Reply | None:
        """The one that was used last; those that rested for long are closed."""
        now = asyncio.get_running_loop().time()
        while self._resting and (self._resting[0].closed or now - self._resting[0].heard_at > _REST_S):
            self._resting.popleft().drop()
        while self._resting:
            connection = self._resting.pop()
            if not connection.closed:
                return connection
        return None

    async def _opened(self) -> Reply:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: Reply(self, loop, self._silent_s), self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise Silent(f"no connection within {_CONNECT_S:g} s") from None
        except OSError as error:
            raise NoAnswer(str(error) or type(error).__name__) from error
        self._all.add(connection)
        return connection


class Asking:
    """`async with` gives the reply; leaving gives its connection back."""

    __slots__ = ("_connections", "_question", "_reply")

    def __init__(self, connections: Connections, question: bytes) -> None:
        self._connections, self._question = connections, question

    async def __aenter__(self) -> Reply:
        self._reply = await self._connections.take(self._question)
        return self._reply

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connections.give_back(self._reply)


class Reply(asyncio.Protocol):
    """An answer whose head is here, and the connection on which its body comes.

    `status` and `headers` (names in lower case) are of the answer to the last question.
    """

    def __init__(self, connections: Connections, loop: asyncio.AbstractEventLoop, silent_s: float) -> None:
        self._connections, self._loop, self._silent_s = connections, loop, silent_s
        self.status, self.headers = 0, dict[bytes, bytes]()
        self.closed = False
        self.heard = False
        """Whether anything came back on the last question."""
        self.heard_at = loop.time()
        self._asked = self._has_head = self._whole = self._stays = False
        self._body: list[bytes] = []
        self._held_bytes, self._most_bytes, self._paused = 0, math.inf, False
        self._error: NoAnswer | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._watch: asyncio.TimerHandle | None = None

    async def ask(self, question: bytes) -> None:
        """Send, and wait for the answer's head."""
        self.headers, self._body, self._held_bytes, self._most_bytes = {}, [], 0, _MOST_HELD_BYTES
        self.heard = self._has_head = self._whole = self._stays = False
        self._asked, self.heard_at = True, self._loop.time()
        if self._watch is None:
            self._watch = self._loop.call_later(self._silent_s, self._listen)
        self._transport.write(question)
        while not self._has_head:
            await self._more()

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            NoAnswer: it breaks off.
        """
        self._most_bytes = math.inf  # all of it is wanted
        self._resume()
        while not self._whole:
            await self._more()
        return self._taken()

    async def lines(self) -> AsyncIterator[bytes]:
        """The body by lines, as it comes.

        Raises:
            NoAnswer: it breaks off.
        """
        rest = b""
        while True:
            *lines, rest = (rest + self._taken()).split(b"\n")
            for line in lines:
                yield line
            self._resume()
            if not self._body:
                if self._whole:
                    break
                await self._more()
        if rest:
            yield rest

    def may_rest(self) -> bool:
        """Whether another question can be asked on it."""
        self._asked = False
        return self._stays and not self.closed

    def drop(self) -> None:
        """Close it at once; what is being asked on it fails, and is not asked again."""
        self.heard = True
        self._transport.abort()
        self._end(NoAnswer("the connection was closed"))

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.heard, self.heard_at = True, self._loop.time()
        if not self._asked:  # nobody has asked
            self.drop()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(NoAnswer(f"its answer is not HTTP: {error or type(error).__name__}"))
            self._transport.abort()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        lasts = b"content-length" not in self.headers and b"transfer-encoding" not in self.headers
        if self._asked and self._has_head and lasts and error is None:
            self._whole = True  # such a body ends with its connection
        said = "the server closed the connection"
        self._end(NoAnswer(f"{said}: {error}" if error else said))

    # What httptools calls.

    def on_message_begin(self) -> None:
        """Another answer to one question is none."""
        if self._whole:
            raise ValueError("two answers to one question")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is here; one of 1xx is not yet the answer's."""
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self.headers = {}
        else:
            self._has_head = True

    def on_body(self, part: bytes) -> None:
        """A part of the body."""
        self._body.append(part)
        self._held_bytes += len(part)
        if self._held_bytes > self._most_bytes and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The body's end."""
        self._whole = self._has_head
        self._stays = self._whole and self._parser.should_keep_alive()

    async def _more(self) -> None:
        """Wait until something has come."""
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _taken(self) -> bytes:
        parts, self._body, self._held_bytes = self._body, [], 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _resume(self) -> None:
        if self._paused:
            self._paused, self.heard_at = False, self._loop.time()
            if not self.closed:
                self._transport.resume_reading()

    def _listen(self) -> None:
        """Whether the server has been silent for too long; while nothing is asked there is no watch."""
        self._watch = None
        if not self._asked or self.closed:
            return
        left_s = self.heard_at + self._silent_s - self._loop.time()
        if self._paused:  # it is we who do not read
            left_s = self._silent_s
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._listen)
        else:
            self._end(Silent(f"silent for {self._silent_s:g} s"))
            self._transport.abort()

    def _end(self, error: NoAnswer) -> None:
        if not self.closed:
            self.closed, self._error = True, error
            self._connections.forget(self)
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
            self._wake()
