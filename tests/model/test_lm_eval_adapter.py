"""lm-evaluation-harness gets the numbers that its own `hf` model gives it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from gyrocompass.core.errors import BadInput

warnings.filterwarnings("ignore")
lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

CONTEXTS = ["def add_3(first, second):\n    return", "total = first + second ", "x", ""]
CONTINUATIONS = [" total + 3", "first", " second\n", " the sum"]


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


@pytest.fixture(scope="module")
def models(model_folder: Path) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    from gyrocompass.model.lm_eval_adapter import GyroLM

    theirs = HFLM(pretrained=str(model_folder), dtype="float32", device="cpu", batch_size=2)
    return GyroLM(str(model_folder), dtype="float32", device="cpu"), theirs


def test_log_likelihoods_are_those_of_hf(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    asked = [request("loglikelihood", context, text) for context in CONTEXTS for text in CONTINUATIONS]
    asked.append(request("loglikelihood", "add " * 200, "second"))
    pairs = zip(
        ours.loglikelihood(asked, disable_tqdm=True),
        theirs.loglikelihood(asked, disable_tqdm=True),
        strict=True,
    )
    for (logprob, is_greedy), (expected, expected_greedy) in pairs:
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy


def test_rolling_log_likelihoods_are_those_of_hf(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    asked = [request("loglikelihood_rolling", text) for text in ("def add_3(first):", "second " * 150)]
    for own, expected in zip(
        ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), strict=True
    ):
        assert own == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_texts_are_those_of_hf(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [request("generate_until", context, dict(settings)) for context in CONTEXTS[:3]]
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    with pytest.raises(BadInput, match="writes greedily"):
        ours.generate_until([request("generate_until", "x", {"do_sample": True, "temperature": 1.0})])


@pytest.mark.slow
def test_the_harness_runs_a_task_with_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gyro: Any
) -> None:
    """A task of the harness's own YAML, local data, both models, from the command line."""
    records = [
        {"q": f"add_{n} returns the sum and", "choices": [str(n), str(n + 1)], "gold": 0} for n in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = {}
    for name in ("gyro", "hf"):
        out = tmp_path / name
        code, _, _ = gyro(
            "lm-eval", "--model", name, "--model_args", f"pretrained={model_folder},dtype=float32", "--tasks",
            "sums", "--include_path", tmp_path, "--device", "cpu", "--output_path", out, "--log_samples",
        )  # fmt: skip
        assert code == 0
        samples = [json.loads(line) for line in next(out.rglob("samples_*.jsonl")).read_text().splitlines()]
        found[name] = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    for ours, theirs in zip(found["gyro"], found["hf"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_bad_arguments_are_told(model_folder: Path) -> None:
    from gyrocompass.model.lm_eval_adapter import GyroLM

    with pytest.raises(BadInput, match="unknown dtype 'int3'"):
        GyroLM(str(model_folder), dtype="int3")
    with pytest.raises(BadInput):
        GyroLM("/nowhere")
