"""Objectives against TRL's own losses, called on the same log-probabilities, rewards and labels.

TRL's losses are methods of its trainers: they are called unbound, with a stand-in for the trainer and for the
model, which answers with the log-probabilities of single answers that `direct_answers` reads.

Shape legend: S sequences (chosen, then rejected ones), N positions of the longest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from direct_answers import Answer, Window, assert_gradients, make_window
from torch import Tensor, nn

from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.reduce import normalise

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own: experimental, deprecated

BETA = 0.3


class Spoken(nn.Module):
    """A model that says what it is told."""

    is_gradient_checkpointing = False

    def __init__(self, **outputs: Any) -> None:
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return self.outputs


def padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def speaking(answers: Sequence[Answer], field: str) -> tuple[Spoken, dict[str, Tensor]]:
    """A model that gives each counted token this log-probability, and TRL's inputs: one token of prompt."""
    logprob_SN = padded([getattr(answer, field) for answer in answers])
    log_sum_sq_SN = padded([(answer.p_NV.detach() ** 2).sum(1).log() for answer in answers])
    mask_SN = padded([torch.ones(1 + len(answer.logprob_N)) for answer in answers])
    mask_SN[:, 0] = 0
    zero_SN = torch.zeros_like(logprob_SN)
    model = Spoken(
        log_probs=logprob_SN,
        log_sum_sq_probs=log_sum_sq_SN,
        entropy=zero_SN,
        mean_logits=zero_SN,
        is_top1=zero_SN.bool(),
    )
    inputs = {
        "input_ids": torch.ones_like(mask_SN).long(),
        "attention_mask": torch.ones_like(mask_SN),
        "completion_mask": mask_SN.long(),
    }
    return model, inputs


def trainer(model: nn.Module, **settings: Any) -> SimpleNamespace:
    same: Callable[[Any], Any] = lambda value: value  # noqa: E731
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same
        ),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def sides(window: Window) -> list[Answer]:
    answers = window.answers()
    units = sorted({unit for unit, _ in answers})
    return [answers[unit, side] for side in (1, 0) for unit in units]


def reduced(entries: list[Any], window: Window) -> Tensor:
    composite = parse_objectives(entries)
    terms = composite(window.log_probs(composite), window.batch)
    return normalise(composite, [window.batch]).loss(terms, window.batch).loss


def assert_same(entries: list[Any], window: Window, theirs: Tensor) -> None:
    """The reduced loss and its gradients; to what TRL's float32 constants allow."""
    ours = reduced(entries, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert_gradients(ours, theirs, window, rtol=1e-5)


DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"dpo": {}}, {}),
    "hinge": ({"dpo": {"loss": "hinge"}}, {"loss_types": ["hinge"]}),
    "ipo": ({"dpo": {"loss": "ipo", "length_normalised": True}}, {"loss_types": ["ipo"]}),
    "exo": (
        {"dpo": {"loss": "exo", "label_smoothing": 0.1}},
        {"loss_types": ["exo_pair"], "label_smoothing": 0.1},
    ),
    "robust": (
        {"dpo": {"loss": "robust", "label_smoothing": 0.1}},
        {"loss_types": ["robust"], "label_smoothing": 0.1},
    ),
    "discopop": ({"dpo": {"loss": "discopop"}}, {"loss_types": ["discopop"]}),
    "sigmoid_norm": ({"dpo": {"length_normalised": True}}, {"loss_types": ["sigmoid_norm"]}),
    "ld": ({"dpo": {"ld_alpha": 0.4}}, {"ld_alpha": 0.4}),
    "forward_kl": ({"dpo": {"f_divergence": "forward_kl"}}, {"f_divergence_type": "forward_kl"}),
    "js": ({"dpo": {"f_divergence": "js"}}, {"f_divergence_type": "js_divergence"}),
    "wpo": ({"wpo": {}}, {"use_weighting": True}),
    "nca": ({"nca": {}}, {"loss_types": ["nca_pair"]}),
    "bco": ({"bco": {}}, {"loss_types": ["bco_pair"]}),
    "sppo": ({"sppo": {}}, {"loss_types": ["sppo_hard"]}),
    "apo_zero": ({"apo_zero": {}}, {"loss_types": ["apo_zero"]}),
    "apo_down": ({"apo_down": {}}, {"loss_types": ["apo_down"]}),
    "aot": ({"aot": {"label_smoothing": 0.1}}, {"loss_types": ["aot"], "label_smoothing": 0.1}),
    "aot_unpaired": ({"aot": {"paired": False}}, {"loss_types": ["aot_unpaired"]}),
}


