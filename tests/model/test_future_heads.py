"""Future heads and multi-token prediction, against full logits.

Shape legend: T positions, N tokens of a document, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.multi_token import later_target
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.reduce import normalise
from gyrocompass.loss.signal import IGNORE_INDEX
from gyrocompass.model.future_heads import attach_future_heads
from gyrocompass.model.load import load_causal_lm, save_model
from gyrocompass.model.score import log_probs
from tiny_models import packed_batch, random_documents, tiny

COMPOSITE = parse_objectives(["nll", {"multi_token": {"weight": 0.5}}])


def with_heads(heads: int, seed: int = 1) -> nn.Module:
    """A tiny model in float64 whose future heads are no longer what they began as."""
    model = tiny("llama_tied", dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attach_future_heads(model, heads).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def loss_and_gradients(model: nn.Module, batches: list[object]) -> list[Tensor]:
    normaliser = normalise(COMPOSITE, batches)  # type: ignore[arg-type]
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        answer = log_probs(model, batch, want=COMPOSITE.wants)  # type: ignore[arg-type]
        share = normaliser.loss(COMPOSITE(answer, batch), batch).loss  # type: ignore[arg-type]
        share.backward()
        total += share.detach()
    return [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_multi_token_is_its_formula() -> None:
    data, model = random_documents(4, [6, 3, 9, 7]), with_heads(2)
    batch = packed_batch(data, 16)
    total, *gradients = loss_and_gradients(model, [batch])
    sums, weights = torch.zeros(2, dtype=torch.float64), 0.0
    for row in data.rows():
        ids = torch.tensor(list(row.ids), dtype=torch.int64)
        output = model(ids[None], output_hidden_states=True)
        h_ND, head = output.hidden_states[-1][0], model.get_output_embeddings().weight  # type: ignore[operator]
        for t in range(len(ids) - 1):
            weight = float(row.weights[t + 1])
            weights += weight
            if weight:
                sums[0] = sums[0] - weight * output.logits[0, t].log_softmax(0)[ids[t + 1]]
                for steps, layer in enumerate(attach_future_heads(model, 2), start=1):
                    if t + 1 + steps < len(ids) and row.weights[t + 1 + steps] > 0:
                        ahead = h_ND[t] + nn.functional.silu(layer(h_ND[t]))
                        sums[1] = sums[1] - weight * (head @ ahead).log_softmax(0)[ids[t + 1 + steps]]
    wanted = (sums[0] + 0.5 * sums[1]) / weights
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-6, atol=0)
    model.zero_grad()
    wanted.backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, expected in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_partition() -> None:
    model, data = with_heads(3), random_documents(6, [6, 5, 9, 8, 4])
    rows = list(data.rows())
    whole = loss_and_gradients(model, [packed_batch(data, 32)])
    parts = [packed_batch(TokenDataset.of(rows[:2]), 11), packed_batch(TokenDataset.of(rows[2:]), 9)]
    for ours, theirs in zip(loss_and_gradients(model, parts), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_head_predicts_within_its_document_what_counts() -> None:
    rows = [TokenRow(f"d{n}", "s", "t", range(10 * n, 10 * n + 5), [1] * 5, [0, 1, 0, 1, 1]) for n in (1, 2)]
    batch = packed_batch(TokenDataset.of(rows), 10)
    none = IGNORE_INDEX
    assert later_target(batch, 1).tolist()[:8] == [none, none, 14, none, none, none, 24, none]
    assert later_target(batch, 2).tolist()[:8] == [13, none, none, none, 23, none, none, none]
    assert set(later_target(batch, 20).tolist()) == {none}


def test_new_heads_repeat_the_head_of_words() -> None:
    model = tiny("gpt2", dtype=torch.float64).eval()
    attach_future_heads(model, 1)
    data = TokenDataset.of([TokenRow("d", "s", "t", [1, 7, 7, 7, 7], [1] * 5, [0, 1, 1, 1, 1])])
    batch = packed_batch(data, 4)
    answer = log_probs(model, batch, want=("future",))
    assert answer.future_TK is not None
    torch.testing.assert_close(answer.future_TK[:3, 0], answer.logprob_T[:3])
    assert answer.future_TK[3, 0] == 0


def test_heads_are_saved_beside_a_plain_model(tmp_path: Path) -> None:
    model, batch = with_heads(2), packed_batch(random_documents(4, [6, 9]), 16)
    save_model(model, tmp_path)
    again = load_causal_lm(tmp_path)
    for ours, theirs in zip(*(attach_future_heads(m, 2).parameters() for m in (again, model)), strict=True):
        assert torch.equal(ours, theirs)
    both = (log_probs(m, batch, want=("future",)).future_TK for m in (again, model))
    torch.testing.assert_close(*both)
    (tmp_path / "future_heads.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(BadInput, match="these future heads cannot be read"):
        load_causal_lm(tmp_path)


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(BadInput, match="no future heads"):
        log_probs(tiny("llama"), packed_batch(random_documents(4, [6]), 8), want=("future",))
    with pytest.raises(BadInput, match="has 2 future heads, not 3"):
        attach_future_heads(with_heads(2), 3)
