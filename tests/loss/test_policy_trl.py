"""The loss of TRL's GRPO trainer, called as it is, beside ours: values and gradients by log-probabilities.

Shape legend: B answers, L tokens of an answer with padding, T = B * L.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from direct_policy import VOCABULARY, randn
from direct_signal import make_batch
from torch import Tensor

from gyrocompass.loss.advantages import group_advantages
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.reduce import Reduction, normalise
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, TokenLogProbs

B, L = 4, 6
LENGTHS = (6, 2, 5, 1)
MASK_BL = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).double()
ADVANTAGE_B = torch.tensor([0.7, -1.2, -0.4, 1.1], dtype=torch.float64)
LOG_PI_BL = -randn(B, L, seed=1).abs()
LOG_MU_BL, LOG_REF_BL = LOG_PI_BL + 0.3 * randn(B, L, seed=2), LOG_PI_BL + 0.5 * randn(B, L, seed=3)
ENTROPY_BL = randn(B, L, seed=4).abs()


class OneProcess:
    """What the loss asks of an accelerator, with one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, values: Tensor) -> Tensor:
        return values

    def pad_across_processes(self, values: Tensor, **_: object) -> Tensor:
        return values

    def reduce(self, values: Tensor, **_: object) -> Tensor:
        return values


def trl_loss(log_pi_BL: Tensor, changed: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    """GRPOTrainer._compute_loss on given log-probabilities; `changed` is of the trainer or its arguments."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    arguments = {
        "delta": None,
        "use_bias_correction_kl": True,
        "steps_per_generation": 1,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_pi_BL, ENTROPY_BL, None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=OneProcess(),
        args=SimpleNamespace(**{name: changed.get(name, value) for name, value in arguments.items()}),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.2,
        epsilon_low=0.2,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        importance_sampling_level="token",
        max_completion_length=L,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=True,
    )
    trainer.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(trainer, *given)
    for name, value in changed.items():
        setattr(trainer, name, value)
    loss: Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


def trl_inputs(**more: Tensor) -> dict[str, Tensor]:
    ids_BL = torch.zeros(B, L, dtype=torch.int64)
    return {
        "prompt_ids": ids_BL,
        "prompt_mask": ids_BL,
        "completion_ids": ids_BL,
        "completion_mask": MASK_BL,
        "advantages": ADVANTAGE_B,
        "num_items_in_batch": MASK_BL.sum(),
        "old_per_token_logps": LOG_MU_BL,
        "ref_per_token_logps": LOG_REF_BL,
    } | more


def our_batch() -> Batch:
    answer_T = torch.arange(B).repeat_interleave(L)
    counted_T = MASK_BL.flatten() > 0
    batch = make_batch(B * L, VOCABULARY, 0, ignored_share=0.0)
    columns = {
        "advantage": ADVANTAGE_B[answer_T],
        "rollout_logprob": LOG_MU_BL.flatten(),
        "reference_logprob": LOG_REF_BL.flatten(),
    }
    return dataclasses.replace(
        batch,
        weight_T=counted_T.float(),
        target_T=batch.target_T.masked_fill(~counted_T, IGNORE_INDEX),
        segment_T=answer_T.masked_fill(~counted_T, -1),
        document_T=answer_T.masked_fill(~counted_T, -1),
        columns=columns,
    )


def our_loss(log_pi_BL: Tensor, entries: list[Any], reduction: Reduction) -> Tensor:
    composite, batch = parse_objectives(entries), our_batch()
    outside_T = batch.weight_T == 0
    logprob_T = log_pi_BL.flatten().masked_fill(outside_T, 0.0)
    answer = TokenLogProbs(logprob_T, logprob_T, entropy_T=ENTROPY_BL.flatten().masked_fill(outside_T, 0.0))
    return normalise(composite, [batch], reduction=reduction).loss(composite(answer, batch), batch).loss


BY_TOKEN, BY_SEQUENCE = Reduction(by="token"), Reduction(by="sequence")
BY_CONSTANT = Reduction(by="constant", constant=B * L)
GSPO = {"importance_sampling_level": "sequence"}
NARROW = {"clip": {"low": 0.05, "high": 0.05}}
OFF_POLICY = {"samples": {"off_policy_limit": 0.05}}
KL = {"reference_kl": {"weighted": "rollout", "weight": 0.3}}
PUBLISHED_KL = {"reference_kl": {"weighted": "no", "weight": 0.3}}

CASES: dict[str, tuple[list[Any], Reduction, dict[str, Any]]] = {
    "grpo": (["clipped_surrogate"], BY_SEQUENCE, {"loss_type": "grpo"}),
    "bnpo": (["clipped_surrogate"], BY_TOKEN, {"loss_type": "bnpo"}),
    "dr_grpo": (["clipped_surrogate"], BY_CONSTANT, {"loss_type": "dr_grpo"}),
    "dapo": (
        [{"clipped_surrogate": {"clip": {"high": 0.28}}}],
        BY_TOKEN,
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "two-sided": (
        [{"clipped_surrogate": {"clip": {"dual": 1.3}}}],
        BY_SEQUENCE,
        {"loss_type": "grpo", "delta": 1.3},
    ),
    "gspo": (
        [{"sequence_surrogate": NARROW}],
        BY_SEQUENCE,
        {"loss_type": "grpo", "epsilon_low": 0.05, "epsilon_high": 0.05, **GSPO},
    ),
    "luspo": (
        [{"sequence_surrogate": {**NARROW, "length_scaled": True}}],
        BY_SEQUENCE,
        {"loss_type": "luspo", "epsilon_low": 0.05, "epsilon_high": 0.05, **GSPO},
    ),
    "cispo": ([{"cispo": {"high": 1.2}}], BY_TOKEN, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": (
        [{"sapo": {"temperature_negative": 1.25}}],  # TRL rounds it to float32
        BY_SEQUENCE,
        {"loss_type": "sapo", "sapo_temperature_neg": 1.25},
    ),
    "vespo": (["vespo"], BY_TOKEN, {"loss_type": "vespo"}),
    "kl": (["clipped_surrogate", KL], BY_TOKEN, {"loss_type": "dapo", "beta": 0.3}),
    "published kl": (
        ["clipped_surrogate", PUBLISHED_KL],
        BY_SEQUENCE,
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "off-policy mask": (
        [{"clipped_surrogate": OFF_POLICY}],
        BY_SEQUENCE,
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    ),
    "undecided tokens": (
        [{"high_entropy_surrogate": {"share": 0.3}}],
        BY_TOKEN,
        {"loss_type": "dapo", "top_entropy_quantile": 0.3},
    ),
}


def assert_same(entries: list[Any], reduction: Reduction, changed: dict[str, Any], **inputs: Tensor) -> None:
    log_pi_BL = LOG_PI_BL.clone().requires_grad_()
    theirs = trl_loss(log_pi_BL, changed, trl_inputs(**inputs))
    ours = our_loss(log_pi_BL, entries, reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss, log_pi_BL)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_trls(name: str) -> None:
    assert_same(*CASES[name])


@pytest.mark.parametrize("beyond", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_correction_for_the_sampler_is_trls(level: str, beyond: str) -> None:
    """At the start of a step the old policy is the learner; TRL's generation computes the weights."""
    gap_BL = (LOG_PI_BL - LOG_MU_BL) * MASK_BL
    w_BL = (gap_BL if level == "token" else gap_BL.sum(1, keepdim=True)).exp()
    w_BL = w_BL.clamp(0.8, 1.2) if beyond == "truncate" else w_BL * ((w_BL >= 0.8) & (w_BL <= 1.2))
    correction = {"level": level, "beyond": beyond, "low": 0.8, "high": 1.2}
    assert_same(
        [{"clipped_surrogate": {"old": "current", "samples": {"correction": correction}}}],
        BY_TOKEN,
        {"loss_type": "dapo", "use_vllm": True},
        old_per_token_logps=LOG_PI_BL,
        importance_sampling_ratio=w_BL,
    )


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_group_advantages_are_trls(scale: str) -> None:
    """Its trainer has no function for them: the formula with its own standard deviation."""
    from trl.trainer.utils import nanstd

    reward_S = randn(12, seed=7)
    grouped = reward_S.view(-1, 4)
    std_S = {
        "none": torch.ones(12),
        "group": nanstd(grouped, dim=1).repeat_interleave(4) + 1e-4,
        "batch": nanstd(reward_S).expand(12) + 1e-4,
    }[scale]
    expected_S = (reward_S - grouped.mean(1).repeat_interleave(4)) / std_S
    found_S = group_advantages(reward_S, torch.arange(12) // 4, scale=scale)  # type: ignore[arg-type]
    torch.testing.assert_close(found_S, expected_S)
