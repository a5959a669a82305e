"""Training a patched model elsewhere is training the unpatched one: Trainer, and TRL's SFT and DPO."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gyrocompass import patch, unpatch
from gyrocompass.data.tokenizer import train_tokenizer
from gyrocompass.model import patch as patch_module
from gyrocompass.model import trl_head
from tiny_models import VOCABULARY, tiny

trl = pytest.importorskip("trl")

TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 2e-5}
TIMES = ("runtime", "per_second", "num_tokens", "epoch")

pytestmark = [
    # transformers 5.23 renames checkpointing; peft 0.21 and TRL 1.16 still use the old names.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_trl_as_it_was() -> Iterator[None]:
    yield
    patch_module._patched.clear()
    trl_head.restore_trl_kernel()


class Calls(NamedTuple):
    """How often each way to a loss was taken."""

    logits: list[int]
    ours: list[int]
    theirs: list[int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Count logits made for a patched model, and tokens scored by TRL's kernel and by ours."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    counts = Calls([], [], [])

    def counting(seen: list[int], function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda first, *rest: seen.append(len(first)) or function(first, *rest)  # type: ignore[func-returns-value]

    monkeypatch.setattr(patch_module, "_logits", counting(counts.logits, patch_module._logits))
    ours, theirs = trl_head.TrlKernel.apply, ChunkedLogProbFunction.apply
    monkeypatch.setattr(trl_head.TrlKernel, "apply", staticmethod(counting(counts.ours, ours)))
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", staticmethod(counting(counts.theirs, theirs)))
    return counts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = ["def add(a, b):\n    return a + b\n"] * 3
    return train_tokenizer(texts, 300, tmp_path_factory.mktemp("tokenizer"))


def rows(seed: int = 0, number: int = 12) -> list[dict[str, list[int]]]:
    """Rows of different lengths, half of each masked: a mean of means would differ."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        length = 4 + 3 * (index % 5)
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        masked = torch.arange(length) < (length // 2 if index % 3 else 1)
        made.append({"input_ids": ids.tolist(), "labels": ids.masked_fill(masked, -100).tolist()})
    return made


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def figures(trainer: Any) -> list[dict[str, float]]:
    """What was logged, but for times."""
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_same_training(mine: Any, theirs: Any, **tolerance: float) -> None:
    tolerance = tolerance or TOLERANCE
    assert len(mine.state.log_history) >= 3
    for ours, its in zip(figures(mine), figures(theirs), strict=True):
        assert ours.keys() == its.keys()
        for name, value in its.items():
            assert ours[name] == pytest.approx(value, rel=tolerance["rtol"], abs=tolerance["atol"]), name
    for ours_w, its_w in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(ours_w, its_w, **tolerance)


class Padded:
    """Pads a batch with token 0 and label -100."""

    def __call__(self, batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        def padded(name: str, value: int) -> Tensor:
            columns = [torch.tensor(row[name]) for row in batch]
            return nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

        ids, labels = padded("input_ids", 0), padded("labels", -100)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def train(model: nn.Module, folder: Path, **changes: Any) -> Trainer:
    metrics = changes.pop("compute_metrics", None)
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **(SETTINGS | changes)),
        data_collator=Padded(),
        train_dataset=Dataset.from_list(rows()),
        eval_dataset=Dataset.from_list(rows(seed=1, number=5)),
        compute_metrics=metrics,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def test_trainer_with_gradient_accumulation(tmp_path: Path, calls: Calls) -> None:
    theirs = train(tiny("llama_tied"), tmp_path)
    assert_same_training(train(patch(tiny("llama_tied")), tmp_path), theirs)
    assert calls.logits == [], "neither training nor an evaluation of the loss makes logits"


def test_trainer_in_mixed_precision(tmp_path: Path, calls: Calls) -> None:
    theirs = train(tiny("gemma2"), tmp_path, bf16=True)
    mine = train(patch(tiny("gemma2")), tmp_path, bf16=True)
    assert_same_training(mine, theirs, rtol=0.05, atol=0.01)
    assert calls.logits == []


def test_trainer_with_metrics_of_logits(tmp_path: Path, calls: Calls) -> None:
    def accuracy(predicted: Any) -> dict[str, float]:
        guess, label = predicted.predictions.argmax(-1)[:, :-1], predicted.label_ids[:, 1:]
        return {"accuracy": float((guess == label)[label >= 0].mean())}

    theirs = train(tiny("llama"), tmp_path, compute_metrics=accuracy)
    mine = train(patch(tiny("llama")), tmp_path, compute_metrics=accuracy)
    assert_same_training(mine, theirs)
    assert "eval_accuracy" in mine.state.log_history[-1] and len(calls.logits) == 1


def test_trainer_with_label_smoothing_and_with_a_loss_of_its_own(tmp_path: Path) -> None:
    theirs = train(tiny("llama"), tmp_path, label_smoothing_factor=0.1)
    assert_same_training(train(patch(tiny("llama")), tmp_path, label_smoothing_factor=0.1), theirs)


def sft(model: nn.Module, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    """TRL's trainer, built but not run: prompts are masked."""
    others = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
    data = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label >= 0) for label in row["labels"]]}
        for row in rows()
    ]
    settings = SETTINGS | {"gradient_checkpointing": False, "bf16": False, "eval_strategy": "no"} | changes
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:4]),
        processing_class=tokenizer,
        **others,
    )


