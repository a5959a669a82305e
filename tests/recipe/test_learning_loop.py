"""The loop: what people decided becomes a challenger that is judged, tried and kept or not, once for each."""

from __future__ import annotations

import asyncio
import io
import json
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy import delete, insert

from databases import copied
from gyrocompass.core.acts import acts, check_chain
from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, ConfigError, DamagedArtifact, GyroError
from gyrocompass.core.folder import locked
from gyrocompass.core.lineage import walk
from gyrocompass.core.store import Store
from gyrocompass.core.tables_serving import EventRow
from gyrocompass.govern.promote import PromotionRule, promote
from gyrocompass.govern.registry import champion, register, versions
from gyrocompass.govern.retrain import marked
from gyrocompass.govern.rollout import running
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.forgetting import trace
from gyrocompass.recipe.loop.config import Loop, Trigger
from gyrocompass.recipe.loop.cycle import Cycle, cycles, run_loop
from gyrocompass.recipe.loop.suggest import Suggestion, suggestions
from gyrocompass.recipe.loop.triggers import decided, due
from gyrocompass.recipe.run import read_run
from gyrocompass.serve.answer import Answered, Asked, Token
from gyrocompass.serve.review import Reviews, ReviewSettings, Verdict
from gyrocompass.serve.sessions import secret_of, user_hash
from tiny_recipe import FinishedRun

ANN = parse(PromotionRule, {"name": "r", "clauses": [{"kind": "approval", "by": ["ann"]}]}, "rule")
RECIPE = """\
name: challenger
tracking: {{mlflow: null}}
stages:
  champion: {{kind: imported_model, folder: "${{champion}}"}}
  documents: {{kind: documents, sources: [{{files: {{path: {data}}}}}]}}
  train_documents: {{kind: split, documents: documents, side: train, held_out_share: 0.25}}
  held_out_documents: {{kind: split, documents: documents, side: held_out, held_out_share: 0.25}}
  replayed: {{kind: pairs, documents: train_documents}}
  feedback: {{kind: documents, sources: [{{jsonl: {{path: "${{feedback}}/sft.jsonl", slice: feedback}}}}]}}
  both: {{kind: together, documents: [feedback, replayed]}}
  tokens: {{kind: tokens, documents: both, tokenizer: champion}}
  held_out: {{kind: tokens, documents: held_out_documents, tokenizer: champion}}
  tuned:
    kind: train
    model: champion
    data: tokens
    held_out: held_out
    steps: {steps}
    sequence_length: 64
    rows_per_step: 2
    optimizer: {{learning_rate: {rate}}}
    evaluate_every_steps: 1
  score_champion: {{kind: score, model: champion, data: [held_out], sequence_length: 64}}
  score_tuned: {{kind: score, model: tuned, data: [held_out], sequence_length: 64}}
"""
LOOP = """\
name: m
recipe: challenger.yaml
model: tuned
rule: rule.yaml
rollout: rollout.yaml
trigger: {verdicts: 3}
poll_s: 0.01
"""
RULE = "name: r\nclauses: [{kind: likelihood, margin: 0.5}, {kind: rollout}]\n"
ROLLOUT = "mode: ab\nshare: 0.5\nguardrails: [{measure: failed, margin: 0.2}]\n"


