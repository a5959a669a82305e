"""The client below all servers that we ask: what is asked again, when, and what is said when it fails."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from chat_server import ChatServer, Reply
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.core.http import Patience, UselessAnswer, ask_json


def ask(url: str, waits: list[float] | None = None, attempts: int = 4, **more: Any) -> Any:
    options: dict[str, Any] = {"read": lambda answer: answer, "who": "the oracle", "fix": "wake it"}
    options |= {"sleep": ([] if waits is None else waits).append, **more}
    return ask_json(url, {"question": 1}, Patience(attempts, 0.5, 5.0), **options)


def test_json_goes_in_and_comes_out() -> None:
    with ChatServer(Reply('{"answer": 42}')).running() as server:
        assert ask(server.url, read=lambda answer: answer["answer"]) == 42
    assert server.asked == [{"path": "/v1", "question": 1}] and server.keys == [None]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 599])
def test_what_may_pass_is_asked_again_with_longer_waits(status: int) -> None:
    waits: list[float] = []
    with ChatServer(Reply("busy", status), Reply("busy", status), Reply("[]")).running() as server:
        assert ask(server.url, waits) == []
    assert waits == [0.5, 1.0] and len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_bad_input_at_once(status: int) -> None:
    waits: list[float] = []
    with ChatServer(Reply("not you", status)).running() as server:
        with pytest.raises(BadInput, match=f"the oracle refuses: status {status}: not you") as raised:
            ask(server.url, waits)
        assert raised.value.where == server.url
    assert waits == [] and len(server.asked) == 1


@pytest.mark.parametrize(
    "said, waited",
    [("7", 7.0), (" 3 ", 3.0), ("0", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5), ("-1", 0.5)],
)
def test_the_server_says_how_long_to_wait(said: str, waited: float) -> None:
    waits: list[float] = []
    with ChatServer(Reply("slow down", 429, {"Retry-After": said}), Reply("1")).running() as server:
        assert ask(server.url, waits) == 1
    assert waits == [waited]


def test_an_answer_without_use_is_asked_for_again() -> None:
    def needed(answer: Any) -> Any:
        if "answer" not in answer:
            raise UselessAnswer(f"no answer in {answer}")
        return answer["answer"]

    with ChatServer(Reply("{}"), Reply("<html>"), Reply('{"answer": 1}')).running() as server:
        assert ask(server.url, read=needed) == 1
    with ChatServer(Reply("{}")).running() as server, pytest.raises(GyroError) as raised:
        ask(server.url, read=needed, attempts=2)
    assert "the oracle failed 2 times in a row: no answer in {}" in str(raised.value)
    assert raised.value.fix == "wake it" and raised.value.exit_code == 1
    with ChatServer(Reply("<html>")).running() as server, pytest.raises(GyroError, match="not JSON: <html>"):
        ask(server.url, attempts=1)


def test_a_mistake_that_read_finds_is_not_asked_again() -> None:
    def refused(answer: Any) -> Any:
        raise BadInput("not what we speak")

    with ChatServer(Reply("{}")).running() as server, pytest.raises(BadInput, match="not what we speak"):
        ask(server.url, read=refused)
    assert len(server.asked) == 1


def test_a_long_complaint_is_shortened() -> None:
    with ChatServer(Reply("x" * 5000, 400)).running() as server, pytest.raises(BadInput) as raised:
        ask(server.url)
    assert "x" * 199 + "…" in str(raised.value) and "x" * 200 not in str(raised.value)


def test_a_connection_cut_in_the_middle_of_an_answer_is_asked_again() -> None:
    """A server that promises 100 bytes, sends 2 and hangs up; the second time it says it all."""
    replies = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    ]

    def serve(listening: socket.socket) -> None:
        for reply in replies:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        waits: list[float] = []
        assert ask(f"http://127.0.0.1:{listening.getsockname()[1]}", waits) == []
        thread.join()
    assert waits == [0.5]


def test_a_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(Reply("[]"), Reply("no", 403)).running() as server:
        with pytest.raises(BadInput, match="ORACLE_KEY is not set; it holds the key of the oracle"):
            ask(server.url, api_key_env="ORACLE_KEY")
        assert server.asked == []
        monkeypatch.setenv("ORACLE_KEY", "secret")
        assert ask(server.url, api_key_env="ORACLE_KEY") == []
        assert server.keys == ["Bearer secret"]
        with pytest.raises(BadInput) as raised:
            ask(server.url, api_key_env="ORACLE_KEY")
    assert "secret" not in str(raised.value)
