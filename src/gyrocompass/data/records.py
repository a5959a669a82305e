"""Records: one mapping (a line of JSON, a row of a table) becomes a document, or says why it cannot.

    {"text": ...}                           text
    {"messages": [{"role", "content"}]}     chat
    {"prompt": ..., "completion": ...}      completion; `prompt` is a text or a list of messages
    {"prompt": ..., "steps": [{"text", "reward"}]}      completion in steps, each right or wrong or neither
    {"prompt": ..., "chosen": ..., "rejected": ...}     preference; answers are texts or lists of messages

A preference of two conversations may leave the prompt out: it is what both begin with. It may have a third
answer, `gold`, which is to be imitated. Optional beside them: slice, source, licence, language, weight, id,
group, unit, and labels, which are numbers or true and false:

    label, margin, score      is this answer desirable; how clear is the preference; what is the answer worth
    labels: {name: number}    what else an objective reads: relevance, role, tie, retriever_logprob, ...
    tests: text, or a list    Python that code in the answer should pass, for the reward `unit_tests`
    unit: name                records that follow each other under one name are read together: a question and
                              what answers it, the passages of a question, answers that are ranked

Answers to one prompt are of one group, and so are the records of a unit, so that a split keeps them on one
side. A preference is a unit by itself, and what it says as `unit` is ignored. So are all other fields,
without a count: a text with a URL or a score beside it is still a text. What is read is checked strictly,
since a field of the wrong type or an empty text is more often a broken export than a choice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, Field, PositiveFloat

from gyrocompass.core.config import Config
from gyrocompass.data.document import EXCERPT_LENGTH, Document, Kind, Message, Quarantined, Step

ROLES = ("system", "user", "assistant", "tool")

ContentField = Literal["text", "messages", "prompt", "completion", "steps", "chosen", "rejected", "gold"]

LABELS: Mapping[str, str] = {"label": "desirable", "margin": "margin", "score": "score"}
"""Fields that hold a number about the answer, and the names of the labels they become."""

SIDES = "side"
"""The label of a preference's answers: which of them it is."""

RESERVED_SLICES = ("", "total")
"""Names that no slice may have: every table has its own line `total`, and "" is "no slice"."""

_LEAST_WEIGHT = float(np.finfo(np.float32).smallest_normal)
_GREATEST_WEIGHT = float(np.finfo(np.float32).max)


def _slice_fault(name: str) -> str | None:
    """Why a slice cannot have this name; None where it can."""
    if name in RESERVED_SLICES:
        return f'slice is "{name}", a name that is kept for the sum of all slices; give it another'
    return None


def _weight_fault(weight: float) -> str | None:
    """Why a weight cannot be used; None where it can. Tokens carry their weights in float32."""
    if not (0 < weight < math.inf):
        return "it must be finite and above 0"
    if not (_LEAST_WEIGHT <= weight <= _GREATEST_WEIGHT):
        return (
            f"in float32 it must be from {_LEAST_WEIGHT:.4g} to {_GREATEST_WEIGHT:.4g}, "
            "or it is lost as 0 or becomes infinite"
        )
    return None


def _checked_slice(name: str | None) -> str | None:
    fault = None if name is None else _slice_fault(name)
    if fault:
        raise ValueError(fault)
    return name


def _checked_weight(weight: float) -> float:
    fault = _weight_fault(weight)
    if fault:
        raise ValueError(f"weight is {weight}; {fault}")
    return weight


class Labels(Config):
    """What a source says about its documents, where a record does not say it itself."""

    name: str | None = Field(default=None, min_length=1)
    """The source's name; None: its path."""
    slice: Annotated[str | None, AfterValidator(_checked_slice)] = None
    """None: "code" for program files, "text", "chat" or "completion" by kind for all else. Not "total"."""
    licence: str | None = None
    """SPDX identifier."""
    language: str | None = None
    weight: Annotated[PositiveFloat, AfterValidator(_checked_weight)] = 1.0
    """Multiplies the weight of every token; a normal number of float32."""


class RecordOptions(Labels):
    """How records are read."""

    fields: dict[ContentField, str] = Field(default_factory=dict)
    """Other names of the fields: `{text: content}` reads the text from `content`."""


@dataclass(frozen=True)
class Place:
    """Where a record stands."""

    path: str
    line: int
    source: str
    offset: int | None = None
    """Of its first byte in the file."""
    n_bytes: int | None = None

    def quarantined(self, reason: str, excerpt: object) -> Quarantined:
        """The record as one that cannot be used."""
        return Quarantined(
            self.path,
            self.line,
            reason,
            str(excerpt)[:EXCERPT_LENGTH],
            self.source,
            offset=self.offset,
            n_bytes=self.n_bytes,
        )


class Malformed(Exception):  # noqa: N818
    """The reason why a record cannot be used."""


