"""Who takes training steps: our loop, a loop written by hand, and TRL's trainers, on the same tokens.

A contender trains on one batch over and over and calls `pace` between steps, with what the step said of
itself; whoever times it works inside that call, and ends the training by an exception. A step is thus all
that lies between two calls: reading the data, the gradients, the optimizer, the logs.

Settings are the same: the weights' dtype (no autocast), AdamW with one rate, clipping at 1, no dropout. TRL's
optimizer steps the bf16 weights themselves; ours float32 masters of them. Pairs share a prompt of half
their length; each side is computed whole by everybody.

Shape legend: B sequences of L tokens; the first B / 2 of pairs are the chosen sides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from align_models import token_ids
from torch import Tensor

from gyrocompass.data.curriculum import REFERENCE
from gyrocompass.data.pack import assemble, bundle, cut
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.model.columns import score_logprobs
from gyrocompass.model.load import load_causal_lm
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.loop import train
from gyrocompass.train.source import PackedSource, Window

RATE, BETAS, EPSILON, CLIP, BETA = 2e-5, (0.9, 0.999), 1e-8, 1.0, 0.1
STEPS = 1_000_000
"""More than anybody takes: the pace ends it."""


class Task(NamedTuple):
    """What everybody trains: a model on one batch."""

    kind: Literal["sft", "dpo"]
    model: str
    """A folder with model and tokenizer."""
    sequences: int = 4
    length: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def prompt(self) -> int:
        """Tokens of a sequence that are not learned."""
        return self.length // 2 if self.kind == "dpo" else 1

    @property
    def tokens(self) -> int:
        """Tokens that the model reads in a step."""
        return self.sequences * self.length

    def ids_BL(self) -> Tensor:
        """The batch; the two sides of a pair have one prompt."""
        ids_BL = torch.tensor(token_ids(Path(self.model), self.tokens)).view(self.sequences, self.length)
        if self.kind == "dpo":
            pairs = self.sequences // 2
            ids_BL[pairs:, : self.prompt] = ids_BL[:pairs, : self.prompt]
        return ids_BL

    def load(self) -> Any:
        """The model as `transformers` loads it, in training mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype)).train()


class Said(NamedTuple):
    """What a step said of itself."""

    loss: float
    nll_nats: float
    """Mean over the learned tokens, those of both sides: DPO's loss at step 0 is ln 2 whatever they are."""


Pace = Callable[[Callable[[], Said] | None, float], None]
"""Called between steps with where to read what the last one said (None before the first), and the seconds
that a reference pass before the first step took."""


def ours(task: Task, pace: Pace, folder: Path) -> None:
    """`train`, with everything that a user's step includes."""
    model, apart_s = load_causal_lm(Path(task.model), dtype=getattr(torch, task.dtype)), 0.0
    dpo = task.kind == "dpo"
    length = 2 * task.length if dpo else task.length
    data = TokenDataset.of(_rows(task))
    if dpo:
        started = time.perf_counter()
        data = _with_reference(model, data, length)
        apart_s = time.perf_counter() - started
    config = TrainConfig.model_validate(
        {
            "steps": STEPS,
            "sequence_length": length,
            "rows_per_step": task.tokens // length,
            "rows_per_micro_batch": task.tokens // length,
            "objective": [{"dpo": {"beta": BETA}}] if dpo else ["nll"],
            "precision": {"bfloat16": "bf16", "float32": "float32"}[task.dtype],
            "checkpoint_every_steps": STEPS,
            "optimizer": {
                "learning_rate": RATE,
                "beta1": BETAS[0],
                "beta2": BETAS[1],
                "epsilon": EPSILON,
                "weight_decay": 0.0,
                "clip_norm": CLIP,
                "schedule": {"shape": "constant"},
            },
        }
    )

    class Paced(PackedSource):
        """The batch again and again, each time at the pace."""

        def next(self, step: int) -> Window | None:
            """See `Source`."""
            pace((lambda: _last_row(folder / "metrics.jsonl")) if step else None, apart_s)
            pieces = cut(data, length)
            bounds = bundle(data, pieces, length)
            rows = [list(range(*bound)) for bound in pairwise(bounds.tolist())]
            return Window(assemble(data, pieces, rows, length), data)

    train(model, Paced(data, config.sampler()), config, folder)


def _rows(task: Task) -> list[TokenRow]:
    ids_BL = task.ids_BL().numpy()
    weights = (np.arange(task.length) >= task.prompt).astype(np.float32)
    pairs = task.sequences // 2
    labels = [{"side": float(b < pairs)} if task.kind == "dpo" else {} for b in range(task.sequences)]
    units = [f"pair-{b % pairs}" if task.kind == "dpo" else "" for b in range(task.sequences)]
    rows = [
        TokenRow(f"document-{b}", "code", "stdlib", ids_BL[b], ids_BL[b] * 0, weights, "", unit, {}, label)
        for b, (unit, label) in enumerate(zip(units, labels, strict=True))
    ]
    return sorted(rows, key=lambda row: row.unit)


