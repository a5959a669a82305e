"""The gradient in the forward pass: three products instead of four, where the loss is known beforehand.

The caller says which scalar loss it will take of the answer. Rows are worked off in blocks: a block's sums
give its log-probabilities, the loss of these gives the gradient of each output, and the block's logits, still
at hand, become dz and go into dh and dw. The loss sees all T positions each time, with 0 outside the block,
and only the block's own gradients are used: right for every loss that is separable per token.

Whether it was is not taken on trust. When the gradient of the outputs comes in the backward pass, it is
compared with what the blocks were given: equal, or equal up to one factor (a scaled loss), and the gradients
at hand are the answer; anything else and they are thrown away, and the ordinary second pass is made.

Shape legend: T positions, N counted tokens; a block is R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gyrocompass.loss._engine import Scale, finish, slopes
from gyrocompass.loss._ops import Call, Inputs, Settings, token_logprobs_op
from gyrocompass.loss._question import Gradients, Needs, Slopes, Sums
from gyrocompass.loss.signal import Expect, TokenLogProbs


def expected(inputs: Inputs, settings: Settings, expect: Expect) -> TokenLogProbs | None:
    """Answer with the gradient of an expected loss already computed.

    Returns:
        The differentiable answer, or None where two passes are the better way: no gradient is wanted, the
        backend prefers them, or the gradient of a top list is among the outputs.
    """
    needs = tuple(given is not None and given.requires_grad for given in inputs[:5])
    if not torch.is_grad_enabled() or not any(needs) or settings.n_top or settings.invariant:
        return None
    call = Call(inputs, settings)
    if not call.backend.prefers_fused(call.question.logits, _needs(needs)):
        return None
    fields = _Expected.apply(*inputs[:5], inputs, settings, expect)  # type: ignore[no-untyped-call]
    return TokenLogProbs(*fields)


def _needs(flags: tuple[bool, ...]) -> Needs:
    return Needs(flags[0], flags[1], flags[2], flags[3] or flags[4])


class _Expected(torch.autograd.Function):
    """Sums, log-probabilities and gradients at once; the gradients wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        inputs, settings, expect = arguments[5:]
        with torch.autocast(inputs.h_TD.device.type, enabled=False):
            call = Call(inputs, settings)
            call.find_support()
            blocks = _Blocks(call, expect)
            question = call.question
            sums, gradients = call.backend.fused(
                question.logits,
                question.picks(),
                question.asks(blocks.threshold_N),
                blocks.slopes_of,
                _needs(ctx.needs_input_grad),
            )
            answer, scale = finish(question, sums, blocks.threshold_N)
        fields = [None if field is None else call.spread(field) for field in answer]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(f for f in fields if f is not None and not f.is_floating_point()))
        ctx.call, ctx.expected, ctx.gradients = call, blocks.gradient_T, gradients
        ctx.integers = inputs[5:]
        ctx.save_for_backward(*inputs[:5], *scale)
        return tuple(fields)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if torch.is_grad_enabled():  # create_graph: the gradient itself is to be differentiable
            inputs = Inputs(*ctx.saved_tensors[:5], *ctx.integers)
            return (
                *_differentiable(inputs, call.settings, gradients, ctx.needs_input_grad[:5]),
                None,
                None,
                None,
            )
        scale = Scale(*ctx.saved_tensors[5:])
        given = TokenLogProbs(*gradients)  # type: ignore[arg-type]
        given = TokenLogProbs(*(None if field is None else call.rows(field) for field in given))  # type: ignore[arg-type]
        at_hand, ctx.gradients = ctx.gradients, None  # once: whoever takes them may add to them in place
        factor = None if at_hand is None else _common_factor(given, ctx.expected)
        if factor is None:
            found = call.back(scale, given, _needs(ctx.needs_input_grad))
        else:
            found = at_hand if factor == 1.0 else _scale(at_hand, factor)
        spread = (call.spread(found.dh_ND), found.dw_VD, found.dbias_V, call.spread(found.da_NR), found.db_VR)
        wanted = ctx.needs_input_grad[:5]
        return *(part if need else None for part, need in zip(spread, wanted, strict=True)), None, None, None


