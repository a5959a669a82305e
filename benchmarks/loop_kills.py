"""A hundred kills of the loop: are verdicts lost, or learned from twice?

    python benchmarks/loop_kills.py [--kills 100] [--seed 0]

A process runs `gyro loop` on a tiny model; it is killed (SIGKILL) after a random time and begun again, while
people decide and users ask. At the end it runs until nothing is left to do, and then is counted: verdicts in
each cycle's export against those decided before it began, versions and rollouts against cycles, and the chain
of acts. Nothing here is timed; the figure is how many are lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy import insert

from gyrocompass.core.acts import check_chain
from gyrocompass.core.config import parse
from gyrocompass.core.store import Store
from gyrocompass.core.tables_serving import EventRow
from gyrocompass.govern.promote import PromotionRule, promote
from gyrocompass.govern.registry import register, versions
from gyrocompass.govern.rollout import rollouts, running
from gyrocompass.recipe.loop.config import Loop
from gyrocompass.recipe.loop.cycle import ENDED, cycles, run_loop
from gyrocompass.recipe.recipe import recipe_from
from gyrocompass.recipe.run import read_run, run_recipe
from gyrocompass.serve.answer import Answered, Asked, Token
from gyrocompass.serve.review import Reviews, ReviewSettings, Verdict

MODEL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
TRAINING = {"kind": "train", "sequence_length": 64, "rows_per_step": 4, "checkpoint_every_steps": 2}
GUARDRAIL = {"measure": "failed", "margin": 0.3}
VERDICTS = 5


def recipes(data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes the first champion, and what makes challengers."""
    read = {"documents": {"kind": "documents", "sources": [{"files": {"path": str(data)}}]}}
    first = read | {
        "tokenizer": {"kind": "tokenizer", "documents": "documents", "vocabulary_size": 300},
        "tokens": {"kind": "tokens", "documents": "documents", "tokenizer": "tokenizer"},
        "untrained": {"kind": "new_model", "tokenizer": "tokenizer", "config": MODEL},
        "trained": TRAINING | {"model": "untrained", "data": "tokens", "steps": 4},
    }
    feedback = {"jsonl": {"path": "${feedback}/sft.jsonl"}}
    challenger = read | {
        "champion": {"kind": "imported_model", "folder": "${champion}"},
        "feedback": {"kind": "documents", "sources": [feedback]},
        "both": {"kind": "together", "documents": ["feedback", "documents"]},
        "tokens": {"kind": "tokens", "documents": "both", "tokenizer": "champion"},
        "tuned": TRAINING | {"model": "champion", "data": "tokens", "steps": 6},
    }
    off = {"tracking": {"mlflow": None}}
    return {"name": "first", "stages": first} | off, {"name": "challenger", "stages": challenger} | off


def prepare(folder: Path) -> Path:
    """A store with a champion, and the loop's files; made in a process of its own, which may use threads."""
    data = folder / "data"
    data.mkdir()
    for number in range(12):
        text = f"def add_{number}(first, second):\n    return first + {number}\n" * 3
        (data / f"{number}.py").write_text(text)
    first, challenger = recipes(data)
    rule = {"name": "r", "clauses": [{"kind": "rollout"}]}
    plan = {"mode": "ab", "share": 0.5, "guardrails": [GUARDRAIL], "most_users": 60}
    loop = {
        "name": "m", "recipe": "challenger.yaml", "model": "tuned", "rule": "rule.yaml",
        "rollout": "plan.yaml", "trigger": {"verdicts": VERDICTS}, "poll_s": 0.05,
    }  # fmt: skip
    for name, content in (("challenger", challenger), ("rule", rule), ("plan", plan), ("loop", loop)):
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    if (child := os.fork()) == 0:
        store = Store(folder / "store")
        run_recipe(recipe_from(first, [], "first"), store, Console(quiet=True))
        made = {stage.name: stage.artifact for stage in read_run(store, "first").stages}
        register(store, "m", made["trained"], "ann")
        promote(store, "m", 1, parse(PromotionRule, rule, "rule"), "ann", ())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the first champion is made"
    return folder / "loop.yaml"


