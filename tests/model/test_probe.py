"""Architectures that nobody described: plain ones are taken as they are, others are refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_head import ours, theirs_alone
from test_patch import assert_same, batch, loss_and_gradients
from torch import Tensor, nn

from gyrocompass import patch
from gyrocompass.core.errors import BadInput
from gyrocompass.model import patch as patch_module
from gyrocompass.model import probe, trl_head
from gyrocompass.model.head import KNOWN, find_head, hidden_states
from gyrocompass.model.load import new_causal_lm
from tiny_models import _ROPE, VOCABULARY, WINDOW, packed_batch, random_documents, tiny

_SMALL = {name: size for name, size in _ROPE.items() if name != "num_key_value_heads"}
UNKNOWN: dict[str, dict[str, Any]] = {
    "gpt_neox": _SMALL,
    "mixtral": {**_ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "olmo2": _ROPE,
    "phi3": _ROPE,
    "starcoder2": {**_ROPE, "sliding_window": WINDOW},
    "cohere2": {**_ROPE, "logit_scale": 0.25},
    "lfm2": {**_ROPE, "layer_types": ["conv", "full_attention", "conv"]},
}
PLAIN = [name for name in UNKNOWN if name not in ("cohere2", "lfm2")]


def unknown(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return new_causal_lm({"model_type": name, **UNKNOWN[name], **changes}, seed=0, dtype=dtype)


@pytest.fixture(autouse=True)
def _leave_trl_as_it_was() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    patch_module._patched.clear()
    trl_head.restore_trl_kernel()


def test_none_of_them_is_known() -> None:
    assert not set(UNKNOWN) & set(KNOWN)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_a_plain_one_is_the_full_model_packed_or_alone(name: str) -> None:
    model = unknown(name)
    packed = packed_batch(random_documents(1, [14, 3, 9, 2, 20, 6]), 26)
    torch.testing.assert_close(ours(model, packed), theirs_alone(model, packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_one_is_taken_in_any_dtype(name: str, dtype: torch.dtype) -> None:
    model = unknown(name, dtype)
    assert find_head(model).w_VD is model.get_output_embeddings().weight
    hidden_states(model, packed_batch(random_documents(1, [9, 5]), 14))


@pytest.mark.parametrize("name", [*PLAIN, "lfm2"])
def test_a_patched_plain_one_has_its_loss_and_gradients(name: str) -> None:
    theirs = loss_and_gradients(unknown(name), **batch())
    model = patch(unknown(name))
    assert_same(loss_and_gradients(model, **batch()), theirs)
    output = model(**batch())
    assert type(output) is type(unknown(name)(**batch())) and not output.logits.computed


def test_a_factor_on_the_logits_is_refused() -> None:
    with pytest.raises(BadInput, match=r"'cohere2'(.|\n)*not the head's output as it is(.|\n)*llama"):
        find_head(unknown("cohere2"))
    find_head(unknown("cohere2", logit_scale=1.0))


def test_a_softcap_that_tiny_logits_hide_is_refused() -> None:
    """Weights so small that float32 logits are the same with it and without."""
    model: Any = tiny("gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e-4)
    model.config.model_type = "gemma9"
    with pytest.raises(BadInput, match="a softcap"):
        find_head(model)


def test_a_change_of_what_the_head_is_given_is_refused() -> None:
    model: Any = tiny("llama")
    model.config.model_type = "minicpm"
    model.lm_head.register_forward_pre_hook(lambda _, given: (given[0] / 2,))
    with pytest.raises(BadInput, match="not the base model's last hidden state"):
        find_head(model)


def test_attention_that_leaks_can_be_patched_but_not_packed() -> None:
    model = patch(unknown("lfm2"))
    with pytest.raises(BadInput, match=r"'lfm2' cannot be trained on packed rows(.|\n)*known"):
        hidden_states(model, packed_batch(random_documents(1, [9, 5]), 14))


def test_a_loss_with_more_in_it_is_refused_or_left_to_the_model() -> None:
    """A mixture of experts adds a loss of its routing if it is asked to."""
    with pytest.raises(BadInput, match="not the mean negative log-likelihood"):
        patch(unknown("mixtral", output_router_logits=True))
    plain, patched = unknown("mixtral"), patch(unknown("mixtral"))
    inputs = {**batch(), "output_router_logits": True}
    assert_same(loss_and_gradients(patched, **inputs), loss_and_gradients(plain, **inputs))
    assert patched(**inputs).aux_loss is not None


def test_it_is_asked_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = unknown("olmo2").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    calls, forward = [], type(model).forward

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(torch.is_grad_enabled() or self.training)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    for _ in range(3):
        find_head(model)
    assert calls == [False]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    find_head(copy.deepcopy(model))
    assert calls == [False, False]


def test_a_model_that_cannot_be_asked_is_refused_and_says_why() -> None:
    model: Any = tiny("llama")
    model.config.model_type = "broken"

    def fail(*_: Any) -> Tensor:
        raise ZeroDivisionError("no tokens today")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(BadInput, match="it fails: no tokens today"):
        find_head(model)
    assert probe.packing_refusal(model) is not None


def test_a_head_of_several_matrices_is_still_not_one() -> None:
    model: Any = unknown("olmo2")
    model.lm_head = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, VOCABULARY, bias=False))
    with pytest.raises(BadInput, match="not one matrix"):
        find_head(model)