def _differentiable(
    inputs: Inputs, settings: Settings, gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the first five inputs by the operators, which have a second derivative."""
    answer = token_logprobs_op(inputs, settings)
    pairs = [(f, g) for f, g in zip(answer, gradients, strict=True) if f is not None and g is not None]
    wanted = [given for given, need in zip(inputs[:5], needs, strict=True) if need]
    fields, given_gradients = [field for field, _ in pairs], [gradient for _, gradient in pairs]
    found = iter(
        torch.autograd.grad(fields, wanted, given_gradients, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
    )
    return [next(found) if need else None for need in needs]


class _Blocks:
    """The loss of one block after the other, and the gradients that it gave."""

    def __init__(self, call: Call, expect: Expect) -> None:
        self.call, self.expect = call, expect
        self.threshold_N = call.threshold()
        self.gradient_T: dict[str, Tensor] = {}
        """What each output's gradient was, at the counted rows; a field that is not here had none."""

    def slopes_of(self, rows: slice, sums: Sums, own: slice) -> Slopes:
        """The slopes of a block, from the gradient of the loss at its rows."""
        call, question = self.call, self.call.question
        part = question._replace(
            logits=question.logits._replace(
                floor_N=None if question.logits.floor_N is None else question.logits.floor_N[rows]
            ),
            target_N=question.target_N[rows],
            candidate_NC=None if question.candidate_NC is None else question.candidate_NC[rows],
        )
        threshold_R = None if self.threshold_N is None else self.threshold_N[rows]
        answer, scale = finish(part, sums, threshold_R)
        position_R = (
            torch.arange(call.n_tokens, device=call.kept_N.device)[rows]
            if call.everything
            else call.kept_N[rows]
        )
        leaves = TokenLogProbs(*(self._alone(field, position_R) for field in answer))  # type: ignore[arg-type]
        wanted = {
            name: leaf for name, leaf in leaves._asdict().items() if leaf is not None and leaf.requires_grad
        }
        with torch.enable_grad():
            loss = self.expect(leaves)
            given = list(wanted.values()) if loss.requires_grad else []
            found = torch.autograd.grad(loss, given, allow_unused=True) if given else (None,) * len(wanted)
        gradient = {
            name: part_T.index_select(0, position_R)
            for name, part_T in zip(wanted, found, strict=True)
            if part_T is not None
        }
        self._remember(gradient, rows)
        return slopes(part, scale, TokenLogProbs(**({"logprob_T": None, "lse_T": None} | gradient)))  # type: ignore[arg-type]

    def _alone(self, field: Tensor | None, position_R: Tensor) -> Tensor | None:
        """A block's part of a field among zeros: what the loss is asked about."""
        if field is None:
            return None
        whole = field.new_zeros(self.call.n_tokens, *field.shape[1:]).index_copy_(0, position_R, field)
        return whole.requires_grad_(whole.is_floating_point())

    def _remember(self, gradient: dict[str, Tensor], rows: slice) -> None:
        n_rows = len(self.call.question.target_N)
        for name, part in gradient.items():
            if name not in self.gradient_T:
                self.gradient_T[name] = part.new_zeros(n_rows, *part.shape[1:])
            self.gradient_T[name][rows] = part


def _common_factor(given: TokenLogProbs, expected: dict[str, Tensor]) -> float | None:
    """The number that turns all expected gradients into the given ones, up to rounding; None if none does."""
    pairs = []
    for name, gradient in given._asdict().items():
        if gradient is not None or name in expected:
            guess = expected.get(name)
            pairs.append((
                torch.zeros_like(guess) if gradient is None else gradient,  # type: ignore[arg-type]
                torch.zeros_like(gradient) if guess is None else guess,
            ))  # fmt: skip
    if all(torch.equal(*pair) for pair in pairs):
        return 1.0
    flat_given, flat_expected = (torch.cat([pair[side].reshape(-1) for pair in pairs]) for side in (0, 1))
    largest = flat_expected.abs().argmax()
    factor = flat_given[largest] / flat_expected[largest]
    off = (flat_given - factor * flat_expected).abs()
    tolerance = 8 * torch.finfo(flat_given.dtype).eps
    fits = (off <= tolerance * flat_given.abs()).all() & factor.isfinite()
    return float(factor) if fits else None


def _scale(gradients: Gradients, factor: float) -> Gradients:
    """In place: nobody else holds them."""
    return Gradients(*(None if part is None else part.mul_(factor) for part in gradients))
