"""The whole server, from a question to the record that the next model learns from."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import answered, asked
from parrot import Parrot
from starlette.testclient import TestClient

from gyrocompass.core.config import parse
from gyrocompass.core.database import Database
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.serve.app import make_app
from gyrocompass.serve.assembly import assemble, make_lane
from gyrocompass.serve.dry_run import dry_run
from gyrocompass.serve.events import EventSettings, read_events
from gyrocompass.serve.keys import create_key
from gyrocompass.serve.policy import Policy
from gyrocompass.serve.review import Reviews, ReviewSettings, Verdict
from gyrocompass.serve.services import OneWay, ServeSettings
from gyrocompass.serve.webhooks import Webhooks

POLICY = parse(
    Policy,
    {
        "name": "p",
        "scorers": [{"kind": "patterns", "name": "bad", "deny": ["bomb"]}, {"kind": "own", "name": "own"}],
        "rules": [
            {"when": {"flag": "input.bad"}, "then": "block"},
            {"when": {"prompt_matches": "poem"}, "then": "review"},
        ],
    },
    "policy",
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def key(store: Store) -> dict[str, str]:
    return {"Authorization": f"Bearer {create_key(store.database, 'ann', ['infer', 'review'])}"}


@pytest.fixture
def client(store: Store, key: dict[str, str]) -> Iterator[TestClient]:
    once = ReviewSettings(double_share=0.0)
    queue = Reviews(store.database, once)
    lane = make_lane(store, Parrot(), policy=POLICY, queue=queue, lineage={"model": "m-1"})
    services = assemble(store, OneWay(lane), reviews=once, events=EventSettings(texts="full"))
    with TestClient(make_app(services, ServeSettings())) as client:
        yield client


def ask(client: TestClient, key: dict[str, str], text: str, **more: Any) -> Any:
    said = {"messages": [{"role": "user", "content": text}], "consent": True, **more}
    response = client.post("/v1/chat/completions", json=said, headers=key)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_from_a_question_to_a_record(client: TestClient, key: dict[str, str], store: Store) -> None:
    assert client.post("/v1/chat/completions", json={}).status_code == 401
    assert ask(client, key, "bomb")["gate"]["decision"] == "block"
    shown = ask(client, key, "hello")
    assert shown["message"]["content"] == "hello" and shown["gate"]["flags"]["output.own"] > 0
    held = ask(client, key, "a poem")
    assert held["finish_reason"] == "content_filter" and "poem" not in held["message"]["content"]
    name = held["gate"]["review_id"]
    assert client.get(f"/v1/reviews/{name}", headers=key).json()["state"] == "waiting"
    listed = client.get("/v1/reviews?state=waiting", headers=key).json()
    assert listed["counts"]["waiting"] == 1 and listed["data"][0]["id"] == name
    verdict = {"id": "v-1", "kind": "edit", "text": "A rhyme."}
    refused = client.post(f"/v1/reviews/{name}/verdict", json=verdict, headers=key)
    assert refused.status_code == 409 and "claim" in refused.json()["error"]["message"]
    claimed = client.post("/v1/reviews/claim", headers=key).json()
    assert claimed["id"] == name and all(len(others) == 2 for _, _, others in claimed["tokens"])
    assert client.post(f"/v1/reviews/{name}/renew", headers=key).json()["lease_until"] > 0
    assert client.post(f"/v1/reviews/{name}/release", headers=key).status_code == 200
    assert client.post(f"/v1/reviews/{name}/claim", headers=key).json()["claimed_by"].startswith("ann")
    for _ in range(2):
        decided = client.post(f"/v1/reviews/{name}/verdict", json=verdict, headers=key)
        assert decided.json() == {"id": name, "state": "decided", "verdict": "edit", "text": "A rhyme."}
    assert client.post("/v1/reviews/claim", headers=key).json() is None
    assert client.get("/v1/reviews/none", headers=key).status_code == 404
    wrong = client.post(f"/v1/reviews/{name}/verdict", json={"id": "v", "kind": "praise"}, headers=key)
    assert wrong.status_code == 400
    flagged = client.post("/v1/moderations", json={"input": "bomb"}, headers=key).json()["results"][0]
    assert flagged["flagged"] and flagged["category_scores"]["bad"] == 1.0


def test_the_log_has_it_and_a_policy_can_be_tried_on_it(store: Store, key: dict[str, str]) -> None:
    queue = Reviews(store.database)
    lane = make_lane(store, Parrot(), policy=POLICY, queue=queue, lineage={"model": "m"})
    services = assemble(store, OneWay(lane), events=EventSettings(texts="full"))
    with TestClient(make_app(services, ServeSettings())) as client:
        for text in ("bomb", "hello", "hello you"):
            ask(client, key, text, slice="greeting", user="bob")
    events = list(read_events(store.database))
    assert [event["outcome"] for event in events] == ["block", "answer", "answer"]
    assert {event["slice"] for event in events} == {"greeting"}
    assert len({event["user"] for event in events}) == 1 and "bob" not in events[0]["user"]
    other = parse(Policy, {"name": "o", "rules": [{"when": {"tokens_above": 6}, "then": "block"}]}, "o")
    found = dry_run(other, events, None)
    assert (found.judged, found.unknown, dict(found.changed)) == (
        3,
        0,
        {("answer", "block"): 1, ("block", "answer"): 1},
    )
    assert found.after["block"].low < 1 / 3 < found.after["block"].high
    bare = [event | {"prompt": None, "text": None} for event in events]
    looks = parse(Policy, {"name": "l", "rules": [{"when": {"prompt_matches": "x"}, "then": "block"}]}, "l")
    assert dry_run(looks, bare, None)[:2] == (0, 3)


def test_other_machines_need_keys(store: Store) -> None:
    with pytest.raises(BadInput, match="needs keys, and there are none"):
        assemble(store, OneWay(make_lane(store, Parrot())), open_to_all=False)


def test_a_promise_that_nothing_keeps_is_refused(store: Store) -> None:
    promising = parse(
        Policy,
        {
            "name": "p",
            "calibrator": "calibration-none",
            "promise": {"risk": 0.02},
            "rules": [{"when": {"guaranteed": False}, "then": "review"}],
        },
        "p",
    )
    with pytest.raises(BadInput, match="calibration-none"):
        make_lane(store, Parrot(), policy=promising)


class Hook:
    """Fails as often as it is told, and remembers what came."""

    def __init__(self, fails: int) -> None:
        self.fails, self.came = fails, list[tuple[str, bytes, dict[str, str]]]()

    async def __call__(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        self.came.append((url, body, headers))
        if len(self.came) == 1 and self.fails:
            raise OSError("no such host")
        return 500 if len(self.came) <= self.fails else 204


def test_who_waits_is_called_until_it_answers(database: Database) -> None:
    reviews = Reviews(database, ReviewSettings(double_share=0.0))
    question = asked(webhook="https://example.org/hook")
    name = asyncio.run(reviews.put(question, answered(), ["doubt"], None, 1.0))
    quiet = asyncio.run(reviews.put(question, answered(), ["audit"], None, 0.1, urgent=False))
    now, hook = [1e12], Hook(fails=3)
    hooks = Webhooks(database, reviews.status, b"secret", hook, lambda: now[0])
    assert asyncio.run(hooks.call_all()) == 0 and not hook.came
    for one in (name, quiet):
        reviews.claim_one(one, "ann")
        reviews.decide(one, "ann", Verdict(f"v-{one}", "approve"))
    reached = []
    for _ in range(6):
        # A new object each time, as after a restart: what is due stands in the database.
        hooks = Webhooks(database, reviews.status, b"secret", hook, lambda: now[0])
        reached.append(asyncio.run(hooks.call_all()))
        now[0] += 10
    assert reached == [0, 0, 0, 1, 0, 0] and len(hook.came) == 4
    url, body, headers = hook.came[-1]
    assert url == "https://example.org/hook"
    assert json.loads(body) == {"id": name, "state": "decided", "verdict": "approve", "text": "four"}
    assert headers["X-Gyro-Signature"] == f"sha256={hmac.new(b'secret', body, hashlib.sha256).hexdigest()}"
