"""The loop: laws 1, 2 and 4, the guard at work, interrupts, bf16, early stopping."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_run import ARCHITECTURE, VOCABULARY, tiny_data, tiny_model

import processes
from gyrocompass.core.errors import BadInput, Interrupted, TrainingStopped
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.measure.ledger import Ledger
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.score import score_dataset
from gyrocompass.train import checkpoint
from gyrocompass.train.checkpoint import steps_on_disk
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.loop import Outcome, train
from gyrocompass.train.metrics import read_metrics
from gyrocompass.train.optim import MainParameters


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(**changes: Any) -> TrainConfig:
    plain = {
        "steps": 3,
        "sequence_length": 32,
        "rows_per_step": 6,
        "rows_per_micro_batch": 6,
        "precision": "float64",
        "optimizer": {"learning_rate": 1e-2, "clip_norm": 0.5},
        "objective": ["nll", {"z_loss": {"coefficient": 1e-2}}, {"focal": {"weight": 0.3, "gamma": 1.5}}],
    }
    return TrainConfig.model_validate(plain | changes)


def trained(folder: Path, settings: TrainConfig, **keywords: Any) -> tuple[torch.nn.Module, Outcome]:
    model = tiny_model(settings, dropout=False)
    return model, train(model, tiny_data(), settings, folder, **keywords)


def assert_parameters_agree(ours: torch.nn.Module, theirs: torch.nn.Module, rtol: float, atol: float) -> None:
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# --- law 1: partition ---


@given(rows=st.integers(1, 6), by=st.sampled_from(["token", "sequence", "slice"]))
@settings(deadline=None, max_examples=8)
def test_micro_batches_change_nothing(rows: int, by: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    reduction = {"by": by}
    folder = tmp_path_factory.mktemp("partition")
    whole, outcome = trained(folder / "whole", config(reduction=reduction))
    split, other = trained(folder / "split", config(reduction=reduction, rows_per_micro_batch=rows))
    assert_parameters_agree(split, whole, rtol=1e-10, atol=1e-12)
    assert other.ledger.total.count == outcome.ledger.total.count
    assert other.ledger.total.value == pytest.approx(outcome.ledger.total.value, rel=1e-12)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    settings_ = config(steps=4, rows_per_step=5, rows_per_micro_batch=2, evaluate_every_steps=2)
    one, outcome = trained(tmp_path / "one", settings_)
    (tmp_path / "two").mkdir()
    arguments = [str(tmp_path / "two"), settings_.model_dump_json(), "--no-dropout"]
    assert processes.run_ranks(2, tiny_run.main, arguments) == [0, 0]
    two = load_file(tmp_path / "two" / "result.safetensors")
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two[name], parameter.detach(), rtol=1e-10, atol=1e-12)
    ledger = Ledger.load(tmp_path / "two" / "ledger.parquet")
    assert ledger.total.count == outcome.ledger.total.count
    assert ledger.total.value == pytest.approx(outcome.ledger.total.value, rel=1e-12)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "plain", config())
    saving, _ = trained(tmp_path / "saving", config(activation_checkpointing=True))
    assert_parameters_agree(saving, plain, rtol=1e-10, atol=1e-12)


def test_bf16_weights_follow_float32_within_the_stated_bound(tmp_path: Path) -> None:
    """The masters are float32: what differs is what the forward pass rounds, at most 1% of the loss."""
    wide, _ = trained(tmp_path / "wide", config(precision="float32", steps=20, rows_per_step=4))
    narrow, outcome = trained(tmp_path / "narrow", config(precision="bf16", steps=20, rows_per_step=4))
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    data = tiny_data()
    start = score_dataset(tiny_model(config(), dropout=False), data, length=32).total
    after = [score_dataset(model.float(), data, length=32).total for model in (wide, narrow)]
    assert after[0].value < 0.8 * start.value
    assert after[1].value == pytest.approx(after[0].value, rel=0.01)
    assert outcome.steps == 20


# --- law 2: accounting ---


@pytest.mark.parametrize("rows_per_step", [3, 7])
def test_an_epoch_counts_every_target_once(tmp_path: Path, rows_per_step: int) -> None:
    data = tiny_data()
    _, outcome = trained(tmp_path, config(steps=None, epochs=2, rows_per_step=rows_per_step))
    assert outcome.ledger.total.count == 2 * data.n_targets
    for dimension in ("slice", "source"):
        rows = outcome.ledger.items(dimension)  # type: ignore[arg-type]
        assert sum(sums.count for _, sums in rows) == 2 * data.n_targets
    assert outcome.ledger.sums("objective", "nll").count == 2 * data.n_targets
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, outcome.steps + 1))
    assert sum(row["tokens"] for row in rows) == 2 * data.n_targets


def test_the_logged_loss_is_the_objective_of_the_whole_window(tmp_path: Path) -> None:
    """One step over everything: the loss is the weighted mean that scoring gives, and z-loss is beside it."""
    settings_ = config(steps=None, epochs=1, rows_per_step=1000, rows_per_micro_batch=3, objective=["nll"])
    model = tiny_model(settings_, dropout=False)
    data = tiny_data()
    before = score_dataset(model, data, length=32)
    train(model, data, settings_, tmp_path)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["tokens"] == before.total.count == data.n_targets
    for name, sums in before.items("slice"):
        assert row["nll_nats"][name] == pytest.approx(sums.value / sums.count, rel=1e-9)
    assert row["loss"] == pytest.approx(row["objective"]["nll"], rel=1e-12)


# --- law 4: resume ---


def run_program(folder: Path, settings_: TrainConfig, *options: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return processes.run(tiny_run.main, [str(folder), settings_.model_dump_json(), *options])


def run_under_torchrun(ranks: int, folder: Path, settings_: TrainConfig, *options: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, tiny_run.__file__, str(folder), settings_.model_dump_json(), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, env=environment, capture_output=True).returncode


@pytest.mark.slow
def test_two_killed_ranks_resume_bit_identical(tmp_path: Path) -> None:
    settings_ = config(**RESUME)
    assert run_under_torchrun(2, tmp_path / "whole", settings_) == 0
    assert run_under_torchrun(2, tmp_path / "killed", settings_, "--kill-at-step", "5") != 0
    assert run_under_torchrun(2, tmp_path / "killed", settings_) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


RESUME = {"precision": "float32", "steps": 9, "checkpoint_every_steps": 2, "evaluate_every_steps": 3}


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("result.safetensors", "optimizer.safetensors", "rng.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key} differs"
    assert Ledger.load(ours / "ledger.parquet") == Ledger.load(theirs / "ledger.parquet")
    assert json.loads((ours / "state.json").read_text()) == json.loads((theirs / "state.json").read_text())
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        a_rows, b_rows = read_metrics(ours / "run" / name), read_metrics(theirs / "run" / name)
        for row in (*a_rows, *b_rows):
            row.pop("time_s")
            row.pop("tokens_per_second", None)
        assert a_rows == b_rows


# Each place lies well inside what is left of the 9 steps, so that the first two kills are certain.
KILLS = st.one_of(
    st.tuples(st.just("--kill-at-step"), st.integers(1, 4)),
    st.tuples(st.just("--kill-at-sync"), st.integers(1, 10)),
)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that was not killed, in each precision."""

    @functools.cache
    def whole(precision: str) -> Path:
        folder = tmp_path_factory.mktemp(precision)
        assert run_program(folder, config(**RESUME | {"precision": precision})) == 0
        return folder

    return whole


