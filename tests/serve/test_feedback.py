from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from asking import answered, asked

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.data.document import Document
from gyrocompass.data.records import Place, RecordOptions, read_record
from gyrocompass.serve.feedback import export
from gyrocompass.serve.review import Reviews, ReviewSettings, Verdict

ONCE = ReviewSettings(double_share=0.0)


def test_verdicts_become_records_that_trainers_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(BadInput, match="nothing is decided"):
        export(store)
    reviews = Reviews(store.database, ONCE)
    cases = [
        (Verdict("1", "approve"), True, ()),
        (Verdict("2", "edit", "It is four."), True, ()),
        (Verdict("3", "reject"), True, ()),
        (Verdict("4", "prefer", preferred=1), True, ("IV", "4")),
        (Verdict("5", "edit", "secret"), False, ()),
    ]
    for verdict, consent, candidates in cases:
        question = asked(f"two and two, {verdict.id}?", consent=consent)
        put = reviews.put(question, answered("four"), ["doubt"], None, 1.0, candidates=candidates)
        name = asyncio.run(put)
        reviews.claim_one(name, "ann")
        reviews.decide(name, "ann", verdict)
    done = export(store)
    assert dict(done.records) == {"sft": 3, "preference": 3, "kto": 5, "labels": 5}
    assert done.without_consent == 1
    read = {
        name: [json.loads(line) for line in (done.artifact.path / f"{name}.jsonl").read_text().splitlines()]
        for name in done.records
    }
    documents = {
        name: [
            read_record(record, RecordOptions(), Place("feedback", n, "feedback"))
            for n, record in enumerate(records)
        ]
        for name, records in read.items()
        if name != "labels"
    }
    for found in documents.values():
        assert all(isinstance(document, Document) for document in found)
    sft = [one.messages[-1].content for one in documents["sft"] if isinstance(one, Document)]
    assert sft == ["four", "It is four.", "IV"]
    pairs = [(one.text, one.rejected) for one in documents["preference"] if isinstance(one, Document)]
    assert pairs == [("It is four.", "four"), ("IV", "four"), ("IV", "4")]
    assert [record["label"] for record in read["kto"]] == [True, False, True, False, False]
    assert [record["correct"] for record in read["labels"]] == [True, False, False, False, False]
    assert "secret" not in "".join(path.read_text() for path in done.artifact.path.glob("*.jsonl"))
    provenance = read["sft"][1]["provenance"]
    assert provenance["verdict"] == "edit" and provenance["model"] == "model-1"
    assert "ann" not in json.dumps(read)
    everything = export(store, all_texts=True)
    assert everything.records["sft"] == 4 and everything.without_consent == 0
