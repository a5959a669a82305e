"""The pages over HTTP: sessions, forms that cannot be forged, and nothing from elsewhere.

    /login /logout   a session from an API key; without keys everybody on this machine has one
    /overview /review /review/{id} /models /report/{run}/{page} /runs /playground

What a model wrote goes into a page as text alone. The content policy forbids inline scripts and styles and
any other host; pages of reports, which have their own styles, are shown without scripts.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.serve.answer import Answered, Judgement
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.keys import Caller, Keys
from gyrocompass.serve.pages import charts, figures
from gyrocompass.serve.review import Reviews, Verdict
from gyrocompass.serve.sessions import COOKIE, Session, Sessions

_STATIC = Path(__file__).parent / "static"
_FILES = {"htmx.min.js": "text/javascript", "pages.js": "text/javascript", "pages.css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_LOCAL = Caller("local", "local", "", ("infer", "review", "admin"))

Ask = Callable[[str, int, float], Awaitable[tuple[Answered, Judgement | None]]]
"""A prompt, most tokens and a temperature to an answer: for the playground."""


def pages_router(
    store: Store, reviews: Reviews, sessions: Sessions, keys: Keys | None, ask: Ask
) -> APIRouter:
    """All pages.

    Args:
        store: what they show.
        reviews: the queue.
        sessions: of the people at the pages.
        keys: that they log in with; None: everybody is "local".
        ask: answers the playground.
    """
    router = APIRouter(include_in_schema=False)
    pages = _Pages(store, reviews, sessions, keys, ask)
    shown: list[tuple[str, Callable[..., Any]]] = [
        ("/", pages.root),
        ("/login", pages.login),
        ("/overview", pages.overview),
        ("/review", pages.review),
        ("/review/{review_id}", pages.item),
        ("/models", pages.models),
        ("/report/{run}/{page}", pages.report),
        ("/runs", pages.runs),
        ("/playground", pages.playground),
        ("/static/{name}", pages.static),
    ]
    posted: list[tuple[str, Callable[..., Any]]] = [
        ("/login", pages.log_in),
        ("/logout", pages.log_out),
        ("/review/next", pages.next_item),
        ("/review/{review_id}/{act}", pages.act),
        ("/playground", pages.play),
    ]
    for method, routes in (("GET", shown), ("POST", posted)):
        for path, handler in routes:
            router.add_api_route(path, handler, methods=[method])
    return router


class _Pages:
    """The handlers."""

    def __init__(
        self, store: Store, reviews: Reviews, sessions: Sessions, keys: Keys | None, ask: Ask
    ) -> None:
        self._store, self._reviews, self._sessions, self._keys, self._ask = (
            store,
            reviews,
            sessions,
            keys,
            ask,
        )
        self._templates = Environment(
            loader=PackageLoader("gyrocompass.serve.pages", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"share": _share, "seconds": _seconds, "interval": _interval}

    async def root(self, request: Request) -> Response:
        """The first page."""
        return RedirectResponse("/overview", 303)

    async def static(self, request: Request, name: str) -> Response:
        """A file that pages need."""
        if name not in _FILES:
            raise Failure(404, f"there is no file {name!r}")
        return FileResponse(
            _STATIC / name, media_type=_FILES[name], headers={"Cache-Control": "max-age=3600"}
        )

    async def login(self, request: Request) -> Response:
        """Where a key is asked for."""
        if self._keys is None:
            return RedirectResponse("/overview", 303)
        return self._page("login.html.j2", None, {"wrong": ""}, request)

    async def log_in(self, request: Request) -> Response:
        """Begin a session."""
        form = await _form(request)
        if self._keys is None:
            return RedirectResponse("/overview", 303)
        try:
            caller = await asyncio.to_thread(self._keys.caller, form.get("key", "").strip())
        except Failure:
            return self._page("login.html.j2", None, {"wrong": "This key does not work."}, request, 401)
        response = RedirectResponse("/overview", 303)
        self._give_cookie(response, self._sessions.begin(caller), request)
        return response

    async def log_out(self, request: Request) -> Response:
        """End a session."""
        await self._posted(request, None)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response

    async def overview(self, request: Request) -> Response:
        """How the server does."""
        days = _number(request.query_params.get("days"), 7.0, 90.0)

        async def content() -> dict[str, Any]:
            found = await asyncio.to_thread(figures.overview, self._store, days)
            labels = [f"{tenth / 10:.1f}" for tenth in range(1, 11)]
            return {
                "found": found,
                "traffic": charts.lines({"requests": found.by_hour}, "Requests per hour, by hours ago"),
                "confidence": charts.bars(found.confidence, labels, "Answers by confidence"),
                "queue": await asyncio.to_thread(self._reviews.counts),
            }

        return await self._shown(request, "overview.html.j2", "review", content)

    async def review(self, request: Request) -> Response:
        """The queue."""

        async def content() -> dict[str, Any]:
            state = request.query_params.get("state", "waiting")
            if state not in ("waiting", "claimed", "decided"):
                state = "waiting"
            return {
                "items": await asyncio.to_thread(self._reviews.listed, state),
                "counts": await asyncio.to_thread(self._reviews.counts),
                "state": state,
            }

        return await self._shown(request, "review.html.j2", "review", content)

    async def item(self, request: Request, review_id: str) -> Response:
        """One item."""

        async def content() -> dict[str, Any]:
            return await self._item(review_id)

        return await self._shown(request, "item.html.j2", "review", content)

    async def next_item(self, request: Request) -> Response:
        """Claim the next one, and go there."""
        session, _ = await self._posted(request, "review")
        item = await asyncio.to_thread(self._reviews.claim, session.by)
        return RedirectResponse("/review" if item is None else f"/review/{item['id']}", 303)

    async def act(self, request: Request, review_id: str, act: str) -> Response:
        """Claim, release, or decide."""
        session, form = await self._posted(request, "review")
        try:
            if act == "claim":
                await asyncio.to_thread(self._reviews.claim_one, review_id, session.by)
            elif act == "release":
                await asyncio.to_thread(self._reviews.release, review_id, session.by)
                return RedirectResponse("/review", 303)
            elif act == "verdict":
                await asyncio.to_thread(self._reviews.decide, review_id, session.by, _verdict(form))
                return RedirectResponse("/review", 303)
            else:
                raise Failure(404, f"there is no act {act!r}")
        except BadInput as error:  # somebody else was first, or something is missing: said on the page
            content = await self._item(review_id)
            return self._page("item.html.j2", session, content | {"wrong": error.what}, request, 409)
        return RedirectResponse(f"/review/{review_id}", 303)

    async def models(self, request: Request) -> Response:
        """The models of the store."""

        async def content() -> dict[str, Any]:
            return {
                "versions": await asyncio.to_thread(figures.registered, self._store),
                "models": await asyncio.to_thread(figures.models, self._store),
                "reports": await asyncio.to_thread(figures.reports, self._store),
            }

        return await self._shown(request, "models.html.j2", "review", content)

    async def report(self, request: Request, run: str, page: str) -> Response:
        """A page that a run wrote."""
        if self._session(request) is None:
            return RedirectResponse("/login", 303)
        path = await asyncio.to_thread(figures.report_path, self._store, f"{run}/{page}")
        if path is None:
            raise Failure(404, "there is no such report")
        return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": _REPORT_POLICY})

    async def runs(self, request: Request) -> Response:
        """How trainings go."""

        async def content() -> dict[str, Any]:
            found = await asyncio.to_thread(figures.curves, self._store)
            drawn = [
                (
                    curve,
                    charts.lines(curve.slices, f"Nats per token by step: {curve.name}"),
                    sorted(curve.slices),
                )
                for curve in found
            ]
            return {"curves": drawn}

        return await self._shown(request, "runs.html.j2", "review", content)

    async def playground(self, request: Request) -> Response:
        """Where one asks and sees every token."""

        async def content() -> dict[str, Any]:
            return {"prompt": "", "tokens": None, "judgement": None, "wrong": "", "limit": 64, "warmth": 0.7}

        return await self._shown(request, "playground.html.j2", "infer", content)

    async def play(self, request: Request) -> Response:
        """Ask."""
        session, form = await self._posted(request, "infer")
        prompt = form.get("prompt", "")
        limit = int(_number(form.get("limit"), 64, 1024))
        warmth = _number(form.get("warmth"), 0.7, 2.0)
        content: dict[str, Any] = {"prompt": prompt, "limit": limit, "warmth": warmth, "wrong": ""}
        content |= {"tokens": None, "judgement": None}
        try:
            answered, judgement = await self._ask(prompt, limit, warmth)
            content |= {"tokens": tinted(answered), "judgement": judgement}
        except Failure as failure:
            content["wrong"] = failure.message
        return self._page("playground.html.j2", session, content, request)

    async def _item(self, review_id: str) -> dict[str, Any]:
        try:
            item = await asyncio.to_thread(self._reviews.item, review_id)
        except BadInput as error:
            raise Failure(404, error.what) from error
        tokens = [
            _tint(text, logprob, [(other, p) for other, p in others if p is not None])
            for text, logprob, others in item["tokens"]
        ]
        return {"item": item, "tokens": tokens, "wrong": "", "verdict_id": secrets.token_hex(16)}

    async def _shown(
        self,
        request: Request,
        template: str,
        scope: str,
        content: Callable[[], Awaitable[dict[str, Any]]],
    ) -> Response:
        session = self._session(request)
        if session is None:
            return RedirectResponse("/login", 303)
        if not session.may(scope):
            raise Failure(403, f"this key may not do this: it lacks the scope {scope}")
        return self._page(template, session, await content(), request)

    def _session(self, request: Request) -> Session | None:
        session = self._sessions.read(request.cookies.get(COOKIE))
        if session is None and self._keys is None:
            request.state.fresh = self._sessions.begin(_LOCAL)
            return self._sessions.read(request.state.fresh)
        return session

    async def _posted(self, request: Request, scope: str | None) -> tuple[Session, dict[str, str]]:
        """The session and the fields of a form that is one of ours.

        Raises:
            Failure: 403 without a session, its scope, or its token.
        """
        form = await _form(request)
        session = self._sessions.read(request.cookies.get(COOKIE))
        if session is None or not self._sessions.is_token(session, form.get("token")):
            raise Failure(403, "this form is not of your session: load the page again")
        if scope is not None and not session.may(scope):
            raise Failure(403, f"this key may not do this: it lacks the scope {scope}")
        return session, form

    def _page(
        self,
        template: str,
        session: Session | None,
        content: Mapping[str, Any],
        request: Request,
        status: int = 200,
    ) -> Response:
        token = "" if session is None else self._sessions.token(session)
        html = self._templates.get_template(template).render(
            session=session, token=token, here=request.url.path, open=self._keys is None, **content
        )
        response = HTMLResponse(html, status)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Cache-Control"] = "no-store"
        fresh = getattr(request.state, "fresh", None)
        if fresh is not None:
            self._give_cookie(response, fresh, request)
        return response

    def _give_cookie(self, response: Response, value: str, request: Request) -> None:
        response.set_cookie(
            COOKIE, value, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/"
        )


def tinted(answered: Answered) -> list[dict[str, Any]]:
    """The tokens of an answer, each with the class of its probability."""
    return [_tint(token.text, token.logprob, list(token.alternatives)) for token in answered.tokens]


def _tint(text: str, logprob: float | None, others: list[tuple[str, float]]) -> dict[str, Any]:
    """Six classes: 0 is likely, 5 is hardly."""
    p = None if logprob is None or math.isnan(logprob) else math.exp(logprob)
    bounds = (0.5, 0.2, 0.05, 0.01, 0.001)
    return {
        "text": text,
        "p": p,
        "class": 0 if p is None else sum(p < bound for bound in bounds),
        "others": [(other, math.exp(value)) for other, value in others],
    }


def _verdict(form: Mapping[str, str]) -> Verdict:
    kind = form.get("kind", "")
    if kind not in ("approve", "edit", "reject", "unsafe", "prefer"):
        raise BadInput("choose a verdict")
    preferred = form.get("preferred", "")
    return Verdict(
        form.get("verdict_id", ""),
        kind,  # type: ignore[arg-type]  # one of the five
        form.get("text", "").replace("\r\n", "\n") if kind == "edit" else None,
        int(preferred) if kind == "prefer" and preferred.isdecimal() else None,
        form.get("reason", "")[:1000],
        form.get("notes", "")[:10_000],
    )


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name."""
    body = (await request.body()).decode("utf-8", errors="replace")
    return {name: values[-1] for name, values in parse_qs(body, keep_blank_values=True).items()}


def _number(text: str | None, default: float, most: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return default
    return min(value, most) if math.isfinite(value) and value >= 0 else default


def _share(value: float) -> str:
    return f"{value:.1%}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _interval(estimate: Any) -> str:
    if math.isnan(estimate.value):
        return "–"
    if estimate.low is None:
        return _share(estimate.value)
    return f"{_share(estimate.value)} ({_share(estimate.low)} to {_share(estimate.high)})"
