"""Pydantic's complaints in the user's terms: file, line, path of the key, and the nearest known name.

Pydantic locates an error by a path that mixes keys of the data with its own choices in a union
(`stages.0.pretrain.steps`, where `pretrain` is a tag). `_trace` walks that path through the model's core
schema, which says exactly which part is which, and so finds both the path a user would recognise and the
model that stands there. An unknown key is compared with that model's keys, not with all keys there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gyrocompass.core.errors import did_you_mean
from gyrocompass.core.yaml_source import KeyPath, LoadedYaml

_Schema = Mapping[str, Any]


class MistakesBelow(ValueError):  # noqa: N818
    """What a config's own check found wrong further down, each with the path from there to its key."""

    def __init__(self, mistakes: Iterable[tuple[KeyPath, str]]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(_line(path, message) for path, message in self.mistakes))


class _Trace(NamedTuple):
    """What a pydantic error location means: the path in the data, and the schema that stands at its end."""

    path: KeyPath
    schema: _Schema | None


def find_mistakes(model: type[BaseModel], error: ValidationError) -> list[tuple[KeyPath, str]]:
    """Each mistake once: the path of its key, and what is wrong and what to write there."""
    found: dict[tuple[KeyPath, str], None] = {}
    for detail in error.errors(include_url=False):
        path, message = _message(model, detail)
        raised = detail.get("ctx", {}).get("error")
        if isinstance(raised, MistakesBelow):
            found |= {((*path, *below), said): None for below, said in raised.mistakes}
        else:
            found[path, message] = None
    return list(found)


def explain(mistakes: Iterable[tuple[KeyPath, str]], loaded: LoadedYaml) -> list[str]:
    """One line for each mistake: place, path of the key, what is wrong, what to write."""
    return [f"{loaded.place(path)}: {_line(path, message)}" for path, message in mistakes]


def _line(path: KeyPath, message: str) -> str:
    return ": ".join([*([".".join(path)] if path else []), message])


def _message(model: type[BaseModel], detail: ErrorDetails) -> tuple[KeyPath, str]:
    """The path a mistake is shown at, and the sentence about it."""
    location, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    trace = _trace(model, location)
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        owner = _trace(model, location[:-1]).schema
        return trace.path, "unknown key" + did_you_mean(str(location[-1]), _keys(owner, _Definitions(model)))
    if kind in ("missing", "union_tag_not_found"):
        missing = str(context.get("discriminator", location[-1] if location else "")).strip("'")
        path = trace.path[:-1] if kind == "missing" else trace.path
        return path, f"the key {missing} is missing"
    if kind == "union_tag_invalid":
        key = str(context["discriminator"]).strip("'")
        known = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        path = (
            (*trace.path, key) if isinstance(detail["input"], dict) and key in detail["input"] else trace.path
        )
        return path, f"unknown choice {context['tag']!r}" + did_you_mean(str(context["tag"]), known)
    if kind in ("literal_error", "enum"):
        known = str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        return trace.path, f"unknown choice {detail['input']!r}" + did_you_mean(str(detail["input"]), known)
    if kind in ("value_error", "assertion_error"):
        return trace.path, str(context["error"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return trace.path, f"expected keys and values, found {detail['input']!r}"
    sentence = detail["msg"][0].lower() + detail["msg"][1:]
    return trace.path, f"{sentence}, found {detail['input']!r}"


class _Definitions:
    """The shared schemas of a model, by reference."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.root: _Schema = model.__pydantic_core_schema__
        self._by_reference: dict[str, _Schema] = {}
        if self.root["type"] == "definitions":
            self._by_reference = {entry["ref"]: entry for entry in self.root["definitions"]}

    def resolved(self, schema: _Schema) -> _Schema:
        """The schema itself, where it is a reference to a shared one."""
        return self._by_reference[schema["schema_ref"]] if schema["type"] == "definition-ref" else schema

    def inner(self, schema: _Schema) -> _Schema:
        """The schema without the wrappers that leave no trace in a location (defaults, validators, None)."""
        while True:
            schema = self.resolved(schema)
            if schema["type"] == "chain":
                schema = schema["steps"][0]
            elif schema["type"] in ("list", "dict", "tuple", "model-field") or "schema" not in schema:
                return schema
            else:
                schema = schema["schema"]


def _trace(model: type[BaseModel], location: Sequence[str | int]) -> _Trace:
    """Walk a location through the model's schema; from where it cannot follow, parts are taken as keys."""
    definitions = _Definitions(model)
    schema: _Schema | None = definitions.inner(definitions.root)
    path: list[str] = []
    for part in location:
        choice = None if schema is None else _choice(schema, str(part), definitions)
        if choice is not None:
            schema = definitions.inner(choice)
            continue
        path.append(str(part))
        below = None if schema is None else _below(schema, part)
        schema = None if below is None else definitions.inner(below)
    return _Trace(tuple(path), schema)


def _choice(schema: _Schema, part: str, definitions: _Definitions) -> _Schema | None:
    """The member of a union that `part` names, or None if the schema is no union."""
    if schema["type"] == "tagged-union":
        members: Mapping[Any, _Schema] = schema["choices"]
        return next(
            (member for tag, member in members.items() if str(getattr(tag, "value", tag)) == part), None
        )
    if schema["type"] == "union":
        choices: Sequence[_Schema | tuple[_Schema, str]] = schema["choices"]
        for choice in choices:
            member, label = choice if isinstance(choice, tuple) else (choice, None)
            if part in (label, _label(definitions.resolved(member))):
                return member
        # The label of a member that is not a model (such as list[int]): its inside is not followed.
        return {"type": "any"}
    return None


def _label(schema: _Schema) -> str | None:
    """How pydantic names a model in a union's locations: by its class."""
    while "schema" in schema and "cls" not in schema:
        schema = schema["schema"]
    return schema["cls"].__name__ if "cls" in schema else None


def _below(schema: _Schema, part: str | int) -> _Schema | None:
    """The schema one key or index further down."""
    match schema["type"]:
        case "model-fields":
            for name, entry in schema["fields"].items():
                if part in (name, entry.get("validation_alias")):
                    return entry["schema"]  # type: ignore[no-any-return]
        case "list" | "set" | "frozenset":
            return schema.get("items_schema")
        case "dict":
            return schema.get("values_schema")
        case "tuple":
            items = schema["items_schema"]
            variadic = schema.get("variadic_item_index")
            return items[min(int(part), len(items) - 1) if variadic is not None else int(part)]  # type: ignore[no-any-return]
    return None


def _keys(schema: _Schema | None, definitions: _Definitions) -> list[str]:
    """The keys a mapping may have at a schema."""
    if schema is None or definitions.inner(schema)["type"] != "model-fields":
        return []
    fields: Mapping[str, _Schema] = schema["fields"]
    aliases = {name: entry.get("validation_alias") for name, entry in fields.items()}
    return [alias if isinstance(alias, str) else name for name, alias in aliases.items()]
