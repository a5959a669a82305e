"""Judging a model: what it scores on held-out texts and on tasks.

    model, tasks, held-out tokens and answers --evaluation--> evaluation.json, outcomes.parquet, ledger
    server, tasks, texts and answers -------------^

A server is asked instead of a model where `server` says so: by the same tasks and measures, over HTTP. What
it was trained on is not known here, so nothing is checked against it; and since nobody can tell whether it
still serves what it did, an evaluation is found again only under the same `asked_at`.

An outcome is an answer with a confidence, right or wrong, at one of three levels: a token (the model's first
choice, its probability), a choice among given answers, an answer that it wrote. Calibration
(`calibration.py`) is fitted on them.

Shape legend: K counted tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from gyrocompass.core.artifact import Artifact, Draft
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.data.document import Document, read_documents
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.data.windows import windowed
from gyrocompass.measure.generate import Generate
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.measure.ledger import Ledger
from gyrocompass.measure.memorisation import exposures, read_canaries, verbatim
from gyrocompass.measure.score import Score, ScoredText, tally
from gyrocompass.measure.served import Server, served_continuations, served_generate, served_score
from gyrocompass.measure.tasks.run import Outcome, ScoreContinuations, TaskResult, ask
from gyrocompass.measure.tasks.sweep import Sweep, sweep
from gyrocompass.measure.tasks.task import AnswerTask, ChoiceTask, Item, Task, read_items, read_tasks
from gyrocompass.model.fit import check_fit
from gyrocompass.model.head import context_length
from gyrocompass.model.open import open_model
from gyrocompass.model.score import add_scored, evaluating, scorer, top_tokens
from gyrocompass.model.write import continuation_scorer, writer
from gyrocompass.recipe.stage import (
    OptionalDocumentsName,
    OptionalModelName,
    OptionalTokensName,
    Reference,
    Stage,
    Workplace,
)
from gyrocompass.recipe.stages.contaminated import contamination
from gyrocompass.recipe.stages.learned import learned_from
from gyrocompass.train.config import PRECISIONS

EVALUATION, OUTCOMES = "evaluation.json", "outcomes.parquet"
EvaluationName = Annotated[str, Reference(("evaluation",))]


# --- evaluation ---


class EvaluationStage(Stage):
    """What a model or a server scores on at least one of `tasks`, `held_out`, `texts` and `answers`."""

    kind: Literal["evaluation"] = "evaluation"
    makes: ClassVar[str] = "evaluation"
    model: OptionalModelName = None
    server: Server | None = None
    """Asked instead of a model."""
    asked_at: str = ""
    """When a server was asked: a later time is another evaluation."""
    tasks: tuple[Path, ...] = ()
    """Files of tasks (docs/evaluation.md)."""
    held_out: OptionalTokensName = None
    """Tokens that the model was not trained on: nats per token, and its first choices as outcomes."""
    texts: OptionalDocumentsName = None
    """The same of a server: documents, since it tokenises them itself."""
    answers: OptionalDocumentsName = None
    """Conversations that it was not trained on: which of several answers belongs to a question?"""
    trained: OptionalDocumentsName = None
    """Texts that it was trained on: how far does it recite them?"""
    canaries: Path | None = None
    """A JSONL file of what was planted in its data: `context` and `canary`. How exposed is each?"""
    canary_candidates: int = Field(default=256, ge=2)
    """Texts of the canary's form that it is ranked among, itself included."""
    sweep: Sweep | None = None
    """Settings of sampling under which tasks that are answered freely are put again."""
    stride: int | None = Field(default=None, ge=1)
    """Held-out documents longer than `sequence_length` in windows so far apart; None: no overlap."""
    choices: int = Field(default=4, ge=2)
    most_items: int = Field(default=200, ge=1)
    most_tokens: int = Field(default=40_000, ge=1)
    """Of held-out tokens that become outcomes."""
    most_recited: int = Field(default=16, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    rows_per_batch: int = Field(default=8, ge=1)
    precision: Literal["float64", "float32", "bf16"] = "float32"

    def outside(self) -> Any:
        """The content of the tasks' files and of their records."""
        found = {}
        for path in self.tasks:
            own = [path, *(one for task in read_tasks(path) for one in task.reads())]
            found[str(path)] = [hashlib.sha256(one.read_bytes()).hexdigest() for one in own if one.is_file()]
        if self.canaries is not None and self.canaries.is_file():
            found["canaries"] = [hashlib.sha256(self.canaries.read_bytes()).hexdigest()]
        return found

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """See the module."""
        where = f"stages.{workplace.name}"
        self._check(where)
        asked = [(task, read_items(task)) for path in self.tasks for task in read_tasks(path)]
        artifact = workplace.inputs.get("model")
        if self.answers is not None:
            documents = list(read_documents(workplace.input("answers")))
            if artifact is not None:
                check_not_trained_on(workplace.store, artifact, documents, f"{where}.answers")
            asked += _which_answer(documents, self.choices, self.most_items)
        judged = self._opened(workplace)
        score, write = judged.score_continuations, judged.write
        results = []
        for task, items in asked:
            progress = workplace.progress.task(f"{workplace.name}: {task.name}", len(items))
            results.append(ask(task, items, score, write))
            progress.advance(len(items))
            progress.finish()
        outcomes = [outcome for result in results for outcome in result.outcomes]
        own = [
            (result, items)
            for result, (task, items) in zip(results, asked, strict=True)
            if task.data.is_file()
        ]
        found: dict[str, Any] = {
            "tasks": [_told(result) for result in results],
            "contamination": contamination(workplace.store, artifact, own) if artifact is not None else [],
            "likelihood": [],
            "recited": [],
            "canaries": [],
            "sweep": [
                row._asdict()
                for task, items in asked
                if self.sweep is not None and isinstance(task, AnswerTask)
                for row in sweep(task, items, write, self.sweep)
            ],
        }
        if self.held_out is not None:
            assert judged.model is not None, "checked above"
            model, length = judged.model, judged.length
            data = TokenDataset.open(workplace.input("held_out"))
            check_fit(model, data, length, where)
            if self.stride is not None:
                data = windowed(data, length, self.stride)
            ledger = Ledger()
            outcomes += self._token_outcomes(model, data, length, ledger)
            ledger.save(draft.path / "ledger.parquet")
            found["likelihood"] = [row._asdict() for row in slice_scores(ledger)]
        if self.texts is not None:
            ledger = tally(judged.score, map(_scored_text, read_documents(workplace.input("texts"))))
            ledger.save(draft.path / "ledger.parquet")
            found["likelihood"] = [row._asdict() for row in slice_scores(ledger)]
        if self.trained is not None:
            texts = [(d.id, d.text) for d in read_documents(workplace.input("trained")) if d.kind == "text"]
            texts = sorted(texts, key=lambda one: hashlib.sha256(one[0].encode()).digest())[
                : self.most_recited
            ]
            found["recited"] = [one._asdict() for one in verbatim(write, texts)]
        if self.canaries is not None:
            found["canaries"] = [
                {"canary": canary.canary} | one._asdict() | {"most": one.most}
                for canary, one in exposures(
                    judged.score_continuations, read_canaries(self.canaries), self.canary_candidates
                )
            ]
        _write_outcomes(outcomes, draft.path / OUTCOMES)
        (draft.path / EVALUATION).write_text(json.dumps(found, indent=1), encoding="utf-8")
        draft.counts |= {"tasks": len(results), "outcomes": len(outcomes)}

    def _check(self, where: str) -> None:
        if (self.model is None) == (self.server is None):
            raise BadInput("an evaluation is of a model or of a server, one of the two", where=where)
        if self.server is not None and (self.held_out is not None or self.stride is not None):
            raise BadInput(
                "a server tokenises texts itself",
                where=f"{where}.held_out",
                fix="give `texts: DOCUMENTS` instead",
            )
        if self.model is not None and self.texts is not None:
            raise BadInput(
                "texts are for a server", where=f"{where}.texts", fix="give `held_out: TOKENS` instead"
            )
        if not (self.tasks or self.held_out or self.texts or self.answers):
            raise BadInput(
                "there is nothing to evaluate on", where=where, fix="give tasks, held_out, texts or answers"
            )

    def _opened(self, workplace: Workplace) -> _Judged:
        if self.server is not None:
            server = self.server.named()
            return _Judged(
                None, 0, served_score(server), served_continuations(server), served_generate(server)
            )
        folder, rows = workplace.input("model"), self.rows_per_batch
        model = open_model(folder, dtype=PRECISIONS[self.precision], device=workplace.world.device)
        tokenizer = load_tokenizer(folder)
        length = min(self.sequence_length, context_length(model))
        return _Judged(
            model,
            length,
            scorer(model, tokenizer, length=length, rows=rows),
            continuation_scorer(model, tokenizer, length=length, rows=rows),
            writer(model, tokenizer, rows=rows),
        )

    def _token_outcomes(
        self, model: torch.nn.Module, data: TokenDataset, length: int, ledger: Ledger
    ) -> Iterator[Outcome]:
        """Every token into the ledger; of evenly many of each document, the first choice as an outcome."""
        step = max(1, data.n_targets // self.most_tokens)
        with evaluating(model):
            for part, top in top_tokens(model, data, length, self.rows_per_batch):
                add_scored(ledger, data, part)
                for place in range(0, len(part.index_K), step):
                    document = int(part.document_K[place])
                    yield Outcome(
                        task="held-out text",
                        item=str(int(part.index_K[place])),
                        slice=data.slice_names[data.slice_D[document]],
                        group=data.groups[document],
                        level="token",
                        signal="probability",
                        confidence=float(np.exp(top.logprob_KN[place, 0])),
                        correct=bool(part.rank_K[place] == 0),
                        length=1,
                        position=int(part.index_K[place] - data.offset_D[document]),
                    )


class _Judged(NamedTuple):
    """What is judged, as measures receive it."""

    model: torch.nn.Module | None
    """None: a server."""
    length: int
    score: Score
    score_continuations: ScoreContinuations
    write: Generate


def _scored_text(document: Document) -> ScoredText:
    return ScoredText(document.id, document.slice, document.source, document.text, document.split_key)


def check_not_trained_on(store: Store, model: Artifact, documents: Sequence[Document], where: str) -> None:
    """Refuse documents that the model, or one that it began as, has learned from, by lineage.

    Raises:
        BadInput: they are among them.
    """
    learned = trained_on(store, model)
    both = sorted({document.id for document in documents} & learned)
    if both:
        raise BadInput(
            f"{len(both)} of {len(documents)} documents are what the model learned from: "
            + ", ".join(both[:3])
            + (", ..." if len(both) > 3 else ""),
            where=where,
            fix="evaluate and calibrate on documents that were held out",
        )


def trained_on(store: Store, model: Artifact) -> set[str]:
    """The ids of all documents that a model has learned from, as far as its ancestors list them."""
    return {
        row.document_id
        for artifact in learned_from(store, model)
        for row in store.documents(artifact.id)
        if row.status == "kept"
    }


def _which_answer(documents: Sequence[Document], choices: int, most: int) -> list[tuple[Task, list[Item]]]:
    """Questions of conversations, each with its answer among others of the same slice."""
    spoken = [
        d
        for d in documents
        if d.kind == "chat" and len(d.messages) > 1 and d.messages[-1].role == "assistant"
    ]
    by_slice: dict[str, list[Document]] = {}
    for document in sorted(spoken, key=lambda d: _place(d.id)):
        by_slice.setdefault(document.slice, []).append(document)
    items = []
    for name, own in by_slice.items():
        answers = [document.messages[-1].content for document in own]
        for place, document in enumerate(own):
            others: list[str] = []
            for step in range(1, len(own)):
                other = answers[(place + step) % len(own)]
                if other != answers[place] and other not in others:
                    others.append(other)
                if len(others) == choices - 1:
                    break
            if len(others) < choices - 1:
                continue
            right = int.from_bytes(_place(document.id)[:4]) % choices
            texts = (*others[:right], answers[place], *others[right:])
            question = "\n".join(message.content for message in document.messages[:-1])
            items.append(Item(document.id, name, document.split_key, question, {}, texts, right))
    items.sort(key=lambda item: _place(item.id))
    if not items:
        return []
    task = ChoiceTask(name="which answer", data=Path("held-out conversations"), chat=True, delimiter="")
    return [(task, items[:most])]


def _told(result: TaskResult) -> dict[str, Any]:
    figures = [{k: v for k, v in one._asdict().items() if k != "by_group"} for one in result.figures]
    by_group = {f"{one.name}\0{one.slice}": one.by_group for one in result.figures}
    return {
        "name": result.task.name,
        "kind": result.task.kind,
        "figures": figures,
        "by_group": by_group,
        "shown": result.shown,
    }


def _write_outcomes(outcomes: Sequence[Outcome], path: Path) -> None:
    columns = {name: [getattr(one, name) for one in outcomes] for name in Outcome._fields}
    types = {"confidence": pa.float64(), "correct": pa.bool_(), "length": pa.int32(), "position": pa.int32()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in Outcome._fields])
    pq.write_table(pa.table(columns, schema=schema), path)


def _place(name: str) -> bytes:
    """Where something stands in an order that has nothing to do with what it is."""
    return hashlib.sha256(name.encode()).digest()
