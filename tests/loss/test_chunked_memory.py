"""The tiled backend's memory: no tensor of [N, V], nothing above its inputs, gradients and a few tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from direct_signal import Case, tile_sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N_TOKENS, WIDTH, VOCABULARY, CANDIDATES = 96, 8, 512, 3
TILE_ELEMENTS = 1024


class Largest(TorchDispatchMode):
    """Remembers the largest storage that any operation returned, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if max(elements, tensor.numel()) > self.elements:
                    self.elements, self.operation = max(elements, tensor.numel()), str(func)
        return result


def largest(backend: str, dtype: torch.dtype, frozen_head: bool) -> Largest:
    """Run everything at once: all statistics, candidates, softcap, a padded vocabulary, all gradients."""
    generator = torch.Generator().manual_seed(0)
    bias_V = torch.randn(VOCABULARY, generator=generator).to(dtype)
    bias_V[-20:] = -torch.inf
    case = Case(
        torch.randn(N_TOKENS, WIDTH, generator=generator).to(dtype),
        torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype),
        torch.randint(VOCABULARY - 20, (N_TOKENS,), generator=generator),
        bias_V,
        softcap=5.0,
        temperature=1.5,
        candidate_TC=torch.randint(VOCABULARY, (N_TOKENS, CANDIDATES), generator=generator),
    )
    case.w_VD.requires_grad_(not frozen_head)
    with tile_sizes(32, TILE_ELEMENTS), Largest() as seen:
        answer = case.run(backend)
        fields = (field for field in answer if field is not None and field.is_floating_point())
        torch.stack([torch.where(field.isfinite(), field, 0.0).sum() for field in fields]).sum().backward()
    return seen


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_tile_or_an_input(dtype: torch.dtype, frozen_head: bool) -> None:
    seen = largest("chunked", dtype, frozen_head)
    inputs = max(N_TOKENS * WIDTH, VOCABULARY * WIDTH, N_TOKENS * CANDIDATES)
    assert seen.elements <= max(inputs, TILE_ELEMENTS), seen.operation


def test_the_meter_sees_full_logits_where_they_are() -> None:
    assert largest("reference", torch.float32, False).elements >= N_TOKENS * VOCABULARY