class Place:
    """A store with a champion, and a folder with the loop's files."""

    def __init__(self, folder: Path, run: FinishedRun) -> None:
        copied(run.store, folder / "store")
        self.store = Store(folder / "store")
        ids = {stage.name: stage.artifact for stage in read_run(self.store, "tiny").stages}
        register(self.store, "m", ids["fine_tuned"], "ann")
        promote(self.store, "m", 1, ANN, "ann", ["ann"])
        self.file = folder / "loop.yaml"
        self.data = run.recipe.parent / "data"
        self.write()

    def write(self, rule: str = RULE, loop: str = LOOP, rollout: str = ROLLOUT, rate: float = 1e-3) -> None:
        folder = self.file.parent
        (folder / "challenger.yaml").write_text(RECIPE.format(data=self.data, steps=3, rate=rate))
        for name, text in (("rule", rule), ("rollout", rollout), ("loop", loop)):
            (folder / f"{name}.yaml").write_text(text)

    def decide(self, count: int, consent: bool = True, user: str = "u") -> None:
        """People look at answers to a user, and let them stand."""
        queue = Reviews(self.store.database, ReviewSettings(double_share=0.0))
        begin = decided(self.store)
        for number in range(begin, begin + count):
            said = [{"role": "user", "content": f"What is {number}?"}]
            asked = Asked(
                f"{number:032x}", "chat", f"What is {number}?", said,
                "", user, "", "", 10, None, time.time(), consent,
            )  # fmt: skip
            answer = Answered(
                f"It is {number}.", [Token("It", 1, -0.1, 0.2, [])], "stop", 3, 0.0, 0.0, 0.0, "embedded"
            )
            with ThreadPoolExecutor(1) as pool:
                item = pool.submit(asyncio.run, queue.put(asked, answer, ["r"], None, 1.0)).result()
            queue.claim_one(item, "eve")
            queue.decide(item, "eve", Verdict(f"v{number}", "approve"))

    def go(self, **options: Any) -> Cycle | None:
        return run_loop(Loop(self.file), self.store, Console(quiet=True), once=True, **options)

    def traffic(self, users: int, failing: str = "") -> None:
        """Answers to users in the arms of what is tried; those of one arm fail."""
        trial = running(self.store, "m")
        assert trial is not None
        row = dict.fromkeys(EventRow.__table__.columns.keys()) | {
            "kind": "chat", "slice": "", "tier": "", "model": "", "rollout": trial.id, "engine": "",
            "prompt_tokens": 1, "tokens": 1, "prompt_characters": 1, "calibrator": "", "policy": "",
            "outcome": "answer", "reasons": [], "flags": {}, "queued_s": 0.0, "first_token_s": 0.0,
            "total_s": 0.1, "consent": False,
        }  # fmt: skip
        rows = [
            row | {
                "id": f"{trial.id}{n}-0", "request_id": f"{trial.id}{n}", "at": float(n), "user": f"u{n}",
                "arm": (arm := trial.arm(f"u{n}")), "status": 500 if arm == failing else 200,
            }
            for n in range(users)
        ]  # fmt: skip
        with self.store.database.write() as connection:
            connection.execute(insert(EventRow), rows)


@pytest.fixture
def place(tmp_path: Path, finished_run: FinishedRun) -> Place:
    return Place(tmp_path, finished_run)


def test_a_cycle_goes_from_verdicts_to_a_new_champion(place: Place) -> None:
    assert place.go() is None
    place.decide(2)
    assert place.go() is None  # three are asked for
    place.decide(2)
    cycle = place.go()
    assert cycle is not None and cycle.state == "waits for the rollout", cycle
    assert cycle.why == "4 new verdicts" and cycle.version == 2
    told = (place.store.open(str(cycle.feedback)).path / "sft.jsonl").read_text().splitlines()
    assert len(told) == 4
    assert place.go() == cycle  # nothing new to be done
    place.traffic(300)
    cycle = place.go()
    assert cycle is not None and cycle.state == "champion", cycle
    now = champion(place.store, "m")
    assert now is not None and now.version == 2
    tree = walk(place.store, now.artifact_id)
    assert cycle.feedback in {node.id for node in _nodes(tree.artifact)}  # from the model to what people said
    assert place.go() == cycle  # no new verdict: no new cycle
    place.decide(3)
    second = place.go()
    assert second is not None and second.number == 2 and second.why == "3 new verdicts"
    exported = (place.store.open(str(second.feedback)).path / "sft.jsonl").read_text().splitlines()
    assert len({json.loads(line)["source"] for line in exported}) == len(exported) == 7


def _nodes(node: Any) -> list[Any]:
    return [] if node is None else [node, *(below for link in node.links for below in _nodes(link))]


def test_a_bad_challenger_is_refused_and_a_bad_canary_is_taken_back(place: Place) -> None:
    place.write(rate=3.0, rule=RULE.replace("0.5", "0.01"))
    place.decide(3)
    cycle = place.go()
    assert cycle is not None and cycle.state == "refused" and "is allowed" in cycle.told
    assert champion(place.store, "m").version == 1 and cycle.decision is not None  # type: ignore[union-attr]
    place.write()
    place.decide(3)
    cycle = place.go()
    assert cycle is not None and cycle.state == "waits for the rollout"
    place.traffic(100, failing="challenger")
    cycle = place.go()
    assert cycle is not None and cycle.state == "rolled back" and "failed: 100.0%" in cycle.told
    assert champion(place.store, "m").version == 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_person_has_the_last_word(place: Place) -> None:
    place.write(rule=RULE.replace("]", ", {kind: approval, by: [ann]}]"))
    place.decide(3)
    assert place.go().state == "waits for the rollout"  # type: ignore[union-attr]
    place.traffic(300)
    cycle = place.go()
    assert cycle is not None and cycle.state == "waits for approval" and "--approve" in cycle.told
    loop = Loop(place.file)
    assert promote(place.store, "m", 2, loop.rule, "ann", ["ann"]).promoted
    cycle = place.go()
    assert cycle is not None and cycle.state == "champion"


