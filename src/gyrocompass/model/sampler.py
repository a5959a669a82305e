"""Samples of a model, many at a time: the engine behind rollouts.

    prompts, seeds --sample--> Sampled (token ids, the log-probability each was drawn with)

A number of *slots* decode in step, one token each; a slot whose sequence ends takes the next prompt at once
(continuous refill), and prompts that are equal are read once. Keys and values lie in one block per layer,
[slots, heads, positions, width], where each slot writes at its own position.

A token is drawn by Gumbel-max inside the primitive, with noise that depends on the sequence's seed and the
position alone: a sample is the same whatever shares the batch with it, up to a tie within rounding. Its
log-probability is recorded as it was when it was drawn, under the same temperature and support. It agrees
with the trainer's up to the rounding of attention with a cache; that difference is a metric of rollouts.

Left out: paged memory, prefix sharing between different prompts, streaming, speculative decoding.

Shape legend: B slots, P prompts read at once, L positions, D hidden width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import TokenLogProbs
from gyrocompass.model.head import Head, causal_lm, context_length, find_head
from gyrocompass.model.score import evaluating


class Sampling(NamedTuple):
    """How tokens are chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int
    end_ids: Collection[int]
    """The tokens that end a sequence."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class Sampled(NamedTuple):
    """What followed one prompt."""

    token_ids: list[int]
    """The end token included, if it came."""
    logprobs: list[float]
    """Nats: of each token, under the temperature and the support that it was drawn with."""
    finished: bool
    """Whether an end token came; else the limit or the context cut it."""
    weights_step: int | None = None
    """The optimizer steps that the weights had taken, where a server says so."""


def end_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """The tokens at which a model ends a text: its tokenizer's and its own, sorted."""
    own = causal_lm(model).generation_config.eos_token_id
    return tuple(sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}))


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    slots: int = 16,
) -> list[Sampled]:
    """Go on from each prompt.

    Args:
        model: as for `log_probs`; it computes in the dtype of its weights, in evaluation mode.
        prompts: token ids, each at least one.
        seeds: one per prompt; equal prompts with equal seeds give equal samples.
        sampling: how.
        slots: sequences that decode at the same time: more is faster and takes more memory.

    Returns:
        One per prompt, in order.

    Raises:
        BadInput: a prompt is empty or leaves no room in the context, or the model's attention looks back
            less far than a sequence may be long.
    """
    assert len(prompts) == len(seeds), "one seed per prompt"
    longest = _check(model, prompts, sampling)
    if not prompts:
        return []
    with evaluating(model), torch.no_grad():
        return _Decoder(model, prompts, seeds, sampling, min(slots, len(prompts)), longest).run()


