"""bf16 layers that multiply in float32: closer to the exact product, and the same layer in all else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gyrocompass.model.head import find_head, hidden_states
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.wide_linear import WideLinear, widen_where_narrow_is_slow
from tiny_models import packed_batch, random_documents, tiny

ROUNDING = 2.0**-8
"""bf16 keeps 8 bits."""


@pytest.fixture(autouse=True)
def without_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def widened(layer: nn.Linear) -> nn.Linear:
    holder = nn.Sequential(layer)
    widen_where_narrow_is_slow(holder)
    assert type(holder[0]) is WideLinear
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (1, 33)])
def test_values_and_gradients_are_the_exact_ones_rounded_once(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(33, 21, bias=bias).bfloat16()
    exact = copy.deepcopy(layer).double()
    x, slope = torch.randn(shape).bfloat16(), torch.randn(*shape[:-1], 21).bfloat16()
    found = []
    for module, dtype in ((widened(layer), torch.bfloat16), (exact, torch.float64)):
        own = x.to(dtype).requires_grad_()
        answer = module(own)
        gradients = torch.autograd.grad(answer, [own, *module.parameters()], slope.to(dtype))
        assert answer.dtype == dtype and all(g.dtype == dtype for g in gradients)
        found.append([part.double() for part in (answer, *gradients)])
    torch.testing.assert_close(*found, rtol=ROUNDING, atol=1e-5)


def test_other_dtypes_are_left_to_torch() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    before = layer(x)
    assert torch.equal(widened(layer)(x), before)


def test_a_model_keeps_its_names_its_head_and_its_numbers() -> None:
    plain = tiny("llama", dtype=torch.bfloat16)
    wide = copy.deepcopy(plain)
    widen_where_narrow_is_slow(wide)
    assert [*wide.state_dict()] == [*plain.state_dict()]
    assert find_head(wide).w_VD.shape == find_head(plain).w_VD.shape
    batch = packed_batch(random_documents(1, [9, 9, 5]), 20)
    found = [hidden_states(model, batch).float() for model in (wide, plain)]
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_models_are_widened_where_they_are_made() -> None:
    architecture = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = new_causal_lm(architecture, seed=0)
    assert sum(type(module) is WideLinear for module in model.modules()) == 7


def test_a_processor_with_bf16_units_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    holder = nn.Sequential(nn.Linear(2, 2))
    widen_where_narrow_is_slow(holder)
    assert type(holder[0]) is nn.Linear
