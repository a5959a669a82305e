"""The primitive as operators of torch: opaque to `torch.compile`, differentiable, twice where it is asked.

    gyrocompass::token_logprobs            inputs -> the fields of TokenLogProbs, and what the pass back needs
    gyrocompass::token_logprobs_backward   inputs, gradients of the fields -> gradients of the inputs
    gyrocompass::token_logprobs_second     both, and a direction -> the derivatives of what backward answers

The third is linear in the direction and differentiable in it alone, as the double-backward trick of
`torch.autograd.functional.hvp` needs it; a third derivative raises an error.

Everything that depends on data happens inside: ignored positions are taken out (they cost nothing), the
range of targets is checked, the backend is chosen. An operator has tensors and plain values as arguments, and
a list of tensors as its answer: what is not given or not wanted travels as an empty tensor.

Shape legend: T tokens, N counted tokens, D hidden width, V vocabulary, R rank of a low-rank addition,
C candidates per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss._backends import backend_for
from gyrocompass.loss._engine import Question, Scale, finish, slopes, target_logits
from gyrocompass.loss._invariant import Invariant, invariant_floor
from gyrocompass.loss._question import Backend, Gradients, LogitRule, Logits, Needs
from gyrocompass.loss._second import second
from gyrocompass.loss._sharded import Sharded
from gyrocompass.loss._support import support_floor
from gyrocompass.loss.signal import TokenLogProbs

_N_FIELDS = TokenLogProbs._fields.index("scalar_T")
"""What the head alone answers; the fields from there on are the model's."""
_N_GIVEN = 7
"""Tensors that the pass back is given: those of `Inputs`, but seeds."""


class Settings(NamedTuple):
    """Everything about a call that is not a tensor; plain values, as operators take them."""

    softcap: float
    """0 for none."""
    logit_scale: float
    temperature: float
    ignore_index: int
    want: str
    """Names of statistics, separated by commas."""
    n_top: int
    top_k: int
    """0 for none."""
    top_p: float
    backend: str
    invariant: bool
    group: str
    """The name of the process group over which the vocabulary is cut; empty for none."""
    first_token: int


class Inputs(NamedTuple):
    """The tensors of a call, at all T positions."""

    h_TD: Tensor
    w_VD: Tensor
    bias_V: Tensor | None
    a_TR: Tensor | None
    b_VR: Tensor | None
    target_T: Tensor
    candidate_TC: Tensor | None
    seed_T: Tensor | None


