"""Routes whose handlers take the request as it is, and what the document says of them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from gyrocompass.serve.failures import Failure
from gyrocompass.serve.surface import Handler

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSED = {"description": "refused", "content": {"application/json": {"schema": _ERROR}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    **dict.fromkeys((400, 401, 403, 404, 413, 429, 502, 503, 504), _REFUSED),
    200: {"description": "answered"},
}


async def body_of(request: Request) -> bytes:
    """The whole body.

    Raises:
        Failure: 499, the client left.
    """
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Failure(499, "the client left")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


class Direct(APIRoute):
    """A route whose handler reads the body itself: `Surface` calls it, past what FastAPI does around one."""


def add_post(router: APIRouter, path: str, handler: Handler, kind: type[BaseModel]) -> None:
    """A route whose handler reads a body of this kind itself."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": reference}}}
    router.add_api_route(
        path, handler, methods=["POST"], openapi_extra={"requestBody": body}, responses=RESPONSES,
        response_class=JSONResponse, route_class_override=Direct,
    )  # fmt: skip
