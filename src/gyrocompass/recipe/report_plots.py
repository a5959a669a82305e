"""The plots of a report, as SVG that takes its colours and its font from the page it stands in.

Colours are drawn as marks (`_mark`) that become CSS variables afterwards, so that one drawing serves the
light and the dark scheme; text stays text. Each plot is drawn for a wide and for a narrow page, as text in
an SVG that is scaled down cannot be read. The output depends on the data alone: no dates, no random ids.

Through Matplotlib's object API alone: no `pyplot`, no state of the process.

Shape legend: K points of a curve.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gyrocompass.measure.intervals import SliceScore
from gyrocompass.recipe.report_scores import SliceGroup
from gyrocompass.recipe.report_training import Curve, FloatArray, Training

WIDE, NARROW = 1080, 380
"""Widths in CSS pixels."""
COLOURS = 6
"""Series colours of the page, `--series-0` and so on; they tell apart with any colour vision."""
MARKERS = {"o": "\u25cf", "s": "\u25a0", "^": "\u25b2", "D": "\u25c6", "v": "\u25bc", "P": "\u271a"}
"""Matplotlib's markers, and how the page's legends write them."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""Of the first six series, of the next six, and so on."""
MOST_POINTS = 700
FONT_SIZE = 12


def _mark(variable: str) -> str:
    """A colour that no drawing uses, which stands for a CSS variable."""
    return f"#5e77{_VARIABLES.index(variable):02x}"


_VARIABLES = ["ink", "muted", "grid", *(f"series-{index}" for index in range(COLOURS))]


def series(index: int) -> str:
    """The CSS variable of a series' colour."""
    return f"series-{index % COLOURS}"


def marker(index: int) -> str:
    """A series' marker."""
    return list(MARKERS)[index % len(MARKERS)]


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
        _label(loss, "nats per token")
        _draw_series(rate, _series(training, "learning_rate"), "learning rate")
        _draw_series(norm, _series(training, "gradient_norm"), "gradient norm")
        for axes in reward:
            _draw_series(axes, rewards, "mean reward of the step's samples", from_zero=False)
        if training.clip_norm is not None:
            norm.axhline(training.clip_norm, color=_mark("muted"), linewidth=0.8, linestyle=(0, (4, 3)))
        if training.best_step is not None:
            loss.axvline(training.best_step, color=_mark("muted"), linewidth=0.8)
        last = reward[0] if reward else norm
        last.set_xlabel("step", color=_mark("muted"))
        last.locator_params(axis="x", integer=True)
        last.set_xlim(0, 1.01 * max((row["step"] for row in training.steps), default=1))

    height = 530 if rewards else 430
    return _both(f"loss-{training.stage}", f"Loss of {training.stage} by slice", height, draw)


def _series(training: Training, key: str) -> list[tuple[float, float]]:
    """A number of each step that has it: (step, number)."""
    return [(row["step"], row[key]) for row in training.steps if row[key] is not None]


def _draw_curve(axes: Any, index: int, curve: Curve) -> None:
    colour, dashes = _mark(series(index)), DASHES[index // COLOURS % len(DASHES)]
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
            markeredgecolor=_mark("ink"),
            markeredgewidth=0.6,
        )


def _draw_series(axes: Any, points: list[tuple[float, float]], label: str, *, from_zero: bool = True) -> None:
    step_K, value_K = np.array(points, dtype=np.float64).reshape(-1, 2).T
    axes.plot(*_thinned(step_K, value_K), color=_mark("ink"), linewidth=1.0)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    _label(axes, label)


