"""What `docs/drop_in.md` shows is run, in its order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from gyrocompass.data.tokenizer import train_tokenizer
from gyrocompass.model.lazy_logits import LazyLogits
from gyrocompass.model.load import new_causal_lm, save_model

DOCS = Path(__file__).parents[1] / "docs" / "drop_in.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n"] * 3, 300, tmp_path)
    model = new_causal_lm({**LLAMA, "vocab_size": len(tokenizer)}, seed=0)
    save_model(model, tmp_path, tokenizer=tokenizer)
    ids = [[5, 6, 7, 8, 9, 10]] * 8
    names: dict[str, Any] = {
        "ids": torch.tensor(ids),
        "dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "settings": {
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
    }
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        exec(block.replace("path/to/model", str(tmp_path)), names)
        if "output" in names:
            assert isinstance(names["output"].logits, LazyLogits)
    assert names["head"].grad.abs().sum() > 0 and (names["hidden"].grad[:100] == 0).all()
    assert len(names["trainer"].state.log_history) > 0
    unpatched = names["model"](input_ids=names["ids"], labels=names["ids"])
    assert type(unpatched.logits) is torch.Tensor