def check_kills(kills: list[tuple[str, int]], precision: str, whole: Path) -> None:
    """SIGKILL before a step or in the middle of writing a checkpoint, again and again; then to the end."""
    settings_ = config(**RESUME | {"precision": precision})
    with tempfile.TemporaryDirectory() as scratch:
        killed = Path(scratch)
        codes = [run_program(killed, settings_, option, str(place)) for option, place in kills]
        assert codes[:2] == [-signal.SIGKILL] * len(kills[:2]) and set(codes) <= {-signal.SIGKILL, 0}
        assert run_program(killed, settings_) == 0
        assert_same_run(killed, whole)


@given(kills=st.lists(KILLS, min_size=1, max_size=3))
@settings(deadline=None, max_examples=4)
def test_killed_runs_resume_bit_identical(
    kills: list[tuple[str, int]], whole_runs: Callable[[str], Path]
) -> None:
    check_kills(kills, "float32", whole_runs("float32"))


@pytest.mark.slow
@given(
    kills=st.lists(KILLS, min_size=1, max_size=5),
    precision=st.sampled_from(["float32", "bf16", "bf16_autocast"]),
)
@settings(deadline=None, max_examples=30)
def test_many_kills_resume_bit_identical(
    kills: list[tuple[str, int]], precision: str, whole_runs: Callable[[str], Path]
) -> None:
    check_kills(kills, precision, whole_runs(precision))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", config(steps=6, checkpoint_every_steps=2))
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "run", config(steps=6, checkpoint_every_steps=2), after_steps=4)
    newest = steps_on_disk(tmp_path / "run")[-1]
    damaged = newest / "parameters.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    notes = Notes()
    resumed, outcome = trained(tmp_path / "run", config(steps=6, checkpoint_every_steps=2), progress=notes)
    assert any(str(damaged.name) in note for note in notes.said)
    assert outcome.steps == 6
    assert_parameters_agree(resumed, whole, rtol=0, atol=0)