def weight_plot(training: Training) -> str:
    """Each weight that changed, over the steps; empty where none did."""
    paths = training.moving_weights()

    def draw(figure: Any) -> None:
        rows = figure.subplots(len(paths), 1, sharex=True, squeeze=False)[:, 0]
        for axes, path in zip(rows, paths, strict=True):
            axes.plot(*_thinned(path.step_K, path.weight_K), color=_mark("ink"), linewidth=1.0)
            axes.locator_params(axis="y", nbins=2)
            _label(axes, f"weight of {path.of} {path.name}")
        rows[-1].set_xlabel("step", color=_mark("muted"))
        rows[-1].locator_params(axis="x", integer=True)

    if not paths:
        return ""
    return _both(f"weights-{training.stage}", f"Weights of {training.stage}", 50 + 75 * len(paths), draw)


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
                axes.axhline(top - 1, color=_mark("grid"), linewidth=0.8)
        axes.set_ylim(top - 1, -1)
        axes.set_yticks(middles, [group.slice for group in groups])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
        _style(axes, "x")
        axes.tick_params(axis="y", labelcolor=_mark("ink"))
        axes.set_xlabel("nats per token", color=_mark("muted"))

    return _both("scores", "Nats per token by slice and model", 50 + 15 * n_rows, draw)


def shade(model: int, models: int) -> float:
    """How dark a model is drawn: 1 is the last one."""
    return 1.0 - 0.65 * (models - 1 - model) / max(1, models - 1)


def _draw_score(axes: Any, score: SliceScore, place: float, model: int, alpha: float) -> None:
    look = {"color": _mark("ink"), "alpha": alpha}
    low, high = score.nats_per_token_low, score.nats_per_token_high
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], linewidth=1.6, solid_capstyle="butt", **look)
        axes.plot([low, high], [place, place], linewidth=0, marker="|", markersize=8, **look)
    axes.plot([score.nats_per_token], [place], marker=marker(model), markersize=5, markeredgewidth=0, **look)


# --- the page's own look ---


def _label(axes: Any, text: str) -> None:
    """What is drawn, over the axes: it needs no room at the side."""
    title = axes.set_title(text, loc="left", fontsize=FONT_SIZE, color=_mark("muted"), pad=4)
    title.set_parse_math(False)
    _style(axes, "y")


def _style(axes: Any, grid_axis: str) -> None:
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid_axis, color=_mark("grid"), linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_mark("muted"))
    axes.tick_params(length=3, color=_mark("muted"), labelcolor=_mark("muted"), labelsize=FONT_SIZE)
    axes.tick_params(axis="y", length=0)


def _thinned(x_K: FloatArray, y_K: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most `MOST_POINTS` of the points, evenly spaced, the last among them."""
    stride = -(-len(x_K) // MOST_POINTS) or 1
    return x_K[::-1][::stride][::-1], y_K[::-1][::stride][::-1]


def _both(name: str, title: str, height: int, draw: Callable[[Any], None]) -> str:
    """The drawing for wide and for narrow pages; the page's CSS shows one of them."""
    return "\n".join(
        _svg(f"{name}-{kind}", title, width, height, kind, draw)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    )


def _svg(name: str, title: str, width: int, height: int, kind: str, draw: Callable[[Any], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": FONT_SIZE}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        with warnings.catch_warnings():
            # The page's font is not Matplotlib's, so what that one lacks does not matter.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_METADATA))
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _adapted(tag.group(), name), body)
    opening = (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    )
    return f'{opening} aria-label="{_attribute(title)}">{body}'


_METADATA = ("Creator", "Date", "Format", "Type")


def _adapted(tag: str, name: str) -> str:
    """One tag with the page's colours and font, and with ids that no other drawing has."""
    tag = re.sub(r"#5e77([0-9a-f]{2})", lambda mark: f"var(--{_VARIABLES[int(mark.group(1), 16)]})", tag)
    # One form or the other, by Matplotlib's version.
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*|font-family: [^;\"]*", _page_font, tag)
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{_identifier(name)}-", tag)
    return tag.replace("xlink:href", "href")


def _page_font(style: re.Match[str]) -> str:
    size = style.group(1)
    return f"font: {size} var(--font)" if size else "font-family: var(--font)"


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
