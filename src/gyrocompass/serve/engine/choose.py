"""Which token comes next in each sequence, by its own settings and its own random numbers.

    logits -> logit bias -> repetition, frequency, presence, constraint -> temperature -> top-k, top-p, min-p,
    typical -> the likeliest, or argmax of p_v / e_v with e_v exponential: a draw from p

The order is that of `generate` of `transformers`, by whose processors it is done. A sequence's random numbers
come from its own seed, so an answer does not depend on who else is being answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gyrocompass.model.decoding import Decoding


class Chooser:
    """Chooses the tokens of one sequence.

    Args:
        decoding: how.
        logit_bias: added to logits, by token id.
        seed: of the draws.
        tokenizer: the model's, for constraints.
        n_vocabulary: columns of the logits.
        prompt: ids; penalties for repetition count them.

    Raises:
        BadInput: a constraint is none.
        MissingDependency: a constraint needs an extra.
    """

    def __init__(
        self,
        decoding: Decoding,
        logit_bias: Mapping[int, float],
        seed: int,
        tokenizer: Any,
        n_vocabulary: int,
        prompt: Sequence[int],
    ) -> None:
        self._draws = decoding.temperature > 0
        self._bias = {token: bias for token, bias in logit_bias.items() if token < n_vocabulary}
        self._generator = torch.Generator().manual_seed(seed % 2**63) if self._draws else None
        self._steps: list[LogitsProcessor] = []
        if decoding.repetition_penalty != 1:
            self._steps.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
        self._steps += decoding.processors(tokenizer, n_vocabulary, 1, len(prompt))
        if self._draws:
            self._steps += _warpers(decoding)
        self._ids = list(prompt)

    @property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token and nothing else is done."""
        return not (self._draws or self._steps or self._bias)

    def choose(self, logit_V: Tensor) -> int:
        """The next token; the logits are float32, on the CPU, and stay as they are."""
        scores = logit_V[None].clone()
        for token, bias in self._bias.items():
            scores[0, token] += bias
        ids = torch.tensor([self._ids])
        for step in self._steps:
            scores = step(ids, scores)
        if self._draws:
            wait_V = torch.empty_like(scores[0]).exponential_(generator=self._generator)
            return int((scores[0].softmax(0) / wait_V).argmax())
        return int(scores[0].argmax())

    def took(self, token: int) -> None:
        """The sequence went on with this."""
        self._ids.append(token)


def _warpers(decoding: Decoding) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if decoding.temperature != 1:
        found.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k is not None:
        found.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        found.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p is not None:
        found.append(MinPLogitsWarper(decoding.min_p))
    if decoding.typical_p is not None:
        found.append(TypicalLogitsWarper(mass=decoding.typical_p))
    return found
