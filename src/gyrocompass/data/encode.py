"""Documents as token ids, the bytes each token stands for, and its weight as a target.

    Document --encode--> Encoded (ids, byte counts, weights) | the reason why not

The trainer, `gyro score` and the server all tokenise here, so that one text is one sequence of ids.

    text        BOS, tokens, EOS                           targets: all but BOS
    completion  BOS, tokens of prompt + completion, EOS    targets: what ends after the prompt, and EOS
    chat        what the chat template renders             targets: the assistant's spans, end token included

BOS is the tokenizer's, or its EOS where it has none: with it every token of the text is predicted.

Bytes. A token stands for the bytes from where the token before it ended to where it ends: text that a
normaliser drops counts with the next token, or with the last one at the end of the text. So the counts of a
text add up to its UTF-8 bytes exactly, for any tokenizer with offsets. A special token stands for none.

An answer that is judged (a side of a preference, a labelled answer) is encoded by `encode_judged`: of a
conversation only the last turn is a target, and one more token, the end of text, stands after it as context,
so that a model reads the answer's own end.

The literal of a special token in a text is text; see `gyrocompass.data.chat` for conversations.

Shape legend: N tokens, C characters of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from gyrocompass.core.errors import BadInput
from gyrocompass.data.chat import NotRendered, Rendered, render, special_literals
from gyrocompass.data.document import Document, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


class Encoded(NamedTuple):
    """One document's tokens."""

    id_N: Int32Array
    byte_N: Int32Array
    """Bytes of text; 0 for special tokens."""
    weight_N: Float32Array
    """Weight as a target; 0 for context and for the first token."""


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[Encoded | str]:
    """Encode documents of any kind, batched by kind.

    Args:
        documents: a batch; their weights multiply the tokens' weights.
        tokenizer: any fast tokenizer.

    Returns:
        For each document its tokens, or the reason why it has none that count.

    Raises:
        BadInput: the tokenizer has neither BOS nor EOS, or no chat template for a conversation.
    """
    answers: dict[int, Encoded | str] = {}
    written = [index for index, document in enumerate(documents) if document.kind != "chat"]
    spoken = [index for index, document in enumerate(documents) if document.kind == "chat"]
    pairs = [(documents[index].prompt, documents[index].text) for index in written]
    answers.update(zip(written, encode_completions(tokenizer, pairs), strict=True))
    chats = [documents[index].messages for index in spoken]
    answers.update(zip(spoken, encode_chats(tokenizer, chats), strict=True))
    return [_weighted(answers[index], document.weight) for index, document in enumerate(documents)]


