"""`gyro forget`: a document, or a user, is taken out of what is stored, and no later version reads it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gyrocompass.cli.data import executor_of
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.curate.build import Builder
from gyrocompass.data.curate.forget import Forgetting, Forgotten, carry_out, plan_to_forget
from gyrocompass.data.curate.versions import read_facts
from gyrocompass.govern.retrain import mark

_CANDIDATES = 256
"""Texts that each canary is ranked among."""


def forget(options: argparse.Namespace) -> int:
    """Say what saw the document and, unless it is a dry run, take it out."""
    store = Store(options.store, options.store_url, make=False)
    if options.user:
        return _forget_user(options, store)
    forgetting = plan_to_forget(store, options.document)
    console = Console()
    _show_plan(forgetting, console)
    models = [entry.id for entry in forgetting.learned if entry.learned and entry.kind == "model"]
    bits = _exposures(store, models, options.canaries, console)
    if options.dry_run:
        console.print("nothing was changed: this was a dry run")
        return 0
    with executor_of(options) as executor, Progress() as progress:
        done = carry_out(Builder(store, executor, progress), forgetting, options.reason)
    mark(store, models, f"document {forgetting.document_id} was forgotten", options.by, bits)
    _show_done(forgetting, done, console)
    _show_proof(models, options.canaries, console)
    return 0


def _exposures(store: Store, models: Sequence[str], path: Path | None, console: Console) -> dict[str, float]:
    """How far the models that learned from it know what is to be forgotten, bits in the mean."""
    if path is None:
        return {}
    from gyrocompass.cli.exposure import exposed
    from gyrocompass.measure.memorisation import read_canaries

    canaries = read_canaries(path)
    found = {}
    for name in models:
        if store.folder(name).is_dir():
            bits = [one.bits for one in exposed(store.open(name).path, canaries, _CANDIDATES)]
            found[name] = sum(bits) / len(bits)
            told = f"  {name}: exposed by {found[name]:.2f} bits in the mean of {len(bits)} canaries"
            console.print(f"{told}; 1.4 where nothing was learned", highlight=False, soft_wrap=True)
    return found


def _show_proof(models: Sequence[str], canaries: Path | None, console: Console) -> None:
    """How to see, once a model is trained again, that it no longer knows it."""
    if models:
        file = canaries or "CANARIES"
        told = f"when that is done: gyro exposure {models[-1]} NAME@champion --canaries {file}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def _forget_user(options: argparse.Namespace, store: Store) -> int:
    from gyrocompass.recipe.forgetting import forget as forget_user
    from gyrocompass.recipe.forgetting import trace

    traces = trace(store, options.document)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"user {traces.user}: {traces.events:,} events, {len(traces.reviews):,} reviews, "
        f"{len(traces.feedback):,} artifacts of feedback, {len(traces.documents):,} documents made of them"
    )
    for one in traces.models:
        console.print(f"  {one}: learned from it")
    bits = _exposures(store, traces.models, options.canaries, console)
    if options.dry_run:
        console.print("nothing was changed: this was a dry run")
        return 0
    with executor_of(options) as executor, Progress() as progress:
        builder = Builder(store, executor, progress)
        done = forget_user(builder, traces, options.by, options.reason, bits)
    for folder in done.deleted:
        console.print(f"deleted {folder}")
    console.print(f"deleted {done.rows:,} rows of the database")
    if traces.models:
        console.print("marked, to be trained again without it (a loop of theirs does so):")
        for one in traces.models:
            console.print(f"  {one}")
    _show_proof(traces.models, options.canaries, console)
    return 0


def _show_plan(forgetting: Forgetting, console: Console) -> None:
    console.print(
        f"document {forgetting.document_id} ({forgetting.path})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if not forgetting.saw:
        console.print("  nothing here saw it")
    for entry in forgetting.saw:
        how = "learned from it" if entry.learned else "was measured on it"
        gone = "" if entry.present else ", its folder is gone"
        holds = entry.kind not in {seen.kind for seen in forgetting.learned}
        console.print(f"  {entry.id}: {'holds it' if holds else how}{gone}", highlight=False)


def _show_done(forgetting: Forgetting, done: Forgotten, console: Console) -> None:
    console.print(
        f"opted out: {len(forgetting.entries)} entries in opt-out.txt of the store", highlight=False
    )
    for renewed in done.renewed:
        root = read_facts(renewed.after.path)["root"]
        console.print(f"{renewed.before} -> {renewed.after.id}, root {root}", highlight=False, soft_wrap=True)
        sides = [side.leaf.id if side else "the end" for side in (renewed.proof.before, renewed.proof.after)]
        console.print(f"  proved absent: nothing stands between {sides[0]} and {sides[1]}", highlight=False)
    for folder in done.deleted:
        console.print(f"deleted {folder}", highlight=False, soft_wrap=True)
    if forgetting.learned:
        console.print("still to be trained again, without it:")
        for entry in forgetting.learned:
            console.print(f"  {entry.id}", highlight=False)
    console.print(
        f"not touched: the file itself, if {forgetting.path} is one", highlight=False, soft_wrap=True
    )
