"""How a token is chosen from a distribution: the controls of generation, checked, and what they do to logits.

    Decoding --settings, processors--> what `transformers`' generate is asked to do

    temperature, top_k, top_p, min_p, typical_p    which tokens may be drawn
    repetition_penalty                             divides logits of all tokens seen, the prompt's too
    frequency_penalty, presence_penalty            logit - frequency * count - presence * [count > 0], of
                                                   tokens that were written (as OpenAI's API has them)
    beams                                          the likeliest of so many continuations; draws nothing
    stop                                           a text ends before the first of these
    choices, regex, json_schema                    only such texts can be written (the extra `constrained`)

Whatever is asked, the log-probabilities that are told are those of the untouched distribution.

Sources: Holtzman et al. 2020 (top-p); Meister et al. 2023 (typical); Nguyen et al. 2024 (min-p); Keskar et
al. 2019 (repetition penalty). Constraints are those of llguidance.

Shape legend: B sequences, L tokens so far, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import Field, model_validator
from transformers import LogitsProcessor

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.measure.generate import cut_at


class Decoding(Config):
    """The controls; by default the likeliest token each time."""

    temperature: float = Field(default=0.0, ge=0)
    """0: the likeliest token."""
    top_k: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float | None = Field(default=None, gt=0, le=1)
    """Tokens with at least this share of the likeliest one's probability."""
    typical_p: float | None = Field(default=None, gt=0, lt=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    beams: int = Field(default=1, ge=1)
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> Decoding:
        constraints = [
            name for name in ("choices", "regex", "json_schema") if getattr(self, name) is not None
        ]
        if len(constraints) > 1:
            raise ValueError(f"{' and '.join(constraints)} are two constraints: give one")
        if self.choices is not None and (not self.choices or "" in self.choices):
            raise ValueError("choices are texts, at least one, none of them empty")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams draw nothing: leave the temperature at 0")
        if self.beams > 1 and constraints:
            raise ValueError(f"beams and {constraints[0]} do not go together")
        draws = [name for name in ("top_k", "min_p", "typical_p") if getattr(self, name) is not None]
        if self.temperature == 0 and (draws or self.top_p < 1):
            name = draws[0] if draws else "top_p"
            raise ValueError(f"{name} is about what is drawn: set a temperature above 0")
        if any(not mark for mark in self.stop):
            raise ValueError("a stop is a text that is not empty")
        return self

    @property
    def is_constrained(self) -> bool:
        """Whether only some texts can be written."""
        return self.choices is not None or self.regex is not None or self.json_schema is not None

    def settings(self) -> dict[str, Any]:
        """What `transformers` does itself."""
        found: dict[str, Any] = {
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or 0}
            found |= {
                name: getattr(self, name)
                for name in ("min_p", "typical_p")
                if getattr(self, name) is not None
            }
        if self.beams > 1:
            found["num_beams"] = self.beams
        return found

    def processors(
        self, tokenizer: Any, n_vocabulary: int, rows: int, prompt_length: int
    ) -> list[LogitsProcessor]:
        """What is done to logits here.

        Raises:
            BadInput: a constraint is not one.
            MissingDependency: constraints need the extra `constrained`.
        """
        found: list[LogitsProcessor] = []
        if self.frequency_penalty or self.presence_penalty:
            found.append(_Penalties(self.frequency_penalty, self.presence_penalty, prompt_length))
        grammar = self._grammar()
        if grammar is not None:
            found.append(_Constrained(grammar, tokenizer, n_vocabulary, rows, prompt_length))
        return found

    def _grammar(self) -> str | None:
        if self.choices is None and self.regex is None and self.json_schema is None:
            return None
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MissingDependency("llguidance", extra="constrained", needed_for="constraints") from error
        if self.choices is not None:
            grammar = LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, self.choices))}")
        elif self.regex is not None:
            grammar = LLMatcher.grammar_from_regex(self.regex)
        else:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(self.json_schema))
        wrong = LLMatcher.validate_grammar(grammar)
        if wrong:
            raise BadInput(
                f"the constraint is none: {wrong.splitlines()[0]}", fix="mend the regex or the schema"
            )
        found: str = grammar
        return found


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """Less for what was written, by count and once."""

    def __init__(self, frequency: float, presence: float, prompt_length: int) -> None:
        self.frequency, self.presence, self.prompt_length = frequency, presence, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written_BL = input_ids[:, self.prompt_length :]
        count_BV = torch.zeros_like(scores).scatter_add_(
            1, written_BL, torch.ones_like(written_BL, dtype=scores.dtype)
        )
        return scores - self.frequency * count_BV - self.presence * (count_BV > 0)


_KNOWN: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def _known_tokens(tokenizer: Any, n_vocabulary: int) -> Any:
    """The tokens as llguidance reads them, made once for a tokenizer."""
    from llguidance.hf import from_tokenizer

    found = _KNOWN.get(tokenizer)
    if found is None or found[0] != n_vocabulary:
        found = _KNOWN[tokenizer] = (n_vocabulary, from_tokenizer(tokenizer, n_vocabulary))
    return found[1]


class _Constrained(LogitsProcessor):  # type: ignore[misc]
    """Tokens with which a text of the grammar can still be written; where it is whole, the end."""

    def __init__(
        self, grammar: str, tokenizer: Any, n_vocabulary: int, rows: int, prompt_length: int
    ) -> None:
        from llguidance import LLMatcher

        known = _known_tokens(tokenizer, n_vocabulary)
        self.matchers = [LLMatcher(known, grammar) for _ in range(rows)]
        self.prompt_length, self.end = prompt_length, tokenizer.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        n_tokens = scores.shape[1]
        bits = allocate_token_bitmask(1, n_tokens)
        for row, matcher in enumerate(self.matchers):
            if input_ids.shape[1] > self.prompt_length and not matcher.is_stopped():
                matcher.consume_token(int(input_ids[row, -1]))
            if matcher.is_stopped():
                scores[row] = -torch.inf
                scores[row, self.end] = 0.0
            else:
                fill_next_token_bitmask(matcher, bits, 0)
                allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[:n_tokens].astype(np.bool_)
                scores[row, ~torch.from_numpy(allowed).to(scores.device)] = -torch.inf
        return scores


def tokens_until(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> int:
    """How many tokens it takes until a stop stands in the text; all where there is none."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if cut_at(tokenizer.decode(ids[:middle], skip_special_tokens=True), stop)[1]:
            high = middle
        else:
            low = middle + 1
    return high
