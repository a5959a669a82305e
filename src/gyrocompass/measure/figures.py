"""How figures and their intervals are written, on the terminal and in reports.

What was not measured is a dash, never 0.
"""

from __future__ import annotations

import math

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def figure(value: float | None) -> str:
    """Four digits, at most three after the point, and more before it where there are more.

    >>> figure(2.5), figure(31.04), figure(8192.3), figure(-0.25), figure(None), figure(float("nan"))
    ('2.500', '31.04', '8,192', '\N{MINUS SIGN}0.250', '\N{EN DASH}', 'NaN')
    """
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else f"{MINUS}inf"
    decimals = 3 if value == 0 else min(max(3 - math.floor(math.log10(abs(value))), 0), 3)
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def interval(low: float | None, high: float | None) -> str:
    """A 95% interval in brackets; a dash in them where none can be had.

    >>> interval(2.25, 2.75), interval(None, None)
    ('[2.250, 2.750]', '[\N{EN DASH}]')
    """
    return f"[{DASH}]" if low is None or high is None else f"[{figure(low)}, {figure(high)}]"
