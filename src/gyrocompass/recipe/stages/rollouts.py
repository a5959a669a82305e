"""Rollouts for a training stage: its prompts, its engine, and the source and the watch that use them.

    prompts artifact + tokenizer ---> Prompt, ...
    model, url ---------------------> Generate

Left out: everything that happens with them (`train.rollout`, `train.watch`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Document, read_documents
from gyrocompass.data.encode import prompt_ids
from gyrocompass.measure.reward import WeightedSum
from gyrocompass.measure.served import Server
from gyrocompass.model.columns import score_tokens, score_values
from gyrocompass.model.sampler import Sampled, Sampling, end_ids, sample
from gyrocompass.model.scalar_head import has_scalar_head
from gyrocompass.model.upstream import sample_upstream
from gyrocompass.train.answers import Annotate, Prompt
from gyrocompass.train.distributed import World
from gyrocompass.train.rollout import Generate, RolloutConfig, RolloutSource
from gyrocompass.train.watch import GamingWatch, WatchConfig


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


def engine(model: nn.Module, tokenizer: Any, config: RolloutConfig, upstream: Server | None) -> Generate:
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


def rollout_source(
    prompts: Sequence[Prompt],
    model: nn.Module,
    tokenizer: Any,
    rewards: WeightedSum,
    config: RolloutConfig,
    length: int,
    rows: int,
    *,
    reference: Annotate | None,
    upstream: Server | None,
    world: World,
) -> RolloutSource:
    """A stage's source of windows."""
    wants_values = config.advantage.kind == "gae"
    return RolloutSource(
        prompts,
        engine(model, tokenizer, config, upstream),
        decoder(tokenizer),
        rewards,
        config,
        length,
        reference=reference,
        values=partial(score_values, model, length, rows)
        if wants_values and has_scalar_head(model)
        else None,
        served=upstream is not None,
        world=world,
    )


def gaming_watch(
    prompts: Sequence[Prompt],
    model: nn.Module,
    reference: Annotate,
    tokenizer: Any,
    rewards: WeightedSum,
    gold: WeightedSum,
    config: WatchConfig,
    rollouts: RolloutConfig,
    length: int,
    rows: int,
    folder: Path | None,
    world: World,
    *,
    autocast: bool,
) -> GamingWatch:
    """A stage's watch against gamed rewards."""
    return GamingWatch(
        prompts,
        engine(model, tokenizer, rollouts, None),
        decoder(tokenizer),
        rewards,
        gold,
        partial(score_tokens, model, length, rows, autocast=autocast),
        reference,
        config,
        folder,
        world,
    )
