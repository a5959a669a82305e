"""The embedded engine: one thread that owns a model, and everybody's sequences in it.

    submit --> waiting --> reading (a chunk of its prompt a turn) --> decoding (a token a turn, all together)
    score  --> packed together, by the trainer's own path

A turn: what waits to be scored; a chunk of the oldest unread prompt; one step of everything that decodes. So
a long prompt holds nobody up for longer than a chunk, and a sequence joins and leaves at any turn (continuous
batching). What comes of a turn is handed to the asyncio loop in one call.

Log-probabilities are the primitive's, of the last hidden states and the head (law 3); logits are made beside
it to choose by.

Memory is bounded by positions: a sequence is admitted while rows times the longest sequence, as long as it
may get, stay within `memory_tokens`; the first is always admitted.

Left out: attention windows shorter than the context (the context is then the window), beams, speculation.

Shape legend: B sequences that decode, L positions of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.model.head import causal_lm, context_length, find_head
from gyrocompass.model.sampler import end_ids
from gyrocompass.model.score import evaluating, top_tokens
from gyrocompass.serve.engine.choose import Chooser
from gyrocompass.serve.engine.desk import Desk, Limits, Written
from gyrocompass.serve.engine.kinds import (
    EngineSettings,
    Request,
    ScoreRequest,
    Sink,
    Step,
    Told,
)
from gyrocompass.serve.engine.memory import Prefixes, Rows, Scratch
from gyrocompass.serve.engine.text import TextStream

_LOG = logging.getLogger("gyrocompass.serve")
_SCORED_IN_A_TURN = 4096
"""Tokens; what waits beyond them comes after a step of everybody else."""


class _Sequence(Written):
    """With how its tokens are chosen, and its prompt's keys and values while they are read."""

    def __init__(self, request: Request, room: int, chooser: Chooser, text: TextStream, sink: Sink) -> None:
        super().__init__(request, room, text, sink)
        self.chooser = chooser
        self.scratch: Scratch | None = None

    @property
    def longest(self) -> int:
        """Positions it may come to need."""
        return len(self.request.ids) + self.room


