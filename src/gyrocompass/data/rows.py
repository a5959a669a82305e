"""Documents as rows of tokens, with the numbers that objectives read beside them.

    documents, tokenizer --token_rows--> TokenRow for each answer | Quarantined
    documents, tokenizer --tokenise----> tokens-*.parquet in a folder

A preference becomes two rows, with the label `side` (1 chosen, 0 rejected), or three (2 the gold answer);
any other document becomes one. Rows that are read together have one unit: the sides of a preference, and
documents that follow each other under one name. A unit is used as a whole or not at all: where one of its
documents cannot be used, all are quarantined.

An answer judged in steps has the column `step_reward`. As the head reads a step's end where the step's last
token has been read, the number stands with the token after it, whose prediction is made there.

Shape legend: N tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gyrocompass.data.document import EXCERPT_LENGTH, Document, Message, Quarantined
from gyrocompass.data.encode import Encoded, Float32Array, encode, encode_judged
from gyrocompass.data.tokenizer import parallel_tokenizers
from gyrocompass.data.tokens import TokenCounts, TokenRow, write_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEP_REWARD = "step_reward"
"""The column of answers that are judged step by step; NaN where no step ends."""

SIDE = {"chosen": 1.0, "rejected": 0.0, "gold": 2.0}
"""What the label `side` says of each answer of a preference."""

Arrange = Callable[[Encoded, Document], Encoded]
"""Rearranges the tokens of a text, or weighs them anew; see `gyrocompass.data.infilling`."""

_BATCH_BYTES = 2**20


class Tokenised(NamedTuple):
    """What became of a stream of documents."""

    counts: TokenCounts
    quarantined: tuple[Quarantined, ...]


def tokenise(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    max_tokens: int | None = None,
    arrange: Arrange | None = None,
    on_progress: Callable[[int], object] = lambda n_bytes: None,
) -> Tokenised:
    """Encode documents and write them, batch by batch.

    Args:
        documents: of any kind; streamed.
        tokenizer: any fast tokenizer.
        folder: an existing folder; see `write_tokens`.
        max_tokens: as for `token_rows`.
        arrange: as for `token_rows`.
        on_progress: called with the bytes of each batch of documents when it is encoded.

    Returns:
        What was written, and the documents in which nothing can be learned, each with its reason.
    """
    quarantined: list[Quarantined] = []

    def rows() -> Iterator[TokenRow]:
        for batch in _batches(documents):
            for made in token_rows(batch, tokenizer, max_tokens, arrange):
                if isinstance(made, Quarantined):
                    quarantined.append(made)
                else:
                    yield from made
            on_progress(sum(document.n_bytes for document in batch))

    with parallel_tokenizers():
        counts = write_tokens(folder, rows())
    return Tokenised(counts, tuple(quarantined))


def token_rows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int | None = None,
    arrange: Arrange | None = None,
) -> Iterator[list[TokenRow] | Quarantined]:
    """Each document's rows, of a preference the chosen answer first; or why it has none.

    Args:
        documents: a batch; no unit is cut by where it begins or ends.
        tokenizer: any fast tokenizer.
        max_tokens: units of more tokens, such as the sides of a preference together, are quarantined.
        arrange: what is done to each text that is not judged; None: nothing.
    """
    encoded = _encoded(documents, tokenizer, arrange)
    begins = [n for n, pair in enumerate(pairwise(documents), 1) if not _are_together(*pair)]
    for start, stop in pairwise([0, *begins, len(documents)] if documents else []):
        unit = [
            _rows_or_reason(*both) for both in zip(documents[start:stop], encoded[start:stop], strict=True)
        ]
        yield from _whole_unit(documents[start:stop], unit, max_tokens)


def _are_together(before: Document, document: Document) -> bool:
    """Whether two documents that follow each other are of one unit."""
    return document.unit is not None and _unit(before) == _unit(document)


def _unit(document: Document) -> str:
    """The name of what a document is read together with; "" where that may be cut."""
    if document.unit is not None and document.kind != "preference":
        return f"{document.source}/{document.unit}"
    return document.id if document.is_judged else ""


def _whole_unit(
    documents: Sequence[Document], rows: Sequence[list[TokenRow] | str], max_tokens: int | None
) -> Iterator[list[TokenRow] | Quarantined]:
    """A unit's rows if all of them can be used; else why not."""
    n_tokens = sum(len(row.ids) for made in rows if not isinstance(made, str) for row in made)
    too_long = max_tokens is not None and n_tokens > max_tokens
    failed = [d for d, made in zip(documents, rows, strict=True) if isinstance(made, str)]
    for document, made in zip(documents, rows, strict=True):
        if isinstance(made, str):
            yield _quarantined(document, made)
        elif failed:
            yield _quarantined(
                document, f"of the unit {document.unit}, of which {failed[0].path} is left out"
            )
        elif too_long:
            what = f"{n_tokens} tokens" + (" of its unit together" if len(documents) > 1 else "")
            yield _quarantined(document, f"{what}, and max_tokens is {max_tokens}")
        else:
            yield made