def decide(store: Store, number: int) -> None:
    """A person lets one answer stand."""
    said = [{"role": "user", "content": f"What is {number}?"}]
    asked = Asked(
        f"{number:032x}", "chat", said[0]["content"], said, "", "u", "", "", 10, None, time.time(), True
    )
    token = Token("It", 1, -0.1, 0.2, [])
    answer = Answered(f"It is {number}.", [token], "stop", 3, 0.0, 0.0, 0.0, "embedded")
    queue = Reviews(store.database, ReviewSettings(double_share=0.0))
    item = asyncio.run(queue.put(asked, answer, ["r"], None, 1.0))
    queue.claim_one(item, "eve")
    queue.decide(item, "eve", Verdict(f"v{number}", "approve"))


def traffic(store: Store, begin: int, users: int) -> None:
    """Answers to users, of whatever is on trial."""
    trial = running(store, "m")
    if trial is None:
        return
    row = dict.fromkeys(EventRow.__table__.columns.keys()) | {
        "kind": "chat", "slice": "", "tier": "", "model": "", "rollout": trial.id, "engine": "",
        "prompt_tokens": 1, "tokens": 1, "prompt_characters": 1, "calibrator": "", "policy": "",
        "outcome": "answer", "reasons": [], "flags": {}, "queued_s": 0.0, "first_token_s": 0.0,
        "total_s": 0.1, "consent": False, "status": 200,
    }  # fmt: skip
    rows = [
        row
        | {
            "id": f"e{n}-0",
            "request_id": f"e{n}",
            "at": float(n),
            "user": f"u{n}",
            "arm": trial.arm(f"u{n}"),
        }
        for n in range(begin, begin + users)
    ]
    with store.database.write() as connection:
        connection.execute(insert(EventRow), rows)


def spawn(file: Path, folder: Path) -> int:
    """The loop in a process of its own."""
    child = os.fork()
    if child == 0:
        with (folder / "loop.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                run_loop(Loop(file), Store(folder / "store"), Console(quiet=True))
            finally:
                os._exit(1)
    return child


def count(store: Store) -> dict[str, int]:
    """What came of it."""
    known = cycles(store, "m")
    lost = doubled = 0
    for cycle in known:
        if cycle.feedback is None:
            continue
        lines = (store.open(cycle.feedback, verify=False).path / "sft.jsonl").read_text().splitlines()
        sources = [json.loads(line)["source"] for line in lines]
        doubled += len(sources) - len(set(sources))
        lost += max(0, cycle.decided - len(set(sources)))
    trials = rollouts(store, "m")
    return {
        "cycles": len(known),
        "ended": sum(cycle.state in ENDED for cycle in known),
        "verdicts": known[-1].decided if known else 0,
        "lost verdicts": lost,
        "doubled verdicts": doubled,
        "versions too many": len(versions(store, "m")) - 1 - len({c.version for c in known if c.version}),
        "rollouts too many": len(trials) - len({c.rollout for c in known if c.rollout}),
        "cycles of one number": len(known) - len({cycle.number for cycle in known}),
        "broken acts": int(check_chain(store.database) is not None),
    }


def done(store: Store, decided: int) -> bool:
    """Whether the last cycle has ended, and too few verdicts are left for another."""
    known = cycles(store, "m")
    return bool(known) and known[-1].state in ENDED and decided - known[-1].decided < VERDICTS


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = prepare(folder)
        store = Store(folder / "store")
        decided = users = kills = 0
        while kills < given.kills:
            child = spawn(file, folder)
            until = time.monotonic() + draw.uniform(0.1, 6.0)
            while time.monotonic() < until:
                if draw.random() < 0.3:
                    decide(store, decided)
                    decided += 1
                traffic(store, users, 8)
                users += 8
                time.sleep(draw.uniform(0.02, 0.2))
            gone, status = os.waitpid(child, os.WNOHANG)
            said = (folder / "loop.log").read_text()[-2000:]
            assert gone == 0, f"the loop ended by itself ({status}): {said}"
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        child = spawn(file, folder)
        end = time.monotonic() + 300
        while time.monotonic() < end and not done(store, decided):
            traffic(store, users, 8)
            users += 8
            time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(f"{kills} kills, {decided} verdicts decided")
        for name, value in count(store).items():
            print(f"{name:24} {value:,}")


if __name__ == "__main__":
    main()
