"""Intervals: coverage by simulation, textbook special cases, and honesty about one document."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gyrocompass.measure.intervals import Estimate, clusters, ratio_estimate, share_estimate, slice_scores
from gyrocompass.measure.ledger import Ledger


def documents(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of unequal length whose mean NLL depends on the document and on its length."""
    tokens_D = np.ceil(random.lognormal(5.0, 0.6, count))
    mean_D = 2.0 + 0.5 * random.standard_normal(count) + 0.2 * np.log(tokens_D / 150.0)
    return tokens_D * mean_D + np.sqrt(tokens_D) * random.standard_normal(count), tokens_D


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    nll, tokens = documents(random, 2_000_000)
    truth = nll.sum() / tokens.sum()
    repeats, covered, naive_covered = 1500, 0, 0
    for _ in range(repeats):
        nll_D, tokens_D = documents(random, 40)
        estimate = ratio_estimate(nll_D, tokens_D)
        covered += estimate.low <= truth <= estimate.high
        # As if tokens were independent: what clustering is for.
        naive = 1.96 * 1.2 / math.sqrt(tokens_D.sum())
        naive_covered += abs(estimate.value - truth) < naive
    # Five standard errors of a 95% share over 1,500 repeats are 2.8 points.
    assert 0.92 <= covered / repeats <= 0.975
    assert naive_covered / repeats < 0.6


def test_equal_lengths_give_the_t_interval_of_the_mean() -> None:
    values = np.array([1.0, 2.5, 2.0, 4.0])
    estimate = ratio_estimate(values * 10, np.full(4, 10.0))
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert estimate == pytest.approx(Estimate(values.mean(), low, high))


def ledger_of(nll: dict[str, list[list[float]]]) -> Ledger:
    """A ledger of slices, their documents and their tokens; each token is one byte and top-1 below 1 nat."""
    ledger = Ledger()
    for index, (slice_name, texts) in enumerate(nll.items()):
        for number, values in enumerate(texts):
            tags = {
                "slice": ([index] * len(values), list(nll)),
                "document": ([0] * len(values), [f"{slice_name}-{number}"]),
            }
            top1 = [value < 1.0 for value in values]
            ledger.add_tokens(tags, values, byte_N=[1] * len(values), top1_N=top1)
    return ledger


def test_a_line_per_slice_and_the_total() -> None:
    code, prose, total = slice_scores(ledger_of({"code": [[0.5, 1.5], [3.0]], "prose": [[4.0]]}))
    assert (code.slice, code.documents, code.tokens, code.bytes) == ("code", 2, 3, 3)
    assert code.nats_per_token == pytest.approx(5 / 3)
    assert code.perplexity == pytest.approx(math.exp(5 / 3))
    assert code.perplexity_high == pytest.approx(math.exp(code.nats_per_token_high))
    assert code.bits_per_byte == pytest.approx(5 / 3 / math.log(2))
    assert code.bits_per_byte_high == pytest.approx(code.nats_per_token_high / math.log(2))
    assert code.top1 == pytest.approx(1 / 3)
    assert code.nats_per_token_low == 0.0  # two documents: a wide interval, cut at what NLL can be
    assert (total.slice, total.documents, total.tokens) == ("total", 3, 4)
    assert total.nats_per_token == pytest.approx(9 / 4)
    assert (prose.nats_per_token, prose.documents) == (4.0, 1)


def test_one_document_has_no_interval() -> None:
    (line, total) = slice_scores(ledger_of({"prose": [[4.0, 2.0, 1.0]]}))
    for score in (line, total):
        assert score.nats_per_token == pytest.approx(7 / 3)
        assert score.nats_per_token_low is score.nats_per_token_high is None
        assert score.perplexity_low is score.perplexity_high is None
        assert score.bits_per_byte_low is score.bits_per_byte_high is None


def test_what_cannot_be_said_is_none() -> None:
    ledger = Ledger()
    ledger.add_tokens({"slice": ([0, 0], ["a"]), "document": ([0, 1], ["x", "y"])}, [1.0, 800.0])
    score = slice_scores(ledger)[0]
    assert score.bits_per_byte is None
    assert score.top1 is None
    assert score.perplexity_high == math.inf
    assert slice_scores(Ledger()) == []


