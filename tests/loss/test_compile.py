"""The primitive under `torch.compile`: no graph break, the same numbers, operators that are what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss._ops import _N_FIELDS, Inputs, Settings
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, TokenLogProbs

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
"""Inductor's own imports."""

V, D, R, C = 21, 6, 2, 3
FORWARD, BACKWARD = (
    torch.ops.gyrocompass.token_logprobs.default,
    torch.ops.gyrocompass.token_logprobs_backward.default,
)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "statistics": {"softcap": 4.0, "temperature": 0.7, "logit_scale": 1.5, "want": ["entropy", "mean_logit"]},
    "ranks": {"want": ["rank", "sum_sq"], "n_top": 3},
    "support": {"top_k": 8, "top_p": 0.9, "want": ["entropy"]},
    "invariant": {"invariant": True, "want": ["mean_logit"]},
}


def make_inputs(n_tokens: int, dtype: torch.dtype, *, seed: int = 0, extras: bool = True) -> Inputs:
    """Random inputs, some positions ignored and some candidates missing."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def tokens(*shape: int) -> Tensor:
        return torch.randint(V, shape, generator=generator)

    target_T, candidate_TC = tokens(n_tokens), tokens(n_tokens, C)
    target_T[1::4], candidate_TC[::2, 1] = IGNORE_INDEX, IGNORE_INDEX
    h_TD, w_VD = leaf(n_tokens, D), leaf(V, D)
    if not extras:
        return Inputs(h_TD, w_VD, None, None, None, target_T, None, None)
    return Inputs(
        h_TD, w_VD, leaf(V), leaf(n_tokens, R), leaf(V, R), target_T, candidate_TC, tokens(n_tokens)
    )


def call(inputs: Inputs, options: dict[str, Any]) -> TokenLogProbs:
    h_TD, w_VD, bias_V, a_TR, b_VR, target_T, candidate_TC, seed_T = inputs
    return token_logprobs(
        h_TD,
        w_VD,
        target_T,
        bias_V=bias_V,
        low_rank=None if a_TR is None or b_VR is None else (a_TR, b_VR),
        candidate_TC=candidate_TC,
        seed_T=seed_T,
        **{"want": [], **options},
    )


def values(inputs: Inputs, options: dict[str, Any]) -> dict[str, Tensor]:
    """The fields that are there, and what came before and after them in the graph."""
    answer = call(inputs._replace(h_TD=inputs.h_TD * 1.5), options)
    fields = {name: field for name, field in answer._asdict().items() if field is not None}
    return fields | {"after": answer.logprob_T.clamp(min=-50.0).exp() + 1.0}


def gradients(fields: dict[str, Tensor], inputs: Inputs) -> list[Tensor]:
    leaves = [given for given in inputs if given is not None and given.requires_grad]
    total = torch.stack([
        torch.where(field.isfinite(), field, 0.0).square().sum()
        for field in fields.values() if field.requires_grad
    ]).sum()  # fmt: skip
    return list(torch.autograd.grad(total, leaves))


def compiled(backend: str, dynamic: bool | None = None) -> Callable[..., dict[str, Tensor]]:
    torch._dynamo.reset()
    return torch.compile(values, backend=backend, fullgraph=True, dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_compiled_call_is_the_call(feature: str, dtype: torch.dtype) -> None:
    """`fullgraph` raises at a graph break; the operator's own bits are the same."""
    inputs = make_inputs(13, dtype)
    found, wanted = compiled("aot_eager")(inputs, FEATURES[feature]), values(inputs, FEATURES[feature])
    assert found.keys() == wanted.keys()
    for name, field in wanted.items():
        torch.testing.assert_close(found[name], field, rtol=0, atol=0)
    for one, other in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("extras", [True, False])
