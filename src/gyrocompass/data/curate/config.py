"""What a build is, as YAML says it.

    name: notes
    sources:
      - files: {path: notes}
    steps:
      - quality
      - personal: {as: private}
    rules:
      - drop: {column: quality.n_words, below: {prose: 20, "*": 5}}
      - mask: {column: private.spans}

A step is given by its name, with its options; `as` is the label that rules know it by, so that a step can be
listed twice. Everything is checked before anything is read: names of steps, their options, and whether each
rule's column is one that a listed step makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field, PositiveInt, model_serializer, model_validator

from gyrocompass.core.config import Config, LoadedYaml, MistakesBelow, load_yaml, parse
from gyrocompass.core.errors import BadInput, ConfigError, did_you_mean
from gyrocompass.data.curate.corpus import SHARD_BYTES
from gyrocompass.data.curate.rules import Rule, rule_mistakes
from gyrocompass.data.curate.step import Step, columns_of, step_types
from gyrocompass.data.sources import Source

LABEL = "as"


class NamedStep(Config):
    """A step and the label that its columns have."""

    label: str = Field(pattern=r"^[a-z0-9_]+$")
    step: Step

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise ValueError("a step is its name, or its name with its options: `quality: {...}`")
        ((name, options),) = value.items()
        known = step_types()
        if name not in known:
            raise ValueError(f"there is no step {name!r}{did_you_mean(str(name), known)}")
        options = dict(options or {})
        label = options.pop(LABEL, name)
        try:
            return {"label": label, "step": parse(known[name], options, where=name)}
        except ConfigError as error:
            raise MistakesBelow(error.mistakes) from error

    @model_serializer
    def _write(self) -> dict[str, Any]:
        options = self.step.model_dump(mode="json")
        own_label = {} if self.label == self.step.name else {LABEL: self.label}
        return {self.step.name: {**own_label, **options}}


class BuildConfig(Config):
    """A whole build: what is read, what is looked at, what is decided."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str = ""
    sources: tuple[Source, ...] = Field(min_length=1)
    opt_out: tuple[str, ...] = ()
    """Files with what must not be read, besides the store's own list."""
    steps: tuple[NamedStep, ...] = ()
    rules: tuple[Rule, ...] = ()
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """Of each source's records: more that cannot be read than this fail the build."""
    max_failed_share: float = Field(default=0.0, ge=0, le=1)
    """Of the documents: more than this that a step fails on fail the build; others are dropped for it."""
    shard_bytes: PositiveInt = SHARD_BYTES
    """About how much content a shard holds."""

    @model_validator(mode="after")
    def _check(self) -> BuildConfig:
        labels: dict[str, int] = {}
        for number, named in enumerate(self.steps):
            if named.label in labels:
                fault = f"the label {named.label} stands twice; give one of them another with `{LABEL}`"
                raise MistakesBelow([(("steps", str(number)), fault)])
            labels[named.label] = number
        mistakes = rule_mistakes(self.rules, self.known)
        if mistakes:
            raise MistakesBelow((("rules", *path), fault) for path, fault in mistakes)
        return self

    @cached_property
    def known(self) -> dict[str, pa.DataType]:
        """The types of all steps' columns, by `<label>.<column>`.

        Raises:
            BadInput: a step reads what no step before it makes.
        """
        known: dict[str, pa.DataType] = {}
        for named in self.steps:
            added = columns_of(named.step, known)
            known |= {f"{named.label}.{column}": kind for column, kind in added.items()}
        return known


def load_build(path: Path) -> BuildConfig:
    """Read a build's YAML file.

    Raises:
        BadInput: there is no such file.
        ConfigError: it is wrong; each mistake with its line and the nearest known name.
    """
    if not path.is_file():
        raise BadInput("there is no such file", where=path, fix="give the YAML file of a build")
    return parse(BuildConfig, load_yaml(path))


def build_from(data: Mapping[str, Any], where: str) -> BuildConfig:
    """A build's config from plain data, such as a manifest keeps."""
    return parse(BuildConfig, LoadedYaml(dict(data), where, None))