def read_record(raw: object, options: RecordOptions, place: Place) -> Document | Quarantined:
    """One record as a document, or quarantined with its reason.

    >>> place = Place("a.jsonl", 3, "a.jsonl")
    >>> read_record({"text": "Hello."}, RecordOptions(), place).path
    'a.jsonl:3'
    >>> read_record({"txt": "Hello."}, RecordOptions(), place).reason
    'none of text, messages, prompt + completion, prompt + steps, prompt + chosen + rejected; fields: txt'
    """
    try:
        if not isinstance(raw, Mapping):
            raise Malformed(f"not an object with fields but {_type_name(raw)}")
        return _document(raw, options, place)
    except Malformed as reason:
        return place.quarantined(str(reason), raw)


def _document(raw: Mapping[str, Any], options: RecordOptions, place: Place) -> Document:
    kind, content = _content(raw, options)
    labels = _labels(raw, kind)
    unit = None if kind == "preference" else _optional(raw, "unit", (str, int))
    judged = kind != "text" and (kind == "preference" or labels or content.get("steps"))
    record_id = _optional(raw, "id", (str, int))
    return Document(
        kind=kind,
        path=f"{place.path}:{place.line}" if record_id is None else f"{place.path}#{record_id}",
        source=_optional(raw, "source", (str,)) or place.source,
        slice=_slice(raw) or options.slice or kind,
        licence=_optional(raw, "licence", (str,)) or options.licence,
        language=_optional(raw, "language", (str,)) or options.language,
        weight=_weight(raw, options),
        group=_optional(raw, "group", (str, int))
        or (_prompt_group(kind, content) if judged and unit is None else None),
        unit=unit,
        labels=labels,
        tests=() if kind == "text" else _tests(raw.get("tests")),
        **content,
    )


def _prompt_group(kind: Kind, content: Mapping[str, Any]) -> str:
    """The group of all answers to one prompt."""
    asked = content.get("messages", ())
    prompt = [content.get("prompt", ""), asked if kind == "preference" else asked[:-1]]
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).hexdigest()


def _labels(raw: Mapping[str, Any], kind: Kind) -> dict[str, float]:
    """All numbers by name: those of `labels`, and of an answer those with a field of their own."""
    labels: dict[str, float] = {}
    if kind != "text":
        given = {
            label: _number(raw[name], name) for name, label in LABELS.items() if raw.get(name) is not None
        }
        if given.get("desirable", 1.0) not in (0.0, 1.0):
            raise Malformed(f"label is {raw['label']}; it is true (desirable) or false")
        labels |= given
    named = raw.get("labels")
    if named is None:
        return labels
    if not isinstance(named, Mapping):
        raise Malformed(f"labels is not an object of numbers by name but {_type_name(named)}")
    for name, value in named.items():
        if value is None:
            continue
        if name in labels:
            raise Malformed(f"the label {name} is given twice, in labels and as a field")
        if kind == "preference" and name == SIDES:
            raise Malformed(f"labels.{SIDES} is what chosen and rejected say already")
        labels[_text(name, "a name in labels")] = _number(value, f"labels.{name}")
    return labels


