"""The queue over HTTP: for clients that wait, and for people who decide by programs of their own.

GET  /v1/reviews/{id}                   what became of an answer (scope infer)
GET  /v1/reviews                        items and counts (scope review, as all below)
POST /v1/reviews/claim                  the next item, or null
POST /v1/reviews/{id}/claim, /renew, /release
POST /v1/reviews/{id}/verdict           {"id", "kind", "text"?, "preferred"?, "reason"?, "notes"?}
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from gyrocompass.core.errors import BadInput
from gyrocompass.serve.direct import body_of
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.keys import Keys
from gyrocompass.serve.review import Conflict, Reviews, Verdict
from gyrocompass.serve.wire import read


class VerdictRequest(BaseModel):
    """What one person says."""

    id: str = Field(min_length=1, max_length=100)
    kind: Literal["approve", "edit", "reject", "unsafe", "prefer"]
    text: str | None = None
    preferred: int | None = Field(default=None, ge=0)
    reason: str = Field(default="", max_length=1000)
    notes: str = Field(default="", max_length=10_000)


def review_router(reviews: Reviews, keys: Keys | None) -> APIRouter:
    """The routes.

    Args:
        reviews: the queue.
        keys: who may; None: everybody, as "local".
    """
    router = APIRouter()

    async def who(request: Request, scope: str) -> str:
        if keys is None:
            return "local"
        caller = await keys.admit(request.headers.get("authorization"), scope)
        return f"{caller.name} ({caller.id})"

    @router.get("/v1/reviews/{review_id}")
    async def status(request: Request, review_id: str) -> Response:
        await who(request, "infer")
        return JSONResponse((await _done(reviews.status, review_id))._asdict())

    @router.get("/v1/reviews")
    async def listed(request: Request, state: str | None = None) -> Response:
        await who(request, "review")
        items = await _done(reviews.listed, state)
        return JSONResponse({"counts": await _done(reviews.counts), "data": [_shown(item) for item in items]})

    @router.post("/v1/reviews/claim")
    async def claim(request: Request) -> Response:
        item = await _done(reviews.claim, await who(request, "review"))
        return JSONResponse(None if item is None else _shown(item))

    @router.post("/v1/reviews/{review_id}/claim")
    async def claim_one(request: Request, review_id: str) -> Response:
        return JSONResponse(_shown(await _done(reviews.claim_one, review_id, await who(request, "review"))))

    @router.post("/v1/reviews/{review_id}/renew")
    async def renew(request: Request, review_id: str) -> Response:
        until = await _done(reviews.renew, review_id, await who(request, "review"))
        return JSONResponse({"lease_until": until})

    @router.post("/v1/reviews/{review_id}/release")
    async def release(request: Request, review_id: str) -> Response:
        await _done(reviews.release, review_id, await who(request, "review"))
        return JSONResponse({"released": True})

    @router.post("/v1/reviews/{review_id}/verdict")
    async def verdict(request: Request, review_id: str) -> Response:
        body = await body_of(request)
        by = await who(request, "review")
        said = Verdict(**read(VerdictRequest, body).model_dump())
        return JSONResponse((await _done(reviews.decide, review_id, by, said))._asdict())

    return router


async def _done(function: Any, *arguments: Any) -> Any:
    """What a function of the queue gives, off the loop; its refusals as failures."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except Conflict as error:
        raise Failure(409, str(error), code="conflict") from error
    except BadInput as error:
        raise Failure(404 if "there is no review" in error.what else 400, str(error)) from error


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    """An item without what is not for reviewers."""
    return {name: value for name, value in item.items() if not name.startswith("webhook")}
