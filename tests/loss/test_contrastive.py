"""InfoNCE and rankings against plain loops over texts, and InfoNCE on a window however it is split.

Shape legend: T positions, S sequences, D hidden width, Q queries.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit_batches import VOCABULARY, Model, Text, assert_is, assert_partition, batch_of, refuses

from gyrocompass.data.mixture import Sampler
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.reduce import normalise
from gyrocompass.model.load import new_causal_lm
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.source import Window
from gyrocompass.train.window import window_gradients


def text(random: np.random.Generator, unit: int, document: int, **labels: float) -> Text:
    tokens = random.integers(VOCABULARY, size=random.integers(3, 7)).tolist()
    return Text(tokens, int(random.integers(1, 3)), unit, document, labels)


def queries(seed: int) -> list[Text]:
    """Up to four queries with an answer, some hard negatives, some texts that stand there twice."""
    random = np.random.default_rng(seed)
    texts: list[Text] = []
    for unit in range(int(random.integers(1, 5))):
        roles = [0, 1, *[2] * int(random.integers(0, 3))]
        for role in random.permutation(roles):
            texts.append(text(random, unit, len(texts), role=float(role)))
            earlier = [t for t in texts[:-1] if t.labels["role"] == role or role]
            if earlier and random.random() < 0.3:
                texts[-1].tokens = list(earlier[int(random.integers(len(earlier)))].tokens)
        weight = float(random.choice([0.5, 1.0]))
        for one in texts:
            one.weight = weight if one.unit == unit else one.weight
    return texts


def infonce(model: Model, texts: list[Text], *, pooling: str, symmetric: bool) -> list[Tensor]:
    """The formula, candidate by candidate, at temperature 0.3."""

    def embedding(one: Text) -> Tensor:
        h_ND = model.hidden(one)
        h_D = h_ND[-1] if pooling == "last" else h_ND.mean(0)
        return h_D / h_D.norm()

    def similar(one: Text, other: Text) -> Tensor:
        return (embedding(one) @ embedding(other) / 0.3).exp()

    def read(one: Text) -> list[int]:
        return one.tokens[:-1]

    def of(unit: int, role: int) -> Text:
        return next(t for t in texts if (t.unit, t.labels["role"]) == (unit, role))

    units = sorted({t.unit for t in texts})
    values = []
    for unit in units:
        query, answer = of(unit, 0), of(unit, 1)
        others = [of(u, 1) for u in units if u != unit and read(of(u, 0)) != read(query)]
        others += [t for t in texts if t.labels["role"] == 2]
        others = [t for t in others if read(t) != read(answer)]
        own = similar(query, answer)
        value = -(own / (own + sum(similar(query, t) for t in others))).log()
        if symmetric:
            askers = [
                of(u, 0)
                for u in units
                if u != unit and read(of(u, 0)) != read(query) and read(of(u, 1)) != read(answer)
            ]
            value = (value - (own / (own + sum(similar(t, answer) for t in askers))).log()) / 2
        values.append(value)
    return values


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_formula_10_infonce_masks_duplicates(pooling: str, symmetric: bool, seed: int) -> None:
    texts = queries(seed)
    options = {"pooling": pooling, "symmetric": symmetric}
    weights = [t.weight for t in sorted(texts, key=lambda t: t.unit) if t.labels["role"] == 0]
    assert_is(
        {"infonce": {"temperature": 0.3, **options}},
        texts,
        lambda model, given: infonce(model, given, **options),  # type: ignore[arg-type]
        seed,
        weights,
    )


def test_a_query_and_its_copy_are_no_negatives_of_each_other() -> None:
    """The only other answer is the same passage, or another right answer: there is nothing to tell apart."""
    roles = [{"role": 0.0}, {"role": 1.0}]
    same_answer = [
        Text(t, 1, d // 2, d, roles[d % 2])
        for d, t in enumerate([[1, 2, 3], [4, 5, 6], [7, 8, 1], [4, 5, 6]])
    ]
    same_query = [
        Text(t, 1, d // 2, d, roles[d % 2])
        for d, t in enumerate([[1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8, 1]])
    ]
    read_twice = [Text(t, 1, 0, d % 2, roles[d % 2]) for d, t in enumerate([[1, 2, 3], [4, 5, 6]] * 2)]
    for texts in (same_answer, same_query, read_twice):
        for symmetric in (False, True):
            composite, model = parse_objectives([{"infonce": {"symmetric": symmetric}}]), Model(1)
            ((value, _),) = composite(model.answer(composite, batch := batch_of(texts)), batch).values()
            assert len(value) == 2 and not value.any()


def test_where_all_is_alike_infonce_is_the_logarithm_of_the_number_of_candidates() -> None:
    random = np.random.default_rng(0)
    texts = [text(random, n // 2, n, role=float(n % 2)) for n in range(10)]
    composite, batch = parse_objectives(["infonce"]), batch_of(texts)
    model = Model(0)
    answer = model.answer(composite, batch)
    ((value, _),) = composite(answer._replace(hidden_TD=torch.ones_like(answer.hidden_TD)), batch).values()  # type: ignore[arg-type]
    torch.testing.assert_close(value, torch.full_like(value, math.log(5)))


def test_formula_10_a_window_of_infonce_does_not_depend_on_its_micro_batches() -> None:
    random = np.random.default_rng(3)
    rows = [
        TokenRow(
            f"{role}-{unit}", "code", "test", random.integers(1, 30, 6), [1] * 6, [0, 0, 1, 1, 1, 1],
            unit=f"unit-{unit}", labels={"role": float(role)},
        )
        for unit in range(6)
        for role in (0, 1)
    ]  # fmt: skip
    data = TokenDataset.of(rows)

    def gradients(rows_per_micro_batch: int, objective: Any) -> tuple[float, list[Tensor]]:
        config = TrainConfig(
            steps=1, sequence_length=12, rows_per_step=5, rows_per_micro_batch=rows_per_micro_batch,
            objective=objective, precision="float64",
        )  # fmt: skip
        model = new_causal_lm(
            {"model_type": "llama", "vocab_size": 30, "hidden_size": 8, "intermediate_size": 8,
             "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16},
            seed=0,
        ).double()  # fmt: skip
        packed = next(Sampler(data, config.sampler()))
        assert packed is not None
        main = MainParameters(model)
        composite = parse_objectives(config.objective)
        loss = window_gradients(model, main, composite, Window(packed, data), config).loss
        return loss, [p.grad.clone() for p in main.trained.values() if p.grad is not None]

    objective = [{"infonce": {"symmetric": True}}, {"nll": {"weight": 0.1}}]
    loss, whole = gradients(5, objective)
    for rows_per_micro_batch in (1, 2):
        split_loss, split = gradients(rows_per_micro_batch, objective)
        assert split_loss == pytest.approx(loss, rel=1e-12)
        for ours, theirs in zip(split, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole)


def test_packing_order_changes_nothing() -> None:
    texts = queries(11) + [
        Text(t.tokens[::-1], t.prompt, t.unit + 10, t.document + 50, t.labels) for t in queries(12)
    ]
    composite, model = parse_objectives([{"infonce": {"symmetric": True}}]), Model(2)
    losses = []
    for order in (texts, sorted(texts, key=lambda t: (-t.unit, t.labels["role"]))):
        batch = batch_of(order, padding=1)
        losses.append(
            normalise(composite, [batch]).loss(composite(model.answer(composite, batch), batch), batch).loss
        )
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


# --- rankings ---


def ranked(seed: int, *, ties: bool = True) -> list[Text]:
    """Units of two to four sequences with a relevance, sometimes equal ones."""
    random = np.random.default_rng(seed)
    texts: list[Text] = []
    for unit in range(int(random.integers(1, 4))):
        size = int(random.integers(2, 5))
        relevances = random.integers(0, 3, size) if ties else random.permutation(size)
        weight = float(random.choice([0.5, 1.0]))
        for relevance in relevances:
            texts.append(text(random, unit, len(texts), relevance=float(relevance)))
            texts[-1].weight = weight
    return texts


def units_of(texts: list[Text]) -> list[list[Text]]:
    return [[t for t in texts if t.unit == unit] for unit in sorted({t.unit for t in texts})]


def score(model: Model, one: Text, power: float) -> Tensor:
    return torch.stack(model.logprobs(one)).sum() / len(one.counted) ** power


def margin_ranking(
    model: Model, texts: list[Text], *, by_rank: bool, power: float, mean: bool
) -> list[Tensor]:
    values = []
    for unit in units_of(texts):
        ranks = sorted({t.labels["relevance"] for t in unit})
        value, pairs = torch.zeros((), dtype=torch.float64), 0
        for better, worse in itertools.permutations(unit, 2):
            gap = ranks.index(better.labels["relevance"]) - ranks.index(worse.labels["relevance"])
            if gap > 0:
                margin = 0.4 * (gap if by_rank else 1)
                value = value + torch.relu(margin - score(model, better, power) + score(model, worse, power))
                pairs += 1
        values.append(value / max(pairs, 1) if mean else value)
    return values


def listmle(model: Model, texts: list[Text]) -> list[Tensor]:
    values = []
    for unit in units_of(texts):
        value = torch.zeros((), dtype=torch.float64)
        for one in unit:
            rest = [t for t in unit if t.labels["relevance"] <= one.labels["relevance"]]
            if any(t.labels["relevance"] < one.labels["relevance"] for t in rest):
                drawn = score(model, one, 1.0).exp() / sum(score(model, t, 1.0).exp() for t in rest)
                value = value - drawn.log()
        values.append(value)
    return values


def of_weight(texts: list[Text]) -> list[float]:
    return [
        unit[0].weight if len({t.labels["relevance"] for t in unit}) > 1 else 0.0 for unit in units_of(texts)
    ]


@pytest.mark.parametrize(
    ("by_rank", "power", "mean"), [(True, 1.0, False), (False, 0.0, True), (False, 0.5, False)]
)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**20))
def test_margin_ranking_is_its_formula(by_rank: bool, power: float, mean: bool, seed: int) -> None:
    texts = ranked(seed)
    options = {"by_rank": by_rank, "length_power": power, "mean_over_pairs": mean}
    assert_is(
        {"margin_ranking": {"margin": 0.4, **options}},
        texts,
        lambda model, given: margin_ranking(model, given, by_rank=by_rank, power=power, mean=mean),
        seed,
        of_weight(texts),
    )


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_listmle_is_its_formula(seed: int, ties: bool) -> None:
    texts = ranked(seed, ties=ties)
    assert_is("listmle", texts, listmle, seed, of_weight(texts))


def test_the_likelihoods_of_all_orders_sum_to_one() -> None:
    random = np.random.default_rng(5)
    texts, model = [text(random, 0, n) for n in range(4)], Model(5)
    composite, total = parse_objectives(["listmle"]), 0.0
    for order in itertools.permutations(range(4)):
        for one, relevance in zip(texts, order, strict=True):
            one.labels = {"relevance": float(relevance)}
        ((value, _),) = composite(model.answer(composite, batch := batch_of(texts)), batch).values()
        total += math.exp(-value.item())
    assert total == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("entry", [{"margin_ranking": {"margin": 0.3}}, "listmle"], ids=str)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**20))
def test_partition(entry: Any, seed: int) -> None:
    assert_partition(entry, ranked(seed), seed)


def test_a_unit_that_is_read_twice_is_two_groups() -> None:
    texts = ranked(8)
    composite, model = parse_objectives(["listmle"]), Model(8)
    once, twice = (
        composite(model.answer(composite, batch := batch_of(given)), batch)["listmle"]
        for given in (texts, texts + texts)
    )
    torch.testing.assert_close(twice.value.sum(), 2 * once.value.sum())
    assert len(twice.value) == 2 * len(once.value)


def test_equal_relevances_give_exactly_nothing() -> None:
    texts = [Text([1, 2, 3 + n], 1, 0, n, {"relevance": 1.0}) for n in range(3)]
    for name in ("listmle", "margin_ranking"):
        composite, model = parse_objectives([name]), Model(0)
        batch = batch_of(texts)
        loss = (
            normalise(composite, [batch]).loss(composite(model.answer(composite, batch), batch), batch).loss
        )
        assert loss.item() == 0 and not any(gradient.any() for gradient in model.gradients(loss))


def test_bad_data_is_refused() -> None:
    lone = [Text([1, 2], 1, unit, unit, {"relevance": 0.0, "role": float(unit)}) for unit in range(2)]
    refuses("listmle", lone, "2 units of one sequence have nothing to rank")
    refuses("margin_ranking", lone, "2 units of one sequence have nothing to rank")
    refuses("infonce", lone, "each needs one query and one answer")
    refuses("infonce", [Text([1, 2], 1, 0, n, {"role": float(n)}) for n in (0, 1, 3)], "each needs one query")
    refuses("infonce", [Text([1, 2], 1, 0, 0)], "no column 'role'")
