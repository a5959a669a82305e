"""A model as measures receive it where it has to write or to go on from a context.

    model, tokenizer --writer---------------> Generate            (`measure.generate`)
    model, tokenizer --continuation_scorer--> ScoreContinuations  (`measure.tasks.run`)
    model, pairs of ids --score_pairs-------> TokenScores of each second part

Texts come from the rollouts' engine (`sampler`), which refills its slots; what is told of their tokens comes
from one teacher-forced pass by the primitive (law 3), so it is of the untouched distribution at any
temperature. A continuation is tokenised together with its context; white space at the context's end belongs
to the continuation, and a token that holds characters of both counts with the context. In a chat the answer
begins where the template lets the assistant speak.

Shape legend: N tokens of one text, K counted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from gyrocompass.data.document import Message
from gyrocompass.data.encode import prompt_ids
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.measure.generate import Generate, Writing, Written, cut_at
from gyrocompass.measure.score import TokenScores
from gyrocompass.measure.tasks.run import ScoreContinuations
from gyrocompass.model.decoding import tokens_until
from gyrocompass.model.head import causal_lm, context_length, find_head
from gyrocompass.model.sampler import Sampling, end_ids, sample
from gyrocompass.model.score import evaluating, precision, scored_tokens

Pair = tuple[Sequence[int], Sequence[int]]
CHUNK = 256
"""Pairs that are packed and scored together."""
LEAST_SHARED = 8
"""Tokens of a first part that it pays to read once."""


def writer(model: nn.Module, tokenizer: Any, *, slots: int = 16, rows: int = 8) -> Generate:
    """A model that writes.

    Args:
        model: as for `log_probs`.
        tokenizer: the model's; with a chat template if prompts are to be put into it.
        slots: texts that are written at the same time.
        rows: rows in a batch of the pass that scores them.
    """
    ends = end_ids(model, tokenizer)

    def generate(prompts: Sequence[str], writing: Writing) -> list[list[Written]]:
        asked = [prompt_ids(tokenizer, [Message("user", text)] if writing.chat else text) for text in prompts]
        repeated = [ids for ids in asked for _ in range(writing.samples)]
        seeds = [writing.seed * 1_000_003 + number for number in range(len(repeated))]
        top_p = None if writing.top_p == 1 else writing.top_p
        sampling = Sampling(writing.max_new_tokens, ends, writing.temperature, writing.top_k, top_p)
        drawn = sample(model, repeated, seeds, sampling, slots=slots)
        pairs = [(ids, one.token_ids) for ids, one in zip(repeated, drawn, strict=True)]
        scores = score_pairs(model, pairs, length=context_length(model), rows=rows)
        found = []
        for one, scored in zip(drawn, scores, strict=True):
            text, stopped = cut_at(tokenizer.decode(one.token_ids, skip_special_tokens=True), writing.stop)
            count = tokens_until(tokenizer, one.token_ids, writing.stop) if stopped else len(one.token_ids)
            found.append(
                Written(text, scored.logprob_N[:count], scored.entropy_N[:count], stopped or one.finished)
            )
        return [found[start : start + writing.samples] for start in range(0, len(found), writing.samples)]

    return generate


def continuation_scorer(
    model: nn.Module, tokenizer: Any, *, length: int, rows: int = 8, autocast: bool = False
) -> ScoreContinuations:
    """A model that goes on from contexts; arguments as for `score.scorer`.

    Of a context that is too long the end is kept.
    """

    def ids(texts: Iterable[tuple[str, str]], chat: bool) -> Iterator[Pair]:
        for context, continuation in texts:
            if chat:
                answer = prompt_ids(tokenizer, continuation.lstrip())[1:]
                yield prompt_ids(tokenizer, [Message("user", context)]), answer
            else:
                yield continuation_ids(lambda text: prompt_ids(tokenizer, text), context, continuation)

    def score(pairs: Iterable[tuple[str, str]], *, chat: bool = False) -> Iterator[TokenScores]:
        yield from score_pairs(model, ids(pairs, chat), length=length, rows=rows, autocast=autocast)

    return score


def continuation_ids(encode: Callable[[str], list[int]], context: str, continuation: str) -> Pair:
    """The tokens of a context and of what follows it, tokenised together."""
    kept = context.rstrip()
    before, whole = encode(kept), encode(context + continuation)
    return before, whole[len(before) :]


def score_pairs(
    model: nn.Module, pairs: Iterable[Pair], *, length: int, rows: int = 8, autocast: bool = False
) -> Iterator[TokenScores]:
    """The tokens of each second part, predicted after the first.

    Pairs with one first part that follow each other share it: it is read once.

    Args:
        model: as for `log_probs`.
        pairs: ids; the first part has at least one. The end of what is longer than `length` + 1 is kept.
        length: positions in a row.
        rows: rows in a batch.
        autocast: compute as bf16 autocast does.
    """
    remaining = iter(pairs)
    may_share = _may_share(model)
    while chunk := list(islice(remaining, CHUNK)):
        found: dict[int, TokenScores] = {}
        alone: list[int] = []
        for places in _groups(chunk):
            first = chunk[places[0]][0]
            longest = len(first) + max(len(chunk[place][1]) for place in places) - 1
            if may_share and len(places) > 1 and len(first) >= LEAST_SHARED and longest <= length:
                with evaluating(model), torch.no_grad(), precision(next(model.parameters()).device, autocast):
                    scores = _after(model, first, [chunk[place][1] for place in places])
                found |= dict(zip(places, scores, strict=True))
            else:
                alone += places
        if alone:
            apart = _packed(model, [chunk[place] for place in alone], length, rows, autocast)
            found |= dict(zip(alone, apart, strict=True))
        yield from (found[place] for place in range(len(chunk)))


def _groups(chunk: Sequence[Pair]) -> Iterator[list[int]]:
    """Places of pairs that follow each other and have one first part."""
    own: list[int] = []
    for place, (first, _) in enumerate(chunk):
        if own and list(chunk[own[0]][0]) != list(first):
            yield own
            own = []
        own.append(place)
    yield own


def _may_share(model: nn.Module) -> bool:
    """Whether what was read can be kept for several continuations: attention that looks back over it all."""
    config = causal_lm(model).config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) is not None
    return kinds == {"full_attention"} and not slides and config._attn_implementation in ("sdpa", "eager")


def _after(model: nn.Module, first: Sequence[int], seconds: Sequence[Sequence[int]]) -> list[TokenScores]:
    """What follows one first part, read once."""
    device = next(model.parameters()).device
    base = causal_lm(model).base_model
    read = base(input_ids=torch.tensor([list(first)], device=device), use_cache=True)
    memory = read.past_key_values
    memory.batch_repeat_interleave(len(seconds))
    longest = max(len(second) for second in seconds)
    token_BL = torch.zeros(len(seconds), longest, dtype=torch.int64, device=device)
    for row, second in enumerate(seconds):
        token_BL[row, : len(second)] = torch.tensor(list(second), device=device)
    last_D = read.last_hidden_state[0, -1]
    hidden = [last_D.expand(len(seconds), 1, -1)]
    if longest > 1:  # the last token of each is only predicted; padding stands behind all that is asked about
        hidden.append(
            base(input_ids=token_BL[:, :-1], past_key_values=memory, use_cache=True).last_hidden_state
        )
    h_BLD = torch.cat(hidden, 1)
    counted_BL = torch.arange(longest, device=device) < torch.tensor(
        [[len(second)] for second in seconds], device=device
    )
    head, h_KD = find_head(model), h_BLD[counted_BL]
    answer = token_logprobs(
        h_KD,
        head.w_VD,
        token_BL[counted_BL],
        bias_V=head.bias_V,
        low_rank=head.low_rank_of(h_KD),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        want=("entropy", "rank"),
    )
    assert answer.entropy_T is not None and answer.rank_T is not None, "both were asked for"
    columns = [
        answer.logprob_T.double().cpu().numpy(),
        answer.entropy_T.double().cpu().numpy(),
        answer.rank_T.cpu().numpy(),
    ]
    found, start = [], 0
    for second in seconds:
        own = slice(start, start := start + len(second))
        logprob_N, entropy_N, rank_N = (column[own] for column in columns)
        ids_N = np.array(second, np.int64)
        found.append(TokenScores(ids_N, np.zeros_like(ids_N), logprob_N, entropy_N, rank_N.astype(np.int64)))
    return found


def _packed(
    model: nn.Module, chunk: Sequence[Pair], length: int, rows: int, autocast: bool
) -> Iterator[TokenScores]:
    """Each pair as a document of its own, of which the second part counts."""
    counts = [min(len(second), length) for _, second in chunk]
    dataset = TokenDataset.of(
        _row(str(place), [*first, *second][-(length + 1) :], count)
        for place, ((first, second), count) in enumerate(zip(chunk, counts, strict=True))
    )
    with evaluating(model):
        parts = list(scored_tokens(model, dataset, length, rows, autocast=autocast))
    index_K = np.concatenate([part.index_K for part in parts]) if parts else np.zeros(0, np.int64)
    order = np.argsort(index_K)
    columns = [
        np.concatenate([getattr(part, name) for part in parts])[order] if parts else np.zeros(0)
        for name in ("logprob_K", "entropy_K", "rank_K")
    ]
    ids = dataset.id_N[index_K[order]].astype(np.int64)
    start = 0
    for count in counts:
        own = slice(start, start := start + count)
        logprob_N, entropy_N, rank_N = (column[own] for column in columns)
        yield TokenScores(ids[own], np.zeros(count, np.int64), logprob_N, entropy_N, rank_N.astype(np.int64))


def _row(name: str, ids: Sequence[int], count: int) -> TokenRow:
    weights = [0.0] * (len(ids) - count) + [1.0] * count
    return TokenRow(name, "", "", ids, [0] * len(ids), weights)
