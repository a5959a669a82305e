"""ctranslate2 as the engine: faster on CPUs; with weights of 8 bits faster still, and approximate.

    submit --> waiting --> a batch of what is drawn alike, written to its end --> the next batch
    score  --> between batches, one sequence at a time, its logits held as a whole (4 V bytes for a token)

A batch is what waits when the one before has ended; who comes later waits for its end (there is no continuous
batching). Its prompts are of about one length, since ctranslate2 reads what goes beyond the shortest token
by token. Log-probabilities are of the untouched distribution, from ctranslate2's own logits: with float32
weights they agree with the model's to three decimals, which `convert` checks; with int8 weights they do not.

Left out, and refused by name: whatever changes logits before a draw (constraints, logit bias, penalties,
min-p, typical), and seeds, since all draws come from one stream of random numbers.

Shape legend: A sequences of a batch that are still written, L positions, V vocabulary, K the likeliest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gyrocompass.core.errors import BadInput, GyroError, MissingDependency
from gyrocompass.model.decoding import Decoding
from gyrocompass.serve.engine.desk import Desk, Limits, Post, Written
from gyrocompass.serve.engine.kinds import EngineSettings, Request, ScoreRequest, Sink, Step, Told
from gyrocompass.serve.engine.text import TextStream

Weights = Literal["float32", "int8"]
_LOG = logging.getLogger("gyrocompass.serve")
_NEAR = 32
"""Tokens by which a prompt may be longer than the shortest of its batch."""
_TOGETHER = 16
"""Sequences of a batch, at most: so many prompts of one length stay in the order in which they are given."""
_ROUNDING_NATS = 1e-3
_NOT_HERE = {
    "min_p": None, "typical_p": None, "choices": None, "regex": None, "json_schema": None,
    "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
}  # fmt: skip
"""Controls, and where they do nothing."""


def engine_name(weights: Weights) -> str:
    """What answers say of who wrote them.

    >>> engine_name("int8")
    'ctranslate2 int8, approximate'
    """
    return f"ctranslate2 {weights}" + (", approximate" if weights == "int8" else "")


def ctranslate2() -> Any:
    """The library.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import ctranslate2 as library
    except ImportError as error:
        raise MissingDependency(
            "ctranslate2", extra="ctranslate2", needed_for="--engine ctranslate2"
        ) from error
    return library


