"""What a model of an architecture that nobody described does: it is asked, once, with a few tokens.

    head       logits are the head's output as it is, and its input is the base model's last hidden states
    loss       is the mean negative log-likelihood of labels shifted by one
    packing    segments in one row, told apart by their positions, have what each has alone

The head is asked with an output of our making in the place of its own: numbers so large that a factor or a
softcap shows, where those of a model without training would be too small. So agreement is exact, in any
dtype. Packing is compared up to rounding, and with another neighbour.

Answers are kept for as long as the model lives. Left out: what a model does only in training (dropout on its
logits, noise in its routing), and anything after its first tokens.

Shape legend: L tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_N_TOKENS = 6
"""In a segment."""
_LARGEST = 64.0
"""Of the numbers put in the place of logits; every dtype has them."""
_ROUNDINGS, _ROUNDINGS_OF_SAME = 32, 4
"""By how many roundings of their norm hidden states may differ: alone and packed; with another neighbour."""

_answers: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def head_refusal(lm: Any) -> str | None:
    """Why the logits are not h w^T + bias of the base model's last hidden states, or None if they are.

    Args:
        lm: a causal LM of `transformers` itself, without a wrapper around it.
    """
    return _answer(lm, "head", lambda: _ask(lm)[0])


def loss_refusal(lm: Any) -> str | None:
    """Why the loss is not that of shifted labels, or None if it is."""
    return _answer(lm, "loss", lambda: _ask(lm)[1])


def packing_refusal(lm: Any) -> str | None:
    """Why segments in one row are not what they are alone, with the model's attention as it is set."""
    return _answer(lm, f"packing, {lm.config._attn_implementation}", lambda: _ask_packing(lm))


def _answer(lm: nn.Module, question: str, ask: Callable[[], str | None]) -> str | None:
    """An answer given before, or a new one."""
    known = _answers.setdefault(lm, {})
    if question not in known:
        try:
            known[question] = ask()
        except Exception as error:  # whatever somebody else's code may raise
            known[question] = f"asked with a few tokens, it fails: {error}"
    return known[question]


@contextmanager
def _as_evaluated(lm: Any) -> Iterator[torch.device]:
    """The model without gradients, dropout and autocast; its modules' modes come back. Yields its device."""
    training = [module for module in lm.modules() if module.training]
    device = lm.get_input_embeddings().weight.device
    lm.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield device
    finally:
        for module in training:
            module.training = True


def _ask(lm: Any) -> tuple[str | None, str | None]:
    """Run the class's own forward with labels; what speaks against its head, and against its loss."""
    head, seen = lm.get_output_embeddings(), dict[str, Tensor]()

    def look_in(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen["h"] = arguments[0]

    def replace_output(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ramp = torch.linspace(-_LARGEST, _LARGEST, output.numel(), device=output.device)
        order = torch.randperm(output.numel(), generator=torch.Generator().manual_seed(0)).to(output.device)
        seen["logits"] = ramp[order].to(output.dtype).view(output.shape)
        return seen["logits"]

    def look_back(_: nn.Module, arguments: Any, output: Any) -> None:
        seen["last"] = output.last_hidden_state

    with _as_evaluated(lm) as device, ExitStack() as hooks:
        for hook in (
            head.register_forward_pre_hook(look_in),
            head.register_forward_hook(replace_output),
            lm.base_model.register_forward_hook(look_back),
        ):
            hooks.callback(hook.remove)
        token_1L = _tokens(lm, 0, device)
        answer = type(lm).forward(lm, input_ids=token_1L, labels=token_1L, use_cache=False, return_dict=True)
    logits, loss = seen["logits"].float(), answer.loss
    nll = F.cross_entropy(logits[0, :-1], token_1L[0, 1:].to(logits.device))
    against_head = against_loss = None
    if not torch.equal(seen["h"], seen["last"]):
        against_head = "what the head is given is not the base model's last hidden state"
    elif not torch.equal(answer.logits.float(), logits):
        against_head = "its logits are not the head's output as it is: a factor, a softcap or more"
    if not torch.allclose(loss.float(), nll, rtol=1e-6):
        against_loss = "its loss is not the mean negative log-likelihood of labels shifted by one"
    return against_head, against_loss


def _ask_packing(lm: Any) -> str | None:
    """Compare two packed segments with each alone, and the second with another one before it."""
    with _as_evaluated(lm) as device:
        first, second, other = (_tokens(lm, start * _N_TOKENS, device) for start in range(3))
        h_LD, again_LD = _states(lm, [first, second]), _states(lm, [other, second])
        alone_LD = torch.cat([_states(lm, [first]), _states(lm, [second])])
    eps = torch.finfo(alone_LD.dtype).eps
    apart = float((h_LD - alone_LD).double().norm() / alone_LD.double().norm())
    leaked = float((h_LD - again_LD)[_N_TOKENS:].double().norm() / alone_LD[_N_TOKENS:].double().norm())
    if apart <= _ROUNDINGS * eps and leaked <= _ROUNDINGS_OF_SAME * eps:
        return None
    return f"hidden states of two packed segments are {max(apart, leaked):.1e} off what each has alone"


def _tokens(lm: Any, start: int, device: torch.device) -> Tensor:
    """Tokens of a segment, [1, L]; another start gives others, if the vocabulary has them."""
    vocabulary = len(lm.get_input_embeddings().weight)
    return (torch.arange(start, start + _N_TOKENS, device=device) % vocabulary)[None]


def _states(lm: Any, segments: list[Tensor]) -> Tensor:
    """Last hidden states of segments in one row, [L, D], asked for as `head.hidden_states` does."""
    token_1L = torch.cat(segments, dim=1)
    position_1L = torch.arange(token_1L.shape[1], device=token_1L.device)[None] % _N_TOKENS
    answer = lm.base_model(input_ids=token_1L, position_ids=position_1L, use_cache=False)
    h_1LD: Tensor = answer.last_hidden_state
    return h_1LD[0]
