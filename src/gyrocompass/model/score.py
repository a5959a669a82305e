"""Log-probabilities of tokens under a model: the one place that trainer, `gyro score` and server share.

    model, batch   --log_probs------> TokenLogProbs     (with gradients: the trainer's call)
    model, dataset --score_dataset--> Ledger            (without: sums by slice, source, document and group)
    model, texts   --scorer---------> measure's Score   (without: each token's numbers)

Long documents: a document of more than `length` tokens is cut from its start into pieces of `length` inputs
with stride `length`, as in training. Every token is predicted exactly once, and the first tokens of a piece
are predicted without what stood before the cut. The figures of long documents therefore depend on `length`,
and two models are compared at the same one. Shorter strides, which give every token more context at a
multiple of the cost, are `data.windows`.

How documents are packed into rows and rows into batches changes nothing beyond rounding (law 1), and is the
same in each run.

Shape legend: T tokens of a batch, N tokens of a dataset, K counted tokens of a batch, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gyrocompass.core.errors import BadInput
from gyrocompass.data.encode import encode_texts
from gyrocompass.data.pack import Pieces, assemble, cut, pack
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.divergence import Head as DivergentHead
from gyrocompass.loss.divergence import divergence
from gyrocompass.loss.logprob import WANTS, token_logprobs
from gyrocompass.loss.signal import Batch, Divergence, Expect, TokenLogProbs
from gyrocompass.measure.ledger import Ledger
from gyrocompass.measure.score import Score, TokenScores
from gyrocompass.model.batch import to_batch
from gyrocompass.model.future_heads import future_logprobs
from gyrocompass.model.head import Head, find_head, hidden_states
from gyrocompass.model.scalar_head import scalars

Int64Array = NDArray[np.int64]


def log_probs(
    model: nn.Module,
    batch: Batch,
    *,
    want: Collection[str] = WANTS,
    candidate_TC: Tensor | None = None,
    n_top: int = 0,
    seed_T: Tensor | None = None,
    expect: Expect | None = None,
    divergences: Sequence[Divergence] = (),
    teacher: nn.Module | None = None,
    backend: str = "auto",
    check_finite: bool = False,
) -> TokenLogProbs:
    """What a model says of a batch's targets: its hidden states and its head, through the primitive.

    Besides the primitive's answer it gives what is asked of the hidden states: `scalar_T` of the scalar head
    for "scalar" in `want`, the hidden states themselves for "hidden", `future_TK` of the future heads for
    "future", and `divergence_TK` for divergences from a teacher, at the positions that count.

    Args:
        model: a causal language model of a known architecture, with or without LoRA, in either mode.
        batch: on the model's device.
        want: as for `token_logprobs`, and "scalar", "hidden" and "future".
        candidate_TC: as for `token_logprobs`.
        n_top: as for `token_logprobs`.
        seed_T: as for `token_logprobs`.
        expect: as for `token_logprobs`; sees the other fields too, as constants.
        divergences: which, one column each.
        teacher: the model that they are from; it gets no gradient.
        backend: as for `token_logprobs`.
        check_finite: as for `token_logprobs`.

    Returns:
        `TokenLogProbs`, differentiable unless gradients are off.
    """
    head, h_TD = find_head(model), hidden_states(model, batch)
    beside: dict[str, Tensor] = {}
    if "scalar" in want:
        beside["scalar_T"] = scalars(model, h_TD)
    if "hidden" in want:
        beside["hidden_TD"] = h_TD
    if "future" in want:
        beside["future_TK"] = future_logprobs(model, h_TD, batch, backend=backend)
    if divergences:
        beside["divergence_TK"] = _divergences(head, h_TD, batch, divergences, teacher)
    if expect is not None and beside:
        expect = partial(_with_constants, expect, {name: x.detach() for name, x in beside.items()})
    answer = token_logprobs(
        h_TD,
        head.w_VD,
        batch.target_T,
        bias_V=head.bias_V,
        low_rank=head.low_rank_of(h_TD),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        want=[name for name in want if name in WANTS],
        candidate_TC=candidate_TC,
        n_top=n_top,
        seed_T=seed_T,
        expect=expect,
        backend=backend,
        check_finite=check_finite,
    )
    return answer._replace(**beside)


def _with_constants(expect: Expect, beside: dict[str, Tensor], answer: TokenLogProbs) -> Tensor:
    return expect(answer._replace(**beside))


def _divergences(
    head: Head, h_TD: Tensor, batch: Batch, asked: Sequence[Divergence], teacher: nn.Module | None
) -> Tensor:
    """The student's divergences from the teacher where the batch counts, [T, K]."""
    if teacher is None:
        raise BadInput("an objective asks for a divergence from a teacher", fix="name one: `teacher: STAGE`")
    counted_T = batch.weight_T > 0
    student = _as_divergent(head, h_TD)
    with torch.no_grad():
        master = _as_divergent(find_head(teacher), hidden_states(teacher, batch))
    master = _without_gradient(master)
    columns = []
    for kind, beta, temperature in asked:
        p, q = (side._replace(temperature=temperature) for side in (student, master))
        columns.append(divergence(p, q, kind, beta=beta, mask_T=counted_T))
    return torch.stack(columns, dim=1)