class CTranslate2Engine(Desk[Written]):
    """Answers with a converted model in this process, on the CPU.

    Args:
        folder: that `convert` made.
        tokenizer: the model's.
        limits: the model's.
        ends: tokens after which nothing comes.
        weights: as they are computed with.
        settings: how much at once.

    Raises:
        MissingDependency: ctranslate2 is not installed.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        limits: Limits,
        ends: Collection[int],
        *,
        weights: Weights = "float32",
        settings: EngineSettings | None = None,
    ) -> None:
        super().__init__(limits, settings)
        self._generator = ctranslate2().Generator(
            str(folder), device="cpu", compute_type=weights, intra_threads=torch.get_num_threads()
        )
        self._tokenizer, self._ends = tokenizer, sorted(ends)
        self._running = 0
        self._begin(self._run, "gyro-ctranslate2")

    def submit(self, request: Request, sink: Sink) -> Callable[[], None]:
        """See `Engine.submit`."""
        room = self.limits.room(request)
        _check(request)
        written = Written(request, room, TextStream(self._tokenizer, request.decoding.stop), sink)
        return self._queue(written)

    def figures(self) -> dict[str, float]:
        """Gauges."""
        waiting = len(self._waiting) + len(self._scores)
        return {"waiting": waiting, "running": self._running, "tokens_per_second": self._rate}

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._closing or self._waiting or self._scores):
                    self._lock.wait()
                if self._closing:
                    break
                scores = self._scores.popleft() if self._scores else None
                batch = [] if scores else self._next_batch()
            try:
                if scores is not None:
                    self._post.tell(scores[1], [self._scored(one) for one in scores[0]])
                elif batch:
                    self._write(batch)
            except Exception as error:  # one batch's fault must not end the server
                _LOG.exception("a batch of ctranslate2 failed")
                failed = GyroError(f"the engine failed: {error}")
                for sink in [scores[1]] if scores is not None else [one.sink for one in batch]:
                    self._post.tell(sink, failed)
            self._running = 0
            self._post.hand_over()
        stopping = GyroError("the server is stopping")
        for sink in [*(one.sink for one in self._waiting), *(sink for _, sink in self._scores)]:
            self._post.tell(sink, stopping)
        self._post.hand_over()

    def _next_batch(self) -> list[Written]:
        """The oldest that waits, and whatever can be written with it."""
        found: list[Written] = []
        most = min(self.settings.most_rows, _TOGETHER)
        for one in [*self._waiting]:
            if self._is_over(one):
                self._waiting.remove(one)
            elif not found or (len(found) < most and _alike(found, one)):
                self._waiting.remove(one)
                found.append(one)
        # The order in which ctranslate2 holds them, so that its rows can be told apart.
        return sorted(found, key=lambda one: -len(one.request.ids))

    def _is_over(self, one: Written) -> bool:
        """Also whether it may not write anything, which is told."""
        if one.room == 0 and not one.cancelled:
            self._post.tell(one.sink, Step("", [], "length"))
            return True
        return super()._is_over(one)

    def _write(self, batch: Sequence[Written]) -> None:
        drawn = batch[0].request.decoding
        self._running = len(batch)
        began = time.perf_counter()
        taking = _Taking(batch, self._ends, self._post, self._is_over, self.limits.n_vocabulary)
        self._generator.generate_batch(
            [self._tokenizer.convert_ids_to_tokens(list(one.request.ids)) for one in batch],
            include_prompt_in_result=False,
            max_length=max(one.room for one in batch),
            end_token=self._ends,
            return_end_token=True,
            return_scores=True,
            return_logits_vocab=True,
            sampling_topk=(drawn.top_k or 0) if drawn.temperature > 0 else 1,
            sampling_topp=drawn.top_p,
            sampling_temperature=drawn.temperature or 1.0,
            callback=taking,
        )
        rate = sum(one.written for one in batch) / (time.perf_counter() - began)
        self._rate = rate if self._rate == 0 else 0.8 * self._rate + 0.2 * rate

    def _scored(self, request: ScoreRequest) -> list[Told]:
        answer = self._generator.forward_batch([list(request.ids)], return_log_probs=True)
        start = max(1, request.start)
        logprob_LV = torch.from_numpy(np.array(answer)[0, start - 1 : len(request.ids) - 1])
        logprob_LV = logprob_LV[:, : self.limits.n_vocabulary]
        return _told(logprob_LV, list(request.ids[start:]), request.alternatives)


class _Taking:
    """Takes the tokens of a batch, one by one; True ends the sequence that a token belongs to.

    The first token of a step brings the logits of all that are still written, in their order.
    """

    def __init__(
        self,
        batch: Sequence[Written],
        ends: Collection[int],
        post: Post,
        is_over: Callable[[Written], bool],
        n_vocabulary: int,
    ) -> None:
        self._batch, self._ends, self._post, self._is_over = batch, ends, post, is_over
        self._n_vocabulary = n_vocabulary
        self._left = list(range(len(batch)))
        self._ended: set[int] = set()
        self._step = -1
        self._logprob_AV = torch.empty(0)

    def __call__(self, result: Any) -> bool:
        if result.step != self._step:
            self._step = result.step
            self._left = [place for place in self._left if place not in self._ended]
            logit_AV = torch.from_numpy(np.array(result.logits))[:, : self._n_vocabulary]
            self._logprob_AV = logit_AV.log_softmax(1)
        place = result.batch_id
        one = self._batch[place]
        if self._is_over(one):
            self._ended.add(place)
        else:
            row_1V = self._logprob_AV[self._left.index(place)][None]
            (told,) = _told(row_1V, [result.token_id], one.request.alternatives)
            if not abs(told.logprob - result.log_prob) <= _ROUNDING_NATS:
                raise RuntimeError("ctranslate2 holds its sequences in another order")
            step = one.took(told, self._ends)
            self._post.tell(one.sink, step)
            if isinstance(step, GyroError) or step.finish is not None:
                self._ended.add(place)
        self._post.hand_over()
        return place in self._ended


def _told(logprob_LV: Tensor, ids: Sequence[int], n_top: int) -> list[Told]:
    chosen_L = logprob_LV.gather(1, torch.tensor(ids)[:, None])[:, 0]
    entropy_L = torch.special.entr(logprob_LV.exp()).sum(1)
    top = logprob_LV.topk(min(n_top, logprob_LV.shape[1]), dim=1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    tops = [list(zip(tokens, values, strict=True)) for tokens, values in pairs]
    return [Told(*one) for one in zip(ids, chosen_L.tolist(), entropy_L.tolist(), tops, strict=True)]


def _check(request: Request) -> None:
    """Raise BadInput for what ctranslate2 cannot do."""
    decoding = request.decoding
    wanted = [name for name, plain in _NOT_HERE.items() if getattr(decoding, name) != plain]
    wanted += ["logit_bias"] if request.logit_bias else []
    wanted += ["seed"] if request.seed is not None and decoding.temperature > 0 else []
    if wanted:
        raise BadInput(
            f"the engine ctranslate2 has no {' and no '.join(wanted)}", fix="serve with the embedded engine"
        )


def _alike(batch: Sequence[Written], other: Written) -> bool:
    """Whether it is drawn as the batch is, and its prompt about as long."""

    def drawn(decoding: Decoding) -> tuple[Any, ...]:
        return decoding.temperature, decoding.top_k, decoding.top_p

    lengths = [len(one.request.ids) for one in [*batch, other]]
    same = drawn(other.request.decoding) == drawn(batch[0].request.decoding)
    # Beside a prompt of one token, ctranslate2 counts what is left of the longer ones as written.
    return same and max(lengths) - min(lengths) <= (_NEAR if min(lengths) > 1 else 0)
