"""A finished run as a store would hold it, with small artifacts: what the tests of the report read."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gyrocompass.core.artifact import Artifact, DocumentRow
from gyrocompass.core.store import Store
from gyrocompass.data.document import Document, Quarantined, write_records
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.record import RunRecord, StageRecord

SLICES = ("chat/body", "chat/docstring", "code/library", "code/tests", "prose/docs")
BEST = {"chat/body": 2.9, "chat/docstring": 2.4, "code/library": 2.3, "code/tests": 1.9, "prose/docs": 3.6}
HOSTILE = "<script>alert('x')</script>"
OBJECTIVE = ["nll", {"z_loss": {"weight": 1.0, "coefficient": 1e-4}}]


class FinishedRun:
    """Stages are added one by one, each an artifact in the store and a line of the record."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.store = Store(root)
        self.random = np.random.default_rng(seed)
        self.artifacts: dict[str, Artifact] = {}
        self.stages: list[StageRecord] = []

    def add(
        self,
        name: str,
        kind: str,
        makes: str,
        inputs: Mapping[str, str] = {},
        *,
        recipe: Mapping[str, Any] | None = None,
        counts: Mapping[str, float] | None = None,
        files: Mapping[str, str] | None = None,
        ledger: Ledger | None = None,
        records: Sequence[Document | Quarantined] | None = None,
        documents: Sequence[DocumentRow] | None = None,
        reused: bool = False,
    ) -> None:
        parents = {role: self.artifacts[source] for role, source in inputs.items()}
        with self.store.create(f"key-{name}", makes, parents=parents, recipe=recipe) as draft:
            (draft.path / "what.txt").write_text(name)
            for path, text in (files or {}).items():
                (draft.path / path).write_text(text, encoding="utf-8")
            if ledger is not None:
                ledger.save(draft.path / "ledger.parquet")
            if records is not None:
                write_records(draft.path, records)
            draft.counts |= counts or {}
            draft.documents = documents
        self.artifacts[name] = draft.artifact
        self.stages.append(
            StageRecord(
                name=name,
                kind=kind,
                artifact=draft.artifact.id,
                inputs=dict(inputs),
                reused=reused,
                seconds=0.25 if reused else 12.5,
            )
        )

    def record(self, **changes: Any) -> RunRecord:
        fields = {
            "recipe": "stdlib",
            "description": "A small code assistant, made from the standard library of Python.",
            "started_at": "2026-03-01T12:00:00+00:00",
            "seconds": 431.5,
            "code_version": "0.1.0+g0123456789ab",
            "stages": self.stages,
        }
        return RunRecord.model_validate(fields | changes)

    # --- the stages of the demo ---

    def add_data(self, slices: Sequence[str] = SLICES[2:]) -> None:
        broken = [
            Quarantined("lib/bad_a.py", 3, "not UTF-8", "\\xff", "stdlib"),
            Quarantined("lib/bad_b.py", None, "not UTF-8", "\\xfe", "stdlib"),
            Quarantined(f"lib/{HOSTILE}.py", 1, "null bytes", "", "stdlib"),
        ]
        self.add("documents", "documents", "documents", counts=_counted(slices, 400), records=broken)
        for side, times in (("train", 380), ("held_out", 20)):
            inputs = {"documents": "documents"}
            counts = _counted(slices, times) | {"quarantined": 0}
            self.add(f"{side}_documents", "split", "documents", inputs, counts=counts)
        self.add("tokenizer", "tokenizer", "tokenizer", {"documents": "train_documents"}, reused=True)
        for side, times in (("train", 380), ("held_out", 20)):
            inputs = {"documents": f"{side}_documents", "tokenizer": "tokenizer"}
            targets = {f"targets/{name}": times * 900 for name in slices}
            total = times * 900 * len(slices)
            counts = {"tokens": total + times * len(slices), "targets": total, "quarantined": 0, **targets}
            rows = [
                DocumentRow(f"{index:016x}", f"lib/{side}{index}.py", "stdlib", slices[0])
                for index in range(4)
            ]
            self.add(f"{side}_tokens", "tokens", "tokens", inputs, counts=counts, documents=rows)

    def add_model(self) -> None:
        self.add(
            "untrained", "new_model", "model", {"tokenizer": "tokenizer"}, counts={"parameters": 4_853_248}
        )

    def add_training(
        self,
        name: str,
        model: str,
        slices: Sequence[str] = SLICES[2:],
        *,
        steps: int = 250,
        start: float = 9.0,
        incidents: Sequence[Mapping[str, Any]] = (),
        moving: Mapping[str, Callable[[int], Any]] = {},
        looks: Sequence[Mapping[str, Any]] = (),
        best_step: int | None = None,
    ) -> None:
        metrics = [
            self._step(step, steps, slices, start) | {key: of_step(step) for key, of_step in moving.items()}
            for step in range(1, steps + 1)
        ]
        evaluations = [
            {
                "step": step,
                "time_s": 1.7e9 + step,
                "nll_nats": {s: self._nll(s, step, steps, start, 0.01) for s in slices},
                "tokens": 20_480,
                "total_nll_nats": 3.0,
            }
            for step in range(50, steps + 1, 50)
        ]
        files = {
            "metrics.jsonl": _lines(metrics),
            "evaluations.jsonl": _lines(evaluations),
            "incidents.jsonl": _lines(incidents),
            "watch.jsonl": _lines(looks),
        }
        ledger = Ledger()
        for index, slice_name in enumerate(slices):
            nll_N = np.full(110_000 + 9_000 * index, 3.0)
            ledger.add_tokens({"slice": (np.zeros(len(nll_N), int), [slice_name])}, nll_N)
        ledger.add_objective("nll", 3.0 * ledger.total.count, ledger.total.count, ledger.total.count)
        ledger.add_objective("z_loss", 0.002 * ledger.total.count, ledger.total.count, ledger.total.count)
        recipe = {
            "objective": OBJECTIVE,
            "optimizer": {"learning_rate": 3e-3, "clip_norm": 1.0},
            "slice_weights": {name: 1 + (name == "code/library") for name in slices},
            "precision": "float32",
            "watch": {"gold": ["overlap"]} if looks else None,
        }
        inputs = {"model": model, "data": "train_tokens", "held_out": "held_out_tokens"}
        counts = {"steps": steps, "tokens": ledger.total.count, "bytes": 0, "skipped_windows": len(incidents)}
        if best_step is not None:
            counts["best_step"] = best_step
        self.add(name, "train", "model", inputs, recipe=recipe, counts=counts, files=files, ledger=ledger)

    def add_score(
        self,
        model: str,
        level: float,
        slices: Sequence[str] = SLICES,
        documents: int = 12,
        shortest: int = 200,
        per_group: int | None = None,
    ) -> None:
        ledger = scored(slices, level, documents, shortest, per_group)
        inputs = {"model": model, "data.0": "held_out_tokens"}
        self.add(f"score_{model}", "score", "score", inputs, ledger=ledger)

    def add_completions(self, model: str, prompts: Sequence[str]) -> None:
        words = [
            '    """',
            "Return",
            " the",
            " text",
            " of",
            " a",
            " file",
            ".",
            '"""',
            "\n",
            "    ",
            "with",
            " open",
        ]
        logprobs = [-0.02, -0.4, -0.08, -2.4, -0.01, -0.9, -1.5, -0.3, -0.05, -0.1, -0.02, -3.2, -6.1]
        rows = [
            {
                "prompt": prompt,
                "text": "".join(words),
                "token_ids": list(range(len(words) + 1)),
                "tokens": [*words, "<|end|>"],
                "logprobs": [*logprobs, -0.7],
                "finish": "end",
            }
            for prompt in prompts
        ]
        files = {"completions.json": json.dumps(rows)}
        self.add(
            "completions", "completions", "completions", {"model": model}, recipe={"chat": True}, files=files
        )

    def _step(self, step: int, steps: int, slices: Sequence[str], start: float) -> dict[str, Any]:
        return {
            "step": step,
            "time_s": 1.7e9 + step,
            "loss": 3.0,
            "learning_rate": 3e-3 * min(1.0, step / 20, (steps - step + 1) / (0.3 * steps)),
            "gradient_norm": 0.5 + 3 * math.exp(-step / 20) + 0.2 * abs(self.random.normal()),
            "tokens": 2048,
            "tokens_per_second": 5400.0 + 200 * self.random.normal(),
            "nll_nats": {s: self._nll(s, step, steps, start, 0.14) for s in slices},
            "slice_tokens": {s: 2048 // len(slices) for s in slices},
            "objective": {"nll": 3.0, "z_loss": 0.0021},
        }

    def _nll(self, slice_name: str, step: int, steps: int, start: float, noise: float) -> float:
        best = BEST.get(slice_name, 3.0)
        rest = (start - best) * (0.55 * math.exp(-step / 12) + 0.45 * math.exp(-step / (0.35 * steps)))
        return best + rest + noise * self.random.normal()


def scored(
    slices: Sequence[str], level: float, documents: int, shortest: int = 200, per_group: int | None = None
) -> Ledger:
    """Held-out scores `level` nats above each slice's best; the same tokens at each level.

    `per_group` documents of a slice share a group; None: the ledger does not say the groups.
    """
    random, noise = np.random.default_rng(5), np.random.default_rng(round(100 * level))
    ledger = Ledger()
    for index, name in enumerate(slices):
        for document in range(documents):
            tokens = int(random.integers(shortest, 2000))
            mean = BEST.get(name, 3.0) + level + 0.25 * random.normal() + 0.1 * noise.normal()
            nll_N = np.abs(mean + 0.8 * random.normal(size=tokens))
            tag = f"{index:02d}{document:02d}".ljust(16, "0")
            names = {"slice": name, "source": "stdlib", "document": tag}
            if per_group is not None:
                names["group"] = f"{index:02d}-{document // per_group:02d}"
            ledger.add_tokens(
                {dimension: (np.zeros(tokens, int), [one]) for dimension, one in names.items()},
                nll_N,
                byte_N=np.full(tokens, 3),
                top1_N=random.random(tokens) < 0.4,
            )
    return ledger


def demo_run(root: Path, **training: Any) -> FinishedRun:
    """The stages of the built-in recipe, in short."""
    run = FinishedRun(root)
    run.add_data()
    run.add_model()
    run.add_training("pretrained", "untrained", **training)
    run.add_training("fine_tuned", "pretrained", SLICES[:2], steps=60, start=4.0)
    for model, level in (("untrained", 6.2), ("pretrained", 0.4), ("fine_tuned", 0.1)):
        run.add_score(model, level)
    run.add_completions("fine_tuned", ['def read_text(path, encoding="utf-8"):', "Say <b>&amp; more"])
    return run


def poisonous_step() -> dict[str, Any]:
    """An incident with a document that did it."""
    return {
        "step": 31,
        "window": 31,
        "verdict": "a loss spike in slice code/tests: 14.2 nats per token, robust z = 31.5",
        "action": "rewind",
        "documents": [
            {"document_id": f"{1:016x}", "slice": "code/tests", "nats": 14.2, "tokens": 1_200},
            {"document_id": f"{2:016x}", "slice": "code/tests", "nats": float("nan"), "tokens": 80},
        ],
    }


def _counted(slices: Sequence[str], times: int) -> dict[str, float]:
    documents: dict[str, float] = {
        f"documents/{name}": times * (index + 1) for index, name in enumerate(slices)
    }
    n_bytes: dict[str, float] = {
        f"bytes/{name}": times * 3_000 * (index + 1) for index, name in enumerate(slices)
    }
    totals = {
        "documents": sum(documents.values()),
        "bytes": sum(n_bytes.values()),
        "quarantined": 3,
        "skipped": 2,
    }
    return totals | documents | n_bytes


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