def _without_gradient(head: DivergentHead) -> DivergentHead:
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    low_rank = head.low_rank and (head.low_rank[0].detach(), head.low_rank[1].detach())
    return head._replace(w_VD=head.w_VD.detach(), bias_V=bias_V, low_rank=low_rank)


def _as_divergent(head: Head, h_TD: Tensor) -> DivergentHead:
    low_rank = head.low_rank_of(h_TD)
    return DivergentHead(h_TD, head.w_VD, head.bias_V, low_rank, head.softcap, head.logit_scale)


def score_dataset(
    model: nn.Module,
    dataset: TokenDataset,
    *,
    length: int,
    rows: int = 8,
    documents: Sequence[int] | None = None,
    autocast: bool = False,
    on_tokens: Callable[[int], Any] | None = None,
) -> Ledger:
    """Sum a model's log-probabilities over a dataset, by slice, source, document and group.

    The model is in evaluation mode meanwhile (no dropout), and afterwards in the mode that it was in.

    Args:
        model: as for `log_probs`; computes in the dtype of its weights.
        dataset: what to score; tokens of weight 0 are context alone.
        length: tokens in a row, and the most that a token can look back; see the module's rule.
        rows: rows in a batch: more is faster and takes more memory.
        documents: indices of the documents to score; None: all.
        autocast: compute as bf16 autocast does in training, whatever the weights' dtype.
        on_tokens: called with the number of counted tokens after each batch.

    Returns:
        The ledger, with entropy and top-1; its count is the number of counted tokens (law 2).

    Raises:
        GyroError: a log-probability is NaN or infinite; its document is named.
        BadInput: a piece is longer than the model's context, or its architecture is not known.
    """
    ledger = Ledger()
    with evaluating(model):
        for scored in scored_tokens(model, dataset, length, rows, documents=documents, autocast=autocast):
            add_scored(ledger, dataset, scored)
            if on_tokens is not None:
                on_tokens(len(scored.index_K))
    return ledger


def add_scored(ledger: Ledger, dataset: TokenDataset, scored: ScoredTokens) -> None:
    """Add a batch's tokens to a ledger under their slice, source, document and group.

    Raises:
        GyroError: a log-probability is NaN or infinite; its document is named.
    """
    ledger.add_tokens(
        {
            "slice": (dataset.slice_D[scored.document_K], dataset.slice_names),
            "source": (dataset.source_D[scored.document_K], dataset.source_names),
            "document": (scored.document_K, dataset.document_ids),
            "group": (scored.document_K, dataset.groups),
        },
        -scored.logprob_K,
        weight_N=dataset.weight_N[scored.index_K],
        byte_N=dataset.byte_N[scored.index_K],
        top1_N=scored.rank_K == 0,
        entropy_N=scored.entropy_K,
    )


def scorer(model: nn.Module, tokenizer: Any, *, length: int, rows: int = 8, autocast: bool = False) -> Score:
    """A model as measures receive it: from texts to the log-probabilities of their tokens.

    A text is tokenised as a document is (`data.encode`): BOS first, which is context, and EOS last, which is
    predicted too and stands for no bytes. Its numbers are those of `score_dataset` on the same document.

    Args:
        model: as for `log_probs`.
        tokenizer: the model's.
        length: as for `score_dataset`.
        rows: as for `score_dataset`.
        autocast: as for `score_dataset`.

    Returns:
        A function that takes texts, reads ahead by some hundreds of them, and answers in their order.
    """

    def score(texts: Iterable[str]) -> Iterator[TokenScores]:
        remaining = iter(texts)
        while chunk := list(islice(remaining, _CHUNK_TEXTS)):
            encoded = encode_texts(tokenizer, chunk)
            rows_of_tokens = [TokenRow(str(nth), "", "", *document) for nth, document in enumerate(encoded)]
            dataset = TokenDataset.of(rows_of_tokens)
            with evaluating(model):
                parts = list(scored_tokens(model, dataset, length, rows, autocast=autocast))
            yield from _by_text(dataset, parts)

    return score


_CHUNK_TEXTS = 256


def _by_text(dataset: TokenDataset, parts: Sequence[ScoredTokens]) -> Iterator[TokenScores]:
    """Each text's predicted tokens in the text's order (a text has its EOS, so there is always one)."""
    index_K = np.concatenate([part.index_K for part in parts])
    order = np.argsort(index_K)
    counted_K = index_K[order]
    columns = [
        dataset.id_N[counted_K].astype(np.int64),
        dataset.byte_N[counted_K].astype(np.int64),
        *(
            np.concatenate([getattr(part, name) for part in parts])[order]
            for name in ("logprob_K", "entropy_K", "rank_K")
        ),
    ]
    ends = np.searchsorted(counted_K, dataset.offset_D[1:])
    for start, end in pairwise([0, *ends.tolist()]):
        yield TokenScores(*(column[start:end] for column in columns))


