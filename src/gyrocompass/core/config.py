"""Config: frozen typed models, checked when they are read, hashed by what they mean.

    YAML file --load_yaml--> LoadedYaml --override--> LoadedYaml --parse--> a Config
    a Config  --canonical_json--> text --sha256--> config_hash

A config model stands beside the class it configures and derives from `Config`. Every mistake in a file is
reported at once, each on a line of its own with the file's line and the path of the key; an unknown key or
choice names the nearest one that is known at that place.

A check of a config's own raises ValueError, which pydantic collects and `parse` places; `MistakesBelow` is
one about keys further down. What is left out on purpose: environment variables, includes and interpolation.
A recipe says what it means in one file, so that its hash says it too.
"""

from __future__ import annotations

import datetime
import enum
import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gyrocompass.core.config_errors import MistakesBelow, explain, find_mistakes
from gyrocompass.core.errors import ConfigError
from gyrocompass.core.yaml_source import LoadedYaml, apply_overrides, load_yaml

__all__ = [
    "Config",
    "LoadedYaml",
    "MistakesBelow",
    "apply_overrides",
    "canonical_json",
    "config_hash",
    "load_yaml",
    "parse",
]


class Config(BaseModel):
    """The base of every config: frozen, no unknown keys, no inf or nan, defaults checked like input.

    What it dumps can be read again: keys have the names that a file gives them.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, serialize_by_alias=True
    )


C = TypeVar("C", bound=BaseModel)


def parse(model: type[C], loaded: LoadedYaml | Mapping[str, Any], where: str | None = None) -> C:
    """Check data against a config model.

    Args:
        model: the config model, discriminated unions and nested models included.
        loaded: a loaded YAML file, or plain data.
        where: what errors about plain data name as the place, such as the path of its key; a loaded file
            names itself.

    Raises:
        ConfigError: with one line for each mistake, such as
            `demo.yaml:12: stages.pretrain.learning_rat: unknown key; did you mean learning_rate?`
    """
    if not isinstance(loaded, LoadedYaml):
        loaded = LoadedYaml(dict(loaded), where or model.__name__, None)
    try:
        return model.model_validate(loaded.data)
    except ValidationError as error:
        mistakes = find_mistakes(model, error)
    lines = explain(mistakes, loaded)
    above = () if loaded.root is not None else tuple(loaded.where.split("."))
    placed = [((*above, *path), message) for path, message in mistakes]
    if len(lines) == 1:
        raise ConfigError(lines[0], mistakes=placed)
    head = f"{len(lines)} mistakes in {loaded.where}"
    raise ConfigError("\n".join([head, *(f"  {line}" for line in lines)]), mistakes=placed)


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, tuples as lists, sets sorted, paths with slashes.

    >>> canonical_json({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'

    Raises:
        TypeError: the value holds something that has no JSON form.
        ValueError: the value holds an inf or a nan.
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def config_hash(value: object) -> str:
    """sha256 (64 hex digits) of the canonical JSON: equal for configs that mean the same."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _plain(value: object) -> Any:
    """The value in JSON's own types."""
    match value:
        case enum.Enum():
            return _plain(value.value)
        case None | bool() | int() | float() | str():
            return value
        case BaseModel():
            return _plain(value.model_dump(mode="python"))
        case Mapping():
            if any(not isinstance(key, str) for key in value):
                raise TypeError(f"keys of canonical JSON are texts, not {[*value]!r}")
            return {key: _plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case set() | frozenset():
            return sorted((_plain(entry) for entry in value), key=canonical_json)
        case PurePath():
            return value.as_posix()
        case datetime.date() | datetime.time():
            return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no canonical JSON form: {value!r}")