def encode_judged(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[Encoded | str]:
    """Encode answers that are judged; see the module. Arguments, answers and errors as for `encode`."""
    last = _ends(tokenizer)[1]
    answers: list[Encoded | str] = []
    for document, encoded in zip(documents, encode(documents, tokenizer), strict=True):
        if not isinstance(encoded, str):
            weight_N = encoded.weight_N
            if document.kind == "chat":  # from the last target back to where the run of targets begins
                counted_N = np.flatnonzero(weight_N > 0)
                breaks = np.flatnonzero(np.diff(counted_N) > 1)
                first = counted_N[breaks[-1] + 1] if len(breaks) else counted_N[0]
                weight_N = np.where(np.arange(len(weight_N)) >= first, weight_N, 0)
            encoded = Encoded(
                np.append(encoded.id_N, np.int32(last)),
                np.append(encoded.byte_N, np.int32(0)),
                np.append(weight_N, np.float32(0)).astype(np.float32),
            )
        answers.append(encoded)
    return answers


def _weighted(encoded: Encoded | str, weight: float) -> Encoded | str:
    if isinstance(encoded, str) or weight == 1.0:
        return encoded
    return encoded._replace(weight_N=encoded.weight_N * np.float32(weight))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[Encoded]:
    """Encode whole texts: BOS, tokens, EOS."""
    return encode_completions(tokenizer, [("", text) for text in texts])


def encode_completions(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Encode prompts with their completions. A token that holds characters of both is a target."""
    first, last = _ends(tokenizer)
    texts = [prompt + completion for prompt, completion in pairs]
    encoded = []
    for (prompt, _), text, (ids, end_N) in zip(pairs, texts, _tokens(tokenizer, texts), strict=True):
        byte_N = _bytes_between(text, end_N)
        left = len(text.encode()) - int(byte_N.sum())
        byte_N = np.concatenate([[0], byte_N, [0]]).astype(np.int32)
        byte_N[-2 if ids else -1] += left
        weight_N = np.concatenate([[0], end_N > len(prompt), [1]]).astype(np.float32)
        encoded.append(Encoded(np.array([first, *ids, last], np.int32), byte_N, weight_N))
    return encoded


def encode_chats(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[Message]]
) -> list[Encoded | str]:
    """Encode conversations as the chat template writes them.

    Returns:
        For each its tokens, or the reason why nothing in it can be learned.

    Raises:
        BadInput: the tokenizer has no chat template.
    """
    if chats and tokenizer.chat_template is None:
        raise BadInput(
            "the tokenizer has no chat template, and there are conversations to encode",
            where=tokenizer.name_or_path or None,
            fix="use the tokenizer of a chat model, or set its chat_template",
        )
    rendered = [_rendered_or_reason(tokenizer, chat) for chat in chats]
    plain = [chat.marked for chat in rendered if isinstance(chat, Rendered) and not chat.mark]
    tokens = iter(_tokens(tokenizer, plain, specials=True))
    special_ids = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special} - {
        tokenizer.unk_token_id
    }
    answers: list[Encoded | str] = []
    for chat in rendered:
        if isinstance(chat, str):
            answers.append(chat)
        else:
            ids, end_N = _tokens_of_marked(tokenizer, chat) if chat.mark else next(tokens)
            answers.append(_encoded_chat(chat, ids, end_N, special_ids))
    return answers


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str | Sequence[Message]) -> list[int]:
    """The ids a model continues: BOS and a text, or a conversation up to where the assistant speaks.

    Raises:
        BadInput: the chat template refuses the conversation, or there is none.
    """
    if isinstance(prompt, str):
        ((ids, _),) = _tokens(tokenizer, [prompt])
        return [_ends(tokenizer)[0], *ids]
    if tokenizer.chat_template is None:
        raise BadInput("the tokenizer has no chat template", fix="give the prompt as a text")
    try:
        chat = render(tokenizer, prompt, prompt_only=True)
    except NotRendered as error:
        raise BadInput(str(error)) from error
    if chat.mark:
        return _tokens_of_marked(tokenizer, chat)[0]
    ((ids, _),) = _tokens(tokenizer, [chat.marked], specials=True)
    return ids


def _rendered_or_reason(tokenizer: PreTrainedTokenizerFast, chat: Sequence[Message]) -> Rendered | str:
    try:
        return render(tokenizer, chat)
    except NotRendered as error:
        return str(error)


def _encoded_chat(chat: Rendered, ids: list[int], end_N: Int64Array, special_ids: set[int]) -> Encoded | str:
    text = chat.marked
    if chat.mark:
        text = text.replace(chat.mark, "")
    start_N = np.concatenate([[0], end_N[:-1]])
    counted_N = np.zeros(len(ids), np.bool_)
    for span in chat.spans:
        start, end = (
            place - chat.marked.count(chat.mark, 0, place) if chat.mark else place for place in span
        )
        counted_N |= (end_N > start) & ((start_N < end) | (end_N <= end))
    counted_N[:1] = False
    if not counted_N.any():
        return "the chat template gives the assistant no token to say"
    byte_N = _bytes_between(text, end_N)
    byte_N[np.isin(ids, list(special_ids))] = 0
    return Encoded(np.array(ids, np.int32), byte_N, counted_N.astype(np.float32))


def _ends(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The ids that begin and end a document."""
    last = tokenizer.eos_token_id
    if last is None:
        raise BadInput(
            "the tokenizer has no end-of-text token",
            where=tokenizer.name_or_path or None,
            fix="set its eos_token",
        )
    first = tokenizer.bos_token_id
    return (last if first is None else first), last


def _tokens(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, specials: bool = False
) -> list[tuple[list[int], Int64Array]]:
    """Ids of each text, and where each token ends in it (characters, never decreasing).

    Args:
        tokenizer: any fast tokenizer; it adds nothing of its own here.
        texts: what to encode.
        specials: whether the literal of a special token is that token.
    """
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not specials,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        (ids, np.maximum.accumulate(np.array(offsets, np.int64).reshape(-1, 2)[:, 1]))
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _tokens_of_marked(tokenizer: PreTrainedTokenizerFast, chat: Rendered) -> tuple[list[int], Int64Array]:
    """Ids and ends of a rendering with marked literals: only the literals without a mark are tokens."""
    ids: list[int] = []
    ends: list[Int64Array] = []
    length = 0  # characters so far, without marks

    def add_text(part: str) -> None:
        nonlocal length
        part = part.replace(chat.mark, "")
        ((part_ids, part_end_N),) = _tokens(tokenizer, [part])
        ids.extend(part_ids)
        ends.append(part_end_N + length)
        length += len(part)

    place = 0
    for match in special_literals(tokenizer).finditer(chat.marked):
        add_text(chat.marked[place : match.start()])
        length += len(match[0])
        ids.append(tokenizer.convert_tokens_to_ids(match[0]))
        ends.append(np.array([length], np.int64))
        place = match.end()
    add_text(chat.marked[place:])
    return ids, np.concatenate(ends)


def _bytes_between(text: str, end_N: Int64Array) -> Int32Array:
    """UTF-8 bytes from each end to the next."""
    if text.isascii():
        byte_end_N = end_N
    else:
        code_C = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        width_C = 1 + (code_C >= 0x80).astype(np.int64) + (code_C >= 0x800) + (code_C >= 0x10000)
        byte_end_N = np.concatenate([[0], np.cumsum(width_C)])[end_N]
    return np.diff(byte_end_N, prepend=0).astype(np.int32)
