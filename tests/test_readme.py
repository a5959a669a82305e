"""The README says what is true: its Python runs, its commands parse, its targets exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from gyrocompass.cli.main import parser
from gyrocompass.data.tokenizer import train_tokenizer
from gyrocompass.model.load import new_causal_lm, save_model

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [
    line.split("  #")[0].split(" # ")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("gyro ")])
def test_every_gyro_command_parses(command: str) -> None:
    options = parser().parse_args(shlex.split(command)[1:])
    assert options.verb


def test_every_make_target_exists() -> None:
    makefile = README.with_name("Makefile").read_text(encoding="utf-8")
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert {"demo", "test", "check", "bench"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for language, block in BLOCKS if language == "python"]
    assert len(example.strip().splitlines()) <= 12
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n"] * 3, 300, tmp_path)
    model = new_causal_lm(
        {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        seed=0,
    )
    save_model(model, tmp_path, tokenizer=tokenizer)
    names: dict[str, object] = {}
    exec(example.replace("path/to/model", str(tmp_path)), names)
    answer = names["answer"]
    with torch.no_grad():
        logits = model(names["ids"]).logits[0, :-1].log_softmax(-1)  # type: ignore[operator]
    expected = logits.gather(1, names["ids"][0, 1:, None])[:, 0]  # type: ignore[index]
    torch.testing.assert_close(answer.logprob_T, expected, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    assert "tensor(" in capsys.readouterr().out


def test_nothing_is_left_to_fill_in() -> None:
    assert "MINUTES" not in README.read_text(encoding="utf-8")
