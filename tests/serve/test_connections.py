"""The client that a gate asks another server with, against servers that say any bytes at any time."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.serve.connections import Connections, NoAnswer, Silent

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Kind: a\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Kind: a\r\n\r\n"
    b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n"
)
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\nX-Kind: a\r\n\r\nhello"


class Server:
    """Remembers what it was asked, and on which connection."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.questions, self.connections, self.gone = answer, list[bytes](), 0, 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
                body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
                self.questions.append(head + body)
                await self.answer(reader, writer, head + body)
        self.gone += 1
        writer.close()


@asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    port = listening.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    try:
        yield server
    finally:
        listening.close()
        await asyncio.sleep(0.01)


def on_both_loops(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """asyncio's own, and the one that servers run."""
    for make in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=make) as runner:
            runner.run(main())


def saying(*parts: bytes, close: bool = False) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return answer


def connections(url: str, silent_s: float = 5.0, most: int = 8) -> Connections:
    return Connections(url, headers={"X-Key": "k"}, silent_s=silent_s, most=most)


async def read(to: Connections, body: bytes | None = b"{}") -> tuple[int, bytes]:
    async with to.ask("POST", "/v1/x", body) as reply:
        return reply.status, await reply.read()


def test_a_question_is_whole_http() -> None:
    async def main() -> None:
        async with serving(saying(WHOLE)) as server:
            to = connections(server.url.replace("//", "//a:b%20c@") + "/prefix/")
            assert await read(to, b'{"a": 1}') == (200, b"hello")
            async with to.ask("GET", "/y") as reply:
                assert reply.headers[b"x-kind"] == b"a" and await reply.read() == b"hello"
            to.close()
            assert server.connections == 1  # the second question went where the first had gone
            questions[:] = server.questions

    questions: list[bytes] = []
    on_both_loops(main)
    first, second = questions
    head, _, body = first.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /prefix/v1/x HTTP/1.1" and body == b'{"a": 1}'
    assert b"X-Key: k" in lines and b"Authorization: Basic YTpiIGM=" in lines
    assert any(line.startswith(b"Host: 127.0.0.1:") for line in lines)
    assert second.startswith(b"GET /prefix/y HTTP/1.1\r\n") and b"Content-Length" not in second


@settings(max_examples=60, deadline=None)
@given(
    said=st.sampled_from([WHOLE, CHUNKED, UNTIL_CLOSED]),
    cuts=st.sets(st.integers(1, len(CHUNKED) - 1), max_size=12),
)
def test_however_an_answer_is_cut_it_is_the_same(said: bytes, cuts: set[int]) -> None:
    places = [0, *sorted(cut for cut in cuts if cut < len(said)), len(said)]
    parts = [said[start:end] for start, end in itertools.pairwise(places)]

    async def main() -> None:
        async with serving(saying(*parts, close=said is UNTIL_CLOSED)) as server:
            to = connections(server.url)
            for _ in range(3):
                assert await read(to) == (200, b"hello")
            assert server.connections == (3 if said is UNTIL_CLOSED else 1)
            to.close()

    on_both_loops(main)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "the server closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", "the server closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello", "the server closed"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", "not HTTP"),
    ],
)
def test_what_breaks_off_is_no_answer(said: bytes, message: str) -> None:
    async def main() -> None:
        async with serving(saying(said, close=True)) as server:
            to = connections(server.url)
            with pytest.raises(NoAnswer, match=message):
                await read(to)
            assert to.busy == 0

    on_both_loops(main)


def test_nobody_listens() -> None:
    with pytest.raises(NoAnswer, match=r"(?i)connect"):
        asyncio.run(read(connections("http://127.0.0.1:9")))


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello"])
def test_silence_is_noticed(said: bytes) -> None:
    async def main() -> None:
        async with serving(saying(said)) as server:
            to = connections(server.url, silent_s=0.1)
            with pytest.raises(Silent, match=r"silent for 0\.1 s"):
                await read(to)
            await asyncio.sleep(0.05)
            assert server.gone == 1 and server.connections == 1  # it was not asked a second time

    on_both_loops(main)


def test_who_goes_on_speaking_is_not_silent() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> None:
        writer.write(WHOLE[:-5])
        for letter in WHOLE[-5:]:
            await asyncio.sleep(0.06)
            writer.write(bytes([letter]))

    async def main() -> None:
        async with serving(answer) as server:
            to = connections(server.url, silent_s=0.2)
            assert await read(to) == (200, b"hello")
            await asyncio.sleep(0.3)  # resting is not silence
            assert await read(to) == (200, b"hello") and server.connections == 1
            to.close()

    on_both_loops(main)


def test_a_resting_connection_that_was_closed_is_not_taken() -> None:
    async def main() -> None:
        async with serving(saying(WHOLE, close=True)) as server:
            to = connections(server.url)
            for _ in range(3):
                assert await read(to) == (200, b"hello")
                await asyncio.sleep(0.01)
            assert server.connections == 3

    on_both_loops(main)


