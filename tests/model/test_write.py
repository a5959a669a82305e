"""A model as measures receive it: what it writes and goes on with has the primitive's numbers (law 3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gyrocompass.data.encode import prompt_ids
from gyrocompass.measure.generate import Writing
from gyrocompass.model.generate import generate
from gyrocompass.model.score import scorer
from gyrocompass.model.write import continuation_scorer, score_pairs, writer


def test_a_continuation_has_the_numbers_of_the_whole_text(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    context, continuation = "def add(first, second):", " return first"
    (own,) = continuation_scorer(model, tokenizer, length=64)([(context, continuation)])
    (whole,) = scorer(model, tokenizer, length=64)([context + continuation])
    count = len(own.id_N)
    np.testing.assert_array_equal(own.id_N, whole.id_N[-count - 1 : -1])  # the end of text is not asked about
    np.testing.assert_allclose(own.logprob_N, whole.logprob_N[-count - 1 : -1], atol=1e-5)
    np.testing.assert_array_equal(own.rank_N, whole.rank_N[-count - 1 : -1])


def test_white_space_belongs_to_the_continuation(speaking: tuple[Any, Any]) -> None:
    score = continuation_scorer(*speaking, length=64)
    one, other = score([("first +", " second"), ("first + ", "second")])
    np.testing.assert_array_equal(one.id_N, other.id_N)
    np.testing.assert_allclose(one.logprob_N, other.logprob_N, atol=1e-6)


def test_order_and_company_change_nothing(speaking: tuple[Any, Any]) -> None:
    score = continuation_scorer(*speaking, length=64)
    pairs = [("a " * n, "return total" * (n % 3 + 1)) for n in range(1, 300, 7)]
    together = [found.logprob_N.sum() for found in score(pairs)]
    alone = [next(score([pair])).logprob_N.sum() for pair in pairs[:10]]
    np.testing.assert_allclose(together[:10], alone, atol=1e-4)


def test_of_what_is_too_long_the_end_is_kept(speaking: tuple[Any, Any]) -> None:
    model, _ = speaking
    ids = [5 + n % 90 for n in range(100)]
    (whole,) = score_pairs(model, [(ids[:80], ids[80:])], length=30)
    (end,) = score_pairs(model, [(ids[69:80], ids[80:])], length=30)
    np.testing.assert_allclose(whole.logprob_N, end.logprob_N, atol=1e-5)
    (longer,) = score_pairs(model, [(ids[:10], ids[10:])], length=30)
    assert len(longer.logprob_N) == 30


def test_greedy_texts_and_their_numbers_are_those_of_generate(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    prompts = ["def add_1(", "total = first"]
    found = writer(model, tokenizer)(prompts, Writing(max_new_tokens=12))
    expected = generate(model, tokenizer, prompts, max_new_tokens=12)
    for (one,), completion in zip(found, expected, strict=True):
        assert one.text == completion.text
        np.testing.assert_allclose(one.logprob_N, completion.logprobs, atol=1e-5)
        assert one.finished == (completion.finish == "end")
        assert (one.entropy_N > 0).all() and len(one.entropy_N) == len(one.logprob_N)


def test_samples_differ_and_a_temperature_leaves_their_numbers_alone(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    (found,) = writer(model, tokenizer)(["def"], Writing(max_new_tokens=8, samples=4, temperature=0.7))
    assert len({one.text for one in found}) > 1
    ids = [
        (prompt_ids(tokenizer, "def"), tokenizer.encode(one.text, add_special_tokens=False)) for one in found
    ]
    for one, scored in zip(found, score_pairs(model, ids, length=64), strict=True):
        count = len(scored.logprob_N)
        if not one.finished and count == len(one.logprob_N):  # else the text is tokenised in another way
            np.testing.assert_allclose(one.logprob_N, scored.logprob_N, atol=1e-5)
    again = writer(model, tokenizer)(["def"], Writing(max_new_tokens=8, samples=4, temperature=0.7))[0]
    assert [one.text for one in again] == [one.text for one in found]


def test_a_stop_cuts_text_and_tokens(speaking: tuple[Any, Any]) -> None:
    model, tokenizer = speaking
    ((whole,),) = writer(model, tokenizer)(["def add_1("], Writing(max_new_tokens=12))
    stop = whole.text[len(whole.text) // 2]
    ((cut,),) = writer(model, tokenizer)(["def add_1("], Writing(max_new_tokens=12, stop=(stop,)))
    assert whole.text.startswith(cut.text) and stop not in cut.text and cut.finished
    assert 0 < len(cut.logprob_N) <= len(whole.logprob_N)
    np.testing.assert_allclose(cut.logprob_N, whole.logprob_N[: len(cut.logprob_N)], atol=1e-6)


def test_what_is_read_once_for_several_says_what_it_says_to_each(speaking: tuple[Any, Any]) -> None:
    model, _ = speaking
    first = [5 + n % 90 for n in range(40)]
    seconds = [[7], [9, 11, 13], [20 + n for n in range(12)]]
    together = list(score_pairs(model, [(first, second) for second in seconds], length=64))
    for second, found in zip(seconds, together, strict=True):
        (alone,) = score_pairs(model, [(first, second)], length=64)
        np.testing.assert_array_equal(found.id_N, alone.id_N)
        np.testing.assert_allclose(found.logprob_N, alone.logprob_N, atol=1e-5)
        np.testing.assert_allclose(found.entropy_N, alone.entropy_N, atol=1e-5)
        np.testing.assert_array_equal(found.rank_N, alone.rank_N)
    mixed = [(first, seconds[0]), (first[:9], seconds[1]), (first, seconds[2]), (first, seconds[1])]
    for (own, second), found in zip(mixed, score_pairs(model, mixed, length=64), strict=True):
        (alone,) = score_pairs(model, [(own, second)], length=64)
        np.testing.assert_allclose(found.logprob_N, alone.logprob_N, atol=1e-5)
