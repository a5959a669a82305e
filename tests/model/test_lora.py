"""LoRA: no change at first, only the update trains, adapter and merged model round-trip."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.loss.signal import Batch
from gyrocompass.model.head import find_head, hidden_states
from gyrocompass.model.load import load_causal_lm, save_model
from gyrocompass.model.lora import LoraSettings, apply_lora, is_adapted, load_adapter, save_adapter
from tiny_models import packed_batch, random_documents, tiny

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def batch() -> Batch:
    return packed_batch(random_documents(0, [9, 5, 12]), 16)


def trained(name: str, batch: Batch) -> nn.Module:
    """An adapted model whose update is no longer zero."""
    model = apply_lora(tiny(name), LoraSettings(rank=2, alpha=8.0), seed=3).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        hidden_states(model, batch)[:, :4].sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_at_first_nothing_changes_and_only_the_update_trains(name: str, batch: Batch) -> None:
    plain = tiny(name)
    with torch.no_grad():
        before = hidden_states(plain, batch)
    random_state = torch.get_rng_state()
    model = apply_lora(plain, LoraSettings(rank=2), seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    h_TD = hidden_states(model, batch)
    torch.testing.assert_close(h_TD, before, rtol=0, atol=0)
    h_TD.square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient and all("lora_" in name for name in with_gradient)
    assert find_head(model).w_VD is model.get_base_model().lm_head.weight
    assert not is_adapted(tiny(name)) and is_adapted(model)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@torch.no_grad()
def test_the_adapter_and_the_merged_model_are_read_back(name: str, batch: Batch, tmp_path: Path) -> None:
    with torch.enable_grad():
        model = trained(name, batch)
    ours = hidden_states(model, batch)
    assert (ours - hidden_states(tiny(name), batch)).abs().max() > 1e-3, "it has learned something"
    save_adapter(model, tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin"))
    again = load_adapter(tiny(name), tmp_path / "adapter")
    torch.testing.assert_close(hidden_states(again, batch), ours, rtol=0, atol=0)
    save_model(model, tmp_path / "merged")
    torch.testing.assert_close(
        hidden_states(load_causal_lm(tmp_path / "merged"), batch), ours, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(hidden_states(model, batch), ours, rtol=0, atol=0)  # saving left it as it was


def test_activation_checkpointing_trains_the_update(batch: Batch) -> None:
    model = apply_lora(tiny("llama"), LoraSettings(rank=2), seed=3).train()
    hidden_states(model, batch)[:, :4].sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.get_base_model().activation_checkpointing_enable()
    hidden_states(model, batch)[:, :4].sum().backward()
    for one, other in zip(expected, (p.grad for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(one, other)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(BadInput, match="LoRA cannot be applied"):
        apply_lora(tiny("llama"), LoraSettings(target_modules=("query",)), seed=0)


def test_what_is_not_an_adapter_is_refused(tmp_path: Path, batch: Batch) -> None:
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        load_adapter(tiny("llama"), tmp_path)
    save_adapter(trained("llama", batch), tmp_path)
    with pytest.raises(BadInput, match="does not fit"):
        load_adapter(tiny("llama", hidden_size=32), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(BadInput, match="not an adapter in safetensors"):
        load_adapter(tiny("llama"), tmp_path)


def test_half_an_adapter_is_refused(tmp_path: Path, batch: Batch) -> None:
    save_adapter(trained("llama", batch), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    lost = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file)
    with pytest.raises(BadInput, match=f"lacks 1 of {len(weights)} weights: {re.escape(lost)}"):
        load_adapter(tiny("llama"), tmp_path)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependency, match=r"gyrocompass\[lora\]"):
        apply_lora(tiny("llama"), LoraSettings(), seed=0)