def test_without_consent_there_is_nothing_to_learn(place: Place) -> None:
    place.decide(3, consent=False)
    cycle = place.go()
    assert cycle is not None and cycle.state == "nothing to learn" and "3 reviews are left out" in cycle.told


@pytest.mark.slow
@pytest.mark.parametrize("step", ["_export", "_train", "_register", "_judge", "_try"])
def test_a_killed_step_is_done_once(place: Place, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Killed after the step's work, before it is written down: nothing is lost, nothing is done twice."""
    from gyrocompass.recipe.loop import cycle as module

    place.decide(3)
    saved = module._save
    killed = getattr(module, step)

    def die(loop: Any, store: Any, cycle: Any, console: Any) -> Any:
        after = killed(loop, store, cycle, console)
        if after != cycle:
            raise KeyboardInterrupt
        return after

    monkeypatch.setattr(module, step, die)
    with pytest.raises(KeyboardInterrupt):
        place.go()
    monkeypatch.setattr(module, step, killed)
    place.decide(2)  # meanwhile: they belong to the next cycle
    cycle = place.go()
    assert cycle is not None and cycle.state == "waits for the rollout" and cycle.number == 1
    assert len(versions(place.store, "m")) == 2 and len(place.store.folders("feedback")) == 1
    trial = running(place.store, "m")
    assert trial is not None and trial.id == cycle.rollout
    lines = (place.store.open(str(cycle.feedback)).path / "sft.jsonl").read_text().splitlines()
    assert len(lines) == 3 and module._save is saved


def test_a_user_is_forgotten_and_what_learned_from_them_is_trained_again(place: Place, gyro: Any) -> None:
    store, where = place.store, ("--store", place.store.root)
    eve = user_hash(secret_of(store.root).hex(), "eve")
    place.decide(2, user=eve)
    place.decide(3)
    place.write(rule="name: r\nclauses: [{kind: likelihood, margin: 0.5}]\n")
    cycle = place.go()
    assert cycle is not None and cycle.state == "champion" and cycle.model is not None
    traces = trace(store, "eve")
    assert (len(traces.reviews), len(traces.documents), traces.models) == (2, 2, (cycle.model,))
    code, out, _ = gyro("forget", "--user", "eve", "--dry-run", *where)
    assert code == 0 and f"{cycle.model}: learned from it" in out and len(trace(store, "eve").reviews) == 2
    canaries = place.file.parent / "canaries.jsonl"
    canaries.write_text('{"context": "What is 0?", "canary": " It is 0."}\n')
    told = ("--workers", 1, "--by", "ann", "--canaries", canaries)
    code, out, _ = gyro("forget", "--user", "eve", *told, *where)
    assert code == 0 and "to be trained again" in out and "bits in the mean of 1 canaries" in out
    assert f"gyro exposure {cycle.model} NAME@champion --canaries" in out
    (act,) = [one for one in acts(store.database) if one["act"] == "to be trained again"]
    assert 0 <= act["about"]["exposure_bits"][cycle.model] <= 8
    assert decided(store) == 5  # what was decided was decided
    canaries.unlink()
    code, _, err = gyro("forget", "--user", "eve", *where)
    assert code == 2 and "nothing here is of the user 'eve'" in err
    assert not store.folders("feedback") and marked(store) == {cycle.model}
    assert check_chain(store.database) is None
    kept = [path for path in store.root.rglob("*") if path.is_file() and b"What is 0?" in path.read_bytes()]
    assert kept == []  # nothing that eve asked is left, in no file
    again = place.go()
    assert again is not None and again.number == 2 and again.state == "champion"
    assert again.why == "the champion learned from what was forgotten"
    assert again.base == versions(store, "m")[0].artifact_id  # from the version that never saw it
    assert again.model not in marked(store) and place.go() == again
    exported = (store.open(str(again.feedback)).path / "sft.jsonl").read_text().splitlines()
    assert len(exported) == 3
    code, out, _ = gyro("exposure", cycle.model, "m@champion", "--canaries", _canaries(place), *where)
    assert code == 0 and "from the first model to the last" in out


def _canaries(place: Place) -> Path:
    path = place.file.parent / "canaries.jsonl"
    lines = [{"context": f"What is {n}?", "canary": f" It is {n}."} for n in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_only_one_loop_runs(place: Place) -> None:
    with locked(place.store.root / "loops" / "m") as ours:
        assert ours
        with ThreadPoolExecutor(1) as pool, pytest.raises(GyroError, match="another process runs the loop"):
            pool.submit(place.go).result()


def test_what_is_decided_while_a_cycle_begins_is_not_lost(place: Place) -> None:
    """Between the count and the time: in the export, and counted again for the next cycle."""
    place.decide(3)
    moments = iter([lambda: None, lambda: place.decide(1)])

    def now() -> float:
        next(moments, lambda: None)()
        return time.time()

    cycle = place.go(now=now)
    assert cycle is not None and cycle.decided == 3
    assert len((place.store.open(str(cycle.feedback)).path / "sft.jsonl").read_text().splitlines()) == 4


def test_a_database_that_goes_away_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from gyrocompass.recipe.loop import cycle as module

    here, failing = module._current, iter([True, True, False, True])
    pauses: list[float] = []

    def away(*arguments: Any) -> Any:
        if next(failing, False):
            raise GyroError("the store's database does not work")
        return here(*arguments)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_current", away)
    with pytest.raises(KeyboardInterrupt):
        run_loop(Loop(place.file), place.store, Console(quiet=True), sleep=sleep)
    assert pauses == [0.02, 0.04, 0.01, 0.02, 0.01]  # longer each time, and from the start when it is back
    monkeypatch.setattr(module, "_current", lambda *_: (_ for _ in ()).throw(BadInput("a mistake")))
    with pytest.raises(BadInput, match="a mistake"):
        run_loop(Loop(place.file), place.store, Console(quiet=True), sleep=sleep)


def test_a_disk_that_is_full_is_waited_for(place: Place) -> None:
    """Whatever step meets it, the next try goes on, and nothing is done twice."""
    place.decide(3)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        known = cycles(place.store, "m")
        if known and known[-1].state == "waits for the rollout":
            raise KeyboardInterrupt
        # A little more room each time, until there is enough.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000 * 4 ** len(pauses), hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = Console(file=io.StringIO(), width=200)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(KeyboardInterrupt):
            run_loop(Loop(place.file), place.store, told, sleep=sleep)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(told.file, io.StringIO)
    assert told.file.getvalue().count("tried again in") == len(pauses) - 1 >= 3, told.file.getvalue()
    (cycle,) = cycles(place.store, "m")
    assert len(versions(place.store, "m")) == 2 and len(place.store.folders("feedback")) == 1
    trial = running(place.store, "m")
    assert trial is not None and trial.id == cycle.rollout


def test_a_champion_that_no_longer_learns_is_a_reason_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gyrocompass.recipe.loop import triggers

    def why(fresh: str | None) -> str | None:
        return due(place.store, Trigger(plateau=True), now=0.0, last_at=None, last_decided=0, fresh=fresh)

    model = champion(place.store, "m").artifact_id  # type: ignore[union-attr]
    place.decide(1)
    assert why(model) is None and why("model-of-another-store") is None  # three steps tell nothing
    still = [Suggestion("prose", "stands still", "more data", "3.2, then 3.2 nats", ())]
    monkeypatch.setattr(triggers, "suggestions", lambda trained: still)
    assert why(model) == "prose stands still: 3.2, then 3.2 nats" and why(None) is None
    never = RULE.replace("kind: likelihood, margin: 0.5", "kind: calibration, at_most: 0.1")
    place.write(loop=LOOP.replace("verdicts: 3", "plateau: true"), rule=never)
    first = place.go()
    assert first is not None and first.state == "refused" and first.why.startswith("prose stands still")
    place.decide(2)
    assert place.go() == first  # the champion is the same


def test_triggers(place: Place) -> None:
    def why(last_at: float | None = 0.0, last: int = 0, now: float = 1e6, **trigger: Any) -> str | None:
        return due(place.store, Trigger(**trigger), now=now, last_at=last_at, last_decided=last)

    assert why(hours=1) is None  # no verdict
    place.decide(4)
    assert why(verdicts=4) == "4 new verdicts" and why(verdicts=5) is None and why(verdicts=4, last=1) is None
    assert why(hours=1) == "1 hours have passed, with 4 new verdicts" and why(hours=300) is None
    assert why(hours=1, last_at=2e6) is None  # the clock jumped back: no cycle for it
    assert why(hours=1, last_at=None) is not None
    assert why(drift=True) is None
    rows = []
    row = dict.fromkeys(EventRow.__table__.columns.keys()) | {
        "kind": "chat", "slice": "", "tier": "", "model": "", "rollout": "", "arm": "", "user": "",
        "engine": "", "prompt_tokens": 1, "tokens": 1, "prompt_characters": 1, "calibrator": "", "policy": "",
        "outcome": "", "reasons": [], "flags": {}, "queued_s": 0.0, "first_token_s": 0.0, "total_s": 0.1,
        "consent": False, "status": 200,
    }  # fmt: skip
    for n in range(900):
        value = -1.0 - (n * 37 % 100) / 100 - (3.0 if n > 600 else 0.0)
        rows.append(row | {"id": f"{n}", "request_id": f"{n}", "at": float(n), "mean_logprob": value})
    with place.store.database.write() as connection:
        connection.execute(insert(EventRow), rows)
    assert str(why(drift=True)).startswith("drift: surprisal was 1.5 and is")
    with place.store.database.write() as connection:
        connection.execute(delete(EventRow))
    # One slice's loss rises, another's falls: over all there is nothing to see.
    for n in range(1600):
        shift = 0.0 if n < 1000 else 2.0
        value = -1.0 - (n * 37 % 100) / 30 + (shift if n % 2 else -shift) * 0.6
        own = {"id": f"s{n}", "request_id": f"s{n}", "at": float(n), "slice": "ab"[n % 2]}
        rows.append(row | own | {"mean_logprob": value})
    with place.store.database.write() as connection:
        connection.execute(insert(EventRow), rows[900:])
    assert "surprisal of a was" in str(why(drift=True)) or "surprisal was" in str(why(drift=True))


def test_slices_that_no_longer_learn_are_told(place: Place, tmp_path: Path) -> None:
    ids = {stage.name: stage.artifact for stage in read_run(place.store, "tiny").stages}
    trained = place.store.open(ids["pretrained"], verify=False)
    folder = tmp_path / "trained"
    shutil.copytree(trained.path, folder)
    losses = [{"code": v, "prose": 2.0, "new": 5.0 - n} for n, v in enumerate((3.0, 2.0, 2.2, 2.4))]
    lines = [json.dumps({"step": n, "nll_nats": loss}) for n, loss in enumerate(losses)]
    (folder / "evaluations.jsonl").write_text("\n".join(lines))
    scored = Ledger.load(place.store.open(ids["score_fine_tuned"], verify=False).path / "ledger.parquet")
    found = {one.slice: one for one in suggestions(trained._replace(path=folder), scored)}
    assert set(found) == {"code", "prose"}
    assert found["code"].state == "rises" and "the least was 2.000" in found["code"].why
    assert len(found["code"].documents) == 3
    assert found["prose"].state == "stands still" and found["prose"].advice == "more data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop": LOOP.replace("model: tuned", "model: tunned")}, "has no stage 'tunned'"),
        ({"loop": LOOP.replace("verdicts: 3", "")}, "say when a cycle begins"),
        ({"loop": LOOP.replace("rule.yaml", "none.yaml")}, "cannot read the file"),
        ({"rollout": "mode: ab\n"}, "guardrails"),
    ],
)
def test_bad_files_are_told_at_once(place: Place, change: dict[str, str], message: str) -> None:
    place.write(**change)  # type: ignore[arg-type]
    with pytest.raises((BadInput, ConfigError), match=message):
        Loop(place.file)


