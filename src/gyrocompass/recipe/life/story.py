"""The story of a model's life as one page: what happened, why, and how one would know.

    what the scenes told, the run's record --write_story--> life.html, which needs nothing but itself

The same numbers stand beside it as JSON. All text of people and models is escaped; there is no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gyrocompass.core.folder import write_whole
from gyrocompass.core.store import Store
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.record import RunRecord
from gyrocompass.recipe.report_judgement import page_template

STORY = "life.json"
_ORDER = ("answer", "caveat", "abstain", "review", "block")
_KINDS = {"code": "about code", "foreign": "about something else", "unsafe": "unsafe"}


class Scored(NamedTuple):
    """A model on held-out documents."""

    model: str
    nats: float
    low: float | None
    high: float | None
    bits_per_byte: float | None


def write_story(told: dict[str, Any], store: Store, record: RunRecord, path: Path) -> None:
    """Write the page.

    Args:
        told: by the scenes.
        store: of the run.
        record: of the recipe that made the models.
        path: of the page.
    """
    scored = _scored(record, store)
    page = page_template("life.html.j2").render(
        told=told,
        record=record,
        scored=scored,
        documents=_documents(record, store),
        outcomes=_outcomes(told["asked"]["outcomes"]),
        scores_plot=_scores_plot(scored),
        outcomes_plot=_outcomes_plot(told["asked"]["outcomes"]),
        canary_plot=_trial_plot("canary", told["taken_back"]["path"]),
        ab_plot=_trial_plot("ab", (told.get("learned") or {}).get("path") or []),
    )
    write_whole(path, page)


def _scored(record: RunRecord, store: Store) -> list[Scored]:
    found = []
    for stage in record.stages:
        if stage.kind == "score":
            ledger = Ledger.load(store.open(stage.artifact, verify=False).path / "ledger.parquet")
            total = next(row for row in slice_scores(ledger) if row.slice == "total")
            low, high = total.nats_per_token_low, total.nats_per_token_high
            found.append(Scored(stage.inputs["model"], total.nats_per_token, low, high, total.bits_per_byte))
    return found


def _documents(record: RunRecord, store: Store) -> dict[str, Any]:
    artifact = next(stage.artifact for stage in record.stages if stage.name == "documents")
    return dict(store.open(artifact, verify=False).manifest.counts)


def _outcomes(rows: Sequence[Sequence[Any]]) -> dict[str, dict[str, int]]:
    """By kind of question, and then by what became of it."""
    found: dict[str, dict[str, int]] = {}
    for kind, decision, count in rows:
        found.setdefault(_KINDS[kind], {})[decision] = count
    return found


def _scores_plot(scored: Sequence[Scored]) -> str:
    from gyrocompass.recipe.svg import both, caption, mark, series

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        caption(axes, "nats per token of held-out documents (less is better), with 95% intervals")
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=mark("grid"), linewidth=0.8)
        for place, one in enumerate(scored):
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [place, place], color=mark(series(0)), linewidth=3)
            axes.plot([one.nats], [place], marker="o", color=mark(series(0)), markersize=7)
        axes.set_yticks(range(len(scored)), [one.model for one in scored], parse_math=False)
        axes.set_ylim(len(scored) - 0.5, -0.5)

    return both("life-scores", "Loss of each model", 70 + 30 * len(scored), draw)


def _outcomes_plot(rows: Sequence[Sequence[Any]]) -> str:
    from gyrocompass.recipe.svg import both, caption, mark, series

    found = _outcomes(rows)
    names = [name for name in _ORDER if any(name in own for own in found.values())]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        caption(axes, "questions, by what they are about and what became of them")
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=mark("grid"), linewidth=0.8)
        for row, own in enumerate(found.values()):
            left = 0
            for name in names:
                width = own.get(name, 0)
                colour = mark(series(_ORDER.index(name)))
                axes.barh([row], [width], left=left, height=0.6, color=colour)
                if width:
                    middle = left + width / 2
                    axes.text(
                        middle, row + 0.45, f"{name} {width}", ha="center", va="top", fontsize=10,
                        color=mark("ink"),
                    )  # fmt: skip
                left += width
        axes.set_yticks(range(len(found)), list(found), parse_math=False)
        axes.set_ylim(len(found) - 0.3, -0.6)

    return both("life-outcomes", "What the gate did", 90 + 62 * len(found), draw)


def _trial_plot(name: str, path: Sequence[dict[str, Any]]) -> str:
    """Shares of users without an answer in both arms, and how sure one may be, as users come."""
    if not path:
        return ""
    from gyrocompass.recipe.svg import both, caption, mark, series

    users = [one["champion_users"] + one["challenger_users"] for one in path]

    def draw(figure: Any) -> None:
        shares, evidence = figure.subplots(1, 2)
        caption(shares, "users without an answer, against users")
        for side, colour, shown in (("champion", 0, "o"), ("challenger", 1, "s")):
            values = [one[f"{side}_bad"] / max(1, one[f"{side}_users"]) for one in path]
            shares.plot(users, values, marker=shown, color=mark(series(colour)), linewidth=1.5)
            shares.annotate(side, (users[-1], values[-1]), xytext=(-4, 6), textcoords="offset points",
                            ha="right", color=mark(series(colour)))  # fmt: skip
        shares.set_ylim(-0.05, 1.1)
        caption(evidence, "p-values, right at any time (log scale)")
        for key, colour, shown in (("p_crossed", 3, "^"), ("p_within", 2, "D")):
            values = [max(one[key], 1e-6) for one in path]
            evidence.semilogy(users, values, marker=shown, color=mark(series(colour)), linewidth=1.5)
            label = "it is worse by more than allowed" if key == "p_crossed" else "it is not"
            evidence.annotate(label, (users[-1], values[-1]), xytext=(-4, 6), textcoords="offset points",
                              ha="right", color=mark(series(colour)))  # fmt: skip
        evidence.axhline(0.05, color=mark("muted"), linewidth=1)
        evidence.set_ylim(5e-7, 3)

    return both(f"life-{name}", "The trial", 300, draw)
