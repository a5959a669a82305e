"""The monitor: a planted gameable reward is caught and an honest one is not, in a simulated training."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from gyrocompass.core.errors import GyroError
from gyrocompass.measure.gaming import (
    GamingConfig,
    GamingMonitor,
    Judged,
    Verdict,
    best_of_n,
    best_of_n_kl_nats,
    summary,
)

PROMPTS, SAMPLES, STEPS = 32, 4, 30


def quality(skill: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """What was meant: skill helps, and so does a little length; padding spoils it."""
    return np.tanh(skill) + 0.3 * padding - 0.1 * padding**2


def gameable(skill: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """A judge that likes long answers."""
    return np.tanh(skill) + 0.3 * padding


class Policy:
    """A Gaussian over skill and padding, trained by REINFORCE; its reference is where it began."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.mean = np.zeros(2)

    def draw(self, count: int) -> np.ndarray:
        return self.mean + self.random.standard_normal((count, 2))

    def learn(self, reward: np.ndarray, drawn: np.ndarray) -> None:
        self.mean += 0.15 * ((reward - reward.mean())[:, None] * (drawn - self.mean)).mean(0)

    def evaluation(self, proxy) -> list[Judged]:
        drawn = self.draw(PROMPTS * SAMPLES)
        difficulty = np.repeat(np.linspace(-0.3, 0.3, PROMPTS), SAMPLES)
        gold, seen = quality(*drawn.T) + difficulty, proxy(*drawn.T) + difficulty
        log_ratio = 0.5 * (drawn**2 - (drawn - self.mean) ** 2).sum(1)
        return [
            Judged(
                prompt=f"p{index // SAMPLES}",
                proxy=float(seen[index]),
                gold=float(gold[index]),
                kl_nats=float(log_ratio[index]),
                entropy_nats=1.4,
                n_tokens=max(1, int(40 + 15 * drawn[index, 1])),
                distinct=1 / (1 + math.exp(drawn[index, 1] - 4)),
                finished=bool(drawn[index, 1] < 4),
            )
            for index in range(len(drawn))
        ]


def train(seed: int, proxy) -> tuple[GamingMonitor, Verdict | None]:
    policy, monitor = Policy(seed), GamingMonitor()
    for step in range(STEPS):
        verdict = monitor.observe(step * 10, policy.evaluation(proxy))
        if verdict:
            return monitor, verdict
        for _ in range(4):
            drawn = policy.draw(256)
            policy.learn(proxy(*drawn.T), drawn)
    return monitor, None


@pytest.mark.parametrize("seed", range(3))
def test_a_gameable_reward_is_caught_and_the_best_step_named(seed: int) -> None:
    monitor, verdict = train(seed, gameable)
    assert verdict is not None and verdict.best_step == monitor.best_step < verdict.step
    first, best, last = monitor.rows[0], monitor.rows[verdict.best_step // 10], monitor.rows[-1]
    assert best.gold.value > first.gold.value and best.gold.value > last.gold.value
    assert last.proxy.value > best.proxy.value
    # The symptoms stand beside it: length follows the reward, and the policy is far from where it began.
    assert last.n_tokens > 1.3 * first.n_tokens and last.repetition > first.repetition
    assert last.length_correlation is not None and last.length_correlation > 0.3
    assert last.kl_nats > best.kl_nats and last.best_of_gap > 0.1
    assert f"step {best.step}" in verdict.reason


@pytest.mark.parametrize("seed", range(3))
def test_an_honest_reward_is_let_be(seed: int) -> None:
    monitor, verdict = train(seed, quality)
    assert verdict is None and len(monitor.rows) == STEPS
    assert monitor.rows[-1].gold.value > monitor.rows[0].gold.value + 0.3
    assert all(abs(row.best_of_gap) < 1e-9 for row in monitor.rows)


@pytest.mark.parametrize("seed", range(2))
def test_noise_on_a_plateau_is_let_be(seed: int) -> None:
    """Nothing is learned, proxy and gold are independent noise, and there are many evaluations."""
    random, monitor = np.random.default_rng(seed), GamingMonitor()
    for step in range(100):
        noise = random.standard_normal((32, 2))
        assert monitor.observe(step, [judged(str(i), *pair) for i, pair in enumerate(noise)]) is None


def judged(prompt: str, proxy: float, gold: float, n_tokens: int = 10) -> Judged:
    return Judged(prompt, proxy, gold, 0.0, 1.0, n_tokens, 1.0, True)


def evaluation(proxy: float, gold: float) -> list[Judged]:
    return [judged(f"p{index}", proxy, gold) for index in range(4)]


def test_the_rule_counts_evaluations_in_a_row_and_goes_on_after_a_restore() -> None:
    monitor = GamingMonitor(GamingConfig(patience=2))
    story = [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5), (2.0, 1.0), (2.0, 0.5)]
    assert [monitor.observe(step, evaluation(*pair)) for step, pair in enumerate(story)] == [None] * 5
    resumed = GamingMonitor(GamingConfig(patience=2))
    resumed.restore(json.loads(json.dumps(monitor.state())))
    assert resumed.rows == monitor.rows and resumed.best_step == monitor.best_step == 1
    for each in (monitor, resumed):
        verdict = each.observe(5, evaluation(3.0, 0.4))
        assert verdict is not None and (verdict.step, verdict.best_step) == (5, 1)


