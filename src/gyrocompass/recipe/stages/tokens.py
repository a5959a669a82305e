"""From documents to token ids: a tokenizer trained on documents, and documents encoded by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from gyrocompass.core.artifact import DocumentRow, Draft
from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Document, read_documents
from gyrocompass.data.rows import tokenise
from gyrocompass.data.tokenizer import SMALLEST_VOCABULARY, load_tokenizer, train_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.recipe.stage import DocumentsName, ModelName, Stage, TokenizerName, Workplace
from gyrocompass.recipe.stages.corpus import listed


class TokenizerStage(Stage):
    """A byte-level BPE tokenizer with a chat template, trained on `documents`."""

    kind: Literal["tokenizer"] = "tokenizer"
    makes: ClassVar[str] = "tokenizer"
    documents: DocumentsName
    vocabulary_size: int = Field(default=8192, ge=SMALLEST_VOCABULARY)

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes the tokenizer's files."""
        texts = (text for document in read_documents(workplace.input("documents")) for text in document.texts)
        tokenizer = train_tokenizer(texts, self.vocabulary_size, draft.path)
        draft.counts["vocabulary"] = len(tokenizer)


class ImportedTokenizerStage(Stage):
    """The tokenizer of a model stage, as a stage of its own."""

    kind: Literal["tokenizer_of"] = "tokenizer_of"
    makes: ClassVar[str] = "tokenizer"
    model: ModelName

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes the tokenizer's files."""
        tokenizer = load_tokenizer(workplace.input("model"))
        tokenizer.save_pretrained(draft.path)
        draft.counts["vocabulary"] = len(tokenizer)


class TokensStage(Stage):
    """Documents as sharded token ids, with the bytes and the weight of every token."""

    kind: Literal["tokens"] = "tokens"
    makes: ClassVar[str] = "tokens"
    documents: DocumentsName
    tokenizer: TokenizerName
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """More documents than this in which nothing can be learned fail the stage."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longer documents, a preference's two sides together, are quarantined."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes tokens-*.parquet, and quarantined.parquet with the documents that yielded nothing."""
        folder = workplace.input("documents")
        rows: list[DocumentRow] = []
        task = workplace.progress.task(workplace.name, _bytes(folder), unit="byte")
        done = tokenise(
            _remembered(folder, rows),
            load_tokenizer(workplace.input("tokenizer")),
            draft.path,
            max_tokens=self.max_tokens,
            on_progress=task.advance,
        )
        task.finish()
        share = len(done.quarantined) / max(1, len(rows))
        if share > self.max_quarantined_share:
            first = "\n".join(f"    {entry.path}: {entry.reason}" for entry in done.quarantined[:3])
            raise BadInput(
                f"nothing can be learned from {len(done.quarantined)} of {len(rows)} documents:\n{first}",
                where=workplace.name,
                fix="mend these documents, or raise max_quarantined_share",
            )
        left_out = {entry.document_id for entry in done.quarantined}
        draft.documents = [
            row._replace(status="quarantined") if row.document_id in left_out else row for row in rows
        ]
        dataset = TokenDataset.open(draft.path)
        draft.counts |= {
            "documents": done.counts.documents,
            "tokens": done.counts.tokens,
            "targets": done.counts.targets,
            "bytes": done.counts.bytes,
            "quarantined": len(done.quarantined),
        }
        draft.counts |= {f"tokens/{name}": count for name, count in dataset.tokens_by_slice().items()}
        draft.counts |= {f"targets/{name}": count for name, count in dataset.targets_by_slice().items()}


def _remembered(folder: Path, rows: list[DocumentRow]) -> Iterator[Document]:
    for document in read_documents(folder):
        rows.append(listed(document))
        yield document


def _bytes(folder: Path) -> int:
    return sum(document.n_bytes for document in read_documents(folder))
