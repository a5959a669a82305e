"""Conversations as text: a template's rendering, and which characters of it the assistant says.

    messages --render--> Rendered (text, assistant spans, places of literals that are not tokens)

A template marks the assistant's spans with `{% generation %}`. Many published ones do not; then a span is
what the rendering gains with the assistant's message over the prompt that asks for it, which holds for every
template that only appends. White space after the turn's closing token is not part of it: a model stops
before.

What somebody wrote is not what a template writes: a message that contains `<|endoftext|>` says those 13
characters. Before rendering, a noncharacter is put into each such literal; it is taken out when the text is
tokenised (`gyrocompass.data.encode`), so that the literal never becomes the token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from gyrocompass.data.document import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as the template writes it."""

    marked: str
    """The text; where `mark` is not empty it stands inside each literal that is not a token."""
    mark: str
    spans: tuple[tuple[int, int], ...]
    """Start and end, in characters of `marked`, of what the assistant says."""


class NotRendered(Exception):  # noqa: N818
    """The template has no rendering, or no assistant span, for this conversation; str() is the reason."""


def special_literals(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Matches the literal of every special token, the longest first."""
    literals = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile(
        "|".join(re.escape(text) for text in sorted(literals, key=len, reverse=True)) or r"(?!)"
    )


def render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, prompt_only: bool = False
) -> Rendered:
    """Render a conversation.

    Args:
        tokenizer: its chat template is used.
        messages: the conversation.
        prompt_only: end with what asks the assistant to speak; there are no spans then.

    Raises:
        NotRendered: the template refuses the conversation (a role it does not know, an order it does not
            allow), or it does not say where the assistant speaks.
    """
    mark, messages = _mark_literals(tokenizer, messages)
    if prompt_only:
        return Rendered(_render(tokenizer, messages, True), mark, ())
    if _GENERATION.search(tokenizer.get_chat_template()):
        text, spans = _render_with_spans(tokenizer, messages)
        return Rendered(text, mark, spans)
    text = _render(tokenizer, messages, False)
    return Rendered(text, mark, tuple(_spans_by_prefix(tokenizer, messages, text)))


def _mark_literals(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[str, Sequence[Message]]:
    """Put a mark after the first character of each special literal in the contents."""
    literals = special_literals(tokenizer)
    joined = "\n".join(message.content for message in messages)
    if not literals.search(joined):
        return "", messages
    mark = next((character for character in _NONCHARACTERS if character not in joined), None)
    if mark is None:
        raise NotRendered("the text of a special token beside every noncharacter from U+FDD0 to U+FDEF")

    def put_mark(match: re.Match[str]) -> str:
        return match[0][0] + mark + match[0][1:]

    return mark, [message._replace(content=literals.sub(put_mark, message.content)) for message in messages]


def _render_with_spans(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[[message._asdict() for message in messages]],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise NotRendered(f"the chat template refuses it: {error}") from error
    return texts[0], tuple((start, end) for start, end in spans[0])


def _render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], prompt: bool) -> str:
    from jinja2 import TemplateError

    conversation = [message._asdict() for message in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise NotRendered(f"the chat template refuses it: {error}") from error


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], text: str
) -> list[tuple[int, int]]:
    """The assistant's spans of a template that only appends and marks nothing."""
    literals = special_literals(tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if index == 0:
            raise NotRendered(
                "the chat template marks no assistant span, and no message comes before the first"
            )
        asked = _render(tokenizer, messages[:index], True)
        said = _render(tokenizer, messages[: index + 1], False)
        if not (text.startswith(said) and said.startswith(asked)):
            raise NotRendered("the chat template marks no assistant span and rewrites earlier turns")
        closed = said.rstrip()
        ends_with_token = any(match.end() == len(closed) for match in literals.finditer(closed))
        spans.append((len(asked), len(closed) if ends_with_token else len(said)))
    return spans
