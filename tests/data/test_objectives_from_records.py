"""Every family of objectives from JSON lines to gradients: nothing that one reads is made by hand.

JSONL -> documents -> tokens -> packed rows -> micro-batches -> the objective's loss, backward
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gyrocompass.data.document import read_documents, write_records
from gyrocompass.data.mixture import Sampler
from gyrocompass.data.rows import tokenise
from gyrocompass.data.sources import JsonlSource, Source, read_sources
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.registry import OBJECTIVES
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.scalar_head import attach_scalar_head
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.source import Window
from gyrocompass.train.window import window_gradients

LENGTH = 64


def judged(n: int) -> Iterator[dict[str, Any]]:
    yield {"prompt": f"q{n} ", "completion": f"def f{n}", "label": n % 2 == 0, "score": n / 4}


def pairs(n: int) -> Iterator[dict[str, Any]]:
    answers = {"chosen": f"return {n}", "rejected": f"raise {n}"}
    yield {"prompt": f"q{n} ", **answers, "labels": {"tie": n % 2}}


def triples(n: int) -> Iterator[dict[str, Any]]:
    yield {"prompt": f"q{n} ", "chosen": f"return {n}", "rejected": f"raise {n}", "gold": f"yield {n}"}


def mismatched(n: int) -> Iterator[dict[str, Any]]:
    for other in (0, 1):
        labels = {"mismatched": other}
        yield {"prompt": f"q{n} ", "completion": f"def f{n + other}", "label": n % 2 == 0, "labels": labels}


def roles(n: int) -> Iterator[dict[str, Any]]:
    for role in range(3):
        yield {"text": f"text {n} in role {role}", "unit": f"u{n}", "labels": {"role": role}}


def ranked(n: int) -> Iterator[dict[str, Any]]:
    for rank in range(3):
        labels = {"relevance": rank}
        yield {"prompt": f"q{n} ", "completion": f"x = {rank * n}", "unit": n, "labels": labels}


def passages(n: int) -> Iterator[dict[str, Any]]:
    for k in range(3):
        labels = {"retriever_logprob": -0.5 * k}
        yield {"prompt": f"passage {k} q{n} ", "completion": f"x = {n}", "unit": n, "labels": labels}


def steps(n: int) -> Iterator[dict[str, Any]]:
    texts = [f"first {n}\n", "then\n", "so"]
    yield {"prompt": f"q{n} ", "steps": [{"text": t, "reward": k != n % 3} for k, t in enumerate(texts)]}


class Case(NamedTuple):
    records: Any
    entries: tuple[Any, ...]
    reference: bool = False


CASES = {
    "pairs": Case(pairs, ("cpo", "simpo", "orpo", "chosen_nll", "reward_pairs", "reward_pairs_with_ties")),
    "pairs and a reference": Case(pairs, ("dpo", "aot"), reference=True),
    "triples": Case(triples, ("tpo",)),
    "answers": Case(judged, ("kto", "apo_zero_unpaired", "bco_unpaired"), reference=True),
    "mismatched answers": Case(mismatched, ({"kto": {"kl": "mismatched"}},), reference=True),
    "rewards": Case(judged, ("reward_regression", "reward_classification")),
    "steps": Case(steps, ("process_reward",)),
    "contrastive": Case(roles, ("infonce",)),
    "ranking": Case(ranked, ("margin_ranking", "listmle")),
    "retrieval": Case(passages, ("rag_sequence", "rag_token")),
    "a retriever": Case(passages, ("replug_lsr",), reference=True),
}


def tokens(case: Case, tokenizer: Any, folder: Path) -> TokenDataset:
    path = folder / "records.jsonl"
    lines = [json.dumps(record) for n in range(16) for record in case.records(n)]
    path.write_text("\n".join(lines), encoding="utf-8")
    for name in ("documents", "tokens"):
        (folder / name).mkdir()
    source = Source(jsonl=JsonlSource(path=str(path)))
    write_records(folder / "documents", read_sources([source], max_quarantined_share=0.0))
    done = tokenise(read_documents(folder / "documents"), tokenizer, folder / "tokens")
    assert not done.quarantined
    data = TokenDataset.open(folder / "tokens")
    if case.reference:
        noise_N = np.random.default_rng(0).normal(-3.0, 0.1, data.n_tokens).astype(np.float32)
        data = data.with_column("reference_logprob", noise_N)
    return data


@pytest.mark.parametrize("name", CASES)
def test_records_become_gradients_however_they_are_split(name: str, byte_level: Any, tmp_path: Path) -> None:
    case = CASES[name]
    data = tokens(case, byte_level, tmp_path)
    model = new_causal_lm(
        {
            "model_type": "llama", "vocab_size": len(byte_level), "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": LENGTH,
        },
        seed=0,
        dtype=torch.float64,
    )  # fmt: skip
    if any("scalar" in OBJECTIVES[e].wants for e in case.entries if isinstance(e, str)):
        head = attach_scalar_head(model)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    main = MainParameters(model.train())
    for entry in case.entries:
        found = []
        for rows in (64, 1):
            config = TrainConfig(
                steps=1, sequence_length=LENGTH, rows_per_step=64, rows_per_micro_batch=rows,
                precision="float64", objective=[entry],
            )  # fmt: skip
            packed = next(iter(Sampler(data, config.sampler().model_copy(update={"epochs": 1}))))
            assert packed.rows > 1
            passed = window_gradients(model, main, parse_objectives([entry]), Window(packed, data), config)
            gradients = [0 * p if p.grad is None else p.grad.clone() for p in main.trained.values()]
            assert any(bool(g.any()) for g in gradients), entry
            found.append((torch.tensor(passed.loss), *gradients))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, e=entry: f"{e}: {m}"
            )
