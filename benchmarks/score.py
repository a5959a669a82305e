"""Multiple choice by log-likelihood: `--model gyro` beside lm-evaluation-harness's own `hf`, on one model.

    python benchmarks/score.py                       (SmolLM2-135M; needs the extra smollm2; some minutes)
    python benchmarks/score.py --model FOLDER --items 200
    python benchmarks/score.py --write               (into docs/benchmarks instead of build/benchmarks)

The harness's requests are made here, four continuations for each context, as its tasks make them: contexts of
about 100 words and endings of about 10 from the standard library's documentation. Both models get the same
requests in turns, in another order every round; times are of `loglikelihood` as the harness calls it,
tokenising included. `hf` runs at each batch size that is named; ratios are to the fastest of them. Before
anything is timed, all log-likelihoods have to agree to 1e-4 nats per token (law 3). The error of each is told
too, against the same model in float64, per continuation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from align_models import prepare_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from loss_tables import machine
from rich.console import Console
from rich.table import Table

from gyrocompass.model.lm_eval_adapter import GyroLM

TOLERANCE = 1e-4
WANTED = 2.0


def requests(items: int, context_words: int, ending_words: int) -> list[Any]:
    """Four endings for each context: the true one, and three from elsewhere."""
    from pydoc_data import topics

    words = " ".join(topics.topics.values()).split()
    found = []
    stride = max(1, (len(words) - context_words - 5 * ending_words) // (4 * items))
    for number in range(items):
        start = number * stride
        context = " ".join(words[start : start + context_words])
        for choice in range(4):
            place = start + context_words + choice * (stride * items if choice else 0)
            place = min(place, len(words) - ending_words)
            found.append(
                Instance(
                    "loglikelihood", {}, (context, " " + " ".join(words[place : place + ending_words])), 0
                )
            )
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder (default: SmolLM2-135M from its package)")
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--context-words", type=int, default=100)
    parser.add_argument("--ending-words", type=int, default=10)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks")
    options = parser.parse_args()
    console = Console()
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        which = str(options.model) if options.model else prepare_model(folder)
        asked = requests(options.items, options.context_words, options.ending_words)
        models: dict[str, Any] = {"gyro": GyroLM(str(folder), dtype="float32", device="cpu")}
        for size in options.batch_sizes:
            models[f"hf, batch size {size}"] = HFLM(
                pretrained=str(folder), dtype="float32", device="cpu", batch_size=size
            )
        answers = {name: model.loglikelihood(asked, disable_tqdm=True) for name, model in models.items()}
        tokens = [len(models["gyro"].tok_encode(one.args[1])) for one in asked]
        apart = {
            name: max(
                abs(own[0] - its[0]) / count
                for own, its, count in zip(answers["gyro"], answers[name], tokens, strict=True)
            )
            for name in models
        }
        worst = max(apart.values())
        if worst > TOLERANCE:
            raise SystemExit(f"log-likelihoods differ by {worst:.2e} nats per token, more than {TOLERANCE}")
        exact = GyroLM(str(folder), dtype="float64", device="cpu").loglikelihood(
            asked[:80], disable_tqdm=True
        )
        off = {
            name: max(abs(own[0] - right[0]) for own, right in zip(answers[name], exact, strict=False))
            for name in models
        }
        laps: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        names = list(models)
        for number in range(options.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                console.print(f"round {number + 1} of {options.rounds}: {name}")
                wall, cpu = time.perf_counter(), time.process_time()
                models[name].loglikelihood(asked, disable_tqdm=True)
                laps[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    lines = report(laps, asked, worst, off, which, options)
    console.print(table(laps))
    target = Path("docs/benchmarks" if options.write else "build/benchmarks")
    target.mkdir(parents=True, exist_ok=True)
    (target / "score.md").write_text("\n".join(lines) + "\n")
    console.print(f"written: {(target / 'score.md').absolute()}")


def table(laps: dict[str, list[tuple[float, float]]]) -> Table:
    """The contenders, and how many times as long as ours they take."""
    found = Table()
    for head in ("", "s, min", "median", "/ ours, min", "median", "CPU s, min", "/ ours"):
        found.add_column(head)
    for row in rows(laps):
        found.add_row(*row)
    return found


def rows(laps: dict[str, list[tuple[float, float]]]) -> list[list[str]]:
    """As text."""
    own_wall, own_cpu = zip(*laps["gyro"], strict=True)
    found = []
    for name, timed in laps.items():
        wall, cpu = zip(*timed, strict=True)
        numbers = (
            min(wall),
            statistics.median(wall),
            min(wall) / min(own_wall),
            statistics.median(wall) / statistics.median(own_wall),
            min(cpu),
            min(cpu) / min(own_cpu),
        )
        found.append([name, *(f"{number:.2f}" for number in numbers)])
    return found


def report(
    laps: dict[str, list[tuple[float, float]]],
    asked: list[Any],
    worst: float,
    off: dict[str, float],
    model: str,
    options: argparse.Namespace,
) -> list[str]:
    """The table as Markdown, with what it is of."""
    best = min(min(wall for wall, _ in timed) for name, timed in laps.items() if name != "gyro")
    own = min(wall for wall, _ in laps["gyro"])
    return [
        "# Scoring choices, measured",
        "",
        "Written by `benchmarks/score.py`, whose first lines say how to read it.",
        "",
        "|  | s, min | median | / ours, min | median | CPU s, min | / ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in rows(laps)),
        "",
        f"- {len(asked)} continuations of {options.items} contexts, {model}, float32",
        f"- the fastest `hf` takes {best / own:.2f} times as long as ours (wanted: at least {WANTED:.0f})",
        f"- log-likelihoods differ by {worst:.1e} nats per token at most (wanted: at most {TOLERANCE})",
        "- off from float64 by, in nats of a whole continuation: "
        + ", ".join(f"{name} {error:.1e}" for name, error in off.items()),
        f"- {machine()}",
    ]


if __name__ == "__main__":
    main()
