"""A server, judged by the code that judges a model: the same numbers over HTTP (law 3)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parrot import alone

from chat_server import ChatServer, Reply
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.measure.generate import Writing
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.measure.score import ScoredText, tally
from gyrocompass.measure.served import Server, served_continuations, served_generate, served_score
from gyrocompass.measure.tasks.run import ask
from gyrocompass.measure.tasks.task import read_items, read_tasks
from gyrocompass.model.score import scorer
from gyrocompass.model.write import continuation_scorer, writer
from gyrocompass.serve.app import make_app
from gyrocompass.serve.embedded import Embedded
from gyrocompass.serve.engine.engine import EmbeddedEngine
from gyrocompass.serve.services import ServeSettings

TEXTS = ["def add(first, second):\n    return first", "naïve — ünïcode", "x", "total = first + second\n" * 5]


@pytest.fixture
def server(served: Callable[[Any], str], speaking: tuple[Any, Any]) -> Server:
    backend = Embedded(EmbeddedEngine(*speaking), speaking[1], "tiny")
    return Server(url=served(make_app(alone(backend), ServeSettings())))


def test_texts_are_worth_the_same(server: Server, speaking: tuple[Any, Any]) -> None:
    told, own = list(served_score(server)(TEXTS)), list(scorer(*speaking, length=128)(TEXTS))
    for one, other, text in zip(told, own, TEXTS, strict=True):
        np.testing.assert_array_equal(one.id_N, other.id_N)
        np.testing.assert_allclose(one.logprob_N, other.logprob_N, atol=1e-4)
        np.testing.assert_array_equal(one.rank_N == 0, other.rank_N == 0)
        assert one.byte_N.sum() == other.byte_N.sum() == len(text.encode())
        assert np.isnan(one.entropy_N).all()
    texts = [ScoredText(str(place), "all", "test", text) for place, text in enumerate(TEXTS)]
    (by_server,), (by_model,) = (
        [row for row in slice_scores(tally(score, texts)) if row.slice == "total"]
        for score in (served_score(server), scorer(*speaking, length=128))
    )
    assert by_server.bits_per_byte == pytest.approx(by_model.bits_per_byte, abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_continuations_are_worth_the_same(server: Server, speaking: tuple[Any, Any], chat: bool) -> None:
    pairs = [("def add(first, second):", " return first"), ("naïve — ", "ünïcode"), ("x", ""), ("x ", "= 1")]
    told = list(served_continuations(server)(pairs, chat=chat))
    own = list(continuation_scorer(*speaking, length=128)(pairs, chat=chat))
    for one, other in zip(told, own, strict=True):
        np.testing.assert_array_equal(one.id_N, other.id_N)
        np.testing.assert_allclose(one.logprob_N, other.logprob_N, atol=1e-4)


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_written_is_the_same(server: Server, speaking: tuple[Any, Any], chat: bool) -> None:
    prompts, writing = ["def add_1(", "total = first"], Writing(max_new_tokens=9, chat=chat)
    told, own = served_generate(server)(prompts, writing), writer(*speaking)(prompts, writing)
    for (one,), (other,) in zip(told, own, strict=True):
        assert (one.text, one.finished) == (other.text, other.finished)
        count = len(one.logprob_N)  # the token that ended it is told by the model alone
        assert len(other.logprob_N) - 1 <= count <= len(other.logprob_N)
        np.testing.assert_allclose(one.logprob_N, other.logprob_N[:count], atol=1e-4)
    (three,) = served_generate(server)(["def"], Writing(max_new_tokens=4, samples=3, temperature=1.0))
    assert len(three) == 3


def test_a_task_has_the_same_figures(server: Server, speaking: tuple[Any, Any], tmp_path: Path) -> None:
    records = [
        {"question": f"add_{n} returns", "choices": [" total", " first"], "answer": n % 2} for n in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tasks.yaml").write_text(
        'tasks: [{kind: choice, name: sums, data: data.jsonl, prompt: "{question}"}]'
    )
    (task,) = read_tasks(tmp_path / "tasks.yaml")
    items = read_items(task)
    by_server = ask(task, items, served_continuations(server), served_generate(server))
    by_model = ask(task, items, continuation_scorer(*speaking, length=128), writer(*speaking))
    for one, other in zip(by_server.outcomes, by_model.outcomes, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
    assert [one.value for one in by_server.figures] == pytest.approx([one.value for one in by_model.figures])


def test_gyro_eval_asks_a_server(server: Server, gyro: Any, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("def take(first, second):\n    return second\n" * 3)
    code, out, _ = gyro(
        "eval", str(server.url), "--data", tmp_path / "new.txt", "--store", tmp_path / "store"
    )
    assert code == 0, out
    (told,) = (tmp_path / "store").glob("artifacts/*/evaluation.json")
    (row,) = [row for row in json.loads(told.read_text())["likelihood"] if row["slice"] == "total"]
    assert 0 < row["nats_per_token"] < 20


def test_a_server_that_cannot_is_told() -> None:
    with ChatServer(Reply('{"detail": "Not Found"}', 404)).running() as other:
        server = Server(url=other.url, model="m", attempts=1)
        with pytest.raises(BadInput, match="the server refuses: status 404"):
            list(served_continuations(server)([("a", " b")]))
    silent = Reply(
        json.dumps({"choices": [{"index": 0, "text": "x", "logprobs": None}], "tokens": [1, 2, 3]})
    )
    with ChatServer(silent).running() as other:
        server = Server(url=other.url, model="m", attempts=1)
        with pytest.raises(GyroError, match="no log-probability for each token"):
            list(served_score(server)(["text"]))
