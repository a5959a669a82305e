"""Each known architecture: our head on its hidden states is the full model, packed or alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import Batch
from gyrocompass.model.head import KNOWN, context_length, find_head, hidden_states
from tiny_models import ARCHITECTURES, VOCABULARY, packed_batch, random_documents, tiny

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Law 1's."""


def packing_tolerance(name: str, dtype: torch.dtype) -> float:
    """transformers computes RMSNorm and rotary angles in float32 whatever the dtype; GPT-2 has neither."""
    return TOLERANCE[dtype] if name == "gpt2" else TOLERANCE[torch.float32]


LENGTHS = [14, 3, 9, 2, 20, 6]
"""Documents; several are longer than the sliding window."""
ROW = 26


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ours(model: nn.Module, batch: Batch) -> torch.Tensor:
    head = find_head(model)
    return token_logprobs(
        hidden_states(model, batch),
        head.w_VD,
        batch.target_T,
        bias_V=head.bias_V,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    ).logprob_T


def theirs_alone(model: Any, batch: Batch) -> torch.Tensor:
    """Each segment by itself through the full model, its logits and log_softmax."""
    logprob_T = torch.zeros(len(batch.token_T), dtype=model.dtype)
    for segment in batch.segment_T.unique().tolist():
        if segment < 0:
            continue
        place = (batch.segment_T == segment).nonzero().squeeze(1)
        logits = model(input_ids=batch.token_T[place][None]).logits[0]
        target = batch.target_T[place]
        chosen = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
        logprob_T[place] = torch.where(target >= 0, chosen, 0.0)
    return logprob_T


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_head_on_hidden_states_is_the_full_models_log_softmax(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype=dtype)
    batch = packed_batch(random_documents(3, [31]), 30)
    mine, full = ours(model, batch), theirs_alone(model, batch)
    assert (full < -0.1).float().mean() > 0.8, "a flat or a saturated model would hide differences"
    torch.testing.assert_close(mine, full, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_packed_rows_are_each_sequence_alone_in_the_full_model(
    name: str, dtype: torch.dtype, attention: str
) -> None:
    if name == "gemma2" and attention == "sdpa":
        pytest.skip("transformers gives Gemma 2 no sdpa: its attention has a softcap")
    model = tiny(name, dtype=dtype)
    model.set_attn_implementation(attention)
    batch = packed_batch(random_documents(1, LENGTHS), ROW)
    assert (batch.segment_T < 0).any() and len(batch.token_T) > ROW, "rows and padding are what is tested"
    mine, full = ours(model, batch), theirs_alone(model, batch)
    tolerance = packing_tolerance(name, dtype)
    torch.testing.assert_close(mine, full, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("lengths", "row", "shape"),
    [
        ([9, 9, 8, 9], 18, (4, 8)),
        ([7, 12, 10], 14, (3, 11)),
        ([15, 15], 14, (2, 14)),
        ([9, 3, 9], 10, (2, 10)),
    ],
    ids=["pairs", "padding", "full", "mixed"],
)
def test_segments_have_rows_of_their_own_where_that_takes_no_more_positions(
    lengths: list[int], row: int, shape: tuple[int, int]
) -> None:
    model = tiny("llama", dtype=torch.float64)
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    batch = packed_batch(random_documents(2, lengths), row)
    answers = []
    for logprobs in (ours, theirs_alone):
        logprob_T = logprobs(model, batch)
        answers.append((logprob_T, *torch.autograd.grad(logprob_T.sum(), [*model.parameters()])))
    assert shapes[0] == shape
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


def test_every_known_architecture_is_tested() -> None:
    assert {ARCHITECTURES[name].get("model_type", name) for name in ARCHITECTURES} == set(KNOWN)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["llama", "llama_tied", "mistral", "gemma2", "gemma3_text", "gpt2"]),
    st.lists(st.integers(2, 30), min_size=1, max_size=8),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_any_packing_gives_each_sequence_what_it_has_alone(
    name: str, lengths: list[int], length: int, seed: int
) -> None:
    """The log-probabilities, and the gradients of every parameter."""
    model = tiny(name, dtype=torch.float64)
    batch = packed_batch(random_documents(seed, lengths), length)
    if not len(batch.token_T):
        return
    slope_T = torch.randn(len(batch.token_T), generator=torch.Generator().manual_seed(seed)).double()
    tolerance = packing_tolerance(name, torch.float64)
    answers, gradients = [], []
    for logprobs in (ours, theirs_alone):
        logprob_T = logprobs(model, batch)
        answers.append(logprob_T)
        gradients.append(torch.autograd.grad(logprob_T @ slope_T, [*model.parameters()], allow_unused=True))
    torch.testing.assert_close(*answers, rtol=tolerance, atol=tolerance)
    norm = torch.stack([gradient.norm() for gradient in gradients[1] if gradient is not None]).norm()
    for mine, theirs in zip(*gradients, strict=True):
        if mine is None or theirs is None:
            assert mine is theirs
            continue
        assert float((mine - theirs).norm()) <= tolerance * float(norm), name


@torch.no_grad()
def test_padding_never_reaches_a_segment() -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = packed_batch(random_documents(1, LENGTHS), ROW)
    padding = batch.segment_T < 0
    before = hidden_states(model, batch)
    batch.token_T[padding] = 7
    after = hidden_states(model, batch)
    assert torch.equal(before[~padding], after[~padding])
    assert not torch.equal(before[padding], after[padding])


@torch.no_grad()
def test_the_positions_alone_keep_segments_apart() -> None:
    """What the packed test relies on: the same tokens with positions running on are another thing."""
    model = tiny("llama", dtype=torch.float64)
    batch = packed_batch(random_documents(1, LENGTHS), ROW)
    running_on = torch.arange(ROW).repeat(len(batch.token_T) // ROW)
    merged = Batch(**{**vars(batch), "position_T": running_on})
    assert (hidden_states(model, batch) - hidden_states(model, merged)).abs().max() > 1e-3


def test_activation_checkpointing_saves_activations_and_changes_nothing() -> None:
    model = tiny("llama", dtype=torch.float64).train()
    batch = packed_batch(random_documents(2, LENGTHS), ROW)
    gradients, saved = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        n_saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal n_saved
            n_saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logprob_T = ours(model, batch)
        saved.append(n_saved)
        logprob_T.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert saved[1] < saved[0] / 2


def test_the_head_is_the_parameter_itself() -> None:
    tied, untied = tiny("llama_tied"), tiny("llama")
    assert find_head(tied).w_VD is tied.get_input_embeddings().weight
    assert find_head(untied).w_VD is untied.lm_head.weight
    assert find_head(untied).w_VD.shape == (VOCABULARY, 16)
    assert context_length(untied) == context_length(tiny("gpt2")) == 64


def test_an_unknown_architecture_is_refused_and_the_known_ones_are_listed() -> None:
    """One that does something to its logits."""
    model = tiny("cohere")
    model.config.model_type = "bloom"
    with pytest.raises(BadInput, match=r"'bloom'(.|\n)*gemma2(.|\n)*smollm3"):
        find_head(model)


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BadInput, match="flash_attention_2"):
        hidden_states(model, packed_batch(random_documents(1, [5]), 4))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_segment_longer_than_the_context_is_refused(name: str) -> None:
    model = tiny(name)
    with pytest.raises(BadInput, match=r"70 tokens(.|\n)*64"):
        hidden_states(model, packed_batch(random_documents(1, [71]), 70))
    hidden_states(model, packed_batch(random_documents(1, [40, 40]), 80))  # a longer row of shorter segments
