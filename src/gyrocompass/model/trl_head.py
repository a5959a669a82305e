"""TRL's fused head, computed by the primitive.

TRL (1.16) puts a forward of its own on the models it trains: asked with `fused_lm_head=True`, it runs the
decoder and gives hidden states, head and labels to its kernel, `ChunkedLogProbFunction`, which answers per
token what SFT, DPO, KTO, GRPO and RLOO and their metrics are made of. While a model is patched, that name in
`trl.trainer.utils` is ours, for every model that TRL trains: a policy and its reference, patched or not,
are scored alike. On a CPU masked positions are left out too, which TRL does on a GPU only.

Left out: DeepSpeed ZeRO-3, whose head is whole during the forward pass only, and TRL's distillation, which
has a kernel of its own.

Shape legend: N scored positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gyrocompass.loss.logprob import token_logprobs

_WANTS = {"entropy": "entropy", "log_sum_sq_probs": "sum_sq", "mean_logits": "mean_logit"}
"""TRL's names of outputs, and the statistics they are made of."""

_KERNEL = "_ChunkedLogProbFunction"
_ON_GPU = "_use_triton"
_ARGUMENTS = [
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
]


class _Theirs(NamedTuple):
    """What stood in `trl.trainer.utils` before."""

    module: Any
    kernel: Any
    on_gpu: Callable[[torch.device], bool]


_replaced: list[_Theirs] = []
"""At most one."""


def replace_trl_kernel() -> None:
    """Put the primitive where TRL has its kernel, if TRL is installed and is as we know it; else warn."""
    if _replaced or find_spec("trl") is None:
        return
    utils = import_module("trl.trainer.utils")
    kernel, on_gpu = getattr(utils, _KERNEL, None), getattr(utils, _ON_GPU, None)
    if kernel is None or on_gpu is None or [*inspect.signature(kernel.forward).parameters] != _ARGUMENTS:
        warnings.warn("this version of TRL is not known here; its trainers use their own loss", stacklevel=3)
        return
    _replaced.append(_Theirs(utils, kernel, on_gpu))
    setattr(utils, _KERNEL, TrlKernel)
    setattr(utils, _ON_GPU, lambda device: device.type == "cpu" or on_gpu(device))


def restore_trl_kernel() -> None:
    """Give TRL its own kernel back."""
    while _replaced:
        theirs = _replaced.pop()
        setattr(theirs.module, _KERNEL, theirs.kernel)
        setattr(theirs.module, _ON_GPU, theirs.on_gpu)


class TrlKernel:
    """Stands where TRL has an autograd function: it is only ever asked to `apply`."""

    @staticmethod
    def apply(
        hidden_ND: Tensor,
        w_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """TRL's five answers [N], None where they are not asked for; the last three without a gradient.

        Returns:
            Log-probability, entropy, log sum p^2, mean logit, and whether the target is the likeliest token.
        """
        h_ND, w_VD, bias_V = as_autocast(hidden_ND, w_VD, bias_V)
        signal = token_logprobs(
            h_ND,
            w_VD,
            target_N,
            bias_V=bias_V,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            want=[_WANTS[name] for name in outputs if name in _WANTS],
            n_top=int("is_top1" in outputs),
        )
        sum_sq_N, mean_N, first_N1 = signal.sum_sq_T, signal.mean_logit_T, signal.top_token_TK
        return (
            signal.logprob_T,
            signal.entropy_T,
            None if sum_sq_N is None else sum_sq_N.detach().log(),
            None if mean_N is None else mean_N.detach(),
            None if first_N1 is None else first_N1.squeeze(1) == target_N,
        )


def as_autocast(h_ND: Tensor, w_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an autocast around the head would multiply: its dtype instead of float32, if one is active."""
    device = h_ND.device.type
    if not torch.is_autocast_enabled(device):
        return h_ND, w_VD, bias_V
    dtype = torch.get_autocast_dtype(device)
    return h_ND.to(dtype), w_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
