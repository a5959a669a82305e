"""The queue: nobody gets what another holds, nothing accepted is lost, nothing counts twice."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asking import answered, asked
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gyrocompass.core.database import Database
from gyrocompass.core.errors import BadInput
from gyrocompass.serve.answer import Token
from gyrocompass.serve.events import EventLog, EventSettings, read_events
from gyrocompass.serve.review import Conflict, Reviews, ReviewSettings, Verdict

ONCE = ReviewSettings(double_share=0.0, lease_s=100)


def new_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'reviews.sqlite'}"


def put(reviews: Reviews, text: str = "four", **more: Any) -> str:
    return asyncio.run(reviews.put(asked(), answered(text), ["doubt"], None, 1.0, **more))


def test_an_answer_is_claimed_edited_and_told(database: Database) -> None:
    reviews = Reviews(database, ONCE)
    drawn = put(reviews, urgent=False)
    urgent = put(reviews, "five")
    assert reviews.status(urgent).state == "waiting"
    item = reviews.claim("ann")
    assert item is not None and item["id"] == urgent  # somebody waits for it
    assert item["tokens"] == [["five", -0.1, [["five", -0.1], ["no", -3.0]]]]
    again = reviews.claim("ann")
    assert again is not None and again["id"] == urgent  # what one holds comes first
    with pytest.raises(Conflict, match="somebody else has this item"):
        reviews.claim_one(urgent, "bob")
    with pytest.raises(Conflict, match="the claim is lost"):
        reviews.decide(urgent, "bob", Verdict("v0", "approve"))
    for wrong, message in (
        (Verdict("v1", "edit"), "needs the text"),
        (Verdict("v1", "edit", "five"), "the edit is the answer itself"),
        (Verdict("v1", "approve", "six"), "a text goes with an edit"),
        (Verdict("v1", "prefer", preferred=0), "only one answer"),
        (Verdict("v1", "prefer", preferred=3), "one of 1 answers"),
    ):
        with pytest.raises(BadInput, match=message):
            reviews.decide(urgent, "ann", wrong)
    told = reviews.decide(urgent, "ann", Verdict("v1", "edit", "four", reason="sum"))
    assert (told.state, told.verdict, told.text) == ("decided", "edit", "four")
    assert reviews.decide(urgent, "ann", Verdict("v1", "edit", "four", reason="sum")) == told
    with pytest.raises(Conflict, match="of another item"):
        reviews.decide(drawn, "ann", Verdict("v1", "approve"))
    assert reviews.counts() == {"waiting": 1, "claimed": 0, "decided": 1}
    with pytest.raises(Conflict, match="is decided"):
        reviews.claim_one(urgent, "bob")
    with pytest.raises(BadInput, match="there is no review 'x'"):
        reviews.status("x")


def test_two_look_and_a_third_decides_where_they_differ(database: Database) -> None:
    reviews = Reviews(database, ReviewSettings(double_share=1.0))
    name = put(reviews)
    reviews.claim("ann")
    assert reviews.decide(name, "ann", Verdict("a", "approve")).state == "waiting"
    assert reviews.claim("ann") is None
    with pytest.raises(Conflict, match="you have decided"):
        reviews.claim_one(name, "ann")
    reviews.claim("bob")
    assert reviews.decide(name, "bob", Verdict("b", "reject")).state == "waiting"
    reviews.claim("cy")
    told = reviews.decide(name, "cy", Verdict("c", "approve"))
    assert (told.state, told.verdict, told.text) == ("decided", "approve", "four")


def test_one_of_several_is_preferred(database: Database) -> None:
    reviews = Reviews(database, ONCE)
    name = put(reviews, candidates=["4", "IV"])
    reviews.claim("ann")
    assert reviews.decide(name, "ann", Verdict("v", "prefer", preferred=2)).text == "IV"


def test_whatever_a_model_writes_can_be_kept(database: Database) -> None:
    reviews = Reviews(database, ONCE)
    wild = answered("a\0b \ud800 \u202e")._replace(
        tokens=[Token("\0", 1, -math.inf, None, [("\ud800", -math.inf), ("x", math.nan)])]
    )
    name = asyncio.run(reviews.put(asked("\0"), wild, ["\0"], None, 1.0))
    reviews.claim("ann")
    assert reviews.item(name)["tokens"] == [["\ufffd", None, [["\ufffd", None], ["x", None]]]]
    told = reviews.decide(name, "ann", Verdict("v", "edit", "a\0", notes="\ud800"))
    assert told.text == "a\ufffd"
    log = EventLog(database, EventSettings(texts="full"))
    log.record(asked("\0"), wild, None, 200)
    log.close()
    (event,) = read_events(database)
    assert event["text"].startswith("a\ufffdb") and log.dropped == 0


def test_many_at_once_get_different_items(database: Database) -> None:
    reviews = Reviews(database, ONCE)
    names = [put(reviews) for _ in range(12)]
    with ThreadPoolExecutor(6) as pool:
        items = list(pool.map(lambda person: reviews.claim(f"p{person}"), range(15)))
    claimed = [item["id"] for item in items if item is not None]
    assert sorted(claimed) == sorted(names)


class Queue(RuleBasedStateMachine):
    """Against a plain account of who holds what until when."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.reviews = Reviews(Database(new_url(Path(self.folder.name))), ONCE, lambda: self.time)
        self.held: dict[str, tuple[str, float]] = {}
        self.open: set[str] = set()
        self.decided: dict[str, str] = {}
        self.number = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule()
    def put(self) -> None:
        self.time += 0.001  # no two at once: ids, which would decide, are other ones in each run
        self.open.add(put(self.reviews))

    @rule(seconds=st.integers(1, 150))
    def wait(self, seconds: int) -> None:
        self.time += seconds

    def free(self, name: str, by: str) -> bool:
        holder, until = self.held.get(name, (by, 0.0))
        return holder == by or until < self.time

    @rule(by=st.sampled_from("abc"))
    def claim(self, by: str) -> None:
        item = self.reviews.claim(by)
        candidates = {name for name in self.open if self.free(name, by)}
        assert (item is None) == (not candidates)
        if item is not None:
            assert item["id"] in candidates
            self.held[item["id"]] = (by, self.time + 100)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), by=st.sampled_from("abc"), kind=st.sampled_from(["approve", "reject"]))
    def decide(self, data: Any, by: str, kind: Any) -> None:
        name = data.draw(st.sampled_from(list(self.held)))
        self.number += 1
        verdict = Verdict(f"v{self.number}", kind)
        if name in self.decided or self.held[name][0] != by:
            with pytest.raises(Conflict):
                self.reviews.decide(name, by, verdict)
            return
        try:
            self.reviews.decide(name, by, verdict)
        except Conflict:
            assert self.held[name][1] < self.time  # the lease was over, and somebody claimed since
            return
        assert self.reviews.decide(name, by, verdict).verdict == kind
        self.decided[name] = kind
        self.open.discard(name)

    @invariant()
    def all_are_there(self) -> None:
        counts = self.reviews.counts()
        assert counts["decided"] == len(self.decided)
        assert counts["waiting"] + counts["claimed"] == len(self.open)


