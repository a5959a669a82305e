"""Scoring: law 3 against a direct sum on full logits, law 2's counts, and indifference to batching."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import GyroError
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.model.score import log_probs, score_dataset, scored_tokens
from tiny_models import packed_batch, random_documents, tiny

LENGTHS = [14, 3, 9, 2, 40, 6]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def direct(model: Any, dataset: TokenDataset, length: int) -> dict[str, float]:
    """Each document's NLL as a reader would compute it: cut by the rule, full logits, log_softmax, sum."""
    sums = {}
    for document, name in enumerate(dataset.document_ids):
        begin, end = dataset.offset_D[document], dataset.offset_D[document + 1]
        ids = torch.tensor(dataset.id_N[begin:end].astype(np.int64))
        weights = torch.tensor(dataset.weight_N[begin:end])
        nll = 0.0
        for start in range(0, len(ids) - 1, length):
            inputs, targets = ids[start : start + length], ids[start + 1 : start + length + 1]
            log_softmax = model(input_ids=inputs[: len(targets)][None]).logits[0].double().log_softmax(-1)
            counted = weights[start + 1 : start + length + 1] > 0
            nll -= float(log_softmax.gather(1, targets[:, None])[:, 0][counted].sum())
        sums[name] = nll
    return sums


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["llama", "mistral", "gpt2", "gemma3_text"]),
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_a_ledger_is_the_direct_sum_on_full_logits(
    name: str, lengths: list[int], length: int, rows: int, seed: int
) -> None:
    model, dataset = tiny(name), random_documents(seed, lengths)
    ledger = score_dataset(model, dataset, length=length, rows=rows)
    expected = direct(model, dataset, length)
    for document, nll in expected.items():
        sums = ledger.sums("document", document)
        assert sums.value == pytest.approx(nll, abs=1e-4 * max(1, sums.count))
    assert ledger.total.value == pytest.approx(sum(expected.values()), rel=1e-5, abs=1e-4)
    assert ledger.total.count == dataset.n_targets
    assert {key: sums.count for key, sums in ledger.items("slice")} == {
        key: count for key, count in dataset.targets_by_slice().items() if count
    }
    assert ledger.total.bytes == int(dataset.byte_N[dataset.weight_N > 0].sum())


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(["llama", "mistral", "gpt2", "gemma2"]),
    st.lists(st.integers(2, 50), min_size=1, max_size=6),
    st.integers(1, 60),
    st.integers(0, 9),
)
def test_the_trainers_call_and_the_score_are_the_same_numbers(
    name: str, lengths: list[int], length: int, seed: int
) -> None:
    """Law 3: the trainer's loss (gradients on) = the score = the direct sum on full logits."""
    model, dataset = tiny(name), random_documents(seed, lengths)
    batch = packed_batch(dataset, length)
    answer = log_probs(model, batch)
    assert answer.logprob_T.requires_grad
    loss = -float((answer.logprob_T.detach().double() * (batch.weight_T > 0)).sum())
    ledger = score_dataset(model, dataset, length=length)
    within = 1e-4 * max(1, ledger.total.count)
    assert ledger.total.count == int((batch.weight_T > 0).sum())
    assert ledger.total.value == pytest.approx(loss, abs=within)
    assert sum(direct(model, dataset, length).values()) == pytest.approx(loss, abs=within)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.permutations(range(len(LENGTHS))))
def test_rows_and_the_order_of_documents_change_only_rounding(rows: int, order: list[int]) -> None:
    model, dataset = tiny("gpt2", dtype=torch.float64), random_documents(4, LENGTHS)
    whole = score_dataset(model, dataset, length=16)
    parts = score_dataset(model, dataset, length=16, rows=rows, documents=order[:3])
    parts.merge(score_dataset(model, dataset, length=16, rows=rows, documents=order[3:]))
    for (name, one), (other_name, other) in zip(
        whole.items("document"), parts.items("document"), strict=True
    ):
        assert name == other_name and one.count == other.count and one.top1 == other.top1
        assert one.value == pytest.approx(other.value, rel=1e-10)
        assert one.entropy == pytest.approx(other.entropy, rel=1e-10)


