"""The registry in MLflow's model registry, so that people see it where they look already.

    versions, aliases --mirror--> registered models, model versions with tags, aliases

One way: what is changed there is not read back, and aliases there are set to what they are here. A version
keeps its number, since numbers count up in both; where MLflow has another version under it, that is refused.
Nothing is copied: a version's source is the artifact's folder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gyrocompass.core.errors import BadInput, GyroError, MissingDependency
from gyrocompass.core.store import Store
from gyrocompass.govern.registry import Version, versions

ARTIFACT, POLICY, KIND = "gyro.artifact", "gyro.policy", "gyro.kind"


class Mirrored(NamedTuple):
    """What was new there."""

    uri: str
    names: int
    versions: int
    aliases: int
    """Set anew or taken away."""


def mirror(store: Store, uri: str | None = None) -> Mirrored:
    """Bring MLflow's registry up to date.

    Args:
        store: with the registry.
        uri: of MLflow's store; None: the one beside the artifacts, where runs are tracked.

    Raises:
        MissingDependency: MLflow is not installed.
        GyroError: its store does not work.
        BadInput: it has another version under a number of ours.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise MissingDependency("mlflow", extra="mlflow", needed_for="a mirror in MLflow") from error
    place = uri or f"sqlite:///{store.root.resolve() / 'mlflow.db'}"
    by_name: dict[str, list[Version]] = {}
    for one in versions(store):
        by_name.setdefault(one.name, []).append(one)
    made = names = moved = 0
    try:
        client = MlflowClient(tracking_uri=place, registry_uri=place)
        known = {model.name: dict(model.aliases) for model in client.search_registered_models()}
        for name, own in by_name.items():
            if name not in known:
                client.create_registered_model(name, tags={KIND: own[0].artifact_id.rpartition("-")[0]})
                names += 1
            made += _versions(client, store, name, own)
            moved += _aliases(client, name, own, known.get(name, {}))
    except MlflowException as error:
        raise GyroError(f"MLflow's registry does not work: {error}", where=place) from error
    return Mirrored(place, names, made, moved)


def _versions(client: Any, store: Store, name: str, own: list[Version]) -> int:
    there = {int(one.version): one.tags for one in client.search_model_versions(f"name = '{name}'")}
    made = 0
    for one in own:
        if one.version in there:
            if there[one.version].get(ARTIFACT) != one.artifact_id:
                raise BadInput(
                    f"MLflow has another {name}:{one.version}, which is not of this store",
                    fix="mirror into a registry of its own: --uri",
                )
            continue
        tags = {ARTIFACT: one.artifact_id, "gyro.by": one.by}
        if one.policy_id is not None:
            tags[POLICY] = one.policy_id
        source = store.folder(one.artifact_id).resolve().as_uri()
        got = client.create_model_version(name, source=source, tags=tags)
        if int(got.version) != one.version:
            client.delete_model_version(name, got.version)
            raise BadInput(
                f"MLflow would call {name}:{one.version} version {got.version}: a version there was deleted",
                fix="mirror into a registry of its own: --uri",
            )
        made += 1
    return made


def _aliases(client: Any, name: str, own: list[Version], there: dict[str, str]) -> int:
    here = {alias: str(one.version) for one in own for alias in one.aliases}
    for alias in {*there} - {*here}:
        client.delete_registered_model_alias(name, alias)
    changed = {alias: number for alias, number in here.items() if str(there.get(alias)) != number}
    for alias, number in changed.items():
        client.set_registered_model_alias(name, alias, number)
    return len(changed) + len({*there} - {*here})
