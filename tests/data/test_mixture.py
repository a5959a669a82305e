import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import token_datasets

from gyrocompass.core.errors import BadInput
from gyrocompass.data import mixture
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.pack import Packed
from gyrocompass.data.tokens import TokenDataset, TokenRow

datasets = token_datasets().filter(lambda dataset: dataset.n_targets > 0)
configs = st.builds(
    SamplerConfig,
    length=st.integers(1, 30),
    rows_per_step=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
)


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    """So that a run crosses many blocks."""
    with mock.patch.object(mixture, "BLOCK_ROWS", 3):
        yield


def assert_equal(left: Packed, right: Packed) -> None:
    for name, a, b in zip(Packed._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def sized(name: str, slice_name: str, n_inputs: int) -> TokenRow:
    n = n_inputs + 1
    return TokenRow(name, slice_name, "s", list(range(n)), [1] * n, [1.0] * n)


@settings(deadline=None, max_examples=100)
@given(datasets, configs)
def test_each_epoch_draws_each_piece_exactly_once(dataset: TokenDataset, config: SamplerConfig) -> None:
    windows = list(Sampler(dataset, config))
    targets = Counter(int(t) for window in windows for t in window.target_T[window.weight_T > 0])
    assert targets == {int(t): config.epochs for t in dataset.id_N[dataset.weight_N > 0]}
    assert all(window.rows == config.rows_per_step for window in windows[:-1])
    assert 1 <= windows[-1].rows <= config.rows_per_step


@settings(deadline=None, max_examples=30)
@given(datasets, configs)
def test_the_first_epoch_ends_before_the_second_begins(dataset: TokenDataset, config: SamplerConfig) -> None:
    sampler = Sampler(dataset, config.model_copy(update={"epochs": None, "rows_per_step": 1}))
    drawn: list[int] = []
    while len(drawn) < 2 * sampler.pieces.n_pieces:
        piece_B, after = sampler._draw(sampler._after)
        drawn += piece_B.tolist()
        sampler._after = after
    n = sampler.pieces.n_pieces
    first_block = sampler._draw(sampler._before)[0].tolist()
    drawn = first_block + drawn
    assert sorted(drawn[:n]) == sorted(drawn[n : 2 * n]) == list(range(n))


@settings(deadline=None, max_examples=60)
@given(datasets, configs, st.integers(0, 6))
def test_restoring_goes_on_identically(dataset: TokenDataset, config: SamplerConfig, steps: int) -> None:
    sampler = Sampler(dataset, config)
    for _ in range(steps):
        next(sampler, None)
    state = json.loads(json.dumps(sampler.state()))
    restored = Sampler(dataset, config)
    restored.restore(state)
    assert restored.state() == sampler.state()
    for expected, got in zip(sampler, restored, strict=True):
        assert_equal(expected, got)


@settings(deadline=None, max_examples=40)
@given(datasets, configs)
def test_windows_counts_the_windows(dataset: TokenDataset, config: SamplerConfig) -> None:
    sampler = Sampler(dataset, config)
    next(sampler)
    assert sampler.windows() == 1 + len(list(sampler))


def test_endless_data_goes_on() -> None:
    dataset = TokenDataset.of([sized("d", "a", 5), sized("e", "b", 3)])
    sampler = Sampler(dataset, SamplerConfig(length=5, rows_per_step=2, epochs=None))
    assert sampler.windows() is None
    assert all(next(sampler).rows == 2 for _ in range(100))


weights = st.fixed_dictionaries({"a": st.floats(0.01, 100), "b": st.floats(0.01, 100), "c": st.just(0.0)})


@settings(deadline=None, max_examples=60)
@given(weights, st.lists(st.integers(1, 20), min_size=6, max_size=20), st.integers(0, 5))
def test_mixture_follows_the_weights_within_a_piece(
    slice_weights: dict[str, float], sizes: list[int], seed: int
) -> None:
    rows = [sized(f"d{k}", "abc"[k % 3], size) for k, size in enumerate(sizes)]
    sampler = Sampler(
        TokenDataset.of(rows),
        SamplerConfig(length=8, rows_per_step=4, slice_weights=slice_weights, epochs=None, seed=seed),
    )
    for _ in range(30):
        next(sampler)
        drawn = sampler.drawn_tokens()
        total = sum(drawn.values())
        assert drawn["c"] == 0
        for name in "ab":
            share = slice_weights[name] / sum(slice_weights.values())
            assert abs(drawn[name] - share * total) <= 8  # a piece holds at most `length` tokens


def test_an_epoch_with_weights_holds_as_many_tokens() -> None:
    dataset = TokenDataset.of([sized("d", "a", 40), sized("e", "b", 10), sized("f", "c", 7)])
    config = SamplerConfig(length=10, rows_per_step=1, slice_weights={"a": 1, "b": 1, "c": 0}, epochs=2)
    sampler = Sampler(dataset, config)
    assert sum((window.segment_T >= 0).sum() for window in sampler) == 100
    assert sampler.drawn_tokens() == {"a": 50, "b": 50, "c": 0}


def test_seed_changes_the_order_and_nothing_else_does() -> None:
    dataset = TokenDataset.of([sized(f"d{k}", "a", 1 + k % 7) for k in range(60)])
    config = SamplerConfig(length=9, rows_per_step=4)
    first, again = next(Sampler(dataset, config)), next(Sampler(dataset, config))
    assert_equal(first, again)
    other = next(Sampler(dataset, config.model_copy(update={"seed": 1})))
    assert not np.array_equal(first.document_T, other.document_T)


@pytest.mark.parametrize(
    ("slice_weights", "message"),
    [
        ({"zebra": 1, "prose": 1}, "no slice zebra; known: code/library, empty, prose"),
        ({"code/librar": 1, "prose": 1}, "no slice code/librar; did you mean code/library"),
        ({"code/library": 1}, "no weight for empty, prose"),
        ({"code/library": 0, "prose": 0, "empty": 0}, "all 0"),
        ({"code/library": 1, "prose": 1, "empty": 1}, "nothing in empty counts"),
    ],
)
def test_slice_weights_that_do_not_fit(slice_weights: dict[str, float], message: str) -> None:
    rows = [sized("d", "code/library", 4), sized("e", "prose", 4)]
    rows.append(TokenRow("f", "empty", "s", [1, 2], [0, 0], [0, 0]))
    config = SamplerConfig(length=4, rows_per_step=1, slice_weights=slice_weights)
    with pytest.raises(BadInput, match=re.escape(message)):
        Sampler(TokenDataset.of(rows), config)


def test_state_of_other_data_or_config_is_refused() -> None:
    config = SamplerConfig(length=4, rows_per_step=1)
    state = Sampler(TokenDataset.of([sized("d", "a", 9)]), config).state()
    for dataset, other in [
        (TokenDataset.of([sized("e", "a", 9)]), config),
        (TokenDataset.of([sized("d", "a", 9)]), config.model_copy(update={"length": 5})),
    ]:
        with pytest.raises(BadInput, match="data position"):
            Sampler(dataset, other).restore(state)


def test_a_dataset_without_targets_is_refused() -> None:
    rows = [TokenRow("d", "a", "s", [1, 2], [0, 0], [0, 0])]
    with pytest.raises(BadInput, match="no token that counts"):
        Sampler(TokenDataset.of(rows), SamplerConfig(length=4, rows_per_step=1))


def test_each_epoch_has_its_own_order() -> None:
    dataset = TokenDataset.of([sized(f"d{k}", "a", 9) for k in range(30)])
    sampler = Sampler(dataset, SamplerConfig(length=9, rows_per_step=30, epochs=2))
    first, after = sampler._draw(sampler._before)
    second, _ = sampler._draw(after)
    assert sorted(first) == sorted(second) and first.tolist() != second.tolist()


def mixed(**settings: object) -> Sampler:
    """A sampler of 1000, 100 and 10 tokens, in pieces of ten."""
    sizes = {"large": 100, "middle": 10, "small": 1}
    rows = [sized(f"{name}{n}", name, 10) for name, pieces in sizes.items() for n in range(pieces)]
    options = {"length": 10, "rows_per_step": 1} | settings
    return Sampler(TokenDataset.of(rows), SamplerConfig.model_validate(options))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_a_temperature_raises_shares_to_its_inverse_and_they_are_drawn(temperature: float) -> None:
    sampler = mixed(temperature=temperature, epochs=3)
    raised = {
        name: (n / 1110) ** (1 / temperature) for name, n in (("large", 1000), ("middle", 100), ("small", 10))
    }
    planned = sampler.planned()
    for name, value in raised.items():
        assert planned[name] == pytest.approx(value / sum(raised.values()))
    while sampler.next_rows():
        pass
    drawn = sampler.drawn_tokens()
    assert sum(drawn.values()) == 3 * 1110
    assert all(
        abs(drawn[name] - planned[name] * 3330) <= 20 for name in drawn
    )  # two slices are a piece ahead


@settings(deadline=None, max_examples=40)
@given(
    most=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    epochs=st.integers(1, 3),
    weights=st.fixed_dictionaries(dict.fromkeys(("large", "middle", "small"), st.integers(1, 9))),
)
def test_no_slice_is_repeated_more_often_than_allowed(
    most: float, epochs: int, weights: dict[str, int]
) -> None:
    sampler = mixed(most_repeats=most, epochs=epochs, slice_weights=weights)
    while sampler.next_rows():
        pass
    drawn, sizes = sampler.drawn_tokens(), {"large": 1000, "middle": 100, "small": 10}
    assert all(drawn[name] <= most * size + 10 for name, size in sizes.items())
    total = min(epochs, most) * 1110
    assert abs(sum(drawn.values()) - total) <= 10, "what a cap takes goes to those that may have more"
    free = [name for name in sizes if drawn[name] < most * sizes[name] - 20]
    for one, other in itertools.pairwise(free):
        assert drawn[one] / weights[one] == pytest.approx(drawn[other] / weights[other], abs=10)


def test_caps_need_to_know_how_long_a_run_is() -> None:
    with pytest.raises(ValueError, match="needs epochs or tokens"):
        SamplerConfig(length=10, rows_per_step=1, epochs=None, most_repeats=2)
    assert mixed(most_repeats=1, epochs=None, tokens=1110).planned()["small"] == pytest.approx(10 / 1110)
    with pytest.raises(BadInput, match="more than 2 times"):
        mixed(most_repeats=2, epochs=None, tokens=10_000)