class Call:
    """One call: its counted rows, its question, and the way back from rows to positions."""

    def __init__(self, inputs: Inputs, settings: Settings) -> None:
        h_TD, w_VD, bias_V, a_TR, b_VR, target_T, candidate_TC, seed_T = inputs
        counted_T = target_T != settings.ignore_index
        self.settings, self.n_tokens = settings, len(target_T)
        self.kept_N = counted_T.nonzero().squeeze(1)
        self.everything = len(self.kept_N) == self.n_tokens
        rule = LogitRule(settings.softcap or None, settings.logit_scale, settings.temperature)
        logits = Logits(self.rows(h_TD), w_VD, bias_V, None if a_TR is None else self.rows(a_TR), b_VR, rule)
        self.backend = _backend(logits, settings)
        vocabulary = int(self.total(torch.tensor(len(w_VD), device=h_TD.device)))
        if bias_V is not None and not self.total(bias_V.isneginf().logical_not().sum()):
            raise BadInput(f"bias_V [{vocabulary}] is -inf throughout: no token is left in the vocabulary")
        _check_range("target", target_T, counted_T, vocabulary)
        if settings.n_top > vocabulary:
            raise BadInput(f"n_top is {settings.n_top}; the vocabulary has {vocabulary} tokens")
        if candidate_TC is not None:
            asked_TC = candidate_TC != settings.ignore_index
            _check_range("candidate", candidate_TC, asked_TC, vocabulary)
            candidate_TC = self.rows(candidate_TC.masked_fill(~asked_TC, -1))
        self.question = Question(
            logits=logits,
            target_N=self.rows(target_T),
            candidate_NC=candidate_TC,
            want=frozenset(settings.want.split(",")) - {""},
            top=settings.n_top,
            seed_N=None if seed_T is None else self.rows(seed_T),
            first_token=settings.first_token,
        )

    def rows(self, given: Tensor) -> Tensor:
        """The counted rows of something that has all T."""
        return given if self.everything else given.index_select(0, self.kept_N)

    def spread(self, found: Tensor | None) -> Tensor:
        """Rows back at their positions, with 0 elsewhere; an empty tensor for None."""
        if found is None:
            return self.question.logits.h_ND.new_empty(0)
        if self.everything:
            return found
        return found.new_zeros(self.n_tokens, *found.shape[1:]).index_copy(0, self.kept_N, found)

    def total(self, share: Tensor) -> Tensor:
        """A sum over the parts of the vocabulary."""
        return self.backend.total(share) if isinstance(self.backend, Sharded) else share

    def restrict(self, floor_N: Tensor | None) -> None:
        """Leave logits below a floor out of the distribution."""
        self.question = self.question._replace(logits=self.question.logits._replace(floor_N=floor_N))

    def find_support(self) -> None:
        """Restrict the distribution to the settings' top-k and top-p support, if they have one."""
        if self.settings.top_k or self.settings.top_p < 1.0:
            find = invariant_floor if self.settings.invariant else support_floor
            ranks = self.backend if isinstance(self.backend, Sharded) else None
            self.restrict(find(self.question.logits, self.settings.top_k, self.settings.top_p, ranks))

    def threshold(self) -> Tensor | None:
        """The targets' logits, where ranks are wanted."""
        return self.total(target_logits(self.question)) if "rank" in self.question.want else None

    def run(self) -> tuple[TokenLogProbs, Scale]:
        """The pass forward."""
        self.find_support()
        threshold_N = self.threshold()
        question = self.question
        sums = self.backend.sums(question.logits, question.picks(), question.asks(threshold_N))
        return finish(question, sums, threshold_N)

    def back(self, scale: Scale, gradient: TokenLogProbs, needs: Needs) -> Gradients:
        """The pass back, for the gradients of some of the fields (N rows each)."""
        picks = self.question.picks(None if gradient.top_TK is None else scale.top_token_NK)
        return self.backend.gradients(
            self.question.logits, picks, slopes(self.question, scale, gradient), needs
        )


def _backend(logits: Logits, settings: Settings) -> Backend:
    """The backend, with what the settings put around it."""
    backend = backend_for(logits, settings.backend)
    if settings.invariant:
        backend = Invariant(backend)
    return Sharded(backend, settings.group, in_order=settings.invariant) if settings.group else backend


def _check_range(kind: str, token: Tensor, counted: Tensor, vocabulary: int) -> None:
    """Raise BadInput that names the first counted token outside the vocabulary, and its position."""
    outside = ((token < 0) | (token >= vocabulary)) & counted
    if outside.any():
        first = outside.nonzero()[0].tolist()
        position = first[0] if len(first) == 1 else tuple(first)
        value = int(token[tuple(first)])
        raise BadInput(
            f"{kind} {value} is outside the vocabulary of {vocabulary} tokens",
            where=f"position {position} of {list(token.shape)} ({int(outside.sum())} such in all)",
            fix="does the tokenizer belong to this model? Positions to skip take the ignore_index",
        )


# --- the operators ---


@torch.library.custom_op("gyrocompass::token_logprobs", mutates_args=())
def _forward(
    h_TD: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    a_TR: Tensor | None,
    b_VR: Tensor | None,
    target_T: Tensor,
    candidate_TC: Tensor | None,
    seed_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    want: str,
    n_top: int,
    top_k: int,
    top_p: float,
    backend: str,
    invariant: bool,
    group: str,
    first_token: int,
) -> list[Tensor]:
    """The fields of TokenLogProbs, then top, exp, count and floor: [T, ...] each, or empty."""
    inputs = Inputs(h_TD, w_VD, bias_V, a_TR, b_VR, target_T, candidate_TC, seed_T)
    settings = Settings(
        softcap, logit_scale, temperature, ignore_index, want, n_top, top_k, top_p, backend, invariant, group,
        first_token,
    )  # fmt: skip
    with torch.autocast(h_TD.device.type, enabled=False):
        call = Call(inputs, settings)
        answer, scale = call.run()
        floor_N = call.question.logits.floor_N
        return [
            call.spread(found)
            for found in (*answer[:_N_FIELDS], scale.top_N, scale.exp_N, scale.count_N, floor_N)
        ]


