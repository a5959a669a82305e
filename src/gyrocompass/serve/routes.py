"""The handlers of questions: a body is read (`wire`), asked (`exchange`), rendered (`render`, `streams`)."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import from_json, to_json

from gyrocompass.model.decoding import Decoding
from gyrocompass.serve import render
from gyrocompass.serve.answer import Asked, Judgement
from gyrocompass.serve.backend import Job, Samples
from gyrocompass.serve.decisions import answer_of, labels_of, prompt_of
from gyrocompass.serve.direct import add_post, body_of
from gyrocompass.serve.exchange import Exchange, Outcome
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.keys import Caller
from gyrocompass.serve.metrics import Metrics
from gyrocompass.serve.services import Lane, ServeSettings, Services, Way
from gyrocompass.serve.sessions import user_hash
from gyrocompass.serve.streams import (
    ChatChunks,
    Chunks,
    TextChunks,
    Watcher,
    events,
    merged,
    one_chunk,
    together,
)
from gyrocompass.serve.wire import (
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    read,
    texts_of,
)

_GREEDY = Decoding()
_FOR_REVIEW = 5
"""Likeliest tokens that are kept with an answer behind a gate."""


class Routes:
    """The handlers, which share what they are made of."""

    def __init__(self, services: Services, settings: ServeSettings, metrics: Metrics) -> None:
        self._services, self._settings, self._metrics = services, settings, metrics
        self._watcher = Watcher()
        self._secret = settings.user_secret or secrets.token_hex(32)

    def router(self) -> APIRouter:
        """All routes."""
        router = APIRouter()
        add_post(router, "/v1/chat/completions", self.chat, ChatRequest)
        add_post(router, "/v1/completions", self.completions, CompletionRequest)
        add_post(router, "/v1/decisions", self.decisions, DecisionRequest)
        return router

    async def chat(self, request: Request) -> Response:
        """A conversation's next message."""
        body = await body_of(request)
        caller = await self._services.caller(request)
        asked_for = read(ChatRequest, body)
        given = from_json(body)
        tools = asked_for.tools if asked_for.tools and asked_for.tool_choice != "none" else []
        messages = [message.plain() for message in asked_for.messages]
        alternatives = (asked_for.top_logprobs or 0) if asked_for.logprobs else 0
        user, way = self._way(caller, asked_for.user)
        asked = self._asked(
            request, caller, user, way, asked_for, "chat", texts_of(asked_for.messages), messages,
            asked_for.limit(),
        )  # fmt: skip
        decoding = asked_for.decoding(**asked_for.constraint())
        job = self._job(asked, way.lane, messages, asked_for, decoding, alternatives, given, tools)

        def choice(place: int, outcome: Outcome) -> dict[str, Any]:
            return render.chat_choice(
                place,
                outcome.answered,
                outcome.judgement,
                request_id=asked.id,
                logprobs=bool(asked_for.logprobs),
                alternatives=alternatives,
                tools=bool(tools),
                extra=outcome.extra,
            )

        name = await self._model_name(way.lane, asked_for.model)
        head = self._head(asked, way.lane, "chatcmpl", "chat.completion", name)
        if asked_for.stream:
            head["object"] = "chat.completion.chunk"
            chunks = ChatChunks(bool(asked_for.logprobs), alternatives, bool(tools))
            return await self._streamed(
                request, way, head, [(asked, job)], chunks, choice, asked_for.wants_usage()
            )
        outcomes = await self._watcher.until_gone(request, self._exchange(way).whole(asked, job))
        return self._answer(
            head, [choice(place, outcome) for place, outcome in enumerate(outcomes)], outcomes
        )

    async def completions(self, request: Request) -> Response:
        """What follows a text, or several."""
        body = await body_of(request)
        caller = await self._services.caller(request)
        asked_for = read(CompletionRequest, body)
        given = from_json(body)
        alternatives, echo = asked_for.logprobs or 0, bool(asked_for.echo)
        pairs: list[tuple[Asked, Job]] = []
        user, way = self._way(caller, asked_for.user)
        lane, exchange, decoding = way.lane, self._exchange(way), asked_for.decoding()
        for prompt in asked_for.prompts():
            text = prompt if isinstance(prompt, str) else await lane.backend.detokenize(prompt)
            asked = self._asked(
                request, caller, user, way, asked_for, "completion", text, (), asked_for.max_tokens
            )
            asked = asked._replace(id=f"{asked.id}.{len(pairs)}" if pairs else asked.id)
            body = given | {"prompt": prompt, "echo": False}
            pairs.append((asked, self._job(asked, lane, prompt, asked_for, decoding, alternatives, body)))
        name = await self._model_name(lane, asked_for.model)
        head = self._head(pairs[0][0], lane, "cmpl", "text_completion", name)
        samples = asked_for.n or 1
        echoed: list[Any] = [None] * len(pairs)

        def choice(place: int, outcome: Outcome) -> dict[str, Any]:
            shown = render.shown_text(outcome.answered, outcome.judgement)
            replaced = outcome.judgement is not None and outcome.judgement.text is not None
            asked, scored = pairs[place // samples][0], echoed[place // samples]
            tells = asked_for.logprobs is not None and not replaced
            start = len(asked.prompt) if echo else 0
            return {
                "index": place,
                "text": (asked.prompt if echo else "") + shown,
                "logprobs": render.completion_logprobs(scored, outcome.answered.tokens, alternatives, start)
                if tells
                else None,
                "finish_reason": render.finish_reason(outcome.answered, outcome.judgement),
                **render.cut(outcome.answered),
                **render.doubts(outcome.judgement),
            }

        async def everything() -> list[Outcome]:
            if echo and asked_for.logprobs is not None:
                echoed[:] = await together([lane.backend.score(job) for _, job in pairs])
            if asked_for.max_tokens == 0:
                return [_unwritten(lane, job) for _, job in pairs for _ in range(samples)]
            parts = await together([exchange.whole(asked, job) for asked, job in pairs])
            return [outcome for part in parts for outcome in part]

        if asked_for.stream and not echo:
            chunks = TextChunks(asked_for.logprobs)
            return await self._streamed(request, way, head, pairs, chunks, choice, asked_for.wants_usage())
        outcomes = await self._watcher.until_gone(request, everything())
        choices = [choice(place, outcome) for place, outcome in enumerate(outcomes)]
        if asked_for.stream:
            return events(one_chunk(head, choices))
        return self._answer(head, choices, outcomes, pairs)

    async def decisions(self, request: Request) -> Response:
        """Questions whose answers are known beforehand: how probable each is."""
        body = await body_of(request)
        caller = await self._services.caller(request)
        asked_for = read(DecisionRequest, body)
        text = asked_for.text()
        user, way = self._way(caller, asked_for.user)
        lane, exchange = way.lane, self._exchange(way)
        model = await self._model_name(lane, asked_for.model)
        answers, gates, prompt_tokens = [], [], 0
        asked = self._asked(request, caller, user, way, asked_for, "decision", text, (), 1)
        if lane.gate is not None and (judgement := await lane.gate.before(asked)) is not None:
            exchange.record(asked, None, judgement, 200)
            answers = [{"type": "refusal", "name": question.name} for question in asked_for.questions]
            gates = [render.doubts(judgement)] * len(answers)
        else:
            for number, question in enumerate(asked_for.questions):
                prompt = prompt_of(text, question)
                labels = labels_of(question)
                said = [{"role": "user", "content": prompt}]
                job = self._job(asked, lane, said, asked_for, _GREEDY, 0)
                told, counted = await self._watcher.until_gone(request, lane.backend.likelihoods(job, labels))
                prompt_tokens += counted
                answer, confidence = answer_of(question, told, lane.calibrate_choice)
                answers.append(answer)
                gates.append(render.doubts(Judgement("answer", confidence=confidence)) if confidence else {})
                exchange.record(asked, None, Judgement("answer", confidence=confidence), 200, number)
        usage = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens,
        }
        answers = [answer | gate for answer, gate in zip(answers, gates, strict=True)]
        calibrated = lane.calibrate_choice is not None
        return JSONResponse(
            {
                "model": model,
                "answers": answers,
                "usage": usage,
                "calibrated": calibrated,
                **lane.told(),
            }
        )

    def _exchange(self, way: Way) -> Exchange:
        return Exchange(way, self._services.events)

    def _way(self, caller: Caller, named: str | None) -> tuple[str, Way]:
        """The keyed hash of a user, and where the request goes; it stays there."""
        user = named or caller.id
        hashed = user_hash(self._secret, user) if user else ""
        return hashed, self._services.ways.of(hashed)

    def _asked(
        self,
        request: Request,
        caller: Caller,
        user: str,
        way: Way,
        body: Any,
        kind: Literal["chat", "completion", "decision"],
        prompt: str,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int | None,
    ) -> Asked:
        limits = [value for value in (body.deadline_s, self._settings.deadline_s) if value is not None]
        return Asked(
            id=request.scope["gyro_id"],
            kind=kind,
            prompt=prompt,
            messages=messages,
            model=way.lane.lineage.get("model") or body.model,
            user=user,
            tier=caller.tier,
            slice=body.slice,
            max_tokens=min(max_tokens or self._settings.max_tokens, self._settings.max_tokens),
            deadline_s=min(limits, default=None),
            received_at=time.time(),
            consent=body.consent,
            webhook=body.webhook,
            rollout=way.rollout,
            arm=way.arm,
        )

    def _job(
        self,
        asked: Asked,
        lane: Lane,
        prompt: Any,
        body: Any,
        decoding: Decoding,
        alternatives: int,
        given: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Job:
        return Job(
            id=asked.id,
            prompt=prompt,
            decoding=decoding,
            logit_bias=body.biases() if hasattr(body, "biases") else {},
            max_tokens=asked.max_tokens,
            samples=getattr(body, "n", None) or 1,
            seed=getattr(body, "seed", None),
            # Reviewers see what else might have been written, whatever the client asked for.
            alternatives=max(alternatives, _FOR_REVIEW if lane.gate is not None else 0),
            deadline_s=asked.deadline_s,
            received_at=asked.received_at,
            tools=tools,
            model=body.model,
            body=given or {},
        )

    async def _model_name(self, lane: Lane, wanted: str) -> str:
        """The name in the answer.

        Raises:
            Failure: 404 for a name that is not served.
        """
        names = [model["id"] for model in await lane.backend.models()]
        if wanted and wanted not in names:
            raise Failure(
                404, f"there is no model {wanted!r}; there is {', '.join(names)}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return wanted or names[0]

    def _head(self, asked: Asked, lane: Lane, prefix: str, kind: str, model: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{asked.id}",
            "object": kind,
            "created": int(asked.received_at),
            "model": model,
            **lane.told(),
        }

    def _answer(
        self,
        head: Mapping[str, Any],
        choices: Sequence[Mapping[str, Any]],
        outcomes: Sequence[Outcome],
        pairs: Sequence[tuple[Asked, Job]] = (),
    ) -> Response:
        asyncio.get_running_loop().call_soon(self._count, outcomes)
        each = len(outcomes) // max(1, len(pairs))
        prompt_tokens = sum(outcome.answered.prompt_tokens for outcome in outcomes[:: max(1, each)])
        if not pairs:
            prompt_tokens = outcomes[0].answered.prompt_tokens if outcomes else 0
        written = sum(len(outcome.answered.tokens) for outcome in outcomes)
        reply = dict(outcomes[0].reply) if outcomes else {}
        told = {**reply, **head, "choices": choices, "usage": render.usage(prompt_tokens, written)}
        return Response(to_json(told, inf_nan_mode="null"), media_type="application/json")

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self._metrics.answer(outcome.answered, outcome.judgement)

    async def _streamed(
        self,
        request: Request,
        way: Way,
        head: Mapping[str, Any],
        pairs: Sequence[tuple[Asked, Job]],
        chunks: Chunks,
        choice: Callable[[int, Outcome], dict[str, Any]],
        wants_usage: bool,
    ) -> Response:
        """Server-sent events. The first piece is awaited before the head goes out, so that a request which
        cannot be answered gets its status.
        """
        samples, exchange = pairs[0][1].samples, self._exchange(way)
        counted = [0, 0]

        async def live() -> AsyncIterator[dict[str, Any]]:
            async for place, piece in merged([exchange.live(*pair) for pair in pairs]):
                counted[1] += len(piece.tokens)
                for one in chunks.of(place * samples + piece.sample, piece):
                    yield {**head, "choices": [one]}
                if piece.finish is not None and piece.sample == 0:
                    counted[0] += piece.prompt_tokens

        async def judged() -> AsyncIterator[dict[str, Any]]:
            parts = await together([exchange.whole(*pair) for pair in pairs])
            for number, part in enumerate(parts):
                counted[0] += part[0].answered.prompt_tokens if part else 0
                for sample, outcome in enumerate(part):
                    counted[1] += len(outcome.answered.tokens)
                    self._metrics.answer(outcome.answered, outcome.judgement)
                    for one in chunks.whole(choice(number * samples + sample, outcome), outcome):
                        yield {**head, "choices": [one]}

        source = live() if exchange.shows_live else judged()
        try:
            first = await self._watcher.until_gone(request, anext(source))
        except StopAsyncIteration:
            first = None

        async def lines() -> AsyncIterator[dict[str, Any]]:
            if first is not None:
                yield first
                async for chunk in source:
                    yield chunk
            if wants_usage:
                yield {**head, "choices": [], "usage": render.usage(*counted)}

        return events(lines(), source)


def _unwritten(lane: Lane, job: Job) -> Outcome:
    """Nothing is asked for but the echo."""
    answered = Samples(job, lane.backend.name).answered()[0]._replace(finish="length")
    return Outcome(answered, None, {}, {})
