"""The record of a run: which stages it had and which artifacts stand for them.

Written as JSON beside the report, so that a report can be made again from the store alone.
"""

from __future__ import annotations

from gyrocompass.core.artifact import ArtifactId
from gyrocompass.core.config import Config

RECORD = "run.json"


class StageRecord(Config):
    """One finished stage of a run."""

    name: str
    kind: str
    """The stage's kind, as in the recipe."""
    artifact: ArtifactId
    inputs: dict[str, str]
    """Role -> name of the stage it was read from."""
    reused: bool
    seconds: float


class RunRecord(Config):
    """What a run was: the recipe's name and, in order, its stages with their artifacts."""

    recipe: str
    description: str
    started_at: str
    seconds: float
    code_version: str
    stages: list[StageRecord]
