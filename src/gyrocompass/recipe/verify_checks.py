"""Checks of a stage's arithmetic on its own first rows: laws 1 and 3 of the design.

    packing     log-probs of packed rows     = those of each segment run alone
    partition   loss and gradient of a window = the same however it is cut into micro-batches
    one_signal  the trainer's NLL            = `gyro score`'s = the direct sum over the model's full logits

The model is in evaluation mode: dropout would make any two runs differ. What the trainer computes is computed
by the trainer's own code (`train.window.window_gradients`), and nothing is updated.

Shape legend: T tokens of a batch, S tokens of a segment, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gyrocompass.data.pack import Packed
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.signal import TokenLogProbs
from gyrocompass.model.batch import to_batch
from gyrocompass.model.score import evaluating, log_probs, score_dataset
from gyrocompass.recipe.verify_subject import BOUNDS, Finding, Numeric, Subject, alone, segments
from gyrocompass.train.distributed import World
from gyrocompass.train.record import Alone
from gyrocompass.train.source import Window
from gyrocompass.train.window import WindowPass, window_gradients

PACKED_ROWS = 4
"""Rows that are run packed and segment by segment."""
SIGNAL_ROWS = 4
"""Rows whose log-probabilities are summed in three ways."""
WINDOWS_LOOKED_AT = 16
"""Windows in which a row of several segments is looked for."""
SIGNAL_BOUND_NATS = 1e-4


# --- packed = unpacked ---


def packing(subject: Subject) -> Finding:
    """Packed and alone, every counted token has the same log-probability."""
    rows = _rows_with_neighbours(subject)
    n_segments = int(rows.segment_T.max()) + 1
    worst: dict[str, float] = {}
    for numeric in subject.numerics:
        with evaluating(numeric.model), torch.no_grad():
            worst[numeric.config.precision] = _largest_difference(rows, numeric, subject.device)
    return Finding(
        _within_bounds(worst),
        _numbers(worst),
        _bounds(worst),
        f"in {', '.join(worst)}: {n_segments} segments in {rows.rows} rows",
        "attention that crosses segments or positions that do not restart: model/head.py hidden_states, and "
        "the model's attention implementation",
    )


def _rows_with_neighbours(subject: Subject) -> Packed:
    """Some rows of the first window in which a row holds several segments (else of the first window)."""
    for window in islice(subject.windows(), WINDOWS_LOOKED_AT):
        for row in range(window.rows):
            if window.take(row, row + 1).segment_T.max() > 0:
                first = max(0, min(row, window.rows - PACKED_ROWS))
                return window.take(first, min(first + PACKED_ROWS, window.rows))
    return subject.window.take(0, min(PACKED_ROWS, subject.window.rows))


def _largest_difference(rows: Packed, numeric: Numeric, device: torch.device) -> float:
    packed = _log_probs(rows, numeric, device)
    apart = torch.full_like(packed.logprob_T, torch.nan)  # what no segment fills shows
    for position_S in segments(rows):
        answer = _log_probs(alone(rows, position_S), numeric, device)
        apart[torch.from_numpy(position_S).to(device)] = answer.logprob_T
    counted_T = torch.from_numpy(rows.weight_T > 0).to(device)
    ours_K, lse_K = packed.logprob_T[counted_T], packed.lse_T[counted_T]
    scale_K = torch.stack([lse_K.abs(), (lse_K + ours_K).abs(), torch.ones_like(lse_K)]).amax(0)
    return float(((ours_K - apart[counted_T]).abs() / scale_K).max())


def _log_probs(packed: Packed, numeric: Numeric, device: torch.device) -> TokenLogProbs:
    with torch.autocast(device.type, torch.bfloat16, enabled=numeric.autocast):
        return log_probs(numeric.model, to_batch(packed, device), want=())


# --- partition ---


class _Difference(NamedTuple):
    loss: float
    gradient: float


def partition(subject: Subject) -> Finding:
    """Loss and gradient of the first window, cut into micro-batches of one row, as configured, and whole.

    The window is cut to two micro-batches where it is larger, so that the whole of it fits into about twice
    the memory that training takes.
    """
    rows = subject.window.take(0, min(subject.window.rows, 2 * subject.config.rows_per_micro_batch))
    sizes = sorted({1, min(subject.config.rows_per_micro_batch, rows.rows), rows.rows})
    worst: dict[str, float] = {}
    learns = True
    for numeric in subject.numerics:
        with evaluating(numeric.model):
            passed = {size: _gradients(subject, numeric, rows, size) for size in sizes}
        whole_loss, whole = passed[rows.rows]
        norm = _norm(whole)
        learns &= norm > 0
        differences = [
            max(abs(loss - whole_loss) / max(1.0, abs(whole_loss)), _apart(gradient, whole) / (norm or 1.0))
            for loss, gradient in passed.values()
        ]
        worst[numeric.config.precision] = float(torch.tensor(differences).max())
        numeric.main.clear_gradients()
    return Finding(
        learns and _within_bounds(worst),
        _numbers(worst) if learns else "no gradient",
        _bounds(worst),
        f"in {', '.join(worst)}: micro-batches of {' / '.join(map(str, sizes))} of {rows.rows} rows",
        "a mean taken inside a micro-batch, or an objective that reads other rows: loss/reduce.py and the "
        "stage's objective",
    )


def _gradients(
    subject: Subject, numeric: Numeric, rows: Packed, size: int
) -> tuple[float, dict[str, Tensor]]:
    loss = _trainer_pass(subject, numeric, rows, size).loss
    named = numeric.main.trained.items()
    return loss, {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def _trainer_pass(subject: Subject, numeric: Numeric, rows: Packed, size: int) -> WindowPass:
    config = numeric.config.model_copy(update={"rows_per_micro_batch": size})
    objective = parse_objectives(config.objective).within({"data": subject.data.slice_names})
    world = World(device=subject.device)
    return window_gradients(
        numeric.model,
        numeric.main,
        objective,
        Window(rows, subject.data),
        config,
        world=world,
        reference=numeric.reference,
    )


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return float(
        torch.tensor([float(part.double().square().sum()) for part in gradient.values()]).sum().sqrt()
    )


def _apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The norm of the difference; a parameter without a gradient has a gradient of zero."""
    parts = {}
    for name in {**ours, **theirs}:
        zero = torch.zeros_like(theirs[name] if name in theirs else ours[name])
        parts[name] = ours.get(name, zero).double() - theirs.get(name, zero).double()
    return _norm(parts)