def _check(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """The positions that the longest sequence may need."""
    config, context = causal_lm(model).config, context_length(model)
    for index, ids in enumerate(prompts):
        if not 0 < len(ids) < context:
            raise BadInput(
                f"a prompt of {len(ids)} tokens has no place in the model's context of {context}",
                where=f"prompt {index}",
                fix="give at least one token, and leave room for an answer",
            )
    longest = min(context, max((len(ids) for ids in prompts), default=0) + sampling.max_new_tokens)
    window = getattr(config, "sliding_window", None)
    if window is not None and longest > window:
        raise BadInput(
            f"sequences of {longest} tokens are longer than the model's attention window of {window}",
            fix="sample shorter sequences",
        )
    if config._attn_implementation == "flex_attention":
        raise BadInput("sampling does not work with flex_attention", fix="load the model with sdpa")
    return longest


class _Slot:
    """A sequence that is being written."""

    def __init__(self, index: int, prompt: Sequence[int], seed: int) -> None:
        self.index, self.length, self.seed = index, len(prompt), seed
        self.written: list[int] = []
        self.logprobs: list[float] = []


class _Decoder:
    """All slots, their keys and values, and the prompts that wait."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        n_slots: int,
        longest: int,
    ) -> None:
        self.model, self.prompts, self.sampling, self.longest = model, prompts, sampling, longest
        self.head: Head = find_head(model)
        self.device = self.head.w_VD.device
        self.waiting = deque(
            _Slot(i, ids, seed) for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
        )
        self.slots: list[_Slot | None] = [None] * n_slots
        self.memory = _Memory(n_slots, longest)
        self.answers: dict[int, Sampled] = {}

    def run(self) -> list[Sampled]:
        while self.waiting or any(self.slots):
            self._refill()
            self._step()
        return [self.answers[index] for index in range(len(self.prompts))]

    def _refill(self) -> None:
        """Read waiting prompts into free slots, and draw the first token of each."""
        while self.waiting and None in self.slots:
            free = [place for place, slot in enumerate(self.slots) if slot is None]
            taken = {
                place: self.waiting.popleft()
                for place, _ in zip(free, range(len(self.waiting)), strict=False)
            }
            for place, slot in taken.items():
                self.slots[place] = slot
            hidden_BD = self._read(taken)
            self._draw(list(taken), hidden_BD)

    def _read(self, taken: dict[int, _Slot]) -> Tensor:
        """Run the prompts through the model; their keys and values go to the slots. Last hidden states."""
        different = list(dict.fromkeys(tuple(self.prompts[slot.index]) for slot in taken.values()))
        row = {ids: number for number, ids in enumerate(different)}
        longest = max(map(len, different))
        token_PL = torch.zeros(len(different), longest, dtype=torch.int64)
        for number, ids in enumerate(different):
            token_PL[number, : len(ids)] = torch.tensor(ids)
        ahead_LL = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        position_1L = torch.arange(longest)[None]
        prefill = _Prefill()
        hidden_PLD = self._forward(token_PL, position_1L, ahead_LL[None, None], prefill)
        rows = [row[tuple(self.prompts[slot.index])] for slot in taken.values()]
        self.memory.fill(list(taken), prefill, rows)
        last = [slot.length - 1 for slot in taken.values()]
        return hidden_PLD[rows, last]

    def _step(self) -> None:
        """One more token for every slot in use."""
        places = [place for place, slot in enumerate(self.slots) if slot is not None]
        if not places:
            return
        busy = [slot for slot in self.slots if slot is not None]
        position_B = torch.tensor([slot.length + len(slot.written) - 1 for slot in busy])
        token_B1 = torch.tensor([[slot.written[-1]] for slot in busy])
        in_use = int(position_B.max()) + 1
        beyond_BL = torch.arange(in_use)[None] > position_B[:, None]
        self.memory.aim(places, position_B.to(self.device), in_use)
        hidden_B1D = self._forward(token_B1, position_B[:, None], beyond_BL[:, None, None], self.memory)
        self._draw(places, hidden_B1D[:, 0])

    def _forward(self, token_BL: Tensor, position_BL: Tensor, hidden_BHLL: Tensor, memory: Any) -> Tensor:
        """Hidden states after the final norm; `hidden_BHLL` is True where attention must not look."""
        dtype = self.head.w_VD.dtype
        mask = torch.zeros(hidden_BHLL.shape, dtype=dtype).masked_fill(hidden_BHLL, torch.finfo(dtype).min)
        answer = causal_lm(self.model).base_model(
            input_ids=token_BL.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=position_BL.to(self.device),
            past_key_values=memory,
            use_cache=False,
        )
        hidden: Tensor = answer.last_hidden_state
        return hidden

    def _draw(self, places: Sequence[int], h_BD: Tensor) -> None:
        """Choose a token for each of these slots, and let go of those that end."""
        slots = [slot for place in places if (slot := self.slots[place]) is not None]
        seeds = [slot.seed * 1_000_003 + len(slot.written) for slot in slots]
        seed_B = torch.tensor([seed % 2**63 for seed in seeds], device=self.device)
        token_B, logprob_B = self._chosen(h_BD, seed_B)
        for place, slot, token, logprob in zip(
            places, slots, token_B.tolist(), logprob_B.tolist(), strict=True
        ):
            slot.written.append(token)
            slot.logprobs.append(logprob)
            finished = token in self.sampling.end_ids
            room = min(self.sampling.max_new_tokens, self.longest - slot.length)
            if finished or len(slot.written) >= room:
                self.answers[slot.index] = Sampled(slot.written, slot.logprobs, finished)
                self.slots[place] = None

    def _chosen(self, h_BD: Tensor, seed_B: Tensor) -> tuple[Tensor, Tensor]:
        """A token per row, and its log-probability."""
        anything_B = torch.zeros_like(seed_B)
        if self.sampling.temperature == 0:
            answer = self._primitive(h_BD, anything_B, temperature=1.0, n_top=1)
            assert answer.top_TK is not None and answer.top_token_TK is not None
            return answer.top_token_TK[:, 0], answer.top_TK[:, 0]
        rule = {
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
        }
        token_B = self._primitive(h_BD, anything_B, seed_T=seed_B, **rule).drawn_T
        assert token_B is not None
        return token_B, self._primitive(h_BD, token_B, **rule).logprob_T

    def _primitive(self, h_BD: Tensor, target_B: Tensor, **asked: Any) -> TokenLogProbs:
        head = self.head
        return token_logprobs(
            h_BD,
            head.w_VD,
            target_B,
            bias_V=head.bias_V,
            low_rank=head.low_rank_of(h_BD),
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            want=(),
            **asked,
        )


class _Prefill:
    """Takes the keys and values of prompts, layer by layer, as `transformers` hands them to a cache."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.layers.append((key, value))
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Memory:
    """The keys and values of all slots: a cache in which every slot writes at its own position."""

    def __init__(self, n_slots: int, longest: int) -> None:
        self.n_slots, self.longest = n_slots, longest
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._aim: tuple[Tensor, Tensor, int, bool] | None = None

    def fill(self, places: Sequence[int], prefill: _Prefill, rows: Sequence[int]) -> None:
        """Copy prompts (rows of `prefill`) into slots."""
        for number, given in enumerate(prefill.layers):
            if number == len(self.layers):
                shape = [(self.n_slots, x.shape[1], self.longest, x.shape[3]) for x in given]
                self.layers.append((given[0].new_zeros(shape[0]), given[1].new_zeros(shape[1])))
            for own, new in zip(self.layers[number], given, strict=True):
                own[list(places), :, : new.shape[2]] = new[list(rows)]

    def aim(self, places: Sequence[int], position_B: Tensor, in_use: int) -> None:
        """Say which slots write next, where, and how many positions are in use."""
        place_B = torch.tensor(places, device=position_B.device)
        self._aim = (place_B, position_B, in_use, len(places) == self.n_slots)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self._aim is not None
        place_B, position_B, in_use, everybody = self._aim
        seen = []
        for own, new in zip(self.layers[layer], (key, value), strict=True):
            own[place_B, :, position_B] = new[:, :, 0]
            part = own[:, :, :in_use]
            seen.append(part if everybody else part[place_B])
        return seen[0], seen[1]

    def get_seq_length(self, *_: Any) -> int:
        return 0
