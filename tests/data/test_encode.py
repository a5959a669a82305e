import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_cases import SPECIALS, TRAINING_TEXTS, any_text

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Document, Message
from gyrocompass.data.encode import (
    Encoded,
    encode,
    encode_chats,
    encode_completions,
    encode_texts,
    prompt_ids,
)
from gyrocompass.data.rows import tokenise
from gyrocompass.data.tokenizer import train_tokenizer
from gyrocompass.data.tokens import TokenDataset

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = "the chat template marks no assistant span and rewrites earlier turns"
text_with_literals = st.lists(st.one_of(any_text, st.sampled_from(SPECIALS)), max_size=4).map("".join)
chats = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), text_with_literals),
    min_size=1,
    max_size=4,
)


def special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(SPECIALS))


@pytest.fixture(scope="session", params=["byte_level", "word_piece", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_bytes_add_up_for_any_tokenizer(tokenizer: Any, data: st.DataObject) -> None:
    texts = data.draw(
        st.lists(st.one_of(any_text, st.text(" \n\tabc é", max_size=20)), min_size=1, max_size=3)
    )
    for text, encoded in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert encoded.byte_N.sum() == len(text.encode())
        assert (encoded.byte_N >= 0).all() and encoded.byte_N[0] == 0
        assert encoded.weight_N.tolist() == [0.0] + [1.0] * (len(encoded.id_N) - 1)
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        assert (encoded.id_N[0], encoded.id_N[-1]) == (first, tokenizer.eos_token_id)


@settings(deadline=None, max_examples=100)
@given(text=text_with_literals)
@example(text="a<|endoftext|>b")
def test_a_literal_in_a_text_is_text(byte_level: Any, text: str) -> None:
    (encoded,) = encode_texts(byte_level, [text])
    inner = encoded.id_N[1:-1].tolist()
    assert not special_ids(byte_level) & set(inner)
    assert byte_level.decode(inner) == text


def test_bytes_fall_on_the_token_that_ends_there(byte_level: Any) -> None:
    (encoded,) = encode_texts(byte_level, ["é = 1"])
    pieces = [byte_level.decode([id_]) for id_ in encoded.id_N[1:-1]]
    assert encoded.byte_N[1:-1].tolist() == [2, 0, 2, 2], (
        pieces
    )  # é is two tokens here; its bytes are the first's


@settings(deadline=None, max_examples=60)
@given(prompt=any_text, completion=any_text)
def test_completions_count_what_ends_after_the_prompt(byte_level: Any, prompt: str, completion: str) -> None:
    ((encoded),) = encode_completions(byte_level, [(prompt, completion)])
    assert encoded.byte_N.sum() == len((prompt + completion).encode())
    counted = encoded.weight_N > 0
    assert counted[-1] and not counted[0]
    said = byte_level.decode(encoded.id_N[1:-1][counted[1:-1]])
    # a token that holds the end of the prompt as well is counted
    assert (prompt + completion).endswith(said) or "\ufffd" in said
    assert encoded.byte_N[counted].sum() >= len(completion.encode())


@settings(deadline=None, max_examples=120)
@given(chat=chats)
@example(chat=[Message("user", "<|assistant|>"), Message("assistant", "<|endoftext|><|user|> é")])
@example(chat=[Message("user", "say it"), Message("assistant", "")])
def test_chats_count_the_assistants_spans(byte_level: Any, chat: list[Message]) -> None:
    (encoded,) = encode_chats(byte_level, [chat])
    said = [message.content for message in chat if message.role == "assistant"]
    if not said:
        assert encoded == "the chat template gives the assistant no token to say"
        return
    assert isinstance(encoded, Encoded)
    counted = encoded.weight_N > 0
    specials = np.isin(encoded.id_N, list(special_ids(byte_level)))
    assert encoded.id_N[counted & specials].tolist() == [byte_level.eos_token_id] * len(said)
    assert byte_level.decode(encoded.id_N[counted & ~specials]) == "".join(said)
    assert encoded.byte_N[counted].sum() == len("".join(said).encode())
    assert encoded.byte_N.sum() == sum(len(message.content.encode()) for message in chat)
    assert specials.sum() == 1 + len(chat) + len(
        said
    )  # BOS, a role each, an end each: nothing from the contents


@settings(deadline=None, max_examples=60)
@given(chat=chats)
def test_without_literals_it_is_what_transformers_gives(byte_level: Any, chat: list[Message]) -> None:
    chat = [message for message in chat if not any(literal in message.content for literal in SPECIALS)]
    if not any(message.role == "assistant" for message in chat):
        return
    (encoded,) = encode_chats(byte_level, [chat])
    assert isinstance(encoded, Encoded)
    conversation = [message._asdict() for message in chat]
    out = byte_level.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
    assert encoded.id_N.tolist() == out["input_ids"]
    if "".join(message.content for message in chat).isascii():  # theirs loses parts of a character
        assert encoded.weight_N.tolist() == out["assistant_masks"]


@settings(deadline=None, max_examples=40)
@given(chat=chats)
def test_marked_and_joint_encoding_agree(byte_level: Any, chat: list[Message]) -> None:
    """The route for conversations with literals gives the same ids as the plain one where there are none."""
    from gyrocompass.data import encode as module
    from gyrocompass.data.chat import render

    chat = [message for message in chat if not any(literal in message.content for literal in SPECIALS)]
    if not chat:
        return
    rendered = render(byte_level, chat)
    ids, end_N = module._tokens_of_marked(byte_level, rendered._replace(mark="\ufdd0"))
    ((joint_ids, joint_end_N),) = module._tokens(byte_level, [rendered.marked], specials=True)
    assert ids == joint_ids and end_N.tolist() == joint_end_N.tolist()


@pytest.fixture
def chatml(tmp_path: Path) -> Any:
    tokenizer = train_tokenizer(TRAINING_TEXTS, 400, tmp_path)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def test_a_template_without_marks(chatml: Any) -> None:
    chat = [
        Message("system", "s"),
        Message("user", "u"),
        Message("assistant", "one <|im_end|>\n"),
        Message("user", "v"),
        Message("assistant", "two"),
    ]
    (encoded,) = encode_chats(chatml, [chat])
    assert isinstance(encoded, Encoded)
    said = encoded.id_N[encoded.weight_N > 0].tolist()
    end = chatml.eos_token_id
    assert said.count(end) == 2 and said[-1] == end
    assert chatml.decode(said) == "one <|im_end|>\n<|im_end|>two<|im_end|>"
    assert encoded.byte_N[encoded.weight_N > 0].sum() == len("one <|im_end|>\n" + "two")


def test_a_template_that_rewrites_earlier_turns(chatml: Any) -> None:
    chatml.chat_template = CHATML.replace("m['content']", "m['content'] if loop.last else '...'")
    chat = [Message("user", "u"), Message("assistant", "a"), Message("user", "v"), Message("assistant", "b")]
    assert encode_chats(chatml, [chat]) == [
        "the chat template marks no assistant span and rewrites earlier turns"
    ]


def test_a_template_whose_prompt_is_not_a_prefix(chatml: Any) -> None:
    chatml.chat_template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>bot\n")
    chat = [Message("user", "u"), Message("assistant", "a")]
    assert encode_chats(chatml, [chat]) == [
        "the chat template marks no assistant span and rewrites earlier turns"
    ]


def untidy(byte_level: Any, tail: str) -> Any:
    """A template that begins with what the assistant says and ends it with plain text."""
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}" + tail + "{% endfor %}"
    )
    return tokenizer


