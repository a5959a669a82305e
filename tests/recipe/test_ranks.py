"""A whole recipe under `torchrun`: the same stages, the same counts, the same model as on one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from databases import stored_in
from gyrocompass.core.artifact import read_artifact
from gyrocompass.recipe.record import RunRecord
from tiny_recipe import FinishedRun


def artifacts(store: Path) -> dict[str, Path]:
    record = RunRecord.model_validate_json((store / "runs" / "tiny" / "run.json").read_text())
    return {stage.name: store / "artifacts" / stage.artifact for stage in record.stages}


@pytest.mark.slow
def test_two_ranks_make_the_model_that_one_makes(finished_run: FinishedRun, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "gyrocompass", "run", str(finished_run.recipe), *stored_in(tmp_path)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    one, two = artifacts(finished_run.store), artifacts(tmp_path)
    assert one.keys() == two.keys()
    for name in ("train_tokens", "untrained"):
        assert one[name].name == two[name].name, "data and first weights are the same artifacts"
    for name in ("pretrained", "fine_tuned"):
        ours = load_file(two[name] / "model.safetensors")
        for key, tensor in load_file(one[name] / "model.safetensors").items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)
        counts = [read_artifact(folder[name]).manifest.counts for folder in (one, two)]
        assert counts[0] == counts[1]
    assert done.stdout.count("Report:") == 1, "the first rank alone talks"


@pytest.mark.slow
def test_a_mistake_under_torchrun_ends_all_ranks(finished_run: FinishedRun, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    recipe = ["run", str(finished_run.recipe), *stored_in(tmp_path)]
    wrong = ["--set", "stages.documents.sources=[{files: {path: /nowhere}}]"]
    done = subprocess.run(
        [*launcher, "-m", "gyrocompass", *recipe, *wrong],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0 and "no such file" in done.stderr
