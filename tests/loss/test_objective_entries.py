"""Reading objectives from YAML: names, weights, schedules, and errors that name the nearest known key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from direct_signal import make_batch

from gyrocompass.core.errors import ConfigError
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.signal import IGNORE_INDEX

EXAMPLE = """
- nll
- z_loss: {coefficient: 1.0e-3, weight: {linear: {from: 1.0, to: 0.0, steps: 10}}}
- unlikelihood: {window: 2, weight: {cosine: {from: 0.0, to: 2.0, steps: 4}}}
- unlikelihood: {name: never, window: 0, tokens: [3, 5], weight: 0.5}
- label_smoothing:
"""


def test_a_list_becomes_a_composite() -> None:
    composite = parse_objectives(yaml.safe_load(EXAMPLE))
    assert composite.names == ("nll", "z_loss", "unlikelihood", "never", "label_smoothing")
    assert composite.wants == {"mean_logit"}
    weights = {step: composite.weights(step) for step in (0, 2, 4, 5, 100)}
    assert [weights[step]["z_loss"] for step in weights] == pytest.approx([1.0, 0.8, 0.6, 0.5, 0.0])
    assert [weights[step]["unlikelihood"] for step in weights] == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0])
    assert {(weights[step]["nll"], weights[step]["never"]) for step in weights} == {(1.0, 0.5)}


def test_each_part_sees_its_own_candidates() -> None:
    batch = make_batch(9, 7, seed=2)
    both = parse_objectives(yaml.safe_load(EXAMPLE))
    candidate_TC = both.candidates(batch)
    assert candidate_TC is not None and candidate_TC.shape == (9, 4)
    h_TD, w_VD = torch.randn(9, 3), torch.randn(7, 3)
    terms = both(
        token_logprobs(h_TD, w_VD, batch.target_T, candidate_TC=candidate_TC, want=both.wants), batch
    )
    for name, keys in (("unlikelihood", {"window": 2}), ("never", {"window": 0, "tokens": [3, 5]})):
        alone = parse_objectives([{"unlikelihood": keys}])
        own_TC = alone.candidates(batch)
        expected = alone(token_logprobs(h_TD, w_VD, batch.target_T, candidate_TC=own_TC, want=()), batch)
        assert torch.equal(terms[name].value, expected["unlikelihood"].value)
        assert own_TC is not None and (own_TC == IGNORE_INDEX).any()


def test_no_candidates_where_no_part_asks() -> None:
    assert parse_objectives(["nll"]).candidates(make_batch(4, 5, seed=0)) is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"nl": {}}], r"unknown objective 'nl'; did you mean nll\?\n  where: run.yaml.0"),
        (
            ["nll", {"label_smoothing": {"epsilo": 0.1}}],
            r"run.yaml.1.label_smoothing: epsilo: unknown key; did you mean epsilon\?",
        ),
        ([{"label_smoothing": {"epsilon": 1.5}}], "less than or equal to 1"),
        ([{"nll": {"weight": "heavy"}}], "nll: weight: .*valid number"),
        ([{"nll": {"weight": float("nan")}}], "nll: weight: .*finite number"),
        ([{"nll": {"weight": {"linaer": {}}}}], r"unknown key; did you mean linear\?"),
        ([{"nll": {"weight": {"linear": {"from": 0, "to": 1}}}}], "the key steps is missing"),
        ([{"nll": {"weight": {}}}], "one of linear and cosine"),
        ([{"confidence_penalty": {}}], "the key coefficient is missing"),
        ([{"unlikelihood": {"tokens": [-1]}}], "greater than or equal to 0"),
        (["nll", "nll"], "two objectives are called nll"),
        ([{"nll": {}, "focal": {}}], "one objective's name"),
        ([3], "one objective's name"),
        ([], "at least one entry"),
        ("nll", "at least one entry"),
        ({"nll": {}}, "at least one entry"),
    ],
)
def test_a_mistake_is_named(entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_objectives(entries, where="run.yaml")
