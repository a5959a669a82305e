"""A vocabulary cut over ranks: each holds some rows of the head, and all get the numbers of the whole.

Each rank takes the sums over its own part; they are put together relative to the largest logit of all ranks:

    top = max top_i      exp = sum exp_i e^{d_i}      exp_x = sum e^{d_i} (exp_x_i + d_i exp_i)
    exp_sq = sum exp_sq_i e^{2 d_i}      d_i = top_i - top      (the rest are plain sums)

dh is a sum over ranks; dw, dbias and db belong to the rank that holds their rows. Every rank gives the same
hidden states and targets, and gets the same answers. Sums over ranks are float32 at least: a bf16 dh is a
share rounded by each rank, and their sum rounded once more. In invariant mode they are taken in the order of
the ranks, so that a number's bits do not depend on its place in what is communicated.

Left out: heads cut along the width.

Shape legend: N rows, K tokens of a top list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor, Shard

from gyrocompass.core.errors import BadInput
from gyrocompass.loss._question import Asks, Backend, Gradients, Logits, Needs, Picks, Slopes, SlopesOf, Sums


class Part(NamedTuple):
    """This rank's part of the head; the whole of it without a group."""

    w_VD: Tensor
    group: str
    first_token: int


def part_of_head(w_VD: Tensor) -> Part:
    """What this rank holds of the head, and where it begins."""
    if not isinstance(w_VD, DTensor):
        return Part(w_VD, "", 0)
    mesh = w_VD.device_mesh
    if mesh.ndim != 1 or w_VD.placements != (Shard(0),):
        raise BadInput(
            f"a head as a DTensor has to be sharded along the vocabulary on a mesh of one dimension, not"
            f" {w_VD.placements} on {mesh.ndim}",
            fix="redistribute it to [Shard(0)]",
        )
    sizes = [len(part) for part in torch.arange(w_VD.shape[0]).chunk(mesh.size())]
    if len(sizes) < mesh.size():
        raise BadInput(f"{w_VD.shape[0]} rows of the head leave some of {mesh.size()} ranks without any")
    return Part(w_VD.to_local(), mesh.get_group().group_name, sum(sizes[: mesh.get_local_rank()]))


def local_part(name: str, tensor: Tensor | None, w_VD: Tensor) -> Tensor | None:
    """This rank's part of what has to be cut as the head's weight is."""
    if tensor is None or not (isinstance(tensor, DTensor) or isinstance(w_VD, DTensor)):
        return tensor
    if not isinstance(tensor, DTensor) or not isinstance(w_VD, DTensor):
        raise BadInput(f"of {name} and w_VD one is a DTensor and one is not")
    if (tensor.device_mesh, tensor.placements) != (w_VD.device_mesh, w_VD.placements):
        raise BadInput(f"{name} is placed as {tensor.placements}, w_VD as {w_VD.placements}")
    return tensor.to_local()


