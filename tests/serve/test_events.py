from __future__ import annotations

import math
import time

import pytest
from asking import answered, asked

from gyrocompass.core.database import Database
from gyrocompass.core.errors import GyroError
from gyrocompass.serve.answer import Confidence, Judgement
from gyrocompass.serve.events import EventLog, EventSettings, read_events


def test_an_event_says_how_an_answer_ended(database: Database) -> None:
    log = EventLog(database, EventSettings())
    question = asked()
    judged = Judgement(
        "caveat", ("unsure",), confidence=Confidence(0.7, 0.6, 0.8, "c-1"), policy="p-1", inclusion=0.1
    )
    log.record(question, answered("it is four"), judged, 200)
    log.record(question, answered("4")._replace(tokens=()), None, 200, 1)
    log.record(asked(), None, None, 400)
    log.close()
    first, second, third = read_events(database)
    assert first["id"] == f"{question.id}-0" and second["id"] == f"{question.id}-1"
    assert first["sequence_logprob"] == pytest.approx(-0.3) and first["min_logprob"] == -0.1
    assert (first["confidence"], first["outcome"], first["inclusion"]) == (0.7, "caveat", 0.1)
    assert first["mean_entropy"] == pytest.approx(0.2)
    assert first["prompt"] is None and first["text"] is None
    assert second["mean_logprob"] is None and second["tokens"] == 0
    assert (third["status"], third["tokens"]) == (400, 0)


@pytest.mark.parametrize(("texts", "kept"), [("none", None), ("masked", "f**r"), ("full", "four")])
def test_texts_are_kept_as_it_is_set(database: Database, texts: str, kept: str | None) -> None:
    settings = EventSettings.model_validate({"texts": texts})
    log = EventLog(database, settings, lambda text: text.replace("ou", "**"))
    log.record(asked(), answered("four"), None, 200)
    log.close()
    (event,) = read_events(database)
    assert event["text"] == kept


def test_what_is_old_goes(database: Database) -> None:
    for received_at in (time.time() - 5 * 86400, time.time()):
        log = EventLog(database, EventSettings(days=None))
        log.record(asked(received_at=received_at), answered(), None, 200)
        log.close()
    assert len(list(read_events(database))) == 2
    assert len(list(read_events(database, time.time() - 86400))) == 1
    log = EventLog(database, EventSettings(days=3))
    log.record(asked(), answered(), None, 200)
    log.close()
    assert len(list(read_events(database))) == 2


def test_a_database_that_comes_back_gets_all(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(database, EventSettings())
    write, fails = database.write, [3]

    def failing() -> object:
        if fails[0]:
            fails[0] -= 1
            raise GyroError("gone")
        return write()

    monkeypatch.setattr(database, "write", failing)
    log.record(asked(), answered(logprob=-math.inf), None, 200)
    log.close()
    assert len(list(read_events(database))) == 1 and log.dropped == 0


def test_a_full_queue_drops_and_counts(database: Database) -> None:
    log = EventLog(database, EventSettings(most_queued=1))
    for _ in range(200):
        log.record(asked(), answered(), None, 200)
    log.close()
    assert log.dropped + len(list(read_events(database))) == 200 and log.dropped > 0
