"""Who takes part: ways from hidden states, a head's weight and targets to each token's loss.

A contender is a function (h, w, target) -> losses, per token or their mean; its gradients come from autograd.
The floor is no loss at all: the bare matrix products that any of them has to make, in the inputs' dtype.

Peers that are packages of their own are imported when they are first called; `absent` says who cannot run.
Left out: peers that cannot take a weight in the dtype at hand, and anything that returns other than the NLL.

Shape legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._question import LogitRule, Logits, Needs
from gyrocompass.loss.logprob import WANTS, token_logprobs
from gyrocompass.loss.signal import TokenLogProbs

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(h_TD, w_VD, target_T) -> the loss of each token, or their mean."""

_ROWS = 4096
"""Rows of the head that are drawn at a time."""


class Head(NamedTuple):
    """The shape of a head and the dtype of its weight and hidden states."""

    title: str
    n_tokens: int
    width: int
    vocabulary: int
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        """As torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def shape(self) -> str:
        """For people."""
        return f"T {self.n_tokens}, D {self.width}, V {self.vocabulary}"

    @property
    def gradient_bytes(self) -> int:
        """What dh and dw take."""
        return (self.n_tokens + self.vocabulary) * self.width * self.dtype.itemsize

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and targets whose logits have a standard deviation of 3."""
        draw = torch.Generator(device).manual_seed(0)
        h_TD = torch.randn(self.n_tokens, self.width, generator=draw, device=device).to(self.dtype)
        w_VD = torch.empty(self.vocabulary, self.width, dtype=self.dtype, device=device)
        for w_KD in w_VD.split(_ROWS):
            w_KD.copy_(torch.randn(w_KD.shape, generator=draw, device=device).mul_(3 / self.width**0.5))
        target_T = torch.randint(self.vocabulary, (self.n_tokens,), generator=draw, device=device)
        return h_TD.requires_grad_(), w_VD.requires_grad_(), target_T


class Contender(NamedTuple):
    """One of those who take part."""

    title: str
    loss_T: Loss
    holds_logits: bool
    """Whether it holds anything of size [T, V], by its design."""
    package: str | None = None
    """What has to be installed."""
    needs_gpu: bool = False

    def absent(self, device: str) -> str | None:
        """Why it cannot take part, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.loss_T is torch_chunked and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} does not have it"
        return "needs a GPU" if self.needs_gpu and device != "cuda" else None


# --- the floor ---

FLOOR = "floor"
"""The name of the contender that is no loss; its repetition has two times, of 3 and of 4 products."""


def floor_laps(inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], list[Callable[[], object]]]:
    """The bare products, each with an output that is there already: z, dh, dw, and z a second time."""
    h_TD, w_VD = (tensor.detach() for tensor in inputs[:2])
    z_TV = h_TD.new_empty(len(h_TD), len(w_VD))
    dh_TD, dw_VD = torch.empty_like(h_TD), torch.empty_like(w_VD)
    logits = partial(torch.mm, h_TD, w_VD.T, out=z_TV)
    dh = partial(torch.mm, z_TV, w_VD, out=dh_TD)
    dw = partial(torch.mm, z_TV.T, h_TD, out=dw_VD)
    return lambda: [logits, dh, dw, logits]


def floor_seconds(laps: list[float]) -> tuple[float, float]:
    """The times of 3 products and of 4."""
    return sum(laps[:3]), sum(laps)


# --- ours ---


def _mean_nll(answer: TokenLogProbs) -> Tensor:
    return -answer.logprob_T.mean()


def separable(h_TD: Tensor, w_VD: Tensor, target_T: Tensor, *, backend: str = "auto") -> Tensor:
    """The loss is said beforehand: three products where the backend prefers that."""
    answer = token_logprobs(h_TD, w_VD, target_T, want=(), expect=_mean_nll, backend=backend)
    return -answer.logprob_T


def two_pass(h_TD: Tensor, w_VD: Tensor, target_T: Tensor, *, backend: str = "auto") -> Tensor:
    """The loss is anything that autograd knows: four products."""
    return -token_logprobs(h_TD, w_VD, target_T, want=(), backend=backend).logprob_T


def every_statistic(h_TD: Tensor, w_VD: Tensor, target_T: Tensor, *, backend: str = "auto") -> Tensor:
    """Entropy, mean logit, sum of squares and rank beside it."""
    return -token_logprobs(h_TD, w_VD, target_T, want=WANTS, backend=backend).logprob_T


# --- peers ---


def full_logits(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """Logits in the inputs' dtype."""
    return F.cross_entropy(h_TD @ w_VD.T, target_T, reduction="none")


