"""The openai package against our routes: what its users do, unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
from parrot import Parrot, alone, token

from gyrocompass.serve.answer import Answered, Asked, Confidence, Judgement
from gyrocompass.serve.app import make_app
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.services import ServeSettings, Services

Serve = Callable[[Any], str]


def client_of(served: Serve, services: Services, **more: Any) -> openai.OpenAI:
    url = served(make_app(services, ServeSettings()))
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", **{"max_retries": 0, **more})


def test_chats(served: Serve) -> None:
    client = client_of(served, alone(Parrot(), lineage={"model": "model-1"}))
    answer = client.chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": "héllo"}], logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason, choice.message.role) == (
        "héllo",
        "stop",
        "assistant",
    )
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [one.logprob for one in choice.logprobs.content] == [token(letter).logprob for letter in "héllo"]
    assert [bytes(one.bytes or ()).decode() for one in choice.logprobs.content] == list("héllo")
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * 5
    assert answer.usage is not None and answer.usage.total_tokens == 10
    assert answer.model_extra == {"lineage": {"model": "model-1"}}
    two = client.chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": "ab"}], n=2, max_completion_tokens=1
    )
    assert [(one.index, one.message.content, one.finish_reason) for one in two.choices] == [
        (0, "a", "length"),
        (1, "a", "length"),
    ]


def test_streams(served: Serve) -> None:
    client = client_of(served, alone(Parrot()))
    chunks = list(
        client.chat.completions.create(
            model="parrot",
            messages=[{"role": "user", "content": "abc"}],
            stream=True,
            logprobs=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "abc"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 3)
    told = [chunk.choices[0].logprobs for chunk in chunks[:-1] if chunk.choices[0].logprobs]
    assert sum(len(one.content or ()) for one in told) == 3
    texts = list(client.completions.create(model="parrot", prompt=["ab", "cd"], stream=True, n=2))
    for place, text in enumerate(["ab", "ab", "cd", "cd"]):
        assert "".join(c.choices[0].text for c in texts if c.choices[0].index == place) == text


def test_completions(served: Serve) -> None:
    client = client_of(served, alone(Parrot()))
    prompts: list[Any] = ["ab", ["ab", "c"], [97, 98], [[97], [98, 99]]]
    texts = [["ab"], ["ab", "c"], ["ab"], ["a", "bc"]]
    for prompt, expected in zip(prompts, texts, strict=True):
        answer = client.completions.create(model="parrot", prompt=prompt)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    echoed = client.completions.create(
        model="parrot", prompt=[[97, 98, 99]], echo=True, max_tokens=1, logprobs=1, temperature=0
    ).choices[0]
    told = echoed.logprobs
    assert echoed.text == "abca" and told is not None
    assert told.token_logprobs is not None and told.top_logprobs is not None
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1:] == [token(letter).logprob for letter in "bca"]
    assert [max(top.values()) for top in told.top_logprobs[1:]] == told.token_logprobs[1:]
    assert (told.tokens, told.text_offset) == (list("abca"), [0, 1, 2, 3])
    nothing = client.completions.create(model="parrot", prompt="abc", echo=True, max_tokens=0, logprobs=0)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == ("abc", "length")


def test_decisions(served: Serve) -> None:
    client = client_of(served, alone(Parrot()))
    decided = client.decisions.create(
        model="parrot",
        input="It rains.",
        questions=[
            {"type": "predicate", "name": "wet", "instructions": "It is wet."},
            {
                "type": "choice",
                "instructions": "Which?",
                "choices": [{"value": "a"}, {"value": True}, {"value": "true"}],
            },
            {
                "type": "score",
                "instructions": "How much?",
                "levels": [{"label": "little"}, {"label": "much"}],
            },
        ],
    )
    wet, which, much = decided.answers
    assert wet.type == "predicate" and wet.name == "wet" and wet.probability == pytest.approx(0.2689414)
    assert which.type == "choice" and which.choice == "true"
    assert sum(one.probability for one in which.probabilities) == pytest.approx(1)
    assert [one.value for one in which.probabilities] == ["a", True, "true"]
    assert much.type == "score" and much.score == pytest.approx(much.confidence)
    assert [one.value for one in much.probabilities] == [0, 1]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure(400, "no"), openai.BadRequestError),
        (Failure(429, "later", retry_after_s=1), openai.RateLimitError),
        (Failure(502, "gone"), openai.InternalServerError),
    ],
)
def test_errors(served: Serve, failure: Failure, error: type[openai.APIStatusError]) -> None:
    client = client_of(served, alone(Parrot(failure=failure)))
    for stream in (False, True):
        with pytest.raises(error) as raised:
            client.chat.completions.create(
                model="parrot", messages=[{"role": "user", "content": "a"}], stream=stream
            )
        assert failure.message in raised.value.message
        assert raised.value.request_id


def test_mistakes_are_named(served: Serve) -> None:
    client = client_of(served, alone(Parrot()))
    ask = client.chat.completions.create
    said: list[Any] = [{"role": "user", "content": "a"}]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; there is parrot"):
        ask(model="other", messages=said)
    with pytest.raises(openai.BadRequestError, match=r"temperature: .*less than or equal to 2"):
        ask(model="parrot", messages=said, temperature=3)
    with pytest.raises(openai.BadRequestError, match=r"messages\.0: a message of the user needs content"):
        ask(model="parrot", messages=[{"role": "user"}])  # type: ignore[list-item, typeddict-item]
    with pytest.raises(openai.BadRequestError, match="stop is at most 16 texts"):
        ask(model="parrot", messages=said, stop=[""])
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(model="parrot", prompt="a", suffix="b")


def test_a_client_that_is_told_to_wait_comes_again(served: Serve) -> None:
    parrot = Parrot(failure=Failure(429, "full", retry_after_s=1))
    client = client_of(served, alone(parrot), max_retries=2)
    began = time.monotonic()

    class Once(list):  # type: ignore[type-arg]
        def append(self, job: Any) -> None:
            super().append(job)
            if len(self) == 2:
                parrot.failure = None

    parrot.jobs = Once()
    answer = client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "a"}])
    assert answer.choices[0].message.content == "a"
    assert len(parrot.jobs) == 2 and time.monotonic() - began >= 1


class Strict:
    """Blocks questions with "bad", escalates those with "hard", is sure of the rest."""

    def __init__(self) -> None:
        self.others: list[Sequence[str]] = []

    async def before(self, asked: Asked) -> Judgement | None:
        return Judgement("block", ("unsafe",), "No.") if "bad" in asked.prompt else None

    async def after(self, asked: Asked, answered: Answered, others: Sequence[str] = ()) -> Judgement:
        self.others.append(others)
        if "hard" in asked.prompt and answered.engine == "parrot":
            return Judgement("escalate", ("hard",))
        return Judgement("answer", ("sure",), confidence=Confidence(0.9, 0.8, 0.95, "calibrator-1"))


def test_the_gate_sees_every_sample_of_a_question(served: Serve) -> None:
    gate = Strict()
    client = client_of(served, alone(Parrot(), gate=gate))
    said: Any = [{"role": "user", "content": "fine"}]
    client.chat.completions.create(model="parrot", messages=said, n=3)
    assert gate.others == [["fine"] * 3] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_the_gate_is_in_the_answer(served: Serve, stream: bool) -> None:
    stronger = Parrot()
    stronger.name = "stronger"
    client = client_of(served, alone(Parrot(), stronger=stronger, gate=Strict()))
    none = client_of(served, alone(Parrot(), gate=Strict()))

    def ask(whom: openai.OpenAI, text: str) -> tuple[str, str, Any]:
        got: Any = whom.chat.completions.create(
            model="parrot", messages=[{"role": "user", "content": text}], stream=stream
        )
        if not stream:
            choice = got.choices[0]
            return choice.message.content, choice.finish_reason, choice.model_extra
        chunks = list(got)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].choices[0].finish_reason, chunks[-1].choices[0].model_extra

    text, reason, more = ask(client, "fine")
    assert (text, reason, more["gate"]["decision"]) == ("fine", "stop", "answer")
    assert more["confidence"] == {"probability": 0.9, "interval": [0.8, 0.95], "calibrator": "calibrator-1"}
    text, reason, more = ask(client, "bad")
    assert (text, reason, more["gate"]["decision"], more["gate"]["reasons"]) == (
        "No.",
        "content_filter",
        "block",
        ["unsafe"],
    )
    text, reason, more = ask(client, "hard")
    assert (text, more["gate"]["decision"], more["gate"]["reasons"]) == ("hard", "answer", ["hard", "sure"])
    assert len(stronger.jobs) == 1
    text, reason, more = ask(none, "hard")
    assert (reason, more["gate"]["decision"]) == ("content_filter", "abstain")
    assert "none is set" in more["gate"]["reasons"][-1]
