"""ctranslate2 behind the same interface: the same texts, log-probabilities to three decimals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inbox import Inbox, ask, scored
from parrot import alone

from gyrocompass.core.errors import BadInput, GyroError, MissingDependency
from gyrocompass.data.encode import prompt_ids
from gyrocompass.model.decoding import Decoding
from gyrocompass.model.generate import generate
from gyrocompass.serve.app import make_app
from gyrocompass.serve.embedded import Embedded
from gyrocompass.serve.engine import converted
from gyrocompass.serve.engine.converted import open_converted
from gyrocompass.serve.engine.ct2 import CTranslate2Engine
from gyrocompass.serve.engine.kinds import Busy, EngineSettings, Request, ScoreRequest
from gyrocompass.serve.services import ServeSettings

PROMPTS = ("def add(a, b):", "x", "import os\nimport sys\n\nprint(" * 3, "class A:")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def backend(model_folder: Path, kept: Path) -> Iterator[Embedded]:
    opened = open_converted(model_folder, "tiny", kept=kept)
    yield opened
    opened._engine.close()


@pytest.fixture
def engine(backend: Embedded) -> CTranslate2Engine:
    assert isinstance(backend._engine, CTranslate2Engine)
    return backend._engine


def test_it_writes_what_the_model_writes(engine: CTranslate2Engine, speaking: tuple[Any, Any]) -> None:
    """All at once, prompts of all lengths, answers of all lengths: each gets what it gets alone."""
    tokenizer = speaking[1]
    rooms = (9, 3, 12, 1)
    boxes = [
        ask(engine, Request(prompt_ids(tokenizer, prompt), max_tokens=room, alternatives=3))
        for prompt, room in zip(PROMPTS, rooms, strict=True)
    ]
    for prompt, room, box in zip(PROMPTS, rooms, boxes, strict=True):
        (expected,) = generate(*speaking, [prompt], max_new_tokens=room, alternatives=3)
        assert box.wait().text == expected.text and box.steps[-1].finish == expected.finish
        np.testing.assert_allclose([one.logprob for one in box.tokens], expected.logprobs, atol=1e-3)
        for one, told in zip(box.tokens, expected.alternatives, strict=True):
            np.testing.assert_allclose(
                [value for _, value in one.alternatives], [value for _, value in told], atol=1e-3
            )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_company_changes_nothing(
    engine: CTranslate2Engine, speaking: tuple[Any, Any], data: st.DataObject
) -> None:
    """Batches of many lengths, ties and ends: each token is told with its own row."""
    token = st.integers(3, 250)
    prompts = data.draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=24))
    rooms = data.draw(st.lists(st.integers(1, 6), min_size=len(prompts), max_size=len(prompts)))
    both = list(zip(prompts, rooms, strict=True))
    boxes = [ask(engine, Request(ids, max_tokens=room)) for ids, room in both]
    for (ids, room), box in zip(both, boxes, strict=True):
        told = box.wait().tokens
        assert len(told) <= room
        with torch.no_grad():
            whole = torch.tensor([[*ids, *(one.id for one in told)]])
            logprob_LV = speaking[0](whole).logits[0].log_softmax(1)[len(ids) - 1 : -1]
        for k, one in enumerate(told):
            assert one.logprob == pytest.approx(float(logprob_LV[k, one.id]), abs=1e-3)
            assert one.logprob >= float(logprob_LV[k].max()) - 1e-3  # the likeliest


def test_what_is_told_of_a_draw_is_the_untouched_distribution(
    engine: CTranslate2Engine, speaking: tuple[Any, Any]
) -> None:
    model, tokenizer = speaking
    ids = prompt_ids(tokenizer, "def ")
    drawn = Decoding(temperature=0.7, top_p=0.8, top_k=20)
    texts = set()
    for _ in range(4):
        box = ask(engine, Request(ids, drawn, max_tokens=8)).wait()
        texts.add(box.text)
        whole = [*ids, *(one.id for one in box.tokens)]
        with torch.no_grad():
            logprob_LV = model(torch.tensor([whole])).logits[0].log_softmax(1)[len(ids) - 1 : -1]
        entropy_L = torch.special.entr(logprob_LV.exp()).sum(1)
        for k, one in enumerate(box.tokens):
            assert one.logprob == pytest.approx(float(logprob_LV[k, one.id]), abs=1e-3)
            assert one.entropy == pytest.approx(float(entropy_L[k]), abs=1e-3)
    assert len(texts) > 1


def test_prompts_are_scored(engine: CTranslate2Engine, speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    ids = prompt_ids(tokenizer, PROMPTS[2])
    whole, end = scored(engine, [ScoreRequest(ids, 1, 2), ScoreRequest(ids, len(ids) - 2)])
    with torch.no_grad():
        logprob_LV = model(torch.tensor([ids])).logits[0].log_softmax(1)[:-1]
    want = logprob_LV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose([one.logprob for one in whole], want, atol=1e-3)
    np.testing.assert_allclose([one.logprob for one in end], want[-2:], atol=1e-3)
    top = logprob_LV.topk(2)
    np.testing.assert_allclose([[v for _, v in one.alternatives] for one in whole], top.values, atol=1e-3)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1], Decoding(repetition_penalty=2.0)), "has no repetition_penalty"),
        (Request([1], Decoding(regex="a+")), "has no regex"),
        (Request([1], Decoding(temperature=1.0, min_p=0.5)), "has no min_p"),
        (Request([1], logit_bias={1: 2.0}), "has no logit_bias"),
        (Request([1], Decoding(temperature=1.0), seed=3), "has no seed"),
        (Request([]), "without a token"),
        (Request([10**6]), "there is no token"),
        (Request([1] * 10**4), "leaves no room"),
    ],
)
def test_what_it_cannot_do_is_refused(engine: CTranslate2Engine, request_: Request, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        engine.submit(request_, Inbox())


def test_clients_leave_and_time_runs_out(engine: CTranslate2Engine) -> None:
    gone = Inbox()
    cancel = engine.submit(Request([5, 6], max_tokens=40), gone)
    cancel()
    late = ask(engine, Request([5, 6], max_tokens=40, stop_at=time.time() - 1)).wait()
    assert late.steps[-1].finish == "cut"
    nothing = ask(engine, Request([5, 6], max_tokens=0)).wait()
    assert nothing.steps[-1].finish == "length" and not nothing.tokens
    assert len(ask(engine, Request([7], max_tokens=4)).wait().tokens) <= 4
    assert len(gone.tokens) < 40
    figures = engine.figures()
    assert figures["waiting"] == 0 and figures["tokens_per_second"] > 0


def test_a_full_queue_and_a_closed_engine(model_folder: Path, kept: Path) -> None:
    few = EngineSettings(most_waiting=1, most_rows=1)
    engine = open_converted(model_folder, "tiny", kept=kept, settings=few)._engine
    with pytest.raises(Busy):
        for _ in range(50):
            engine.submit(Request([5, 6], max_tokens=60), Inbox())
    engine.close()
    with pytest.raises(GyroError, match="is stopping"):
        engine.submit(Request([5]), Inbox())


def test_it_is_converted_once_and_says_what_it_is(
    model_folder: Path, kept: Path, backend: Embedded, served: Callable[[Any], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(converted, "save_model", lambda *_: pytest.fail("converted again"))
    rough = open_converted(model_folder, "tiny", kept=kept, weights="int8")
    assert backend.name == "ctranslate2 float32" and rough.name == "ctranslate2 int8, approximate"
    url = served(make_app(alone(rough), ServeSettings()))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    (listed,) = client.models.list().data
    assert listed.model_dump()["engine"] == "ctranslate2 int8, approximate"
    asked: Any = {"model": "tiny", "prompt": "def ", "max_tokens": 6, "temperature": 0.5}
    whole = client.completions.create(**asked, logprobs=2).choices[0]
    assert whole.logprobs is not None and all(value <= 0 for value in whole.logprobs.token_logprobs or ())
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    with pytest.raises(openai.BadRequestError, match="the engine ctranslate2 has no seed"):
        client.completions.create(**asked, seed=1)


def test_another_model_is_not_taken_for_this_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = converted.save_model

    def other(model: Any, folder: Path, tokenizer: Any) -> None:
        with torch.no_grad():
            model.get_input_embeddings().weight[:] *= 1.5
        saved(model, folder, tokenizer)
        with torch.no_grad():
            model.get_input_embeddings().weight[:] /= 1.5

    monkeypatch.setattr(converted, "save_model", other)
    with pytest.raises(BadInput, match=r"computes another model: its log-probabilities are off by"):
        open_converted(model_folder, "tiny", kept=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("ctranslate2-")]


def test_the_extra_is_named(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(MissingDependency, match="ctranslate2"):
        open_converted(model_folder, "tiny", kept=tmp_path)