def test_a_kill_while_the_best_parameters_are_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation is the best one, and the kill comes before its parameters are on disk."""
    settings_ = config(
        steps=6, checkpoint_every_steps=3, evaluate_every_steps=4, early_stopping={"patience": 5}
    )

    def run(folder: Path) -> tuple[torch.nn.Module, Outcome]:
        model = tiny_model(settings_, dropout=False)
        score = partial(score_dataset, model, tiny_data(), length=32)
        return model, train(model, tiny_data(), settings_, folder, evaluate=score)

    whole, outcome = run(tmp_path / "whole")
    assert outcome.best_step == 6
    written = checkpoint.save_parameters
    calls = []

    def killed_at_the_last_best(main: MainParameters, folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 5:  # after steps 0, 3, the best of step 4, and step 6
            raise SystemExit("killed")
        written(main, folder)

    monkeypatch.setattr(checkpoint, "save_parameters", killed_at_the_last_best)
    with pytest.raises(SystemExit):
        run(tmp_path / "killed")
    monkeypatch.undo()
    resumed, again = run(tmp_path / "killed")
    assert again.best_step == 6
    assert_parameters_agree(resumed, whole, rtol=0, atol=0)
    steps = [row["step"] for row in read_metrics(tmp_path / "killed" / "evaluations.jsonl")]
    assert steps == [4, 6]


def test_checkpoints_of_other_data_or_frozen_weights_are_refused(tmp_path: Path) -> None:
    settings_ = config()
    data = tiny_data()
    train(tiny_model(settings_, dropout=False), data, settings_, tmp_path)
    shifted = dataclasses.replace(data, id_N=(data.id_N + 7) % VOCABULARY)
    with pytest.raises(BadInput, match="another config, data or model"):
        train(tiny_model(settings_, dropout=False), shifted, settings_, tmp_path)


def test_checkpoints_of_another_config_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, config())
    with pytest.raises(BadInput, match="another config"):
        trained(tmp_path, config(optimizer={"learning_rate": 1e-3}))


def test_a_bounded_number_of_checkpoints_stays(tmp_path: Path) -> None:
    trained(tmp_path, config(steps=7, checkpoint_every_steps=1, checkpoints_kept=3))
    assert [path.name for path in steps_on_disk(tmp_path)] == [f"step-{step:08d}" for step in (5, 6, 7)]


class Notes:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def task(self, *_: Any, **__: Any) -> Notes:
        return self

    def advance(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        pass


class InterruptAfter(Notes):
    """Presses Ctrl-C when so many steps are done."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def advance(self, number: float = 0, **numbers: Any) -> None:
        self.left -= bool(numbers)
        if self.left == 0 and numbers:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted_run(folder: Path, settings_: TrainConfig, after_steps: int) -> None:
    trained(folder, settings_, progress=InterruptAfter(after_steps))


