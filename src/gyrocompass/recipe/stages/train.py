"""The training stage: a model artifact, a token artifact, the one loop, a model artifact.

Pretraining and fine-tuning are this stage with other data. The artifact holds the model in Hugging Face
format with its tokenizer, and beside it what the run said of itself:

    model.safetensors, config.json, tokenizer files
    metrics.jsonl        a row per step          evaluations.jsonl   a row per held-out evaluation
    ledger.parquet       the sums of all steps   incidents.jsonl     what the guard stopped, if anything
    evaluations/         the ledger of each evaluation, by slice, source and document
    trace.parquet        which tokens of which documents stood where in each step
    reward_model.json    of a reward model: its temperature and what held-out pairs say of it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import nn

from gyrocompass.core.artifact import Artifact, Draft
from gyrocompass.core.config import MistakesBelow
from gyrocompass.core.errors import BadInput
from gyrocompass.data.mixture import PLANNED, Sampler
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.data.trace import TRACE, write_trace
from gyrocompass.loss.objective import Kind, parse_objectives
from gyrocompass.measure.ledger import Ledger
from gyrocompass.measure.reward_calibration import save_calibration
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.served import Server
from gyrocompass.model.columns import score_rewards
from gyrocompass.model.fit import check_context, check_fit
from gyrocompass.model.future_heads import attach_future_heads, save_future_heads, without_future_heads
from gyrocompass.model.head import context_length
from gyrocompass.model.load import save_model
from gyrocompass.model.lora import LoraSettings, apply_lora, save_adapter
from gyrocompass.model.open import ADAPTER, open_model
from gyrocompass.model.scalar_head import attach_scalar_head, save_scalar_head, without_scalar_head
from gyrocompass.model.score import score_dataset
from gyrocompass.recipe.stage import (
    ModelName,
    OptionalDocumentsName,
    OptionalModelName,
    OptionalTokensName,
    Workplace,
)
from gyrocompass.recipe.stages.judging import JudgingStage
from gyrocompass.recipe.stages.model import (
    check_same_vocabulary,
    copy_model,
    folder_origin,
    folder_state,
)
from gyrocompass.recipe.stages.pairs import calibrated, check_halves, open_pairs
from gyrocompass.recipe.stages.rollouts import gaming_watch, read_prompts, rollout_source
from gyrocompass.train.config import PRECISIONS, TrainConfig
from gyrocompass.train.distributed import World
from gyrocompass.train.loop import Outcome, train
from gyrocompass.train.metrics import MlflowTracker
from gyrocompass.train.reference import LiveReference
from gyrocompass.train.rollout import RolloutConfig, RolloutSource
from gyrocompass.train.source import MixedSource, PackedSource, Source
from gyrocompass.train.watch import GamingWatch, WatchConfig

RUN_FILES = ("metrics.jsonl", "evaluations.jsonl", "incidents.jsonl", "watch.jsonl")
TIMED_FILES = {"metrics.jsonl", "evaluations.jsonl"}
EVALUATIONS = "evaluations"


class TrainStage(JudgingStage, TrainConfig):
    """Train `model` on `data`, watching `held_out`; every key of `TrainConfig` stands beside these.

    With `rollouts` it learns from its own samples of `prompts`, judged by `rewards`: instead of `data`, or
    beside it in one window. Then every objective says which of the two it is `of`.
    """

    kind: Literal["train"] = "train"
    makes: ClassVar[str] = "model"
    distributed: ClassVar[bool] = True
    model: ModelName
    data: OptionalTokensName = None
    held_out: OptionalTokensName = None
    held_out_documents: int | None = Field(default=None, ge=1)
    """Evaluate on the first so many held-out documents of each slice while training; None: on all of them."""
    lora: LoraSettings | None = None
    scalar_head: bool = False
    """Train a scalar head beside the head of words, for objectives that read one: a reward, a value."""
    future_heads: int = Field(default=0, ge=0)
    """How many tokens after the next one are predicted too, for the objective `multi_token`."""
    teacher: OptionalModelName = None
    """What objectives of distillation learn from."""
    prompts: OptionalDocumentsName = None
    """Documents whose prompts are sampled from."""
    prompt_slices: tuple[str, ...] | None = None
    """Of them, those of these slices; None: all."""
    rollouts: RolloutConfig | None = None
    reference: OptionalModelName = None
    """The model that distances are measured from, asked while training, unless the data has its column."""
    reference_folder: Path | None = None
    """The same, from a Hugging Face folder outside the recipe."""
    reference_without_lora: bool = False
    """Measure distances from the model itself with its LoRA switched off: what training began from."""
    held_out_pairs: OptionalTokensName = None
    """Tokens of preferences that a reward model's temperature is fitted and its accuracy measured on."""
    engine: Server | None = None
    """A server that samples, ahead by `rollouts.ahead_steps` while the learner computes; its weights are
    renewed by whoever runs it. None: the model itself samples."""
    watch: WatchConfig | None = None
    """Look out for gamed rewards, on `watch_prompts`, every `evaluate_every_steps`."""
    watch_prompts: OptionalDocumentsName = None

    @model_validator(mode="after")
    def _check_what_needs_held_out(self) -> TrainStage:
        for field in ("early_stopping", "evaluate_every_steps", "held_out_documents"):
            watches = field == "evaluate_every_steps" and self.watch is not None
            if self.held_out is None and getattr(self, field) is not None and not watches:
                raise ValueError(f"{field} needs held_out")
        return self

    @model_validator(mode="after")
    def _check_rollouts(self) -> TrainStage:
        if self.data is None and self.rollouts is None:
            raise ValueError("give one of data and rollouts, or both")
        self._check_whom_objectives_are_of()
        for field in ("prompts", "rewards", "engine", "watch"):
            if self.rollouts is None and getattr(self, field):
                raise ValueError(f"{field} goes with rollouts")
        if self.rollouts is not None:
            if self.scheduled_sampling is not None:
                raise ValueError(
                    "scheduled_sampling goes with data alone: a rollout is the model's own already"
                )
            if not (self.prompts and self.rewards and self.steps):
                raise ValueError("rollouts need prompts, rewards and steps")
            self.check_rewards()
            self._check_what_rollouts_leave_out(self.rollouts)
        if self.watch is not None and self.early_stopping is not None:
            raise ValueError("watch and early_stopping both keep the best parameters: choose one")
        if self.watch is not None and not (
            self.watch_prompts and self.has_reference and self.evaluate_every_steps
        ):
            raise ValueError("watch needs watch_prompts, reference and evaluate_every_steps")
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> TrainStage:
        ways = ("reference", "reference_folder", "reference_without_lora")
        given = [name for name in ways if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"there is one reference: give one of {' and '.join(given)}")
        if self.reference_without_lora and self.lora is None:
            raise ValueError("reference_without_lora needs lora: without it, the model is its own reference")
        if self.reference_update is not None:
            if self.reference_without_lora or not given:
                raise ValueError(
                    "reference_update needs a reference with weights of its own: name one, `reference: STAGE`"
                )
            if self.watch is not None:
                raise ValueError("watch measures from a reference that stays: leave reference_update out")
        if self.held_out_pairs is not None and not self.scalar_head:
            raise ValueError("held_out_pairs are for reward models: set `scalar_head: true`")
        return self

    @property
    def has_reference(self) -> bool:
        """Whether a reference is asked while training."""
        return bool(self.reference or self.reference_folder or self.reference_without_lora)

    def reward_lists(self) -> Mapping[str, Sequence[str | Mapping[str, Any]]]:
        """See `JudgingStage`."""
        gold = {} if self.watch is None else {"watch.gold": self.watch.gold}
        return {**super().reward_lists(), **gold}

    def outside(self) -> Any:
        """The state of the reference's folder, if it has one."""
        return None if self.reference_folder is None else folder_state(self.reference_folder)

    def origins(self) -> dict[str, Artifact]:
        """The reference's folder, where it is an artifact."""
        return {} if self.reference_folder is None else folder_origin("reference", self.reference_folder)

    def _check_what_rollouts_leave_out(self, rollouts: RolloutConfig) -> None:
        if rollouts.advantage.kind == "gae" and not self.scalar_head:
            raise ValueError("advantages by gae need `scalar_head: true`")
        if rollouts.advantage.kind != "gae" and rollouts.samples_per_prompt < 2:
            raise ValueError(
                "advantages compare the samples of a prompt: set rollouts.samples_per_prompt to 2"
            )
        if rollouts.advantage.beta and not self.has_reference:
            raise ValueError("rollouts.advantage.beta needs a reference")
        size = f"a step of rollouts is prompts_per_step * samples_per_prompt samples, here {rollouts.samples}"
        mixture = [("slice_weights", ""), ("slice_temperature", ""), ("slice_most_repeats", "")]
        for field, why in (*mixture, ("curriculum", ""), ("rows_per_step", f": {size}")):
            if self.data is None and field in self.model_fields_set and getattr(self, field) is not None:
                raise MistakesBelow([((field,), f"{field} goes with data, not with rollouts alone{why}")])

    def _check_whom_objectives_are_of(self) -> None:
        """With data and rollouts each objective says which it is of, and each has an objective."""
        given = [kind for kind in get_args(Kind) if getattr(self, kind) is not None]
        parts = parse_objectives(self.objective, "objective").parts
        for number, part in enumerate(parts):
            if part.of is None and len(given) > 1:
                said = "the stage has data and rollouts: say which it is about, `of: data` or `of: rollouts`"
                raise MistakesBelow([(("objective", str(number)), said)])
            if part.of is not None and part.of not in given:
                said = f"it is of {part.of}, and the stage has only {given[0]}"
                raise MistakesBelow([(("objective", str(number)), said)])
        for kind in given:
            if len(given) > 1 and all(part.of != kind for part in parts):
                raise ValueError(f"no objective is of {kind}: add one, or leave {kind} out")

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """See the module docstring."""
        world = workplace.world
        base = workplace.input("model")
        data = TokenDataset.open(workplace.input("data")) if self.data else None
        held_out = TokenDataset.open(workplace.input("held_out")) if self.held_out else None
        if held_out is not None and data is not None:
            check_held_out(data, held_out, f"stages.{workplace.name}.held_out")
        pairs = self._held_out_pairs(workplace, data)
        model = self.trainable_model(base, world.device)
        where = f"stages.{workplace.name}"
        if data is None:
            check_context(context_length(model), self.sequence_length, where)
        else:
            check_fit(model, data, self.sequence_length, where)
        teacher = self._teacher(workplace, base)
        reference = self._reference(workplace, base, model)
        config = TrainConfig.model_validate(self.model_dump(include=set(TrainConfig.model_fields)))
        evaluate = self._evaluation(model, held_out, workplace.world) if held_out is not None else None
        tracker = self._tracker(workplace) if world.is_first else None
        source, watch = self._source(workplace, model, data, config, reference)
        outcome = train(
            model,
            source,
            config,
            workplace.work,
            world=world,
            teacher=teacher,
            reference=reference,
            evaluate=evaluate,
            watch=watch,
            tracker=tracker,
            progress=workplace.progress,
            label=workplace.name,
        )
        if world.is_first:
            if self.lora and not self.lora.merge_on_save:
                copy_model(base, draft.path)
                with without_scalar_head(model) as head, without_future_heads(model) as ahead:
                    save_adapter(model, draft.path / ADAPTER)
                if head is not None:
                    save_scalar_head(head, draft.path)
                if ahead is not None:
                    save_future_heads(ahead, draft.path)
            else:
                save_model(model, draft.path, tokenizer=load_tokenizer(base))
            self._keep_run(workplace.work, draft, outcome)
            if pairs is not None:
                self._calibrate(model, pairs, draft)
            if data is not None:
                sampler, skipped = config.sampler(), outcome.skipped_windows
                tokens, steps = workplace.input("data"), outcome.steps
                write_trace(draft.path / TRACE, data, tokens, sampler, steps=steps, skipped=skipped)
                if self.rollouts is None:
                    planned = json.dumps(Sampler(data, sampler).planned(), indent=2, ensure_ascii=False)
                    (draft.path / PLANNED).write_text(planned + "\n", encoding="utf-8")
        if tracker is not None:
            tracker.close()

    def of_data(self) -> TrainStage:
        """The stage as if it had no rollouts: with the objectives that are of its data."""
        if self.rollouts is None:
            return self
        kept = [
            entry
            for entry, part in zip(self.objective, parse_objectives(self.objective).parts, strict=True)
            if part.of == "data"
        ]
        left_out = (
            "rollouts",
            "rewards",
            "prompts",
            "engine",
            "watch",
            "watch_prompts",
            "blend",
            *(("evaluate_every_steps",) if self.held_out is None else ()),
        )
        changes = {field: type(self).model_fields[field].get_default() for field in left_out}
        return self.model_copy(update={**changes, "objective": tuple(kept)})

    def trainable_model(self, folder: Path, device: torch.device) -> nn.Module:
        """The model as training begins: in the stage's precision, with its LoRA and its heads."""
        model = open_model(folder, dtype=PRECISIONS[self.precision], device=device)
        if self.lora:
            model = apply_lora(model, self.lora, seed=self.seed)
        if self.scalar_head:
            attach_scalar_head(model)
        if self.future_heads:
            attach_future_heads(model, self.future_heads)
        return model

    def live_reference(
        self, model: nn.Module, folder: Path | None, device: torch.device, precision: str | None = None
    ) -> LiveReference | None:
        """The reference that the stage asks while training, if it asks one.

        Args:
            model: the one that is trained.
            folder: that of the reference, where it is another model.
            device: where that is to be.
            precision: another than the stage's.
        """
        if self.reference_without_lora:
            return LiveReference(model, lora_off=True)
        if folder is None:
            return None
        own = open_model(folder, dtype=PRECISIONS[precision or self.precision], device=device)
        return LiveReference(own, update=self.reference_update)

    def _reference(self, workplace: Workplace, base: Path, model: nn.Module) -> LiveReference | None:
        folder = self.reference_folder or (workplace.input("reference") if self.reference else None)
        if folder is not None:
            key = "reference" if self.reference else "reference_folder"
            check_same_vocabulary(base, folder, f"stages.{workplace.name}.{key}")
        reference = self.live_reference(model, folder, workplace.world.device)
        if reference is not None:
            check_context(context_length(reference.model), self.sequence_length, f"stages.{workplace.name}")
        return reference

    def _teacher(self, workplace: Workplace, base: Path) -> nn.Module | None:
        if self.teacher is None:
            return None
        folder = workplace.input("teacher")
        check_same_vocabulary(base, folder, f"stages.{workplace.name}.teacher")
        return open_model(folder, dtype=PRECISIONS[self.precision], device=workplace.world.device)

    def _source(
        self,
        workplace: Workplace,
        model: nn.Module,
        data: TokenDataset | None,
        config: TrainConfig,
        reference: LiveReference | None,
    ) -> tuple[TokenDataset | Source, GamingWatch | None]:
        """Where windows come from, and who watches them."""
        if self.rollouts is None:
            assert data is not None
            return data, None
        rollouts, watch = self._rollouts(workplace, model, reference)
        if data is None:
            return rollouts, watch
        return MixedSource(PackedSource(data, config.sampler()), rollouts), watch

    def _rollouts(
        self, workplace: Workplace, model: nn.Module, reference: LiveReference | None
    ) -> tuple[RolloutSource, GamingWatch | None]:
        """Where samples come from, and who watches them."""
        assert self.rollouts is not None
        tokenizer = load_tokenizer(workplace.input("model"))
        longest = self.sequence_length + 1 - self.rollouts.max_new_tokens
        length, rows, autocast = self.sequence_length, self.rows_per_micro_batch, self._autocast
        tools = self.tools(
            workplace, dtype=PRECISIONS[self.precision], length=length, rows=rows, autocast=autocast
        )
        rewards = parse_rewards(self.rewards, tools)
        said = None if reference is None else partial(reference.column, length, rows, autocast=autocast)
        source = rollout_source(
            read_prompts(workplace.input("prompts"), tokenizer, longest, self.prompt_slices),
            model,
            tokenizer,
            rewards,
            self.rollouts,
            length,
            rows,
            reference=said,
            upstream=self.engine,
            world=workplace.world,
        )
        if self.watch is None:
            return source, None
        assert said is not None
        return source, gaming_watch(
            read_prompts(workplace.input("watch_prompts"), tokenizer, longest, self.prompt_slices),
            model,
            said,
            tokenizer,
            rewards,
            parse_rewards(self.watch.gold, tools, where="watch.gold"),
            self.watch,
            self.rollouts,
            length,
            rows,
            workplace.work if workplace.world.is_first else None,
            workplace.world,
            autocast=autocast,
        )

    @property
    def _autocast(self) -> bool:
        return self.precision == "bf16_autocast"

    def _held_out_pairs(self, workplace: Workplace, data: TokenDataset | None) -> TokenDataset | None:
        """The pairs that a reward model is calibrated on, if there are any."""
        if self.held_out_pairs is None:
            return None
        where = f"stages.{workplace.name}.held_out_pairs"
        pairs = open_pairs(workplace.input("held_out_pairs"), where)
        if data is not None:
            check_held_out(data, pairs, where)
        check_halves(pairs, where)
        return pairs

    def _calibrate(self, model: nn.Module, pairs: TokenDataset, draft: Draft) -> None:
        """Fit the reward model's temperature, and put it beside its weights."""
        length, rows = self.sequence_length, self.rows_per_micro_batch
        found = calibrated(pairs, score_rewards(model, length, rows, pairs, autocast=self._autocast))
        save_calibration(found, draft.path)
        draft.counts |= {
            "held_out_pairs": found.pairs,
            "accuracy": round(found.accuracy, 4),
            "calibration_error": round(found.ece_after, 4),
            "temperature": round(found.temperature, 4),
        }

    def _evaluation(self, model: nn.Module, held_out: TokenDataset, world: World) -> Callable[[], Ledger]:
        documents = _first_of_each_slice(held_out, self.held_out_documents)[world.rank :: world.size]

        def evaluate() -> Ledger:
            own = score_dataset(
                model,
                held_out,
                documents=documents,
                length=self.sequence_length,
                rows=self.rows_per_micro_batch,
                autocast=self._autocast,
            )
            merged = Ledger()
            for rank_bytes in world.gather_bytes(own.to_bytes()):
                merged.merge(Ledger.from_bytes(rank_bytes))
            return merged

        return evaluate

    def _keep_run(self, work: Path, draft: Draft, outcome: Outcome) -> None:
        for name in RUN_FILES:
            if (work / name).exists():
                shutil.copy(work / name, draft.path / name)
        draft.records |= TIMED_FILES
        if (work / EVALUATIONS).exists():
            shutil.copytree(work / EVALUATIONS, draft.path / EVALUATIONS)
        outcome.ledger.save(draft.path / "ledger.parquet")
        total = outcome.ledger.total
        draft.counts |= {
            "steps": outcome.steps,
            "tokens": total.count,
            "bytes": total.bytes,
            "skipped_windows": len(outcome.skipped_windows),
        }
        halted = self.watch is not None and outcome.stopped_early
        if (self.early_stopping or halted) and outcome.best_step is not None:
            draft.counts["best_step"] = outcome.best_step

    def _tracker(self, workplace: Workplace) -> MlflowTracker | None:
        if workplace.tracking is None:
            return None
        run_file = workplace.work / "mlflow_run_id"
        parameters = {"stage": workplace.name, **self.settings()}
        return MlflowTracker(workplace.tracking, workplace.store.root, run_file, parameters)


def check_held_out(data: TokenDataset, held_out: TokenDataset, where: str) -> None:
    """Refuse held-out documents that are trained on, or that measure nothing.

    Raises:
        BadInput: they are or do.
    """
    if not held_out.n_targets:
        raise BadInput(
            "nothing is held out: there is no token to measure on",
            where=where,
            fix="give more documents, or raise held_out_share, to the same value in both split stages; for "
            "gyro train: --set stages.train_documents.held_out_share=0.2 "
            "--set stages.held_out_documents.held_out_share=0.2",
        )
    both = sorted(set(data.document_ids) & set(held_out.document_ids))
    if both:
        raise BadInput(
            f"{len(both)} held-out documents are in the training data too: {', '.join(both[:3])}"
            + (", ..." if len(both) > 3 else ""),
            where=where,
            fix="give both split stages the same documents, held_out_share and salt",
        )


def _first_of_each_slice(data: TokenDataset, limit: int | None) -> Sequence[int]:
    if limit is None:
        return range(data.n_documents)
    taken = [0] * len(data.slice_names)
    chosen = []
    for document, slice_index in enumerate(data.slice_D.tolist()):
        if taken[slice_index] < limit:
            taken[slice_index] += 1
            chosen.append(document)
    return chosen
