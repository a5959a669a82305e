"""LoRA on the head: the PEFT model's own log-probabilities and gradients, without its logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_head import theirs_alone
from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.signal import Batch
from gyrocompass.model.head import find_head, hidden_states, is_tied
from gyrocompass.model.load import load_causal_lm, save_model
from gyrocompass.model.lora import LoraSettings, apply_lora, load_adapter, merged, save_adapter
from gyrocompass.model.patch import patch, unpatch
from gyrocompass.model.score import log_probs
from tiny_models import VOCABULARY, packed_batch, random_documents, tiny

peft = pytest.importorskip("peft")

NAMES = ["llama", "llama_tied", "gemma2", "cohere", "granite", "gpt2"]
"""Plain, tied, with a softcap, with factors on the logits, and with another layout of weights."""
UNTIED = ["llama", "granite"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def batch() -> Batch:
    return packed_batch(random_documents(2, [14, 3, 9, 20]), 26)


def adapted(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 3, **changes: Any) -> nn.Module:
    """A model with an update of its head (and of a layer), whose B is no longer zero."""
    model = tiny(name, dtype=dtype)
    layer = "c_attn" if name == "gpt2" else "q_proj"
    settings = {
        "rank": 2,
        "alpha": 6.0,
        "target_modules": (layer, "lm_head"),
        "merge_on_save": False,
    } | changes
    model = apply_lora(model, LoraSettings(**settings), seed=seed).to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.5)
    return model.eval()


def of_head(model: nn.Module) -> dict[str, nn.Parameter]:
    return {key: part for key, part in model.named_parameters() if "lm_head" in key and "lora_" in key}


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_whole_model(name: str, batch: Batch) -> None:
    model = adapted(name)
    weights = torch.rand(len(batch.target_T), dtype=torch.float64)
    found = []
    for way in (lambda: log_probs(model, batch).logprob_T, lambda: theirs_alone(model, batch)):
        model.zero_grad()
        logprob_T = way()
        (logprob_T * weights).sum().backward()
        gradients = {key: part.grad.clone() for key, part in model.named_parameters() if part.requires_grad}
        found.append((logprob_T.detach(), gradients))
    (ours_T, our_gradients), (their_T, their_gradients) = found
    plain_T = log_probs(tiny(name, dtype=torch.float64), batch).logprob_T
    assert (ours_T - plain_T).abs().max() > 1e-2, "the update matters"
    torch.testing.assert_close(ours_T, their_T, rtol=1e-5, atol=1e-5)
    assert len(of_head(model)) == 2
    for key, gradient in their_gradients.items():
        assert gradient.abs().max() > 0, key
        scale = float(gradient.abs().max())
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_bf16_weights_beside_a_float32_update(batch: Batch) -> None:
    """As peft has it for bf16 models."""
    model = tiny("llama", dtype=torch.bfloat16)
    model = apply_lora(model, LoraSettings(rank=2, target_modules=("lm_head",)), seed=0)
    assert {part.dtype for part in of_head(model).values()} == {torch.float32}
    with torch.no_grad():
        for part in of_head(model).values():
            part.normal_()
    signal = log_probs(model, batch)
    signal.logprob_T.sum().backward()
    counted_T = batch.weight_T > 0
    head, h_TD = find_head(model), hidden_states(model, batch).float()
    a_RD, b_VR = of_head(model).values()
    full_TV = h_TD @ head.w_VD.float().T + 32.0 / 2 * h_TD @ a_RD.T @ b_VR.T
    wanted_T = full_TV.log_softmax(1).gather(1, batch.target_T.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(signal.logprob_T[counted_T], wanted_T[counted_T], rtol=1e-4, atol=1e-3)
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in of_head(model).values())


def test_dropout_is_on_the_updates_input_in_training_alone(batch: Batch) -> None:
    model = adapted("llama", dropout=0.5, target_modules=("lm_head",))
    with torch.no_grad():
        torch.testing.assert_close(
            log_probs(model, batch).logprob_T, theirs_alone(model, batch), rtol=1e-5, atol=1e-5
        )
        still = log_probs(model, batch).logprob_T
        assert torch.equal(log_probs(model, batch).logprob_T, still)
        model.train()
        one, other = (log_probs(model, batch).logprob_T for _ in range(2))
        assert (one - other).abs().max() > 1e-3
        # The same mask as peft draws for the same input.
        row = Batch(**{**vars(batch), "length": 26})
        torch.manual_seed(0)
        ours = log_probs(model, row).logprob_T
        lm: Any = model
        head = find_head(model)
        assert head.low_rank is not None
        hidden = (
            lm.get_base_model()
            .base_model(
                input_ids=row.token_T.view(-1, 26), position_ids=row.position_T.view(-1, 26), use_cache=False
            )[0]
            .flatten(0, 1)
        )
        torch.manual_seed(0)
        full_T = lm.get_base_model().lm_head(hidden).log_softmax(1)
        wanted = full_T.gather(1, row.target_T.clamp(min=0)[:, None])[:, 0]
        counted_T = row.weight_T > 0
        torch.testing.assert_close(ours[counted_T], wanted[counted_T])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_changes_both_matrices_and_nothing_else_of_the_head(name: str, batch: Batch) -> None:
    model = adapted(name, dtype=torch.float32).train()
    before = {key: part.detach().clone() for key, part in model.named_parameters()}
    first = last = 0.0
    optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], lr=0.02)
    for step in range(8):
        optimizer.zero_grad()
        loss = -log_probs(model, batch, expect=lambda signal: -signal.logprob_T.sum()).logprob_T.sum()
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
        first = last if step == 0 else first
    assert last < first - 1.0
    for key, part in model.named_parameters():
        assert torch.equal(part, before[key]) == ("lora_" not in key), key


@pytest.mark.parametrize("name", UNTIED)
@torch.no_grad()
def test_merged_saved_and_read_back_it_says_the_same(name: str, batch: Batch, tmp_path: Path) -> None:
    model = adapted(name, dtype=torch.float32)
    ours = log_probs(model, batch).logprob_T
    torch.testing.assert_close(log_probs(merged(model), batch).logprob_T, ours, rtol=1e-4, atol=1e-4)
    save_model(model, tmp_path / "whole")
    torch.testing.assert_close(
        log_probs(load_causal_lm(tmp_path / "whole"), batch).logprob_T, ours, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(log_probs(model, batch).logprob_T, ours), "merging a copy left it as it was"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_adapter_is_read_back(name: str, batch: Batch, tmp_path: Path) -> None:
    model = adapted(name, dtype=torch.float32)
    save_adapter(model, tmp_path)
    again = load_adapter(tiny(name), tmp_path)
    assert torch.equal(log_probs(again, batch).logprob_T, log_probs(model, batch).logprob_T)


def test_a_tied_head_is_not_merged(tmp_path: Path) -> None:
    """The embedding would get the head's update, or the two would silently part."""
    assert is_tied(tiny("llama_tied")) and not is_tied(tiny("llama"))
    with pytest.raises(BadInput, match=r"one weight \(tied\)(.|\n)*target_modules(.|\n)*merge_on_save"):
        apply_lora(tiny("llama_tied"), LoraSettings(target_modules=("q_proj", "lm_head")), seed=0)
    model = adapted("llama_tied")
    assert is_tied(model)
    with pytest.raises(BadInput, match="tied"):
        merged(model)
    with pytest.raises(BadInput, match="tied"):
        save_model(model, tmp_path)
    assert isinstance(merged(apply_lora(tiny("llama_tied"), LoraSettings(rank=2), seed=0)), nn.Module)


