from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.data.document import Message
from gyrocompass.data.ingest.chatlogs import array_items, as_messages, is_log, log_time, turns
from gyrocompass.data.ingest.streams import Damaged, Refused

Reader = Callable[..., Any]

SHAREGPT = {"id": "x1", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
OPENAI = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]},
        {"role": "assistant", "content": "hi"},
    ]
}


def test_the_shapes_of_other_tools_become_chats(here: Path, read: Reader) -> None:
    (here / "a.jsonl").write_text(
        "\n".join(
            json.dumps(raw) for raw in (SHAREGPT, OPENAI, {**SHAREGPT, "system": "Be brief.", "id": "x2"})
        )
    )
    one, two, three = read("a.jsonl").documents
    assert one.kind == "chat" and one.messages == (Message("user", "q"), Message("assistant", "a"))
    assert one.path == "a.jsonl#x1"
    assert two.messages[0].content == "Say hi."
    assert three.messages[0] == ("system", "Be brief.")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"conversations": [{"from": "wizard", "value": "x"}]}, "conversations[0].from is 'wizard'"),
        ({"conversations": []}, "messages is not a list of messages but an empty one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text but image_url"),
        ({"conversations": [{"from": "human", "value": 3}]}, "content is not a text"),
    ],
)
def test_chats_that_cannot_be_read_say_why(here: Path, read: Reader, raw: object, reason: str) -> None:
    (here / "a.jsonl").write_text(json.dumps(SHAREGPT) + "\n" + json.dumps(raw))
    records = read("a.jsonl")
    assert len(records.documents) == 1
    (lost,) = records.quarantined
    assert reason in lost.reason and (lost.line, lost.offset) == (2, len(json.dumps(SHAREGPT)) + 1)


def test_a_file_that_is_one_array(here: Path, read: Reader) -> None:
    (here / "a.json").write_text(json.dumps([SHAREGPT, {"text": "t"}, {"txt": 1}], indent=1))
    records = read("a.json")
    assert [(d.kind, d.path) for d in records.documents] == [("chat", "a.json#x1"), ("text", "a.json:2")]
    assert records.quarantined[0].line == 3
    (here / "a.json").write_text(json.dumps([SHAREGPT, {"text": "t"}])[:-10])
    records = read("a.json")
    assert len(records.documents) == 1 and records.quarantined[0].offset > 50
    (here / "a.json").write_text('{"text": 1}')
    assert read("a.json").quarantined[0].reason == "not a JSON array"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(deadline=None)
@given(st.lists(json_values), st.sampled_from([None, 1]), st.integers(1, 7))
def test_items_are_those_of_the_array_however_it_is_read(
    items: list[Any], indent: int | None, piece: int
) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(piece)

    data = json.dumps(items, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:
        with pytest.raises(Damaged, match="not UTF-8"):
            list(array_items(Slow(data), 10**6))
        return
    assert [item for _, item in array_items(Slow(data), 10**6)] == json.loads(data)
    if items:
        with pytest.raises(Damaged):
            list(array_items(Slow(data[:-1]), 10**6))


def test_an_object_that_is_too_long_stops_the_array() -> None:
    data = json.dumps(["a", "x" * 5000, "b"]).encode()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(100)

    found = array_items(Slow(data), 1000)
    assert next(found) == (1, "a")
    with pytest.raises(Refused, match="object 2 is longer than 1,000 characters"):
        next(found)


def test_a_record_of_another_shape_is_left_as_it_is() -> None:
    for raw in ({"text": "x"}, [1], "x", None, {"conversations": "x"}):
        assert as_messages(raw) == raw


# --- logs ---

DIALOGUE = "User: What is 2 + 2?\nAssistant: 4.\nIt always is.\n\nUser: Thanks\nAssistant: Gladly.\n"
IRC = "2024-05-01 12:34 <ann> hi\n2024-05-01 12:35 <bob> hello ann\n2024-05-01 12:36 * ann waves\n"
PHONE = "12/31/23, 9:41 PM - Ann: happy new year\n12/31/23, 9:42 PM - Bob: you too\nstill me\n"


def test_dialogues_become_chats_and_logs_of_people_stay_texts(here: Path, read: Reader) -> None:
    (here / "a.log").write_text(DIALOGUE)
    (here / "b.irc").write_text(IRC)
    (here / "c.chat").write_text(PHONE)
    (here / "d.log").write_text("starting server\nlistening on port 80\n")
    chat, irc, phone, plain = read().documents
    assert chat.kind == "chat" and chat.messages == (
        Message("user", "What is 2 + 2?"),
        Message("assistant", "4.\nIt always is."),
        Message("user", "Thanks"),
        Message("assistant", "Gladly."),
    )
    assert (irc.kind, irc.slice, irc.text) == ("text", "chat/log", IRC)
    assert irc.time == datetime(2024, 5, 1, 12, 34, tzinfo=UTC)
    assert phone.slice == "chat/log" and plain.slice == "text"


def test_prose_is_no_log() -> None:
    for text in ("", "Note: this is prose.\nAnd more.", "12:30 is when we meet.\nBring food.\nAnd drinks."):
        assert not is_log(text) and turns(text) is None and log_time(text) is None
    assert turns("User: nobody answers\nUser: hello?") is None
    assert turns("**User:** q\n**Assistant:** a") == (Message("user", "q"), Message("assistant", "a"))
