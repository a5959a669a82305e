"""Small drawings as SVG: classes alone, no styles, so that a strict content policy holds.

Colours are the style sheet's; a drawing says in words what it shows, for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT = 640, 180
_LEFT, _BOTTOM, _TOP, _RIGHT = 46, 24, 10, 10


def bars(values: Sequence[float], labels: Sequence[str], title: str) -> Markup:
    """A bar for each value, with its label below."""
    most = max([*values, 0.0]) or 1.0
    wide = (_WIDTH - _LEFT - _RIGHT) / max(1, len(values))
    parts = [_grid(0.0, most)]
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        x = _LEFT + place * wide
        y = _y(value, 0.0, most)
        height = _HEIGHT - _BOTTOM - y
        told = Markup("<title>{}: {:g}</title>").format(label, value)
        bar = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')
        parts.append(bar.format(x + 1, y, max(1.0, wide - 2), max(0.0, height), told))
        name = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        parts.append(name.format(x + wide / 2, _HEIGHT - 7, label))
    return _drawing(parts, title)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Markup:
    """A line for each series of (x, y)."""
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return Markup('<p class="muted">nothing to draw yet</p>')
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    high = high if high > low else low + 1
    across = (_WIDTH - _LEFT - _RIGHT) / ((right - left) or 1)
    parts = [_grid(low, high)]
    for number, (name, line) in enumerate(sorted(series.items())):
        path = " ".join(
            f"{_LEFT + (x - left) * across:.1f},{_y(y, low, high):.1f}" for x, y in line if math.isfinite(y)
        )
        drawn = Markup('<polyline class="line s{}" points="{}"><title>{}</title></polyline>')
        parts.append(drawn.format(number % 6, path, name))
    for x, anchor in ((left, "start"), (right, "end")):
        at = _LEFT + (x - left) * across
        label = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{:g}</text>')
        parts.append(label.format(at, _HEIGHT - 7, anchor, x))
    return _drawing(parts, title)


def _grid(low: float, high: float) -> Markup:
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        y = _y(value, low, high)
        rule = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        label = Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>')
        parts.append(rule.format(_LEFT, _WIDTH - _RIGHT, y, y))
        parts.append(label.format(_LEFT - 6, y + 4, f"{value:.3g}"))
    return Markup("").join(parts)


def _y(value: float, low: float, high: float) -> float:
    return _TOP + (_HEIGHT - _BOTTOM - _TOP) * (1 - (value - low) / ((high - low) or 1))


def _drawing(parts: Sequence[Markup], title: str) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        _WIDTH, _HEIGHT, title
    )
    return head + Markup("").join(parts) + Markup("</svg>")
