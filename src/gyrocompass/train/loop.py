"""The one training loop: windows of packed rows x an objective, whatever the stage is called.

A *window* is the data of one optimizer step, the same for every way of splitting it: each rank takes
its share of the rows, micro-batches cut those further, and since the loss is normalised by the weights of the
whole window before the first forward pass, the gradients of all pieces add up to the gradient of the window.

    window -> micro-batches -> log-probs -> terms -> shares of the loss -> gradients (added up)
           -> the guard's verdict -> clip -> AdamW -> ledger, weights, metrics, evaluation, checkpoint

A run can be killed at any moment: `train` called again with the same arguments and folder goes on from the
newest whole checkpoint and ends bit-identical to a run that was not killed. Ctrl-C finishes the step it is
in, saves, and raises `Interrupted`.

Left out: anything an objective could do (objectives are functions in `loss`), and anything a source of
windows could do (`source.py`; rollouts are one, both in one window another).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from gyrocompass.core.artifact import writing
from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import BadInput, Interrupted, TrainingStopped
from gyrocompass.core.progress import Progress
from gyrocompass.data.curriculum import REFERENCE, reference_nll
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.loss.adapt import Observed
from gyrocompass.loss.blend import Blend, Weights
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.measure.ledger import Ledger
from gyrocompass.model.score import evaluating, scored_tokens
from gyrocompass.train import checkpoint
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.distributed import World
from gyrocompass.train.guard import Guard, Verdict
from gyrocompass.train.interrupt import interrupt_flag
from gyrocompass.train.metrics import MetricLog, Tracker
from gyrocompass.train.optim import AdamW, MainParameters, clipping, learning_rate
from gyrocompass.train.record import Alone, StepRecord
from gyrocompass.train.reference import LiveReference
from gyrocompass.train.source import MixedSource, PackedSource, Source, Window
from gyrocompass.train.stopping import EarlyStopping
from gyrocompass.train.window import WindowPass, window_gradients

Evaluate = Callable[[], Ledger]
"""Scores the model as it stands on held-out data."""


class Watch(Protocol):
    """Looks at the model now and then, for signs that a run does not do what it is meant to."""

    def look(self, step: int) -> str | None:
        """Judge the model; a sentence when something is wrong."""

    @property
    def is_over(self) -> bool:
        """Whether the run should end."""

    @property
    def best_step(self) -> int | None:
        """Where the model was best, of all looks so far."""

    def state(self) -> Any:
        """What it remembers, as JSON."""

    def restore(self, state: Any) -> None:
        """Take over what `state` returned."""


class Outcome(NamedTuple):
    """What a finished run can say of itself."""

    steps: int
    ledger: Ledger
    skipped_windows: tuple[int, ...]
    best_step: int | None
    stopped_early: bool


def train(
    model: nn.Module,
    data: TokenDataset | Source,
    config: TrainConfig,
    folder: Path,
    *,
    world: World = World(),  # noqa: B008  (immutable)
    teacher: nn.Module | None = None,
    reference: LiveReference | None = None,
    evaluate: Evaluate | None = None,
    watch: Watch | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
    label: str = "train",
) -> Outcome:
    """Train `model` in place on `data`, or go on where a killed run in `folder` stopped.

    Args:
        model: a causal LM whose weights have the dtype of `config.precision`, on `world.device`.
        data: tokens, read in the order of `config.sampler()`; or another source of windows.
        teacher: what objectives of distillation learn from, in evaluation mode on the same device.
        reference: what objectives measure distances from, where the data has no column of it; rollouts that
            bring the column have asked the same one.
        folder: checkpoints, metrics.jsonl, evaluations.jsonl and incidents.jsonl live here.
        evaluate: called every `evaluate_every_steps` and at the end.
        watch: looks at the model as often and before the first step, and may say that the run is over; the
            parameters that it found best are then those that stay.

    Raises:
        Interrupted: Ctrl-C; the state is saved.
        TrainingStopped: the guard's verdict, with the documents of the step.
        BadInput: the folder holds the checkpoints of another run; a reference is given twice, as a model and
            as a column, or cannot follow the policy as `config.reference_update` says.
    """
    if config.activation_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]  # a method of transformers' models
    model.train()
    source = PackedSource(data, config.sampler()) if isinstance(data, TokenDataset) else data
    progress = progress or Progress(quiet=True)
    _check_reference(source, reference, config)
    run = _Run(model, source, config, folder, world, teacher, reference, evaluate, watch, tracker, progress)
    return run.go(label)


class _Run:
    """The live state of a run: everything a checkpoint holds, and the steps that change it."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        config: TrainConfig,
        folder: Path,
        world: World,
        teacher: nn.Module | None,
        reference: LiveReference | None,
        evaluate: Evaluate | None,
        watch: Watch | None,
        tracker: Tracker | None,
        progress: Progress,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.source, self.config, self.folder = model, source, config, folder
        self.world, self.progress = world, progress
        self.teacher, self.reference = teacher, reference
        self.evaluate, self.watch = evaluate, watch
        self.objective = parse_objectives(config.objective).within(source.slices())
        self.blend = _blend(config, self.objective, source, reference)
        self.main = MainParameters(model)
        if reference is not None:
            reference.check_follows(model)
        self.optimizer = AdamW(self.main, config.optimizer)
        self.guard = Guard(config.guard)
        self.stopping = EarlyStopping(config.early_stopping)
        self.ledger = Ledger()
        self.step = 0
        self.window = 0
        self.skipped: set[int] = set()
        self.shown: dict[str, float] = {}
        self.metrics = MetricLog(folder / "metrics.jsonl", tracker)
        self.evaluations = MetricLog(folder / "evaluations.jsonl")
        self.incidents = MetricLog(folder / "incidents.jsonl")
        self.evaluated_step: int | None = None
        self.config_hash = config_hash({"config": config, "inputs": _fingerprint(model, source, reference)})
        self.steps = config.steps or self.source.windows() or 0

    # --- the run ---

    def go(self, label: str) -> Outcome:
        """Resume or begin, step to the end, and leave the best parameters in the model."""
        if not self._resume():
            torch.manual_seed(self.config.seed * 100_003 + self.world.rank)
            if self.watch is not None:
                self._look(self.watch)
            self._save()
        task = self.progress.task(label, self.steps, unit="step", done=self.step)
        with interrupt_flag() as interrupted:
            while self.step < self.steps and not self.is_over:
                before = self.step
                if not self._next_step():
                    break
                task.advance(self.step - before, **self.shown)
                if any(self.world.gather_json(bool(interrupted))):
                    self._save()
                    raise Interrupted(
                        f"stopped after step {self.step} of {self.steps}; everything is saved",
                        where=self.folder,
                        fix="run the same command again to go on",
                    )
        self._finish()
        task.finish()
        skipped = tuple(sorted(self.skipped))
        return Outcome(self.step, self.ledger, skipped, self._best_step(), self.is_over)

    @property
    def is_over(self) -> bool:
        """Whether the held-out loss or the watch says so."""
        return self.stopping.is_over or (self.watch is not None and self.watch.is_over)

    def _best_step(self) -> int | None:
        """The step whose parameters are kept, if any are."""
        return self.stopping.best_step if self.watch is None else self.watch.best_step

    def _next_step(self) -> bool:
        """Take one step (or rewind); False when the data is over."""
        window = self.source.next(self.step)
        if window is None:
            return False
        self.window += 1
        if self.window in self.skipped:
            return True
        started = time.perf_counter()
        weights = self.blend.weights(self.step)
        passed, norm = self._gradients(window, weights)
        verdict = self.guard.judge(passed.record.means(self.world), norm)
        if verdict is not None:
            self._handle(verdict, passed.record, window.data)
            return True
        step_ledger = self._update(passed, norm)
        rollout = {**self.source.metrics(), **passed.record.importance(self.world)}
        forced = passed.record.teacher_forced(self.world) if self.config.scheduled_sampling else {}
        if self.world.is_first:
            self._log(step_ledger, passed.loss, norm, weights, time.perf_counter() - started, rollout, forced)
        self._evaluate_if_due()
        if self.step % self.config.checkpoint_every_steps == 0:
            self._save()
        return True

    def _gradients(self, window: Window, weights: Weights) -> tuple[WindowPass, float]:
        """The window's gradients in the model, with what the pass leaves and their norm."""
        passed = window_gradients(
            self.model,
            self.main,
            self.objective,
            window,
            self.config,
            weights.objectives,
            self.world,
            step=self.step,
            teacher=self.teacher,
            reference=self.reference,
            slice_weights=weights.slices,
            measure_norms=self.blend.reads_gradient_norms(self.step),
        )
        return passed, self.main.gradient_norm()

    def _update(self, passed: WindowPass, norm: float) -> Ledger:
        """Step the optimizer, enter the step into the ledger, and let the weights of the next one follow."""
        rate = learning_rate(self.config.optimizer, self.step, self.steps)
        self.optimizer.step(rate, clipping(norm, self.config.optimizer.clip_norm))
        step_ledger = passed.record.ledger(self.world)
        self.ledger.merge(step_ledger)
        means = {name: s.value / s.weight for name, s in step_ledger.items("objective") if s.weight}
        excess = passed.record.excess(self.world) if self.blend.reads_excess else {}
        self.blend.observe(self.step, Observed(means, passed.gradient_norms, excess))
        self.step += 1
        if self.reference is not None:
            self.reference.follow(self.step, self.model, self.main)
        return step_ledger

    # --- what is said about it ---

    def _log(
        self,
        ledger: Ledger,
        loss: float,
        norm: float,
        weights: Weights,
        seconds: float,
        rollout: Mapping[str, float],
        forced: Mapping[str, float],
    ) -> None:
        self.metrics.append(
            {
                "step": self.step,
                "time_s": time.time(),
                "loss": loss,
                "learning_rate": learning_rate(self.config.optimizer, self.step - 1, self.steps),
                "gradient_norm": norm,
                "tokens": ledger.total.count,
                "tokens_per_second": ledger.total.count / seconds,
                "nll_nats": {name: s.value / s.count for name, s in ledger.items("slice") if s.count},
                "slice_tokens": {name: s.count for name, s in ledger.items("slice")},
                "objective": {name: s.value / s.weight for name, s in ledger.items("objective") if s.weight},
                "objective_weights": weights.objectives,
                "slice_weights": weights.slices,
                **({"rollout": rollout} if rollout else {}),
                **({"teacher_forced_nll_nats": forced} if forced else {}),
            }
        )
        self.shown = {"loss": loss, "tok/s": ledger.total.count / seconds}
        if "reward" in rollout:
            self.shown["reward"] = rollout["reward"]

    def _evaluate_if_due(self, *, force: bool = False) -> None:
        every = self.config.evaluate_every_steps
        due = force or (every is not None and self.step % every == 0)
        if due and self.watch is not None:
            self._look(self.watch)
        if self.evaluate is None or not due:
            return
        ledger = self.evaluate()
        self.model.train()
        if self.world.is_first:
            nll = {name: s.value / s.count for name, s in ledger.items("slice") if s.count}
            total = ledger.total
            row = {"step": self.step, "time_s": time.time(), "nll_nats": nll, "tokens": total.count}
            self.evaluations.append({**row, "total_nll_nats": total.value / max(1, total.count)})
            (self.folder / "evaluations").mkdir(exist_ok=True)
            ledger.save(self.folder / "evaluations" / f"step-{self.step:08d}.parquet")
        self.evaluated_step = self.step
        if self.stopping.observe(self.step, ledger) and self.config.early_stopping:
            self._keep_best()

    def _look(self, watch: Watch) -> None:
        """Let the watch judge the model as it stands; keep the parameters that it likes best."""
        reason = watch.look(self.step)
        self.model.train()
        if watch.best_step == self.step:
            self._keep_best()
        self.evaluated_step = self.step
        if reason is not None:
            self.progress.note(reason)

    def _keep_best(self) -> None:
        if self.world.is_first:
            with writing(self.folder / "best", "parameters") as draft:
                checkpoint.save_parameters(self.main, draft.path)

    def _finish(self) -> None:
        if self.evaluated_step != self.step:
            self._evaluate_if_due(force=True)
        self._save()
        keeps_best = self.config.early_stopping or (self.watch is not None and self.watch.is_over)
        if keeps_best and self._best_step() is not None:
            checkpoint.load_parameters(self.main, self.folder / "best")

    # --- the guard's verdict ---

    def _handle(self, verdict: Verdict, record: StepRecord, data: TokenDataset) -> None:
        """Stop, or rewind to the last checkpoint with this window passed over."""
        documents = record.worst_documents(self.world, partial(self._alone, data))
        rewinds = self.config.guard.policy == "rewind" and len(self.skipped) < self.config.guard.max_rewinds
        if self.world.is_first:
            self.incidents.append(
                {
                    "step": self.step + 1,
                    "window": self.window,
                    "verdict": str(verdict),
                    "action": "rewind" if rewinds else "stop",
                    "documents": [document._asdict() for document in documents],
                }
            )
        named = "\n".join(f"    {document}" for document in documents)
        what = f"{verdict} at step {self.step + 1} (data window {self.window}); its documents:\n{named}"
        if not rewinds:
            raise TrainingStopped(
                what,
                where=self.folder / "incidents.jsonl",
                fix="look at these documents; drop them, lower the rate, or set guard.policy: rewind",
            )
        self.progress.note(f"{what}\n  going back to the last checkpoint and passing over this window")
        self._resume(passing_over=self.skipped | {self.window})

    def _alone(self, data: TokenDataset, document: int) -> Alone:
        """The NLL of a document's counted tokens with nothing packed beside it, or what is not finite."""
        length = self.config.sequence_length
        with evaluating(self.model):
            try:
                scored = scored_tokens(self.model, data, length, 1, documents=[document], check_finite=True)
                return Alone(-np.concatenate([part.logprob_K for part in scored]), "")
            except BadInput as error:
                return Alone(np.array([np.nan]), str(error).replace("\n  where: ", ", "))

    # --- checkpoints ---

    def _save(self) -> None:
        state = {
            "config_hash": self.config_hash,
            "window": self.window,
            "skipped": sorted(self.skipped),
            "source": self.source.state(),
            "guard": self.guard.state(),
            "stopping": self.stopping.state(),
            "watch": None if self.watch is None else self.watch.state(),
            "blend": self.blend.state(),
            "evaluated_step": self.evaluated_step,
        }
        following = {} if self.reference is None else self.reference.tensors()
        snapshot = checkpoint.Snapshot(self.step, state, self.ledger, following)
        keep = self.config.checkpoints_kept
        checkpoint.save(self.folder, snapshot, self.main, self.optimizer, self.world, keep=keep)
        self.metrics.commit()

    def _resume(self, passing_over: Collection[int] = ()) -> bool:
        """Take over the newest whole checkpoint; False where there is none."""
        found = checkpoint.newest_whole(self.folder, self.progress.note) if self.world.is_first else None
        name = self.world.gather_json(found and found.name)[0]
        if name is None:
            return False
        path = self.folder / name
        snapshot = checkpoint.load(path, self.main, self.optimizer, self.world, self.config_hash)
        if self.reference is not None:
            self.reference.restore(snapshot.reference)
        state = snapshot.state
        self.step, self.ledger, self.window = snapshot.step, snapshot.ledger, state["window"]
        self.skipped = {*state["skipped"], *passing_over}
        self.source.restore(state["source"])
        self.guard.restore(state["guard"])
        self.stopping.restore(state["stopping"])
        if self.watch is not None and state["watch"] is not None:
            self.watch.restore(state["watch"])
        self.blend.restore(state["blend"])
        self.evaluated_step = state["evaluated_step"]
        if self.world.is_first:
            self.metrics.cut(self.step)
            self.evaluations.cut(self.evaluated_step or 0)
            # What stopped a window that is not passed over will stop it again.
            self.incidents.keep(lambda row: row["window"] in self.skipped)
        return True