def _quarantined(document: Document, reason: str) -> Quarantined:
    excerpt = next(filter(None, document.texts), "")[:EXCERPT_LENGTH]
    return Quarantined(document.path, None, reason, excerpt, document.source, document.id)


def _encoded(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, arrange: Arrange | None
) -> list[list[Encoded | str]]:
    """Each document's tokens, answer by answer, or the reason why it has none."""
    plain = [n for n, document in enumerate(documents) if not document.is_judged]
    judged = [
        (n, side) for n, document in enumerate(documents) if document.is_judged for side in _sides(document)
    ]
    found: list[list[Encoded | str]] = [[] for _ in documents]
    for n, one in zip(plain, encode([documents[n] for n in plain], tokenizer), strict=True):
        if arrange is not None and documents[n].kind == "text" and not isinstance(one, str):
            one = arrange(one, documents[n])
        found[n].append(one)
    answers = encode_judged([side for _, side in judged], tokenizer)
    for (n, _), answer in zip(judged, answers, strict=True):
        found[n].append(answer)
    return found


def _sides(document: Document) -> tuple[Document, ...]:
    """A preference as the answers it compares; another judged answer as it is."""
    if document.kind != "preference":
        return (document,)
    answers = [document.text, document.rejected, *filter(None, [document.gold])]
    return tuple(
        replace(document, kind="chat", messages=(*document.messages, Message("assistant", text)))
        if document.messages
        else replace(document, kind="completion", text=text)
        for text in answers
    )


def _rows_or_reason(document: Document, encoded: Sequence[Encoded | str]) -> list[TokenRow] | str:
    found = []
    for one in encoded:
        if isinstance(one, str):
            return one
        found.append(one)
    if document.kind != "preference":
        rewards_N = _step_rewards(document, found[0]) if document.steps else None
        if isinstance(rewards_N, str):
            return rewards_N
        columns = {} if rewards_N is None else {STEP_REWARD: rewards_N}
        return [_row(document, document.id, found[0], document.labels)._replace(columns=columns)]
    if np.array_equal(found[0].id_N, found[1].id_N):
        return "chosen and rejected are the same tokens"
    return [
        _row(document, f"{document.id}#{name}", one, {"side": side, **document.labels})
        for (name, side), one in zip(SIDE.items(), found, strict=False)
    ]


def _row(document: Document, name: str, encoded: Encoded, labels: Mapping[str, float]) -> TokenRow:
    return TokenRow(
        name,
        document.slice,
        document.source,
        *encoded,
        document.split_key,
        _unit(document),
        labels=dict(labels),
    )


def _step_rewards(document: Document, encoded: Encoded) -> Float32Array | str:
    """What the answer's steps are worth, NaN but at the token after each; or why they cannot be placed."""
    answer = document.messages[-1].content if document.kind == "chat" else document.text
    read_N = np.cumsum(encoded.byte_N)  # bytes of text up to the end of each token
    before = len(document.prompt.encode())
    if document.kind == "chat":
        span = np.flatnonzero(encoded.weight_N > 0)
        before = int(read_N[span[0] - 1])
        if int(read_N[span[-1]]) - before != len(answer.encode()):
            return "the chat template changes what the assistant says, so that its steps cannot be placed"
    rewards_N = np.full(len(read_N), np.nan, np.float32)
    last = 0
    for number, (end, reward) in enumerate(document.steps):
        place = int(np.searchsorted(read_N, before + len(answer[:end].encode()))) + 1
        if place == last:
            return f"steps[{number - 1}] and steps[{number}] end in one token"
        if encoded.weight_N[place] == 0:
            return f"no token that counts follows steps[{number}]"
        last = place
        rewards_N[place] = np.nan if reward is None else reward
    return rewards_N


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about a megabyte, with no unit cut."""
    batch: list[Document] = []
    n_bytes = 0
    for document in documents:
        if n_bytes >= _BATCH_BYTES and not _are_together(batch[-1], document):
            yield batch
            batch, n_bytes = [], 0
        batch.append(document)
        n_bytes += document.n_bytes
    if batch:
        yield batch
