"""Labels, units and steps: from a record to rows that are read together, with the numbers beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gyrocompass.data.document import Document, Quarantined, Step, read_documents, write_documents
from gyrocompass.data.pack import bundle, cut
from gyrocompass.data.records import Place, RecordOptions, read_record
from gyrocompass.data.rows import STEP_REWARD, token_rows, tokenise
from gyrocompass.data.split import side
from gyrocompass.data.tokens import TokenDataset, TokenRow

ASKED = [{"role": "user", "content": "Why?"}]
STEPS = [
    {"text": "one is one\n", "reward": True},
    {"text": "two — too\n", "reward": None},
    {"text": "so six", "reward": 0},
]


def read(line: int = 1, **raw: Any) -> Document | Quarantined:
    return read_record(raw, RecordOptions(), Place("a.jsonl", line, "a.jsonl"))


def document(line: int = 1, **raw: Any) -> Document:
    found = read(line, **raw)
    assert isinstance(found, Document), found
    return found


def rows_of(documents: list[Document], tokenizer: Any, **options: Any) -> list[TokenRow]:
    made = list(token_rows(documents, tokenizer, **options))
    assert not any(isinstance(one, Quarantined) for one in made), made
    return [row for rows in made for row in rows]


# --- records ---


def test_labels_have_free_names_beside_those_with_a_field() -> None:
    found = document(prompt="a", completion="b", score=2, labels={"relevance": 3, "tie": False, "none": None})
    assert dict(found.labels) == {"score": 2.0, "relevance": 3.0, "tie": 0.0}
    assert dict(document(text="a", score=2, labels={"role": 1}).labels) == {"role": 1.0}


@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"text": "a", "labels": [1]}, "labels is not an object of numbers by name but a list"),
        ({"text": "a", "labels": {"role": "query"}}, "labels.role is not a number but a text"),
        ({"text": "a", "labels": {"role": float("nan")}}, "labels.role is nan, which is no finite number"),
        ({"text": "a", "labels": {"role": 10**400}}, "no finite number"),
        ({"text": "a", "labels": {"": 1}}, "a name in labels is empty"),
        ({"prompt": "a", "completion": "b", "score": 1, "labels": {"score": 2}}, "score is given twice"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "labels": {"side": 1}},
            "labels.side is what chosen",
        ),
        ({"text": "a", "unit": 1.5}, "unit is not a text but a float"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "gold": 3}, "gold is not a text"),
        (
            {"chosen": ASKED, "rejected": ASKED, "gold": "b"},
            "chosen, rejected, gold without a prompt are not",
        ),
        ({"prompt": "a", "steps": "b"}, "steps is not a list of objects but a text"),
        ({"prompt": "a", "steps": []}, "steps is not a list of objects but an empty one"),
        ({"prompt": "a", "steps": [{"reward": 1}]}, "steps[0].text is not a text but null"),
        ({"prompt": "a", "steps": [{"text": "b", "reward": 2}]}, "steps[0].reward is 2; it is true (right)"),
        ({"prompt": "a", "steps": [{"text": "b"}]}, "no step has a reward"),
    ],
)
def test_what_does_not_fit_is_quarantined_with_its_reason(raw: dict[str, Any], reason: str) -> None:
    found = read(**raw)
    assert isinstance(found, Quarantined) and reason in found.reason


def test_fields_of_other_meaning_stay_ignored() -> None:
    assert document(text="a", steps=12, gold=True).kind == "text"
    assert document(prompt="a", completion="b", steps=12).steps == ()


def test_a_unit_is_on_one_side_of_a_split_whatever_its_records_say() -> None:
    units = [[document(n, text=f"text {n}.{k}", unit=f"u{n}") for k in range(3)] for n in range(30)]
    sides = [{side(member, 0.5) for member in unit} for unit in units]
    assert all(len(one) == 1 for one in sides) and len(set.union(*sides)) == 2
    judged = [document(prompt="a", completion=said, labels={"relevance": 1}, unit="u") for said in "bc"]
    assert [one.split_key for one in judged] == ["u", "u"]
    assert document(prompt="a", chosen="b", rejected="c", unit="u").unit is None
    assert document(text="a", labels={"role": 0}).group is None, "texts have no prompt to share"


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    documents = [
        document(text="a", unit=7, labels={"role": 2}),
        document(prompt="a", chosen="b", rejected="c", gold="d"),
        document(prompt=ASKED, steps=STEPS),
    ]
    write_documents(tmp_path, documents)
    assert list(read_documents(tmp_path)) == documents
    assert documents[1].content_hash != document(prompt="a", chosen="b", rejected="c").content_hash


def test_a_gold_answer_in_two_spellings_is_one_document() -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [*ASKED, {"role": "assistant", "content": text}]

    whole = document(chosen=said("b"), rejected=said("c"), gold=said("d"))
    assert whole.content_hash == document(prompt=ASKED, chosen="b", rejected="c", gold="d").content_hash
    assert whole.texts == ("", "Why?", "b", "c", "d")


# --- rows ---


def test_a_gold_answer_is_a_third_side(byte_level: Any) -> None:
    rows = rows_of([document(prompt="a", chosen="b", rejected="c", gold="d", margin=2)], byte_level)
    assert [row.document_id.partition("#")[2] for row in rows] == ["chosen", "rejected", "gold"]
    assert [dict(row.labels) for row in rows] == [{"side": s, "margin": 2} for s in (1, 0, 2)]
    assert len({row.unit for row in rows}) == 1


def test_records_of_a_unit_are_whole_and_in_one_row(byte_level: Any, tmp_path: Path) -> None:
    documents = [
        document(1, text="x = 1", unit="a", labels={"role": 0}),
        document(2, text="y = 2", unit="a", labels={"role": 1}),
        document(3, text="x = 1", unit="b", labels={"role": 0}),
        document(4, text="alone"),
        document(5, prompt="p", chosen="b", rejected="c"),
    ]
    tokenise(documents, byte_level, tmp_path)
    dataset = TokenDataset.open(tmp_path)
    assert dataset.unit_D.tolist() == [0, 0, 1, 2, 3, 3]
    assert dataset.whole_D.tolist() == [True, True, True, False, True, True]
    assert np.diff(bundle(dataset, cut(dataset, 64), 64)).tolist() == [2, 1, 1, 2]


def test_batches_of_documents_cut_no_unit(
    byte_level: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gyrocompass.data.rows._BATCH_BYTES", 4)
    documents = [document(n, text=f"line {n}", unit="abbbcc"[n]) for n in range(6)]
    long = document(9, text="long " * 30, unit="c")
    done = tokenise([*documents, long], byte_level, tmp_path, max_tokens=40)
    assert TokenDataset.open(tmp_path).unit_D.tolist() == [0, 1, 1, 1]
    assert len(done.quarantined) == 3 and all("of its unit together" in q.reason for q in done.quarantined)


def test_a_unit_is_used_as_a_whole_or_not_at_all(byte_level: Any) -> None:
    silent = Document("chat", "a:2", "s", "chat", unit="u", messages=())
    members = [Document("text", "a:1", "s", "t", text="x", unit="u"), silent]
    first, second, third = token_rows([*members, document(text="after")], byte_level)
    assert isinstance(first, Quarantined) and first.reason == "of the unit u, of which a:2 is left out"
    assert isinstance(second, Quarantined) and isinstance(third, list)


@pytest.mark.parametrize("prompt", ["Count — ", ASKED])
def test_a_steps_reward_stands_where_all_of_it_has_been_read(prompt: Any, byte_level: Any) -> None:
    found = document(prompt=prompt, steps=STEPS)
    assert found.steps == (Step(11, 1.0), Step(21, None), Step(27, 0.0))
    (row,) = rows_of([found], byte_level)
    rewards_N = np.asarray(row.columns[STEP_REWARD])
    places = np.flatnonzero(~np.isnan(rewards_N)).tolist()
    assert rewards_N[places].tolist() == [1.0, 0.0] and row.unit == found.id
    answer = "".join(step["text"] for step in STEPS)
    for place, end in zip(places, (11, 27), strict=True):
        assert byte_level.decode(row.ids[:place]).endswith(answer[:end]), "the position before has read it"
        assert row.weights[place] == 1


def test_steps_that_cannot_be_placed_are_quarantined(byte_level: Any) -> None:
    merged = document(prompt="a", steps=[{"text": " re", "reward": 1}, {"text": "turn", "reward": 0}])
    (made,) = token_rows([merged], byte_level)
    assert len(byte_level.tokenize(" return")) == 1, "one token holds the ends of both"
    assert isinstance(made, Quarantined) and made.reason == "steps[0] and steps[1] end in one token"
