"""Completions: greedy is greedy, draws are seeded, and each log-probability is the untouched one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import Message
from gyrocompass.data.encode import prompt_ids
from gyrocompass.data.tokenizer import train_tokenizer
from gyrocompass.model.decoding import Decoding
from gyrocompass.model.generate import generate
from tiny_models import tiny

PROMPTS = ["def f(x):", "", "return a longer one of the prompts", "x"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 9, 270, folder)


def model_for(tokenizer: Any, name: str = "llama", **changes: Any) -> Any:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return tiny(name, vocab_size=len(tokenizer), **ids, **changes)


@torch.no_grad()
def logits_after(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_greedy_takes_the_most_likely_token_and_reports_its_log_probability(
    tokenizer: Any, name: str
) -> None:
    model = model_for(tokenizer, name)
    for completion in generate(model, tokenizer, PROMPTS, max_new_tokens=12, rows=3):
        ids = prompt_ids(tokenizer, completion.prompt)
        assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= 12
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            logits = logits_after(model, ids)
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
            ids.append(token)


def test_drawn_tokens_have_the_log_probability_of_the_untouched_distribution(tokenizer: Any) -> None:
    model = model_for(tokenizer)
    completions = generate(
        model, tokenizer, PROMPTS, max_new_tokens=10, decoding=Decoding(temperature=2.0, top_p=0.9), seed=5
    )
    for completion in completions:
        ids = prompt_ids(tokenizer, completion.prompt)
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            assert logprob == pytest.approx(float(logits_after(model, ids).log_softmax(-1)[token]), abs=1e-4)
            ids.append(token)


def test_draws_are_seeded_and_follow_the_temperature(tokenizer: Any) -> None:
    model = model_for(tokenizer, initializer_range=0.05)
    before = torch.get_rng_state()
    draw = {"max_new_tokens": 16, "decoding": Decoding(temperature=1.0)}
    one = generate(model, tokenizer, PROMPTS, seed=1, **draw)
    assert torch.equal(before, torch.get_rng_state())
    assert generate(model, tokenizer, PROMPTS, seed=1, **draw) == one
    assert generate(model, tokenizer, PROMPTS, seed=2, **draw) != one
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=16)
    cold = generate(model, tokenizer, PROMPTS, max_new_tokens=16, decoding=Decoding(temperature=1e-4))
    assert [c.token_ids for c in cold] == [c.token_ids for c in greedy]
    # The whole vocabulary is drawn from, not the 50 best that transformers cuts to by itself.
    ids = prompt_ids(tokenizer, "x")
    firsts = generate(
        model, tokenizer, ["x"] * 60, max_new_tokens=1, decoding=Decoding(temperature=1.0), rows=60
    )
    best = logits_after(model, ids).topk(50).indices.tolist()
    assert any(completion.token_ids[0] not in best for completion in firsts)


def test_the_folders_own_sampling_habits_are_not_taken_over(tokenizer: Any) -> None:
    model = model_for(tokenizer)
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.max_new_tokens = 1
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=10) == plain
    assert model.generation_config.repetition_penalty == 50.0


def test_it_stops_at_the_end_of_text(tokenizer: Any) -> None:
    model = model_for(tokenizer)
    first, *_ = generate(model, tokenizer, ["x"], max_new_tokens=8)
    assert first.finish == "length" and len(first.token_ids) == 8
    end = first.token_ids[2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    stopped = generate(model, tokenizer, ["x", "a longer prompt"], max_new_tokens=8)[0]
    assert stopped.token_ids == first.token_ids[: first.token_ids.index(end) + 1]
    assert stopped.finish == "end"
    assert len(stopped.logprobs) == len(stopped.token_ids)


def test_special_tokens_are_in_the_tokens_and_not_in_the_text(tokenizer: Any) -> None:
    model = model_for(tokenizer)
    with torch.no_grad():  # a model that only ever says end-of-text
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
    (completion,) = generate(model, tokenizer, ["x"], max_new_tokens=8)
    assert completion.token_ids == [tokenizer.eos_token_id]  # all logits equal: argmax takes the first, id 0
    assert completion.text == "" and completion.tokens == [tokenizer.eos_token]
    assert completion.logprobs[0] == pytest.approx(-torch.log(torch.tensor(float(len(tokenizer)))).item())


def test_the_context_bounds_the_prompt_and_the_answer(tokenizer: Any) -> None:
    model = model_for(tokenizer, "gpt2")
    prompt = "q" * 60  # 61 tokens of 64
    long, short = generate(model, tokenizer, [prompt, "x"], max_new_tokens=10)
    assert len(prompt_ids(tokenizer, prompt)) == 61
    assert (len(long.token_ids), len(short.token_ids)) == (3, 10)
    with pytest.raises(BadInput, match=r"context of 64(.|\n)*prompt 1"):
        generate(model, tokenizer, ["x", "q" * 63])


def test_a_chat_prompt_goes_through_the_template(tokenizer: Any) -> None:
    model = model_for(tokenizer)
    text = tokenizer.decode(prompt_ids(tokenizer, [Message("user", "f(x)?")]))
    assert text == "<|endoftext|><|user|>f(x)?<|assistant|>"
    (answer,) = generate(model, tokenizer, ["f(x)?"], chat=True, max_new_tokens=4)
    (plain,) = generate(model, tokenizer, ["f(x)?"], max_new_tokens=4)
    assert answer.token_ids != plain.token_ids
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(BadInput, match="no chat template"):
            generate(model, tokenizer, ["f(x)?"], chat=True)
    finally:
        tokenizer.chat_template = template


def test_a_completion_is_json(tokenizer: Any) -> None:
    model = model_for(tokenizer).train()
    rows = [completion._asdict() for completion in generate(model, tokenizer, PROMPTS, max_new_tokens=3)]
    assert json.loads(json.dumps(rows)) == rows
    assert model.training
    assert generate(model, tokenizer, []) == []
