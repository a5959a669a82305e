"""What is reported of sampler and learner: by plain sums, in parts, and where there is nothing.

Shape legend: T positions, N counted tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from direct_policy import Model, rollouts, taken

from gyrocompass.loss.importance import Clip, ImportanceSums, importance_sums
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.signal import TokenLogProbs


def test_importance_sums_are_their_formulas_and_add_up() -> None:
    batch, model = rollouts(40, 9), Model(40, 9)
    counted_T = batch.weight_T > 0
    answer = model.answer(parse_objectives(["reinforce"]), batch)
    clip = Clip(low=0.1, high=0.2)
    report = importance_sums(answer, batch, clip=clip).report()
    gap_N = (answer.logprob_T.detach() - batch.columns["rollout_logprob"])[counted_T].tolist()
    advantage_N = batch.columns["advantage"][counted_T].tolist()
    w_N = [math.exp(gap) for gap in gap_N]
    stopped = [(a > 0 and w > 1.2) or (a < 0 and w < 0.9) for a, w in zip(advantage_N, w_N, strict=True)]
    count = len(gap_N)
    assert report == pytest.approx(
        {
            "count": count,
            "mean_gap_nats": sum(gap_N) / count,
            "largest_gap_nats": max(abs(gap) for gap in gap_N),
            "outside_share": sum(not 0.9 <= w <= 1.1 for w in w_N) / count,
            "effective_tokens": sum(w_N) ** 2 / sum(w * w for w in w_N),
            "kl_nats": sum(w - 1 - math.log(w) for w in w_N) / count,
            "clip_share": sum(stopped) / count,
        }
    )
    added = ImportanceSums()
    for part in (torch.arange(17), torch.arange(17, 40)):
        rows = TokenLogProbs(answer.logprob_T[part], answer.lse_T[part])
        added = added + importance_sums(rows, taken(batch, part), clip=clip)
    assert added.report() == pytest.approx(report)


def test_equal_samplers_are_reported_as_equal_and_none_as_none() -> None:
    batch, model = rollouts(40, 9, spread=0.0), Model(40, 9)
    answer = model.answer(parse_objectives(["reinforce"]), batch)
    report = importance_sums(answer, batch).report()
    assert report["effective_tokens"] == pytest.approx(report["count"])
    assert [report[name] for name in ("outside_share", "clip_share")] == [0, 0]
    assert report["largest_gap_nats"] < 1e-12 and abs(report["kl_nats"]) < 1e-12
    nothing = rollouts(4, 1, ignored_share=1.0)
    empty = TokenLogProbs(torch.zeros(4), torch.zeros(4))
    assert importance_sums(empty, nothing).report() == {"count": 0}
