"""Lanes that follow a registry: what answers changes under running requests, and none of them notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from parrot import Parrot

from gyrocompass.core.config import parse
from gyrocompass.core.errors import GyroError
from gyrocompass.core.store import Store
from gyrocompass.govern.promote import PromotionRule, promote
from gyrocompass.govern.registry import register, roll_back
from gyrocompass.govern.rollout import RolloutPlan, rollouts, running, start, stop
from gyrocompass.recipe.serving import settle_on, wanted_of
from gyrocompass.serve import following as module
from gyrocompass.serve.app import make_app
from gyrocompass.serve.assembly import assemble, make_lane
from gyrocompass.serve.events import read_events
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.following import Following, Version, Wanted
from gyrocompass.serve.policy import Policy
from gyrocompass.serve.review import Reviews
from gyrocompass.serve.services import Lane, ServeSettings

ANN = parse(PromotionRule, {"name": "r", "clauses": [{"kind": "approval", "by": ["ann"]}]}, "rule")
GUARDRAILS = [{"measure": "failed", "margin": 0.1}]


class Served:
    """A registry with three versions, and a server whose backends are parrots by version."""

    def __init__(self, folder: Path, serve: Callable[[Any], str], store_url: str | None) -> None:
        self.store = Store(folder / "store", store_url)
        for text in "abc":
            with self.store.create(f"model{text}", "model") as draft:
                (draft.path / "x").write_text(text)
            register(self.store, "m", draft.artifact.id, "ann")
        promote(self.store, "m", 1, ANN, "ann", ["ann"])
        self.parrots = {n: Parrot() for n in (1, 2, 3)}
        self.opened: list[tuple[int, bool]] = []
        self.fails = False
        self.policies: dict[int, Policy] = {}
        self.ways = Following(self.look, self.open_lane)
        self.ways.open()
        background = (self.ways.run, lambda: settle_on(self.store, "m"))
        services = assemble(self.store, self.ways, background=background)
        self.url = serve(make_app(services, ServeSettings(user_secret="s")))

    def look(self) -> Wanted:
        if self.fails:
            raise GyroError("the store's database does not work")
        return wanted_of(self.store, "m")

    def open_lane(self, version: Version, hidden: bool) -> Lane:
        self.opened.append((version.version, hidden))
        lineage = {"model": f"model-{version.version}"}
        queue = None if hidden else Reviews(self.store.database)
        policy = self.policies.get(version.version)
        return make_lane(
            self.store, self.parrots[version.version], policy=policy, queue=queue, lineage=lineage
        )

    def ask(self, text: str = "hello", user: str = "") -> tuple[int, str]:
        body = {"messages": [{"role": "user", "content": text}], "user": user or None}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)
        told = answer.json()
        return answer.status_code, told["lineage"]["model"] if answer.status_code == 200 else ""

    def until(self, model: str, seconds: float = 10.0) -> float:
        """How long it takes until a model answers."""
        began = time.monotonic()
        while self.ask()[1] != model:
            assert time.monotonic() - began < seconds, f"{model} does not come"
            time.sleep(0.02)
        return time.monotonic() - began

    def events(self, least: int) -> list[dict[str, Any]]:
        """Logged events, once there are so many."""
        until = time.monotonic() + 10
        while len(found := list(read_events(self.store.database))) < least:
            assert time.monotonic() < until, f"{len(found)} events"
            time.sleep(0.05)
        return found


@pytest.fixture
def server(tmp_path: Path, store_url: str | None, served: Callable[[Any], str]) -> Iterator[Served]:
    yield Served(tmp_path, served, store_url)


def test_a_rollback_loses_no_request_and_takes_less_than_two_seconds(server: Served) -> None:
    promote(server.store, "m", 2, ANN, "ann", ["ann"])
    server.until("model-2")
    assert server.parrots[1].closed is False  # kept ready for the way back
    for parrot in server.parrots.values():
        parrot.pause_s = 0.1
    stop_asking = threading.Event()

    def keep_asking(n: int) -> list[tuple[float, float, int, str]]:
        time.sleep(0.15 * n)  # an answer takes a second: some are always in their middle
        seen = []
        while not stop_asking.is_set():
            began = time.monotonic()
            status, model = server.ask("0123456789")
            seen.append((began, time.monotonic(), status, model))
        return seen

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, n) for n in range(8)]
        time.sleep(1.5)
        back_at = time.monotonic()
        roll_back(server.store, "m", "ann")
        time.sleep(3.5)
        stop_asking.set()
        seen = [one for future in asking for one in future.result()]
    assert {status for *_, status, _ in seen} == {200}
    late = [model for began, *_, model in seen if began > back_at + 2.0]
    assert late and set(late) == {"model-1"}
    before = [(ended, model) for began, ended, _, model in seen if began < back_at - 0.1]
    assert {model for _, model in before} == {"model-2"}  # as they began, and some of them ended after
    assert max(ended for ended, _ in before) > back_at


def test_a_canary_is_sticky_and_is_taken_back_when_it_fails(server: Served) -> None:
    plan = parse(RolloutPlan, {"mode": "ab", "share": 0.5, "guardrails": GUARDRAILS}, "plan")
    rollout = start(server.store, "m", 2, plan, "ann")
    users = [f"user {n}" for n in range(30)]
    until = time.monotonic() + 10
    while {server.ask(user=user)[1] for user in users[:10]} != {"model-1", "model-2"}:
        assert time.monotonic() < until
    first = {user: server.ask(user=user)[1] for user in users}
    assert {user: server.ask(user=user)[1] for user in users} == first
    assert server.ask()[1] == "model-1"  # who is not known takes no part
    stop(server.store, "m", "ann")
    rollout = start(server.store, "m", 2, plan, "ann")
    server.parrots[2].failure = Failure(503, "broken")
    for n in range(200):
        server.ask(user=f"other {n}")
        if running(server.store, "m") is None:
            break
        time.sleep(0.02)
    until = time.monotonic() + 10
    while rollouts(server.store, "m")[-1].state == "running" and time.monotonic() < until:
        time.sleep(0.1)
    ended = rollouts(server.store, "m")[-1]
    assert ended.id == rollout.id and ended.state == "rolled back" and "failed: 100.0%" in ended.why
    time.sleep(4 * module.POLL_S)
    assert {server.ask(user=f"new {n}")[0] for n in range(20)} == {200}


def test_a_shadow_answers_and_nobody_sees_it(server: Served) -> None:
    block_all = parse(Policy, {"name": "p", "rules": [], "otherwise": "review"}, "p")
    server.policies[2] = block_all
    guardrails = [{"measure": "not_answered", "margin": 0.1}]
    plan = parse(RolloutPlan, {"mode": "shadow", "guardrails": guardrails}, "plan")
    rollout = start(server.store, "m", 2, plan, "ann")
    until = time.monotonic() + 10
    while (2, True) not in server.opened:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(3 * module.POLL_S)
    assert {server.ask(user=f"u{n}") for n in range(5)} == {(200, "model-1")}
    events = [one for one in server.events(10) if one["rollout"] == rollout.id]
    assert sorted({(one["arm"], one["model"], one["outcome"]) for one in events}) == [
        ("champion", "model-1", ""),
        ("shadow", "model-2", "abstain"),  # no person is asked to decide on what nobody sees
    ]
    assert Reviews(server.store.database).listed(None) == []


def test_what_is_served_outlives_a_database_and_a_version_that_does_not_open(
    server: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    server.fails = True
    time.sleep(3 * module.POLL_S)
    assert server.ask() == (200, "model-1")
    server.fails = False
    promote(server.store, "m", 2, ANN, "ann", ["ann"])
    server.until("model-2")
    promote(server.store, "m", 3, ANN, "ann", ["ann"])
    server.until("model-3")
    until = time.monotonic() + 10
    while not server.parrots[1].closed:  # two champions ago
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not server.parrots[2].closed
    assert "what is served stays as it is" in caplog.text


def test_thumbs_reach_the_database(server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    told = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    for thumb in ("up", "down"):
        found = httpx.post(f"{server.url}/v1/feedback", json={"id": told["id"], "thumb": thumb})
        assert found.status_code == 200 and found.json()["id"] == told["id"].removeprefix("chatcmpl-")
    wrong = httpx.post(f"{server.url}/v1/feedback", json={"id": "x", "thumb": "up"})
    assert wrong.status_code == 400 and "id" in wrong.json()["error"]["message"]
