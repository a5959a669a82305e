"""Lean norms and gates say what `transformers` says, and keep less."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from gyrocompass.model.lean_norm import LeanMLP, LeanNorm, make_lean
from gyrocompass.model.load import new_causal_lm
from tiny_models import ARCHITECTURES, VOCABULARY, tiny


def lean(module: nn.Module) -> nn.Module:
    holder = nn.ModuleList([copy.deepcopy(module)])
    make_lean(holder)
    return holder[0]


def kept_bytes(model: nn.Module, run: Any) -> int:
    """Of what a forward pass keeps for the backward pass, each storage once, weights aside."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    found = [x.grad, *(parameter.grad for parameter in module.parameters())]
    return [y.detach(), *(one for one in found if one is not None)]


def gated(features: int, act: str = "silu") -> nn.Module:
    sizes = {"hidden_size": features, "intermediate_size": 2 * features}
    return LlamaMLP(SimpleNamespace(**sizes, mlp_bias=False, hidden_act=act))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    features=st.sampled_from([1, 3, 16, 33]),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    kind=st.sampled_from(["norm", "gate"]),
)
def test_values_and_gradients_are_the_same_bits(
    seed: int, rows: int, features: int, scale: float, dtype: torch.dtype, kind: str
) -> None:
    draw = torch.Generator().manual_seed(seed)
    module: nn.Module = LlamaRMSNorm(features) if kind == "norm" else gated(features)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    module.to(dtype)
    own = lean(module)
    assert isinstance(own, LeanNorm if kind == "norm" else LeanMLP)
    x = (scale * torch.randn(2, rows, features, generator=draw)).to(dtype)
    dy = torch.randn(2, rows, features, generator=draw).to(dtype)
    ours, theirs = gradients(own, x, dy), gradients(module, x, dy)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_says_what_it_said(name: str) -> None:
    own: Any = tiny(name)
    model = type(own)(own.config).to(next(own.parameters()).dtype).eval()
    model.load_state_dict(own.state_dict())
    assert not any(isinstance(module, (LeanNorm, LeanMLP)) for module in model.modules())
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    ours, theirs = own(ids).logits, model(ids).logits
    assert torch.equal(ours, theirs)
    for logits in (ours, theirs):
        logits.logsumexp(-1).sum().backward()
    for one, other in zip(own.parameters(), model.parameters(), strict=True):
        # A row's gradient is a sum of three, whose order may be another.
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm()


def test_less_is_kept() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=64
    )
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    own: Any = copy.deepcopy(plain)
    make_lean(own)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    less, more = (kept_bytes(m, lambda m=m: m.model(ids)) for m in (own, plain))
    assert less < 0.7 * more, (less, more)


def test_frozen_weights_get_no_gradient() -> None:
    own = lean(LlamaRMSNorm(8)).requires_grad_(False)
    (x_grad,) = gradients(own, torch.randn(3, 8), torch.randn(3, 8))[1:]
    assert x_grad.isfinite().all()


def test_other_forms_stay_as_they_are() -> None:
    gelu = gated(8, "gelu")
    assert type(lean(gelu)) is LlamaMLP
    gemma = GemmaRMSNorm(8)
    gemma.weight.data += 0.5
    assert type(lean(gemma)) is GemmaRMSNorm
    assert type(lean(nn.LayerNorm(8))) is nn.LayerNorm
    made = new_causal_lm(
        {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
         "num_hidden_layers": 1, "num_attention_heads": 2}, seed=0,
    )  # fmt: skip
    kinds = {type(module) for module in made.modules()}
    assert LeanNorm in kinds and LeanMLP in kinds and LlamaRMSNorm not in kinds


@pytest.mark.parametrize("module", [LlamaRMSNorm(6), gated(6)])
def test_second_derivatives_are_those_of_the_plain_module(module: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    given, along = (torch.randn(3, 6, generator=draw) for _ in range(2))
    found = []
    for one in (lean(module), module):
        x = given.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(x).pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad((first * along).sum(), [x, *one.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