Queue.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestQueue = Queue.TestCase


def _work(url: str, folder: str, number: int) -> None:
    """Put items and decide on them, writing down what was acknowledged, until killed."""
    reviews = Reviews(Database(url), ONCE)
    draw = random.Random(number)
    with (Path(folder) / f"{number}.jsonl").open("a", buffering=1) as account:
        while True:
            name = put(reviews)
            account.write(json.dumps({"put": name}) + "\n")
            item = reviews.claim(f"p{number}")
            if item is not None and draw.random() < 0.7:
                verdict = Verdict(f"{item['id']}-{number}", "approve")
                reviews.decide(item["id"], f"p{number}", verdict)
                account.write(json.dumps({"decided": item["id"]}) + "\n")


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_time_it_loses_nothing(tmp_path: Path, store_url: str | None, rounds: int) -> None:
    url = store_url or new_url(tmp_path)
    Database(url)
    context = multiprocessing.get_context("fork")
    draw = random.Random(rounds)
    for place in range(rounds):
        workers = [context.Process(target=_work, args=(url, str(tmp_path), 2 * place + n)) for n in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.3 + draw.random() / 2)
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    told: list[dict[str, str]] = []
    for path in tmp_path.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                told.append(json.loads(line))
            except ValueError:
                assert not line.endswith("}")  # cut off by the kill
    reviews = Reviews(Database(url), ONCE)
    stored = {item["id"]: reviews.item(item["id"]) for item in reviews.listed(most=100_000)}
    assert {one["put"] for one in told if "put" in one} <= set(stored)
    assert len([one for one in told if "put" in one]) > rounds
    decided = {one["decided"] for one in told if "decided" in one}
    assert decided and all(stored[name]["state"] == "decided" for name in decided)
    verdicts = Counter(verdict["id"] for item in stored.values() for verdict in item["verdicts"])
    assert not verdicts or max(verdicts.values()) == 1
    assert all((item["state"] == "decided") == bool(item["verdicts"]) for item in stored.values())
