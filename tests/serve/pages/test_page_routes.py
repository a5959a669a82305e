"""Pages as a browser asks for them: who may, what is forged, and what a model cannot do to them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import answered, asked
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parrot import Parrot
from starlette.testclient import TestClient

from databases import copied
from gyrocompass.core.config import parse
from gyrocompass.core.store import Store
from gyrocompass.govern.promote import PromotionRule, promote
from gyrocompass.govern.registry import register
from gyrocompass.govern.rollout import RolloutPlan, start
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.run import read_run
from gyrocompass.serve.answer import Token
from gyrocompass.serve.app import make_app
from gyrocompass.serve.assembly import assemble, make_lane
from gyrocompass.serve.events import EventLog, EventSettings
from gyrocompass.serve.keys import create_key
from gyrocompass.serve.pages.charts import bars, lines
from gyrocompass.serve.pages.figures import overview
from gyrocompass.serve.review import Reviews, ReviewSettings
from gyrocompass.serve.services import OneWay, ServeSettings
from tiny_recipe import FinishedRun

ONCE = ReviewSettings(double_share=0.0)


def app_of(store: Store) -> FastAPI:
    ways = OneWay(make_lane(store, Parrot()))
    return make_app(assemble(store, ways, reviews=ONCE), ServeSettings())


PAGES = ("/overview", "/review", "/models", "/runs", "/playground")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(app_of(store)) as client:
        yield client


@pytest.fixture
def locked(store: Store) -> Iterator[tuple[TestClient, str, str]]:
    """A server with keys: one that may review, one that may only ask."""
    keys = [create_key(store.database, name, [name]) for name in ("review", "infer")]
    with TestClient(app_of(store)) as client:
        yield client, keys[0], keys[1]


def put(store: Store, text: str = "four", question: str = "two and two?") -> str:
    item = Reviews(store.database, ONCE).put(asked(question), answered(text), ["doubt"], None, 1.0)
    return asyncio.run(item)


def token_of(html: str) -> str:
    found = re.search(r'name="token" value="([0-9a-f]+)"', html)
    assert found is not None
    return found[1]


def test_every_page_is_there_and_closed_to_others(client: TestClient) -> None:
    for path in PAGES:
        response = client.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "<script>" not in response.text and "style=" not in response.text
        assert re.findall(r'(?:src|href)="(?!/|data:,|#)[^"]*"', response.text) == []
    assert client.get("/", follow_redirects=False).headers["location"] == "/overview"
    for name in ("htmx.min.js", "pages.js", "pages.css"):
        assert client.get(f"/static/{name}").status_code == 200
    for path in ("/static/routes.py", "/static/..%2f__init__.py", "/report/x/y", "/report/..%2f..%2f/serve"):
        assert client.get(path).status_code == 404


def test_keys_are_asked_for(locked: tuple[TestClient, str, str]) -> None:
    client, reviewing, asking = locked
    for path in (*PAGES, "/review/x"):
        assert client.get(path, follow_redirects=False).headers["location"] == "/login"
    assert client.post("/login", data={"key": "gyro_no_no"}).status_code == 401
    response = client.post("/login", data={"key": reviewing}, follow_redirects=False)
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and reviewing not in cookie
    page = client.get("/overview")
    assert page.status_code == 200
    assert client.post("/logout", data={"token": token_of(page.text)}).url.path == "/login"
    assert client.get("/overview", follow_redirects=False).status_code == 303
    client.post("/login", data={"key": asking})
    assert client.get("/playground").status_code == 200
    assert client.get("/review").status_code == 403


def test_forged_forms_do_nothing(client: TestClient, store: Store) -> None:
    name = put(store)
    page = client.get("/review")
    good = token_of(page.text)
    for token in ({}, {"token": ""}, {"token": "0" * 64}):
        assert client.post("/review/next", data=token).status_code == 403
    assert Reviews(store.database).status(name).state == "waiting"
    cookie = client.cookies["gyro_session"]
    client.cookies.clear()
    assert client.post("/review/next", data={"token": good}).status_code == 403
    client.cookies.set("gyro_session", cookie)
    assert client.post("/review/next", data={"token": good}).url.path == f"/review/{name}"


def test_claim_edit_send(client: TestClient, store: Store) -> None:
    name = put(store)
    item = client.get(f"/review/{name}")
    assert "Claim" in item.text and "Approve" not in item.text
    item = client.post(f"/review/{name}/claim", data={"token": token_of(item.text)})
    verdict = re.search(r'name="verdict_id" value="([0-9a-f]+)"', item.text)
    assert verdict is not None
    form = {"token": token_of(item.text), "verdict_id": verdict[1], "kind": "edit", "text": "four"}
    refused = client.post(f"/review/{name}/verdict", data=form)
    assert refused.status_code == 409 and "the edit is the answer itself" in refused.text
    form["text"] = "It is four."
    assert client.post(f"/review/{name}/verdict", data=form).url.path == "/review"
    assert client.post(f"/review/{name}/verdict", data=form).url.path == "/review"  # sent twice
    assert Reviews(store.database).status(name).text == "It is four."
    assert client.get("/review/none").status_code == 404


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% include 'login.html.j2' %}",
    '"><svg onload=alert(1)>',
    "\u202egnirts\u202c\u0000\x1b[31m",
    "a" * 20_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_said_is_text(client: TestClient, store: Store, text: str) -> None:
    question = asked(text, slice=text[:50], model=text[:50])
    hostile = answered(text)._replace(tokens=[Token(text, 1, -0.1, 0.1, [(text, -0.1), (text, -2.0)])])
    item = Reviews(store.database, ONCE).put(
        question, hostile, [text], None, 1.0, candidates=[text, text + "."]
    )
    name = asyncio.run(item)
    pages = [client.get("/review"), client.get(f"/review/{name}")]
    token = token_of(pages[0].text)
    pages.append(client.post("/playground", data={"token": token, "prompt": text, "limit": "1000"}))
    for page in pages:
        assert page.status_code == 200
        for tag in ("<script>alert", "<img", "<svg onload", "onerror=alert(1)>"):
            assert tag not in page.text
        assert "49" not in re.sub(r"[0-9a-f]{16,}|\d+\.\d+", "", page.text) or "7 * 7" not in text


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(allow_nan=False, width=32), st.floats(width=32)), max_size=8), st.text())
def test_drawings_hold_whatever_is_drawn(points: list[tuple[float, float]], name: str) -> None:
    drawn = lines({name: points}, name) + bars(
        [abs(y) for _, y in points if y == y], [name] * sum(y == y for _, y in points), name
    )
    assert "<script" not in drawn and drawn.count("<svg") == drawn.count("</svg>") >= 1


def test_runs_are_drawn_while_they_go(client: TestClient, store: Store) -> None:
    folder = store.root / "work" / "abc"
    folder.mkdir(parents=True)
    rows = [
        {"step": n, "loss": 3 - n / 10, "nll_nats": {"code": 2.5 - n / 10}, "tokens_per_second": 9.0}
        for n in range(1, 9)
    ]
    lines_ = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines_) + '\n{"step": 9, "lo')
    page = client.get("/runs").text
    assert "running" in page and "loss 2.2000" in page and page.count("<polyline") == 2 and ">code<" in page


def test_reports_of_runs_are_shown_without_scripts(client: TestClient, store: Store) -> None:
    (store.root / "runs" / "demo").mkdir(parents=True)
    (store.root / "runs" / "demo" / "report.html").write_text("<h1>Report</h1>")
    assert 'href="/report/demo/report"' in client.get("/models").text
    page = client.get("/report/demo/report")
    assert page.text == "<h1>Report</h1>" and "sandbox" in page.headers["content-security-policy"]


def test_versions_are_shown_with_aliases_and_trials(client: TestClient, store: Store) -> None:
    for text in "ab":
        with store.create(f"model{text}", "model") as draft:
            (draft.path / "x").write_text(text)
        register(store, "helper", draft.artifact.id, "ann<b>")
    rule = parse(PromotionRule, {"name": "r", "clauses": [{"kind": "approval", "by": ["ann"]}]}, "rule")
    promote(store, "helper", 1, rule, "ann", ["ann"])
    guardrails = [{"measure": "failed", "margin": 0.1}]
    start(store, "helper", 2, parse(RolloutPlan, {"mode": "canary", "guardrails": guardrails}, "plan"), "ann")
    page = client.get("/models").text
    assert "helper:1" in page and "champion" in page and "canary: running" in page
    assert "ann&lt;b&gt;" in page and "ann<b>" not in page


def test_answers_stand_beside_their_models_training(finished_run: FinishedRun, tmp_path: Path) -> None:
    store = Store(copied(finished_run.store, tmp_path / "store"))
    model = next(stage.artifact for stage in read_run(store, "tiny").stages if stage.name == "fine_tuned")
    assert overview(store).beside == []
    ledger = Ledger.load(store.open(model).path / "ledger.parquet")
    learned = ledger.names("slice")[0]
    log = EventLog(store.database, EventSettings())
    for name in ("", learned, "elsewhere"):
        log.record(asked(model=model, slice=name), answered("it is four"), None, 200)
    log.record(asked(model="model-of-another-store"), answered("old")._replace(tokens=()), None, 200)
    log.close()
    found = overview(store).beside
    all_, code, elsewhere = found[0], *sorted(found[1:], key=lambda one: one.slice != learned)
    assert (all_.slice, all_.answers, all_.share, all_.trained_share) == ("", 3, 1.0, 1.0)
    assert all_.trained_surprisal == pytest.approx(ledger.total.value / ledger.total.count)
    assert all_.surprisal == pytest.approx(0.1, abs=0.1) and all_.trained_entropy is not None
    assert code.answers == 1 and 0 < code.trained_share <= 1
    assert elsewhere.trained_share == 0 and elsewhere.trained_surprisal is None
    with TestClient(app_of(store)) as client:
        assert "Beside training" in client.get("/overview").text
