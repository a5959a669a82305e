"""Completions: how a model goes on from prompts, with the log-probability of each token it wrote.

    prompts --transformers' generate--> tokens --log_probs (one pass over prompt + completion)--> Completion

The tokens are chosen by `generate` of `transformers`: greedily, or drawn at a temperature from the smallest
set of tokens that holds a share top_p. The log-probabilities are those of the *untouched* distribution,
whatever temperature and top_p it was drawn with, and are computed by the same call as the trainer's and the
score's (law 3): never those of the sampler, which has a cache, left padding and its own arithmetic.

A model folder's generation_config.json says how its makers sample (top_k, penalties); here it only adds its
end-of-text tokens. What is asked for is all that is done.

How tokens are chosen is `decoding.py`'s; streaming is the server's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.document import Message
from gyrocompass.data.encode import prompt_ids
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.measure.generate import cut_at
from gyrocompass.model.decoding import Decoding, tokens_until
from gyrocompass.model.fit import check_vocabulary
from gyrocompass.model.head import causal_lm, context_length, find_head
from gyrocompass.model.score import evaluating, top_tokens


class Completion(NamedTuple):
    """What a model wrote after one prompt. Plain values: it goes into JSON as it is."""

    prompt: str
    text: str
    """The completion without special tokens."""
    token_ids: list[int]
    """Its tokens, the end-of-text token included if it came."""
    tokens: list[str]
    """Each of them decoded by itself."""
    logprobs: list[float]
    """log p of each, nats, at temperature 1 over the whole vocabulary."""
    entropies: list[float]
    """Of the distribution that each was drawn from, nats, untouched too."""
    ranks: list[int]
    """How many tokens were likelier; 0: none."""
    alternatives: list[list[tuple[str, float]]]
    """The likeliest tokens in each place with their log p, as many as were asked for."""
    finish: Literal["end", "stop", "length"]
    """Whether it ended by an end-of-text token, at a stop, or by the limit."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    decoding: Decoding = Decoding(),  # noqa: B008  (immutable)
    alternatives: int = 0,
    seed: int = 0,
    rows: int = 8,
) -> list[Completion]:
    """Complete prompts.

    Args:
        model: as for `log_probs`.
        tokenizer: the model's; with `chat` it needs a chat template.
        prompts: plain text to go on from; with `chat`, what the user says.
        max_new_tokens: the most to write; less where the context is full before.
        chat: put each prompt into the chat template and write the assistant's answer.
        decoding: how tokens are chosen.
        alternatives: how many of the likeliest tokens are told in each place.
        seed: of the draws; the same call gives the same completions. The global random state is left alone.
        rows: prompts completed at once. When drawing, it is part of what decides the draws.

    Returns:
        One completion per prompt, in order.

    Raises:
        MissingDependency: a constraint needs an extra.
        BadInput: a constraint is none; a prompt is as long as the model's context or longer, has a token that
            is not in the model's vocabulary, or the chat template refuses it.
        GyroError: the model answers with a number that is not finite; prompt and token are named.
    """
    asked = [prompt_ids(tokenizer, [Message("user", text)] if chat else text) for text in prompts]
    sampling = _sampling(model, tokenizer, decoding)
    ids = np.array([sampling["pad_token_id"] or 0, *chain(*asked)])
    check_vocabulary(model, ids, "the prompts")
    written: dict[int, list[int]] = {}
    with evaluating(model), _seeded(model, seed):
        for room, batch in _batches(asked, context_length(model), max_new_tokens, rows):
            some = {index: asked[index] for index in batch}
            answers = _continue(model, tokenizer, some, sampling, room, decoding)
            written |= dict(zip(batch, answers, strict=True))
    texts = {}
    for index, own in written.items():
        text, stopped = cut_at(tokenizer.decode(own, skip_special_tokens=True), decoding.stop)
        if stopped:
            written[index] = own[: tokens_until(tokenizer, own, decoding.stop)]
        ended = own[-1] in sampling["eos_token_id"]
        texts[index] = (text, "stop" if stopped else "end" if ended else "length")
    told = _teacher_forced(
        model, asked, [written[index] for index in range(len(prompts))], rows, alternatives
    )
    return [
        Completion(
            prompt=prompt,
            text=texts[index][0],
            token_ids=written[index],
            tokens=[tokenizer.decode([token]) for token in written[index]],
            logprobs=[one.logprob for one in told[index]],
            entropies=[one.entropy for one in told[index]],
            ranks=[one.rank for one in told[index]],
            alternatives=[
                [(tokenizer.decode([token]), logprob) for token, logprob in one.alternatives]
                for one in told[index]
            ],
            finish=texts[index][1],  # type: ignore[arg-type]  # one of the three
        )
        for index, prompt in enumerate(prompts)
    ]