def ran(trainer: Any) -> Any:
    trainer.train()
    trainer.evaluate()
    return trainer


def model_of(tokenizer: Any, name: str = "gemma2") -> nn.Module:
    return tiny(name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)


@pytest.mark.parametrize("when", ["before", "after"])
def test_trl_sft_and_its_metrics(when: str, tokenizer: Any, tmp_path: Path, calls: Calls) -> None:
    theirs = ran(sft(model_of(tokenizer), tokenizer, tmp_path))
    assert calls.theirs and not calls.ours
    n_theirs = len(calls.theirs)
    model = model_of(tokenizer)
    trainer = sft(patch(model) if when == "before" else model, tokenizer, tmp_path)
    if when == "after":
        patch(trainer.model)
    mine = ran(trainer)
    assert_same_training(mine, theirs)
    assert {"loss", "entropy", "mean_token_accuracy"} <= mine.state.log_history[0].keys()
    assert len(calls.ours) == n_theirs == len(calls.theirs) and calls.logits == []
    assert sum(calls.ours) < sum(calls.theirs), "masked positions are not computed"


@pytest.mark.parametrize("when", ["before", "after"])
def test_trl_sft_with_lora(when: str, tokenizer: Any, tmp_path: Path, calls: Calls) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = ran(sft(model_of(tokenizer), tokenizer, tmp_path, peft_config=copy.deepcopy(config)))
    calls.theirs.clear()
    model = model_of(tokenizer)
    if when == "before":
        patch(model)
    trainer = sft(model, tokenizer, tmp_path, peft_config=copy.deepcopy(config))
    if when == "after":
        patch(trainer.model)
    assert_same_training(ran(trainer), theirs)
    assert calls.ours and not calls.theirs


def test_trl_sft_in_mixed_precision_with_checkpointing(tokenizer: Any, tmp_path: Path, calls: Calls) -> None:
    changes = {"bf16": True, "gradient_checkpointing": True}
    theirs = ran(sft(model_of(tokenizer), tokenizer, tmp_path, **changes))
    calls.theirs.clear()
    mine = ran(sft(patch(model_of(tokenizer)), tokenizer, tmp_path, **changes))
    assert_same_training(mine, theirs, rtol=0.05, atol=0.03)
    assert calls.ours and not calls.theirs and not calls.logits


def dpo(model: nn.Module, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    """Against a reference that is not patched."""
    data = [{"prompt": "def ", "chosen": "add(a, b)" + ":" * n, "rejected": "return b"} for n in range(1, 9)]
    settings = SETTINGS | {"gradient_checkpointing": False, "bf16": False} | changes
    trainer = trl.DPOTrainer(
        model,
        ref_model=model_of(tokenizer, "llama"),
        args=trl.DPOConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("changes", [{}, {"use_weighting": True}], ids=["dpo", "wpo"])
def test_trl_dpo_scores_policy_and_reference_alike(
    changes: dict[str, Any], tokenizer: Any, tmp_path: Path, calls: Calls
) -> None:
    theirs = dpo(model_of(tokenizer, "llama"), tokenizer, tmp_path, **changes)
    assert calls.theirs and not calls.ours
    calls.theirs.clear()
    mine = dpo(patch(model_of(tokenizer, "llama")), tokenizer, tmp_path, **changes)
    assert_same_training(mine, theirs)
    assert calls.ours and not calls.theirs
    assert mine.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-7) or changes


def test_trl_gets_its_kernel_back_with_the_last_patched_model() -> None:
    from trl.trainer import utils

    theirs = (utils._ChunkedLogProbFunction, utils._use_triton)
    first, second = patch(tiny("llama")), patch(tiny("llama"))
    assert utils._ChunkedLogProbFunction is trl_head.TrlKernel
    assert utils._use_triton(torch.device("cpu"))
    unpatch(first)
    assert utils._ChunkedLogProbFunction is trl_head.TrlKernel
    unpatch(second)
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == theirs


def test_an_unknown_trl_keeps_its_own_loss_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", torch.autograd.Function)
    with pytest.warns(UserWarning, match="version of TRL is not known"):
        patch(tiny("llama"))
    assert utils._ChunkedLogProbFunction is torch.autograd.Function


ALL_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("outputs", [ALL_OUTPUTS, ("log_probs",)])
def test_our_kernel_answers_as_trls_does(outputs: tuple[str, ...]) -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def answers(kernel: Any) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
        torch.manual_seed(0)
        h, w, bias = (torch.randn(*s, requires_grad=True) for s in [(9, 6), (20, 6), (20,)])
        target = torch.randint(20, (9,))
        answer = kernel.apply(h, w, bias, target, 0.7, 8, 4.0, 1.5, outputs)
        total = answer[0].sum() if answer[1] is None else (answer[0] * answer[1]).sum()
        assert not any(part.requires_grad for part in answer[2:] if part is not None)
        return list(answer), torch.autograd.grad(total, [h, w, bias])

    (mine, my_grads), (theirs, their_grads) = answers(trl_head.TrlKernel), answers(ChunkedLogProbFunction)
    for ours, its in zip([*mine, *my_grads], [*theirs, *their_grads], strict=True):
        assert (ours is None) == (its is None)
        if ours is not None:
            torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5)
