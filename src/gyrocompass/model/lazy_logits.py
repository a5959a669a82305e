"""Logits that are computed when somebody reads them.

A patched model returns its loss without making logits, but its output still has a field for them: callers of
`Trainer` print their shape, take their argmax in `compute_metrics` or add a loss of their own. `LazyLogits`
knows its shape, dtype and device; the first function that needs more gets the tensor itself, with its
gradient. Until then it holds the hidden states only.

Left out: custom autograd functions, which see their arguments before `__torch_function__` does and so would
stop the gradient; they raise, and are to be given `logits.values_now()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_LOOKS = (
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "dtype", "device", "ndim")),
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("requires_grad", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
)
"""Questions that are answered without the values."""

_PROMISES = {Tensor.float: torch.float32, Tensor.clone: None}
"""What is promised in turn, and the dtype it gives: accelerate ends an autocast with `float` and
DistributedDataParallel clones every output, whether anybody reads it or not."""


_PASSED = "these logits were not computed yet: give a custom autograd function logits.values_now()"


class LazyLogits(Tensor):
    """A tensor whose values are `compute()`, called once, when they are first needed.

    >>> logits = LazyLogits.of(lambda: torch.ones(2, 3), (2, 3), torch.float32, torch.device("cpu"))
    >>> logits.shape, logits.computed
    (torch.Size([2, 3]), False)
    >>> logits.sum(), logits.computed
    (tensor(6.), True)
    """

    _compute: Callable[[], Tensor]
    _graded: bool
    _found: Tensor | None

    @staticmethod
    def of(
        compute: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        graded: bool | None = None,
    ) -> LazyLogits:
        """Promise a tensor; it will have a gradient if gradients are enabled now, not when it is read."""
        logits = Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=device)
        logits._compute, logits._found = compute, None
        logits._graded = torch.is_grad_enabled() if graded is None else graded
        if logits._graded:
            with torch._C.DisableTorchFunctionSubclass():
                logits.requires_grad_().register_hook(_refuse)
        return logits

    @property
    def computed(self) -> bool:
        """Whether the values have been needed yet."""
        return self._found is not None

    def values_now(self) -> Tensor:
        """The tensor itself."""
        if self._found is None:
            with torch.set_grad_enabled(self._graded):
                self._found = self._compute()
        return self._found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer or promise what can be; everything else is asked of the values."""
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _PROMISES and not kwargs and not args[0].computed:
            logits, dtype = args[0], _PROMISES[func]
            kind = (logits.shape, dtype or logits.dtype, logits.device, logits._graded)
            return cls.of(lambda: func(logits.values_now()), *kind)
        args, kwargs = tree_map_only(cls, cls.values_now, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Whoever comes here has passed the other door, where the gradient is."""
        raise RuntimeError(_PASSED)


def _refuse(gradient: Tensor | None = None) -> None:
    """Stop a gradient that has come where it would be lost."""
    if gradient is not None:
        raise RuntimeError(_PASSED)
