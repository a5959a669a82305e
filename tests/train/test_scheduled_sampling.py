"""Scheduled sampling: which inputs are replaced, by what, and that splitting a window changes neither.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gyrocompass.core.config import parse
from gyrocompass.core.errors import ConfigError
from gyrocompass.data.pack import Packed, assemble, cut, pack
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.reduce import normalise
from gyrocompass.model.batch import to_batch
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.score import log_probs
from gyrocompass.train.scheduled_sampling import ScheduledSamplingConfig, _keys, _uniform, scheduled_sampling

VOCABULARY, LENGTH = 24, 12


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
        "initializer_range": 0.5, "attention_dropout": 0.5,
    }  # fmt: skip
    return new_causal_lm(config, seed=0).train()


def window(seed: int, documents: int = 6) -> Packed:
    """Rows of documents with prompts (weight 0), some longer than a row."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(documents):
        n, prompt = int(random.integers(2, 2 * LENGTH)), int(random.integers(1, 5))
        weights = [float(place >= prompt) for place in range(n)]
        weights[-1] = 1.0
        rows.append(TokenRow(f"d{number}", "s", "t", random.integers(1, VOCABULARY, n), [1] * n, weights))
    data = TokenDataset.of(rows)
    pieces = cut(data, LENGTH)
    return assemble(data, pieces, pack(pieces.length_P, LENGTH), LENGTH)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), step=st.integers(0, 50))
def test_formula_11_only_what_the_model_is_to_say_is_replaced(model: nn.Module, seed: int, step: int) -> None:
    """ANCHORS 11: at epsilon 1 exactly the inputs that are counted targets of the position before."""
    batch = to_batch(window(seed))
    mixed = scheduled_sampling(model, batch, ScheduledSamplingConfig(epsilon=1.0, seed=seed), step)
    for t in range(len(batch.token_T)):
        own = (
            batch.position_T[t] > 0  # neither BOS nor the start of a piece
            and batch.segment_T[t] >= 0  # no padding
            and batch.weight_T[t - 1] > 0  # no prompt
        )
        assert bool(mixed.replaced_T[t]) == bool(own)
        if own:
            assert batch.token_T[t] == batch.target_T[t - 1], "what is replaced is the gold target"
        else:
            assert mixed.batch.token_T[t] == batch.token_T[t]
    assert ((mixed.batch.token_T >= 0) & (mixed.batch.token_T < VOCABULARY)).all()
    gold = replace(mixed.batch, token_T=batch.token_T)
    assert all(
        torch.equal(getattr(gold, n), getattr(batch, n)) for n in ("target_T", "weight_T", "position_T")
    )


def test_formula_11_the_token_is_drawn_at_the_position_before(model: nn.Module) -> None:
    """ANCHORS 11: y_{t+1} comes from position t: tokens are as frequent as pass 1's probabilities say."""
    ids = [3, 7, 5, 9]
    data = TokenDataset.of([TokenRow(f"d{n}", "s", "t", ids, [1] * 4, [0, 1, 1, 1]) for n in range(200)])
    pieces = cut(data, LENGTH)
    batch = to_batch(assemble(data, pieces, pack(pieces.length_P, LENGTH), LENGTH))
    model.eval()
    with torch.no_grad():
        p_V = model(torch.tensor([ids[:2]])).logits[0, -1].softmax(0)
    model.train()
    config = ScheduledSamplingConfig(epsilon=1.0)
    third_T = batch.position_T.eq(2) & batch.segment_T.ge(0)
    read = torch.cat([
        scheduled_sampling(model, batch, config, step).batch.token_T[third_T]
        for step in range(10)
    ])  # fmt: skip
    share_V = torch.bincount(read, minlength=VOCABULARY) / len(read)
    assert len(read) == 2000
    assert ((share_V - p_V).abs() <= 4.5 * (p_V * (1 - p_V) / len(read)).sqrt() + 1e-3).all()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 3))
def test_formula_11_the_mixed_inputs_do_not_depend_on_the_split(
    model: nn.Module, seed: int, rows: int
) -> None:
    packed, config = window(seed), ScheduledSamplingConfig(epsilon=0.5, seed=seed)
    whole = scheduled_sampling(model, to_batch(packed), config, 7)
    parts = [scheduled_sampling(model, to_batch(part), config, 7) for part in packed.split(rows)]
    assert torch.equal(torch.cat([part.batch.token_T for part in parts]), whole.batch.token_T)
    assert torch.equal(torch.cat([part.replaced_T for part in parts]), whole.replaced_T)
    torch.testing.assert_close(torch.cat([p.teacher_forced_T for p in parts]), whole.teacher_forced_T)


def test_the_loss_does_not_depend_on_the_split(model: nn.Module) -> None:
    """Law 1 through both passes, in evaluation mode, where dropout does not hide it."""
    packed, composite = window(5), parse_objectives(["nll"])
    config = ScheduledSamplingConfig(epsilon=0.5)

    def gradients(rows: int) -> list[torch.Tensor]:
        batches = [to_batch(part) for part in packed.split(rows)]
        normaliser = normalise(composite, batches)
        model.zero_grad()
        for part in batches:
            batch = scheduled_sampling(model, part, config, 3).batch
            answer = log_probs(model, batch, want=())
            normaliser.loss(composite(answer, batch), batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.eval()
    for ours, theirs in zip(gradients(1), gradients(packed.rows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    model.train()


def test_pass_one_has_the_teacher_forced_nll_and_leaves_nothing_behind(model: nn.Module) -> None:
    batch = to_batch(window(2))
    before = torch.get_rng_state()
    model.zero_grad()
    mixed = scheduled_sampling(model, batch, ScheduledSamplingConfig(epsilon=0.3), 0)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        wanted = log_probs(model, batch, want=()).logprob_T
    model.train()
    torch.testing.assert_close(mixed.teacher_forced_T, wanted)
    assert mixed.replaced_T.any() and not mixed.replaced_T.all()


def test_without_epsilon_nothing_is_done(model: nn.Module) -> None:
    batch = to_batch(window(2))
    config = ScheduledSamplingConfig.model_validate(
        {"epsilon": {"linear": {"from": 0.0, "to": 0.5, "steps": 10}}}
    )
    assert [config.probability(step) for step in (0, 5, 20)] == [0.0, 0.25, 0.5]
    mixed = scheduled_sampling(model, batch, config, 0)
    assert mixed.batch is batch and mixed.teacher_forced_T is None and not mixed.replaced_T.any()
    assert scheduled_sampling(model, batch, config, 20).replaced_T.any()


def test_the_share_of_replaced_inputs_is_epsilon() -> None:
    batch = to_batch(window(0, documents=400))
    uniform_T = torch.cat([_uniform(_keys(batch, 3, step)) for step in range(4)])
    for epsilon in (0.1, 0.5, 0.9):
        share = (uniform_T < epsilon).double().mean().item()
        assert share == pytest.approx(
            epsilon, abs=4 * (epsilon * (1 - epsilon) / len(uniform_T)) ** 0.5 + 1e-3
        )


@pytest.mark.parametrize("epsilon", [-0.1, 1.5, {"cosine": {"from": 0.0, "to": 2.0, "steps": 3}}])
def test_epsilon_is_a_probability(epsilon: object) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        parse(ScheduledSamplingConfig, {"epsilon": epsilon})
