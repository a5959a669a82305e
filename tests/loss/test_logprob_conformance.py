"""One suite over all backends and dtypes: values and gradients against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from direct_signal import ANSWERERS, Case, tile_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.loss.logprob import WANTS
from gyrocompass.loss.signal import IGNORE_INDEX

FLOATS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPES = ["f64 f64", "f32 f32", "bf16 bf16", "f16 f16", "bf16 f32", "f32 bf16", "bf16 f64", "f16 bf16"]

# bf16 times bf16 keeps logits to 2^-18; a gradient ends in its input's dtype, whatever it was summed in.
VALUE_TOLERANCE = {"f64": 1e-10, "f32": 1e-5, "bf16": 3e-5, "f16": 1e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@st.composite
def cases(draw: st.DrawFn, dtypes: str) -> tuple[Case, dict[str, Tensor], tuple[int, int]]:
    """A case, a gradient for each of some outputs, and a size of tiles."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n_tokens, width, vocabulary = draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 14))
    h_dtype, w_dtype = (FLOATS[name] for name in dtypes.split())
    h_TD, w_VD = normal(n_tokens, width).to(h_dtype), normal(vocabulary, width).to(w_dtype)
    if draw(st.booleans()):
        h_TD, w_VD = h_TD.T.contiguous().T, w_VD.T.contiguous().T
    bias_V = None
    if draw(st.booleans()):
        bias_V = normal(vocabulary).to(w_dtype)
        outside_V = torch.rand(vocabulary, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
        outside_V[draw(st.integers(0, vocabulary - 1))] = False
        bias_V = bias_V.masked_fill(outside_V, -torch.inf)

    def tokens(*shape: int) -> Tensor:
        ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        return torch.randint(vocabulary, shape, generator=generator).masked_fill(ignored, IGNORE_INDEX)

    case = Case(
        h_TD,
        w_VD,
        tokens(n_tokens),
        bias_V=bias_V,
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        temperature=draw(st.sampled_from([1.0, 0.7, 2.0])),
        candidate_TC=tokens(n_tokens, draw(st.integers(0, 4))) if draw(st.booleans()) else None,
        want=tuple(sorted(draw(st.sets(st.sampled_from(WANTS))))),
    )
    candidates = ["candidate_TC"] if case.candidate_TC is not None else []
    floats = ["logprob_T", "lse_T", *(f"{name}_T" for name in case.want if name != "rank"), *candidates]
    chosen = draw(st.sets(st.sampled_from(floats), min_size=1))
    shapes = {"candidate_TC": (case.candidate_TC if candidates else h_TD).shape}
    gradients = {name: normal(*shapes.get(name, (n_tokens,))) for name in sorted(chosen)}
    return case, gradients, (draw(st.integers(1, 10)), draw(st.integers(1, 60)))


def gradients_of(outputs: dict[str, Tensor], inputs: list[Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of the mixture sum(given * output); a log-probability of -inf takes no part."""
    total = torch.stack([
        (torch.where(outputs[name].isfinite(), outputs[name], 0.0) * gradient.to(outputs[name])).sum()
        for name, gradient in given.items()
    ]).sum()  # fmt: skip
    return list(torch.autograd.grad(total, inputs))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Equal where infinite; elsewhere within the tolerance of the largest magnitude (1 at least)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, what
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), what
    if finite.any():
        scale = max(1.0, float(expected[finite].abs().max()))
        assert float((actual - expected)[finite].abs().max()) <= tolerance * scale, what


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", ANSWERERS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_values_and_gradients(backend: str, dtypes: str, data: st.DataObject) -> None:
    case, given_gradients, (tile_tokens, tile_elements) = data.draw(cases(dtypes))
    expected, copies = case.direct()
    with tile_sizes(tile_tokens, tile_elements):
        answer = case.run(backend)
        actual_gradients = gradients_of(answer._asdict(), case.inputs, given_gradients)
    names = dtypes.split()
    tolerance = VALUE_TOLERANCE[
        "f64" if "f64" in names else max(names, key=lambda name: VALUE_TOLERANCE[name])
    ]
    for name, actual in answer._asdict().items():
        asked = name in ("logprob_T", "lse_T") or name.removesuffix("_T") in case.want
        if name == "candidate_TC":
            asked = case.candidate_TC is not None
        assert (actual is not None) == asked, name
        if actual is not None:
            assert name == "rank_T" or actual.dtype == (torch.float64 if "f64" in names else torch.float32)
            assert_close(actual, expected[name], 0.0 if name == "rank_T" else tolerance, name)
    expected_gradients = gradients_of(expected, copies, given_gradients)
    for actual, wanted, tensor in zip(actual_gradients, expected_gradients, case.inputs, strict=True):
        assert actual.dtype == tensor.dtype
        assert_close(actual, wanted, GRADIENT_TOLERANCE[tensor.dtype], f"gradient of {list(tensor.shape)}")


@pytest.mark.parametrize("backend", ANSWERERS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(backend: str, softcap: float | None) -> None:
    torch.manual_seed(0)
    target_T = torch.tensor([3, IGNORE_INDEX, 0, 6, 2])
    candidate_TC = torch.tensor([[1, 1], [2, 3], [0, IGNORE_INDEX], [5, 6], [2, 4]])
    bias_V = torch.randn(7, dtype=torch.float64)
    bias_V[5] = -torch.inf

    def outputs(h_TD: Tensor, w_VD: Tensor, finite_bias_V: Tensor) -> tuple[Tensor, ...]:
        full_bias_V = torch.where(bias_V.isneginf(), bias_V, finite_bias_V)
        case = Case(h_TD, w_VD, target_T, full_bias_V, softcap, 0.8, 1.3, candidate_TC)
        fields = (field for field in case.run(backend) if field is not None and field.is_floating_point())
        return tuple(torch.where(field.isfinite(), field, 0.0) for field in fields)

    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (7, 3), (7,))
    ]
    with tile_sizes(2, 6):
        assert torch.autograd.gradcheck(outputs, inputs)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(outputs, inputs)