@_forward.register_fake
def _(h_TD: Tensor, w_VD: Tensor, *rest: Any) -> list[Tensor]:
    _, _, bias_V, a_TR, b_VR, target_T, candidate_TC, seed_T = Inputs(h_TD, w_VD, *rest[:6])
    settings = Settings(*rest[6:])
    n_tokens, want = target_T.shape[0], settings.want.split(",")  # `len` would be one number for good
    dtype = Logits(h_TD, w_VD, bias_V, a_TR, b_VR, LogitRule()).dtype

    def column(wanted: bool, *shape: int, integer: bool = False) -> Tensor:
        if not wanted:
            return h_TD.new_empty(0)
        return h_TD.new_empty((n_tokens, *shape), dtype=torch.int64 if integer else dtype)

    n_top, supported = settings.n_top, bool(settings.top_k) or settings.top_p < 1.0
    return [
        column(True),
        column(True),
        column("entropy" in want),
        column("mean_logit" in want),
        column("sum_sq" in want),
        column("rank" in want, integer=True),
        column(candidate_TC is not None, 0 if candidate_TC is None else candidate_TC.shape[1]),
        column(n_top > 0, n_top),
        column(n_top > 0, n_top, integer=True),
        column(seed_T is not None, integer=True),
        column(True),
        column(True),
        column("mean_logit" in want),
        column(supported),
    ]


@torch.library.custom_op("gyrocompass::token_logprobs_backward", mutates_args=())
def _backward(
    gradients: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    h_TD: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    a_TR: Tensor | None,
    b_VR: Tensor | None,
    target_T: Tensor,
    candidate_TC: Tensor | None,
    softcap: float,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    want: str,
    n_top: int,
    top_k: int,
    top_p: float,
    backend: str,
    invariant: bool,
    group: str,
    first_token: int,
) -> list[Tensor]:
    """The gradients of h, w, bias, a and b, contiguous: empty where not needed."""
    inputs = Inputs(h_TD, w_VD, bias_V, a_TR, b_VR, target_T, candidate_TC, None)
    settings = Settings(
        softcap, logit_scale, temperature, ignore_index, want, n_top, top_k, top_p, backend, invariant, group,
        first_token,
    )  # fmt: skip
    with torch.autocast(h_TD.device.type, enabled=False):
        call = Call(inputs, settings)
        found = call.back(*_restored(call, saved, gradients), Needs(*needs))
        dh_TD, da_TR = call.spread(found.dh_ND), call.spread(found.da_NR).clone()  # cut from one tensor
        parts = (dh_TD, found.dw_VD, found.dbias_V, da_TR, found.db_VR)
        return [h_TD.new_empty(0) if part is None else _apart(part) for part in parts]


@_backward.register_fake
def _backward_fake(
    gradients: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    h_TD: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    a_TR: Tensor | None,
    b_VR: Tensor | None,
    *plain: Any,
) -> list[Tensor]:
    wanted = Needs(*needs)
    given = (
        (h_TD, wanted.h),
        (w_VD, wanted.w),
        (bias_V, wanted.bias),
        (a_TR, wanted.low_rank),
        (b_VR, wanted.low_rank),
    )
    return [
        h_TD.new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
        for tensor, need in given
    ]


class _Saved(NamedTuple):
    """What the operator answers that the pass back reads: [T, ...] each, or empty."""

    entropy_T: Tensor
    sum_sq_T: Tensor
    top_token_TK: Tensor
    top_T: Tensor
    exp_T: Tensor
    count_T: Tensor
    floor_T: Tensor


def _restored(
    call: Call, saved: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Scale, TokenLogProbs]:
    """The scale and the gradients of the counted rows; sets the question's support."""

    def rows(given: Tensor, wanted: bool = True) -> Tensor | None:
        return call.rows(given) if wanted and given.numel() else None

    found = _Saved(*saved)
    call.restrict(rows(found.floor_T) if call.settings.top_k or call.settings.top_p < 1.0 else None)
    want = call.question.want
    scale = Scale(
        top_N=call.rows(found.top_T),
        exp_N=call.rows(found.exp_T),
        entropy_N=rows(found.entropy_T, "entropy" in want),
        sum_sq_N=rows(found.sum_sq_T, "sum_sq" in want),
        count_N=rows(found.count_T, "mean_logit" in want),
        top_token_NK=rows(found.top_token_TK, call.settings.n_top > 0),
    )
    return scale, TokenLogProbs(*(rows(gradient) for gradient in gradients))  # type: ignore[arg-type]


