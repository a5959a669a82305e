"""Kill and resume: a few real steps of a stage in a process that dies by SIGKILL, gone on with, and compared.

    first process    step 1, step 2 (checkpoint), step 3, SIGKILL
    second process   goes on from step 2 to step 4; then, in another folder, steps 1 to 4 without a kill

Compared bit for bit are the last checkpoints of both: parameters, optimizer, random state,
the weights of a reference that follows, data position, guard, ledger. Model, data, objective, optimizer and
precision are the stage's own; rows and steps are few.

Run as a program, this module is one of the two processes: `python -m ... FOLDER [--kill]`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gyrocompass.core.config import Config
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.recipe.verify_subject import Finding, Subject
from gyrocompass.train.checkpoint import REFERENCE_FILE, steps_on_disk
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.distributed import World
from gyrocompass.train.loop import train

STEPS = 4
CHECKPOINT_EVERY_STEPS = 2
KILLED_AFTER_STEP = 3
ROWS = 2
JOB = "job.json"
BOUND = "0 differ"
TENSOR_FILES = ("parameters.safetensors", "optimizer.safetensors", "rng.safetensors", REFERENCE_FILE)


class Job(Config):
    """What both processes need to know."""

    stage: TrainStage
    model: Path
    data: Path
    reference: Path | None
    device: str
    threads: int


def resume(subject: Subject) -> Finding:
    """Kill a short run, go on with it, and compare it with one that was not killed."""
    job = Job(
        stage=_following_at_once(subject.stage),
        model=subject.model.path,
        data=subject.data_artifact.path,
        reference=subject.reference,
        device=str(subject.device),
        threads=torch.get_num_threads(),
    )
    with tempfile.TemporaryDirectory(dir=subject.store.root, prefix="verify-") as scratch:
        folder = Path(scratch)
        (folder / JOB).write_text(job.model_dump_json(), encoding="utf-8")
        killed = _run(folder, "--kill")
        if killed.returncode != -signal.SIGKILL:
            return _stopped("was not killed", killed)
        left = [path.name for path in steps_on_disk(folder / "killed")]
        resumed = _run(folder)
        if resumed.returncode != 0:
            return _stopped("does not go on", resumed)
        compared, different = compare(folder / "killed", folder / "whole")
    return Finding(
        not different and left == [_checkpoint_name(CHECKPOINT_EVERY_STEPS)],
        f"{len(different)} differ",
        BOUND,
        f"of {compared:,} values, bit for bit; killed after step {KILLED_AFTER_STEP} of {STEPS}, "
        f"gone on from {', '.join(left) or 'nothing'}",
        f"{', '.join(different[:5])}: what a checkpoint does not hold, train/loop.py _save and _resume",
    )


def _run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gyrocompass.recipe.verify_resume", str(folder), *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def _stopped(what: str, process: subprocess.CompletedProcess[str]) -> Finding:
    said = "\n".join(process.stderr.strip().splitlines()[-8:])
    return Finding(False, what, BOUND, f"exit code {process.returncode}", f"what its process said:\n{said}")


def compare(ours: Path, theirs: Path) -> tuple[int, list[str]]:
    """Compare the last checkpoints of two runs bit for bit: how many values there are, and what differs."""
    name = _checkpoint_name(STEPS)
    compared, different = 0, []
    for file in TENSOR_FILES:
        a, b = (_tensors(run / name / file) for run in (ours, theirs))
        for key in sorted(a.keys() | b.keys()):
            if key not in a or key not in b or not _same_bits(a[key], b[key]):
                different.append(f"{file} {key}")
            compared += b[key].numel() if key in b else 0
    states = [json.loads((run / name / "state.json").read_text(encoding="utf-8")) for run in (ours, theirs)]
    for key in sorted(states[0].keys() | states[1].keys()):
        if states[0].get(key) != states[1].get(key):
            different.append(f"state.json {key}")
        compared += 1
    ledgers = [Ledger.load(run / name / "ledger.parquet") for run in (ours, theirs)]
    if ledgers[0] != ledgers[1]:
        different.append("ledger.parquet")
    return compared + ledgers[1].to_table().num_rows, different


def _tensors(path: Path) -> dict[str, Tensor]:
    """Those of a file of a checkpoint; none where it has no such file."""
    return load_file(path) if path.is_file() else {}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


# --- the processes ---


def _following_at_once(stage: TrainStage) -> TrainStage:
    """The stage, with a reference that follows the policy, if it does, before the run is killed."""
    if stage.reference_update is None:
        return stage
    return stage.model_copy(
        update={"reference_update": stage.reference_update.model_copy(update={"every_steps": 1})}
    )


def short_run(stage: TrainStage) -> TrainConfig:
    """The stage's config, with few and small steps."""
    rows = min(stage.rows_per_step, ROWS)
    changes = {
        "steps": STEPS,
        "epochs": None,
        "rows_per_step": rows,
        "rows_per_micro_batch": min(stage.rows_per_micro_batch, max(1, rows // 2)),
        "checkpoint_every_steps": CHECKPOINT_EVERY_STEPS,
        "checkpoints_kept": 1,
        "evaluate_every_steps": KILLED_AFTER_STEP,
        "early_stopping": None,
    }
    return TrainConfig.model_validate(stage.model_dump(include=set(TrainConfig.model_fields)) | changes)


def _go(job: Job, folder: Path, *, kill: bool) -> None:
    device = torch.device(job.device)

    def evaluate() -> Ledger:
        """Called by the loop after the step in question; what it answers plays no part."""
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        ledger = Ledger()
        ledger.add_tokens({}, [0.0])
        return ledger

    model = job.stage.trainable_model(job.model, device)
    train(
        model,
        TokenDataset.open(job.data),
        short_run(job.stage),
        folder,
        world=World(device=device),
        reference=job.stage.live_reference(model, job.reference, device),
        evaluate=evaluate,
    )


def main(arguments: Sequence[str]) -> None:
    """One of the two processes; see the module docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args(arguments)
    job = Job.model_validate_json((options.folder / JOB).read_text(encoding="utf-8"))
    torch.set_num_threads(job.threads)
    _go(job, options.folder / "killed", kill=options.kill)
    if not options.kill:
        _go(job, options.folder / "whole", kill=False)


if __name__ == "__main__":
    main(sys.argv[1:])
