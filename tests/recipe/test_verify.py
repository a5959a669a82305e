"""`gyro verify`: a sound recipe passes, and each check fails for the fault that it is there for."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import processes
from gyrocompass.cli.main import main
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data import mixture
from gyrocompass.data.mixture import Sampler
from gyrocompass.data.pack import Packed
from gyrocompass.data.tokens import write_tokens
from gyrocompass.loss.reduce import Normaliser, Reduced, normalise
from gyrocompass.loss.signal import Batch
from gyrocompass.model import score as model_score
from gyrocompass.model.head import Head, find_head, hidden_states
from gyrocompass.recipe import verify, verify_checks, verify_resume
from gyrocompass.recipe.plan import plan
from gyrocompass.recipe.recipe import Recipe, recipe_from
from gyrocompass.recipe.verify import CHECKS, all_passed, model_chain, untrained, verify_recipe
from gyrocompass.recipe.verify_checks import one_signal, packing, partition
from gyrocompass.recipe.verify_data import accounting, disjointness
from gyrocompass.recipe.verify_preview import Run, preview, render, visible
from gyrocompass.recipe.verify_resume import resume
from gyrocompass.recipe.verify_subject import Finding, Subject
from gyrocompass.train import checkpoint, window
from gyrocompass.train.optim import AdamW

WITHOUT_PROCESSES = {name: check for name, check in CHECKS.items() if check is not resume}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- a tiny recipe ---


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose and code of unequal length, conversations, and other documents to hold out."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    words = ["north", "needle", "turns", "slowly", "while", "the", "ship", "holds", "its", "course"]

    def prose(number: int) -> str:
        return f"{number}: " + " ".join(rng.choice(words, int(rng.integers(4, 60)))) + ".\n"

    for side, count in (("train", 24), ("held_out", 4)):
        (folder / side).mkdir()
        for number in range(count):
            (folder / side / f"{number}.md").write_text(prose(1000 * (side == "held_out") + number))
        (folder / side / "module.py").write_text(MODULE.replace("NAME", side))
        chats = [
            {
                "messages": [
                    {"role": "user", "content": f"{side} {prose(number)}"},
                    {"role": "assistant", "content": prose(number)},
                ]
            }
            for number in range(12)
        ]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


MODULE = '''
def NAME_course(degrees: float, drift: float) -> float:
    """Return the course that is steered when the current sets the ship off by so many degrees of drift."""
    steered = degrees - drift
    while steered < 0:
        steered += 360
    return steered % 360
'''
"""Long enough for instruction pairs to be made from it."""


def tiny_recipe(files: Path, **changes: Any) -> Recipe:
    """Pretraining on files and fine-tuning on chats; changes are overrides, `__` for a dot."""
    train = {
        "kind": "train",
        "steps": 3,
        "sequence_length": 48,
        "rows_per_step": 6,
        "rows_per_micro_batch": 3,
    }
    stages: dict[str, Any] = {
        "tokenizer": {"kind": "tokenizer", "documents": "train_documents", "vocabulary_size": 300},
        "untrained": {
            "kind": "new_model",
            "tokenizer": "tokenizer",
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 48,
                "initializer_range": 0.3,
                "attention_dropout": 0.1,
            },
        },
        "pretrained": {**train, "model": "untrained", "data": "train_tokens", "held_out": "held_out_tokens"},
        "fine_tuned": {
            **train,
            "model": "pretrained",
            "data": "train_chat_tokens",
            "objective": ["nll", {"z_loss": {"coefficient": 1e-3}}],
        },
        "score": {"kind": "score", "model": "fine_tuned", "data": ["held_out_tokens"], "sequence_length": 48},
    }
    for side in ("train", "held_out"):
        sources = {"documents": {"files": {"path": str(files / side)}}}
        sources["chats"] = {"jsonl": {"path": str(files / f"{side}.jsonl")}}
        for what, tokens in (("documents", "tokens"), ("chats", "chat_tokens")):
            stages[f"{side}_{what}"] = {"kind": "documents", "sources": [sources[what]]}
            made_from = {"documents": f"{side}_{what}", "tokenizer": "tokenizer"}
            stages[f"{side}_{tokens}"] = {"kind": "tokens", **made_from}
    overrides = [f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in changes.items()]
    return recipe_from({"name": "tiny", "stages": stages}, overrides, "the test's recipe")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def a_console(**options: Any) -> tuple[Console, StringIO]:
    written = StringIO()
    return Console(file=written, width=120, **options), written


def subjects(recipe: Recipe, store: Store) -> Iterator[Subject]:
    return verify._subjects(recipe, store, Progress(a_console()[0], quiet=True))


@pytest.fixture
def subject(files: Path, store: Store) -> Subject:
    """The first training stage."""
    return next(subjects(tiny_recipe(files), store))


def with_stage(subject: Subject, **changes: Any) -> Subject:
    stage = type(subject.stage).model_validate(subject.stage.model_dump() | changes)
    return dataclasses.replace(subject, stage=stage)


# --- a sound recipe ---


def test_a_sound_recipe_passes_and_its_run_reuses_what_was_made(files: Path, store: Store) -> None:
    recipe = tiny_recipe(files)
    console, written = a_console()
    rows = verify_recipe(recipe, store, console, WITHOUT_PROCESSES)
    assert [(row.stage, row.check) for row in rows] == [
        (stage, check) for stage in ("pretrained", "fine_tuned") for check in WITHOUT_PROCESSES
    ]
    assert all_passed(rows), written.getvalue()
    assert rows[-1].finding.passed is None, "the second stage holds nothing out"
    assert "goes on from pretrained, not trained yet, so checked on untrained" in written.getvalue()
    made = {step.name for step in plan(recipe.stages, store) if step.artifact}
    assert made == {*recipe.stages} - {"pretrained", "fine_tuned", "score", "held_out_chat_tokens"} - {
        "held_out_chats"
    }


@pytest.mark.slow
def test_every_check_passes_from_the_command_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(tiny_recipe(files).model_dump(mode="json")))
    assert main(["verify", str(path), "--store", str(tmp_path / "store")]) == 0
    shown = capsys.readouterr().out
    assert "13 passed, 0 failed" in shown
    assert not list((tmp_path / "store").glob("verify-*")), "what was scratch is gone"


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float64"},
        {"precision": "bf16"},
        {"precision": "bf16_autocast"},
        {"lora": {"rank": 2}, "reduction": {"by": "slice"}},
        {"slice_weights": {"code": 1.0, "text": 3.0}, "activation_checkpointing": True},
    ],
    ids=str,
)
def test_sound_stages_of_other_kinds_pass(subject: Subject, changes: dict[str, Any]) -> None:
    changed = with_stage(subject, **changes)
    for check in (preview, packing, partition, one_signal, accounting):
        assert check(changed).passed, (check, check(changed))


def test_a_killed_run_resumes(subject: Subject) -> None:
    finding = resume(subject)
    assert finding.passed, finding
    assert "gone on from step-00000002" in finding.over


# --- faults ---


def test_preview_fails_where_nothing_is_counted(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixture.assemble

    def masked(*arguments: Any) -> Packed:
        packed = whole(*arguments)
        return packed._replace(
            weight_T=np.zeros_like(packed.weight_T), target_T=np.full_like(packed.target_T, -100)
        )

    monkeypatch.setattr(mixture, "assemble", masked)
    finding = preview(subject)
    assert finding.passed is False and finding.measured.startswith("0 tokens"), finding


def test_packing_fails_where_attention_crosses_segments(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crossing(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        position_T = torch.arange(len(batch.token_T)) % batch.length
        return hidden_states(model, dataclasses.replace(batch, position_T=position_T))

    monkeypatch.setattr(model_score, "hidden_states", crossing)
    for precision in ("float32", "bf16", "bf16_autocast"):
        finding = packing(with_stage(subject, precision=precision))
        assert finding.passed is False, finding


class NormalisedByMicroBatch:
    """A mean within each micro-batch, averaged over them: what a window must not be."""

    def __init__(self, composite: Any, batches: list[Batch], weights: Any, **options: Any) -> None:
        self.own: list[tuple[Batch, Normaliser]] = [
            (batch, normalise(composite, [batch], weights, **options)) for batch in batches
        ]

    def loss(self, terms: Any, batch: Batch) -> Reduced:
        normaliser = next(own for known, own in self.own if known is batch)
        reduced = normaliser.loss(terms, batch)
        return Reduced(reduced.loss / len(self.own), reduced.report)

    def share(self, terms: Any, batch: Batch) -> torch.Tensor:
        return self.loss(terms, batch).loss


def test_partition_fails_for_a_mean_of_means(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "normalise", NormalisedByMicroBatch)
    for precision in ("float32", "bf16"):
        finding = partition(with_stage(subject, precision=precision))
        assert finding.passed is False, finding


def test_partition_fails_where_nothing_is_learned(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return hidden_states(model, batch) * 0.0

    monkeypatch.setattr(model_score, "hidden_states", frozen)
    assert partition(subject).measured == "no gradient"


FORGETFUL = {
    "data position": (Sampler, "restore"),
    "optimizer": (AdamW, "restore"),
    "random state": (checkpoint, "_restore_rng"),
    "nothing": None,
}


def forgetful_process(arguments: list[str], fault: str, said: str) -> None:
    """What `verify_resume` starts, with one thing forgotten; its standard error goes to a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    if (forgotten := FORGETFUL[fault]) is not None:
        setattr(*forgotten, lambda *_: None)
    verify_resume.main(arguments)


