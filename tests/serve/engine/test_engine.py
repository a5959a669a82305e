"""Whoever shares the engine, a request gets what it gets alone.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inbox import Inbox, ask, scored

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.model.decoding import Decoding
from gyrocompass.model.generate import generate
from gyrocompass.serve.engine.engine import EmbeddedEngine
from gyrocompass.serve.engine.kinds import Busy, EngineSettings, Request, ScoreRequest
from tiny_models import ARCHITECTURES, VOCABULARY, tiny


class Letters:
    """A tokenizer of letters, for models without one."""

    eos_token_id, chat_template = 0, None

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + token % 26) for token in ids if token or not skip_special_tokens)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return tiny("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def small(llama: torch.nn.Module) -> Iterator[EmbeddedEngine]:
    """With so little room that requests wait, prompts are cut up and prefixes forgotten."""
    limits = EngineSettings(most_rows=3, memory_tokens=150, prefix_tokens=64, chunk_tokens=8)
    engine = EmbeddedEngine(llama, Letters(), limits)
    yield engine
    engine.close()


def alone(model: torch.nn.Module, request: Request) -> list[tuple[int, float]]:
    """The likeliest token each time, from full logits without a cache."""
    ids, found = list(request.ids), list[tuple[int, float]]()
    for _ in range(min(request.max_tokens or 99, 64 - len(ids))):
        with torch.no_grad():
            logprob_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
        token = int(logprob_V.argmax())
        found.append((token, float(logprob_V[token])))
        ids.append(token)
        if token == 0:
            break
    return found


PROMPTS = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=50)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_company_changes_nothing(llama: Any, small: EmbeddedEngine, data: Any) -> None:
    common = data.draw(st.lists(st.integers(1, VOCABULARY - 1), max_size=40))
    requests, inboxes = [], []
    for _ in range(data.draw(st.integers(1, 7))):
        ids = (common if data.draw(st.booleans()) else []) + data.draw(PROMPTS)
        requests.append(Request(ids[:60], max_tokens=data.draw(st.integers(1, 12)), alternatives=2))
        inboxes.append(ask(small, requests[-1]))
        if data.draw(st.booleans()):
            time.sleep(0.002)
    for request, inbox in zip(requests, inboxes, strict=True):
        expected = alone(llama, request)
        told = inbox.wait().tokens
        assert [token.id for token in told] == [token for token, _ in expected]
        np.testing.assert_allclose([t.logprob for t in told], [p for _, p in expected], atol=1e-9)
        assert all(token.alternatives[0] == (token.id, token.logprob) for token in told)
        assert inbox.steps[-1].finish == ("stop" if told[-1].id == 0 else "length")


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PROMPTS, min_size=1, max_size=5))
def test_prompts_are_scored_as_the_trainer_does(llama: Any, small: EmbeddedEngine, prompts: Any) -> None:
    company = ask(small, Request([1, 2, 3], max_tokens=30))
    for ids, told in zip(prompts, scored(small, [ScoreRequest(ids) for ids in prompts]), strict=True):
        with torch.no_grad():
            logprob_LV = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(logprob_LV[place, token]) for place, token in enumerate(ids[1:])]
        np.testing.assert_allclose([one.logprob for one in told], expected, atol=1e-9)
        assert [one.id for one in told] == ids[1:]
    company.wait()


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"mistral", "qwen2", "gemma2", "gemma3_text"}))
def test_every_architecture(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    engine = EmbeddedEngine(model, Letters(), EngineSettings(chunk_tokens=8))
    try:
        requests = [Request(list(range(1, 1 + n)), max_tokens=6) for n in (3, 20, 33, 40)]
        for request, inbox in [(request, ask(engine, request)) for request in requests]:
            found = [(token.id, token.logprob) for token in inbox.wait().tokens]
            expected = alone(model, request)
            assert [token for token, _ in found] == [token for token, _ in expected]
            np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], atol=1e-9)
    finally:
        engine.close()


def test_draws_depend_on_the_seed_alone(small: EmbeddedEngine) -> None:
    warm = Decoding(temperature=1.3, top_p=0.95, presence_penalty=0.3)
    request = Request([5, 6, 7], warm, max_tokens=20, seed=11)
    first = ask(small, request).wait()
    others = [ask(small, request._replace(seed=seed, ids=[seed + 1])) for seed in range(5)]
    again = ask(small, request).wait()
    assert [token.id for token in again.tokens] == [token.id for token in first.tokens]
    different = ask(small, request._replace(seed=12)).wait()
    assert [token.id for token in different.tokens] != [token.id for token in first.tokens]
    for other in others:
        other.wait()


def test_a_draw_is_from_the_distribution(llama: Any) -> None:
    """Chi-squared over one token, drawn 1000 times in company."""
    engine = EmbeddedEngine(llama, Letters(), EngineSettings(most_waiting=3000))
    try:
        warm = Decoding(temperature=2.0)
        inboxes = [ask(engine, Request([3, 4], warm, max_tokens=1, seed=seed)) for seed in range(1000)]
        drawn = [inbox.wait().tokens[0].id for inbox in inboxes]
    finally:
        engine.close()
    with torch.no_grad():
        p_V = (llama(torch.tensor([[3, 4]])).logits[0, -1] / 2).softmax(0).numpy()
    count_V = np.bincount(drawn, minlength=VOCABULARY)
    often = p_V * 1000 >= 5
    squared = ((count_V - 1000 * p_V)[often] ** 2 / (1000 * p_V)[often]).sum()
    assert squared < often.sum() + 5 * np.sqrt(2 * often.sum())


def test_who_leaves_makes_room(llama: Any) -> None:
    engine = EmbeddedEngine(llama, Letters(), EngineSettings(most_rows=1))
    try:
        stays = Inbox()
        cancels = [engine.submit(Request([place + 1], max_tokens=60), Inbox()) for place in range(5)]
        engine.submit(Request([9], max_tokens=3), stays)
        for cancel in cancels:
            cancel()
        assert stays.wait().text
        until = time.monotonic() + 10
        while any(engine.figures()[name] for name in ("waiting", "reading", "running")):
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        engine.close()


def test_a_beginning_that_was_read_is_not_read_again(llama: Any) -> None:
    engine = EmbeddedEngine(llama, Letters())
    try:
        for _ in range(2):
            ask(engine, Request(list(range(1, 46)), max_tokens=2)).wait()
        assert engine.figures()["prefix_hit_share"] == pytest.approx(32 / 90)
    finally:
        engine.close()


def test_time_is_up(llama: Any) -> None:
    engine = EmbeddedEngine(llama, Letters())
    try:
        inbox = ask(engine, Request([1], max_tokens=60, stop_at=time.time() - 1)).wait()
        assert (inbox.text, inbox.steps[-1].finish) == ("", "cut")
    finally:
        engine.close()


def test_what_cannot_be_done_is_refused_alone(small: EmbeddedEngine) -> None:
    good = ask(small, Request([1, 2], max_tokens=5))
    for wrong, message in (
        (Request([]), "without a token"),
        (Request([VOCABULARY]), f"no token {VOCABULARY}; the vocabulary has {VOCABULARY}"),
        (Request([1] * 64), "leaves no room in the context of 64"),
        (Request([1], Decoding(beams=2)), "beams"),
    ):
        with pytest.raises(BadInput, match=message):
            small.submit(wrong, Inbox())
    with pytest.raises(BadInput, match="longer than the context"):
        small.score([ScoreRequest([1] * 65)], lambda what: None)
    assert good.wait().text


def test_a_full_queue_says_when_to_come_again(llama: Any) -> None:
    engine = EmbeddedEngine(llama, Letters(), EngineSettings(most_rows=1, most_waiting=2))
    try:
        with pytest.raises(Busy) as raised:
            for place in range(30):
                engine.submit(Request([place + 1], max_tokens=60), Inbox())
        assert 1 <= raised.value.retry_after_s <= 60
    finally:
        engine.close()


def test_weights_that_say_nan_fail_their_request() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan
    engine = EmbeddedEngine(model, Letters())
    try:
        with pytest.raises(GyroError, match="the model says nan"):
            ask(engine, Request([1])).wait()
    finally:
        engine.close()


def test_an_engine_that_is_closed_answers_everybody(llama: Any) -> None:
    engine = EmbeddedEngine(llama, Letters(), EngineSettings(most_rows=1))
    inboxes = [ask(engine, Request([place + 1], max_tokens=60)) for place in range(5)]
    engine.close()
    for inbox in inboxes:
        assert inbox.ended.wait(10)
    with pytest.raises(GyroError, match="stopping"):
        engine.submit(Request([1]), Inbox())


@pytest.fixture(scope="module")
def speaks(speaking: tuple[Any, Any]) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(*speaking)
    yield engine
    engine.close()


def test_it_writes_what_generate_writes(speaking: tuple[Any, Any], speaks: EmbeddedEngine) -> None:
    model, tokenizer = speaking
    for decoding in (Decoding(), Decoding(repetition_penalty=1.4), Decoding(frequency_penalty=0.7)):
        prompts = ["def add(", "import os", "x = 'é"]
        texts = generate(model, tokenizer, prompts, max_new_tokens=12, decoding=decoding, alternatives=2)
        for prompt, expected in zip(prompts, texts, strict=True):
            ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
            found = ask(speaks, Request(ids, decoding, max_tokens=12, alternatives=2)).wait()
            assert (found.text, [t.id for t in found.tokens]) == (expected.text, expected.token_ids)
            np.testing.assert_allclose([t.logprob for t in found.tokens], expected.logprobs, atol=1e-4)
            np.testing.assert_allclose([t.entropy for t in found.tokens], expected.entropies, atol=1e-4)


def test_constraints_hold(speaks: EmbeddedEngine, speaking: tuple[Any, Any]) -> None:
    bos = speaking[1].bos_token_id
    choices = Decoding(choices=("yes", "no"))
    warm = choices.model_copy(update={"temperature": 1.0})
    for inbox in [ask(speaks, Request([bos], warm, max_tokens=10, seed=seed)) for seed in range(6)]:
        assert inbox.wait().text in ("yes", "no")
    biased = Request([bos], logit_bias={17: 100.0}, max_tokens=3)
    assert [token.id for token in ask(speaks, biased).wait().tokens] == [17] * 3