def _sampling(model: nn.Module, tokenizer: Any, decoding: Decoding) -> dict[str, Any]:
    """What `transformers` is asked to do, in full."""
    ends = causal_lm(model).generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"eos_token_id": sorted(eos_ids), "pad_token_id": padding, **decoding.settings()}


def _batches(
    prompts: Sequence[Sequence[int]], context: int, max_new_tokens: int, rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Indices of prompts that are completed together, with the number of tokens each has room for."""
    by_room: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        if len(ids) >= context:
            raise BadInput(
                f"a prompt of {len(ids)} tokens leaves no room in the model's context of {context}",
                where=f"prompt {index}",
                fix="shorten it",
            )
        by_room[min(max_new_tokens, context - len(ids))].append(index)
    for room, indices in by_room.items():
        for start in range(0, len(indices), rows):
            yield room, indices[start : start + rows]


@torch.no_grad()
def _continue(
    model: nn.Module,
    tokenizer: Any,
    prompts: Mapping[int, Sequence[int]],
    sampling: dict[str, Any],
    room: int,
    decoding: Decoding,
) -> list[list[int]]:
    """The tokens that follow each prompt (by its number), up to and with the first end-of-text token."""
    longest = max(len(ids) for ids in prompts.values())
    padded = [[sampling["pad_token_id"]] * (longest - len(ids)) + list(ids) for ids in prompts.values()]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts.values()]
    device = next(model.parameters()).device
    lm = causal_lm(model)
    own = decoding.processors(tokenizer, find_head(model).w_VD.shape[0], len(padded), longest)
    own_defaults, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        answer = lm.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(**sampling, max_new_tokens=room),
            logits_processor=LogitsProcessorList([_NoNaN([*prompts], longest, decoding.beams), *own]),
            **({"stop_strings": list(decoding.stop), "tokenizer": tokenizer} if decoding.stop else {}),
        )
    finally:
        lm.generation_config = own_defaults
    return [_until_end(row, sampling["eos_token_id"]) for row in answer[:, longest:].tolist()]


class _NoNaN(LogitsProcessor):  # type: ignore[misc]
    """Ends the work at the first token that cannot be chosen: no token is drawn from NaN."""

    def __init__(self, prompts: Sequence[int], longest: int, beams: int) -> None:
        self.prompts, self.longest, self.beams = prompts, longest, beams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row in scores.isnan().any(dim=1).nonzero()[:1].flatten().tolist():
            raise _not_finite(math.nan, self.prompts[row // self.beams], input_ids.shape[1] - self.longest)
        return scores


def _not_finite(value: float, prompt: int, token: int) -> GyroError:
    return GyroError(
        f"the log-probability of a token is {value}",
        where=f"prompt {prompt}, token {token} of what follows it",
        fix="the model's weights or its precision are at fault: score a text with `gyro score` to see where",
    )


def _until_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(ids) if token in eos_ids), len(ids))
    return ids[:end]


class _Told(NamedTuple):
    """What the model says of one written token."""

    logprob: float
    entropy: float
    rank: int
    alternatives: list[tuple[int, float]]


def _teacher_forced(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    rows: int,
    alternatives: int,
) -> list[list[_Told]]:
    """Each written token given all before it, in one pass over prompt + completion."""
    dataset = TokenDataset.of(
        TokenRow(
            str(index),
            "",
            "",
            [*prompt, *completion],
            [0] * (len(prompt) + len(completion)),
            [0.0] * len(prompt) + [1.0] * len(completion),
        )
        for index, (prompt, completion) in enumerate(zip(prompts, written, strict=True))
    )
    found: list[dict[int, _Told]] = [{} for _ in written]
    with evaluating(model):
        for scored, top in top_tokens(model, dataset, context_length(model), rows, n_top=alternatives):
            for k, (index, document) in enumerate(
                zip(scored.index_K.tolist(), scored.document_K.tolist(), strict=True)
            ):
                place = int(index - dataset.offset_D[document] - len(prompts[document]))
                logprob = float(scored.logprob_K[k])
                if not math.isfinite(logprob):
                    raise _not_finite(logprob, document, place)
                likeliest = list(zip(top.token_KN[k].tolist(), top.logprob_KN[k].tolist(), strict=True))
                found[document][place] = _Told(
                    logprob, float(scored.entropy_K[k]), int(scored.rank_K[k]), likeliest
                )
    return [[own[place] for place in range(len(own))] for own in found]


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """A random state of its own, on the CPU and on the model's device."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