def grouped_ledger(nll_DK: np.ndarray, group_D: list[str], slices: list[str]) -> Ledger:
    """Documents of K tokens each; `group_D` and `slices` say each one's group and slice."""
    ledger = Ledger()
    for number, (nll_K, group, slice_name) in enumerate(zip(nll_DK, group_D, slices, strict=True)):
        zeros_K = np.zeros(len(nll_K), int)
        ledger.add_tokens(
            {
                "slice": (zeros_K, [slice_name]),
                "document": (zeros_K, [str(number)]),
                "group": (zeros_K, [group]),
            },
            nll_K,
        )
    return ledger


def test_intervals_stand_on_groups() -> None:
    """Copies of a document say nothing new: the interval is that of one document of each group."""
    random = np.random.default_rng(3)
    once_GK = 2 + random.random((6, 5))
    groups = [f"file-{number}" for number in range(6)]
    once = slice_scores(grouped_ledger(once_GK, groups, ["a"] * 6))
    often = slice_scores(
        grouped_ledger(np.repeat(once_GK, 20, 0), np.repeat(groups, 20).tolist(), ["a"] * 120)
    )
    for few, many in zip(once, often, strict=True):
        assert (few.documents, few.groups, many.documents, many.groups) == (6, 6, 120, 6)
        assert many.nats_per_token_low == pytest.approx(few.nats_per_token_low)
        assert many.nats_per_token_high == pytest.approx(few.nats_per_token_high)


def test_the_interval_over_groups_covers_the_truth_where_that_over_documents_does_not() -> None:
    """30 files of 12 pairs each, whose difficulty is mostly the file's."""
    random = np.random.default_rng(11)
    repeats, by_group, by_document = 400, 0, 0
    for _ in range(repeats):
        file_G = 2.0 + 0.5 * random.standard_normal(30)
        x_GP = 10 * (file_G[:, None] + 0.2 * random.standard_normal((30, 12)))
        groups = ratio_estimate(x_GP.sum(1), np.full(30, 120.0))
        documents = ratio_estimate(x_GP.ravel(), np.full(360, 10.0))
        by_group += groups.low <= 2.0 <= groups.high
        by_document += documents.low <= 2.0 <= documents.high
    assert 0.9 <= by_group / repeats <= 0.99
    assert by_document / repeats < 0.6


def test_a_group_over_two_slices_is_one_cluster_of_the_total() -> None:
    nll_DK = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [4.0, 1.0]])
    a, b, total = slice_scores(grouped_ledger(nll_DK, ["f", "f", "g", "g"], ["a", "b", "a", "b"]))
    assert (a.groups, b.groups, total.documents, total.groups) == (2, 2, 4, 2)


def test_one_group_has_no_interval() -> None:
    (line, total) = slice_scores(grouped_ledger(np.ones((5, 3)), ["file"] * 5, ["a"] * 5))
    for score in (line, total):
        assert (score.documents, score.groups) == (5, 1)
        assert score.nats_per_token_low is score.nats_per_token_high is None


def test_without_groups_documents_are_the_clusters() -> None:
    ledger = ledger_of({"code": [[0.5, 1.5], [3.0]]})
    assert clusters(ledger) == "document" and slice_scores(ledger)[0].groups == 2
    ledger.merge(grouped_ledger(np.ones((2, 2)), ["f", "f"], ["code"] * 2))
    assert clusters(ledger) == "document", "groups are known for a part of the tokens only"
    assert slice_scores(ledger)[0].groups == 4


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=2, max_size=30))
def test_the_interval_of_a_share_stays_within_0_and_1_and_holds_it(drawn: list[tuple[int, int]]) -> None:
    right_G, size_G = np.array([(min(right, size), size) for right, size in drawn], float).T
    value, low, high = share_estimate(right_G, size_G)
    assert low is not None and high is not None
    assert 0 <= low <= value <= high <= 1
    assert value == pytest.approx(right_G.sum() / size_G.sum())
    mirrored = share_estimate(size_G - right_G, size_G)
    assert mirrored == pytest.approx((1 - value, 1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize("groups", [2, 8, 40])
def test_none_of_n_is_not_never(groups: int) -> None:
    """With the upper end as the true share, none of the groups is right in one case of 40."""
    high = share_estimate(np.zeros(groups), np.full(groups, 2.0)).high
    assert high is not None and (1 - high) ** groups == pytest.approx(0.025)
    assert high == pytest.approx(stats.beta.ppf(0.975, 1, groups))
    assert share_estimate([0.0], [5.0]) == Estimate(0.0, None, None)