def test_bad_words_and_names_are_told(place: Place) -> None:
    recipe = place.file.parent / "challenger.yaml"
    recipe.write_text(recipe.read_text().replace("${feedback}", "${feedbak}"))
    with pytest.raises(BadInput, match="a word that is not known; there is champion, feedback"):
        Loop(place.file)
    place.write(loop=LOOP.replace("name: m", "name: other"))
    with pytest.raises(BadInput, match="other has no champion to improve"):
        place.go()


@pytest.mark.slow
def test_the_command_line(place: Place, gyro: Callable[..., tuple[int, str, str]]) -> None:
    where = ("--store", place.store.root)
    code, out, _ = gyro("loop", place.file, "--once", *where)
    assert code == 0 and "nothing is due" in out
    place.decide(3)
    code, out, _ = gyro("loop", place.file, "--once", *where)
    assert code == 0 and "cycle 1: waits for the rollout: ab on 50% of the users" in out
    code, out, _ = gyro("loop", place.file, "--status", *where)
    assert code == 0 and "3 new verdicts" in out and "m:2" in out
    code, out, _ = gyro("loop", place.file, "--once", "--give-up", *where)
    assert code == 0 and running(place.store, "m") is None
    code, out, _ = gyro("loop", place.file, "--status", "--json", *where)
    assert json.loads(out)[0]["state"] == "given up"
    code, _, err = gyro("loop", place.file, "--once", "--give-up", *where)
    assert code == 2 and "no cycle of m is open" in err
    path = place.store.root / "loops" / "m" / "cycle-0001.json"
    path.write_text("{")
    with pytest.raises(DamagedArtifact, match="this cycle cannot be read"):
        cycles(place.store, "m")
