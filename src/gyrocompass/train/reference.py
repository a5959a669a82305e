"""The reference of a run: what objectives measure distances from, asked while training.

    model of its own         --annotated--> batch with the column `reference_logprob`
    policy, its LoRA off     --annotated--> the same, without a second model in memory

The numbers are those that a stage of the kind `reference` would have put into the data: the same model in
evaluation mode, in the run's precision, on the same pieces, without gradients. The reference reads the data
as it is, also where scheduled sampling lets the policy read something else.

TR-DPO lets the reference follow the policy, every `every_steps` optimizer steps:

    soft    ref <- alpha * policy + (1 - alpha) * ref
    hard    ref <- policy

on weights, in float32 whatever the model's dtype (a soft step is smaller than the distance of neighbouring
bf16 numbers). A policy with LoRA counts as its merged weights: averaging the factors apart is not averaging
their product. The reference's weights are then part of the checkpoint, so that a resumed run goes on from the
same ones. What objectives say of a reference that moves is about the reference of that step.

Left out: following by the policy with its LoRA off, since that has no weights of its own.

Source: Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment", arXiv:2404.09656.

Shape legend: T positions of a batch, N tokens of a dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.data.curriculum import REFERENCE
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.loss.signal import Batch
from gyrocompass.model.columns import FloatArray, score_logprobs
from gyrocompass.model.lora import is_adapted, plain_weights, without_lora
from gyrocompass.model.score import evaluating, log_probs, precision


class ReferenceUpdateConfig(Config):
    """How the reference follows the policy."""

    kind: Literal["soft", "hard"]
    alpha: float | None = Field(default=None, gt=0, le=1)
    """Of a soft update: how much of the policy is mixed in (the paper: 0.5 to 0.6)."""
    every_steps: int = Field(ge=1)
    """Optimizer steps from one update to the next (the paper: hard, 512; soft, 1)."""

    @model_validator(mode="after")
    def _alpha_belongs_to_soft(self) -> ReferenceUpdateConfig:
        if (self.kind == "soft") != (self.alpha is not None):
            raise ValueError("alpha is given with `kind: soft`, and only then")
        return self


class LiveReference:
    """A reference that is asked while training.

    Args:
        model: of its own and frozen from here on; or the policy, whose LoRA is switched off when it is asked.
        update: how it follows the policy; None: it stays.

    Raises:
        BadInput: the policy has no LoRA, or is to be followed by itself.
    """

    def __init__(
        self, model: nn.Module, *, lora_off: bool = False, update: ReferenceUpdateConfig | None = None
    ) -> None:
        if lora_off and not is_adapted(model):
            raise BadInput("a reference without LoRA needs a policy with it", fix="set `lora: {}`")
        if lora_off and update is not None:
            raise BadInput(
                "the policy without its LoRA has no weights of its own that could follow the policy",
                fix="name the model itself: `reference: STAGE`",
            )
        self.model, self.lora_off, self.update = model, lora_off, update
        if not lora_off:
            model.requires_grad_(False)
        self.weights = {} if update is None else _wide_weights(model)

    def annotated(self, batch: Batch, *, autocast: bool = False) -> Batch:
        """The batch with what the reference says of its targets, NaN where nothing is counted.

        What the batch knows already stays: rollouts have asked this reference before. It is not asked where
        nothing is missing.
        """
        counted_T = batch.weight_T > 0
        known_T = batch.columns.get(REFERENCE, torch.full_like(batch.weight_T, torch.nan))
        if not (counted_T & known_T.isnan()).any():
            return batch
        with self._asked(), precision(batch.token_T.device, autocast):
            logprob_T = log_probs(self.model, batch, want=()).logprob_T
        logprob_T = torch.where(known_T.isnan(), logprob_T, known_T.to(logprob_T.dtype))
        logprob_T = logprob_T.masked_fill(~counted_T, torch.nan)
        return replace(batch, columns={**batch.columns, REFERENCE: logprob_T})

    def column(self, length: int, rows: int, dataset: TokenDataset, *, autocast: bool = False) -> FloatArray:
        """What it says of a dataset, as `columns.score_logprobs`."""
        with self._asked():
            return score_logprobs(self.model, length, rows, dataset, autocast=autocast)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        off = without_lora(self.model) if self.lora_off else nullcontext()
        with off, evaluating(self.model), torch.no_grad():
            yield

    # --- following the policy ---

    def follow(self, step: int, policy: nn.Module, masters: Mapping[str, Tensor]) -> None:
        """Take over the policy, or a part of it, if an update is due after this many steps.

        Args:
            step: how many optimizer steps have been taken.
            policy: the model that is trained.
            masters: its trained parameters by name, as the optimizer has them (`MainParameters`).

        Raises:
            BadInput: the policy is of another architecture.
        """
        if self.update is None or step % self.update.every_steps:
            return
        share = self.update.alpha or 1.0
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in plain_weights(policy, masters):
                if name not in self.weights:
                    continue  # a scalar head, which the log-probabilities do not depend on
                wide = self.weights[name]
                if share == 1.0:
                    wide.copy_(value)
                else:
                    wide.lerp_(value.to(wide.dtype), share)
                own[name].copy_(wide)

    def check_follows(self, policy: nn.Module) -> None:
        """Refuse to follow a policy whose weights are not the reference's, one by one.

        Raises:
            BadInput: they are not.
        """
        if self.update is None:
            return
        theirs = {name: value.shape for name, value in plain_weights(policy, {})}
        wrong = [name for name, own in self.weights.items() if theirs.get(name) != own.shape]
        if wrong:
            raise BadInput(
                f"the reference cannot follow this policy: {len(wrong)} of its {len(self.weights)} weights "
                f"are not there or of another shape, such as {wrong[0]}",
                fix="name a reference of the policy's architecture, or leave reference_update out",
            )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the weights of a reference that moves; nothing of one that stays."""
        return self.weights

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, wide in self.weights.items():
                wide.copy_(tensors[name])
                own[name].copy_(wide)

    def fingerprint(self) -> str:
        """A hash of what a resume must find again: where the reference begins."""
        digest = hashlib.sha256(f"{self.lora_off} {self.update}".encode())
        if not self.lora_off:  # else its weights are the policy's frozen ones
            for name, parameter in self.model.named_parameters():
                digest.update(f"{name} {list(parameter.shape)}".encode())
                digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _wide_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the language model itself, in float32 or wider; its own tensors where they are that."""
    named = {name: value.detach() for name, value in plain_weights(model, {})}
    return {n: x if x.dtype == torch.float64 else x.float() for n, x in named.items()}
