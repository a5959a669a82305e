"""Another server behind ours: here it is ours again, so that what it says is known."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import openai
import pytest
from parrot import Parrot, alone, token
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gyrocompass.core.errors import BadInput
from gyrocompass.serve.app import make_app
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.services import ServeSettings
from gyrocompass.serve.upstream import Upstream

Serve = Callable[[Any], str]


@pytest.fixture
def client(served: Serve) -> openai.OpenAI:
    behind = served(make_app(alone(Parrot()), ServeSettings()))
    before = served(make_app(alone(Upstream(behind)), ServeSettings()))
    return openai.OpenAI(base_url=f"{before}/v1", api_key="none", max_retries=0)


def test_answers_come_through(client: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "user", "content": "héllo"}]
    assert [model.id for model in client.models.list()] == ["parrot"]
    answer = client.chat.completions.create(model="parrot", messages=said, logprobs=True, top_logprobs=2, n=2)
    for choice in answer.choices:
        assert choice.message.content == "héllo" and choice.logprobs and choice.logprobs.content
        assert [one.logprob for one in choice.logprobs.content] == [
            token(letter).logprob for letter in "héllo"
        ]
    assert answer.usage is not None and answer.usage.completion_tokens == 10
    chunks = list(client.chat.completions.create(model="parrot", messages=said, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "héllo"
    assert chunks[-1].choices[0].finish_reason == "stop"
    echoed = client.completions.create(model="parrot", prompt=[97, 98], echo=True, max_tokens=1, logprobs=1)
    told = echoed.choices[0].logprobs
    assert told is not None and told.token_logprobs is not None
    assert told.token_logprobs == [None, token("b").logprob, token("a").logprob]


def test_refusals_come_through(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="no such token"):
        client.completions.create(model="parrot", prompt=[0x110000])


def strange(answer: Callable[[Mapping[str, Any]], Response]) -> Starlette:
    """A server whose completions are whatever the test wants."""

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]})

    async def chat(request: Request) -> Response:
        return answer(json.loads(await request.body()))

    return Starlette(
        routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    )


def ask(url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_unknown_fields_survive_both_ways(served: Serve) -> None:
    seen: list[Mapping[str, Any]] = []

    def answer(body: Mapping[str, Any]) -> Response:
        seen.append(body)
        message = {"role": "assistant", "content": "hm", "reasoning": "because"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return JSONResponse({"id": "x", "choices": [choice], "usage": None, "system_fingerprint": "fp"})

    url = served(make_app(alone(Upstream(served(strange(answer)))), ServeSettings()))
    status, got = ask(
        url, {"messages": [{"role": "user", "content": "a"}], "guided_regex": "a+", "slice": "s"}
    )
    assert status == 200 and got["system_fingerprint"] == "fp"
    assert got["choices"][0]["message"]["reasoning"] == "because"
    assert got["choices"][0]["logprobs"] is None
    assert seen[0]["guided_regex"] == "a+" and seen[0]["model"] == "m" and "slice" not in seen[0]


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (PlainTextResponse("oh"), 502, "did not answer in JSON: oh"),
        (JSONResponse([]), 502, "did not answer with an object"),
        (JSONResponse({"choices": [{}]}), 502, "is not one of OpenAI's"),
        (JSONResponse({"error": {"message": "no key"}}, 401), 502, "refuses our key: no key"),
        (JSONResponse({"error": {"message": "busy"}}, 429, {"Retry-After": "7"}), 429, "busy"),
        (JSONResponse({"error": "what?"}, 400), 400, "what?"),
        (PlainTextResponse("dead", 500), 502, "status 500: dead"),
    ],
)
def test_what_goes_wrong_behind(served: Serve, answer: Response, status: int, message: str) -> None:
    url = served(make_app(alone(Upstream(served(strange(lambda body: answer)))), ServeSettings()))
    found, got = ask(url, {"messages": [{"role": "user", "content": "a"}]})
    assert found == status and message in got["error"]["message"]


def test_nobody_is_there() -> None:
    upstream = Upstream("http://127.0.0.1:9")

    async def look() -> str | None:
        try:
            with pytest.raises(Failure, match="cannot be asked"):
                await upstream.models()
            return await upstream.ready()
        finally:
            await upstream.close()

    assert "cannot be asked" in (asyncio.run(look()) or "")


def test_its_key_has_to_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(BadInput, match="NO_SUCH_KEY is not set"):
        Upstream("http://127.0.0.1:9", api_key_env="NO_SUCH_KEY")