class EmbeddedEngine(Desk[_Sequence]):
    """Answers with a model in this process.

    Args:
        model: a causal model of a known architecture, on its device.
        tokenizer: the model's.
        settings: how much at once.

    Raises:
        BadInput: the model cannot be served: its attention does not take a mask, or its head is not known.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: EngineSettings | None = None) -> None:
        self._model, self._tokenizer = model, tokenizer
        config = causal_lm(model).config
        if config._attn_implementation == "flex_attention":
            raise BadInput("serving does not work with flex_attention", fix="load the model with sdpa")
        window = getattr(config, "sliding_window", None)
        self._head = find_head(model)
        context = min(context_length(model), window or context_length(model))
        super().__init__(Limits(context, int(self._head.w_VD.shape[0])), settings)
        self._device = self._head.w_VD.device
        self._ends = set(end_ids(model, tokenizer))
        self._reading: deque[_Sequence] = deque()
        self._decoding: list[_Sequence] = []
        self._rows = Rows()
        self._prefixes = Prefixes(self.settings.prefix_tokens)
        self._begin(self._run, "gyro-engine")

    def submit(self, request: Request, sink: Sink) -> Callable[[], None]:
        """See `Engine.submit`."""
        room = self.limits.room(request)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        chooser = Chooser(
            request.decoding, request.logit_bias, seed, self._tokenizer, self.limits.n_vocabulary, request.ids
        )
        text = TextStream(self._tokenizer, request.decoding.stop)
        sequence = _Sequence(request, room, chooser, text, sink)
        return self._queue(sequence)

    def figures(self) -> dict[str, float]:
        """Gauges."""
        return {
            "waiting": len(self._waiting) + len(self._scores),
            "reading": len(self._reading),
            "running": len(self._decoding),
            "memory_positions": self._rows.positions(),
            "prefix_blocks": len(self._prefixes),
            "prefix_hit_share": self._prefixes.hits / max(1, self._prefixes.asked),
            "tokens_per_second": self._rate,
        }

    def _run(self) -> None:
        with evaluating(self._model), torch.no_grad():
            while True:
                with self._lock:
                    while not (self._closing or self._has_work()):
                        self._lock.wait()
                    if self._closing:
                        break
                try:
                    self._turn()
                except Exception as error:  # one turn's fault must not end the server
                    _LOG.exception("a turn of the engine failed")
                    self._fail_all(GyroError(f"the engine failed: {error}"))
                self._post.hand_over()
        self._fail_all(GyroError("the server is stopping"))
        self._post.hand_over()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._scores or self._reading or self._decoding)

    def _turn(self) -> None:
        scores, tokens = [], 0
        with self._lock:
            while self._scores and tokens < _SCORED_IN_A_TURN:
                scores.append(self._scores.popleft())
                tokens += sum(len(one.ids) for one in scores[-1][0])
        if scores:
            self._score(scores)
        self._drop_the_cancelled()
        self._admit()
        if self._reading:
            self._read(self._reading[0])
        if self._decoding:
            began = time.perf_counter()
            count = len(self._decoding)
            self._decode()
            rate = count / (time.perf_counter() - began)
            self._rate = rate if self._rate == 0 else 0.95 * self._rate + 0.05 * rate

    def _drop_the_cancelled(self) -> None:
        with self._lock:
            kept = [one for one in self._waiting if not self._is_over(one)]
            self._waiting.clear()
            self._waiting.extend(kept)
        self._reading = deque(one for one in self._reading if not self._is_over(one))
        for row in reversed(range(len(self._decoding))):
            if self._is_over(self._decoding[row]):
                self._remove(row)

    def _admit(self) -> None:
        """Let waiting sequences begin, first come first served, as far as there is room."""
        with self._lock:
            while self._waiting:
                active = [*self._decoding, *self._reading]
                longest = max(one.longest for one in [*active, self._waiting[0]])
                positions = (len(active) + 1) * longest
                full = len(active) >= self.settings.most_rows or positions > self.settings.memory_tokens
                if active and full:
                    return
                self._reading.append(self._waiting.popleft())

    def _read(self, sequence: _Sequence) -> None:
        """One chunk of a prompt; after the last one, its first token is chosen."""
        ids = sequence.request.ids
        if sequence.scratch is None:
            sequence.scratch = Scratch(len(ids))
            sequence.scratch.put(self._prefixes.find(ids).blocks)
        scratch = sequence.scratch
        start, end = scratch.done, min(len(ids), scratch.done + self.settings.chunk_tokens)
        position_L = torch.arange(start, end)
        ahead_LL = torch.arange(end)[None] > position_L[:, None]
        token_1L = torch.tensor([list(ids[start:end])])
        hidden_1LD = self._forward(token_1L, position_L[None], ahead_LL[None, None], scratch)
        scratch.done = end
        if end < len(ids):
            return
        self._reading.popleft()
        self._prefixes.keep(ids, scratch)
        if sequence.room == 0:
            self._post.tell(sequence.sink, Step("", [], "length"))
            return
        self._rows.add(scratch)
        sequence.scratch = None
        self._decoding.append(sequence)
        self._take(hidden_1LD[:, -1], [len(self._decoding) - 1])

    def _decode(self) -> None:
        """One more token for everybody."""
        token_B1 = torch.tensor([[sequence.last] for sequence in self._decoding])
        place_B = self._rows.begin().cpu()
        beyond_BL = torch.arange(int(place_B.max()) + 1)[None] > place_B[:, None]
        hidden_B1D = self._forward(token_B1, place_B[:, None], beyond_BL[:, None, None], self._rows)
        self._rows.end()
        self._take(hidden_B1D[:, 0], range(len(self._decoding)))

    def _forward(self, token_BL: Tensor, position_BL: Tensor, hidden_BHLL: Tensor, memory: Any) -> Tensor:
        """Hidden states after the final norm; `hidden_BHLL` is True where attention must not look."""
        dtype = self._head.w_VD.dtype
        mask = torch.zeros(hidden_BHLL.shape, dtype=dtype).masked_fill(hidden_BHLL, torch.finfo(dtype).min)
        answer = causal_lm(self._model).base_model(
            input_ids=token_BL.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=position_BL.to(self._device),
            past_key_values=memory,
            use_cache=False,
        )
        hidden: Tensor = answer.last_hidden_state
        return hidden

    def _take(self, h_BD: Tensor, rows: Sequence[int]) -> None:
        """Choose the next token of these rows, tell it, and let go of those that end."""
        sequences = [self._decoding[row] for row in rows]
        chosen = self._chosen(h_BD, sequences)
        told = self._primitive(h_BD, chosen, max(one.request.alternatives for one in sequences))
        ended = []
        for row, sequence, one in zip(rows, sequences, told, strict=True):
            step = sequence.took(one, self._ends)
            self._post.tell(sequence.sink, step)
            if isinstance(step, GyroError) or step.finish is not None:
                ended.append(row)
        for row in reversed(ended):
            self._remove(row)

    def _chosen(self, h_BD: Tensor, sequences: Sequence[_Sequence]) -> list[int]:
        logit_BV = _logits(self._head, h_BD)
        likeliest = logit_BV.argmax(1).tolist()
        found = []
        for row, sequence in enumerate(sequences):
            chooser = sequence.chooser
            plain = chooser.is_plain
            token = likeliest[row] if plain else chooser.choose(logit_BV[row].float().cpu())
            if not plain:
                chooser.took(token)
            found.append(token)
        return found

    def _primitive(self, h_BD: Tensor, chosen: Sequence[int], n_top: int) -> list[Told]:
        answer = token_logprobs(
            h_BD,
            self._head.w_VD,
            torch.tensor(chosen, device=self._device),
            bias_V=self._head.bias_V,
            low_rank=self._head.low_rank_of(h_BD),
            softcap=self._head.softcap,
            logit_scale=self._head.logit_scale,
            want=("entropy",),
            n_top=n_top,
        )
        assert answer.entropy_T is not None
        tops: list[list[tuple[int, float]]] = [[] for _ in chosen]
        if answer.top_TK is not None and answer.top_token_TK is not None:
            pairs = zip(answer.top_token_TK.tolist(), answer.top_TK.tolist(), strict=True)
            tops = [list(zip(tokens, values, strict=True)) for tokens, values in pairs]
        columns = zip(chosen, answer.logprob_T.tolist(), answer.entropy_T.tolist(), tops, strict=True)
        return [Told(*one) for one in columns]

    def _remove(self, row: int) -> None:
        """The last row takes its place, as in `Rows`."""
        self._rows.remove(row)
        last = self._decoding.pop()
        if row < len(self._decoding):
            self._decoding[row] = last

    def _score(self, asked: Sequence[tuple[list[ScoreRequest], Sink]]) -> None:
        requests = [request for part, _ in asked for request in part]
        found: list[list[Told]] = [[] for _ in requests]
        dataset = TokenDataset.of(
            TokenRow(str(number), "", "", list(one.ids), [0] * len(one.ids), _weights(one))
            for number, one in enumerate(requests)
        )
        n_top = max(one.alternatives for one in requests)
        parts: list[dict[int, Told]] = [{} for _ in requests]
        for scored, top in top_tokens(self._model, dataset, self.limits.context, 4, n_top=n_top):
            for k, (index, document) in enumerate(
                zip(scored.index_K.tolist(), scored.document_K.tolist(), strict=True)
            ):
                most = requests[document].alternatives
                likeliest = zip(
                    top.token_KN[k].tolist()[:most], top.logprob_KN[k].tolist()[:most], strict=True
                )
                parts[document][index] = Told(
                    int(dataset.id_N[index]),
                    float(scored.logprob_K[k]),
                    float(scored.entropy_K[k]),
                    list(likeliest),
                )
        found = [[part[index] for index in sorted(part)] for part in parts]
        start = 0
        for part, sink in asked:
            self._post.tell(sink, found[start : start + len(part)])
            start += len(part)

    def _fail_all(self, error: GyroError) -> None:
        with self._lock:
            waiting, scores = list(self._waiting), list(self._scores)
            self._waiting.clear()
            self._scores.clear()
        for sequence in [*waiting, *self._reading, *self._decoding]:
            self._post.tell(sequence.sink, error)
        for _, sink in scores:
            self._post.tell(sink, error)
        self._reading.clear()
        self._decoding.clear()
        self._rows = Rows()


def _weights(request: ScoreRequest) -> list[float]:
    return [0.0 if place < max(1, request.start) else 1.0 for place in range(len(request.ids))]


def _logits(head: Any, h_BD: Tensor) -> Tensor:
    """The head's output in float32, [B, V], to choose by."""
    logit_BV: Tensor = nn.functional.linear(h_BD, head.w_VD).float()
    low_rank = head.low_rank_of(h_BD)
    if low_rank is not None:
        logit_BV = logit_BV + low_rank[0].float() @ low_rank[1].float().T
    if head.bias_V is not None:
        logit_BV = logit_BV + head.bias_V
    logit_BV = logit_BV * head.logit_scale
    if head.softcap is not None:
        logit_BV = head.softcap * torch.tanh(logit_BV / head.softcap)
    return logit_BV