def _apart(part: Tensor) -> Tensor:
    """Contiguous, in memory that no other answer of the operator is in."""
    alone = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    return part if alone else part.clone(memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.plain = inputs[8:]
    fields = TokenLogProbs(*output[:_N_FIELDS])
    saved = _Saved(fields.entropy_T, fields.sum_sq_T, fields.top_token_TK, *output[_N_FIELDS:])  # type: ignore[arg-type]
    ctx.save_for_backward(*inputs[:7], *saved)


def _differentiate(
    ctx: Any, gradients: list[Tensor | None], back: Callable[..., Sequence[Tensor]] = _backward
) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    given, saved = tensors[:7], tensors[7:]
    needs_h, needs_w, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
    like = given[0]
    fields = [like.new_empty(0) if gradient is None else gradient for gradient in gradients[:_N_FIELDS]]
    # The statistics are the inputs' own functions: a second derivative goes through the inputs alone.
    found = back(
        fields,
        [tensor.detach() for tensor in saved],
        [needs_h, needs_w, needs_bias, needs_a or needs_b],
        *given,
        *ctx.plain,
    )
    wanted = (needs_h, needs_w, needs_bias, needs_a, needs_b)
    answers = [part if need else None for part, need in zip(found, wanted, strict=True)]
    return (*answers, *[None] * (3 + len(ctx.plain)))


_forward.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("gyrocompass::token_logprobs_second", mutates_args=())
def _second(
    along: Sequence[Tensor],
    gradients: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    h_TD: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    a_TR: Tensor | None,
    b_VR: Tensor | None,
    target_T: Tensor,
    candidate_TC: Tensor | None,
    softcap: float,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    want: str,
    n_top: int,
    top_k: int,
    top_p: float,
    backend: str,
    invariant: bool,
    group: str,
    first_token: int,
) -> list[Tensor]:
    """With <along, what backward answers>: its gradients of h, w, bias, a and b, empty where not needed, then
    those of the fields' gradients, in their shapes."""
    inputs = Inputs(h_TD, w_VD, bias_V, a_TR, b_VR, target_T, candidate_TC, None)
    settings = Settings(
        softcap, logit_scale, temperature, ignore_index, want, n_top, top_k, top_p, backend, invariant, group,
        first_token,
    )  # fmt: skip
    with torch.autocast(h_TD.device.type, enabled=False):
        call = Call(inputs, settings)
        scale, gradient = _restored(call, saved, gradients)
        u_h, u_w, u_bias, u_a, u_b = (part if part.numel() else None for part in along)
        u_h, u_a = (None if part is None else call.rows(part) for part in (u_h, u_a))
        direction = Gradients(u_h, u_w, u_bias, u_a, u_b)
        found, tangents = second(call.question, scale, gradient, direction, Needs(*needs), call.total)
        dh_TD, da_TR = call.spread(found.dh_ND), call.spread(found.da_NR).clone()  # cut from one tensor
        parts = (dh_TD, found.dw_VD, found.dbias_V, da_TR, found.db_VR)
        return [
            *(h_TD.new_empty(0) if part is None else part.contiguous() for part in parts),
            *(
                torch.zeros_like(given) if tangent is None or not given.numel() else call.spread(tangent)
                for given, tangent in zip(gradients, tangents[:_N_FIELDS], strict=True)
            ),
        ]


@_second.register_fake
def _(
    along: Sequence[Tensor],
    gradients: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    *rest: Any,
) -> list[Tensor]:
    return [*_backward_fake(gradients, saved, needs, *rest), *(torch.empty_like(part) for part in gradients)]


class _NotAgain(torch.autograd.Function):
    """The identity, of which a derivative is refused."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError(NO_THIRD)


NO_THIRD = "token_logprobs has first and second derivatives; only backend='reference' has a third one"


def _without_none(parts: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if part is None else part for part in parts]


class _Again(NamedTuple):
    """The arguments of the pass back, of which only gradients and the first five given are differentiated."""

    gradients: Sequence[Tensor]
    saved: Sequence[Tensor]
    given: Sequence[Any]

    def refusing(self, needs: Sequence[bool], plain: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, such that their own derivatives are refused."""
        gradients, tensors = (
            [None if part is None else _NotAgain.apply(part) for part in parts]  # type: ignore[no-untyped-call]
            for parts in (self.gradients, self.given[:5])
        )
        return gradients, self.saved, needs, *tensors, *self.given[5:], *plain


def _setup_again(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    gradients, saved, _, *given = inputs
    ctx.set_materialize_grads(False)
    ctx.plain = given[_N_GIVEN:]
    ctx.save_for_backward(*gradients, *saved, *given[:_N_GIVEN])


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _setup_again(ctx, inputs[1:], output)


def _again(ctx: Any) -> _Again:
    tensors = ctx.saved_tensors
    return _Again(tensors[:_N_FIELDS], tensors[_N_FIELDS:-_N_GIVEN], tensors[-_N_GIVEN:])


def _wanted(parts: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [part if need else None for part, need in zip(parts, needs, strict=True)]


def _differentiate_again(ctx: Any, along: list[Tensor | None]) -> tuple[Any, ...]:
    of_fields, of_tensors = _second_of(ctx, along, ctx.needs_input_grad[0], ctx.needs_input_grad[3:8])
    n_saved = len(ctx.saved_tensors) - _N_FIELDS - _N_GIVEN
    return (of_fields, [None] * n_saved, None, *of_tensors, *[None] * (_N_GIVEN - 5 + len(ctx.plain)))


def _second_of(
    ctx: Any,
    along: list[Tensor | None],
    of_gradients: Sequence[bool],
    of_given: Sequence[bool],
    second_op: Callable[..., Sequence[Tensor]] = _second,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The derivatives of what backward answers: of the fields' gradients, and of the first five given."""
    again = _again(ctx)
    needs = [*of_given[:3], of_given[3] or of_given[4]]
    found = second_op(_without_none(along, again.given[0]), *again.refusing(needs, ctx.plain))
    return _wanted(found[5:], of_gradients), _wanted(found[:5], of_given)


def _transpose(ctx: Any, back: list[Tensor | None]) -> tuple[Any, ...]:
    """Of the direction: the second derivative is symmetric, and a field's derivative along a direction is
    linear, so that its transpose is the field's gradient."""
    again, of_along = _again(ctx), ctx.needs_input_grad[0]
    needs = [*of_along[:3], of_along[3] or of_along[4]]
    arguments, like = again.refusing(needs, ctx.plain), again.given[0]
    found: list[Tensor | None] = [None] * 5
    if any(part is not None for part in back[:5]):
        found = _wanted(_second(_without_none(back[:5], like), *arguments)[:5], of_along)
    if any(part is not None for part in back[5:]):
        more = _backward(_without_none(back[5:], like), *arguments[1:])
        found = [
            own if given is None else given + own if need else None
            for given, own, need in zip(found, more, of_along, strict=True)
        ]
    nothing = [None] * _N_FIELDS, [None] * len(again.saved), None
    return (found, *nothing, *[None] * (_N_GIVEN + len(ctx.plain)))


_backward.register_autograd(_differentiate_again, setup_context=_setup_again)
_second.register_autograd(_transpose, setup_context=_setup_second)


def token_logprobs_op(
    inputs: Inputs, settings: Settings, forward: Callable[[Inputs, Settings], Sequence[Tensor]] | None = None
) -> TokenLogProbs:
    """Call the operator, or what stands for it: checked shapes in, differentiable fields out."""
    found = _forward(*inputs, *settings) if forward is None else forward(inputs, settings)
    fields = TokenLogProbs(*found[:_N_FIELDS])
    want = settings.want.split(",")
    return fields._replace(
        entropy_T=fields.entropy_T if "entropy" in want else None,
        mean_logit_T=fields.mean_logit_T if "mean_logit" in want else None,
        sum_sq_T=fields.sum_sq_T if "sum_sq" in want else None,
        rank_T=fields.rank_T if "rank" in want else None,
        candidate_TC=None if inputs.candidate_TC is None else fields.candidate_TC,
        top_TK=fields.top_TK if settings.n_top else None,
        top_token_TK=fields.top_token_TK if settings.n_top else None,
        drawn_T=None if inputs.seed_T is None else fields.drawn_T,
    )
