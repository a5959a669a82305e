"""A reference that is asked while training: the column's own numbers, laws 1 and 4, and TR-DPO."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_run import ARCHITECTURE, VOCABULARY, tiny_data, tiny_model, tiny_reference, without_columns
from torch import Tensor

import processes
from gyrocompass.core.errors import BadInput
from gyrocompass.data.curriculum import REFERENCE
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.model.batch import to_batch
from gyrocompass.model.columns import score_logprobs
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.lora import LoraSettings, apply_lora, merged, plain_weights
from gyrocompass.model.scalar_head import attach_scalar_head
from gyrocompass.train.checkpoint import steps_on_disk
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.loop import train
from gyrocompass.train.metrics import read_metrics
from gyrocompass.train.optim import AdamW, MainParameters
from gyrocompass.train.reference import LiveReference, ReferenceUpdateConfig
from gyrocompass.train.source import PackedSource
from gyrocompass.train.window import WindowPass, window_gradients

LENGTH = 64
SOFT = {"kind": "soft", "alpha": 0.3, "every_steps": 2}
HARD = {"kind": "hard", "every_steps": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(**changes: Any) -> TrainConfig:
    plain = {
        "steps": 5,
        "sequence_length": LENGTH,
        "rows_per_step": 4,
        "rows_per_micro_batch": 2,
        "objective": [{"dpo": {"beta": 0.5}}],
        "optimizer": {"learning_rate": 1e-2, "schedule": {"shape": "constant"}},
        "guard": {"spike_z": None},
        "checkpoint_every_steps": 2,
    }
    return TrainConfig.model_validate(plain | changes)


def pairs(number: int = 12, seed: int = 5) -> TokenDataset:
    """Preferences of unequal length, with the labels that objectives about answers read."""
    random = np.random.default_rng(seed)
    rows = []
    for pair, side in itertools.product(range(number), (1.0, 0.0)):
        n_tokens = int(random.integers(6, 24))
        weights = [0.0] * 3 + [1.0] * (n_tokens - 3)
        ids = random.integers(0, VOCABULARY, n_tokens).tolist()
        names = (f"{pair}.{side}", f"slice-{pair % 2}", "made")
        labels = {"side": side, "desirable": side}
        rows.append(TokenRow(*names, ids, [1] * n_tokens, weights, unit=f"pair-{pair}", labels=labels))
    return TokenDataset.of(rows)


def policy(settings_: TrainConfig, seed: int = 0) -> torch.nn.Module:
    return tiny_model(settings_, dropout=False, seed=seed)


def passed(
    settings_: TrainConfig, data: TokenDataset, **keywords: Any
) -> tuple[WindowPass, dict[str, Tensor]]:
    """The loss and the gradients of the first window."""
    model = policy(settings_).train()
    main = MainParameters(model)
    window = PackedSource(data, settings_.sampler()).next(0)
    assert window is not None
    found = window_gradients(
        model, main, parse_objectives(settings_.objective), window, settings_, **keywords
    )
    return found, {name: p.grad.clone() for name, p in main.trained.items() if p.grad is not None}


# --- the column's own numbers ---


@pytest.mark.parametrize("precision", ["float32", "bf16_autocast", "float64"])
def test_it_says_what_the_column_would(precision: str) -> None:
    settings_ = config(precision=precision)
    data = without_columns(tiny_data())
    reference, autocast = tiny_reference(settings_), precision == "bf16_autocast"
    column_N = score_logprobs(reference.model, LENGTH, 8, data, autocast=autocast)
    window = PackedSource(data.with_column(REFERENCE, column_N), settings_.sampler()).next(0)
    assert window is not None
    bare = window.packed._replace(columns={})
    expected, found = to_batch(window.packed), reference.annotated(to_batch(bare), autocast=autocast)
    ours_T, theirs_T = found.columns[REFERENCE], expected.columns[REFERENCE]
    assert not ours_T.requires_grad
    assert torch.equal(ours_T.isnan(), theirs_T.isnan()) and ours_T.isfinite().sum() > 50
    assert ours_T.dtype == (torch.float64 if precision == "float64" else torch.float32)
    tolerance = 2e-2 if autocast else 1e-6
    torch.testing.assert_close(ours_T.float(), theirs_T, rtol=tolerance, atol=tolerance, equal_nan=True)
    again_N = reference.column(LENGTH, 8, data, autocast=autocast)
    np.testing.assert_array_equal(again_N, column_N)


def test_it_has_no_dropout_and_no_say_in_the_random_state() -> None:
    settings_ = config()
    reference = LiveReference(new_causal_lm(ARCHITECTURE, seed=1).train())
    window = PackedSource(pairs(), settings_.sampler()).next(0)
    assert window is not None
    batch, before = to_batch(window.packed), torch.get_rng_state()
    first, second = (reference.annotated(batch).columns[REFERENCE] for _ in range(2))
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
    assert torch.equal(torch.get_rng_state(), before) and reference.model.training


def test_what_a_batch_knows_already_is_not_asked_again() -> None:
    """As in a window that has rollouts, which have asked before, beside data, which has not."""
    settings_ = config()
    window = PackedSource(pairs(), settings_.sampler()).next(0)
    assert window is not None
    batch, reference = to_batch(window.packed), tiny_reference(settings_)
    asked_T = reference.annotated(batch).columns[REFERENCE]
    counted_T = batch.weight_T > 0
    known_T = torch.where(batch.unit_T % 2 == 0, -7.0, torch.nan)
    mixed = dataclasses.replace(batch, columns={**batch.columns, REFERENCE: known_T})
    found_T = reference.annotated(mixed).columns[REFERENCE]
    own_T = counted_T & (batch.unit_T % 2 == 0)
    assert own_T.any() and (found_T[own_T] == -7.0).all()
    other_T = counted_T & ~own_T
    assert other_T.any() and torch.equal(found_T[other_T], asked_T[other_T])
    assert found_T[~counted_T].isnan().all()
    whole = dataclasses.replace(batch, columns={**batch.columns, REFERENCE: asked_T})
    assert reference.annotated(whole) is whole


READS_A_REFERENCE: list[dict[str, Any]] = [
    *({name: {}} for name in ("nca", "sppo", "apo_zero", "apo_down", "bco", "wpo", "aot")),
    *({"dpo": {"loss": loss}} for loss in ("sigmoid", "hinge", "ipo", "robust", "discopop")),
    {"dpo": {"loss": "exo", "label_smoothing": 0.1}},
    {"dpo": {"f_divergence": "alpha"}},
    {"kto": {"kl": "matched"}},
    {"bco_unpaired": {}},
    {"apo_zero_unpaired": {}},
    {"excess_nll": {}},
    {"reference_kl": {}},
]


@pytest.mark.parametrize("objective", READS_A_REFERENCE, ids=str)
def test_every_objective_reads_it_as_it_reads_the_column(objective: dict[str, Any]) -> None:
    settings_, data = config(objective=[objective]), pairs()
    reference = tiny_reference(settings_)
    column = data.with_column(REFERENCE, score_logprobs(reference.model, LENGTH, 8, data))
    expected, theirs = passed(settings_, column)
    found, ours = passed(settings_, data, reference=reference)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)
    # And it is read: with the policy itself as the reference, another loss comes out.
    itself, _ = passed(settings_, data, reference=LiveReference(policy(settings_)))
    assert itself.loss != pytest.approx(expected.loss, rel=1e-4)


@given(
    rows=st.integers(1, 6),
    case=st.sampled_from(
        [({"dpo": {}}, "token"), ({"aot": {}}, "token"), ({"kto": {}}, "token")]
        + [({"excess_nll": {}}, by) for by in ("token", "sequence", "slice")]
    ),
)
@settings(deadline=None, max_examples=12)
def test_micro_batches_change_nothing(rows: int, case: tuple[dict[str, Any], str]) -> None:
    """Law 1, with the reference asked for each micro-batch."""
    objective, by = case
    plain = {"precision": "float64", "objective": [objective], "rows_per_step": 6, "reduction": {"by": by}}
    settings_, data = config(**plain, rows_per_micro_batch=6), pairs()
    whole, theirs = passed(settings_, data, reference=tiny_reference(settings_))
    settings_ = config(**plain, rows_per_micro_batch=rows)
    split, ours = passed(settings_, data, reference=tiny_reference(settings_))
    assert split.loss == pytest.approx(whole.loss, rel=1e-10)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12)


# --- the policy with its LoRA off ---


def adapted(settings_: TrainConfig, learned: bool = True) -> torch.nn.Module:
    model = apply_lora(policy(settings_), LoraSettings(rank=2, dropout=0.2), seed=3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if learned and "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    return model


def test_the_policy_without_its_lora_is_what_training_began_from() -> None:
    pytest.importorskip("peft")
    settings_, data = config(), pairs()
    model, base = adapted(settings_).train(), policy(settings_)
    reference = LiveReference(model, lora_off=True)
    before = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters(recurse=False)]
    said_N = reference.column(LENGTH, 8, data)
    np.testing.assert_array_equal(said_N, score_logprobs(base, LENGTH, 8, data))
    counted_N = data.weight_N > 0
    assert np.abs(said_N - score_logprobs(model, LENGTH, 8, data))[counted_N].max() > 1e-3
    after = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters(recurse=False)]
    assert before == after


def test_what_was_frozen_in_a_lora_stays_frozen() -> None:
    pytest.importorskip("peft")
    settings_ = config()
    model = adapted(settings_)
    frozen = next(name for name, p in model.named_parameters() if p.requires_grad)
    dict(model.named_parameters())[frozen].requires_grad_(False)
    LiveReference(model, lora_off=True).column(LENGTH, 8, pairs())
    assert not dict(model.named_parameters())[frozen].requires_grad


def test_training_with_lora_off_is_training_with_the_base_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings_, data = config(), pairs()
    models = [adapted(settings_, learned=False) for _ in range(2)]
    train(models[0], data, settings_, tmp_path / "off", reference=LiveReference(models[0], lora_off=True))
    train(models[1], data, settings_, tmp_path / "own", reference=LiveReference(policy(settings_)))
    for (name, one), (_, other) in zip(*(m.named_parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    losses = [row["loss"] for row in read_metrics(tmp_path / "off" / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] != losses[0]


# --- following the policy ---


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", [None, ("lm_head",)])
def test_plain_weights_are_those_of_the_merged_model(name: str, targets: tuple[str, ...] | None) -> None:
    pytest.importorskip("peft")
    architecture = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    if name == "llama":
        architecture = ARCHITECTURE | {"tie_word_embeddings": False}
    elif targets is not None:
        architecture |= {"tie_word_embeddings": False}
    model = apply_lora(
        new_causal_lm(architecture, seed=0), LoraSettings(rank=2, target_modules=targets), seed=1
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.fill_(0.1)
    attach_scalar_head(model)
    found = dict(plain_weights(model, {}))
    expected = {
        name: parameter
        for name, parameter in merged(model).named_parameters()
        if not name.startswith("gyro_scalar_head")
    }
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


def test_an_update_of_a_tied_head_cannot_be_followed() -> None:
    pytest.importorskip("peft")
    lora = LoraSettings(rank=2, target_modules=("lm_head",), merge_on_save=False)
    model = apply_lora(new_causal_lm(ARCHITECTURE, seed=0), lora, seed=1)
    with pytest.raises(BadInput, match="head and embedding are one weight"):
        dict(plain_weights(model, {}))


@given(
    alpha=st.one_of(st.none(), st.floats(0.05, 1.0)),
    every_steps=st.integers(1, 4),
    steps=st.integers(1, 9),
    precision=st.sampled_from(["float32", "bf16", "float64"]),
)
@settings(deadline=None, max_examples=20)
def test_updates_are_those_of_the_formula(
    alpha: float | None, every_steps: int, steps: int, precision: str
) -> None:
    settings_ = config(precision=precision)
    update = ReferenceUpdateConfig(
        kind="hard" if alpha is None else "soft", alpha=alpha, every_steps=every_steps
    )
    model = policy(settings_)
    main = MainParameters(model)
    reference = LiveReference(policy(settings_, seed=1), update=update)
    expected = {n: p.detach().double() for n, p in policy(settings_, seed=1).named_parameters()}
    random = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for name, value in main.items():
            moved = torch.randn(value.shape, generator=random, dtype=value.dtype)
            main.assign(name, value + 1e-3 * moved)
        reference.follow(step, model, main)
        if step % every_steps == 0:
            share = 1.0 if alpha is None else alpha
            for name, master in main.items():
                expected[name] = share * master.double() + (1 - share) * expected[name]
    for name, wide in reference.tensors().items():
        tolerance = 1e-12 if precision == "float64" else 1e-6
        torch.testing.assert_close(wide.double(), expected[name], rtol=tolerance, atol=tolerance)
        own = dict(reference.model.named_parameters())[name]
        assert not own.requires_grad and torch.equal(own, wide.to(own.dtype))


def test_a_reference_that_follows_at_once_leaves_dpo_at_ln_2(tmp_path: Path) -> None:
    """Hard updates after every step: the policy is its own reference when each loss is taken."""
    settings_ = config(reference_update=HARD, rows_per_step=3)
    train(policy(settings_), pairs(), settings_, tmp_path / "hard", reference=tiny_reference(settings_))
    losses = [row["loss"] for row in read_metrics(tmp_path / "hard" / "metrics.jsonl")]
    assert losses[0] != pytest.approx(math.log(2), abs=1e-3)
    assert losses[1:] == pytest.approx([math.log(2)] * 4, abs=1e-5)
    settings_ = config(reference_update=HARD | {"every_steps": 3}, rows_per_step=3)
    train(policy(settings_), pairs(), settings_, tmp_path / "third", reference=tiny_reference(settings_))
    losses = [row["loss"] for row in read_metrics(tmp_path / "third" / "metrics.jsonl")]
    near = [loss == pytest.approx(math.log(2), abs=1e-5) for loss in losses]
    assert near == [False, False, False, True, False]


def test_a_lora_policy_is_followed_as_it_would_be_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings_ = config(reference_update=HARD, steps=3)
    model = adapted(settings_, learned=False)
    reference = LiveReference(policy(settings_), update=settings_.reference_update)
    train(model, pairs(), settings_, tmp_path, reference=reference)
    plain = dict(merged(model).named_parameters())
    moved = 0
    for name, own in reference.model.named_parameters():
        torch.testing.assert_close(own, plain[name].detach(), rtol=1e-6, atol=1e-7)
        moved += not torch.equal(own, dict(policy(settings_).named_parameters())[name])
    assert moved


# --- law 4: resume ---


class Killed(Exception):  # noqa: N818
    """Nothing that the loop would catch."""


def killed_run(folder: Path, settings_: TrainConfig, at_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die in the optimizer's nth step."""
    calls, step = itertools.count(1), AdamW.step

    def dying(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if next(calls) == at_step:
            raise Killed
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(AdamW, "step", dying)
        whole_run(folder, settings_)


def whole_run(folder: Path, settings_: TrainConfig) -> Mapping[str, Tensor]:
    """Parameters of the policy and of the reference at the end."""
    model, reference = policy(settings_), tiny_reference(settings_)
    train(model, pairs(), settings_, folder, reference=reference)
    ends = {"policy": model, "reference": reference.model}
    return {f"{who} {n}": p.detach() for who, one in ends.items() for n, p in one.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("update", [SOFT, HARD | {"every_steps": 3}, None])
@pytest.mark.parametrize("at_step", [2, 4, 6])
def test_a_resumed_run_has_the_same_reference(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    update: dict[str, Any] | None,
    at_step: int,
) -> None:
    settings_ = config(
        precision=precision, reference_update=update, steps=7, checkpoint_every_steps=3, checkpoints_kept=9
    )
    whole = whole_run(tmp_path / "whole", settings_)
    killed_run(tmp_path / "killed", settings_, at_step, monkeypatch)
    resumed = whole_run(tmp_path / "killed", settings_)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name
    rows = [
        [{"step": row["step"], "loss": row["loss"]} for row in read_metrics(tmp_path / one / "metrics.jsonl")]
        for one in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    files = [steps_on_disk(tmp_path / one)[-1] / "reference.safetensors" for one in ("whole", "killed")]
    assert [file.is_file() for file in files] == [update is not None] * 2
    if update is not None:
        saved = [load_file(file) for file in files]
        assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
        assert all(tensor.dtype == torch.float32 for tensor in saved[0].values())


def test_a_rewind_takes_the_reference_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard passes over a window: policy and reference go on as if it had never been met."""
    from gyrocompass.train.guard import Guard

    settings_ = config(
        reference_update=HARD, steps=4, guard={"spike_z": None, "policy": "rewind"}, checkpoint_every_steps=10
    )
    judge, calls = Guard.judge, itertools.count(1)

    def spiking(self: Guard, *arguments: Any) -> Any:
        verdict = judge(self, *arguments)
        if next(calls) != 3:
            return verdict
        return judge(self, *arguments[:1], float("nan"))

    monkeypatch.setattr(Guard, "judge", spiking)
    found = whole_run(tmp_path, settings_)
    (incident,) = read_metrics(tmp_path / "incidents.jsonl")
    assert incident["action"] == "rewind" and incident["step"] == 3
    for name, parameter in found.items():
        who, _, key = name.partition(" ")
        assert who != "reference" or torch.equal(parameter, found[f"policy {key}"]), key
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[1:] == pytest.approx([math.log(2)] * 3, abs=1e-5)


def test_two_ranks_follow_as_one_process_does(tmp_path: Path) -> None:
    settings_ = config(
        precision="float64", reference_update=SOFT, steps=4, objective=["excess_nll", {"reference_kl": {}}]
    )
    model, reference = policy(settings_), tiny_reference(settings_)
    train(model, without_columns(tiny_data()), settings_, tmp_path / "one" / "run", reference=reference)
    (tmp_path / "two").mkdir()
    arguments = [str(tmp_path / "two"), settings_.model_dump_json(), "--no-dropout", "--live-reference"]
    assert processes.run_ranks(2, tiny_run.main, arguments) == [0, 0]
    two = load_file(tmp_path / "two" / "result.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(two[name], parameter.detach(), rtol=1e-10, atol=1e-12)
    saved = load_file(steps_on_disk(tmp_path / "two" / "run")[-1] / "reference.safetensors")
    for name, own in reference.model.named_parameters():
        torch.testing.assert_close(saved[name], own, rtol=1e-10, atol=1e-12)


# --- what is refused ---


def test_a_reference_given_twice_is_refused(tmp_path: Path) -> None:
    settings_, data = config(objective=["nll"]), tiny_data()
    with pytest.raises(BadInput, match="the reference is given twice"):
        train(policy(settings_), data, settings_, tmp_path, reference=tiny_reference(settings_))


def test_updates_and_reference_go_together(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="reference_update is about a live reference"):
        train(policy(config()), pairs(), config(reference_update=SOFT), tmp_path)


def test_another_architecture_is_not_followed(tmp_path: Path) -> None:
    settings_ = config(reference_update=SOFT)
    other = new_causal_lm(ARCHITECTURE | {"num_hidden_layers": 2}, seed=0)
    reference = LiveReference(other, update=settings_.reference_update)
    with pytest.raises(BadInput, match="cannot follow this policy: 9 of its 20 weights"):
        train(policy(settings_), pairs(), settings_, tmp_path, reference=reference)


def test_lora_off_needs_lora_and_follows_nobody() -> None:
    pytest.importorskip("peft")
    with pytest.raises(BadInput, match="needs a policy with it"):
        LiveReference(policy(config()), lora_off=True)
    with pytest.raises(BadInput, match="has no weights of its own"):
        LiveReference(adapted(config()), lora_off=True, update=ReferenceUpdateConfig.model_validate(SOFT))


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "soft", "every_steps": 1}, HARD | {"alpha": 0.5}, SOFT | {"alpha": 0.0}, {"kind": "hard"}],
)
def test_half_an_update_is_a_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ReferenceUpdateConfig.model_validate(wrong)


def test_checkpoints_of_another_reference_are_refused(tmp_path: Path) -> None:
    settings_ = config()
    train(policy(settings_), pairs(), settings_, tmp_path, reference=tiny_reference(settings_))
    other = LiveReference(policy(settings_, seed=2))
    with pytest.raises(BadInput, match="another config, data or model"):
        train(policy(settings_), pairs(), settings_, tmp_path, reference=other)


def test_doremi_reads_a_live_reference(tmp_path: Path) -> None:
    """Domain reweighting needs the excess loss, not the column itself."""
    doremi = {"doremi": {"rate": 1.0}}
    settings_ = config(objective=["nll"], blend=doremi, steps=3)
    data = without_columns(tiny_data())
    reference = tiny_reference(settings_)
    train(policy(settings_), data, settings_, tmp_path / "live", reference=reference)
    column = data.with_column(REFERENCE, score_logprobs(reference.model, LENGTH, 8, data))
    train(policy(settings_), column, settings_, tmp_path / "column")
    weights = [
        [row["slice_weights"] for row in read_metrics(tmp_path / one / "metrics.jsonl")]
        for one in ("live", "column")
    ]
    assert json.dumps(weights[0]) != json.dumps(weights[0][:1] * 3)
    for ours, theirs in zip(*weights, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
