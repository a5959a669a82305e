"""The engine by URL, against small servers on the loopback that answer, refuse, fail and recover."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.served import Server as Upstream
from gyrocompass.model.sampler import Sampled, Sampling
from gyrocompass.model.upstream import sample_upstream
from gyrocompass.train.answers import Prompt
from gyrocompass.train.rollout import RolloutConfig, RolloutSource

SAMPLING = Sampling(max_new_tokens=5, end_ids=(0,))


CUT_SHORT: dict[str, Any] = {"choices": []}
"""An answer of which the end never comes."""


class Server(ThreadingHTTPServer):
    """Gives the answers it is told to, one status and body after the other; the last one for good."""

    def __init__(self, answers: list[tuple[int, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = answers, []  # type: list[tuple[int, Any]], list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        number = min(len(self.server.asked), len(self.server.answers)) - 1
        status, body = self.server.answers[number]
        data = json.dumps(body(asked) if callable(body) else body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + (100 if body is CUT_SHORT else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def serving(*answers: tuple[int, Any]) -> Iterator[tuple[Server, Upstream]]:
    with Server(list(answers)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            yield server, Upstream(url=url, model="tiny", attempts=3, timeout_s=5)
        finally:
            server.shutdown()
            thread.join()


def counting(asked: dict[str, Any]) -> dict[str, Any]:
    """Goes on with the last id of the prompt, and ends."""
    ids = [asked["prompt"][-1] + 1, 0]
    return {
        "choices": [{"logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-0.5, -0.25]}}]
    }


def sampled(config: Upstream, pauses: list[float] | None = None) -> list[Sampled]:
    waits: list[float] = [] if pauses is None else pauses
    return sample_upstream(config, [[1, 2], [3]], [7, 8], SAMPLING, sleep=waits.append)


def test_ids_go_in_and_come_out() -> None:
    with serving((200, counting)) as (server, config):
        found = sampled(config)
    assert found == [Sampled([3, 0], [-0.5, -0.25], True), Sampled([4, 0], [-0.5, -0.25], True)]
    asked = sorted(server.asked, key=lambda request: request["seed"])
    assert [request["prompt"] for request in asked] == [[1, 2], [3]]
    assert asked[0]["max_tokens"] == 5 and asked[0]["return_tokens_as_token_ids"] is True
    assert (asked[0]["top_p"], asked[0]["top_k"], asked[0]["repetition_penalty"]) == (1.0, -1, 1.0)


@pytest.mark.parametrize(
    "metadata, step",
    [
        ({"weight_version": "120"}, 120),
        ({"weight_version": "step-00000120"}, 120),
        ({"weight_version": 7}, 7),
        ({"weight_version": "default"}, None),
        ({"weight_version": None}, None),
        ({}, None),
        (None, None),
        ("v2", None),
    ],
)
def test_the_weights_are_those_that_the_server_names(metadata: Any, step: int | None) -> None:
    with serving((200, lambda asked: counting(asked) | {"metadata": metadata})) as (_, config):
        assert [one.weights_step for one in sampled(config)] == [step, step]


def test_what_passes_is_tried_again() -> None:
    pauses: list[float] = []
    with serving((503, {}), (429, {}), (200, counting)) as (_, config):
        config = config.model_copy(update={"parallel_requests": 1})
        assert len(sampled(config, pauses)) == 2
    assert len(pauses) == 2 and pauses[0] < pauses[1]


def test_what_does_not_pass_is_said() -> None:
    with serving((500, {"error": "no memory"})) as (_, config), pytest.raises(GyroError) as raised:
        sampled(config)
    assert (
        "the engine failed 3 times in a row: status 500" in str(raised.value) and raised.value.exit_code == 1
    )


def test_an_engine_that_dies_in_the_middle_of_an_answer_is_asked_again() -> None:
    with serving((200, CUT_SHORT), (200, counting)) as (_, config):
        config = config.model_copy(update={"parallel_requests": 1})
        assert len(sampled(config)) == 2


def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving((200, counting)) as (_, config):
        config = config.model_copy(update={"api_key_env": "ENGINE_KEY"})
        with pytest.raises(BadInput, match="the environment variable ENGINE_KEY is not set"):
            sampled(config)
        monkeypatch.setenv("ENGINE_KEY", "secret")
        assert len(sampled(config)) == 2


def test_nobody_there() -> None:
    with serving((200, counting)) as (_, config):
        pass
    with pytest.raises(GyroError, match="failed 3 times"):
        sampled(config)


@pytest.mark.parametrize(
    "status, body, message",
    [
        (400, {"error": "unknown model"}, "the engine refuses: status 400"),
        (200, {"choices": [{"text": "hello", "logprobs": None}]}, "does not answer with token ids"),
        (
            200,
            {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}]},
            "does not answer with token ids",
        ),
        (200, {"choices": [{"logprobs": {"tokens": [], "token_logprobs": []}}]}, "no token at all"),
    ],
)
def test_other_answers_are_bad_input(status: int, body: Any, message: str) -> None:
    with serving((status, body)) as (_, config), pytest.raises(BadInput, match=message):
        sampled(config)


def test_windows_are_written_ahead_while_the_learner_computes() -> None:
    """Over HTTP: the server holds back the second window until the learner has the first."""
    learns, lock, seen = threading.Event(), threading.Lock(), [0]

    def held_back(asked: dict[str, Any]) -> dict[str, Any]:
        with lock:
            seen[0] += 1
            first_window = seen[0] <= 4
        assert first_window or learns.wait(60), "the learner waits for a window that it does not need"
        return counting(asked)

    def windows(ahead: int, answer: Any) -> list[list[int]]:
        with serving((200, answer)) as (_, config):
            config = config.model_copy(update={"timeout_s": 60.0})
            prompts = [Prompt(str(n), "s", "made", "", (n + 1, 9 + n), {}) for n in range(3)]
            source = RolloutSource(
                prompts,
                lambda ids, seeds: sample_upstream(config, ids, seeds, SAMPLING),
                str,
                parse_rewards(["distinct"]),
                RolloutConfig(prompts_per_step=2, samples_per_prompt=2, max_new_tokens=5, ahead_steps=ahead),
                length=16,
                served=True,
            )
            first = source.next(0)
            learns.set()
            return [window.data.id_N.tolist() for window in (first, source.next(1), source.next(2))]

    assert windows(1, held_back) == windows(0, counting)