class ScoredTokens(NamedTuple):
    """The counted tokens of one batch, in numpy."""

    index_K: Int64Array
    """Index of the predicted token in the dataset's flat arrays."""
    document_K: Int64Array
    """Index of its document."""
    logprob_K: NDArray[np.float64]
    """Nats."""
    entropy_K: NDArray[np.float64]
    """Nats: of the distribution that predicted it."""
    rank_K: Int64Array
    """How many tokens scored above it."""


def scored_tokens(
    model: nn.Module,
    dataset: TokenDataset,
    length: int,
    rows: int,
    *,
    documents: Sequence[int] | None = None,
    autocast: bool = False,
    check_finite: bool = False,
) -> Iterator[ScoredTokens]:
    """Every counted token of a dataset once, batch by batch; no gradients, the model's mode as it is."""
    device = next(model.parameters()).device
    for batch, index_T in batches_of(dataset, length, rows, documents=documents, device=device):
        with torch.no_grad(), precision(device, autocast):
            answer = log_probs(model, batch, want=("entropy", "rank"), check_finite=check_finite)
        yield _counted(batch, answer, index_T)


class Top(NamedTuple):
    """The likeliest tokens in the place of each counted one."""

    token_KN: Int64Array
    logprob_KN: NDArray[np.float64]
    """Nats, falling."""


def top_tokens(
    model: nn.Module, dataset: TokenDataset, length: int, rows: int, *, n_top: int = 1
) -> Iterator[tuple[ScoredTokens, Top]]:
    """As `scored_tokens`, with the `n_top` likeliest tokens in each place."""
    device = next(model.parameters()).device
    for batch, index_T in batches_of(dataset, length, rows, device=device):
        with torch.no_grad():
            answer = log_probs(model, batch, want=("entropy", "rank"), n_top=n_top)
        scored = _counted(batch, answer, index_T)
        counted_T = batch.weight_T > 0
        if answer.top_TK is None or answer.top_token_TK is None:
            empty = np.zeros((len(scored.index_K), 0))
            yield scored, Top(empty.astype(np.int64), empty)
        else:
            logprob_KN = answer.top_TK[counted_T].double().cpu().numpy()
            yield scored, Top(answer.top_token_TK[counted_T].cpu().numpy(), logprob_KN)


def batches_of(
    dataset: TokenDataset,
    length: int,
    rows: int,
    *,
    documents: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Batch, Int64Array]]:
    """A dataset once, packed: batches, and for each position the dataset's index of the token it predicts."""
    pieces = _of_documents(cut(dataset, length), documents)
    if pieces.n_pieces == 0:
        return
    length = int(pieces.length_P.max())  # shorter documents need no longer rows
    packed_rows = pack(pieces.length_P, length)
    for start in range(0, len(packed_rows), rows):
        part = packed_rows[start : start + rows]
        batch = to_batch(assemble(dataset, pieces, part, length), device)
        yield batch, _target_index(pieces, part, length)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _of_documents(pieces: Pieces, documents: Sequence[int] | None) -> Pieces:
    if documents is None:
        return pieces
    kept_P = np.isin(pieces.document_P, np.asarray(documents, dtype=np.int64))
    return Pieces(*(column[kept_P] for column in pieces))


def _target_index(pieces: Pieces, rows: Sequence[Sequence[int]], length: int) -> Int64Array:
    """For each position of a batch, the dataset's index of the token that it predicts; -1 for padding."""
    index_T = np.full(len(rows) * length, -1, dtype=np.int64)
    for row, row_pieces in enumerate(rows):
        place = row * length
        for piece in row_pieces:
            start, n_tokens = int(pieces.start_P[piece]), int(pieces.length_P[piece])
            index_T[place : place + n_tokens] = np.arange(start + 1, start + 1 + n_tokens)
            place += n_tokens
    return index_T


def _counted(batch: Batch, answer: TokenLogProbs, index_T: Int64Array) -> ScoredTokens:
    counted_T = batch.weight_T > 0
    assert answer.entropy_T is not None and answer.rank_T is not None, "both were asked for"

    def taken(values_T: Tensor) -> NDArray[Any]:
        return values_T[counted_T].cpu().numpy()

    return ScoredTokens(
        index_T[counted_T.cpu().numpy()],
        taken(batch.document_T),
        taken(answer.logprob_T).astype(np.float64),
        taken(answer.entropy_T).astype(np.float64),
        taken(answer.rank_T),
    )


def precision(device: torch.device, autocast: bool) -> AbstractContextManager[Any]:
    """What a forward pass runs under: bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
