"""One cycle of the loop, step by step; each step is written down when it is done, and none is done twice.

    due --> feedback exported --> recipe run --> version registered --> rule judged --> tried --> ended

A cycle is a JSON file in the store, replaced whole after each step, so after a crash the next process goes on
where this one stopped. What a step makes it finds again if it was made already: an export ends at the time
when the cycle began and has its content's key, stages have theirs, a version of the same model and policy is
not registered twice, a rollout that runs is the one. So every verdict from before the cycle is in its export
once, and no later one is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.config import Config, parse
from gyrocompass.core.errors import BadInput, DamagedArtifact, GyroError, Interrupted, refused_by_disk
from gyrocompass.core.folder import locked, write_whole
from gyrocompass.core.store import Store
from gyrocompass.govern.promote import Decision, promote, scores_of
from gyrocompass.govern.registry import Version, champion, register
from gyrocompass.govern.retrain import marked, untouched
from gyrocompass.govern.rollout import Rollout, reopened, rollouts, settle, start, stop
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.loop.config import Loop
from gyrocompass.recipe.loop.suggest import as_rows, suggestions
from gyrocompass.recipe.loop.triggers import decided, due
from gyrocompass.recipe.record import RunRecord
from gyrocompass.recipe.run import read_run, run_recipe
from gyrocompass.serve.confidence import calibrated_for
from gyrocompass.serve.feedback import export
from gyrocompass.serve.policy import keep_policy

State = Literal[
    "running", "waits for approval", "waits for the rollout", "nothing to learn", "refused", "rolled back",
    "undecided", "champion", "overtaken", "given up",
]  # fmt: skip
ENDED: tuple[State, ...] = (
    "nothing to learn", "refused", "rolled back", "undecided", "champion", "overtaken", "given up",
)  # fmt: skip
BY = "gyro loop"
_MOST_PAUSE_S = 600.0
"""Between tries of what fails."""


class Cycle(Config):
    """How far one cycle is."""

    number: int
    began_at: float
    decided: int
    """How many answers people had decided on when it began."""
    base: str
    """The champion that it began from."""
    why: str
    state: State = "running"
    feedback: str | None = None
    model: str | None = None
    policy: str | None = None
    version: int | None = None
    decision: str | None = None
    rollout: str | None = None
    told: str = ""
    """How it ended, in words."""
    suggestions: tuple[dict[str, Any], ...] = ()
    ended_at: float | None = None


def run_loop(
    loop: Loop,
    store: Store,
    console: Console,
    *,
    once: bool = False,
    give_up: bool = False,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Cycle | None:
    """Begin cycles when they are due and carry each to its end.

    Args:
        loop: read and checked.
        store: with the registry, and the database of the servers.
        console: where it is told.
        once: go on with the open cycle, or begin one that is due, as far as it goes without waiting.
        give_up: end the open cycle first, whatever it waits for.
        now: the time, seconds since 1970.
        sleep: waits so many seconds.

    Returns:
        The last cycle; None: there is none.

    Raises:
        GyroError: another process runs this loop.
        BadInput: the name has no champion.
    """
    if champion(store, loop.config.name) is None:
        raise BadInput(
            f"{loop.config.name} has no champion to improve", fix="gyro registry add, then gyro promote"
        )
    with locked(_folder(store, loop.config.name)) as ours:
        if not ours:
            raise GyroError(
                f"another process runs the loop of {loop.config.name}", where=loop.path, fix="stop it first"
            )
        if give_up:
            _give_up(loop, store, now())
        failures = 0
        while True:
            try:
                cycle = _current(loop, store, now)
                if cycle is not None and cycle.state not in ENDED:
                    cycle = _carry_on(loop, store, cycle, console, now)
            except (BadInput, Interrupted):
                raise
            except Exception as error:
                # A database that is away, a disk that is full: it may pass.
                passing = error if isinstance(error, GyroError) else refused_by_disk(error)
                if once or passing is None:
                    raise
                failures += 1
                pause_s = min(_MOST_PAUSE_S, loop.config.poll_s * 2**failures)
                console.print(f"tried again in {pause_s:.0f} s: {passing}", highlight=False, markup=False)
                sleep(pause_s)
                continue
            failures = 0
            if once:
                return cycle
            sleep(loop.config.poll_s)


def cycles(store: Store, name: str) -> list[Cycle]:
    """All cycles of a loop, the oldest first.

    Raises:
        DamagedArtifact: one cannot be read.
    """
    found = []
    for path in sorted(_folder(store, name).glob("cycle-*.json")):
        try:
            found.append(parse(Cycle, json.loads(path.read_bytes()), str(path)))
        except (ValueError, BadInput) as error:
            raise DamagedArtifact(
                f"this cycle cannot be read: {error}", where=path, fix="delete it: the loop begins a new one"
            ) from error
    return found


def _give_up(loop: Loop, store: Store, now: float) -> None:
    known = cycles(store, loop.config.name)
    if not known or known[-1].state in ENDED:
        raise BadInput(f"no cycle of {loop.config.name} is open", fix="gyro loop FILE --status")
    if known[-1].rollout is not None and reopened(store, known[-1].rollout).state == "running":
        stop(store, loop.config.name, BY, "the cycle was given up")
    _save(loop, store, known[-1].model_copy(update={"state": "given up", "ended_at": now}))


def _current(loop: Loop, store: Store, now: Callable[[], float]) -> Cycle | None:
    """The open cycle; else a new one, if it is due; else the last one."""
    known = cycles(store, loop.config.name)
    last = known[-1] if known else None
    if last is not None and last.state not in ENDED:
        return last
    now_champion = champion(store, loop.config.name)
    assert now_champion is not None, "checked before"
    model = now_champion.artifact_id
    touched = model in marked(store)
    why = due(
        store,
        loop.config.trigger,
        now=now(),
        last_at=None if last is None else last.began_at,
        last_decided=0 if last is None else last.decided,
        touched=touched,
        fresh=None if last is not None and last.base == model else model,
    )
    if why is None:
        return last
    base = untouched(store, loop.config.name) if touched else now_champion
    if base is None:
        raise GyroError(
            f"every version of {loop.config.name} learned from what was forgotten",
            where=loop.path,
            fix="run the recipe that made the first one again, and register and promote what it makes",
        )
    # Counted before the time is taken: what is decided in between is in the export, and counts for the next.
    count = decided(store)
    fresh = Cycle(number=len(known) + 1, began_at=now(), decided=count, base=base.artifact_id, why=why)
    return _save(loop, store, fresh)


def _carry_on(loop: Loop, store: Store, cycle: Cycle, console: Console, now: Callable[[], float]) -> Cycle:
    """As far as it goes without waiting."""

    def tell(text: str) -> None:
        console.print(f"cycle {cycle.number}: {text}", highlight=False, markup=False, soft_wrap=True)

    for step in (_export, _train, _register, _judge, _try):
        if cycle.state in ENDED:
            break
        before = cycle
        cycle = step(loop, store, cycle, console)
        if cycle != before:
            if cycle.state in ENDED:
                cycle = cycle.model_copy(update={"ended_at": now()})
            cycle = _save(loop, store, cycle)
            tell(f"{cycle.state}: {cycle.told}" if cycle.told else cycle.state)
    return cycle


# --- steps: each gives the cycle as it is when the step is done, at once if it was done before ---


def _export(loop: Loop, store: Store, cycle: Cycle, console: Console) -> Cycle:
    if cycle.feedback is not None:
        return cycle
    done = export(store, until=cycle.began_at, all_texts=loop.config.all_texts)
    told = ", ".join(f"{count} {name}" for name, count in done.records.items())
    if not any(count for name, count in done.records.items() if name != "labels"):
        why = f"no user agreed to be learned from: {done.without_consent} reviews are left out"
        return cycle.model_copy(update={"state": "nothing to learn", "told": why})
    return cycle.model_copy(update={"feedback": done.artifact.id, "told": f"{cycle.why}; {told}"})


def _train(loop: Loop, store: Store, cycle: Cycle, console: Console) -> Cycle:
    if cycle.model is not None:
        return cycle
    name = f"{loop.config.name}-cycle-{cycle.number}".replace(".", "-")
    run_recipe(loop.recipe(_words(loop, store, cycle), name), store, console)
    record = read_run(store, name)
    model = _stage(store, record, loop.config.model)
    scores = [*scores_of(store, model.id).values()]
    scored = Ledger.load(scores[0].path / "ledger.parquet") if scores else None
    found = suggestions(model, scored)
    for one in found:
        console.print(f"{one.slice} {one.state}: {one.advice} ({one.why})", highlight=False, markup=False)
    update: dict[str, Any] = {"model": model.id, "told": f"{model.id}", "suggestions": tuple(as_rows(found))}
    if loop.policy is not None:
        policy = loop.policy
        if loop.config.calibration is not None:
            calibration = _stage(store, record, loop.config.calibration)
            policy = policy.model_copy(update={"calibrator": calibration.id})
            try:
                calibrated_for(policy, store)
            except BadInput as error:
                return cycle.model_copy(update=update | {"state": "refused", "told": error.what})
        update["policy"] = keep_policy(store, policy).id
    return cycle.model_copy(update=update)


def _register(loop: Loop, store: Store, cycle: Cycle, console: Console) -> Cycle:
    if cycle.version is not None:
        return cycle
    assert cycle.model is not None, "trained before"
    now = champion(store, loop.config.name)
    if now is not None and now.artifact_id == cycle.model:
        return cycle.model_copy(update={"state": "nothing to learn", "told": "it is the champion"})
    found = register(store, loop.config.name, cycle.model, BY, cycle.policy)
    return cycle.model_copy(update={"version": found.version, "told": f"{found.name}:{found.version}"})


def _judge(loop: Loop, store: Store, cycle: Cycle, console: Console) -> Cycle:
    """By the rule; a trial that is still to come is left aside, and so is a person who has not spoken."""
    if _promoted(loop, store, cycle):
        return cycle.model_copy(update={"state": "champion", "told": "it was promoted"})
    if cycle.rollout is not None or cycle.state == "waits for approval":
        return cycle
    return _after(cycle, _ask(loop, store, cycle), loop)


def _try(loop: Loop, store: Store, cycle: Cycle, console: Console) -> Cycle:
    """On users: begin the trial, look at it, and promote what was kept."""
    if cycle.state not in ("running", "waits for the rollout") or loop.rollout is None:
        return cycle
    assert cycle.version is not None, "registered before"
    if cycle.rollout is None:
        trial = _own_trial(loop, store, cycle)
        trial = trial or start(store, loop.config.name, cycle.version, loop.rollout, BY)
        told = f"{trial.plan.mode} on {trial.plan.part:.0%} of the users"
        return cycle.model_copy(update={"rollout": trial.id, "state": "waits for the rollout", "told": told})
    trial = reopened(store, cycle.rollout)
    if trial.state == "running":
        trial = settle(store, trial)
    if trial.state == "running":
        return cycle
    if trial.state != "kept":
        ended: dict[str, State] = {"rolled back": "rolled back", "undecided": "undecided"}
        state = ended.get(trial.state, "overtaken")
        return cycle.model_copy(update={"state": state, "told": trial.why})
    return _after(cycle, _ask(loop, store, cycle), loop)


def _own_trial(loop: Loop, store: Store, cycle: Cycle) -> Rollout | None:
    """One that this cycle began and could not write down."""
    own = [one for one in rollouts(store, loop.config.name) if one.version == cycle.version and one.by == BY]
    return own[-1] if own and own[-1].at >= cycle.began_at else None


def _ask(loop: Loop, store: Store, cycle: Cycle) -> Decision:
    assert cycle.version is not None, "registered before"
    return promote(store, loop.config.name, cycle.version, loop.rule, BY, ())


def _after(cycle: Cycle, found: Decision, loop: Loop) -> Cycle:
    """What follows from a decision."""
    update: dict[str, Any] = {"decision": found.artifact.id}
    failed = [one for one in found.clauses if not one.holds]
    kinds = {one.clause["kind"] for one in failed}
    if found.promoted:
        return cycle.model_copy(update=update | {"state": "champion", "told": "the rule holds"})
    if cycle.rollout is None and loop.rollout is not None and "rollout" in kinds <= {"rollout", "approval"}:
        return cycle.model_copy(update=update | {"told": "the rule holds, but for the trial to come"})
    if kinds == {"approval"}:
        told = f"{failed[0].why}: gyro promote ... --approve NAME"
        return cycle.model_copy(update=update | {"state": "waits for approval", "told": told})
    return cycle.model_copy(update=update | {"state": "refused", "told": failed[0].why})


# --- what steps share ---


def _promoted(loop: Loop, store: Store, cycle: Cycle) -> bool:
    now: Version | None = champion(store, loop.config.name)
    return now is not None and now.version == cycle.version


def _words(loop: Loop, store: Store, cycle: Cycle) -> dict[str, str]:
    """What stands in the recipe as ${word}."""
    assert cycle.feedback is not None, "exported before"
    words = {name: str(_folder_of(store, value)) for name, value in loop.config.given.items()}
    return words | {
        "champion": str(store.open(cycle.base, verify=False).path.resolve()),
        "feedback": str(store.open(cycle.feedback, verify=False).path.resolve()),
    }


def _folder_of(store: Store, value: str) -> str | Path:
    try:
        return store.open(value, verify=False).path.resolve()
    except BadInput:
        return value


def _stage(store: Store, record: RunRecord, name: str) -> Artifact:
    return store.open(next(one.artifact for one in record.stages if one.name == name), verify=False)


def _folder(store: Store, name: str) -> Path:
    return store.root / "loops" / name


def _save(loop: Loop, store: Store, cycle: Cycle) -> Cycle:
    folder = _folder(store, loop.config.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"cycle-{cycle.number:04}.json", cycle.model_dump_json(indent=1))
    return cycle