def test_only_the_documents_asked_for_are_scored() -> None:
    ledger = score_dataset(tiny("llama"), random_documents(4, LENGTHS), length=16, documents=[4, 1])
    assert ledger.names("document") == ["document-1", "document-4"]


def test_documents_of_a_group_are_one_cluster() -> None:
    dataset = random_documents(4, LENGTHS)
    grouped = replace(dataset, groups=("f", "g", "f", "g", "h", "g"))
    ledger = score_dataset(tiny("llama"), grouped, length=16)
    assert ledger.names("group") == ["f", "g", "h"]
    assert sum(sums.count for _, sums in ledger.items("group")) == ledger.total.count
    code, prose, total = slice_scores(ledger)
    assert (code.documents, code.groups, prose.documents, prose.groups) == (3, 2, 3, 1)
    assert (total.documents, total.groups) == (6, 3) and prose.nats_per_token_low is None
    assert slice_scores(score_dataset(tiny("llama"), dataset, length=16))[-1].groups == 6


def test_the_same_call_gives_the_same_bits() -> None:
    model, dataset = tiny("llama"), random_documents(4, LENGTHS)
    assert score_dataset(model, dataset, length=16) == score_dataset(model, dataset, length=16)


def test_each_counted_token_is_scored_once_at_its_own_index() -> None:
    model, dataset = tiny("llama"), random_documents(4, LENGTHS)
    index = np.concatenate([scored.index_K for scored in scored_tokens(model, dataset, 7, 2)])
    assert sorted(index.tolist()) == np.flatnonzero(dataset.weight_N > 0).tolist()
    for scored in scored_tokens(model, dataset, 7, 2):
        document_N = np.repeat(np.arange(dataset.n_documents), np.diff(dataset.offset_D))
        assert (document_N[scored.index_K] == scored.document_K).all()


def test_dropout_is_off_meanwhile_and_every_module_is_left_as_it_was() -> None:
    model, dataset = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), random_documents(4, LENGTHS)
    expected = score_dataset(model, dataset, length=16)
    model.train()
    model.lm_head.eval()
    assert score_dataset(model, dataset, length=16) == expected
    assert model.training and model.transformer.drop.training and not model.lm_head.training
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(GyroError):
        score_dataset(model, dataset, length=16)
    assert model.training


def test_a_nan_names_its_document() -> None:
    """At this length document 4 has its row to itself: masked attention, 0 * NaN, spreads a NaN in a row."""
    model, dataset = tiny("llama"), random_documents(4, LENGTHS)
    begin, end = dataset.offset_D[4], dataset.offset_D[5]
    elsewhere = np.concatenate([dataset.id_N[:begin], dataset.id_N[end:]])
    only = np.setdiff1d(dataset.id_N[begin:end], elsewhere)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[only] = float("nan")
    with pytest.raises(GyroError) as caught:
        score_dataset(model, dataset, length=39)
    assert str(caught.value.where) == "document document-4"


def test_bf16_weights_and_autocast_are_near_and_not_the_same() -> None:
    dataset = random_documents(4, LENGTHS)
    full = score_dataset(tiny("llama", initializer_range=0.1), dataset, length=16).total
    autocast = score_dataset(tiny("llama", initializer_range=0.1), dataset, length=16, autocast=True).total
    weights = tiny("llama", initializer_range=0.1, dtype=torch.bfloat16)
    bf16 = score_dataset(weights, dataset, length=16).total
    for other in (autocast, bf16):
        assert other.value != full.value
        assert other.value == pytest.approx(full.value, rel=0.02)


def test_progress_counts_every_token() -> None:
    model, dataset = tiny("llama"), random_documents(4, LENGTHS)
    seen: list[int] = []
    score_dataset(model, dataset, length=16, rows=1, on_tokens=seen.append)
    assert len(seen) > 1 and sum(seen) == dataset.n_targets


def test_nothing_to_score_is_an_empty_ledger() -> None:
    dataset = random_documents(4, [1, 1])
    assert score_dataset(tiny("llama"), dataset, length=16).total.count == 0
