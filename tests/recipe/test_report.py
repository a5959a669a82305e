import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_run import HOSTILE, SLICES, FinishedRun, demo_run, poisonous_step, scored
from rich.console import Console

from gyrocompass.measure.gaming import Judged, summary
from gyrocompass.measure.intervals import ratio_estimate, slice_scores
from gyrocompass.measure.ledger import FIELDS
from gyrocompass.recipe.record import RunRecord
from gyrocompass.recipe.report import print_report, write_report
from gyrocompass.recipe.report_data import data_facts
from gyrocompass.recipe.report_format import DASH
from gyrocompass.recipe.report_scores import score_groups
from gyrocompass.recipe.report_training import trainings
from gyrocompass.train.watch import as_json

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, tags, attributes and table rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def row(self, *start: str) -> list[str]:
        """The last row that begins so."""
        return next(row for row in reversed(self.rows) if row[: len(start)] == list(start))


def page_of(run: FinishedRun, folder: Path, **changes: Any) -> Page:
    return Page(html_of(run, folder, **changes))


def html_of(run: FinishedRun, folder: Path, **changes: Any) -> str:
    path = write_report(run.record(**changes), run.store, folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def terminal(run: FinishedRun, width: int) -> str:
    file = io.StringIO()
    print_report(run.record(), run.store, Console(file=file, width=width))
    return file.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return demo_run(tmp_path_factory.mktemp("store"), incidents=[poisonous_step()])


@pytest.fixture(scope="module")
def demo_html(demo: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(demo, tmp_path_factory.mktemp("report"))


# --- the terminal ---


def test_terminal_table_has_every_slice_and_model_with_intervals_and_counts(demo: FinishedRun) -> None:
    text = terminal(demo, 100)
    lines = [line.split() for line in text.splitlines()]
    expected = slice_scores(scored(SLICES, 0.4, 12))
    for score in expected:
        at = lines.index([score.slice, str(score.documents), str(score.groups), f"{score.tokens:,}"])
        name, value, low, high, *_ = lines[at + 2]
        assert name == "pretrained"
        assert value == f"{score.nats_per_token:.3f}"
        assert low == f"[{score.nats_per_token_low:.3f},"
        assert high == f"{score.nats_per_token_high:.3f}]"
    assert [line[0] for line in lines[2:] if line][:5] == [
        "chat/body",
        "untrained",
        "pretrained",
        "fine_tuned",
        "chat/docstring",
    ]


@pytest.mark.parametrize("width", [64, 80, 120])
def test_no_table_is_wrapped_or_cut(demo: FinishedRun, width: int) -> None:
    text = terminal(demo, width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    table = text[: text.index("[95% interval")]
    assert max(len(line) for line in table.splitlines()) <= width
    assert table.count("held-out scores") == (1 if width >= 120 else 3)


def test_terminal_shows_completions_and_incidents_as_they_are(tmp_path: Path) -> None:
    run = demo_run(tmp_path, incidents=[poisonous_step()])
    run.add_completions("pretrained", ["[red]not markup[/red]\nsecond line"])
    text = terminal(run, 100)
    assert "> [red]not markup[/red] ..." in text
    assert "a loss spike in slice code/tests: 14.2 nats per token" in text
    assert f"{1:016x} (code/tests): 14.20 nats/token over 1,200 tokens" in text
    assert "NaN nats/token over 80 tokens" in text


def test_a_slice_that_was_not_scored_is_a_dash_and_never_0(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path)
    run.add_data()
    run.add_model()
    run.add_score("untrained", 6.0, SLICES[:2])
    run.add_training("pretrained", "untrained", steps=30)
    run.add_score("pretrained", 0.3, SLICES[:1], documents=1)
    groups = {group.slice: group for group in score_groups(run.record(), run.store)}
    assert groups["chat/docstring"].rows[1].score is None
    row = next(row for row in Page(html_of(run, tmp_path)).rows if row[0] == "pretrained" and row[1] == DASH)
    assert row[1:] == [DASH] * 9
    text = terminal(run, 120)
    one_document = groups["chat/body"].rows[1].score
    assert one_document is not None
    assert f"{one_document.nats_per_token:.3f} [{DASH}]" in text
    assert re.search(rf"chat/docstring *\n.*\n  pretrained +{DASH} +{DASH} +{DASH} +{DASH} +{DASH}", text)


# --- what the numbers are ---


def test_change_is_paired_by_document(demo: FinishedRun) -> None:
    groups = {group.slice: group for group in score_groups(demo.record(), demo.store)}
    for group in groups.values():
        first, second, _ = group.rows
        assert first.change is None
        assert first.score and second.score and second.change
        assert second.change.value == pytest.approx(second.score.nats_per_token - first.score.nats_per_token)
        assert second.change.low is not None and second.change.high is not None
        assert second.score.nats_per_token_high is not None
        # The documents differ far more from each other than the models' difference does between documents.
        half_width = (second.change.high - second.change.low) / 2
        assert half_width < 0.8 * (second.score.nats_per_token_high - second.score.nats_per_token)


def test_change_is_clustered_by_group_where_both_ledgers_know_it(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path)
    run.add_data()
    run.add_model()
    for model, level, per_group in (("a", 6.0, None), ("b", 0.4, 4), ("c", 0.1, 4)):
        run.add_training(model, "untrained", steps=30)
        run.add_score(model, level, per_group=per_group)
    total = score_groups(run.record(), run.store)[-1]
    first, second = (scored(SLICES, level, 12).columns("document")[1] for level in (0.4, 0.1))
    value, count = FIELDS.index("value"), FIELDS.index("count")
    nats_D, tokens_D = second[:, value] - first[:, value], second[:, count]
    by_group = ratio_estimate(nats_D.reshape(-1, 4).sum(1), tokens_D.reshape(-1, 4).sum(1))
    assert total.rows[2].change == pytest.approx(by_group)
    assert [row.score.groups for row in total.rows if row.score] == [60, 15, 15]
    # The row above does not say the groups, so the two are paired by document.
    before = scored(SLICES, 6.0, 12).columns("document")[1]
    assert total.rows[1].change == pytest.approx(ratio_estimate(first[:, value] - before[:, value], tokens_D))


@pytest.mark.parametrize("other", [{"documents": 11}, {"shortest": 300}])
def test_no_change_is_claimed_between_scores_of_different_tokens(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    run = FinishedRun(tmp_path)
    run.add_data()
    run.add_model()
    run.add_score("untrained", 6.0)
    run.add_training("pretrained", "untrained", steps=30)
    run.add_score("pretrained", 0.3, **other)
    assert all(group.rows[1].change is None for group in score_groups(run.record(), run.store))


def test_a_model_scored_twice_is_told_apart_by_its_score_stages(demo: FinishedRun) -> None:
    record = demo.record()
    again = record.stages[-2].model_copy(update={"name": "score_again"})
    twice = RunRecord.model_validate(
        record.model_dump() | {"stages": [*record.model_dump()["stages"], again]}
    )
    models = [row.model for row in score_groups(twice, demo.store)[0].rows]
    assert models[-2:] == ["fine_tuned (score_fine_tuned)", "fine_tuned (score_again)"]


def test_smoothed_curve_weighs_steps_by_their_tokens(demo: FinishedRun) -> None:
    training = trainings(demo.record(), demo.store)[0]
    steps = [
        {"step": step, "nll_nats": {"a": float(step)}, "slice_tokens": {"a": step}} for step in range(1, 101)
    ]
    steps[49]["nll_nats"] = {"a": None}  # not finite: a gap, never a 0
    curve = training._replace(steps=steps, evaluations=[]).curve("a")
    assert len(curve.step_K) == 99 and 50 not in curve.step_K
    window = np.arange(9, 14)
    assert curve.smooth_K[10] == pytest.approx((window**2).sum() / window.sum())
    assert curve.smooth_K[0] == curve.nats_K[0]


def test_best_step_is_told_only_where_early_stopping_kept_its_parameters(demo: FinishedRun) -> None:
    training = trainings(demo.record(), demo.store)[0]
    watched = training._replace(counts={"best_step": 20})
    assert watched.best_step is None
    stopping = {**training.settings, "early_stopping": {"slice": "total"}}
    assert watched._replace(settings=stopping).best_step == 20


def test_weights_that_changed_are_drawn_and_told(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path)
    run.add_data()
    run.add_model()
    moving = {
        "objective_weights": lambda step: {"nll": 1.0, "z_loss": 0.5 * step},
        "slice_weights": lambda step: {"$a_b$": 2.0 - step / 30, HOSTILE: 1.0},
    }
    run.add_training("pretrained", "untrained", steps=30, moving=moving)
    training = trainings(run.record(), run.store)[0]
    paths = training.moving_weights()
    assert [(path.of, path.name) for path in paths] == [("objective", "z_loss"), ("tokens of", "$a_b$")]
    np.testing.assert_allclose(paths[0].weight_K, 0.5 * np.arange(1, 31))
    html = html_of(run, tmp_path)
    page = Page(html)
    assert page.row("objective z_loss")[1:] == ["0.5000", "15.00", "0.5000", "15.00", "7.750"]
    assert page.row("tokens of $a_b$")[1:3] == ["1.967", "1.000"]
    assert html.count(">weight of tokens of $a_b$</text>") == 2
    fixed = training._replace(steps=[{**row, **{key: {} for key in moving}} for row in training.steps])
    assert fixed.moving_weights() == []


def test_scheduled_sampling_is_told_under_gold_inputs_too(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path)
    run.add_data()
    run.add_model()
    forced = {"teacher_forced_nll_nats": lambda step: {"code/library": 2.0 if step > 180 else 5.0}}
    run.add_training("pretrained", "untrained", steps=200, moving=forced)
    (training,) = trainings(run.record(), run.store)
    ((name, first, last, own),) = training.teacher_forced()
    assert (name, first, last) == ("code/library", 5.0, 2.0)
    tail = [row["nll_nats"]["code/library"] for row in training.steps[180:]]
    assert own == pytest.approx(np.mean(tail))
    row = page_of(run, tmp_path).row("code/library", "5.000")
    assert row == ["code/library", "5.000", "2.000", f"{own:.3f}"]
    said = "pretrained, code/library: 2.000 nats/token under gold inputs in the last tenth of the steps, "
    assert f"{said}{own:.3f} under its own" in terminal(run, 80)


def test_training_without_scheduled_sampling_says_nothing_of_it(demo: FinishedRun, demo_html: str) -> None:
    assert all(training.teacher_forced() == [] for training in trainings(demo.record(), demo.store))
    assert "Scheduled sampling" not in demo_html and "gold inputs" not in terminal(demo, 80)


def look(step: int, proxy: float, gold: float) -> dict[str, Any]:
    judged = [
        Judged(f"p{n}", proxy + 0.01 * n, gold + 0.02 * n, 0.5 * step, 3.0, 20 + n, 0.75, n > 0)
        for n in range(4)
        for _ in range(2)
    ]
    return as_json(summary(step, judged))


@pytest.mark.parametrize("halted", [True, False])
def test_what_a_watch_saw_is_told(tmp_path: Path, halted: bool) -> None:
    run = FinishedRun(tmp_path)
    run.add_data()
    run.add_model()
    looks = [look(0, 0.1, 0.6), look(5, 0.4, 0.7), look(10, 0.8, 0.2)]
    run.add_training("reinforced", "untrained", steps=10, looks=looks, best_step=5 if halted else None)
    (training,) = trainings(run.record(), run.store)
    end = "the watch halted the run after step 10 and went back there." if halted else "did not halt the run."
    assert training.watched.startswith("The gold reward was highest at step 5;")
    assert training.watched.endswith(end)
    page = page_of(run, tmp_path)
    assert "over 8 samples of 4 prompts that are not trained on" in page.text
    step, proxy, gold, kl, tokens, *_, cut_off, _ = page.row("10")
    assert proxy.startswith("0.815 [") and gold.startswith("0.230 [")
    assert (step, kl, tokens, cut_off) == ("10", "5.000", "21.50", "25.0%")
    text = terminal(run, 80)
    assert "reinforced, watched for gamed rewards" in text and "step 5: reward 0.415 [" in text


def test_objective_terms_and_what_was_drawn(demo: FinishedRun) -> None:
    training = trainings(demo.record(), demo.store)[0]
    nll, z_loss = training.objective_terms()
    assert (nll.name, nll.mean, z_loss.name) == ("nll", 3.0, "z_loss")
    assert z_loss.settings == "coefficient 0.0001, weight 1.0"
    assert z_loss.terms == training.ledger.total.count
    drawn = training.drawn()
    assert sum(one.share for one in drawn) == pytest.approx(1)
    assert [one.wanted for one in drawn] == [0.5, 0.25, 0.25]


def test_data_groups_documents_with_their_tokens_and_says_what_they_were_used_for(demo: FinishedRun) -> None:
    facts = data_facts(demo.record(), demo.store)
    assert [group.stages for group in facts.groups] == [
        ["documents"],
        ["train_documents", "train_tokens"],
        ["held_out_documents", "held_out_tokens"],
    ]
    raw, train, held_out = facts.groups
    assert raw.total.targets is None and raw.quarantined == 3
    assert train.used == ["learned from by pretrained, fine_tuned"]
    assert held_out.used[0] == "watched, not learned from, by pretrained, fine_tuned"
    assert train.total.targets == sum(one.targets or 0 for one in train.slices)
    assert [(reason.reason, reason.records, reason.example) for reason in facts.reasons] == [
        ("not UTF-8", 2, "lib/bad_a.py:3"),
        ("null bytes", 1, f"lib/{HOSTILE}.py:1"),
    ]


# --- the page ---


def test_page_is_whole_and_asks_for_nothing(demo_html: str) -> None:
    page = Page(demo_html)
    assert not re.search(r"https?:|@import|<script|<link|<iframe|<img|<!ENTITY", demo_html)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", demo_html))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert str(attributes["href"]).startswith("#") and str(attributes["href"])[1:] in ids, (
                tag,
                attributes,
            )
    assert "prefers-color-scheme: dark" in demo_html


def test_page_has_plots_in_the_colours_of_the_page(demo_html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", demo_html, flags=re.DOTALL)
    assert len(drawings) == 6  # scores and two training stages, each for wide and for narrow pages
    for drawing in drawings:
        # Black is what Matplotlib writes where it is not told: nothing visible may have a colour of its own.
        assert not re.search(r"(?:stroke|fill): #", drawing)
        assert drawing.count("<text") == drawing.count("var(--font)") > 5
    assert "var(--series-4)" in "".join(drawings)


def test_page_tells_of_scores_terms_incidents_stages_and_lineage(demo: FinishedRun, demo_html: str) -> None:
    page = Page(demo_html)
    total = slice_scores(scored(SLICES, 0.1, 12))[-1]
    assert (
        f"{total.nats_per_token:.3f} [{total.nats_per_token_low:.3f}, {total.nats_per_token_high:.3f}]"
        in page.text
    )
    counts = f"{total.tokens:,} tokens, {total.bytes:,} bytes"
    assert f"total {total.documents} documents in {total.groups} groups, {counts}" in page.text
    assert "share of counted targets share of input tokens asked for" in page.text
    assert page.row("z_loss")[2:] == ["0.002000", "0.002100", "229,000", "229,000"]
    assert page.row(f"{1:016x}")[1:] == ["lib/train1.py", "code/tests", "14.20", "1,200"]
    assert page.row(f"{2:016x}")[3] == "NaN"
    for stage in demo.stages:
        assert page.row(stage.name, stage.kind)[2:4] == [
            stage.artifact,
            "reused" if stage.reused else "12.5 s",
        ]
    lineage = page.text[page.text.index("Lineage of fine_tuned") :]
    assert f"model : pretrained {demo.artifacts['pretrained'].id}".replace(" :", "") in lineage
    assert "held_out held_out_tokens" in lineage


def test_completions_carry_the_numbers_of_each_token(demo_html: str) -> None:
    page = Page(demo_html)
    titles = [str(attributes["title"]) for _, attributes in page.tags if "title" in attributes]
    assert "' open' (id 12): log p = \N{MINUS SIGN}6.100 nats, p = 0.00224" in titles
    likely = {str(a["class"]) for tag, a in page.tags if tag == "span" and "title" in a}
    assert {"likely likely-0", "likely likely-5"} <= likely


def test_text_of_the_data_is_escaped_everywhere(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path)
    slices = [HOSTILE, "$a_b$", "\N{SNOWMAN}\u6587"]
    run.add_data(slices)
    run.add_model()
    incident = poisonous_step()
    incident |= {"verdict": HOSTILE, "documents": [incident["documents"][0] | {"slice": HOSTILE}]}
    run.add_training("pretrained", "untrained", slices, steps=30, incidents=[incident])
    run.add_score("pretrained", 0.3, slices)
    run.add_completions("pretrained", [HOSTILE])
    html = html_of(run, tmp_path, recipe="stdlib", description=HOSTILE)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts.count(HOSTILE) >= 6
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert drawn.count(">$a_b$</text>") == 2  # and not set as mathematics
    print_report(run.record(), run.store, Console(file=io.StringIO(), width=100))


def test_same_run_gives_the_same_bytes(demo: FinishedRun, demo_html: str, tmp_path: Path) -> None:
    assert html_of(demo, tmp_path) == demo_html


def test_a_run_without_training_scores_or_completions_is_reported_all_the_same(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path)
    run.add("tokenizer", "tokenizer", "tokenizer")
    page = page_of(run, tmp_path)
    assert "held-out nats/token" not in page.text
    assert page.row("tokenizer", "tokenizer")[2] == run.artifacts["tokenizer"].id
    assert terminal(run, 100) == ""


def test_report_imports_no_plotting_and_no_templates_until_it_writes() -> None:
    heavy = ("matplotlib", "jinja2", "torch")
    code = f"import sys, gyrocompass.recipe.report; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"
