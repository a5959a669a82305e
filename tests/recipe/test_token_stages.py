"""Stages that make tokens anew: texts rearranged, prefixes as context, a teacher's likeliest tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from databases import copied
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.core.lineage import walk
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.document import read_documents
from gyrocompass.data.infilling import SentinelTokens
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.recipe.plan import Done, execute
from gyrocompass.recipe.recipe import load_recipe, recipe_from
from gyrocompass.recipe.stage import Stage
from gyrocompass.recipe.verify import verify_recipe
from gyrocompass.recipe.verify_data import accounting
from gyrocompass.train.distributed import World
from tiny_recipe import FinishedRun

SENTINELS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
DOCUMENTS = {"kind": "tokens", "documents": "train_documents", "tokenizer": "filling_tokenizer"}
MADE = {
    "filling_tokenizer": {
        "kind": "tokenizer",
        "documents": "train_documents",
        "vocabulary_size": 300,
        "extra_special_tokens": SENTINELS,
    },
    "plain": DOCUMENTS,
    "filling": DOCUMENTS | {"infilling": {"rate": 0.5}},
    "prefixed": DOCUMENTS | {"prefix_lm": {"seed": 3}},
    "likeliest": {
        "kind": "teacher_top_k",
        "data": "train_pair_tokens",
        "teacher": "pretrained",
        "k": 3,
        "sequence_length": 64,
    },
    "student": {
        "kind": "train",
        "model": "untrained",
        "data": "likeliest",
        "objective": ["distillation_top_k"],
        "steps": 1,
        "sequence_length": 64,
        "rows_per_step": 2,
    },
}


@pytest.fixture
def store(finished_run: FinishedRun, tmp_path: Path) -> Store:
    """A copy of the finished run's store, to be written to."""
    copied(finished_run.store, tmp_path / "store")
    return Store(tmp_path / "store")


def stages_with(finished_run: FinishedRun, made: dict[str, Any]) -> dict[str, Any]:
    before = load_recipe(str(finished_run.recipe)).model_dump(mode="json", exclude_unset=True)["stages"]
    return {**before, **made}


def run(finished_run: FinishedRun, store: Store, made: dict[str, Any]) -> dict[str, Done]:
    recipe = recipe_from({"name": "other", "stages": stages_with(finished_run, made)}, [], "test")
    known: dict[str, Stage] = dict(recipe.stages)
    return {done.name: done for done in execute(known, store, Progress(quiet=True), World())}


def test_texts_are_rearranged_and_everything_is_counted_once(finished_run: FinishedRun, store: Store) -> None:
    names = ("filling_tokenizer", "plain", "filling", "prefixed")
    made = run(finished_run, store, {name: MADE[name] for name in names})
    tokenizer = load_tokenizer(made["filling_tokenizer"].artifact.path)
    sentinels = SentinelTokens().of(tokenizer)
    plain, filling, prefixed = (TokenDataset.open(made[name].artifact.path) for name in names[1:])
    marks = int(np.isin(filling.id_N, sentinels).sum())
    assert 0 < marks <= 3 * plain.n_documents and marks % 3 == 0
    assert (filling.n_tokens, filling.n_targets) == (plain.n_tokens + marks, plain.n_targets)
    assert filling.byte_N.sum() == plain.byte_N.sum() == prefixed.byte_N.sum()
    assert np.array_equal(prefixed.id_N, plain.id_N) and prefixed.n_targets < plain.n_targets
    counts = made["filling"].artifact.manifest.counts
    assert (counts["tokens"], counts["targets"]) == (filling.n_tokens, filling.n_targets)
    assert counts["bytes"] == made["plain"].artifact.manifest.counts["bytes"]
    texts = {document.id: document.text for document in read_documents(made["train_documents"].artifact.path)}
    for row in filling.rows():
        ids = np.asarray(row.ids)[1:-1].tolist()
        if sentinels.middle in ids:
            head, middle = _cut(ids, sentinels.middle)
            if ids[1] == sentinels.suffix:
                ids = middle + head[2:]
            else:
                prefix, suffix = _cut(head[1:], sentinels.suffix)
                ids = prefix + middle + suffix
            assert tokenizer.decode(ids) == texts[row.document_id]
    again = run(finished_run, Store(store.root.parent / "again"), {n: MADE[n] for n in names})
    assert again["filling"].artifact.manifest.content_hash == made["filling"].artifact.manifest.content_hash


def _cut(ids: list[int], at: int) -> tuple[list[int], list[int]]:
    place = ids.index(at)
    return ids[:place], ids[place + 1 :]


def test_sentinels_are_special_tokens_of_the_tokenizer(finished_run: FinishedRun, store: Store) -> None:
    with pytest.raises(BadInput, match=r"no special token <\|fim_prefix\|>, .* it has: <\|endoftext\|>"):
        run(finished_run, store, {"filling": MADE["filling"] | {"tokenizer": "tokenizer"}})
    with pytest.raises(ConfigError, match="infilling and prefix_lm do not go together"):
        run(finished_run, store, {"both": MADE["filling"] | {"prefix_lm": {}}})
    twice = MADE["filling_tokenizer"] | {"extra_special_tokens": ["<|pad|>"]}
    with pytest.raises(BadInput, match="special tokens are each another"):
        run(finished_run, store, {"twice": twice})


def test_a_student_learns_from_what_a_teacher_left(finished_run: FinishedRun, store: Store) -> None:
    made = run(finished_run, store, {name: MADE[name] for name in ("likeliest", "student")})
    likeliest, before = made["likeliest"].artifact, made["train_pair_tokens"].artifact
    data = TokenDataset.open(likeliest.path)
    assert sorted(data.columns) == sorted(f"teacher_{n}/{k}" for n in ("token", "logprob") for k in range(3))
    parents = likeliest.manifest.parents
    assert parents == {"data": before.id, "teacher": made["pretrained"].artifact.id}
    assert "quarantined" not in likeliest.manifest.counts
    for name, count in likeliest.manifest.counts.items():
        assert count == before.manifest.counts[name]
    assert list(store.documents(likeliest.id)) == list(store.documents(before.id))
    assert made["pretrained"].artifact.id in str(walk(store, made["student"].artifact.id))


def test_verify_counts_what_has_more_columns(finished_run: FinishedRun, store: Store) -> None:
    stages = stages_with(finished_run, {"likeliest": MADE["likeliest"], "student": MADE["student"]})
    for name in ("fine_tuned", "score_fine_tuned", "completions"):
        del stages[name]
    recipe = recipe_from({"name": "other", "stages": stages}, [], "test")
    rows = verify_recipe(recipe, store, Console(quiet=True), {"accounting": accounting})
    assert all(row.finding.passed for row in rows), [row.finding for row in rows]
