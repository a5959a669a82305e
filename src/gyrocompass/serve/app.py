"""The server as an ASGI app.

    make_app(services, settings) --> FastAPI

`Services` says what it is made of: a backend that writes, a gate, a log, keys, more routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gyrocompass import __version__
from gyrocompass.serve.about_routes import AboutRoutes
from gyrocompass.serve.direct import Direct
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.metrics import Metrics
from gyrocompass.serve.routes import Routes
from gyrocompass.serve.services import ServeSettings, Services
from gyrocompass.serve.surface import Receive, Scope, Send, Surface
from gyrocompass.serve.wire import BODIES


def make_app(services: Services, settings: ServeSettings) -> FastAPI:
    """The app, ready for an ASGI server; `/v1/*`, the tokenizer's routes, health and metrics."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(run()) for run in services.background]
        yield
        for task in tasks:
            task.cancel()
        await services.ways.close()
        for close in services.on_close:
            await close()

    app = _App(title="Gyrocompass", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics()
    app.state.metrics = metrics
    app.add_exception_handler(Failure, _failed)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(Exception, _crashed)
    # Routes as they are: what `include_router` wraps them in is looked through at every request.
    own = (Routes(services, settings, metrics).router(), AboutRoutes(services, metrics).router())
    for router in (*own, *services.routers):
        app.router.routes.extend(router.routes)
    direct = {route.path: route.endpoint for route in app.routes if isinstance(route, Direct)}
    app.surface = Surface(app.behind, metrics=metrics, max_body_bytes=settings.max_body_bytes, direct=direct)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class _App(FastAPI):
    """FastAPI behind a surface, which sees every request first."""

    surface: Surface

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.surface(scope, receive, send)

    async def behind(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What the surface hands on."""
        await super().__call__(scope, receive, send)


async def _failed(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, Failure)
    return JSONResponse(failure.body(), failure.status, dict(failure.headers()))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    failure = Failure(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(failure.body(), error.status_code, dict(error.headers or {}))


async def _crashed(request: Request, error: Exception) -> Response:
    failure = Failure(500, f"an error of ours; the log has it under {request.scope.get('gyro_id')}")
    return JSONResponse(failure.body(), 500)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the schemas of bodies that handlers read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for kind in BODIES:
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[kind.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema
