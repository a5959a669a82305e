"""Rollouts for a training stage: its prompts, engine, rewards and reference, put together.

    prompts artifact + tokenizer ---> Prompt, ...
    model, url ---------------------> Generate
    reference artifact -------------> a column of log-probabilities

Left out: everything that happens with them (`train.rollout`, `train.watch`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Document, read_documents
from gyrocompass.data.encode import prompt_ids
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.model.head import hidden_states
from gyrocompass.model.sampler import Sampled, Sampling, end_ids, sample
from gyrocompass.model.scalar_head import has_scalar_head, scalars
from gyrocompass.model.score import ScoredTokens, batches_of, evaluating, scored_tokens
from gyrocompass.model.upstream import UpstreamConfig, sample_upstream
from gyrocompass.train.answers import FloatArray, Prompt
from gyrocompass.train.distributed import World
from gyrocompass.train.rollout import Generate, RolloutConfig, RolloutSource
from gyrocompass.train.watch import GamingWatch, Scored, WatchConfig


def read_prompts(
    folder: Path, tokenizer: Any, longest: int, slices: Collection[str] | None = None
) -> list[Prompt]:
    """The prompts of a folder of documents: what stands before the last answer of each.

    The answer itself is the reference that rewards may compare with. Prompts of more than `longest` tokens,
    and plain texts, which have no prompt, are left out; so are those of other slices than `slices`.

    Raises:
        BadInput: nothing is left.
    """
    prompts = []
    for document in read_documents(folder):
        asked = _asked(document)
        if asked is None or (slices is not None and document.slice not in slices):
            continue
        prompt, text, answer = asked
        ids = prompt_ids(tokenizer, prompt)
        if len(ids) <= longest:
            known = {"answer": answer, **document.labels}
            if document.tests:
                known["tests"] = list(document.tests)
            prompts.append(Prompt(document.id, document.slice, document.source, text, tuple(ids), known))
    if not prompts:
        raise BadInput(
            f"no document here has a prompt of at most {longest} tokens"
            + (f" and is of {', '.join(slices)}" if slices else ""),
            where=folder,
            fix="give conversations, completions or preferences; raise sequence_length, or lower "
            "max_new_tokens",
        )
    return prompts


def _asked(document: Document) -> tuple[Any, str, str] | None:
    """A document's prompt as the tokenizer takes it and as text, and its answer."""
    match document.kind:
        case "chat":
            *asked, last = document.messages
            return (asked, asked[-1].content, last.content) if asked and last.role == "assistant" else None
        case "completion":
            return document.prompt, document.prompt, document.text
        case "preference" if document.messages:
            return document.messages, document.messages[-1].content, document.text
        case "preference":
            return document.prompt, document.prompt, document.text
        case _:
            return None


def engine(
    model: nn.Module, tokenizer: Any, config: RolloutConfig, upstream: UpstreamConfig | None
) -> Generate:
    """The model itself, or a server that is given its weights beside this run."""
    sampling = Sampling(config.max_new_tokens, end_ids(model, tokenizer))

    def embedded(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
        return sample(model, prompts, seeds, sampling, slots=config.slots)

    def served(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sampled]:
        assert upstream is not None
        return sample_upstream(upstream, prompts, seeds, sampling)

    return embedded if upstream is None else served


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to the text that is rewarded, without special tokens."""
    return partial(tokenizer.decode, skip_special_tokens=True)


def score_tokens(model: nn.Module, length: int, rows: int, dataset: TokenDataset) -> Scored:
    """What a model says of a dataset's counted tokens."""
    logprob_N, entropy_N = (np.full(dataset.n_tokens, np.nan, np.float32) for _ in range(2))
    with evaluating(model):
        parts: list[ScoredTokens] = list(scored_tokens(model, dataset, length, rows))
    for part in parts:
        logprob_N[part.index_K], entropy_N[part.index_K] = part.logprob_K, part.entropy_K
    return Scored(logprob_N, entropy_N)


def score_logprobs(model: nn.Module, length: int, rows: int, dataset: TokenDataset) -> FloatArray:
    """The log-probabilities alone."""
    return score_tokens(model, length, rows, dataset).logprob_N


def score_values(model: nn.Module, length: int, rows: int, dataset: TokenDataset) -> FloatArray:
    """What the scalar head says where each token is about to be chosen."""
    value_N = np.full(dataset.n_tokens, np.nan, np.float32)
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch, index_T in batches_of(dataset, length, rows, device=device):
            value_T = scalars(model, hidden_states(model, batch)).cpu().numpy()
            value_N[index_T[index_T >= 0]] = value_T[index_T >= 0]
    return value_N


def rollout_source(
    prompts: Sequence[Prompt],
    model: nn.Module,
    tokenizer: Any,
    rewards: Sequence[Any],
    config: RolloutConfig,
    length: int,
    rows: int,
    *,
    reference: nn.Module | None,
    reference_id: str,
    upstream: UpstreamConfig | None,
    world: World,
) -> RolloutSource:
    """A stage's source of windows."""
    wants_values = config.advantage.kind == "gae"
    return RolloutSource(
        prompts,
        engine(model, tokenizer, config, upstream),
        decoder(tokenizer),
        parse_rewards(rewards),
        config,
        length,
        reference=None if reference is None else partial(score_logprobs, reference, length, rows),
        reference_id=reference_id,
        values=partial(score_values, model, length, rows)
        if wants_values and has_scalar_head(model)
        else None,
        served=upstream is not None,
        world=world,
    )


def gaming_watch(
    prompts: Sequence[Prompt],
    model: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    rewards: Sequence[Any],
    config: WatchConfig,
    rollouts: RolloutConfig,
    length: int,
    rows: int,
    folder: Path | None,
    world: World,
) -> GamingWatch:
    """A stage's watch against gamed rewards."""
    return GamingWatch(
        prompts,
        engine(model, tokenizer, rollouts, None),
        decoder(tokenizer),
        parse_rewards(rewards),
        parse_rewards(config.gold, where="watch.gold"),
        partial(score_tokens, model, length, rows),
        partial(score_logprobs, reference, length, rows),
        config,
        folder,
        world,
    )