# --- one signal ---


class _Nll(NamedTuple):
    nats: float
    tokens: int

    def plus(self, nats: float, tokens: int) -> _Nll:
        return _Nll(self.nats + nats, self.tokens + tokens)


def one_signal(subject: Subject) -> Finding:
    """By document: the trainer's mean NLL, that of `gyro score`, and the sum over the model's full logits.

    A row holds pieces of documents, so the pieces are scored as documents of their own.
    """
    numeric = subject.numerics[0]
    rows = subject.window.take(0, min(subject.window.rows, SIGNAL_ROWS))
    with evaluating(numeric.model):
        record = _trainer_pass(subject, numeric, rows, subject.config.rows_per_micro_batch).record
        numeric.main.clear_gradients()
        trainer: dict[str, _Nll] = defaultdict(lambda: _Nll(0.0, 0))
        # A NaN stays one: no document is looked at again.
        by_document = record.worst_documents(
            World(), lambda _: Alone(np.array([np.nan]), ""), count=len(rows.token_T)
        )
        for document in by_document:
            trainer[document.document_id] = trainer[document.document_id].plus(
                document.nats * document.tokens, document.tokens
            )
        ledger = score_dataset(
            numeric.model,
            pieces_as_documents(rows, subject.data),
            length=subject.config.sequence_length,
            rows=subject.config.rows_per_micro_batch,
        )
        score = {name: _Nll(sums.value, sums.count) for name, sums in ledger.items("document")}
        logits = _direct(subject, numeric, rows)
    apart = {"score": _nats_apart(trainer, score), "full logits": _nats_apart(trainer, logits)}
    tokens = sum(nll.tokens for nll in trainer.values())
    return Finding(
        all(nats <= SIGNAL_BOUND_NATS for nats in apart.values()),
        f"{np.max([*apart.values()]):.1e} nats",
        f"{SIGNAL_BOUND_NATS:.0e} nats",
        f"per token; from the trainer's, {', '.join(f'{name} {nats:.1e}' for name, nats in apart.items())}: "
        f"{tokens:,} tokens of {len(trainer)} documents",
        "what model/head.py does to this architecture's logits (softcap, scale, bias), and which tokens each "
        "of the three counts",
    )


def pieces_as_documents(rows: Packed, data: TokenDataset) -> TokenDataset:
    """The segments of some rows as a dataset; pieces of one document keep its id."""
    found = []
    for position_S in segments(rows):
        document = int(rows.document_T[position_S[0]])
        last = max(0, int(rows.target_T[position_S[-1]]))  # unknown where it is not counted, and never read
        found.append(
            TokenRow(
                data.document_ids[document],
                data.slice_names[data.slice_D[document]],
                data.source_names[data.source_D[document]],
                [*rows.token_T[position_S].tolist(), last],
                [0, *rows.byte_T[position_S].tolist()],
                [0.0, *rows.weight_T[position_S].tolist()],
            )
        )
    return TokenDataset.of(found)


def _direct(subject: Subject, numeric: Numeric, rows: Packed) -> dict[str, _Nll]:
    """What `transformers` itself says of each segment, alone and with all its logits."""
    found: dict[str, _Nll] = defaultdict(lambda: _Nll(0.0, 0))
    model: Any = numeric.model
    for position_S in segments(rows):
        token_S = torch.from_numpy(rows.token_T[position_S]).to(subject.device)
        target_S = torch.from_numpy(rows.target_T[position_S]).to(subject.device)
        counted_S = torch.from_numpy(rows.weight_T[position_S] > 0).to(subject.device)
        with torch.no_grad():
            logit_SV = model(input_ids=token_S[None], use_cache=False).logits[0]
        logprob_SV = logit_SV[counted_S].double().log_softmax(-1)
        nats = -logprob_SV.gather(1, target_S[counted_S, None]).sum()
        name = subject.data.document_ids[int(rows.document_T[position_S[0]])]
        found[name] = found[name].plus(float(nats), int(counted_S.sum()))
    return found


def _nats_apart(ours: Mapping[str, _Nll], theirs: Mapping[str, _Nll]) -> float:
    """The largest difference of a document's mean NLL; infinite where not the same tokens are counted."""
    if {name: nll.tokens for name, nll in ours.items()} != {name: nll.tokens for name, nll in theirs.items()}:
        return float("inf")
    differences = [abs(ours[name].nats - theirs[name].nats) / ours[name].tokens for name in ours]
    return float(torch.tensor(differences).max())


def _within_bounds(worst: Mapping[str, float]) -> bool:
    """By precision; a NaN is not within any bound."""
    return all(difference <= BOUNDS[precision] for precision, difference in worst.items())


def _numbers(worst: Mapping[str, float]) -> str:
    return ", ".join(f"{difference:.1e}" for difference in worst.values())


def _bounds(worst: Mapping[str, float]) -> str:
    return ", ".join(f"{BOUNDS[precision]:.0e}" for precision in worst)