def trl_dpo(window: Window, **settings: Any) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    answers = sides(window)
    model, inputs = speaking(answers, "logprob_N")
    options = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0] * len(settings.get("loss_types", [1])),
        "beta": BETA,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "precompute_ref_logps": False,
        "ref_model": speaking(answers, "reference_N")[0],
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer(model, **options | settings), model, inputs, False)
    return loss


@pytest.mark.parametrize("name", DPO)
def test_dpo_and_kin(name: str) -> None:
    entry, settings = DPO[name]
    ((key, options),) = entry.items()
    window = make_window(5, seed=11, weighted=False)
    assert_same([{key: {**options, "beta": BETA}}], window, trl_dpo(window, **settings))


def test_a_mixture_with_an_sft_term() -> None:
    window = make_window(4, seed=12, weighted=False)
    entries = [{"dpo": {"beta": BETA}}, {"chosen_nll": {"weight": 0.5}}]
    assert_same(entries, window, trl_dpo(window, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5]))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: str) -> None:
    """Both take the same mismatched answers: ours stand in the window, TRL's come from other passes."""
    from trl.trainer.kto_trainer import KTOTrainer

    def labels(unit: int, side: int) -> dict[str, float]:
        return {"desirable": float(unit % 2), "mismatched": float(loss_type == "kto" and unit >= 5)}

    window = make_window(8, seed=13, sides=(1,), labels=labels, weighted=False)
    answers = window.answers()
    ordered = [answers[key] for key in sorted(answers)]
    judged = [a for a in ordered if not a.label["mismatched"]]
    judges = [a for a in ordered if a.label["mismatched"]]
    model, inputs = speaking(judged, "logprob_N")
    reference, _ = speaking(judged, "reference_N")
    fields = {id(model): "logprob_N", id(reference): "reference_N"}
    settings = {
        "loss_type": loss_type,
        "beta": BETA,
        "desirable_weight": 1.2 if loss_type == "kto" else 1.0,
        "undesirable_weight": 0.8 if loss_type == "kto" else 1.0,
        "calculate_KL": loss_type == "kto",
        "precompute_ref_logps": False,
        "ref_model": reference,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "_compute_kl_logps": lambda of, _: (
            torch.stack([getattr(a, fields[id(of)]).sum() for a in judges]) if judges else None
        ),
    }
    inputs["label"] = torch.tensor([a.label["desirable"] == 1 for a in judged])
    theirs = KTOTrainer._compute_loss(trainer(model, **settings), model, inputs, False)
    options: dict[str, Any] = {"beta": BETA}
    if loss_type == "kto":
        options |= {"desirable_weight": 1.2, "undesirable_weight": 0.8, "kl": "mismatched"}
    assert_same([{loss_type: options}], window, theirs)