def test_all_parts_of_the_last_character_count(byte_level: Any) -> None:
    tokenizer = untidy(byte_level, "")
    (encoded,) = encode_chats(tokenizer, [[Message("assistant", "aé")]])
    assert isinstance(encoded, Encoded)
    assert encoded.weight_N[0] == 0, "nothing predicts the first token"
    assert tokenizer.decode(encoded.id_N[encoded.weight_N > 0]) == "é"


def test_a_token_over_the_end_of_the_span_counts(byte_level: Any) -> None:
    (encoded,) = encode_chats(untidy(byte_level, "  b"), [[Message("assistant", "a  ")]])
    assert isinstance(encoded, Encoded)
    end_N = np.cumsum(encoded.byte_N)
    over = np.flatnonzero(end_N > 3)[0]
    assert end_N[over - 1] < 3, "the case has no token over the end"
    assert encoded.weight_N[over] == 1 and not encoded.weight_N[over + 1 :].any()


def test_unknown_words_of_a_chat_have_bytes(word_piece: Any) -> None:
    tokenizer = copy.deepcopy(word_piece)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}[SEP]{% endgeneration %}{% endfor %}"
    )
    (encoded,) = encode_chats(tokenizer, [[Message("user", "a"), Message("assistant", "\u4e00")]])
    assert isinstance(encoded, Encoded)
    assert tokenizer.unk_token_id in encoded.id_N
    assert encoded.byte_N.sum() == 1 + 3


