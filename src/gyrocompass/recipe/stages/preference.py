"""Preferences: the data that alignment learns from."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest
from typing import ClassVar, Literal

from pydantic import Field

from gyrocompass.core.artifact import Draft
from gyrocompass.data.corrupt import preferences
from gyrocompass.data.document import Document, read_documents
from gyrocompass.recipe.stage import DocumentsName, Stage, Workplace
from gyrocompass.recipe.stages.corpus import counting, write_stage_records


class PreferencesStage(Stage):
    """Preferences of code over the same code made worse, from conversations that end in code."""

    kind: Literal["preferences"] = "preferences"
    makes: ClassVar[str] = "documents"
    documents: DocumentsName
    most: int | None = Field(default=None, ge=1)
    """Keep so many, chosen by the hash of their content; None: all."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes documents.parquet with preferences; each knows the conversation it was derived from."""
        derived: Iterable[Document] = preferences(read_documents(workplace.input("documents")))
        if self.most is not None:
            derived = nsmallest(self.most, derived, key=lambda document: document.content_hash)
        write_stage_records(draft, counting(derived, workplace))
