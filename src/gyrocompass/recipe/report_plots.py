"""The plots of a run's report, drawn as `gyrocompass.recipe.svg` says.

Shape legend: K points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gyrocompass.measure.intervals import SliceScore
from gyrocompass.recipe.report_scores import SliceGroup
from gyrocompass.recipe.report_training import Curve, FloatArray, Training
from gyrocompass.recipe.svg import COLOURS, DASHES, both, caption, mark, marker, series, style

MOST_POINTS = 700


def loss_plot(training: Training, order: Sequence[str]) -> str:
    """Nats per token over the steps for each slice; below, the learning rate and the norm of the gradient.

    Where the stage learned from rewarded samples, their mean reward stands at the bottom.

    Args:
        training: the stage.
        order: all slices of the report; a slice's place decides its colour.
    """
    curves = [(order.index(name), training.curve(name)) for name in training.slices]
    rewards = [(row["step"], row["rollout"]["reward"]) for row in training.steps if "rollout" in row]

    def draw(figure: Any) -> None:
        heights = (5, 1, 1, *([2] if rewards else []))
        loss, rate, norm, *reward = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        for index, curve in curves:
            _draw_curve(loss, index, curve)
        caption(loss, "nats per token")
        _draw_series(rate, _series(training, "learning_rate"), "learning rate")
        _draw_series(norm, _series(training, "gradient_norm"), "gradient norm")
        for axes in reward:
            _draw_series(axes, rewards, "mean reward of the step's samples", from_zero=False)
        if training.clip_norm is not None:
            norm.axhline(training.clip_norm, color=mark("muted"), linewidth=0.8, linestyle=(0, (4, 3)))
        if training.best_step is not None:
            loss.axvline(training.best_step, color=mark("muted"), linewidth=0.8)
        last = reward[0] if reward else norm
        last.set_xlabel("step", color=mark("muted"))
        last.locator_params(axis="x", integer=True)
        last.set_xlim(0, 1.01 * max((row["step"] for row in training.steps), default=1))

    height = 530 if rewards else 430
    return both(f"loss-{training.stage}", f"Loss of {training.stage} by slice", height, draw)


def _series(training: Training, key: str) -> list[tuple[float, float]]:
    """A number of each step that has it: (step, number)."""
    return [(row["step"], row[key]) for row in training.steps if row[key] is not None]


def _draw_curve(axes: Any, index: int, curve: Curve) -> None:
    colour, dashes = mark(series(index)), DASHES[index // COLOURS % len(DASHES)]
    axes.plot(*_thinned(curve.step_K, curve.nats_K), color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(*_thinned(curve.step_K, curve.smooth_K), color=colour, linewidth=1.7, linestyle=dashes)
    if curve.held_out:
        steps, nats = zip(*curve.held_out, strict=True)
        axes.plot(
            steps,
            nats,
            color=colour,
            linewidth=0.8,
            linestyle=(0, (2, 2)),
            marker=marker(index),
            markersize=5.5,
            markeredgecolor=mark("ink"),
            markeredgewidth=0.6,
        )


def _draw_series(axes: Any, points: list[tuple[float, float]], label: str, *, from_zero: bool = True) -> None:
    step_K, value_K = np.array(points, dtype=np.float64).reshape(-1, 2).T
    axes.plot(*_thinned(step_K, value_K), color=mark("ink"), linewidth=1.0)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    caption(axes, label)


def weight_plot(training: Training) -> str:
    """Each weight that changed, over the steps; empty where none did."""
    paths = training.moving_weights()

    def draw(figure: Any) -> None:
        rows = figure.subplots(len(paths), 1, sharex=True, squeeze=False)[:, 0]
        for axes, path in zip(rows, paths, strict=True):
            axes.plot(*_thinned(path.step_K, path.weight_K), color=mark("ink"), linewidth=1.0)
            axes.locator_params(axis="y", nbins=2)
            caption(axes, f"weight of {path.of} {path.name}")
        rows[-1].set_xlabel("step", color=mark("muted"))
        rows[-1].locator_params(axis="x", integer=True)

    if not paths:
        return ""
    return both(f"weights-{training.stage}", f"Weights of {training.stage}", 50 + 75 * len(paths), draw)


def score_plot(groups: Sequence[SliceGroup]) -> str:
    """Nats per token with 95% intervals, slice by slice, one point for each model: the later, the darker."""
    n_rows = sum(len(group.rows) + 1 for group in groups)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        middles = []
        top = 0
        for group in groups:
            middles.append(top + (len(group.rows) - 1) / 2)
            for model, row in enumerate(group.rows):
                if row.score is not None:
                    _draw_score(axes, row.score, top + model, model, shade(model, len(group.rows)))
            top += len(group.rows) + 1
            if group is not groups[-1]:
                axes.axhline(top - 1, color=mark("grid"), linewidth=0.8)
        axes.set_ylim(top - 1, -1)
        axes.set_yticks(middles, [group.slice for group in groups])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
        style(axes, "x")
        axes.tick_params(axis="y", labelcolor=mark("ink"))
        axes.set_xlabel("nats per token", color=mark("muted"))

    return both("scores", "Nats per token by slice and model", 50 + 15 * n_rows, draw)


def shade(model: int, models: int) -> float:
    """How dark a model is drawn: 1 is the last one."""
    return 1.0 - 0.65 * (models - 1 - model) / max(1, models - 1)


def _draw_score(axes: Any, score: SliceScore, place: float, model: int, alpha: float) -> None:
    look = {"color": mark("ink"), "alpha": alpha}
    low, high = score.nats_per_token_low, score.nats_per_token_high
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], linewidth=1.6, solid_capstyle="butt", **look)
        axes.plot([low, high], [place, place], linewidth=0, marker="|", markersize=8, **look)
    axes.plot([score.nats_per_token], [place], marker=marker(model), markersize=5, markeredgewidth=0, **look)


def _thinned(x_K: FloatArray, y_K: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most `MOST_POINTS` of the points, evenly spaced, the last among them."""
    stride = -(-len(x_K) // MOST_POINTS) or 1
    return x_K[::-1][::stride][::-1], y_K[::-1][::stride][::-1]