def test_ends_never_go_back() -> None:
    from gyrocompass.data.encode import _tokens

    def backwards(texts: list[str], **options: Any) -> dict[str, Any]:
        return {"input_ids": [[1, 2, 3]], "offset_mapping": [[(0, 2), (0, 0), (2, 3)]]}

    ((_, end_N),) = _tokens(backwards, ["abc"])  # type: ignore[arg-type]
    assert end_N.tolist() == [2, 2, 3]


def test_a_role_the_template_refuses(byte_level: Any) -> None:
    (reason,) = encode_chats(byte_level, [[Message("wizard", "x"), Message("assistant", "y")]])
    assert reason == "the chat template refuses it: the template has no role wizard"


def test_prompts(byte_level: Any) -> None:
    assert byte_level.decode(prompt_ids(byte_level, "def f(")) == "<|endoftext|>def f("
    ids = prompt_ids(byte_level, [Message("user", "a<|user|>")])
    assert byte_level.decode(ids) == "<|endoftext|><|user|>a<|user|><|assistant|>"
    assert ids.count(byte_level.convert_tokens_to_ids("<|user|>")) == 1
    assert ids[-1] == byte_level.convert_tokens_to_ids("<|assistant|>")
    with pytest.raises(BadInput, match="no role wizard"):
        prompt_ids(byte_level, [Message("wizard", "a")])


def test_chats_need_a_template(word_piece: Any) -> None:
    with pytest.raises(BadInput, match="no chat template"):
        encode_chats(word_piece, [[Message("assistant", "a")]])


def document(kind: Any, path: str, **fields: Any) -> Document:
    return Document(kind=kind, path=path, source="files", slice=fields.pop("slice", "prose"), **fields)


def test_tokenise_keeps_order_tags_and_reasons(byte_level: Any, tmp_path: Path) -> None:
    documents = [
        document("text", "a", text="x = 1", weight=0.5),
        document("chat", "b", messages=(Message("user", "only asks"),)),
        document("chat", "c", messages=(Message("user", "u"), Message("assistant", "a")), slice="chat"),
        document("completion", "d", prompt="p ", text="q", group="file"),
    ]
    seen: list[int] = []
    done = tokenise(documents, byte_level, tmp_path, on_progress=seen.append)
    dataset = TokenDataset.open(tmp_path)
    assert dataset.document_ids == tuple(documents[index].id for index in (0, 2, 3))
    assert dataset.groups == (documents[0].content_hash, documents[2].content_hash, "file")
    assert [dataset.slice_names[index] for index in dataset.slice_D] == ["prose", "chat", "prose"]
    assert sum(seen) == sum(each.n_bytes for each in documents)
    (quarantined,) = done.quarantined
    assert (quarantined.path, quarantined.document_id, quarantined.excerpt) == (
        "b",
        documents[1].id,
        "only asks",
    )
    assert done.counts.documents == 3 and done.counts.tokens == dataset.n_tokens
    assert done.counts.targets == dataset.n_targets
    first = dataset.weight_N[: dataset.offset_D[1]]
    assert first[0] == 0 and (first[1:] == 0.5).all()


def test_batches_give_what_single_documents_give(byte_level: Any) -> None:
    documents = [document("text", str(k), text="ab " * k + "é") for k in range(1, 6)]
    documents.insert(2, document("chat", "c", messages=(Message("user", "u"), Message("assistant", "a"))))
    for together, each in zip(encode(documents, byte_level), documents, strict=True):
        (alone,) = encode([each], byte_level)
        for left, right in zip(together, alone, strict=True):
            np.testing.assert_array_equal(left, right)
