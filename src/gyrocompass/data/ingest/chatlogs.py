"""Chat logs: exports in the shapes of other tools, and logs that people read.

    {"messages": [{"role", "content"}]}             OpenAI; a content may be a list of parts with `text`
    {"conversations": [{"from", "value"}]}          ShareGPT; `system` may stand beside it
    [{...}, {...}]                                  a .json file of such objects
    User: ... / Assistant: ...                      a conversation, where both speak: kind chat
    [12:34] <ann> ...,  2024-05-01, 12:34 - Ann: ...    a log of people: kind text, as it is

    mapping --as_messages--> the house's mapping, which `read_record` reads

People in a log are no roles: who of them would be the assistant is not known, so such a log stays a text of
the slice chat/log, with the time of its first line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import IO, Any

from gyrocompass.data.document import Message
from gyrocompass.data.ingest.streams import Damaged, Refused
from gyrocompass.data.records import Malformed

LOG_SUFFIXES = (".log", ".irc", ".chat")
LOG_SLICE = "chat/log"

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_TURN = re.compile(
    r"(?:#{1,4} *|\*\*)?(human|user|gpt|assistant|chatgpt|bot|ai|system) ?:(?:\*\*)? ?", re.IGNORECASE
)
_DATE = r"(?P<date>\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4})"
_CLOCK = r"(?P<clock>\d{1,2}:\d\d(?::\d\d)?(?: ?[ap]m)?)"
_LOG_LINE = re.compile(
    rf"\[?(?:{_DATE}[T, ]+)?{_CLOCK}\]?(?: -)?[ \t]+(?:<[ @+%~&]?[^<>\s]{{1,40}}>|\* \S|[^:\n]{{1,40}}:)",
    re.IGNORECASE,
)
_PIECE_CHARACTERS = 2**20
_SPACE = re.compile(r"\s*")
_COMMA = re.compile(r"\s*,?\s*")


def as_messages(raw: object) -> object:
    """A record in the shape of another tool as the house writes it; any other record as it is.

    >>> as_messages({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]}

    Raises:
        Malformed: an unknown speaker, or a part that is no text.
    """
    if not isinstance(raw, Mapping):
        return raw
    if isinstance(raw.get("messages"), list):
        return {
            **raw,
            "messages": [_joined(entry, f"messages[{n}]") for n, entry in enumerate(raw["messages"])],
        }
    for name in ("conversations", "conversation"):
        if isinstance(raw.get(name), list) and not raw.get("messages"):
            messages = [_spoken(entry, f"{name}[{n}]") for n, entry in enumerate(raw[name])]
            if isinstance(raw.get("system"), str) and raw["system"].strip():
                messages.insert(0, {"role": "system", "content": raw["system"]})
            rest = {key: value for key, value in raw.items() if key not in (name, "system")}
            return {**rest, "messages": messages}
    return raw


def _spoken(entry: object, where: str) -> object:
    """One turn of ShareGPT's."""
    if not isinstance(entry, Mapping) or "from" not in entry:
        return _joined(entry, where)
    speaker = entry["from"]
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise Malformed(f"{where}.from is {speaker!r}; known: {', '.join(_SPEAKERS)}")
    return {"role": role, "content": entry.get("value")}


def _joined(entry: object, where: str) -> object:
    """A message whose content is a list of parts, with the parts' texts joined."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), list):
        return entry
    texts = []
    for number, part in enumerate(entry["content"]):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Malformed(f"{where}.content[{number}] is no text but {kind}")
        texts.append(text)
    return {**entry, "content": "".join(texts)}


def array_items(stream: IO[bytes], max_bytes: int) -> Iterator[tuple[int, Any]]:
    """The objects of a file that is one JSON array, each with its number from 1, in bounded memory.

    Args:
        stream: UTF-8.
        max_bytes: the longest object, in characters.

    Raises:
        Damaged: it is no array, or not JSON from some place on, or not UTF-8.
        Refused: an object is too long.
    """
    decoder, texts = json.JSONDecoder(), _utf8(stream)
    buffer = next(texts, "").removeprefix("\ufeff")
    number, at, before = 0, _after(_SPACE, buffer, 0), 0
    if buffer[at : at + 1] != "[":
        raise Damaged("not a JSON array", 0)
    at += 1
    while True:
        start = _after(_SPACE if number == 0 else _COMMA, buffer, at)
        if buffer[start : start + 1] == "]":
            return
        fault: Exception | str = "it ends within the array"
        try:
            item, end = decoder.raw_decode(buffer, start)
        except (ValueError, RecursionError) as error:
            fault, end = error, len(buffer)
        if end < len(buffer):  # else a number could go on in what is not read yet
            number, at = number + 1, end
            yield number, item
            continue
        before, buffer, at = before + at, buffer[at:], 0
        if len(buffer) > max_bytes:
            raise Refused(f"object {number + 1} is longer than {max_bytes:,} characters", before)
        # Twice as much each time, so that an object of n characters is tried log n times.
        more = "".join(islice(texts, max(1, len(buffer) // _PIECE_CHARACTERS)))
        if not more:
            raise Damaged(f"not JSON after object {number}: {fault}", before)
        buffer += more


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _utf8(stream: IO[bytes]) -> Iterator[str]:
    """A stream's characters, in pieces of any size above 0."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, ended = 0, False
    while not ended:
        data = stream.read(_PIECE_CHARACTERS)
        ended = not data
        try:
            text = decoder.decode(data, final=ended)
        except UnicodeDecodeError as error:
            raise Damaged(f"not UTF-8: {error.reason}", offset + error.start) from error
        offset += len(data)
        if text:
            yield text


def turns(text: str) -> tuple[Message, ...] | None:
    """The turns of a log that begins with a speaker's name and in which a user and an assistant speak.

    >>> turns("User: Hi.\\nAssistant: Hello.\\nHow are you?")[1]
    Message(role='assistant', content='Hello.\\nHow are you?')
    """
    lines = text.strip().split("\n")
    if not _TURN.match(lines[0]):
        return None
    said: list[tuple[str, list[str]]] = []
    for line in lines:
        if match := _TURN.match(line):
            said.append((_SPEAKERS[match[1].lower()], [line[match.end() :]]))
        else:
            said[-1][1].append(line)
    if not {"user", "assistant"} <= {role for role, _ in said}:
        return None
    return tuple(Message(role, "\n".join(lines).strip()) for role, lines in said)


def is_log(text: str) -> bool:
    """Whether most of its first lines are somebody's, at some time.

    >>> is_log("[12:34] <ann> hi\\n[12:35] <bob> hello\\n")
    True
    """
    lines = [line for line in text[:20_000].split("\n")[:200] if line.strip()]
    return bool(lines) and sum(bool(_LOG_LINE.match(line)) for line in lines) * 2 > len(lines)


def log_time(text: str) -> datetime | None:
    """The time of a log's first line that has a date as ISO 8601 writes it, as if it were UTC."""
    for line in text[:20_000].split("\n")[:200]:
        match = _LOG_LINE.match(line)
        if match and match["date"] and match["date"][4:5] == "-":
            try:
                clock = datetime.strptime(match["clock"].strip()[:5].rjust(5, "0"), "%H:%M").time()
                return datetime.combine(datetime.fromisoformat(match["date"]), clock, UTC)
            except ValueError:
                return None
    return None