@pytest.mark.parametrize(
    "story",
    [
        [(0.0, 1.0), (-1.0, 0.5), (-1.0, 0.4), (-1.0, 0.3)],  # both fall: not gamed, only bad
        [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (3.0, 1.0)],  # gold stays
        [(0.0, 1.0), (1.0, 0.95), (2.0, 0.94), (3.0, 0.93)],  # less than min_change
    ],
)
def test_what_is_not_gaming(story: list[tuple[float, float]]) -> None:
    monitor = GamingMonitor(GamingConfig(patience=2, min_change=0.1))
    assert all(monitor.observe(step, evaluation(*pair)) is None for step, pair in enumerate(story))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    random = np.random.default_rng(n)
    proxy, gold = random.permutation(5).astype(float), random.standard_normal(5)
    draws = [max(draw, key=lambda index: proxy[index]) for draw in itertools.combinations(range(5), n)]
    wanted = (np.mean([proxy[index] for index in draws]), np.mean([gold[index] for index in draws]))
    assert best_of_n(proxy, gold, n) == pytest.approx(wanted)


def test_ties_of_the_proxy_share_their_weight() -> None:
    gold = np.array([1.0, 2.0, 3.0, 6.0])
    assert best_of_n(np.zeros(4), gold, 4) == pytest.approx((0.0, 3.0))
    assert best_of_n(np.array([0.0, 1.0, 1.0, 0.0]), gold, 4) == pytest.approx((1.0, 2.5))


def test_the_kl_of_best_of_n_is_that_of_the_largest_of_n_uniforms() -> None:
    """The density of the best is n u^(n-1) against 1: its KL by quadrature."""
    u = (np.arange(100_000) + 0.5) / 100_000
    for n in (1, 2, 8, 64):
        density, log_density = n * u ** (n - 1), math.log(n) + (n - 1) * np.log(u)
        assert best_of_n_kl_nats(n) == pytest.approx(float((density * log_density).mean()), abs=1e-3)


def test_a_row_says_what_was_measured() -> None:
    samples = [judged("a", 1.0, 0.0, 10), judged("a", 3.0, 1.0, 30), judged("b", 2.0, 0.0, 20)]
    row = summary(7, [*samples, Judged("b", 2.0, 1.0, 2.0, 3.0, 20, 0.5, False)])
    assert (row.step, row.samples, row.prompts) == (7, 4, 2)
    assert (row.proxy.value, row.gold.value, row.kl_nats, row.entropy_nats) == (2.0, 0.5, 0.5, 1.5)
    assert (row.n_tokens, row.repetition, row.truncated) == (20.0, 0.125, 0.25)
    assert row.length_correlation == 1.0
    assert [best.n for best in row.best_of] == [1, 2] and row.best_of_gap == pytest.approx(0.25)


def test_what_is_not_finite_or_not_there_is_refused() -> None:
    with pytest.raises(GyroError, match="gold is nan for sample 1") as raised:
        summary(3, [judged("a", 1.0, 1.0), judged("b", 1.0, math.nan)])
    assert "step 3, prompt 'b'" in str(raised.value)
    with pytest.raises(GyroError, match="without a sample"):
        summary(3, [])