def forked(fault: str, said: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`verify_resume._run`, with processes that need not import everything first."""

    def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
        code = processes.run(forgetful_process, [str(folder), *options], fault, str(said))
        return subprocess.CompletedProcess([], code, stderr=said.read_text())

    return run


@pytest.mark.parametrize("fault", FORGETFUL)
def test_resume_fails_where_a_checkpoint_is_half_restored(
    fault: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_resume, "_run", forked(fault, tmp_path / "said"))
    finding = resume(subject)
    if fault == "nothing":
        assert finding.passed, finding
        return
    assert finding.passed is False and "differ" in finding.measured, finding
    assert "parameters.safetensors" in finding.look_at


def test_resume_fails_where_the_run_ends_otherwise(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_resume, "_run", forked("nothing", tmp_path / "said"))
    elsewhere = subject.model._replace(path=subject.model.path / "nowhere")
    finding = resume(dataclasses.replace(subject, model=elsewhere))
    assert finding.passed is False and finding.measured == "was not killed"
    assert "no such folder" in finding.look_at


def test_accounting_fails_for_a_sampler_that_repeats_a_piece(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Sampler._bundle
    monkeypatch.setattr(Sampler, "_bundle", lambda self, s, nth: right(self, s, max(0, nth - 1)))
    finding = accounting(subject)
    assert finding.passed is False and "document" in finding.look_at, finding


@pytest.mark.parametrize(("name", "shown"), [("targets", "total"), ("targets/text", "text")])
def test_accounting_fails_for_a_manifest_that_counts_otherwise(
    subject: Subject, name: str, shown: str
) -> None:
    manifest = subject.data_artifact.manifest
    counts = manifest.counts | {name: manifest.counts[name] + 1}
    changed = subject.data_artifact._replace(manifest=manifest.model_copy(update={"counts": counts}))
    finding = accounting(dataclasses.replace(subject, data_artifact=changed))
    assert finding.passed is False and f"{shown} (" in finding.look_at, finding


def test_accounting_fails_for_a_document_that_is_there_twice(subject: Subject, tmp_path: Path) -> None:
    rows = list(subject.data.rows())
    write_tokens(tmp_path, [*rows, rows[0]])
    finding = accounting(
        dataclasses.replace(subject, data_artifact=subject.data_artifact._replace(path=tmp_path))
    )
    assert finding.passed is False and f"document {rows[0].document_id} (2 times)" in finding.look_at, finding


def scaled_head(model: torch.nn.Module) -> Head:
    return find_head(model)._replace(logit_scale=1.01)


def lossy_score(*arguments: Any, **options: Any) -> Any:
    return model_score.score_dataset(*arguments, **options, documents=[0])


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [(model_score, "find_head", scaled_head), (verify_checks, "score_dataset", lossy_score)],
    ids=["a forgotten logit scale", "documents not scored"],
)
def test_one_signal_fails(
    owner: Any, name: str, fault: Callable[..., Any], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, fault)
    finding = one_signal(subject)
    assert finding.passed is False, finding


def test_a_document_on_both_sides_is_found(files: Path, store: Store) -> None:
    recipe = tiny_recipe(files, stages__pretrained__held_out="train_tokens")
    finding = disjointness(next(subjects(recipe, store)))
    assert finding.passed is False and finding.measured == "25 documents", finding


def test_a_copy_under_another_path_is_found(files: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "copied.md").write_bytes((files / "train" / "3.md").read_bytes())
    (tmp_path / "other.md").write_text("nothing like the rest")
    source = {"files": {"path": str(tmp_path)}}
    recipe = tiny_recipe(files, stages__held_out_documents__sources=[source])
    finding = disjointness(next(subjects(recipe, store)))
    assert finding.passed is False and finding.measured == "1 documents", finding
    assert "copied.md" in finding.look_at and "3.md" in finding.look_at


@pytest.mark.parametrize(("side", "passed"), [("train", False), ("held_out", True)])
def test_what_is_derived_from_training_data_is_found(
    side: str, passed: bool, files: Path, store: Store
) -> None:
    """Pairs are held out; the module they were derived from is learned from by the stage itself, or not."""
    pairs = {"kind": "pairs", "documents": f"{side}_documents"}
    recipe = tiny_recipe(files, stages__pairs=pairs, stages__held_out_tokens__documents="pairs")
    finding = disjointness(next(subjects(recipe, store)))
    assert finding.passed is passed and "of 2 held out" in finding.over, finding


def test_the_data_of_earlier_stages_counts_as_learned_from(files: Path, store: Store) -> None:
    recipe = tiny_recipe(files, stages__fine_tuned__held_out="train_tokens")
    _, second = subjects(recipe, store)
    assert second.name == "fine_tuned"
    assert disjointness(second).measured == "25 documents"
    assert disjointness(dataclasses.replace(second, learned_before=())).passed


# --- what becomes of a failure, and of a recipe that cannot be verified ---


def recipe_file(recipe: Recipe, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    return str(path)


def test_a_failed_check_is_named_and_the_exit_code_is_1(
    files: Path,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = {"held-out is disjoint": disjointness}
    monkeypatch.setattr("gyrocompass.cli.verify.verify_recipe", partial(verify_recipe, checks=checks))
    path = recipe_file(tiny_recipe(files), tmp_path)
    sides = ["--set", "stages.pretrained.held_out=train_tokens"]
    assert main(["verify", path, "--store", str(store.root), *sides]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "Look at: held-out documents that are learned from too" in shown
    assert main(["verify", path, "--store", str(store.root)]) == 0


def test_a_recipe_without_training_is_bad_input(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(files)
    stages = {name: recipe.stages[name] for name in ("train_documents", "tokenizer")}
    path = recipe_file(recipe.model_copy(update={"stages": stages}), tmp_path)
    assert main(["verify", path, "--store", str(tmp_path / "store")]) == 2
    assert "no training stage" in capsys.readouterr().err


def test_an_error_within_a_check_fails_it_and_bad_input_ends_all(files: Path, store: Store) -> None:
    def broken(error: GyroError) -> Callable[[Subject], Finding]:
        def check(subject: Subject) -> Finding:
            raise error

        return check

    checks = {"broken": broken(GyroError("it broke", fix="mend it")), "accounting": accounting}
    console, written = a_console()
    rows = verify_recipe(tiny_recipe(files), store, console, checks)
    assert [row.finding.passed for row in rows] == [False, True] * 2
    assert "it broke" in written.getvalue() and "mend it" in written.getvalue()
    with pytest.raises(BadInput, match="wrong"):
        verify_recipe(tiny_recipe(files), store, console, {"bad": broken(BadInput("wrong"))})


def test_tokens_of_another_tokenizer_are_bad_input(subject: Subject) -> None:
    subject.data.id_N[0] = 5000
    with pytest.raises(BadInput, match="token 5000"):
        packing(subject)


# --- which model a stage is checked on ---


def test_a_chain_of_training_stages_leads_to_the_first_model(files: Path) -> None:
    stages = tiny_recipe(files).stages
    assert model_chain(stages, "fine_tuned") == ["fine_tuned", "pretrained", "untrained"]
    needed = untrained(stages)
    assert "untrained" in needed and not {"pretrained", "fine_tuned", "score"} & needed.keys()
    assert all(needed[name] == stages[name] for name in needed)


def test_what_reads_a_trained_model_for_training_reads_the_first_one_instead(files: Path) -> None:
    recipe = tiny_recipe(
        files,
        stages__tokenizer_again={"kind": "tokenizer_of", "model": "pretrained"},
        stages__train_chat_tokens__tokenizer="tokenizer_again",
    )
    assert untrained(recipe.stages)["tokenizer_again"].references() == {"model": "untrained"}


# --- the preview ---


def test_preview_shows_what_counts(files: Path, store: Store) -> None:
    _, chats = subjects(tiny_recipe(files), store)
    console, written = a_console()
    assert preview(dataclasses.replace(chats, progress=Progress(console))).passed
    shown = written.getvalue()
    assert "<|assistant|>[[" in shown, shown
    counted = re.findall(r"\[\[(.*?)\]\]", shown, re.DOTALL)
    assert "train" in shown and not any("train" in text for text in counted), "the user's turns are masked"
    assert all(f"document {chats.data.document_ids[d]}" in shown for d in chats.window.document_T[:1])


RUNS = [Run("masked [red]", False), Run("counted\x1b[2J\u202e\ttab\n", True)]


def test_without_colour_counted_tokens_stand_in_brackets() -> None:
    console, written = a_console()
    console.print(render(RUNS, console))
    assert written.getvalue() == "masked [red][[counted\\x1b[2J\\u202e      tab\n]]\n"


def test_with_colour_they_are_bright_and_the_rest_is_dim() -> None:
    console, written = a_console(force_terminal=True, color_system="standard", no_color=False)
    console.print(render(RUNS, console))
    assert "\x1b[2mmasked [red]" in written.getvalue()
    assert "\x1b[1;32mcounted\\x1b[2J\\u202e" in written.getvalue()


def test_no_control_or_direction_character_is_left() -> None:
    hostile = "".join(map(chr, range(0x20))) + "\x7f\x9b\u200b\u202e\u2066\ufeff"
    shown = visible(hostile)
    assert shown.isascii() and not {c for c in shown if ord(c) < 32} - {"\n", "\t"}
    assert visible("naïve 北 🧭") == "naïve 北 🧭"
