"""A teacher's likeliest tokens as columns of a dataset, against its full logits.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset, write_tokens
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.model.score import log_probs
from gyrocompass.model.teacher import with_teacher
from tiny_models import VOCABULARY, packed_batch, random_documents, tiny


def test_columns_are_the_teachers_likeliest_tokens(tmp_path: Path) -> None:
    teacher = tiny("llama", seed=3)
    seen: list[int] = []
    data = with_teacher(
        random_documents(1, [5, 9, 7, 12]), teacher, k=4, length=8, rows=2, on_tokens=seen.append
    )
    assert sum(seen) == data.n_targets
    write_tokens(tmp_path, data.rows())
    data = TokenDataset.open(tmp_path)
    counted_N = data.weight_N > 0
    for nth in range(4):
        assert np.array_equal(np.isfinite(data.columns[f"teacher_token/{nth}"]), counted_N)
    first = slice(0, 5)
    with torch.no_grad():
        log_p_TV = (
            teacher.eval()(torch.tensor(data.id_N[first][None], dtype=torch.int64)).logits[0].log_softmax(1)
        )
    wanted = log_p_TV[:-1].topk(4, dim=1)
    for nth in range(4):
        ids, lps = (data.columns[f"teacher_{name}/{nth}"][first][1:] for name in ("token", "logprob"))
        own = counted_N[first][1:]
        assert ids[own].tolist() == wanted.indices[:, nth].numpy()[own].tolist()
        np.testing.assert_allclose(lps[own], wanted.values[:, nth].numpy()[own], atol=1e-5)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    teacher = tiny("gemma2", seed=3).eval()
    batch = packed_batch(with_teacher(random_documents(2, [6, 9, 3]), teacher, k=5, length=16), 16)
    composite = parse_objectives(["distillation_top_k"])
    for model, nothing in ((teacher, True), (tiny("gemma2", seed=4).eval(), False)):
        with torch.no_grad():
            answer = log_probs(model, batch, want=(), candidate_TC=composite.candidates(batch))
        ((value_T, _),) = composite(answer, batch).values()
        assert (value_T.abs().max() < 1e-5) == nothing


@pytest.mark.parametrize("k", [0, VOCABULARY])
def test_k_is_within_the_vocabulary(k: int) -> None:
    with pytest.raises(BadInput, match=f"k is {k}"):
        with_teacher(random_documents(2, [6]), tiny("llama"), k=k, length=16)
