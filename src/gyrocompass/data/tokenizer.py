"""The tokenizer: byte-level BPE trained on the documents, saved as any Hugging Face tokenizer is.

    texts --train_tokenizer--> folder --load_tokenizer--> a fast tokenizer of transformers

Byte-level means lossless: every text is some sequence of the 256 bytes, so nothing is unknown, nothing is
normalised and decoding gives the text back (Sennrich et al. 2016; Radford et al. 2019 for bytes).

The chat template writes each turn as its role's token and the content, and marks what the assistant says with
`{% generation %}`. An assistant's turn ends with the end-of-text token inside the mark: the label that
teaches a model to stop is the one every generation loop stops at.

Left out on purpose: SentencePiece models in Python ("slow" tokenizers) have no offsets, so bytes could not be
counted; they are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gyrocompass.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""Begins and ends every document; ends an assistant's turn."""
PADDING = "<|pad|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- elif message['role'] in ['system', 'user', 'tool'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] }}
    {%- else %}
        {{- raise_exception('the template has no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

_SPECIAL_TOKENS = [END_OF_TEXT, PADDING, *ROLE_TOKENS.values()]
SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, extra_special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it.

    A text that contains the literal of a special token is read as plain text.

    Args:
        texts: what to learn merges from; read once.
        vocab_size: entries, special tokens included; a small text gives fewer.
        folder: where `tokenizer.json`, its config and the chat template are written.
        extra_special_tokens: what else is a token by itself and stands for no text, such as sentinels.

    Raises:
        BadInput: the vocabulary cannot hold the 256 bytes and the special tokens, or two of those are one.
    """
    special_tokens = [*_SPECIAL_TOKENS, *extra_special_tokens]
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise BadInput(
            f"special tokens are each another, and none is empty: {', '.join(special_tokens)}",
            where="extra_special_tokens",
        )
    if vocab_size < 256 + len(special_tokens):
        raise BadInput(
            f"{vocab_size} entries cannot hold the 256 bytes and {len(special_tokens)} special tokens",
            fix=f"set vocab_size to {256 + len(special_tokens)} or more",
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with parallel_tokenizers():
        backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        extra_special_tokens=[*ROLE_TOKENS.values(), *extra_special_tokens],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a folder (a model's folder holds one too); nothing is downloaded or executed.

    Raises:
        BadInput: there is none, it cannot be read, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise BadInput("no such folder", where=path, fix="give the folder of a tokenizer or of a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise BadInput(f"the tokenizer cannot be loaded: {first_line}", where=path) from error
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} has no offsets, so the bytes of its tokens cannot be counted",
            where=path,
            fix="save the tokenizer in its fast form (tokenizer.json)",
        )
    return tokenizer


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Bulk work on all cores, unless TOKENIZERS_PARALLELISM says otherwise.

    Afterwards the variable is set to false where it was not set: the library's threads do not survive a fork,
    and saying so beforehand keeps it from warning in every process that is forked later.
    """
    name = "TOKENIZERS_PARALLELISM"
    chosen = os.environ.get(name)
    os.environ[name] = chosen or "true"
    try:
        yield
    finally:
        os.environ[name] = chosen or "false"
