"""A patched model is the unpatched one: its loss, its gradients, and its logits where they are read."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from gyrocompass import patch, unpatch
from gyrocompass.core.errors import BadInput
from gyrocompass.model import patch as patch_module
from gyrocompass.model import trl_head
from gyrocompass.model.lazy_logits import LazyLogits
from tiny_models import ARCHITECTURES, VOCABULARY, tiny

TOLERANCE: dict[str, float] = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_trl_as_it_was() -> Iterator[None]:
    yield
    patch_module._patched.clear()
    trl_head.restore_trl_kernel()


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes logits of a patched model in this test fails it."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("logits were computed")

    monkeypatch.setattr(patch_module, "_logits", refuse)


def batch(seed: int = 0, rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Padded rows; some labels are masked inside a row."""
    torch.manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length))
    mask = torch.arange(length) < torch.tensor([length, length - 4, 5])[:rows, None]
    labels = ids.masked_fill(~mask, -100).masked_fill(torch.rand(ids.shape) < 0.2, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def loss_and_gradients(model: Any, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *grads]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs) > 0
    for ours, its in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, its, **TOLERANCE)


@pytest.mark.parametrize("n_items", [None, 7, torch.tensor(50)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_of_every_architecture(
    name: str, n_items: Tensor | int | None, no_logits: None
) -> None:
    inputs = batch() if n_items is None else {**batch(), "num_items_in_batch": n_items}
    theirs = loss_and_gradients(tiny(name), **inputs)
    assert_same(loss_and_gradients(patch(tiny(name)), **inputs), theirs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_of_every_architecture(name: str) -> None:
    inputs = {**batch(), "output_hidden_states": True, "output_attentions": True}
    plain = tiny(name).eval()
    plain.set_attn_implementation("eager")  # type: ignore[operator]
    patched = patch(copy.deepcopy(plain))
    with torch.no_grad():
        theirs, mine = plain(**inputs), patched(**inputs)
        theirs_tuple, mine_tuple = (
            plain(**inputs, return_dict=False),
            patched(**inputs, return_dict=False),
        )
    assert type(mine) is type(theirs) and list(mine) == list(theirs)
    assert not mine.logits.computed and mine.logits.shape == theirs.logits.shape
    torch.testing.assert_close(mine.logits.values_now(), theirs.logits, **TOLERANCE)
    assert len(mine.hidden_states) == len(theirs.hidden_states) and len(mine.attentions) == 3
    assert type(mine_tuple) is tuple and len(mine_tuple) == len(theirs_tuple)
    torch.testing.assert_close(mine_tuple[0], theirs_tuple[0], **TOLERANCE)


def test_labels_given_by_place_shifted_labels_and_another_ignore_index() -> None:
    plain, patched = tiny("llama"), patch(tiny("llama"))
    ids, mask, labels = batch().values()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    ignored = int(labels[0][labels[0] > 0][1])
    calls: list[Callable[[Any], Any]] = [
        lambda model: model(ids, mask, None, None, None, labels),
        lambda model: model(ids, mask, labels=labels, shift_labels=shifted.flip(0)),
        lambda model: model(ids, mask, labels=labels.masked_fill(labels < 0, ignored), ignore_index=ignored),
        lambda model: model(inputs_embeds=model.get_input_embeddings()(ids) * 2, labels=labels),
    ]
    losses = [float(call(plain).loss.detach()) for call in calls]
    assert len(set(losses)) == 4, "each call must matter"
    assert [float(call(patched).loss.detach()) for call in calls] == pytest.approx(losses, rel=1e-5)


def test_a_batch_without_a_target_is_a_differentiable_zero() -> None:
    inputs = batch()
    inputs["labels"][:] = -100
    assert tiny("llama")(**inputs).loss.isnan()
    for n_items in (None, 0):
        loss, *grads = loss_and_gradients(patch(tiny("llama")), **inputs, num_items_in_batch=n_items)
        assert loss == 0 and all((gradient == 0).all() for gradient in grads)


def test_logits_have_a_gradient_when_they_are_read() -> None:
    inputs = batch()

    def gradients(model: Any) -> list[Tensor]:
        output = model(**inputs)
        (output.loss + output.logits[..., 3].square().mean()).backward()
        return [parameter.grad for parameter in model.parameters()]

    assert_same(gradients(patch(tiny("gemma2"))), gradients(tiny("gemma2")))


class Doubled(torch.autograd.Function):
    """Would stop the gradient: its argument is a constant where it is called."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_lazy_logits_answer_what_they_know_and_keep_the_gradient_of_their_making() -> None:
    w = torch.ones(2, 3, requires_grad=True)
    calls = []

    def lazy() -> LazyLogits:
        return LazyLogits.of(lambda: calls.append(1) or w * 2, (2, 3), torch.bfloat16, w.device)  # type: ignore[func-returns-value]

    logits = lazy()
    assert logits.shape == (2, 3) and logits.dim() == logits.ndim == 2 and len(logits) == 2
    assert logits.size(1) == 3 and logits.numel() == 6 and logits.device == w.device
    assert logits.requires_grad and logits.grad_fn is None
    assert logits.dtype == torch.bfloat16 and logits.is_floating_point() and isinstance(logits, Tensor)
    promised = logits.clone().float()
    assert isinstance(promised, LazyLogits) and promised.dtype == torch.float32 and calls == []
    with torch.no_grad():
        assert promised.argmax() == 0
    promised.sum().backward()
    assert (w.grad == 2).all() and calls == [1]
    with torch.no_grad():
        ungraded = lazy()
    assert not ungraded.requires_grad
    Doubled.apply(lazy().values_now()).sum().backward()
    assert (w.grad == 6).all()
    with pytest.raises(RuntimeError, match=r"logits.values_now"):
        Doubled.apply(lazy()).sum().backward()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match=r"logits.values_now"):
        torch.exp(lazy())


def test_without_labels_it_is_the_model_it_was() -> None:
    plain, patched = tiny("gemma2").eval(), patch(tiny("gemma2").eval())
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert (patched(ids).logits == plain(ids).logits).all()
        assert type(patched(ids).logits) is Tensor
        last = patched(ids, labels=ids[:, -1:], logits_to_keep=1)
        assert (last.logits == plain(ids, labels=ids[:, -1:], logits_to_keep=1).logits).all()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert (patched.generate(ids, **settings) == plain.generate(ids, **settings)).all()  # type: ignore[operator]
    assert inspect.signature(patched.forward) == inspect.signature(plain.forward)


def test_patching_twice_is_patching_once_and_unpatching_restores() -> None:
    model = tiny("llama")
    before = set(vars(model))
    assert patch(patch(model)) is model and "forward" in vars(model)
    assert unpatch(model) is model and set(vars(model)) == before
    assert type(model(**batch()).logits) is Tensor
    assert unpatch(unpatch(model)) is model
    patch(model)
    assert isinstance(model(**batch()).logits, LazyLogits)


def test_a_forward_of_others_underneath_is_kept_and_one_above_is_respected() -> None:
    model: Any = tiny("llama")
    calls = []

    def wrapped(name: str) -> Callable[..., Any]:
        inner = model.forward
        return lambda *args, **kwargs: calls.append(name) or inner(*args, **kwargs)  # type: ignore[func-returns-value]

    model.forward = under = wrapped("under")
    patch(model)
    model(batch()["input_ids"])
    assert calls == ["under"]
    model.forward = wrapped("above")
    calls.clear()
    assert isinstance(patch(model)(**batch()).logits, LazyLogits)
    assert calls == ["above"]
    calls.clear()
    assert type(unpatch(model)(**batch()).logits) is Tensor
    assert calls == ["above", "under"]
    assert isinstance(patch(model)(**batch()).logits, LazyLogits)
    other: Any = tiny("llama")
    other.forward = under
    assert unpatch(patch(other)).forward is under


def test_copies_and_pickles_are_whole_models_without_the_patch() -> None:
    model = patch(tiny("llama_tied"))
    inputs = batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        with torch.no_grad():
            next(twin.parameters()).mul_(2.0)
        assert type(twin(**inputs).logits) is Tensor
        assert twin(**inputs).loss != model(**inputs).loss
        loss = twin(**inputs).loss
        assert isinstance(patch(twin)(**inputs).logits, LazyLogits)
        torch.testing.assert_close(twin(**inputs).loss, loss, **TOLERANCE)


def test_it_saves_and_reloads_like_any_model(tmp_path: Path) -> None:
    model: Any = patch(tiny("llama_tied"))
    assert list(model.state_dict()) == list(tiny("llama_tied").state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(**batch()).loss, model(**batch()).loss, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("around", [True, False], ids=["patched as a peft model", "patched before peft"])
def test_lora(around: bool, no_logits: None) -> None:
    def adapted(patched: bool) -> Any:
        base = tiny("llama")
        if patched and not around:
            patch(base)
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        return patch(model) if patched and around else model

    theirs = loss_and_gradients(adapted(False), **batch())
    assert_same(loss_and_gradients(adapted(True), **batch()), theirs)


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_makes_no_logits(process_group: None, no_logits: None) -> None:
    theirs = loss_and_gradients(tiny("llama"), **batch())
    wrapped = nn.parallel.DistributedDataParallel(patch(tiny("llama")), find_unused_parameters=True)
    assert_same(loss_and_gradients(wrapped, **batch()), theirs)


def test_a_head_cut_over_ranks_is_refused(process_group: None) -> None:
    model: Any = patch(tiny("llama"))
    mesh = init_device_mesh("cpu", (1,))
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(BadInput, match="cut over ranks"):
        model(**batch())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("whole_step", [False, True])
def test_a_compiled_model_is_one_graph_and_a_promise(whole_step: bool) -> None:
    """The decoder is the graph; loss and logits come after it, as ever."""
    theirs, graphs, inputs = tiny("llama", num_hidden_layers=1), [], batch()

    def counted(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    model: Any = patch(tiny("llama", num_hidden_layers=1))
    called = (lambda **inputs: model(**inputs)) if whole_step else model
    output = torch.compile(called, backend=counted)(**inputs)
    assert isinstance(output.logits, LazyLogits) and not output.logits.computed
    output.loss.backward()
    wanted = loss_and_gradients(theirs, **inputs)
    assert_same([output.loss.detach(), *(weight.grad for weight in model.parameters())], wanted)
    torch.testing.assert_close(output.logits.values_now(), theirs(**inputs).logits, **TOLERANCE)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_cannot_be_all_one_graph() -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="logits are a promise"):
        torch.compile(patch(tiny("llama", num_hidden_layers=1)), backend="eager", fullgraph=True)(**batch())


def test_what_cannot_be_patched_is_refused() -> None:
    model: Any = tiny("cohere")
    model.config.model_type = "bloom"
    with pytest.raises(BadInput, match="'bloom'"):
        patch(model)
    model = tiny("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(BadInput, match="not one matrix"):
        patch(model)
    model = tiny("llama")
    model.loss_function = nn.functional.cross_entropy
    with pytest.raises(BadInput, match="a loss function of its own, cross_entropy"):
        patch(model)
    assert not patch_module._patched


def test_an_autocast_multiplies_the_head_in_its_dtype_and_bf16_losses_are_float32() -> None:
    inputs = batch()
    exact = tiny("llama")(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = loss_and_gradients(tiny("llama"), **inputs)
        output = patch(tiny("llama"))(**inputs)
        mine = loss_and_gradients(patch(tiny("llama")), **inputs)
    assert output.logits.dtype == torch.bfloat16 and mine[0].dtype == torch.float32
    assert abs(mine[0] - exact) < 0.05 and mine[0] != exact
    for ours, its in zip(mine, theirs, strict=True):
        assert (ours - its).norm() < 0.03 * its.norm() + 1e-3
    narrow = patch(tiny("llama", dtype=torch.bfloat16))(**inputs)
    assert narrow.loss.dtype == torch.float32 and narrow.logits.dtype == torch.bfloat16
