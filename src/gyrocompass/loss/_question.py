"""The engine's centre: what a backend is asked about [N, V] logits that nobody holds, and what it answers.

    Logits, Picks, Asks          --Backend.sums-------> Sums        (one pass over the logits)
    Logits, Picks, Slopes, Needs --Backend.gradients--> Gradients   (the pass back: logits again, then dz)
    Logits, Picks, Asks, slopes  --Backend.fused------> Sums, Gradients    (both at once, block by block)

A backend knows sums of exponentials and one formula for dz; which log-probabilities, statistics and
gradients these stand for is `_engine.py`'s business. Everything is in one arithmetic dtype, `Logits.dtype`.

    z = softcap * tanh((h w^T + a b^T + bias) * logit_scale / softcap) / temperature

A token is allowed in a row unless its bias is -inf or its logit is below the row's floor. What is not allowed
is in no sum, no maximum, no ranking and no gradient.

Shape legend: N counted tokens, D hidden width, V vocabulary, R rank of a low-rank addition to the head,
P picks, K tokens of a top list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class LogitRule(NamedTuple):
    """What is done to h w^T + bias to make logits: scaled, capped (if softcap is given), then divided."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0


class Logits(NamedTuple):
    """What [N, V] of logits is made of; ignored positions are already taken out."""

    h_ND: Tensor
    w_VD: Tensor
    bias_V: Tensor | None
    """-inf: the token is not allowed."""
    a_NR: Tensor | None
    """With `b_VR`, a low-rank addition a b^T to h w^T (LoRA on the head); None for none."""
    b_VR: Tensor | None
    rule: LogitRule
    floor_N: Tensor | None = None
    """Logits below it are not allowed."""

    @property
    def given(self) -> tuple[Tensor, ...]:
        """The tensors that gradients may be wanted of."""
        parts = (self.h_ND, self.w_VD, self.bias_V, self.a_NR, self.b_VR)
        return tuple(part for part in parts if part is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the answer: float64 if any input is, else float32."""
        wide = any(tensor.dtype == torch.float64 for tensor in self.given)
        return torch.float64 if wide else torch.float32


class Picks(NamedTuple):
    """Logits wanted one by one, in the order of their rows. A token below 0 is a pick that is not here
    (another rank's part of the vocabulary): its logit is answered as 0, its gradient goes nowhere."""

    row_P: Tensor
    token_P: Tensor


class Asks(NamedTuple):
    """Which sums are wanted besides top, exp and the picks."""

    entropy: bool = False
    mean_logit: bool = False
    sum_sq: bool = False
    threshold_N: Tensor | None = None
    """Count the logits above it."""
    top: int = 0
    """How many of the largest logits, with their tokens."""
    seed_N: Tensor | None = None
    """int64: draw a token from softmax(z) of each row with this seed (`_noise.py` defines the draw)."""
    first_token: int = 0
    """The id of token 0 of `w_VD`, where this is a part of a larger vocabulary: draws depend on ids."""


class Sums(NamedTuple):
    """What one pass finds, per row, over the allowed tokens; x = z - top."""

    top_N: Tensor
    """The largest logit; the dtype's lowest finite number where nothing is allowed."""
    exp_N: Tensor
    """sum exp(x)."""
    pick_P: Tensor
    """The picks' logits; -inf where the bias is, whatever the floor."""
    exp_x_N: Tensor | None = None
    """sum exp(x) * x, with `entropy`."""
    exp_sq_N: Tensor | None = None
    """sum exp(x)^2, with `sum_sq`."""
    z_N: Tensor | None = None
    """sum z, with `mean_logit`."""
    count_N: Tensor | None = None
    """How many tokens are allowed, with `mean_logit`; in the arithmetic dtype."""
    above_N: Tensor | None = None
    """int64: how many logits are strictly above the threshold."""
    top_NK: Tensor | None = None
    """The largest logits, descending; -inf where fewer are allowed."""
    top_token_NK: Tensor | None = None
    """int64: their tokens; which of equal logits comes first is not said."""
    drawn_N: Tensor | None = None
    """int64: the token drawn."""
    drawn_key_N: Tensor | None = None
    """Its z plus noise: the largest of its row, by which draws of parts of a vocabulary are compared."""


class Slopes(NamedTuple):
    """The gradient of z as one formula, with x = z - top, on allowed tokens:

    dz = e^x (a + b x + c e^x) + d,   plus pick_P at the picks,   all times the slope of the softcap
    """

    top_N: Tensor
    a_N: Tensor
    b_N: Tensor | None
    c_N: Tensor | None
    d_N: Tensor | None
    pick_P: Tensor
    """The factor logit_scale / temperature is in all of them: dz is the gradient of h w^T + bias."""


class Needs(NamedTuple):
    """Which gradients are wanted; of tensors that are not given, none is."""

    h: bool
    w: bool
    bias: bool
    low_rank: bool


class Gradients(NamedTuple):
    """Gradients in the dtypes of their inputs, summed in the arithmetic dtype and rounded once."""

    dh_ND: Tensor | None
    dw_VD: Tensor | None
    dbias_V: Tensor | None
    da_NR: Tensor | None
    db_VR: Tensor | None


SlopesOf = Callable[[slice, Sums, slice], Slopes]
"""(rows of the block, their sums, which picks are theirs) -> the block's slopes, rows and picks counted from
the block's first."""


class Backend(Protocol):
    """A way to compute sums and gradients over logits."""

    name: str

    def refusal(self, logits: Logits) -> str | None:
        """Why this backend cannot take these inputs (device, dtypes, hardware), or None if it can."""

    def sums(self, logits: Logits, picks: Picks, asks: Asks) -> Sums:
        """One pass over the logits."""

    def gradients(self, logits: Logits, picks: Picks, slopes: Slopes, needs: Needs) -> Gradients:
        """The pass back: each logit once more, turned into its gradient."""

    def fused(
        self, logits: Logits, picks: Picks, asks: Asks, slopes_of: SlopesOf, needs: Needs
    ) -> tuple[Sums, Gradients]:
        """Both at once: a block of rows' logits are kept until the block's slopes are known, so that the
        products that make logits are done once. Memory is bounded by the block, whatever N."""

    def prefers_fused(self, logits: Logits, needs: Needs) -> bool:
        """Whether `fused` is expected to take less time than `sums` and `gradients` do."""