def test_one_graph_takes_any_number_of_tokens(extras: bool) -> None:
    graphs = []

    def counting(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    function = torch.compile(values, backend=counting, fullgraph=True, dynamic=True)
    for n_tokens in (13, 7, 40, 2):
        inputs = make_inputs(n_tokens, torch.float32, seed=n_tokens, extras=extras)
        found = function(inputs, FEATURES["statistics"])
        for name, field in values(inputs, FEATURES["statistics"]).items():
            torch.testing.assert_close(found[name], field)
    assert len(graphs) == 1


def test_inductor() -> None:
    inputs = make_inputs(13, torch.float32)
    found, wanted = (function(inputs, FEATURES["ranks"]) for function in (compiled("inductor"), values))
    for name, field in wanted.items():
        torch.testing.assert_close(found[name], field)
    for one, other in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_expected_loss_changes_nothing_in_a_compiled_call() -> None:
    inputs = make_inputs(9, torch.float32, extras=False)

    def loss(signal: TokenLogProbs) -> Tensor:
        return -signal.logprob_T.sum()

    def function(inputs: Inputs) -> Tensor:
        return loss(call(inputs, {"expect": loss}))

    torch._dynamo.reset()
    found = torch.compile(function, backend="aot_eager", fullgraph=True)(inputs)
    torch.testing.assert_close(
        torch.autograd.grad(found, [inputs.h_TD]), torch.autograd.grad(function(inputs), [inputs.h_TD])
    )


def test_mistakes_are_named_in_a_compiled_call() -> None:
    inputs = make_inputs(9, torch.float32, extras=False)
    inputs.target_T[3] = V
    with pytest.raises(BadInput, match="target 21 is outside"):
        compiled("aot_eager")(inputs, {})


SETTINGS = Settings(
    softcap=0.0,
    logit_scale=1.0,
    temperature=1.0,
    ignore_index=IGNORE_INDEX,
    want="",
    n_top=0,
    top_k=0,
    top_p=1.0,
    backend="chunked",
    invariant=False,
    group="",
    first_token=0,
)
ALL = SETTINGS._replace(
    softcap=4.0, temperature=0.7, want="entropy,mean_logit,sum_sq,rank", n_top=3, top_p=0.9
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("settings", "extras"), [(ALL, True), (SETTINGS, False)])
def test_the_operator_forward(settings: Settings, extras: bool, dtype: torch.dtype) -> None:
    """Its schema, its fake, and its gradient under tracing."""
    torch.library.opcheck(FORWARD, (*make_inputs(9, dtype, extras=extras), *settings))


@pytest.mark.parametrize("needs", [(True,) * 4, (True, False, False, False), (False, True, True, False)])
@pytest.mark.parametrize(("settings", "extras"), [(ALL, True), (SETTINGS, False)])
@pytest.mark.parametrize(("n_tokens", "dtype"), [(9, torch.float64), (9, torch.bfloat16), (1, torch.float64)])
def test_the_operator_backward(
    n_tokens: int, settings: Settings, extras: bool, needs: tuple[bool, ...], dtype: torch.dtype
) -> None:
    inputs = make_inputs(n_tokens, dtype, extras=extras)
    with torch.no_grad():
        fields = FORWARD(*inputs, *settings)
    given = [
        torch.ones_like(field) if field.is_floating_point() else field.new_empty(0)
        for field in fields[:_N_FIELDS]
    ]
    saved = [fields[2], fields[4], fields[8], *fields[_N_FIELDS:]]
    arguments = (given, saved, list(needs), *inputs[:7], *settings)
    torch.library.opcheck(BACKWARD, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("flip", [True, False])
def test_gradients_have_the_strides_that_were_promised(flip: bool) -> None:
    """Compiled code trusts the fake's strides; weights may be stored either way round."""
    h_TD, w_VD, *rest = make_inputs(9, torch.float64)
    if flip:
        h_TD, w_VD = (given.detach().T.contiguous().T.requires_grad_() for given in (h_TD, w_VD))
    inputs = Inputs(h_TD, w_VD, *rest)
    torch.library.opcheck(FORWARD, (*inputs, *ALL))
    found = compiled("inductor")(inputs, FEATURES["statistics"])
    for one, other in zip(
        gradients(found, inputs), gradients(values(inputs, FEATURES["statistics"]), inputs), strict=True
    ):
        torch.testing.assert_close(one, other)
