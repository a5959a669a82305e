"""A model as a Score callable: the numbers of `score_dataset`, text by text (law 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gyrocompass.data.document import Document
from gyrocompass.data.encode import Encoded, encode
from gyrocompass.data.tokenizer import train_tokenizer
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.measure.score import ScoredText, tally
from gyrocompass.model import score
from gyrocompass.model.score import score_dataset, scorer
from tiny_models import tiny

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    "ünïcödé: 漢字",
    "x",
    "a text of some more words than the others " * 3,
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(TEXTS * 3, 300, folder)


def test_a_text_has_the_numbers_of_its_document(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "_CHUNK_TEXTS", 2)
    model = tiny("llama", vocab_size=len(tokenizer)).train()
    documents = [
        Document(kind="text", text=text, path=f"{nth}.txt", source="files", slice="ab"[nth % 2])
        for nth, text in enumerate(TEXTS)
    ]
    rows = []
    for document, encoded in zip(documents, encode(documents, tokenizer), strict=True):
        assert isinstance(encoded, Encoded)
        rows.append(TokenRow(document.id, document.slice, document.source, *encoded))
    by_dataset = score_dataset(model, TokenDataset.of(rows), length=20)
    texts = [
        ScoredText(document.id, document.slice, document.source, document.text) for document in documents
    ]
    by_text = tally(scorer(model, tokenizer, length=20), texts)
    assert model.training
    assert by_text.dimensions() == by_dataset.dimensions()
    for dimension in by_dataset.dimensions():
        for (name, one), (other_name, other) in zip(
            by_dataset.items(dimension), by_text.items(dimension), strict=True
        ):
            assert name == other_name
            assert (one.count, one.bytes, one.top1) == (other.count, other.bytes, other.top1)
            assert one.value == pytest.approx(other.value, rel=1e-5)
            assert one.entropy == pytest.approx(other.entropy, rel=1e-5)
    assert by_text.total.bytes == sum(len(text.encode()) for text in TEXTS)


def test_answers_come_in_order_token_by_token(tokenizer: Any) -> None:
    model = tiny("gpt2", vocab_size=len(tokenizer))
    for text, scores in zip(TEXTS, scorer(model, tokenizer, length=64)(TEXTS), strict=True):
        assert tokenizer.decode(scores.id_N[:-1].tolist()) == text
        assert scores.id_N[-1] == tokenizer.eos_token_id and scores.byte_N[-1] == 0
        assert scores.byte_N.sum() == len(text.encode())
        ids = torch.tensor([tokenizer.bos_token_id, *scores.id_N.tolist()])
        if len(ids) <= 64:
            with torch.no_grad():
                logits = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
            expected = logits.gather(1, ids[1:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(scores.logprob_N).float(), expected, atol=1e-4, rtol=0)
