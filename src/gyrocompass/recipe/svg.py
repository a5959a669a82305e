"""Drawings as SVG that take their colours and their font from the page they stand in.

    draw(figure) --both--> two <svg>, for a wide and for a narrow page; the page's CSS shows one of them

Colours are drawn as marks (`mark`) that become CSS variables afterwards, so that one drawing serves the light
and the dark scheme; text stays text. Each plot is drawn for a wide and for a narrow page, as text in an SVG
that is scaled down cannot be read. The output depends on the data alone: no dates, no random ids.

Through Matplotlib's object API alone: no `pyplot`, no state of the process.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

WIDE, NARROW = 1080, 380
"""Widths in CSS pixels."""
COLOURS = 6
"""Series colours of the page, `--series-0` and so on; they tell apart with any colour vision."""
MARKERS = {"o": "\u25cf", "s": "\u25a0", "^": "\u25b2", "D": "\u25c6", "v": "\u25bc", "P": "\u271a"}
"""Matplotlib's markers, and how the page's legends write them."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""Of the first six series, of the next six, and so on."""
FONT_SIZE = 12


def mark(variable: str) -> str:
    """A colour that no drawing uses, which stands for a CSS variable of the page."""
    return f"#5e77{_VARIABLES.index(variable):02x}"


_VARIABLES = ["ink", "muted", "grid", *(f"series-{index}" for index in range(COLOURS))]


def series(index: int) -> str:
    """The CSS variable of a series' colour."""
    return f"series-{index % COLOURS}"


def marker(index: int) -> str:
    """A series' marker."""
    return list(MARKERS)[index % len(MARKERS)]


def caption(axes: Any, text: str) -> None:
    """What is drawn, over the axes: it needs no room at the side."""
    title = axes.set_title(text, loc="left", fontsize=FONT_SIZE, color=mark("muted"), pad=4)
    title.set_parse_math(False)
    style(axes, "y")


def style(axes: Any, grid_axis: str) -> None:
    """The page's look: a grid along one axis, a line at the bottom, muted labels."""
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid_axis, color=mark("grid"), linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(mark("muted"))
    axes.tick_params(length=3, color=mark("muted"), labelcolor=mark("muted"), labelsize=FONT_SIZE)
    axes.tick_params(axis="y", length=0)


def both(name: str, title: str, height: int, draw: Callable[[Any], None]) -> str:
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
