"""The handlers of what is not a question to the model: what there is, its tokenizer, its health."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gyrocompass.serve.direct import RESPONSES, add_post, body_of
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.metrics import Metrics
from gyrocompass.serve.services import Services
from gyrocompass.serve.wire import DetokenizeRequest, ModerationRequest, TokenizeRequest, read


class AboutRoutes:
    """They answer for the champion, whoever asks."""

    def __init__(self, services: Services, metrics: Metrics) -> None:
        self._services, self._metrics = services, metrics

    def router(self) -> APIRouter:
        """All routes."""
        router = APIRouter()
        add_post(router, "/v1/moderations", self.moderations, ModerationRequest)
        add_post(router, "/tokenize", self.tokenize, TokenizeRequest)
        add_post(router, "/detokenize", self.detokenize, DetokenizeRequest)
        for path, handler in (
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/tokenizer_info", self.tokenizer_info),
            ("/health", self.health),
            ("/ready", self.ready),
        ):
            router.add_api_route(path, handler, responses=RESPONSES, response_class=JSONResponse)
        router.add_api_route("/metrics", self.metrics, include_in_schema=False)
        return router

    async def moderations(self, request: Request) -> Response:
        """How unsafe texts are, by the scorers of this server."""
        body = await body_of(request)
        await self._services.caller(request)
        asked_for = read(ModerationRequest, body)
        moderate = self._services.champion.moderate
        if moderate is None:
            raise Failure(404, "this server has no safety scorers: name some in its policy")
        results = []
        for text in asked_for.texts():
            scores = await moderate(text)
            flags = {name: score >= 0.5 for name, score in scores.items()}
            results.append(
                {"flagged": any(flags.values()), "categories": flags, "category_scores": dict(scores)}
            )
        return JSONResponse(
            {"id": f"modr-{request.scope['gyro_id']}", "model": "gyrocompass", "results": results}
        )

    async def models(self, request: Request) -> Response:
        """What can be asked."""
        await self._services.caller(request)
        return JSONResponse({"object": "list", "data": await self._services.champion.backend.models()})

    async def model(self, request: Request, name: str) -> Response:
        """One of them."""
        await self._services.caller(request)
        for model in await self._services.champion.backend.models():
            if model["id"] == name:
                return JSONResponse(model)
        raise Failure(
            404, f"there is no model {name!r}; see /v1/models", param="model", code="model_not_found"
        )

    async def tokenize(self, request: Request) -> Response:
        """Ids of a text."""
        body = await body_of(request)
        await self._services.caller(request)
        asked_for = read(TokenizeRequest, body)
        ids = await self._services.champion.backend.tokenize(asked_for.text(), asked_for.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids)})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        body = await body_of(request)
        await self._services.caller(request)
        return JSONResponse(
            {"prompt": await self._services.champion.backend.detokenize(read(DetokenizeRequest, body).tokens)}
        )

    async def tokenizer_info(self, request: Request) -> Response:
        """Special tokens and chat template."""
        await self._services.caller(request)
        return JSONResponse(await self._services.champion.backend.tokenizer_info())

    async def health(self) -> Response:
        """That the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether it can answer now."""
        why = await self._services.champion.backend.ready()
        if why is not None:
            raise Failure(503, why, retry_after_s=1)
        return JSONResponse({"status": "ready", **self._services.champion.told()})

    async def metrics(self) -> Response:
        """For Prometheus."""
        figures = dict(self._services.champion.backend.figures())
        return Response(self._metrics.text(figures), media_type=self._metrics.content_type)
