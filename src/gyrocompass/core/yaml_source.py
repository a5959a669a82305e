"""YAML that remembers where each key stands, so that an error can name file and line.

The reading is `yaml.safe_load`'s (no tag can make an object), with two differences. A key that stands
twice in a mapping is an error, where PyYAML silently keeps the last. `1e-3` is a float, as in YAML 1.2
and as everyone who writes a learning rate means it; YAML 1.1 reads it as a string.

Places are looked up in the parsed nodes only when an error needs one. Comments and formatting are not
kept: nothing here writes YAML.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from gyrocompass.core.errors import ConfigError

KeyPath = tuple[str, ...]
"""Keys from the top down; a list's index is written as a string, as in an override: `("stages", "0")`."""


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that reads 1e-3 as a float and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[object, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key!r} stands twice: first in line {seen[key]}",
                    key_node.start_mark,
                )
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class LoadedYaml:
    """A YAML mapping, and where each of its keys came from."""

    data: dict[str, Any]
    where: str
    """The file's name, as errors show it."""
    root: yaml.Node | None = field(repr=False, compare=False)
    overridden: Mapping[KeyPath, str] = field(default_factory=lambda: MappingProxyType({}))
    """Key paths set from outside the file, and by which override."""

    def override(self, overrides: Sequence[str]) -> LoadedYaml:
        """The same with `a.b=c` overrides applied; errors about them name the override, not a line."""
        paths = {_split_override(text)[0]: f"--set {text}" for text in overrides}
        return LoadedYaml(
            apply_overrides(self.data, overrides), self.where, self.root, {**self.overridden, **paths}
        )

    def place(self, path: Sequence[str]) -> str:
        """Where the key at `path` stands: `file.yaml:12`, or the override that set it.

        A path that does not exist (a missing key) is placed at the nearest thing that holds it.
        """
        for end in range(len(path), 0, -1):
            if (override := self.overridden.get(tuple(path[:end]))) is not None:
                return override
        line, depth = (None, 0) if self.root is None else _line_of(self.root, path)
        if depth < len(path):
            # The file has no such key: an override of something in it may have made it.
            for made, override in self.overridden.items():
                if made[: len(path)] == tuple(path):
                    return override
        return self.where if line is None else f"{self.where}:{line}"


def load_yaml(source: Path | Traversable) -> LoadedYaml:
    """Read a YAML mapping from a file or a packaged resource.

    An empty file is an empty mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML, repeats a key, or is not a mapping.
    """
    where = str(source)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the file: {_reason(error)}", where=where) from error
    root, data = _parse(text, where)
    if root is None:
        return LoadedYaml({}, where, None)
    if not isinstance(data, dict):
        raise ConfigError(
            f"expected keys and values, found {_kind_of(data)}",
            where=where,
            fix="write it as `key: value` lines",
        )
    return LoadedYaml(data, where, root)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `a.b=c` overrides set in turn; the value is read as YAML.

    A number in the path picks an element of a list. Mappings on the way that do not exist are made, so
    that a misspelled key reaches the config's own check, which names the nearest one.

    >>> apply_overrides({"train": {"steps": 10}}, ["train.learning_rate=1e-3"])
    {'train': {'steps': 10, 'learning_rate': 0.001}}

    Raises:
        ConfigError: an override is not `path=value`, or its path goes through something without keys.
    """
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for text in overrides:
        path, value = _split_override(text)
        holder: Any = result
        for depth, key in enumerate(path[:-1]):
            index = _index(holder, key, path[: depth + 1], text)
            if isinstance(holder, dict) and holder.get(index) is None:
                holder[index] = {}
            holder = holder[index]
        holder[_index(holder, path[-1], path, text)] = value
    return result


def _split_override(text: str) -> tuple[KeyPath, Any]:
    name, equals, value = text.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        raise ConfigError(
            f"the override {text!r} is not of the form a.b=value", fix="for example --set train.steps=100"
        )
    return path, _parse(value, f"--set {text}")[1]


def _index(holder: Any, key: str, path: KeyPath, text: str) -> Any:
    """What `key` is called in `holder`: itself in a mapping, a number in a list."""
    if isinstance(holder, dict):
        return key
    above = ".".join(path[:-1])
    if not isinstance(holder, list):
        raise ConfigError(f"{above} holds {_kind_of(holder)}, so it has no {key}", where=f"--set {text}")
    if not key.isdecimal() or int(key) >= len(holder):
        raise ConfigError(
            f"{above} is a list of {len(holder)}: {key} is not one of its elements",
            where=f"--set {text}",
            fix=f"use a number from 0 to {len(holder) - 1}" if holder else "set the whole list",
        )
    return int(key)


def _parse(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The nodes and the data of one YAML document; None and null where it is empty."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        # Deep construction makes an alias that holds itself an error here, not an endless walk later.
        data = None if root is None else loader.construct_object(root, deep=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = where if mark is None or where.startswith("--set") else f"{where}:{mark.line + 1}"
        raise ConfigError(str(error.problem or error.context), where=place) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {_reason(error)}", where=where) from error
    return root, data


def _line_of(root: yaml.Node, path: Sequence[str]) -> tuple[int, int]:
    """The line (from 1) of the deepest part of `path` that the nodes have, and how deep that is."""
    node, line = root, root.start_mark.line + 1
    for depth, key in enumerate(path):
        found = _child(node, key)
        if found is None:
            return line, depth
        node, line = found
    return line, len(path)


def _child(node: yaml.Node, key: str) -> tuple[yaml.Node, int] | None:
    """The value under `key` and the line the key stands in (a list's element: where it begins)."""
    if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
        element = node.value[int(key)]
        return element, element.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        # Merged keys stand before a mapping's own, which win: look from the end.
        for key_node, value_node in reversed(node.value):
            if key_node.value == key:
                return value_node, key_node.start_mark.line + 1
    return None


def _kind_of(value: object) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "a yes/no value", type(None): "nothing"}
    return kinds.get(type(value), f"the value {value!r}")


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
