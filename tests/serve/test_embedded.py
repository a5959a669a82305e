"""A model behind the routes: what it says over HTTP is what it says in the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from parrot import alone

from gyrocompass.model.decoding import Decoding
from gyrocompass.model.generate import generate
from gyrocompass.model.lm_eval_adapter import GyroLM
from gyrocompass.serve.app import make_app
from gyrocompass.serve.decisions import prompt_of
from gyrocompass.serve.embedded import Embedded
from gyrocompass.serve.engine.engine import EmbeddedEngine
from gyrocompass.serve.services import ServeSettings
from gyrocompass.serve.wire import Predicate

Serve = Callable[[Any], str]


@pytest.fixture
def url(served: Serve, speaking: tuple[Any, Any]) -> Iterator[str]:
    yield served(make_app(alone(Embedded(EmbeddedEngine(*speaking), speaking[1], "tiny")), ServeSettings()))


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_chats_as_generate_does(client: openai.OpenAI, speaking: tuple[Any, Any]) -> None:
    (expected,) = generate(*speaking, ["Write add."], chat=True, max_new_tokens=10, alternatives=3)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Write add."}],
        temperature=0,
        max_tokens=10,
        logprobs=True,
        top_logprobs=3,
    ).choices[0]
    assert answer.message.content == expected.text
    assert answer.logprobs is not None and answer.logprobs.content is not None
    told = answer.logprobs.content
    assert [one.token for one in told] == expected.tokens
    np.testing.assert_allclose([one.logprob for one in told], expected.logprobs, atol=1e-4)
    for one, alternatives in zip(told, expected.alternatives, strict=True):
        np.testing.assert_allclose(
            [top.logprob for top in one.top_logprobs], [value for _, value in alternatives], atol=1e-4
        )


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "x = 'é",
        "max_tokens": 12,
        "temperature": 0.8,
        "seed": 4,
    }
    whole = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    several = client.completions.create(**asked, n=3)
    assert several.choices[0].text == whole.text
    assert len({choice.text for choice in several.choices}) > 1


def test_what_a_user_says_is_never_a_special_token(client: openai.OpenAI, speaking: tuple[Any, Any]) -> None:
    tokenizer = speaking[1]
    special = next(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    plain = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": special}], max_tokens=1
    )
    said: Any = [{"role": "user", "content": ""}]
    empty = client.chat.completions.create(model="tiny", messages=said, max_tokens=1)
    assert plain.usage is not None and empty.usage is not None
    assert plain.usage.prompt_tokens > empty.usage.prompt_tokens + 1


def test_decisions_are_likelihoods(client: openai.OpenAI, speaking: tuple[Any, Any]) -> None:
    question = Predicate(type="predicate", instructions="It is wet.")
    decided: Any = client.decisions.create(
        model="tiny", input="It rains.", questions=[{"type": "predicate", "instructions": "It is wet."}]
    )
    (completion,) = generate(*speaking, [prompt_of("It rains.", question)], chat=True, max_new_tokens=1,
                             alternatives=speaking[0].config.vocab_size)  # fmt: skip
    of_first = dict(reversed(completion.alternatives[0]))
    tokenizer = speaking[1]
    if all(len(tokenizer.encode(label, add_special_tokens=False)) == 1 for label in ("yes", "no")):
        yes, no = (np.exp(of_first[label]) for label in ("yes", "no"))
        assert decided.answers[0].probability == pytest.approx(yes / (yes + no), abs=1e-4)
    assert 0 < decided.answers[0].probability < 1 and decided.usage.input_tokens > 10


def test_constrained_answers(client: openai.OpenAI) -> None:
    def ask(schema: dict[str, Any]) -> Any:
        return client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "JSON"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            max_tokens=40,
            temperature=0,
        ).choices[0]

    properties = {"a": {"enum": [1, 2]}}
    answer = ask(
        {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    )
    if answer.finish_reason == "stop":
        assert json.loads(answer.message.content)["a"] in (1, 2)
    assert answer.message.content.lstrip().startswith("{")
    with pytest.raises(openai.BadRequestError, match="the constraint is none"):
        ask({"type": "wrong"})


def test_a_prompt_too_long_is_the_client_s_mistake(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="leaves no room in the context"):
        client.completions.create(model="tiny", prompt="a b " * 5000)
    with pytest.raises(openai.BadRequestError, match="there is no token 99999999"):
        client.completions.create(model="tiny", prompt=[99999999])


def test_lm_eval_sees_the_same_model(url: str, model_folder: Path, speaking: tuple[Any, Any]) -> None:
    """`lm_eval --model local-completions` against the adapter in the process."""
    api = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance")
    over_http = api.LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="tiny",
        tokenizer=str(model_folder),
        tokenizer_backend="huggingface",
        batch_size=3,
    )
    inside = GyroLM(pretrained=str(model_folder), batch_size=3)
    pairs = [("def add(a, b):", " return a"), ("import", " os"), ("x =", " 1\n"), ("for i in", " range(3):")]
    asked = [instance.Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    theirs, ours = over_http.loglikelihood(asked), inside.loglikelihood(asked)
    np.testing.assert_allclose([value for value, _ in theirs], [value for value, _ in ours], atol=1e-4)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]


def test_greedy_writing(client: openai.OpenAI, speaking: tuple[Any, Any]) -> None:
    (expected,) = generate(*speaking, ["import"], max_new_tokens=8, decoding=Decoding(stop=("e",)))
    found = client.completions.create(model="tiny", prompt="import", max_tokens=8, temperature=0, stop="e")
    assert found.choices[0].text == expected.text


def test_an_answer_that_time_ended_says_so(client: openai.OpenAI) -> None:
    for stream in (False, True):
        got: Any = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Write add."}],
            stream=stream,
            max_tokens=40,
            extra_body={"deadline_s": 0.0001},
        )
        last = list(got)[-1].choices[0] if stream else got.choices[0]
        assert last.finish_reason == "length" and last.model_extra["cut"] is True
