"""From documents to token ids: a tokenizer trained on documents, and documents encoded by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from gyrocompass.core.artifact import DocumentRow, Draft
from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Document, read_documents
from gyrocompass.data.infilling import InfillingConfig, PrefixLmConfig, fill_in_the_middle, prefix_lm
from gyrocompass.data.rows import Arrange, tokenise
from gyrocompass.data.tokenizer import SMALLEST_VOCABULARY, load_tokenizer, train_tokenizer
from gyrocompass.data.tokens import TokenCounts, TokenDataset, write_tokens
from gyrocompass.recipe.stage import DocumentsName, ModelName, Stage, TokenizerName, Workplace
from gyrocompass.recipe.stages.corpus import listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenizerStage(Stage):
    """A byte-level BPE tokenizer with a chat template, trained on `documents`."""

    kind: Literal["tokenizer"] = "tokenizer"
    makes: ClassVar[str] = "tokenizer"
    documents: DocumentsName
    vocabulary_size: int = Field(default=8192, ge=SMALLEST_VOCABULARY)
    extra_special_tokens: tuple[str, ...] = ()
    """Special tokens besides those of the chat template: sentinels of `infilling`, say."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes the tokenizer's files."""
        texts = (text for document in read_documents(workplace.input("documents")) for text in document.texts)
        tokenizer = train_tokenizer(texts, self.vocabulary_size, draft.path, self.extra_special_tokens)
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
    """Longer units, such as a preference's sides together, are quarantined."""
    infilling: InfillingConfig | None = None
    """Rearrange texts, so that a model learns to fill in what is between two parts."""
    prefix_lm: PrefixLmConfig | None = None
    """Let the first part of each text be context alone."""

    @model_validator(mode="after")
    def _check_arrangement(self) -> TokensStage:
        if self.infilling is not None and self.prefix_lm is not None:
            raise ValueError("infilling and prefix_lm do not go together; make tokens of each")
        return self

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes tokens-*.parquet, and quarantined.parquet with the documents that yielded nothing."""
        folder = workplace.input("documents")
        rows: list[DocumentRow] = []
        task = workplace.progress.task(workplace.name, _bytes(folder), unit="byte")
        tokenizer = load_tokenizer(workplace.input("tokenizer"))
        done = tokenise(
            _remembered(folder, rows),
            tokenizer,
            draft.path,
            max_tokens=self.max_tokens,
            arrange=self._arrangement(tokenizer),
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
        draft.counts["quarantined"] = len(done.quarantined)
        _count(draft, done.counts, TokenDataset.open(draft.path))

    def _arrangement(self, tokenizer: PreTrainedTokenizerFast) -> Arrange | None:
        """What is done to the tokens of each text."""
        infilling, prefix = self.infilling, self.prefix_lm
        if infilling is not None:
            sentinels = infilling.sentinels.of(tokenizer)
            return lambda encoded, document: fill_in_the_middle(encoded, document.id, sentinels, infilling)
        if prefix is not None:
            return lambda encoded, document: prefix_lm(encoded, document.id, prefix.seed)
        return None


def write_again(workplace: Workplace, draft: Draft, data: TokenDataset) -> None:
    """Write the tokens of the input `data` with more columns: what they hold and count stays what it was."""
    _count(draft, write_tokens(draft.path, data.rows()), data)
    draft.documents = workplace.store.documents(workplace.inputs["data"].id)


def _count(draft: Draft, counts: TokenCounts, data: TokenDataset) -> None:
    draft.counts |= {
        "documents": counts.documents,
        "tokens": counts.tokens,
        "targets": counts.targets,
        "bytes": counts.bytes,
    }
    draft.counts |= {f"tokens/{name}": count for name, count in data.tokens_by_slice().items()}
    draft.counts |= {f"targets/{name}": count for name, count in data.targets_by_slice().items()}


def _remembered(folder: Path, rows: list[DocumentRow]) -> Iterator[Document]:
    for document in read_documents(folder):
        rows.append(listed(document))
        yield document


def _bytes(folder: Path) -> int:
    return sum(document.n_bytes for document in read_documents(folder))
