"""Thumbs: whether the user of an answer liked it.

POST /v1/feedback {"id": "chatcmpl-...", "thumb": "up" | "down"}; the last word counts.
"""

from __future__ import annotations

import asyncio
import re
import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gyrocompass.core.database import Database, upsert
from gyrocompass.core.tables_serving import ThumbRow
from gyrocompass.serve.direct import RESPONSES, body_of
from gyrocompass.serve.keys import Keys
from gyrocompass.serve.wire import ThumbRequest, read


def thumbs_router(database: Database, keys: Keys | None) -> APIRouter:
    """The route.

    Args:
        database: of the store.
        keys: who may send them; None: everybody.
    """

    async def feedback(request: Request) -> Response:
        """Keep a thumb."""
        body = await body_of(request)
        if keys is not None:
            await keys.admit(request.headers.get("authorization"), "infer")
        given = read(ThumbRequest, body)
        request_id = re.sub(r"^[a-z]+-", "", given.id)
        row = {"request_id": request_id, "at": time.time(), "up": given.thumb == "up"}

        def store() -> None:
            with database.write() as connection:
                upsert(connection, ThumbRow, [row], renewed=["at", "up"])

        await asyncio.to_thread(store)
        return JSONResponse({"id": request_id, "thumb": given.thumb})

    router = APIRouter()
    reference = {"$ref": f"#/components/schemas/{ThumbRequest.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": reference}}}
    router.add_api_route(
        "/v1/feedback", feedback, methods=["POST"], openapi_extra={"requestBody": body},
        responses=RESPONSES, response_class=JSONResponse,
    )  # fmt: skip
    return router