def test_a_connection_that_closes_as_it_is_taken_is_asked_again_elsewhere() -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> None:
            if len(server.questions) == 2:  # on the connection that had rested
                writer.close()
            else:
                writer.write(WHOLE)

        async with serving(answer) as server:
            to = connections(server.url)
            assert [await read(to) for _ in range(2)] == [(200, b"hello")] * 2
            assert len(server.questions) == 3 and server.connections == 2 and to.busy == 0
            to.close()

    on_both_loops(main)


def test_closing_ends_what_is_asked() -> None:
    async def main() -> None:
        async with serving(saying(WHOLE)) as server:
            to = connections(server.url)
            assert await read(to) == (200, b"hello")
            server.answer = saying()
            asking = asyncio.ensure_future(read(to))
            await asyncio.sleep(0.05)
            to.close()
            with pytest.raises(NoAnswer, match="was closed"):
                await asking
            assert server.connections == 1 and len(server.questions) == 2

    on_both_loops(main)


def test_two_answers_to_one_question_end_the_connection() -> None:
    async def main() -> None:
        async with serving(saying(WHOLE + WHOLE.replace(b"hello", b"HELLO"))) as server:
            to = connections(server.url)
            for _ in range(2):
                async with to.ask("GET", "/") as reply:
                    assert (reply.status, await reply.read()) == (200, b"hello")
            assert server.connections == 2

    on_both_loops(main)


def test_leaving_early_tells_the_server() -> None:
    async def main() -> None:
        async with serving(
            saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\na\nb\r\n")
        ) as server:
            to = connections(server.url)
            async with to.ask("POST", "/", b"{}") as reply:
                async for line in reply.lines():
                    assert line == b"a"
                    break
            await asyncio.sleep(0.05)
            assert server.gone == 1 and to.busy == 0
            asking = asyncio.ensure_future(read(to))
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.sleep(0.05)
            assert server.gone == 2 and to.busy == 0

    on_both_loops(main)


@settings(max_examples=40, deadline=None)
@given(text=st.text("ab\n", max_size=40), cuts=st.sets(st.integers(1, 39), max_size=6))
def test_lines_are_those_of_the_body(text: str, cuts: set[int]) -> None:
    body = text.encode()
    places = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    chunks = [body[start:end] for start, end in itertools.pairwise(places) if start < end]
    said = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
    said += [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks] + [b"0\r\n\r\n"]

    async def main() -> None:
        async with serving(saying(*said)) as server:
            to = connections(server.url)
            async with to.ask("POST", "/", b"{}") as reply:
                found = [line async for line in reply.lines()]
            to.close()
        assert found == [*lines, *([last] if last else [])]

    *lines, last = body.split(b"\n")
    on_both_loops(main)


def test_who_reads_slowly_holds_little_and_gets_all() -> None:
    line = b"x" * 1023 + b"\n"
    count = 16 * 1024

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(line) * count))
        for _ in range(count):
            writer.write(line)
            await writer.drain()
            sent += 1

    async def main() -> None:
        nonlocal sent
        sent = 0
        async with serving(answer) as server:
            to = connections(server.url, silent_s=0.2)
            async with to.ask("POST", "/", b"{}") as reply:
                await asyncio.sleep(0.5)  # that it is we who do not read is no silence of the server's
                assert 0 < sent < count
                assert [one async for one in reply.lines()] == [line[:-1]] * count
            assert await read(to) == (200, line * count) and server.connections == 1
            to.close()

    sent = 0
    on_both_loops(main)


def test_no_more_at_once_than_allowed() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        writer.write(WHOLE)

    async def main() -> None:
        nonlocal now, most
        now = most = 0
        async with serving(answer) as server:
            to = connections(server.url, most=3)
            waiting = [asyncio.ensure_future(read(to)) for _ in range(12)]
            await asyncio.sleep(0)
            assert to.busy == 12
            waiting[11].cancel()  # one that has no connection yet
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert found[:11] == [(200, b"hello")] * 11 and isinstance(found[11], asyncio.CancelledError)
            assert most == 3 and server.connections == 3 and to.busy == 0
            to.close()

    now = most = 0
    on_both_loops(main)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://x/?a=b", "http://x/a b", "http://x/é"],
)
def test_what_is_no_server_is_refused(url: str) -> None:
    with pytest.raises(BadInput, match="is not"):
        connections(url)


def test_a_key_with_a_line_break_is_refused() -> None:
    with pytest.raises(BadInput, match="the header X-Key"):
        Connections("http://x", headers={"X-Key": "secret\n"}, silent_s=1, most=1)


def test_tls_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = self_signed(tmp_path)
    context.load_cert_chain(certificate, tmp_path / "key.pem")

    async def main() -> None:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        async with serving(saying(WHOLE), context) as server:
            stranger = connections(server.url)
            with pytest.raises(NoAnswer, match="CERTIFICATE_VERIFY_FAILED"):
                await read(stranger)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            to = connections(server.url)
            assert [await read(to) for _ in range(2)] == [(200, b"hello")] * 2
            to.close()
            await asyncio.sleep(0.05)

    on_both_loops(main)


def self_signed(folder: Path) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    unlocked = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, unlocked))
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    return folder / "certificate.pem"