def _data_of(source: Source) -> TokenDataset | None:
    """The data that a source reads, where it is known beforehand."""
    packed = source.data if isinstance(source, MixedSource) else source
    return packed.data if isinstance(packed, PackedSource) else None


def _blend(
    config: TrainConfig, objective: Composite, source: Source, reference: LiveReference | None
) -> Blend:
    """The weights of a run; those of slices are of its data, where that is known beforehand."""
    data = _data_of(source)
    if data is None:
        return Blend(config.blend, objective, None)
    blend = Blend(config.blend, objective, data.slice_names)
    if blend.reads_excess and reference is None:
        reference_nll(data)  # says what is missing
    return blend


def _check_reference(source: Source, reference: LiveReference | None, config: TrainConfig) -> None:
    """Refuse a reference that is given twice, or updates of one that is not there."""
    data = _data_of(source)
    if reference is not None and data is not None and REFERENCE in data.columns:
        raise BadInput(
            f"the reference is given twice: as a model, and as the column {REFERENCE} of the data",
            fix="train on the data without the column, or leave the model out",
        )
    if config.reference_update != (None if reference is None else reference.update):
        raise BadInput("reference_update is about a live reference, and says how this one follows the policy")


def _fingerprint(model: nn.Module, source: Source, reference: LiveReference | None) -> str:
    """A hash of what a resume must find again and no checkpoint holds: data, frozen weights, reference."""
    digest = hashlib.sha256(source.fingerprint().encode())
    if reference is not None:
        digest.update(reference.fingerprint().encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        if not parameter.requires_grad:
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
