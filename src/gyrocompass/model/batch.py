"""From the numpy arrays of a packed batch to the tensors that models and objectives read."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gyrocompass.data.pack import Packed
from gyrocompass.loss.signal import Batch


def to_batch(packed: Packed, device: torch.device | str = "cpu") -> Batch:
    """The same batch as tensors on a device, field by field; on the CPU they share the arrays' memory."""

    def tensor(column: NDArray[Any]) -> Tensor:
        return torch.from_numpy(column).to(device)

    return Batch(
        token_T=tensor(packed.token_T),
        target_T=tensor(packed.target_T),
        position_T=tensor(packed.position_T),
        segment_T=tensor(packed.segment_T),
        document_T=tensor(packed.document_T),
        slice_T=tensor(packed.slice_T),
        source_T=tensor(packed.source_T),
        weight_T=tensor(packed.weight_T),
        byte_T=tensor(packed.byte_T),
        unit_T=tensor(packed.unit_T),
        length=packed.length,
        columns={name: tensor(column) for name, column in packed.columns.items()},
    )
