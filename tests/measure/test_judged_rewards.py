"""Judges: a reward model given as a callable, and a language model behind a small local server."""

from __future__ import annotations

import math
import socket

import pytest

from chat_server import ChatServer, Reply, completion
from gyrocompass.core.errors import BadInput, ConfigError, GyroError
from gyrocompass.measure.reward import Sample, checked
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.rewards.registry import Tools


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge(asked: ChatServer, waits: list[float] | None = None, /, **entry: object):
    settings = {"url": asked.url, "model": "judge-1", **entry.pop("server", {})}
    tools = Tools(sleep=(waits if waits is not None else []).append)
    entry = {"judge": {"workers": 1, **entry, "server": settings}}
    return parse_rewards([entry], tools).parts[0].reward


def test_a_judge_is_asked_and_its_last_score_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k-1")
    with ChatServer(
        completion("It says score: 10.\nScore: 7.5"), completion("**Score:** 2")
    ).running() as server:
        reward = judge(server, server={"api_key_env": "JUDGE_KEY", "max_tokens": 9})
        samples = [Sample("2 + 2?", "4 {prompt}"), Sample("3 + 3?", "5")]
        assert checked(reward, samples) == [7.5, 2.0] and (reward.low, reward.high) == (0.0, 10.0)
    asked = server.asked[0]
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "judge-1"
    assert (asked["temperature"], asked["max_tokens"]) == (0.0, 9) and server.keys == ["Bearer k-1"] * 2
    (message,) = asked["messages"]
    assert "2 + 2?" in message["content"] and "4 {prompt}" in message["content"]
    assert "from 0 (useless) to 10 (perfect)" in message["content"]


def test_the_mark_is_new_for_each_request() -> None:
    with ChatServer(completion("Score: 1")).running() as server:
        judge(server, instructions="{mark}{completion}")([Sample("", "x"), Sample("", "x")])
    marks = {asked["messages"][0]["content"] for asked in server.asked}
    assert len(marks) == 2


def test_fields_of_the_record_can_be_shown() -> None:
    with ChatServer(completion("Score: 1")).running() as server:
        judge(server, instructions="{answer}|{completion}|{unknown}")([Sample("", "x", {"answer": 4})])
    assert server.asked[0]["messages"][0]["content"] == "4|x|{unknown}"


def test_passing_failures_are_tried_again_with_longer_waits() -> None:
    waits: list[float] = []
    replies = [
        Reply("busy", 503),
        Reply("slow down", 429, {"Retry-After": "7"}),
        Reply("not json"),
        Reply("{}"),
    ]
    with ChatServer(*replies, completion("Score: 3")).running() as server:
        assert judge(server, waits)([Sample("p", "c")]) == [3.0]
    assert waits == [1.0, 7.0, 4.0, 8.0]


def test_a_server_that_keeps_failing_is_named() -> None:
    with ChatServer(Reply("broken", 500)).running() as server:
        with pytest.raises(GyroError, match="failed 3 times in a row: status 500: broken") as raised:
            judge(server, server={"retries": 2})([Sample("p", "c")])
        assert server.url in str(raised.value) and len(server.asked) == 3


def test_a_refusal_is_not_tried_again() -> None:
    with ChatServer(Reply("no such model", 404)).running() as server:
        with pytest.raises(GyroError, match="refuses: status 404: no such model"):
            judge(server)([Sample("p", "c")])
        assert len(server.asked) == 1


def test_no_server_at_all_is_tried_again_and_then_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server, waits = ChatServer(), []
    server.url = f"http://127.0.0.1:{port}"
    with pytest.raises(GyroError, match="failed 2 times"):
        judge(server, waits, server={"retries": 1})([Sample("p", "c")])
    assert waits == [1.0]


def test_an_answer_that_does_not_come_is_a_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = ChatServer()
        server.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(GyroError, match="timed out"):
            judge(server, server={"retries": 0, "timeout_s": 0.1})([Sample("p", "c")])


def test_an_answer_without_a_score_is_asked_for_again_and_then_shown() -> None:
    with ChatServer(completion("Hm."), completion("Score: 99"), completion("Score: 4")).running() as server:
        assert judge(server)([Sample("p", "c")]) == [4.0]
    with (
        ChatServer(completion("I would rather not.")).running() as server,
        pytest.raises(
            GyroError, match=r"no score from 0 to 10 in 3 answers; the last: 'I would rather not\.'"
        ),
    ):
        judge(server)([Sample("p", "c")])


def test_mistakes_in_an_entry() -> None:
    server = ChatServer()
    server.url = "http://127.0.0.1:9"
    with pytest.raises(ConfigError, match="completion"):
        judge(server, instructions="Judge!")
    with pytest.raises(ConfigError, match="range of judge is empty"):
        judge(server, low=3, high=3)
    with pytest.raises(BadInput, match="NO_SUCH_KEY is not set"):
        judge(server, server={"api_key_env": "NO_SUCH_KEY"})([Sample("p", "c")])


def test_a_reward_model_scores_prompt_and_completion() -> None:
    tools = Tools(scorers={"helpful": lambda samples: [len(s.prompt + s.completion) - 3.0 for s in samples]})
    entry = {"reward_model": {"model": "helpful", "low": -1.0, "high": 1.0}}
    reward = parse_rewards([entry], tools).parts[0].reward
    assert checked(reward, [Sample("ab", "c"), Sample("a", "b")]) == [0.0, -1.0]
    with pytest.raises(
        GyroError, match=r"reward_model is 6\.0 for sample 0, outside its range \[-1\.0, 1\.0\]"
    ):
        checked(reward, [Sample("abcd", "efghi")])
    entry["reward_model"]["clip"] = True
    assert parse_rewards([entry], tools)([Sample("abcd", "efghi")]) == [1.0]
    entry["reward_model"]["model"] = "helpfull"
    with pytest.raises(ConfigError, match="did you mean helpful"):
        parse_rewards([entry], tools)([Sample("a", "b")])


def test_clipping_lets_no_nan_through() -> None:
    tools = Tools(scorers={"broken": lambda samples: [math.nan for _ in samples]})
    entry = {"reward_model": {"model": "broken", "low": 0.0, "high": 1.0, "clip": True}}
    with pytest.raises(GyroError, match="is nan for sample 0"):
        parse_rewards([entry], tools)([Sample("a", "b")])