@pytest.mark.parametrize(
    ("entry", "settings", "mean"),
    [
        ({"cpo": {"label_smoothing": 0.1}}, {"loss_type": "sigmoid", "label_smoothing": 0.1}, False),
        ({"cpo": {"loss": "hinge"}}, {"loss_type": "hinge"}, False),
        ({"simpo": {"gamma": 0.4}}, {"loss_type": "simpo", "simpo_gamma": 0.4}, True),
        (
            {"alphapo": {"gamma": 0.4, "alpha": 0.2}},
            {"loss_type": "simpo", "simpo_gamma": 0.4, "alpha": 0.2},
            True,
        ),
    ],
    ids=["cpo", "hinge", "simpo", "alphapo"],
)
def test_reference_free(entry: dict[str, dict[str, Any]], settings: dict[str, Any], mean: bool) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    window = make_window(5, seed=14, weighted=False)
    scores = [a.logprob_N.mean() if mean else a.logprob_N.sum() for a in sides(window)]
    options = {"alpha": 0.0, "beta": BETA, "label_smoothing": 0.0, **settings}
    losses, _, _ = CPOTrainer.cpo_loss(
        trainer(nn.Identity(), **options), torch.stack(scores[:5]), torch.stack(scores[5:])
    )
    ((name, own),) = entry.items()
    assert_same([{name: {**own, "beta": BETA}}], window, losses.mean())


def test_orpo() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    window = make_window(5, seed=15, weighted=False)
    scores = torch.stack([a.logprob_N.mean() for a in sides(window)])
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(nn.Identity(), beta=0.1), scores[:5], scores[5:])
    torch.testing.assert_close(  # TRL works in float32 here
        reduced([{"orpo": {"weight": 0.1}}], window), -losses.mean().double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "tpo-l"])
def test_tpo(loss_type: str) -> None:
    """Gold answers of one length, for which TRL's mean over all gold tokens is ours."""
    from trl.experimental.tpo.tpo_trainer import TPOTrainer

    window = make_window(3, seed=16, sides=(1, 0, 2), weighted=False, length=4)
    answers, batch = window.answers(), window.batch
    segments = {
        (int(batch.unit_T[t]), int(batch.columns["side"][t])): int(batch.segment_T[t])
        for t in range(len(batch.unit_T) - 2)
    }
    order = [segments[unit, side] for side in (1, 0, 2) for unit in range(3)]
    places = [(batch.segment_T == s) & (batch.weight_T > 0) for s in order]
    logits_SNV = torch.stack([window.h_TD[at_T] @ window.w_VD.T for at_T in places])
    target_SN = torch.stack([batch.target_T[at_T] for at_T in places])
    first_S1 = torch.zeros(len(order), 1, dtype=torch.int64)
    inputs = {
        "input_ids": torch.cat([first_S1, target_SN], dim=1),
        "completion_mask": torch.cat([first_S1, torch.ones_like(target_SN)], dim=1),
        "attention_mask": torch.ones(len(order), 5),
    }
    model = Spoken(logits=torch.cat([logits_SNV, torch.zeros_like(logits_SNV[:, :1])], dim=1))
    settings = {"tpo_alpha": 0.7, "beta": BETA, "label_smoothing": 0.0, "tpo_l_gamma": 0.2}
    theirs = TPOTrainer._compute_loss(trainer(model, loss_type=loss_type, **settings), model, inputs, False)
    options: dict[str, Any] = {"beta": BETA, "alpha": 0.7}
    if loss_type == "tpo-l":
        options |= {"gamma": 0.2, "length_normalised": True}
    assert len(answers) == 9
    assert_same([{"tpo": options}], window, theirs)


@pytest.mark.parametrize("margin", [False, True])
def test_rewards(margin: bool) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    window = make_window(4, seed=17, weighted=False, labels=lambda unit, side: {"margin": 0.2 * unit})
    answers = sides(window)
    model = Spoken(logits=torch.stack([a.scalar_T[-1] for a in answers])[:, None])
    inputs = {"attention_mask": torch.ones(8, 2)}
    if margin:
        inputs["margin"] = torch.tensor([a.label["margin"] for a in answers[:4]])
    arguments = SimpleNamespace(center_rewards_coefficient=0.05)
    theirs = RewardTrainer.compute_loss(trainer(model, args=arguments), model, inputs)
    assert_same([{"reward_pairs": {"margin": margin, "centring": 0.05}}], window, theirs)
