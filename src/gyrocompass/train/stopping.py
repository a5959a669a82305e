"""Early stopping: the run ends when the held-out loss has stopped falling, with the best parameters.

Left out: any other criterion than nats per token of one slice or of the total.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.measure.ledger import Ledger


class EarlyStoppingConfig(Config):
    """Stop after `patience` evaluations in a row without a fall of at least `min_delta_nats`."""

    slice: str | None = None
    patience: int = Field(default=3, ge=1)
    min_delta_nats: float = Field(default=0.0, ge=0)


class EarlyStopping:
    """Remembers the best evaluation; without a config it only remembers."""

    def __init__(self, config: EarlyStoppingConfig | None) -> None:
        self.config = config
        self.best_nats = math.inf
        self.best_step: int | None = None
        self._since_best = 0

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.config is not None and self._since_best >= self.config.patience

    def observe(self, step: int, ledger: Ledger) -> bool:
        """Take an evaluation; True when it is the best so far.

        Raises:
            BadInput: the slice to watch is not in the held-out data.
        """
        if self.config is None and not ledger.total.count:
            return False
        nats = self._nats(ledger)
        margin = self.config.min_delta_nats if self.config else 0.0
        if nats < self.best_nats - margin:
            self.best_nats, self.best_step, self._since_best = nats, step, 0
            return True
        self._since_best += 1
        return False

    def _nats(self, ledger: Ledger) -> float:
        name = self.config.slice if self.config else None
        sums = ledger.total if name is None else ledger.sums("slice", name)
        if not sums.count:
            raise BadInput(
                f"early stopping watches slice {name!r}, of which the held-out data has no token",
                fix=f"choose one of: {', '.join(ledger.names('slice'))}",
            )
        return sums.value / sums.count

    def state(self) -> dict[str, Any]:
        """Everything remembered, as JSON."""
        best_nats = self.best_nats if math.isfinite(self.best_nats) else None
        return {"best_nats": best_nats, "best_step": self.best_step, "since_best": self._since_best}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.best_nats = math.inf if state["best_nats"] is None else state["best_nats"]
        self.best_step, self._since_best = state["best_step"], state["since_best"]
