"""Loading: whole models from safetensors, bit-equal round trips, and a plain refusal of everything else."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gyrocompass.core.errors import BadInput
from gyrocompass.model.load import load_causal_lm, new_causal_lm, save_model
from tiny_models import ARCHITECTURES, tiny


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 7's neighbour: a model is a folder, and nothing is ever looked up."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading a model opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tiny("llama"), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reload_is_bit_equal_and_ties_are_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(name, dtype=dtype)
    save_model(model, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = load_causal_lm(tmp_path)
    assert not again.training
    tensors, others = model.state_dict(), again.state_dict()
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == others[key].dtype and torch.equal(tensor, others[key]), key
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_another_dtype_on_request(saved: Path) -> None:
    assert load_causal_lm(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_model_in_shards_is_read_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_causal_lm(tmp_path).lm_head.weight, model.lm_head.weight)
    shards[1].unlink()
    with pytest.raises(BadInput, match=shards[1].name):
        load_causal_lm(tmp_path)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from(["llama", "gpt2", "gemma2"]))
def test_new_models_are_deterministic_and_leave_the_random_state_alone(seed: int, name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = tiny(name, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    other, third = tiny(name, seed=seed), tiny(name, seed=seed + 1)
    weights = [model.get_input_embeddings().weight for model in (one, other, third)]
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"hidden_size": 8}, "no model_type"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "llama", "hidden_sise": 8}, "did you mean hidden_size"),
        ({"model_type": "llama", "hidden_size": "eight"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "multiple"),
    ],
)
def test_an_architecture_that_makes_no_sense_is_refused(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        new_causal_lm(architecture, seed=0)


def test_a_name_that_is_not_a_folder_is_not_looked_up() -> None:
    with pytest.raises(BadInput, match=r"no such folder: someone/some-model"):
        load_causal_lm("someone/some-model")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_refused_by_name_and_never_read(
    saved: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadInput, match=rf"{name}(.|\n)*fix: convert"):
        load_causal_lm(saved)
    assert not (saved / "exploded").exists()


def test_a_pickle_beside_safetensors_is_left_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load_causal_lm(saved)
    assert not (saved / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_damaged_safetensors_are_named(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"damaged safetensors(.|\n)*model\.safetensors"):
        load_causal_lm(saved)


def test_weights_that_do_not_fit_are_listed(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"]
        weights["model.extra.weight"] = torch.zeros(2)
        weights["lm_head.weight"] = torch.zeros(3, 3)

    edit_weights(saved, damage)
    with pytest.raises(BadInput) as caught:
        load_causal_lm(saved)
    for part in ("1 missing: model.norm.weight", "model.extra.weight", r"lm_head.weight [3, 3] for [48, 16]"):
        assert part in str(caught.value)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_code_from_the_folder_is_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    (saved / "modeling_custom.py").write_text("import os; os.mkdir('exploded')")
    auto_map = {"AutoConfig": "modeling_custom.C", "AutoModelForCausalLM": "modeling_custom.M"}
    edit_config(saved, auto_map=auto_map)
    load_causal_lm(saved)  # an architecture of transformers' own: its code is taken, the folder's is not
    edit_config(saved, model_type="custom")
    with pytest.raises(BadInput, match=r"never run(.|\n)*config\.json"):
        load_causal_lm(saved)
    assert not (saved / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"attn_implementation": "someone/attention-kernel"}, "someone/attention-kernel"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(BadInput, match=message):
        load_causal_lm(saved)


def test_folders_that_are_not_models(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        load_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        load_causal_lm(tmp_path)
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/some-model"}')
    with pytest.raises(BadInput, match="adapter"):
        load_causal_lm(saved)
    (saved / "adapter_config.json").unlink()
    (saved / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="without weights"):
        load_causal_lm(saved)