class Sharded:
    """A backend over this rank's part of the vocabulary, and what joins the parts."""

    def __init__(self, backend: Backend, group: str, *, in_order: bool = False) -> None:
        self.backend, self.name, self.in_order = backend, backend.name, in_order
        self.group = _resolve_process_group(group)  # type: ignore[arg-type]

    def refusal(self, logits: Logits) -> str | None:
        """As the backend's."""
        return self.backend.refusal(logits)

    def total(self, share: Tensor) -> Tensor:
        """The sum over ranks."""
        if not self.in_order:
            return _summed(share, self.group)
        first, *others = self._gathered(_wide(share))
        return functools.reduce(torch.add, others, first).to(share.dtype)

    def sums(self, logits: Logits, picks: Picks, asks: Asks) -> Sums:
        """This rank's sums, joined with the others'."""
        own = self.backend.sums(logits, picks, asks)
        top_N = own.top_N.clone()
        dist.all_reduce(top_N, dist.ReduceOp.MAX, group=self.group)
        down_N = own.top_N - top_N
        factor_N = down_N.exp()
        exp_x_N = exp_sq_N = None
        if own.exp_x_N is not None:
            exp_x_N = factor_N * own.exp_x_N + torch.where(own.exp_N > 0, down_N * factor_N * own.exp_N, 0.0)
        if own.exp_sq_N is not None:
            exp_sq_N = own.exp_sq_N * factor_N.square()
        top_NK, top_token_NK = self._largest(own, asks)
        drawn_N, key_N = self._best_draw(own, asks)
        return Sums(
            top_N=top_N,
            exp_N=self.total(own.exp_N * factor_N),
            pick_P=self.total(own.pick_P),
            exp_x_N=None if exp_x_N is None else self.total(exp_x_N),
            exp_sq_N=None if exp_sq_N is None else self.total(exp_sq_N),
            z_N=None if own.z_N is None else self.total(own.z_N),
            count_N=None if own.count_N is None else self.total(own.count_N),
            above_N=None if own.above_N is None else self.total(own.above_N),
            top_NK=top_NK,
            top_token_NK=top_token_NK,
            drawn_N=drawn_N,
            drawn_key_N=key_N,
        )

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """The ranks' tensors of one shape, in rank order."""
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return parts

    def sizes(self, own: Tensor) -> list[int]:
        """How long every rank's tensor is, in rank order."""
        given = torch.tensor([len(own)], device=own.device)
        return [int(size) for size in self._gathered(given)]

    def side_by_side(self, own_RK: Tensor) -> Tensor:
        """The ranks' columns of some rows, in rank order."""
        return torch.cat(self._gathered(own_RK), dim=1)

    def _largest(self, own: Sums, asks: Asks) -> tuple[Tensor | None, Tensor | None]:
        """The top list of all ranks' top lists, with ids of the whole vocabulary."""
        if own.top_NK is None or own.top_token_NK is None:
            return None, None
        # A part with fewer tokens than are asked for may answer a shorter list: all are made as long.
        missing = (0, asks.top - own.top_NK.shape[1])
        own_NK = torch.nn.functional.pad(own.top_NK, missing, value=-torch.inf)
        own_token_NK = torch.nn.functional.pad(own.top_token_NK, missing) + asks.first_token
        z_NJ, token_NJ = self.side_by_side(own_NK), self.side_by_side(own_token_NK)
        top_NK, place_NK = z_NJ.topk(asks.top, dim=1)
        return top_NK, token_NJ.gather(1, place_NK)

    def _best_draw(self, own: Sums, asks: Asks) -> tuple[Tensor | None, Tensor | None]:
        """The draw with the largest key, with the id of the whole vocabulary."""
        if own.drawn_key_N is None or own.drawn_N is None:
            return None, None
        key_N, rank_N = torch.stack(self._gathered(own.drawn_key_N)).max(dim=0)
        drawn = torch.stack(self._gathered(own.drawn_N + asks.first_token))
        return drawn.gather(0, rank_N[None])[0], key_N

    def gradients(self, logits: Logits, picks: Picks, slopes: Slopes, needs: Needs) -> Gradients:
        """The gradients of this rank's rows of the head; of hidden states, the sum over ranks."""
        return with_totals(self.backend.gradients(logits, picks, slopes, needs), self.total)

    def fused(
        self, logits: Logits, picks: Picks, asks: Asks, slopes_of: SlopesOf, needs: Needs
    ) -> tuple[Sums, Gradients]:
        """Never asked for: `prefers_fused` says no."""
        raise NotImplementedError

    def prefers_fused(self, logits: Logits, needs: Needs) -> bool:
        """No: every block would wait for all ranks."""
        return False


def _wide(share: Tensor) -> Tensor:
    """A copy to be summed in: float32 at least."""
    wide = torch.promote_types(share.dtype, torch.float32) if share.is_floating_point() else share.dtype
    return share.to(wide, copy=True, memory_format=torch.contiguous_format)


def _summed(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = _wide(share)
    dist.all_reduce(total, group=group)
    return total.to(share.dtype)


def over_ranks(share: Tensor, group: str) -> Tensor:
    """The sum over the ranks of a group; without a group what is given."""
    return _summed(share, _resolve_process_group(group)) if group else share  # type: ignore[arg-type]


def with_totals(own: Gradients, total: Callable[[Tensor], Tensor]) -> Gradients:
    """This rank's gradients; those of hidden states, which all ranks have, as their sum over ranks."""
    return own._replace(
        dh_ND=None if own.dh_ND is None else total(own.dh_ND),
        da_NR=None if own.da_NR is None else total(own.da_NR),
    )


def on_any_rank(flag: bool, group: str, device: torch.device) -> bool:
    """Whether the flag is up on some rank of the group."""
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=_resolve_process_group(group))  # type: ignore[arg-type]
    return bool(raised)
