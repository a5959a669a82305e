"""How numbers are written in a report. What was not measured is a dash, never 0."""

from __future__ import annotations

import math
from typing import NamedTuple

# Part of this module, so that a report has one place for all that it writes.
from gyrocompass.measure.figures import DASH as DASH
from gyrocompass.measure.figures import MINUS
from gyrocompass.measure.figures import figure as figure
from gyrocompass.measure.figures import interval as interval


class Likelihood(NamedTuple):
    """How likely a token was, as a step of the colour scale."""

    step: int
    least: float
    """The least probability of this step."""
    label: str


SCALE = (
    Likelihood(0, 0.9, "90% and more"),
    Likelihood(1, 0.5, "50 to 90%"),
    Likelihood(2, 0.2, "20 to 50%"),
    Likelihood(3, 0.05, "5 to 20%"),
    Likelihood(4, 0.01, "1 to 5%"),
    Likelihood(5, 0.0, "under 1%"),
)


def signed(value: float | None) -> str:
    """A difference, with its sign.

    >>> signed(0.25), signed(-0.25), signed(None)
    ('+0.250', '\N{MINUS SIGN}0.250', '\N{EN DASH}')
    """
    return f"+{figure(value)}" if value is not None and value > 0 else figure(value)


def small(value: float | None) -> str:
    """Four significant digits, and all those before the point, for terms of an objective of any size.

    >>> small(3.0), small(0.0021), small(None), small(1189.4)
    ('3.000', '0.002100', '\N{EN DASH}', '1,189')
    """
    if value is None:
        return DASH
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:#.4g}".replace("-", MINUS)


def count(value: float | None) -> str:
    """A whole number with separators.

    >>> count(1234567), count(None)
    ('1,234,567', '\N{EN DASH}')
    """
    return DASH if value is None else f"{value:,.0f}"


def counted(value: float | None, thing: str) -> str:
    """How many of a thing there are, in words.

    >>> counted(1, "group"), counted(1200, "group")
    ('1 group', '1,200 groups')
    """
    return f"{count(value)} {thing}{'' if value == 1 else 's'}"


def brief(value: float | None) -> str:
    """A large number in three digits.

    >>> brief(999), brief(4_210_000), brief(1.5e9)
    ('999', '4.21 M', '1.5 G')
    """
    if value is None:
        return DASH
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return count(value)


def share(value: float | None) -> str:
    """A share in percent.

    >>> share(0.4217), share(None)
    ('42.2%', '\N{EN DASH}')
    """
    return DASH if value is None else f"{value:.1%}"


def seconds(value: float | None) -> str:
    """A duration.

    >>> seconds(0.42), seconds(83), seconds(7260), seconds(None)
    ('0.4 s', '1 min 23 s', '2 h 1 min', '\N{EN DASH}')
    """
    if value is None:
        return DASH
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def when(value: str) -> str:
    """A UTC time in ISO 8601, to the minute.

    >>> when("2026-03-01T12:34:56+00:00")
    '2026-03-01 12:34'
    """
    return value[:16].replace("T", " ")


def likelihood(logprob: float) -> int:
    """The step of the colour scale that a log-probability (nats) is on.

    >>> likelihood(0.0), likelihood(math.log(0.3)), likelihood(-20.0)
    (0, 2, 5)
    """
    return next(level.step for level in SCALE if math.exp(logprob) >= level.least)
