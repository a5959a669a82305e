"""The ranks of a run: who I am, and the three collectives that training needs.

Data parallel in its plainest exact form: every rank reads its own rows of the same window, gradients of the
already normalised loss shares are *summed* once per step, and every decision (stop, rewind, clip) is taken on
gathered numbers, so that all ranks take the same one. There is no wrapper around the model and no mean over
ranks: a mean of means is the bug this design leaves no place for.

Left out: overlap of communication with the backward pass, and sharded parameters (FSDP2).

Shape legend: N values of one rank, M values of all ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

BUCKET_ELEMENTS = 16 * 2**20
PATIENCE = timedelta(days=7)
"""How long ranks wait for each other: the others wait while the first tokenises or scores alone."""


class World(NamedTuple):
    """This process among its peers; `World()` is a run of one process."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def gather(self, values_N: Tensor) -> Tensor:
        """Concatenate a 1-D tensor over ranks, in rank order; lengths may differ."""
        if self.size == 1:
            return values_N
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([values_N.numel()], device=self.device))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=values_N.dtype, device=self.device)
        padded[: values_N.numel()] = values_N.to(self.device)
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        values_M = torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
        return values_M.to(values_N.device)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, on every rank."""
        if self.size == 1:
            return [data]
        lengths = self.gather(torch.tensor([len(data)])).tolist()
        flat = self.gather(torch.tensor(list(data), dtype=torch.uint8))
        return [bytes(part.tolist()) for part in flat.split(lengths)]

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank, as JSON: torch's own way would be a pickle."""
        if self.size == 1:
            return [value]
        return [json.loads(data) for data in self.gather_bytes(json.dumps(value).encode())]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum gradients over ranks, in place, in float32 (float64 stays float64), and leave them in that.

        A parameter that got a gradient on some ranks only counts as zero on the others; one that got none
        anywhere keeps None, so that the optimizer leaves it alone as it does on one process.
        """
        if self.size == 1:
            return
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        present = [p for p, flag in zip(parameters, used.tolist(), strict=True) if flag]
        for bucket in buckets(present, lambda parameter: parameter, BUCKET_ELEMENTS):
            self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> None:
        wide = torch.float64 if bucket[0].dtype == torch.float64 else torch.float32
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.reshape(-1).to(wide) for grad in grads])
        dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def buckets(items: Sequence[T], tensor_of: Callable[[T], Tensor], most: int) -> Iterator[list[T]]:
    """Items in their order, together as long as their tensors have one dtype and at most so many elements."""
    bucket: list[T] = []
    for item in items:
        tensor = tensor_of(item)
        full = sum(tensor_of(one).numel() for one in bucket) + tensor.numel() > most
        if bucket and (full or tensor_of(bucket[0]).dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(item)
    if bucket:
        yield bucket


@contextmanager
def world_from_environment(device: torch.device) -> Iterator[World]:
    """Join the process group that `torchrun` describes; a run of one process where there is none.

    gloo on CPU, NCCL on GPU, where each local rank takes the GPU of its own number.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    owner = not dist.is_initialized()
    if owner:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if owner:
            dist.destroy_process_group()
