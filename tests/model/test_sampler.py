"""The sampler: it draws what one sequence alone would draw, and records what the trainer says of it.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss._noise import gumbel
from gyrocompass.model.sampler import Sampled, Sampling, sample
from gyrocompass.model.score import scored_tokens
from tiny_models import ARCHITECTURES, VOCABULARY, tiny

END = 7
FREE = Sampling(max_new_tokens=9, end_ids=(END,))


def unbounded(name: str) -> nn.Module:
    """An architecture without a sliding window, which the sampler refuses where it would bite."""
    window = {"sliding_window": 64} if "sliding_window" in ARCHITECTURES[name] else {}
    return tiny(name, dtype=torch.float64, **window)


def logits_after(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_V: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits_V


def alone(model: nn.Module, prompt: list[int], seed: int, sampling: Sampling) -> list[int]:
    """The definition: one token at a time from the full logits, with the same noise."""
    written: list[int] = []
    while len(written) < sampling.max_new_tokens and (not written or written[-1] != END):
        logits_V = logits_after(model, prompt + written)
        if sampling.temperature > 0:
            seed_1 = torch.tensor([seed * 1_000_003 + len(written)])
            logits_V = logits_V / sampling.temperature
            logits_V = logits_V + gumbel(seed_1, torch.arange(VOCABULARY), torch.float64)[0]
        written.append(int(logits_V.argmax()))
    return written


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_draws_as_one_sequence_alone(name: str) -> None:
    model = unbounded(name)
    prompts = [[1, 2, 3], [4], [1, 2, 3], [5, 6, 8, 9, 10, 11], [12, 13]]
    for sampling in (FREE, FREE._replace(temperature=0.7), FREE._replace(temperature=0)):
        found = sample(model, prompts, [1, 2, 3, 4, 5], sampling, slots=2)
        for prompt, seed, one in zip(prompts, [1, 2, 3, 4, 5], found, strict=True):
            assert one.token_ids == alone(model, prompt, seed, sampling)
            assert one.finished == (one.token_ids[-1] == END)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=7),
    st.integers(1, 8),
    st.integers(0, 2**40),
)
def test_slots_and_neighbours_change_nothing(prompts: list[list[int]], slots: int, seed: int) -> None:
    model = unbounded("llama")
    seeds = [seed + number for number in range(len(prompts))]
    together = sample(model, prompts, seeds, FREE, slots=slots)
    for prompt, own, one in zip(prompts, seeds, together, strict=True):
        (by_itself,) = sample(model, [prompt], [own], FREE)
        assert one.token_ids == by_itself.token_ids and one.finished == by_itself.finished
        np.testing.assert_allclose(one.logprobs, by_itself.logprobs, rtol=0, atol=1e-9)


def recorded_and_scored(
    model: nn.Module, prompts: list[list[int]], found: list[Sampled]
) -> tuple[float, int]:
    rows = [
        TokenRow(str(n), "", "", [*p, *s.token_ids], [0] * (len(p) + len(s.token_ids)),
                 [0.0] * len(p) + [1.0] * len(s.token_ids))
        for n, (p, s) in enumerate(zip(prompts, found, strict=True))
    ]  # fmt: skip
    dataset = TokenDataset.of(rows)
    scored = np.zeros(dataset.n_tokens)
    for part in scored_tokens(model, dataset, 40, 3):
        scored[part.index_K] = part.logprob_K
    recorded = np.concatenate([[0.0] * len(p) + s.logprobs for p, s in zip(prompts, found, strict=True)])
    return float(np.abs(scored - recorded).max()), int((recorded != 0).sum())


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_recorded_log_probs_are_the_trainers(dtype: torch.dtype, bound: float) -> None:
    model = tiny("llama_tied", dtype=dtype)
    prompts = [[1, 2, 3], [4], [5, 6, 8, 9, 10, 11]] * 3
    found = sample(model, prompts, list(range(9)), FREE, slots=4)
    apart, tokens = recorded_and_scored(model, prompts, found)
    assert apart <= bound and tokens > 20


def test_draws_follow_the_distribution() -> None:
    model = unbounded("llama")
    probability_V = logits_after(model, [1, 2]).softmax(0).numpy()
    found = sample(model, [[1, 2]] * 4000, list(range(4000)), FREE._replace(max_new_tokens=1), slots=500)
    counted_V = np.bincount([one.token_ids[0] for one in found], minlength=VOCABULARY)
    expected_V = 4000 * probability_V
    often = expected_V > 20
    z_V = (counted_V - expected_V)[often] / np.sqrt(expected_V * (1 - probability_V))[often]
    assert np.abs(z_V).max() < 4.5


def test_no_support_means_no_token_outside_it() -> None:
    model = unbounded("llama")
    kept = set(logits_after(model, [1, 2]).topk(3).indices.tolist())
    found = sample(model, [[1, 2]] * 200, list(range(200)), Sampling(1, (END,), top_k=3))
    assert {one.token_ids[0] for one in found} <= kept
    logprobs = {one.token_ids[0]: one.logprobs[0] for one in found}
    assert sum(np.exp(logprobs[token]) for token in kept) == pytest.approx(1)


def test_a_full_context_cuts() -> None:
    (found,) = sample(tiny("llama"), [[1] * 60], [0], Sampling(50, end_ids=()))
    assert len(found.token_ids) == 4 and not found.finished


@pytest.mark.parametrize("prompt", [[], [1] * 64])
def test_prompts_without_room_are_bad_input(prompt: list[int]) -> None:
    with pytest.raises(BadInput, match="prompt 1"):
        sample(tiny("llama"), [[1], prompt], [0, 1], FREE)


def test_a_window_shorter_than_the_sequences_is_bad_input() -> None:
    with pytest.raises(BadInput, match="attention window of 5"):
        sample(tiny("mistral"), [[1, 2]], [0], FREE)