def full_float32(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """A float32 copy of such logits: what transformers does."""
    return F.cross_entropy((h_TD @ w_VD.T).float(), target_T, reduction="none")


def torch_chunked(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """What torch 2.13 brought, with its own choice of chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(h_TD, w_VD, target_T, reduction="none", options=options)


def trl(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """As TRL's trainers call it, without any statistic."""
    width = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    function = import_module("trl.kernels").ChunkedLogProbFunction
    log_probs: Tensor = function.apply(h_TD, w_VD, None, target_T, 1.0, width, None, 1.0, ())[0]
    return -log_probs


def compiled(backend: str) -> Loss:
    """Full logits with a float32 copy, compiled as one graph."""
    return torch.compile(full_float32, backend=backend, fullgraph=True)


def liger(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """The mean alone: it makes its gradients in the forward pass."""
    functional = import_module("liger_kernel.transformers.functional")
    loss: Tensor = functional.liger_fused_linear_cross_entropy(h_TD, w_VD, target_T, accum_dtype=None)
    return loss


def liger_float32(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """With dw summed in float32 instead of the weight's dtype."""
    functional = import_module("liger_kernel.transformers.functional")
    loss: Tensor = functional.liger_fused_linear_cross_entropy(
        h_TD, w_VD, target_T, accum_dtype=torch.float32
    )
    return loss


def cut(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """With its default filter, that leaves small gradients out."""
    losses: Tensor = import_module("cut_cross_entropy").linear_cross_entropy(
        h_TD, w_VD, target_T, reduction="none"
    )
    return losses


def cut_exact(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    """Without that filter."""
    losses: Tensor = import_module("cut_cross_entropy").linear_cross_entropy(
        h_TD, w_VD, target_T, reduction="none", filter_eps=None
    )
    return losses


# --- who takes part where ---


def ours(head: Head, device: str = "cpu") -> dict[str, Contender]:
    """Our routes on the backend that "auto" chooses, and on every other that takes the inputs."""
    found: dict[str, Contender] = {}
    probe_TD = torch.zeros(1, head.width, dtype=head.dtype, device=device)
    logits = Logits(probe_TD, probe_TD, None, None, None, LogitRule())
    names = [name for name, backend in BACKENDS.items() if backend.refusal(logits) is None]
    for name in names:
        routes = {"separable": separable, "two-pass": two_pass}
        if name == names[0]:
            routes["two-pass, every statistic"] = every_statistic
        elif device == "cpu":
            del routes["two-pass"]
        for route, loss_T in routes.items():
            title = f"ours, {name}: {route}"
            found[f"{name}/{route}"] = Contender(title, partial(loss_T, backend=name), holds_logits=False)
    return found


def prefers_three(head: Head, backend: str, device: str = "cpu") -> bool:
    """Whether the separable route of a backend really makes three products at this shape."""
    h_TD = torch.empty(1, dtype=head.dtype, device=device).expand(head.n_tokens, head.width)
    w_VD = torch.empty(1, dtype=head.dtype, device=device).expand(head.vocabulary, head.width)
    needs = Needs(h=True, w=True, bias=False, low_rank=False)
    return BACKENDS[backend].prefers_fused(Logits(h_TD, w_VD, None, None, None, LogitRule()), needs)


def peers(head: Head, device: str = "cpu") -> dict[str, Contender]:
    """Everybody else."""
    name = head.dtype_name.replace("bfloat16", "bf16")
    found = {"full": Contender(f"F.cross_entropy, {name} logits", full_logits, holds_logits=True)}
    if head.dtype != torch.float32:
        title = "F.cross_entropy, float32 copy of them"
        found["full32"] = Contender(title, full_float32, holds_logits=True)
    found["torch"] = Contender("F.linear_cross_entropy, chunked", torch_chunked, holds_logits=False)
    found["trl"] = Contender("TRL chunked log-prob", trl, holds_logits=False, package="trl")
    return found


def gpu_peers(head: Head, device: str) -> dict[str, Contender]:
    """Those that a GPU adds."""
    on_gpu = partial(Contender, holds_logits=False, needs_gpu=True)
    backend = "inductor" if device == "cuda" else "eager"
    return peers(head, device) | {
        "compiled": Contender("F.cross_entropy, torch.compile", compiled(backend), holds_logits=True),
        "liger": on_gpu("liger-kernel fused linear CE", liger, package="liger_kernel"),
        "liger32": on_gpu("liger-kernel, dw in float32", liger_float32, package="liger_kernel"),
        "cut": on_gpu("cut-cross-entropy", cut, package="cut_cross_entropy"),
        "cut-exact": on_gpu("cut-cross-entropy, unfiltered", cut_exact, package="cut_cross_entropy"),
    }