def _with_reference(model: torch.nn.Module, data: TokenDataset, length: int) -> TokenDataset:
    """The column `reference_logprob`, as the stage of kind reference writes it."""
    return data.with_column(REFERENCE, score_logprobs(model, length, 8, data))


def _last_row(path: Path) -> Said:
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return Said(row["loss"], row["nll_nats"]["code"])


def by_hand(task: Task, pace: Pace, folder: Path) -> None:
    """Plain PyTorch: full logits, float32 cross entropy, the optimizer on the weights themselves."""
    model, ids_BL = task.load(), task.ids_BL()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
    )

    def nll_BL() -> Tensor:
        logits_BLV = model(ids_BL, use_cache=False).logits[:, task.prompt - 1 : -1].float()
        targets_BL = ids_BL[:, task.prompt :]
        nll = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="none")
        return nll.view_as(targets_BL)

    started = time.perf_counter()
    with torch.no_grad():
        reference_B = -nll_BL().sum(1) if task.kind == "dpo" else torch.zeros(())
    apart_s = time.perf_counter() - started
    said: Callable[[], Said] | None = None
    for _ in range(STEPS):
        pace(said, apart_s)
        own = nll_BL()
        loss = own.mean()
        if task.kind == "dpo":
            chosen_P, rejected_P = (-own.sum(1) - reference_B).chunk(2)
            loss = -F.logsigmoid(BETA * (chosen_P - rejected_P)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        numbers = Said(float(loss.detach()), float(own.detach().mean()))
        said = lambda numbers=numbers: numbers  # noqa: E731
        del own, loss


@dataclass(frozen=True)
class Trl:
    """TRL's trainer for the task."""

    checkpointing: bool = False
    precomputed: bool = False

    def __call__(self, task: Task, pace: Pace, folder: Path) -> None:
        """Train."""
        import trl
        from transformers import AutoTokenizer

        base, made = (
            (trl.DPOTrainer, trl.DPOConfig) if task.kind == "dpo" else (trl.SFTTrainer, trl.SFTConfig)
        )
        special = {"beta": BETA, "precompute_ref_log_probs": self.precomputed} if task.kind == "dpo" else {}
        config = made(
            output_dir=str(folder), gradient_checkpointing=self.checkpointing, **_same(task), **special
        )
        started = time.perf_counter()
        trainer = _noted(base)(
            model=task.load(),
            args=config,
            train_dataset=_their_rows(task),
            processing_class=AutoTokenizer.from_pretrained(task.model),
        )
        apart_s = time.perf_counter() - started if self.precomputed else 0.0
        trainer.add_callback(_at_pace(trainer, task, pace, apart_s))
        trainer.train()


def _same(task: Task) -> dict[str, Any]:
    """The settings that are everybody's."""
    return {
        "per_device_train_batch_size": task.sequences // (2 if task.kind == "dpo" else 1),
        "max_steps": STEPS,
        "max_length": task.length,
        "learning_rate": RATE,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPSILON,
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _their_rows(task: Task) -> Any:
    from datasets import Dataset

    rows = task.ids_BL().tolist()
    if task.kind == "sft":
        return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    sides = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)
    return Dataset.from_list(
        [
            {"prompt_ids": a[: task.prompt], "chosen_ids": a[task.prompt :], "rejected_ids": b[task.prompt :]}
            for a, b in sides
        ]
    )


def _noted(base: type) -> type:
    """The trainer, with each step's loss noted unrounded, and with data that is tokens already."""

    class Noted(base):  # type: ignore[misc]  # a class that is known when it runs
        noted = float("nan")

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.noted = float((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return Noted


def _at_pace(trainer: Any, task: Task, pace: Pace, apart_s: float) -> Any:
    from transformers import TrainerCallback

    def said() -> Said:
        if task.kind == "sft":
            return Said(trainer.noted, trainer.noted)
        sums = [trainer._metrics["train"][f"logps/{side}"][-1] for side in ("chosen", "rejected")]
        return Said(trainer.noted, -sum(sums) / (2 * (task.length - task.prompt)))

    class AtPace(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pace(None, apart_s)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace(said, apart_s)

    return AtPace()


class Contender(NamedTuple):
    """Who takes part."""

    title: str
    run: Callable[[Task, Pace, Path], None]
    kinds: tuple[str, ...] = ("sft", "dpo")
    package: str | None = None


CONTENDERS = {
    "ours": Contender("ours", ours),
    "trl": Contender("TRL, no activation checkpointing", Trl(), package="trl"),
    "hand": Contender("by hand, full logits", by_hand),
    "trl_default": Contender("TRL's default: activation checkpointing", Trl(True), package="trl"),
    "trl_precomputed": Contender("TRL, reference precomputed", Trl(False, True), ("dpo",), "trl"),
}