def with_config(config: Any, name: str = "llama") -> Any:
    with warnings.catch_warnings(action="ignore"):  # peft's use of old names
        return peft.get_peft_model(tiny(name, dtype=torch.float64), config)


@torch.no_grad()
def test_switched_off_merged_or_of_another_adapter(batch: Batch) -> None:
    model: Any = adapted("llama", target_modules=("lm_head",))
    plain, ours = log_probs(tiny("llama", dtype=torch.float64), batch), log_probs(model, batch)
    with model.disable_adapter():
        torch.testing.assert_close(log_probs(model, batch).logprob_T, plain.logprob_T)
    whole = copy.deepcopy(model)
    whole.merge_adapter()
    assert find_head(whole).low_rank is None
    torch.testing.assert_close(log_probs(whole, batch).logprob_T, ours.logprob_T)
    with whole.disable_adapter(), pytest.raises(BadInput, match="switched off at once"):
        find_head(whole)
    whole.unmerge_adapter()
    torch.testing.assert_close(log_probs(whole, batch).logprob_T, ours.logprob_T)
    with warnings.catch_warnings(action="ignore"):
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
        model.add_adapter("elsewhere", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.set_adapter("second")
    torch.testing.assert_close(
        log_probs(model, batch).logprob_T, theirs_alone(model.double(), batch), rtol=1e-5, atol=1e-5
    )
    model.set_adapter("elsewhere")
    torch.testing.assert_close(log_probs(model, batch).logprob_T, plain.logprob_T)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(BadInput, match="2 adapters are active on the head"):
        find_head(model)


def variants() -> Iterator[tuple[str, Any]]:
    yield "variant of LoRA", peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    yield "variant of LoRA", peft.LoraConfig(r=2, target_modules=["lm_head"], lora_bias=True)
    yield (
        "ModulesToSaveWrapper, not one matrix",
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    yield "not one matrix", peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])


def test_what_is_not_two_plain_matrices_is_refused() -> None:
    for message, config in variants():
        with pytest.raises(BadInput, match=message):
            find_head(with_config(config))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_patched_model_trains_it_too(name: str, autocast: bool, batch: Batch) -> None:
    model: Any = adapted(name, dtype=torch.float32, target_modules=("lm_head",))
    ids = batch.token_T.view(-1, batch.length)
    found = []
    for patched in (False, True):
        (patch if patched else unpatch)(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=ids, labels=ids)
            logits = output.logits + 0
        output.loss.backward()
        found.append(
            (output.loss.detach(), logits.detach(), *(p.grad.clone() for p in of_head(model).values()))
        )
    unpatch(model)
    assert len(found[0]) == 4
    tolerance = 0.05 if autocast else 1e-4
    for one, other in zip(*found, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance * scale)
    assert logits.shape[-1] == VOCABULARY
