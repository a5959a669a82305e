"""The controls of generation do what their formulas say, and leave what is told untouched."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gyrocompass.core.config import parse
from gyrocompass.core.errors import ConfigError
from gyrocompass.model.decoding import Decoding, _Penalties
from gyrocompass.model.generate import generate

PROMPTS = ["def add_1(", "total", "x = "]


def test_told_numbers_are_of_the_untouched_distribution(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    decoding = Decoding(temperature=1.5, top_k=20, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.5)
    asked = generate(model, tokenizer, PROMPTS, max_new_tokens=10, decoding=decoding, alternatives=3, seed=1)
    for prompt, one in zip(PROMPTS, asked, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False), *one.token_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        rows = logits[-len(one.token_ids) - 1 : -1]
        own = rows[torch.arange(len(one.token_ids)), torch.tensor(one.token_ids)]
        np.testing.assert_allclose(one.logprobs, own.numpy(), atol=1e-4)
        np.testing.assert_allclose(one.entropies, -(rows.exp() * rows).sum(-1).numpy(), atol=1e-4)
        assert one.ranks == (rows > own[:, None]).sum(-1).tolist()
        top = rows.topk(3).values.numpy()
        np.testing.assert_allclose([[p for _, p in place] for place in one.alternatives], top, atol=1e-4)


def test_top_k_and_min_p_bound_what_is_drawn(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    few = generate(
        model, tokenizer, ["def"] * 20, max_new_tokens=5, decoding=Decoding(temperature=3.0, top_k=3), rows=20
    )
    assert max(rank for one in few for rank in one.ranks) == 2
    near = Decoding(temperature=3.0, min_p=0.8)
    for one in generate(
        model, tokenizer, ["def"] * 8, max_new_tokens=5, decoding=near, alternatives=1, rows=8
    ):
        for logprob, place in zip(one.logprobs, one.alternatives, strict=True):
            # min_p is about the distribution at the temperature: (p / p_max)^(1/3) >= 0.8
            assert logprob - place[0][1] >= 3 * np.log(0.8) - 1e-4


def test_penalties_are_openai_s_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 9, generator=generator)
    ids = torch.tensor([[1, 1, 3, 3, 3, 5], [2, 2, 0, 1, 2, 2]])
    found = _Penalties(0.5, 1.25, prompt_length=2)(ids, scores)
    for row in range(2):
        count = Counter(ids[row, 2:].tolist())
        for token in range(9):
            wanted = scores[row, token] - 0.5 * count[token] - 1.25 * (count[token] > 0)
            assert found[row, token] == pytest.approx(float(wanted), abs=1e-6)


def test_a_penalty_makes_repeats_rarer(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=30)
    fined = generate(model, tokenizer, PROMPTS, max_new_tokens=30, decoding=Decoding(frequency_penalty=2.0))
    repeats = [sum(len(one.token_ids) - len(set(one.token_ids)) for one in some) for some in (plain, fined)]
    assert repeats[1] < repeats[0]


def test_beams_find_what_is_likelier(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    beams = generate(model, tokenizer, PROMPTS, max_new_tokens=6, decoding=Decoding(beams=6))
    means = [np.mean([np.mean(one.logprobs) for one in some]) for some in (greedy, beams)]
    assert means[1] >= means[0] - 1e-6


def test_a_stop_ends_text_and_tokens(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    (whole,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=14)
    stop = whole.text[len(whole.text) // 2 :][:2]
    (cut,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=14, decoding=Decoding(stop=(stop,)))
    assert cut.finish == "stop" and stop not in cut.text and whole.text.startswith(cut.text)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_only_what_is_allowed_is_written(speaking: tuple[Any, Any]) -> None:
    pytest.importorskip("llguidance")
    model, tokenizer = speaking
    for one in generate(
        model, tokenizer, PROMPTS, max_new_tokens=12, decoding=Decoding(choices=("yes", "no"))
    ):
        assert one.text in ("yes", "no") and one.finish == "end"
    for temperature in (0.0, 1.5):
        found = generate(
            model,
            tokenizer,
            PROMPTS,
            max_new_tokens=20,
            decoding=Decoding(regex="[0-9]{3}-[a-c]+x", temperature=temperature),
        )
        for one in found:
            assert one.finish == "length" or re.fullmatch("[0-9]{3}-[a-c]+x", one.text)
            assert re.fullmatch("[0-9]{1,3}(-([a-c]+x?)?)?", one.text)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}},
        "required": ["n", "b"],
        "additionalProperties": False,
    }
    for one in generate(model, tokenizer, PROMPTS, max_new_tokens=80, decoding=Decoding(json_schema=schema)):
        if one.finish == "end":
            value = json.loads(one.text)
            assert set(value) == {"n", "b"} and 0 <= value["n"] <= 9 and isinstance(value["b"], bool)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"choices": ["a"], "regex": "b"}, "two constraints"),
        ({"choices": []}, "at least one"),
        ({"beams": 2, "temperature": 1.0}, "beams draw nothing"),
        ({"beams": 2, "regex": "a"}, "do not go together"),
        ({"min_p": 0.1}, "min_p is about what is drawn"),
        ({"top_p": 0.5}, "top_p is about what is drawn"),
        ({"stop": [""]}, "not empty"),
        ({"temperatur": 1}, "did you mean temperature"),
    ],
)
def test_controls_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Decoding, given, "test")


def test_the_command_line_takes_them(model_folder: Path, tmp_path: Path, gyro: Any) -> None:
    pytest.importorskip("llguidance")
    code, out, err = gyro(
        "generate", model_folder, "x", "--choices", "yes", "no", "--json", "--alternatives", 2
    )
    assert code == 0, err
    assert json.loads(out)[0]["text"] in ("yes", "no") and len(json.loads(out)[0]["alternatives"][0]) == 2
    for wrong, message in (
        (("--regex", "("), "the constraint is none"),
        (("--min-p", "0.2"), "min_p is about what is drawn"),
        (("--json-schema", tmp_path / "none.json"), "none.json"),
    ):
        code, _, err = gyro("generate", model_folder, "x", *wrong)
        assert code == 2 and message in err
