"""A watch against gamed rewards: held-out prompts, the reward that is trained on, and a better one beside it.

    model --sample held-out prompts--> proxy and gold rewards, KL from the reference, entropy, length
          --GamingMonitor-->           go on, or: gold has been falling while the proxy rises; go back

The prompts and seeds are the same at every look, so that looks are comparable. Each look is a row of
`watch.jsonl`, the first one before the first step. Where the watch ends a run, the loop goes back to the
parameters of the look with the best gold reward.

Left out: what is done about it, which is the user's: another reward, a stronger tie to the reference.

Shape legend: N tokens of a dataset, D documents (samples).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.gaming import GamingConfig, GamingMonitor, Judged, Row
from gyrocompass.measure.reward import WeightedSum
from gyrocompass.measure.rewards.text import distinct_share
from gyrocompass.model.columns import TokenColumns
from gyrocompass.train.answers import Annotate, Prompt
from gyrocompass.train.distributed import World
from gyrocompass.train.draw import draw, sums
from gyrocompass.train.metrics import MetricLog
from gyrocompass.train.rollout import Generate


class WatchConfig(Config):
    """What is looked at, and when the run is over."""

    prompts: int = Field(default=16, ge=2)
    """How many of the held-out prompts, from the first."""
    samples_per_prompt: int = Field(default=4, ge=1)
    gold: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    """The rewards that count, and that the run does not learn from."""
    halt: GamingConfig = GamingConfig()
    seed: int = Field(default=1, ge=0)


class GamingWatch:
    """A `loop.Watch`.

    Args:
        prompts: held out.
        generate: the engine, at temperature 1.
        decode: token ids to the text that is rewarded.
        proxy: the reward that the run learns from.
        gold: the one that counts.
        score: the model's own view of samples.
        reference: log-probabilities of the reference.
        config: see `WatchConfig`.
        folder: where watch.jsonl is written; None on ranks that do not write.
        world: this process among its peers.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        generate: Generate,
        decode: Callable[[Sequence[int]], str],
        proxy: WeightedSum,
        gold: WeightedSum,
        score: Callable[[TokenDataset], TokenColumns],
        reference: Annotate,
        config: WatchConfig,
        folder: Path | None,
        world: World = World(),  # noqa: B008  (immutable)
    ) -> None:
        self.prompts = prompts[: config.prompts]
        self.generate, self.decode, self.proxy, self.gold = generate, decode, proxy, gold
        self.score, self.reference, self.config, self.world = score, reference, config, world
        self.monitor = GamingMonitor(config.halt)
        self.log = None if folder is None else MetricLog(folder / "watch.jsonl")
        self.is_over = False

    @property
    def best_step(self) -> int | None:
        """Where the gold reward was highest."""
        return self.monitor.best_step

    def look(self, step: int) -> str | None:
        """See `loop.Watch`."""
        # Every rank judges alike but for rounding and clocks; all take the first one's word.
        first = self.world.gather_json([list(judged) for judged in self._judged()])[0]
        verdict = self.monitor.observe(step, [Judged(*judged) for judged in first])
        if self.log is not None:
            self.log.append(as_json(self.monitor.rows[-1]))
        if verdict is None:
            return None
        self.is_over = True
        return f"{verdict.reason}; going back to the parameters of step {verdict.best_step}"

    def state(self) -> dict[str, Any]:
        """See `loop.Watch`."""
        return {"monitor": self.monitor.state(), "is_over": self.is_over}

    def restore(self, state: dict[str, Any]) -> None:
        """See `loop.Watch`."""
        self.monitor.restore(state["monitor"])
        self.is_over = state["is_over"]
        if self.log is not None:
            self.log.cut(self.monitor.rows[-1].step if self.monitor.rows else -1)

    def _judged(self) -> list[Judged]:
        asked, samples, dataset = draw(
            self.prompts, self.config.samples_per_prompt, self.config.seed, self.generate, self.decode
        )
        scored, reference_N = self.score(dataset), self.reference(dataset)
        kl_D = sums(dataset, scored.logprob_N - reference_N)
        entropy_D = sums(dataset, scored.entropy_N) / sums(dataset, np.ones_like(scored.entropy_N))
        proxy, gold = self.proxy(samples), self.gold(samples)
        return [
            Judged(
                prompt=prompt.id,
                proxy=proxy[d],
                gold=gold[d],
                kl_nats=float(kl_D[d]),
                entropy_nats=float(entropy_D[d]),
                n_tokens=sample.n_tokens,
                distinct=distinct_share(sample.completion),
                finished=sample.finished,
            )
            for d, (prompt, sample) in enumerate(zip(asked, samples, strict=True))
        ]


def as_json(row: Row) -> dict[str, Any]:
    """An evaluation as a line of watch.jsonl."""
    plain = row._asdict()
    for name in ("proxy", "gold"):
        plain[name] = plain[name]._asdict()
    plain["best_of"] = [best._asdict() for best in row.best_of]
    return plain