def _number(value: Any, name: str) -> float:
    """A label, true and false being 1 and 0."""
    if not isinstance(value, bool | int | float):
        raise Malformed(f"{name} is not a number but {_type_name(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _GREATEST_WEIGHT:
        raise Malformed(f"{name} is {value}, which is no finite number of float32")
    return number


def _content(raw: Mapping[str, Any], options: RecordOptions) -> tuple[Kind, dict[str, Any]]:
    """The kind of a record and the document's content fields."""
    values: dict[ContentField, Any] = {}
    for name in get_args(ContentField):
        value = raw.get(options.fields.get(name, name))
        if value is not None:
            values[name] = value
    gold = values.pop("gold", None)
    if set(values) != {"prompt", "steps"}:
        values.pop("steps", None)
    match sorted(values):
        case ["text"]:
            return "text", {"text": _text(values["text"], "text")}
        case ["messages"]:
            return "chat", {"messages": _messages(values["messages"])}
        case ["completion", "prompt"]:
            asked = _asked(values["prompt"])
            said = _answer(values["completion"], "completion")
            if "messages" in asked:
                return "chat", {"messages": (*asked["messages"], Message("assistant", said))}
            return "completion", asked | {"text": said}
        case ["prompt", "steps"]:
            asked, (said, steps) = _asked(values["prompt"]), _steps(values["steps"])
            if "messages" in asked:
                return "chat", {"messages": (*asked["messages"], Message("assistant", said)), "steps": steps}
            return "completion", asked | {"text": said, "steps": steps}
        case ["chosen", "rejected"] | ["chosen", "prompt", "rejected"]:
            return "preference", _preference(values, gold)
        case []:
            fields = ", ".join(map(str, raw)) or "none"
            raise Malformed(
                "none of text, messages, prompt + completion, prompt + steps, prompt + chosen + rejected; "
                f"fields: {fields}"
            )
        case ["prompt"] | ["completion"]:
            raise Malformed("prompt and completion belong together, and one is missing")
        case ["chosen", *_] | ["rejected"] | ["prompt", "rejected"]:
            raise Malformed("chosen and rejected belong together, and one is missing")
        case found:
            raise Malformed(f"more than one content: {', '.join(found)}")


def _preference(values: Mapping[ContentField, Any], gold: Any) -> dict[str, Any]:
    """The prompt, the chosen answer and the rejected one, and the gold one if there is one."""
    answers = [values["chosen"], values["rejected"], *([] if gold is None else [gold])]
    names = ("chosen", "rejected", "gold")
    prompt = values.get("prompt")
    if prompt is None:
        if not all(isinstance(answer, list) for answer in answers):
            raise Malformed(f"{', '.join(names[: len(answers)])} without a prompt are not lists of messages")
        shortest = min(map(len, answers))
        shared = 0
        while shared < shortest and all(answer[shared] == answers[0][shared] for answer in answers):
            shared += 1
        if shared == shortest:
            shared -= 1  # one is the beginning of the others, or they are equal: said below
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    asked = _asked(prompt)
    said = [_answer(answer, name) for answer, name in zip(answers, names, strict=False)]
    if said[0] == said[1]:
        raise Malformed("chosen and rejected are the same")
    return asked | dict(zip(("text", "rejected", "gold"), said, strict=False))


def _steps(value: Any) -> tuple[str, tuple[Step, ...]]:
    """An answer in steps as one text, and where each step ends."""
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else _type_name(value)
        raise Malformed(f"steps is not a list of objects but {found}")
    said, steps = "", []
    for index, entry in enumerate(value):
        where = f"steps[{index}]"
        if not isinstance(entry, Mapping):
            raise Malformed(f"{where} is not an object but {_type_name(entry)}")
        said += _text(entry.get("text"), f"{where}.text")
        reward = entry.get("reward")
        number = None if reward is None else _number(reward, f"{where}.reward")
        if number is not None and not 0 <= number <= 1:
            raise Malformed(f"{where}.reward is {reward}; it is true (right), false, or between 0 and 1")
        steps.append(Step(len(said), number))
    if all(step.reward is None for step in steps):
        raise Malformed("no step has a reward")
    return said, tuple(steps)


def _asked(prompt: Any) -> dict[str, Any]:
    """A prompt, as a text or as the messages of a conversation."""
    if isinstance(prompt, list):
        return {"messages": _turns(prompt, "prompt")}
    return {"prompt": _text(prompt, "prompt", may_be_blank=True)}


def _answer(value: Any, name: str) -> str:
    """What the assistant says: a text, or a list with one message of the assistant."""
    if not isinstance(value, list):
        return _text(value, name)
    turns = _turns(value, name)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise Malformed(f"{name} is not one message of the assistant but {len(turns)} messages")
    return _text(turns[0].content, name)


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else _type_name(value)
        raise Malformed(f"{name} is not a list of messages but {found}")
    return tuple(_message(entry, f"{name}[{index}]") for index, entry in enumerate(value))


def _messages(value: Any) -> tuple[Message, ...]:
    messages = _turns(value, "messages")
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise Malformed("no assistant message that says something")
    return messages


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise Malformed(f"{where} is not an object but {_type_name(entry)}")
    role = entry.get("role")
    if role not in ROLES:
        raise Malformed(f"{where}.role is {role!r}; known: {', '.join(ROLES)}")
    if entry.get("tool_calls"):
        raise Malformed(f"{where} calls tools, which is not read")
    return Message(role, _text(entry.get("content"), f"{where}.content", may_be_blank=True))


def _text(value: Any, name: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{name} is not a text but {_type_name(value)}")
    if not may_be_blank and not value.strip():
        raise Malformed(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{name} holds half of a surrogate pair, which is not Unicode text") from None
    return value


def _optional(raw: Mapping[str, Any], name: str, types: tuple[type, ...]) -> str | None:
    """An optional label as text; None where it is missing or null."""
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, types) or isinstance(value, bool):
        raise Malformed(f"{name} is not a text but {_type_name(value)}")
    return _text(str(value), name)


def _tests(value: Any) -> tuple[str, ...]:
    """Tests of the answer: one text, or a list of them."""
    if value is None:
        return ()
    if not isinstance(value, str | list) or value == []:
        found = "an empty list" if value == [] else _type_name(value)
        raise Malformed(f"tests is not a text or a list of texts but {found}")
    given = [value] if isinstance(value, str) else value
    return tuple(_text(test, f"tests[{index}]") for index, test in enumerate(given))


def _slice(raw: Mapping[str, Any]) -> str | None:
    name = _optional(raw, "slice", (str,))
    fault = None if name is None else _slice_fault(name)
    if fault:
        raise Malformed(fault)
    return name


def _weight(raw: Mapping[str, Any], options: RecordOptions) -> float:
    value = raw.get("weight")
    if value is None:
        return options.weight
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed(f"weight is not a number but {_type_name(value)}")
    try:
        weight = float(value) * options.weight
    except OverflowError:
        weight = math.inf
    fault = _weight_fault(weight)
    if fault:
        times = "" if options.weight == 1 else f" times the source's {options.weight}"
        raise Malformed(f"weight is {value}{times}; {fault}")
    return weight


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
