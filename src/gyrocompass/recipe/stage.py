"""What a stage is: a frozen config that names its inputs and fills one artifact.

    stage config + input artifacts --Stage.run--> files in a draft --store--> an artifact

The key of a stage is the hash of its kind, its version, its config and the ids of its inputs; the names
that a recipe happens to give its stages are left out. Equal keys mean equal work, so a finished stage is
found again by its key. `version` goes up when a stage's code changes what it would make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from gyrocompass.core.artifact import Artifact, Draft
from gyrocompass.core.config import Config, config_hash
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.train.distributed import World
from gyrocompass.train.metrics import MlflowConfig


@dataclass(frozen=True)
class Reference:
    """Marks a config field that names other stages, and says what they must make; none: anything."""

    makes: tuple[str, ...] = ()
    """Kinds of artifact, any of which will do."""


StageName = Annotated[str, Reference()]
OptionalStageName = Annotated[str | None, Reference()]
StageNames = Annotated[tuple[str, ...], Reference()]

DocumentsName = Annotated[str, Reference(("documents",))]
OptionalDocumentsName = Annotated[str | None, Reference(("documents",))]
DocumentsNames = Annotated[tuple[str, ...], Reference(("documents",))]
ModelName = Annotated[str, Reference(("model",))]
OptionalModelName = Annotated[str | None, Reference(("model",))]
TokenizerName = Annotated[str, Reference(("tokenizer", "model"))]  # a model's folder has its tokenizer in it
TokensName = Annotated[str, Reference(("tokens",))]
OptionalTokensName = Annotated[str | None, Reference(("tokens",))]
TokensNames = Annotated[tuple[str, ...], Reference(("tokens",))]


@dataclass(frozen=True)
class Workplace:
    """Where a stage works: its inputs, what outlives a kill, and whom it talks to.

    `work` is a folder that stays until the stage is done: an interrupted stage goes on from it.
    """

    name: str
    inputs: Mapping[str, Artifact]
    work: Path
    store: Store
    progress: Progress
    world: World
    tracking: MlflowConfig | None = None

    def input(self, role: str) -> Path:
        """The folder of an input."""
        return self.inputs[role].path


class Stage(Config):
    """One step of a recipe. A subclass adds `kind: Literal[...]`, its config, `makes` and `run`."""

    kind: str
    version: ClassVar[int] = 1
    makes: ClassVar[str]
    """The kind of artifact."""
    distributed: ClassVar[bool] = False
    """Whether all ranks of a `torchrun` run it together; any other stage is run by the first rank alone."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Do the work: files into `draft.path`, counts into `draft.counts`.

        In a distributed stage only the first rank's draft becomes an artifact.
        """
        raise NotImplementedError

    def outside(self) -> Any:
        """What outside the recipe decides the result, as JSON: the state of source files, say."""
        return None

    def origins(self) -> dict[str, Artifact]:
        """Artifacts outside the recipe that this one is made from, by role: parents that lineage follows."""
        return {}

    def references(self) -> dict[str, str]:
        """For each role, the stage whose artifact is read: `data`, or `data.0`, `data.1` for a list."""
        found: dict[str, str] = {}
        for field in self.reference_fields():
            value = getattr(self, field)
            if isinstance(value, str):
                found[field] = value
            elif value is not None:
                found |= {f"{field}.{number}": name for number, name in enumerate(value)}
        return found

    def wanted(self, role: str) -> tuple[str, ...]:
        """Kinds of artifact that will do in a role; none: anything."""
        return self.reference_fields()[role.partition(".")[0]].makes

    def settings(self) -> dict[str, Any]:
        """The config without the names of other stages: what the manifest records and the key covers."""
        return self.model_dump(mode="json", exclude=set(self.reference_fields()))

    def key(self, parents: Mapping[str, str]) -> str:
        """The cache key, given the artifact id behind each role."""
        content = {
            "version": self.version,
            "settings": self.settings(),
            "outside": self.outside(),
            "parents": dict(parents),
        }
        return config_hash(content)

    @classmethod
    def reference_fields(cls) -> dict[str, Reference]:
        """The fields that name other stages, each with what those must make."""
        return {
            name: mark
            for name, field in cls.model_fields.items()
            for mark in field.metadata
            if isinstance(mark, Reference)
        }
