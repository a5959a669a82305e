"""Fill-in-the-middle and prefix language modelling: encoded documents, rearranged or weighed anew.

    Encoded --fill_in_the_middle--> Encoded     prefix, suffix, and then the middle, marked by three sentinels
    Encoded --prefix_lm--> Encoded              the first part is context alone

A stage `tokens` does either to each text:

    tokens: {kind: tokens, infilling: {rate: 0.5}, ...}         or prefix_lm: {}

The tokenizer has to have the sentinels; one that a recipe trains has those in its `extra_special_tokens`.

With a document cut at two places into prefix, middle and suffix,

    PSM     BOS  PRE prefix  SUF suffix  MID middle  EOS
    SPM     BOS  PRE SUF suffix  MID prefix middle  EOS       (the second variant of the paper's appendix)

Both end in the middle's end, so that a model learns when to stop filling in, and one training mixes them.

Accounting stays exact: each token keeps its id, its bytes and its weight, so a document has the same tokens
to count, the same bytes and the same weight as before, in another order. The sentinels stand for no bytes
and are no targets: where a cut fell cannot be known, and whoever asks for an infill writes them.

What is drawn for a document depends on the seed and its id, not on what is read before it.

Left out. Cuts inside a token: the published rearrangement cuts characters, which needs the text and the
tokenizer; here a cut is between tokens, so an infill that is asked for within a word is off what was trained.
Attention in both directions over the prefix of a prefix LM: models here are causal, and a prefix LM is one by
its weights alone. Documents with a prompt or a conversation are for neither.

Shape legend: N tokens of a document.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.data.encode import Encoded, Int64Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Sentinels(NamedTuple):
    """The ids of the three special tokens."""

    prefix: int
    suffix: int
    middle: int


class SentinelTokens(Config):
    """The three special tokens by name; StarCoder's, without the underscores, and those of others differ."""

    prefix: str = "<|fim_prefix|>"
    suffix: str = "<|fim_suffix|>"
    middle: str = "<|fim_middle|>"

    def of(self, tokenizer: PreTrainedTokenizerFast) -> Sentinels:
        """Their ids.

        Raises:
            BadInput: the tokenizer has no such special token.
        """
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = (self.prefix, self.suffix, self.middle)
        missing = [name for name in names if name not in special]
        if missing:
            raise BadInput(
                f"the tokenizer has no special token {', '.join(missing)}; it has: {', '.join(special)}",
                where="infilling.sentinels",
                fix="name tokens that it has, or list these as extra_special_tokens of the tokenizer stage",
            )
        return Sentinels(*(special[name] for name in names))


class InfillingConfig(Config):
    """How documents are rearranged."""

    rate: Share = 0.5
    """The share of documents that are; the others stay as they are, and keep the model good at going on."""
    spm: Share = 0.5
    """The share of the rearranged ones that begin with the suffix."""
    counted: Literal["all", "middle"] = "all"
    """`middle`: prefix and suffix are context alone (for fine-tuning)."""
    sentinels: SentinelTokens = SentinelTokens()
    seed: int = Field(default=0, ge=0)


class PrefixLmConfig(Config):
    """Which part of each document is context alone: drawn, from the seed."""

    seed: int = Field(default=0, ge=0)


def fill_in_the_middle(
    encoded: Encoded, document_id: str, sentinels: Sentinels, config: InfillingConfig
) -> Encoded:
    """A document rearranged, or as it is: which, and cut where, is drawn from the seed and its id.

    Two different places of all n + 1 between the n tokens of the text, each pair as likely: the middle has a
    token or more, prefix and suffix may be empty.

    Args:
        encoded: BOS, the tokens of a text, EOS, as `encode_texts` makes them.
        document_id: what the draw belongs to.
        sentinels: ids that the tokenizer has for this and no text has.
        config: how.

    Returns:
        With `counted: all` the same (id, bytes, weight) triples in another order and three sentinels more;
        as it was if the rate says so, or if the text has no token.

    Raises:
        BadInput: two sentinels are one token, or one stands in the text.

    >>> text = Encoded(*(np.array([0, 1, 2, 3, 4, 0]), np.array([0, 1, 1, 1, 1, 0]), np.ones(6)))
    >>> config = InfillingConfig(rate=1.0, spm=0.0, seed=3)
    >>> fill_in_the_middle(text, "a", Sentinels(7, 8, 9), config).id_N.tolist()
    [0, 7, 1, 2, 8, 9, 3, 4, 0]

    Source: Bavarian et al. 2022, arXiv:2207.14255.
    """
    _check(encoded, document_id, sentinels)
    random = _random(config.seed, document_id, "infilling")
    rearranged, suffix_first = random.random(2) < (config.rate, config.spm)
    n = len(encoded.id_N)
    if not rearranged or n < 3:
        return encoded
    start, stop = 1 + np.sort(random.choice(n - 1, size=2, replace=False))
    place_N = np.arange(n)
    prefix, middle, suffix = place_N[1:start], place_N[start:stop], place_N[stop:-1]
    pre, suf, mid = ([-1 - which] for which in range(3))
    parts = [pre, suf, suffix, mid, prefix] if suffix_first else [pre, prefix, suf, suffix, mid]
    order = np.concatenate([place_N[:1], *parts, middle, place_N[-1:]]).astype(np.int64)
    found = _ordered(encoded, order, sentinels)
    if config.counted == "middle":
        found.weight_N[: len(order) - len(middle) - 1] = 0
    return found


def prefix_lm(encoded: Encoded, document_id: str, seed: int = 0) -> Encoded:
    """A document whose first part is context alone; how long that is, is drawn from the seed and its id.

    From no token to all but the last of the text's, each as likely. Tokens keep their ids and bytes; those of
    the prefix have weight 0. Attention stays causal within the prefix too: see the module's docstring.

    Args:
        encoded: BOS, the tokens of a text, EOS.
        document_id: what the draw belongs to.
        seed: of the draw.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.
    """
    n = len(encoded.id_N) - 2
    if n < 1:
        return encoded
    weight_N = encoded.weight_N.copy()
    weight_N[: 1 + int(_random(seed, document_id, "prefix").integers(n))] = 0
    return encoded._replace(weight_N=weight_N)


def _ordered(encoded: Encoded, order: Int64Array, sentinels: Sentinels) -> Encoded:
    """The tokens at places; place -1 - s is sentinel s, of no bytes and no weight."""
    is_sentinel = order < 0
    kept = np.where(is_sentinel, 0, order)
    ids = np.where(is_sentinel, np.array(sentinels)[np.where(is_sentinel, -1 - order, 0)], encoded.id_N[kept])
    return Encoded(
        ids.astype(encoded.id_N.dtype),
        np.where(is_sentinel, 0, encoded.byte_N[kept]).astype(encoded.byte_N.dtype),
        np.where(is_sentinel, 0, encoded.weight_N[kept]).astype(encoded.weight_N.dtype),
    )


def _check(encoded: Encoded, document_id: str, sentinels: Sentinels) -> None:
    if len(set(sentinels)) < 3:
        raise BadInput(f"the sentinels {tuple(sentinels)} are not three tokens")
    found = np.isin(encoded.id_N, sentinels)
    if found.any():
        raise BadInput(
            f"token {int(encoded.id_N[found][0])} is a sentinel and stands in a text",
            where=document_id,
            fix="use special tokens that no text has; a document is rearranged once",
        )


def _random(seed: int, document_id: str, purpose: str) -> np.random.Generator:
    """Draws that belong to a document."""
    digest = hashlib.sha256(f"{purpose} {seed} {document_id}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))
