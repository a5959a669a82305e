"""`gyro exposure`: how far models recite given texts, side by side; before and after a removal, say."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.cli.model import model_folder
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.measure.intervals import ratio_estimate
from gyrocompass.measure.memorisation import Canary, Exposure, exposures, read_canaries
from gyrocompass.model.head import context_length
from gyrocompass.model.open import open_model
from gyrocompass.model.write import continuation_scorer


def exposed(folder: Path, canaries: Sequence[Canary], candidates: int) -> list[Exposure]:
    """How far the model in a folder knows each canary."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(folder, dtype=torch.float32, device=device)
    score = continuation_scorer(model, load_tokenizer(folder), length=context_length(model))
    return [one for _, one in exposures(score, canaries, candidates)]


def exposure(options: argparse.Namespace) -> int:
    """Rank each canary among texts of its form, by each model."""
    canaries = read_canaries(options.canaries)
    folders = [model_folder(argparse.Namespace(**vars(options) | {"model": name})) for name in options.models]
    found = [exposed(folder, canaries, options.candidates) for folder in folders]
    bits_MC = np.array([[one.bits for one in own] for own in found])
    change = None
    if len(options.models) > 1 and len(canaries) > 1:
        change = ratio_estimate(bits_MC[-1] - bits_MC[0], np.ones(len(canaries)))
    if options.json:
        rows = [
            {"canary": one.canary, "bits": bits_MC[:, place].tolist(), "most": found[0][place].most}
            for place, one in enumerate(canaries)
        ]
        told = None if change is None else change._asdict()
        print(json.dumps({"models": options.models, "canaries": rows, "change": told}, indent=2))
        return 0
    console = Console(highlight=False)
    table = Table(box=None)
    for head in ("canary", *(f"{name}: bits" for name in options.models), "by heart"):
        table.add_column(Text(head), overflow="fold")
    for place, one in enumerate(canaries):
        shown = [f"{bits:.2f}" for bits in bits_MC[:, place]]
        table.add_row(Text(one.canary), *shown, f"{found[0][place].most:.2f}")
    table.add_row("mean", *(f"{value:.2f}" for value in bits_MC.mean(1)), "")
    console.print(table)
    if change is not None:
        between = "" if change.low is None else f" [{change.low:+.2f}, {change.high:+.2f}]"
        console.print(
            f"from the first model to the last: {change.value:+.2f} bits{between}, {len(canaries)} canaries",
            markup=False,
        )
    console.print("a text that was not learned has 1.4 bits in the mean", style="dim")
    return 0
