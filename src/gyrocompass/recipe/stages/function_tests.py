"""Prompts for code with unit tests of the answer, made from the standard library's own functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from heapq import nsmallest
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field

from gyrocompass.core.artifact import Draft
from gyrocompass.core.errors import BadInput
from gyrocompass.data import stdlib
from gyrocompass.data.document import Document, read_documents
from gyrocompass.measure.function_tests import Subject, function_tests, may_be_told
from gyrocompass.measure.rewards.registry import REWARDS
from gyrocompass.recipe.stage import DocumentsName, OptionalDocumentsName, Stage, Workplace
from gyrocompass.recipe.stages.corpus import counting, write_stage_records


class FunctionTestsStage(Stage):
    """Of instruction pairs, those whose answer is a function that can be told right from wrong, with tests.

    The functions run in the sandbox. On a machine that has none, the pairs go on without tests, and whatever
    reads tests says that it cannot: the reward `unit_tests`, among `optional_rewards` of an alignment stage.
    """

    kind: Literal["function_tests"] = "function_tests"
    makes: ClassVar[str] = "documents"
    documents: DocumentsName
    seen: OptionalDocumentsName = None
    """What was learned from: pairs that come of one of these documents are left out."""
    slice: str = "chat/body"
    """Of the pairs, those of this slice: their answers are code."""
    candidates: int = Field(default=200, ge=1)
    """How many to try of those that take and return something, chosen by the hash of their content."""
    most: int = Field(default=40, ge=1)
    """How many to keep of those that can be tested."""

    def outside(self) -> Any:
        """The interpreter, whose functions they are, and whether it can be asked."""
        return [list(sys.version_info[:3]), REWARDS["unit_tests"].why_not() is None]

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes documents.parquet; each document knows the pair it was made from."""
        possible = (pair for pair in self._unseen(workplace) if may_be_told(_subject(pair)))
        pairs = nsmallest(self.candidates, possible, key=lambda pair: pair.content_hash)
        draft.counts["candidates"] = len(pairs)
        if REWARDS["unit_tests"].why_not() is None:
            tests = function_tests([_subject(pair) for pair in pairs])
            pairs = [_tested(pair, own) for pair, own in zip(pairs, tests, strict=True) if own]
        if not pairs:
            raise BadInput(
                "no function here can be tested",
                where=f"stages.{workplace.name}.documents",
                fix="give pairs of more modules of the standard library",
            )
        write_stage_records(draft, counting(pairs[: self.most], workplace))
        draft.counts |= {"testable": len(pairs), "tests": sum(len(pair.tests) for pair in pairs[: self.most])}

    def _unseen(self, workplace: Workplace) -> Iterator[Document]:
        """The pairs that may be used."""
        seen: set[str] = set()
        if self.seen is not None:
            seen = {document.id for document in read_documents(workplace.input("seen"))}
        for pair in read_documents(workplace.input("documents")):
            if pair.slice == self.slice and pair.source == stdlib.SOURCE and seen.isdisjoint(pair.origin_ids):
                yield pair


def _subject(pair: Document) -> Subject:
    """The function that a pair asks for: its path is `folder/module.py#Class.name`."""
    path, _, name = pair.path.partition("#")
    parts = PurePosixPath(path).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Subject(module, name, pair.messages[-1].content)


def _tested(pair: Document, tests: list[str]) -> Document:
    return replace(pair, tests=tuple(tests), origin_ids=(pair.id,), group=pair.split_key)