def test_ctrl_c_saves_and_the_same_call_goes_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole, _ = trained(tmp_path / "whole", config(steps=6))
    with pytest.raises(Interrupted, match="step 2 of 6"):
        interrupted_run(tmp_path / "run", config(steps=6), after_steps=2)
    resumed, outcome = trained(tmp_path / "run", config(steps=6))
    assert outcome.steps == 6
    assert_parameters_agree(resumed, whole, rtol=0, atol=0)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_off_the_main_thread(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(trained(tmp_path, config())[1]))
    thread.start()
    thread.join()
    assert outcomes[0].steps == 3


# --- the guard at work ---


def poisoned(settings_: TrainConfig, window: int) -> TokenDataset:
    """Documents that all count upwards; one of those that the given window reads is noise instead."""
    clean = counting_documents(poison=None)
    sampler = Sampler(clean, SamplerConfig(length=32, rows_per_step=settings_.rows_per_step, epochs=None))
    packed = next(itertools.islice(sampler, window - 1, None))
    return counting_documents(poison=int(packed.document_T[0]))


def counting_documents(poison: int | None) -> TokenDataset:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(300):
        ids, name = (np.arange(33) + number) % VOCABULARY, f"document-{number}"
        if number == poison:
            ids, name = rng.integers(0, VOCABULARY, 33), "poison"
        rows.append(TokenRow(name, "counting", "made", ids.tolist(), [1] * 33, [1.0] * 33))
    return TokenDataset.of(rows)


GUARDED = {
    "steps": 70,
    "rows_per_step": 4,
    "rows_per_micro_batch": 2,
    "checkpoint_every_steps": 10,
    "objective": ["nll"],
    "optimizer": {"learning_rate": 3e-2, "weight_decay": 0.0},
}


def test_a_poisonous_document_is_named_and_its_window_passed_over(tmp_path: Path) -> None:
    settings_ = config(**GUARDED, guard={"policy": "rewind", "spike_z": 8.0})
    data = poisoned(settings_, window=45)
    model = tiny_model(settings_, dropout=False)
    notes = Notes()
    outcome = train(model, data, settings_, tmp_path, progress=notes)  # type: ignore[arg-type]
    incidents = read_metrics(tmp_path / "incidents.jsonl")
    assert [incident["action"] for incident in incidents] == ["rewind"]
    assert incidents[0]["documents"][0]["document_id"] == "poison"
    assert incidents[0]["documents"][0]["nats"] > 2 * incidents[0]["documents"][1]["nats"]
    assert outcome.skipped_windows == (45,)
    assert outcome.steps == 70
    assert "poison" in "".join(notes.said)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 71))


class KilledAfterRewind(Notes):
    """Ends the process, as far as Python can, at the first step after a rewind."""

    def advance(self, number: float = 0, **numbers: Any) -> None:
        if self.said and number > 0:
            raise SystemExit("killed")


def test_a_kill_after_a_rewind_counts_the_incident_once(tmp_path: Path) -> None:
    settings_ = config(**GUARDED | {"steps": 48}, guard={"policy": "rewind", "spike_z": 8.0})
    data = poisoned(settings_, window=45)
    with pytest.raises(SystemExit):
        progress: Any = KilledAfterRewind()
        train(tiny_model(settings_, dropout=False), data, settings_, tmp_path, progress=progress)
    outcome = train(tiny_model(settings_, dropout=False), data, settings_, tmp_path)
    incidents = read_metrics(tmp_path / "incidents.jsonl")
    assert [(row["window"], row["action"]) for row in incidents] == [(45, "rewind")]
    assert outcome.skipped_windows == (45,)


def test_policy_stop_ends_the_run_and_names_the_document(tmp_path: Path) -> None:
    settings_ = config(**GUARDED, guard={"policy": "stop", "spike_z": 8.0})
    model = tiny_model(settings_, dropout=False)
    with pytest.raises(TrainingStopped, match="poison"):
        train(model, poisoned(settings_, window=45), settings_, tmp_path)


