"""Preferences and labelled answers: from a record to rows of tokens that are kept together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Document, Message, Quarantined, read_documents, write_documents
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.pack import bundle, cut
from gyrocompass.data.records import Place, RecordOptions, read_record
from gyrocompass.data.rows import token_rows, tokenise
from gyrocompass.data.tokens import TokenDataset, TokenRow, write_tokens

PLACE = Place("pairs.jsonl", 1, "pairs.jsonl")
ASKED = [{"role": "user", "content": "Why?"}]


def read(**raw: Any) -> Document | Quarantined:
    return read_record(raw, RecordOptions(), PLACE)


def test_a_preference_of_texts() -> None:
    document = read(prompt="Why?", chosen="Because.", rejected="No.", margin=0.5)
    assert isinstance(document, Document)
    assert (document.kind, document.prompt, document.text, document.rejected) == (
        "preference",
        "Why?",
        "Because.",
        "No.",
    )
    assert dict(document.labels) == {"margin": 0.5}


def test_conversations_in_three_spellings_are_one_preference() -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    spellings = [
        {"prompt": ASKED, "chosen": said("Because."), "rejected": said("No.")},
        {"prompt": ASKED, "chosen": "Because.", "rejected": "No."},
        {"chosen": ASKED + said("Because."), "rejected": ASKED + said("No.")},
    ]
    contents = {read(**raw).content_hash for raw in spellings}  # type: ignore[union-attr]
    assert len(contents) == 1


@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
        ({"prompt": "a", "chosen": "b"}, "chosen and rejected belong together, and one is missing"),
        ({"chosen": "b", "rejected": "c"}, "without a prompt are not lists of messages"),
        ({"prompt": "a", "chosen": [*ASKED], "rejected": "c"}, "not one message of the assistant"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "label is 0.5"),
        ({"prompt": "a", "completion": "b", "score": "high"}, "score is not a number but a text"),
        ({"chosen": [*ASKED], "rejected": [*ASKED]}, "prompt is not a list of messages but an empty one"),
    ],
)
def test_what_is_no_preference_is_quarantined_with_its_reason(raw: dict[str, Any], reason: str) -> None:
    record = read(**raw)
    assert isinstance(record, Quarantined) and reason in record.reason


def test_answers_to_one_prompt_are_of_one_group() -> None:
    one = read(prompt="a", chosen="b", rejected="c")
    other = read(prompt="a", chosen="d", rejected="e")
    labelled = read(prompt="a", completion="f", label=True)
    elsewhere = read(prompt="x", chosen="b", rejected="c")
    keys = [record.split_key for record in (one, other, labelled, elsewhere)]  # type: ignore[union-attr]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    documents = [
        read(prompt="a", chosen="b", rejected="c", margin=2),
        read(prompt=ASKED, completion="d", label=0),
    ]
    write_documents(tmp_path, documents)  # type: ignore[arg-type]
    assert list(read_documents(tmp_path)) == documents


def test_sides_are_rows_of_one_unit_with_the_end_as_context(byte_level: Any) -> None:
    tokenizer = byte_level
    document = read(prompt="ab", chosen="cd", rejected="e", margin=1.5)
    assert isinstance(document, Document)
    ((chosen, rejected),) = token_rows([document], tokenizer)
    assert (chosen.document_id, rejected.document_id) == (f"{document.id}#chosen", f"{document.id}#rejected")
    assert chosen.unit == rejected.unit == document.id
    assert (chosen.labels, rejected.labels) == ({"side": 1, "margin": 1.5}, {"side": 0, "margin": 1.5})
    for row in (chosen, rejected):
        assert row.ids[-1] == row.ids[-2] == tokenizer.eos_token_id
        assert row.weights[-1] == 0 and row.weights[-2] == 1


def test_of_a_conversation_only_the_last_turn_counts(byte_level: Any) -> None:
    tokenizer = byte_level
    earlier = [*ASKED, {"role": "assistant", "content": "Hm."}, *ASKED]
    document = read(prompt=earlier, chosen="Because.", rejected="No.")
    assert isinstance(document, Document)
    ((chosen, _),) = token_rows([document], tokenizer)
    counted = [token for token, weight in zip(chosen.ids, chosen.weights, strict=True) if weight]
    assert "Because." in tokenizer.decode(counted) and "Hm." not in tokenizer.decode(counted)


def test_too_long_and_equal_tokens_are_quarantined(tmp_path: Path, byte_level: Any) -> None:
    tokenizer = byte_level
    long = Document(
        "preference", "a", "s", "p", text="x " * 50, rejected="y", messages=(Message("user", "q"),)
    )
    done = tokenise([long], tokenizer, tmp_path, max_tokens=20)
    assert len(done.quarantined) == 1 and "max_tokens is 20" in done.quarantined[0].reason


def pairs(sizes: list[tuple[int, int]]) -> TokenDataset:
    rows = [
        TokenRow(
            f"{n}#{side}", "a", "s", [1] * size, [0] * size, [1.0] * size, "", f"unit-{n}", {}, {"side": side}
        )
        for n, both in enumerate(sizes)
        for side, size in zip((1, 0), both, strict=True)
    ]
    return TokenDataset.of(rows)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=30), st.integers(1, 5))
def test_both_sides_of_a_pair_are_in_one_micro_batch(sizes: list[tuple[int, int]], rows: int) -> None:
    dataset = pairs(sizes)
    seen = []
    for window in Sampler(dataset, SamplerConfig(length=18, rows_per_step=3)):
        for part in window.split(rows):
            units = part.unit_T[part.unit_T >= 0]
            for unit in np.unique(units):
                own = part.unit_T == unit
                assert set(part.columns["side"][own]) == {0.0, 1.0}
                assert own.sum() == sum(sizes[unit]) - 2
                seen.append(unit)
    assert sorted(seen) == list(range(len(sizes)))


def test_what_must_stay_whole_and_is_too_long_is_named() -> None:
    with pytest.raises(BadInput, match="the longest, 1#1, has 19"):
        cut(pairs([(4, 4), (20, 3)]), 16)
    dataset = pairs([(4, 4), (12, 12)])
    with pytest.raises(BadInput, match="begins with 1#1 and has 22"):
        bundle(dataset, cut(dataset, 16), 16)


def test_units_columns_and_labels_come_back_from_the_disk(tmp_path: Path) -> None:
    dataset = pairs([(4, 5), (3, 3)])
    values_N = np.arange(dataset.n_tokens, dtype=np.float32)
    write_tokens(tmp_path, dataset.with_column("reference_logprob", values_N).rows())
    again = TokenDataset.open(tmp_path)
    np.testing.assert_array_equal(again.unit_D, dataset.unit_D)
    np.testing.assert_array_equal(again.columns["reference_logprob"], values_N)
    np.testing.assert_array_equal(again.labels["side"], [1, 0, 1, 0])
    assert json.dumps(again.document_ids) == json.dumps(dataset.document_ids)
