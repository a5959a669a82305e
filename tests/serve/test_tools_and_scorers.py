"""Calls of tools over HTTP, and the scorers that need something beside them: a server, a trained head."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from parrot import Parrot, alone
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.model.load import save_model
from gyrocompass.model.open import open_model
from gyrocompass.model.scalar_head import attach_scalar_head
from gyrocompass.serve.app import make_app
from gyrocompass.serve.classifier import open_classifier
from gyrocompass.serve.gate import Gate
from gyrocompass.serve.policy import Policy
from gyrocompass.serve.scorers import look, lookers_of
from gyrocompass.serve.services import ServeSettings

Serve = Callable[[Any], str]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(served: Serve, stream: bool) -> None:
    url = served(make_app(alone(Parrot()), ServeSettings()))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(text: str, **more: Any) -> tuple[str | None, list[Any], str]:
        got: Any = client.chat.completions.create(
            model="parrot", messages=[{"role": "user", "content": text}], stream=stream, **more
        )
        if not stream:
            choice = got.choices[0]
            return choice.message.content, list(choice.message.tool_calls or []), choice.finish_reason
        chunks = [chunk.choices[0] for chunk in got]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        return text or None, calls, chunks[-1].finish_reason

    text, calls, reason = ask(f"Let me see. {CALL}", tools=[ADD])
    assert (text, reason) == ("Let me see.", "tool_calls")
    assert calls[0].function.name == "add" and json.loads(calls[0].function.arguments) == {"a": 1}
    assert calls[0].id.startswith("call_")
    text, calls, reason = ask(CALL)  # no tools were given: a text like any other
    assert (text, calls, reason) == (CALL, [], "stop")
    text, calls, reason = ask("<tool_call>{broken</tool_call>", tools=[ADD])
    assert calls == [] and text is not None and "broken" in text
    with pytest.raises(openai.BadRequestError, match="cannot be forced"):
        ask("x", tools=[ADD], tool_choice="required")


def policy(**scorer: Any) -> Policy:
    return parse(Policy, {"name": "p", "scorers": [{"name": "harm", **scorer}]}, "policy")


def test_a_moderation_server_is_asked(served: Serve) -> None:
    async def moderate(request: Request) -> Response:
        text = json.loads(await request.body())["input"]
        if text == "break":
            return Response("no", 500)
        scores = {"violence": 0.9 if "bomb" in text else 0.1, "hate": 0.95}
        return JSONResponse({"results": [{"category_scores": scores}]})

    url = served(Starlette(routes=[Route("/v1/moderations", moderate, methods=["POST"])]))
    lookers = lookers_of(policy(kind="moderation", url=f"{url}/v1/moderations", categories=["violence"]))

    async def scores() -> list[Any]:
        found = [await look(lookers, "input", text) for text in ("a bomb", "a flower", "break")]
        await Gate(policy(kind="patterns", deny=["x"]), lookers).close()
        return found

    bomb, flower, broken = asyncio.run(scores())
    assert bomb.flags == {"input.harm": 0.9} and flower.flags == {"input.harm": 0.1}
    assert broken.flags == {} and "500" in broken.failures[0][0] and broken.failures[0][1] == "block"

    async def nobody() -> Any:
        found = await look(none, "output", "x")
        await Gate(policy(kind="patterns", deny=["x"]), none).close()
        return found

    none = lookers_of(policy(kind="moderation", url="http://127.0.0.1:9/", timeout_s=0.5))
    assert asyncio.run(nobody()).failures
    with pytest.raises(BadInput, match="NO_SUCH_KEY is not set"):
        lookers_of(policy(kind="moderation", url=url, api_key_env="NO_SUCH_KEY"))


def test_a_trained_head_is_a_scorer(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no scalar head"):
        open_classifier(model_folder)
    model = open_model(model_folder, dtype=torch.float32, device=torch.device("cpu"))
    head = attach_scalar_head(model)
    with torch.no_grad():
        head.weight.normal_()
    save_model(model, tmp_path / "judge", load_tokenizer(model_folder))
    classify = open_classifier(tmp_path / "judge")
    first, second = classify("a bomb"), classify("a flower " * 500)
    assert 0 < first < 1 and 0 < second < 1 and first != second
    lookers = lookers_of(policy(kind="classifier", model="x"), classifier=lambda name: classify)
    assert asyncio.run(look(lookers, "input", "a bomb")).flags["input.harm"] == pytest.approx(first)


def test_what_cannot_be_looked_with_is_said() -> None:
    with pytest.raises(BadInput, match="asks the served model"):
        lookers_of(policy(kind="own"))
    with pytest.raises(BadInput, match="cannot be opened here"):
        lookers_of(policy(kind="classifier", model="x"))