def test_a_nan_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    settings_ = config(guard={"policy": "stop"})
    model = tiny_model(settings_, dropout=False)
    with torch.no_grad():
        next(model.parameters())[5] = torch.nan  # the embedding of token 5
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(TrainingStopped, match=r"not finite[\s\S]*document-"):
        train(model, tiny_data(), settings_, tmp_path)
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, equal_nan=True, rtol=0, atol=0)


def test_the_document_behind_a_nan_comes_first_though_its_row_is_nan_too(tmp_path: Path) -> None:
    """Every document counts in its own range of ids, so that one poisoned embedding is one document's."""
    rows = [
        TokenRow(
            f"document-{number}", "s", "made", [number * 4 + k for k in range(4)] * 2, [1] * 8, [1.0] * 8
        )
        for number in range(10)
    ]
    settings_ = config(rows_per_step=2, guard={"policy": "stop"})
    architecture = ARCHITECTURE | {"attention_dropout": 0.0, "tie_word_embeddings": False}
    model = new_causal_lm(architecture, seed=0).double()
    with torch.no_grad():
        next(model.parameters())[7 * 4 + 2] = torch.nan
    with pytest.raises(TrainingStopped):
        train(model, TokenDataset.of(rows), settings_, tmp_path)
    named = read_metrics(tmp_path / "incidents.jsonl")[0]["documents"]
    assert named[0]["document_id"] == "document-7" and named[0]["nats"] is None
    assert named[0]["cause"].startswith("hidden states: nan in row")
    assert all(document["nats"] is not None for document in named[1:])


def test_rewinds_are_bounded(tmp_path: Path) -> None:
    settings_ = config(guard={"policy": "rewind", "max_rewinds": 2})
    model = tiny_model(settings_, dropout=False)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingStopped):
        train(model, tiny_data(), settings_, tmp_path)
    actions = [incident["action"] for incident in read_metrics(tmp_path / "incidents.jsonl")]
    assert actions == ["rewind", "rewind", "stop"]


# --- early stopping ---


def test_early_stopping_ends_with_the_best_parameters(tmp_path: Path) -> None:
    data, held_out = tiny_data(seed=0), tiny_data(documents=6, seed=9)
    settings_ = config(
        steps=200,
        evaluate_every_steps=2,
        optimizer={"learning_rate": 0.3, "clip_norm": None},
        early_stopping={"patience": 2, "slice": "slice-1"},
        guard={"spike_z": None},
    )
    model = tiny_model(settings_, dropout=False)
    outcome = train(
        model, data, settings_, tmp_path, evaluate=lambda: score_dataset(model, held_out, length=32)
    )
    rows = read_metrics(tmp_path / "evaluations.jsonl")
    best = min(rows, key=lambda row: row["nll_nats"]["slice-1"])
    assert outcome.stopped_early and outcome.steps < 200
    assert outcome.best_step == best["step"] < rows[-1]["step"]
    sums = score_dataset(model, held_out, length=32).sums("slice", "slice-1")
    assert sums.value / sums.count == pytest.approx(best["nll_nats"]["slice-1"], rel=1e-12)


def test_early_stopping_on_an_unknown_slice_is_bad_input(tmp_path: Path) -> None:
    settings_ = config(evaluate_every_steps=1, early_stopping={"slice": "slice-9"})
    model = tiny_model(settings_, dropout=False)
    with pytest.raises(BadInput, match="slice-9"):
        train(
            model,
            tiny_data(),
            settings_,
            tmp_path,
            evaluate=lambda: score_dataset(model, tiny_data(), length=32),
        )


# --- config ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "exactly one of steps and epochs"),
        ({"steps": None}, "exactly one of steps and epochs"),
        ({"early_stopping": {}}, "needs evaluate_every_steps"),
        ({"objective": ["nil"]}, "did you mean nll"),
        ({"objective": []}, "at least one entry"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
