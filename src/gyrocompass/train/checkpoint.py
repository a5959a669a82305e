"""Checkpoints: everything that decides how a run goes on, in a folder that exists whole or not at all.

    step-00000100/
        manifest.json           hashes of the files below (an artifact of kind `checkpoint`)
        parameters.safetensors  the trained parameters, in float32 or wider
        optimizer.safetensors   AdamW's moments and step counts
        rng.safetensors         the random state of every rank
        reference.safetensors   the weights of a reference that follows the policy, if there is one
        ledger.parquet          the sums of all steps so far
        state.json              step, data position, guard, early stopping, adaptive weights, the hash of the
                                run's config

Frozen parameters are not saved: they are those of the model that training began from. A bounded number of
checkpoints stays on disk. A damaged one is named in a warning and the one before it is used.

Left out: sharded and asynchronous saving.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gyrocompass.core.artifact import read_artifact, writing
from gyrocompass.core.errors import BadInput, DamagedArtifact
from gyrocompass.measure.ledger import Ledger
from gyrocompass.train.distributed import World
from gyrocompass.train.optim import AdamW, MainParameters

REFERENCE_FILE = "reference.safetensors"


class Snapshot(NamedTuple):
    """What a checkpoint holds besides the tensors that are loaded in place."""

    step: int
    state: dict[str, Any]
    ledger: Ledger
    reference: Mapping[str, Tensor] = MappingProxyType({})
    """The weights of a reference that follows the policy."""


def save(
    folder: Path,
    snapshot: Snapshot,
    main: MainParameters,
    optimizer: AdamW,
    world: World,
    *,
    keep: int,
) -> None:
    """Write the checkpoint of a step (first rank; the others lend their random state) and forget old ones."""
    rng = _gather_rng(world)
    if world.is_first:
        target = folder / f"step-{snapshot.step:08d}"
        with writing(target, "checkpoint") as draft:
            save_parameters(main, draft.path)
            save_file(_plain(optimizer.tensors()), draft.path / "optimizer.safetensors")
            save_file(rng, draft.path / "rng.safetensors")
            if snapshot.reference:
                save_file(_plain(snapshot.reference), draft.path / REFERENCE_FILE)
            snapshot.ledger.save(draft.path / "ledger.parquet")
            state = {"step": snapshot.step, **snapshot.state}
            (draft.path / "state.json").write_text(json.dumps(state), encoding="utf-8")
            draft.counts["step"] = snapshot.step
        for old in steps_on_disk(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load(path: Path, main: MainParameters, optimizer: AdamW, world: World, config_hash: str) -> Snapshot:
    """Load a checkpoint in place: parameters, optimizer, this rank's random state.

    Raises:
        BadInput: the checkpoint belongs to a run of another config, or of another number of ranks.
        DamagedArtifact: a file is missing or not what was written.
    """
    read_artifact(path, kind="checkpoint")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["config_hash"] != config_hash:
        raise BadInput(
            "these checkpoints belong to a run with another config, data or model",
            where=str(path),
            fix="train into another folder, or delete this one",
        )
    rng = load_file(path / "rng.safetensors")
    if len({name.split(".")[0] for name in rng}) != world.size:
        raise BadInput(
            f"this checkpoint was written by another number of ranks than {world.size}",
            where=str(path),
            fix="resume with as many ranks as before",
        )
    load_parameters(main, path)
    optimizer.restore(load_file(path / "optimizer.safetensors"))
    _restore_rng(rng, world)
    reference = load_file(path / REFERENCE_FILE) if (path / REFERENCE_FILE).is_file() else {}
    return Snapshot(state["step"], state, Ledger.load(path / "ledger.parquet"), reference)


def save_parameters(main: MainParameters, folder: Path) -> None:
    """Write the trained parameters, in float32 or wider, to `parameters.safetensors`."""
    save_file(_plain(main), folder / "parameters.safetensors")


def load_parameters(main: MainParameters, folder: Path) -> None:
    """Put back what `save_parameters` wrote, in place."""
    for name, saved in load_file(folder / "parameters.safetensors").items():
        main.assign(name, saved)


def steps_on_disk(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-[0-9]*[0-9]"))


def newest_whole(folder: Path, warn: Any) -> Path | None:
    """The newest checkpoint that is undamaged; each damaged one is passed to `warn` with its error."""
    for path in reversed(steps_on_disk(folder)):
        try:
            read_artifact(path, kind="checkpoint")
        except DamagedArtifact as error:
            warn(f"{error}\n  going back to the checkpoint before it")
        else:
            return path
    return None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _gather_rng(world: World) -> dict[str, Tensor]:
    own = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(world.device)
    gathered: dict[str, Tensor] = {}
    for kind, state in own.items():
        for rank, data in enumerate(world.gather_bytes(bytes(state.tolist()))):
            gathered[f"{rank}.{kind}"] = torch.tensor(list(data), dtype=torch.uint8)
    return gathered


def _restore_rng(rng: Mapping[str, Tensor], world: World) -> None:
    torch.set_rng_state(rng[f"{world.rank}.cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(rng[f"{world.rank}.cuda"], world.device)
