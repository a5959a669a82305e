"""The server: what a gate costs, what batching gives, and whether a crowd breaks anything.

python benchmarks/serve.py --model FOLDER                        (all parts; some minutes)
python benchmarks/serve.py --model FOLDER --parts gate --litellm BIN/litellm
python benchmarks/serve.py --model FOLDER --write                (into docs/benchmarks)

engine    tokens per second of the embedded engine and of ctranslate2 (float32, int8) with 1, 8, 16 sequences
          at once, beside serial `model.generate` on the same weights and prompts, in turns; greedy, no end
          of text; every token told with its log-probability and entropy
gate      latency of a server that answers at once: asked directly and through ours with a policy (patterns,
          masks, log of events), in turns, and once through LiteLLM's proxy; 200 requests a second, open
          loop. Each proxy has a core for itself, load and upstream share the other. CPU is of the proxy's
          processes. Medians of the rounds; what it is over the direct way is of each round.
crowd     10,000 requests, as many at once as connections allow: good ones whose answers are known
          beforehand, malformed, oversized, and clients that leave; memory before and after
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from loss_tables import machine
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

HERE = Path(__file__).parent
TOKENS = 64
POLICY = """\
name: bench
scorers:
  - {kind: patterns, name: weapons, deny: ["\\\\bbomb\\\\b", "\\\\bgun\\\\b"]}
mask: {personal: true, secrets: true}
rules:
  - {when: {flag: any.weapons}, then: block}
  - {when: {least_logprob_below: -8}, then: review}
"""


def engine_part(folder: Path, rounds: int) -> tuple[list[list[str]], list[str]]:
    """Tokens per second."""
    from gyrocompass.core.errors import GyroError
    from gyrocompass.data.tokenizer import load_tokenizer
    from gyrocompass.model.head import context_length
    from gyrocompass.model.open import open_model
    from gyrocompass.serve.engine.converted import convert
    from gyrocompass.serve.engine.ct2 import CTranslate2Engine, Weights, engine_name
    from gyrocompass.serve.engine.desk import Engine, Limits
    from gyrocompass.serve.engine.engine import EmbeddedEngine
    from gyrocompass.serve.engine.kinds import Request

    model = open_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    prompts = [f"def function_{number}(first, second):\n    return" for number in range(16)]
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in prompts]

    generate: Any = model.generate

    def serial() -> float:
        config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
        began = time.perf_counter()
        with torch.no_grad():
            for one in ids[:8]:
                mask = torch.ones(1, len(one), dtype=torch.int64)
                generate(torch.tensor([one]), attention_mask=mask, generation_config=config)
        return 8 * TOKENS / (time.perf_counter() - began)

    embedded = EmbeddedEngine(model, tokenizer)
    embedded._ends = set()  # as in `generate` above: everybody writes to the limit
    engines: dict[str, Engine] = {"engine": embedded}
    with tempfile.TemporaryDirectory() as kept:
        converted = convert(model, tokenizer, Path(kept) / "model")
        limits = Limits(context_length(model), int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
        kinds: tuple[Weights, ...] = ("float32", "int8")
        for kind in kinds:
            engines[engine_name(kind)] = CTranslate2Engine(converted, tokenizer, limits, (), weights=kind)

    def together(engine: Engine, count: int) -> float:
        left, done = [count], threading.Event()

        def sink(what: Any) -> None:
            assert not isinstance(what, GyroError), what
            left[0] -= what.finish is not None
            if not left[0]:
                done.set()

        began = time.perf_counter()
        for one in ids[:count]:
            engine.submit(Request(one, max_tokens=TOKENS), sink)
        done.wait()
        return count * TOKENS / (time.perf_counter() - began)

    contenders: dict[str, Any] = {"model.generate, one after another": serial}
    contenders |= {
        f"{name}: {count} at once": partial(together, engine, count)
        for name, engine in engines.items()
        for count in (1, 8, 16)
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for number in range(rounds):
        for name in random.Random(number).sample(sorted(contenders), len(contenders)):
            found[name].append(contenders[name]())
    for engine in engines.values():
        engine.close()
    base = statistics.median(found["model.generate, one after another"])
    rows = [
        [name, f"{statistics.median(rates):,.0f}", f"{statistics.median(rates) / base:.2f}"]
        for name, rates in found.items()
    ]
    return rows, ["wanted: at least 2 with 8 at once", f"{TOKENS} tokens each, medians of {rounds} rounds"]


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def running(command: Sequence[str], port: int, core: int, path: str, **more: str) -> Iterator[int]:
    """A server on one core; its process id."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *command], stdout=log, stderr=log, env=os.environ | more
    )
    try:
        import urllib.error
        import urllib.request

        until = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2):
                    break
            except urllib.error.HTTPError:
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-3000:]) from None
                time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def cpu_s(pid: int) -> float:
    """Of a process and its children."""
    ticks = os.sysconf("SC_CLK_TCK")
    total, found = 0.0, [pid]
    for one in found:
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return total


def gate_part(
    litellm: str | None, rate: float, seconds: float, rounds: int
) -> tuple[list[list[str]], list[str]]:
    """Latencies and CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, behind = Path(scratch), free_port()
        (folder / "policy.yaml").write_text(POLICY)
        (folder / "litellm.yaml").write_text(
            json.dumps(
                {
                    "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
                    "model_list": [
                        {
                            "model_name": "fake",
                            "litellm_params": {
                                "model": "openai/fake",
                                "api_base": f"http://127.0.0.1:{behind}/v1",
                                "api_key": "none",
                            },
                        }
                    ],
                }
            )
        )
        ours = [
            *(sys.executable, "-m", "gyrocompass", "serve", "--upstream", f"http://127.0.0.1:{behind}"),
            *("--policy", str(folder / "policy.yaml"), "--store", str(folder / "store"), "--port"),
        ]
        contenders: dict[str, list[str]] = {"ours, with a policy": ours}
        if litellm:
            contenders["LiteLLM"] = [litellm, "--config", str(folder / "litellm.yaml"), "--port"]
        fake = [sys.executable, str(HERE / "serve_load.py"), "upstream", str(behind)]
        found: dict[str, list[Gated]] = {"directly": []}
        with running(fake, behind, 1, "/v1/models"):
            for name, command in contenders.items():
                port = free_port()
                with running([*command, str(port)], port, 0, "/v1/models") as pid:
                    measure(port, min(rate, 50), 3)
                    for _ in range(rounds if name.startswith("ours") else 1):
                        direct = measure(behind, rate, seconds)
                        before = cpu_s(pid)
                        told = measure(port, rate, seconds)
                        cpu_ms = 1000 * (cpu_s(pid) - before) / told["requests"]
                        found["directly"].append(Gated(direct, direct, 0.0))
                        found.setdefault(name, []).append(Gated(told, direct, cpu_ms))
    own = statistics.median(one.cpu_ms for one in found["ours, with a policy"])
    rows = []
    for name, measured in found.items():
        times = [statistics.median(one.told[share] for one in measured) for share in ("p50", "p99")]
        over = [
            spread([one.told[share] - one.direct[share] for one in measured]) if name in contenders else ""
            for share in ("p50", "p99")
        ]
        cpu_ms = statistics.median(one.cpu_ms for one in measured)
        cpu = [f"{cpu_ms:.2f}", f"{cpu_ms / own:.1f}"] if cpu_ms else ["", ""]
        failed = sum(one.told["failed"] for one in measured)
        rows.append([name, *(f"{value:.2f}" for value in times), *over, *cpu, str(failed)])
    wanted = "under 1 ms p50 and 5 ms p99 over the direct way, and a tenth of LiteLLM's CPU"
    return rows, [f"{rate:g} requests/s for {seconds:g} s, {rounds} rounds; wanted: {wanted}"]


class Gated(NamedTuple):
    """One measurement through a proxy, and the direct one before it."""

    told: dict[str, Any]
    direct: dict[str, Any]
    cpu_ms: float


def spread(values: Sequence[float]) -> str:
    """The median, and what it was between."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def measure(port: int, rate: float, seconds: float) -> dict[str, Any]:
    """What the load generator says, on the other core."""
    command = ["taskset", "-c", "1", sys.executable, str(HERE / "serve_load.py"), "load"]
    command += [f"http://127.0.0.1:{port}", str(rate), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def rss_mb(pid: int) -> float:
    """Resident memory."""
    line = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def crowd_part(folder: Path, count: int) -> tuple[list[list[str]], list[str]]:
    """Answers, failures, memory."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(sys.executable, "-m", "gyrocompass", "serve", str(folder), "--name", "m", "--port", str(port)),
            *("--store", f"{scratch}/store", "--most-waiting", "20000", "--max-body-bytes", "65536"),
        ]
        with running(command, port, 0, "/ready") as pid:
            asyncio.run(crowd(port, count // 4))
            asyncio.run(crowd(port, count // 4))
            before = rss_mb(pid)
            found = asyncio.run(crowd(port, count))
            time.sleep(2)
            after = rss_mb(pid)
            status = subprocess.run(
                ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}/ready"],
                capture_output=True, text=True,
            ).stdout  # fmt: skip
    rows = [[name, f"{number:,}"] for name, number in found.items()]
    rows.append(["memory, MB", f"{before:.0f} before, {after:.0f} after ({after / before - 1:+.1%})"])
    rows.append(["ready afterwards", "yes" if status == "200" else f"no ({status})"])
    return rows, [f"{count:,} requests; wanted: no crash, memory within 5%, every answer its own"]


async def crowd(port: int, count: int) -> dict[str, int]:
    """All kinds at once."""
    import aiohttp

    url = f"http://127.0.0.1:{port}/v1/completions"
    prompts = [f"def f{number}(x):" for number in range(50)]
    found = {"good, answered as alone": 0, "good, answered otherwise": 0, "malformed, refused": 0,
             "oversized, refused": 0, "left early": 0, "something else": 0}  # fmt: skip
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=2000), timeout=timeout) as session:

        async def ask(prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
            async with session.post(url, json=body) as answer:
                return str((await answer.json())["choices"][0]["text"])

        alone = {prompt: await ask(prompt) for prompt in prompts}

        async def one(number: int) -> str:
            kind = random.Random(number).choice(["good"] * 6 + ["malformed", "oversized", "left"])
            try:
                if kind == "good":
                    prompt = prompts[number % len(prompts)]
                    same = await ask(prompt) == alone[prompt]
                    return "good, answered as alone" if same else "good, answered otherwise"
                if kind == "malformed":
                    async with session.post(url, data=b'{"prompt": [1, "a"], "max_tokens"') as answer:
                        return "malformed, refused" if answer.status == 400 else "something else"
                if kind == "oversized":
                    async with session.post(url, json={"prompt": "a" * 100_000}) as answer:
                        return "oversized, refused" if answer.status == 413 else "something else"
                body = {"prompt": prompts[0], "max_tokens": 400, "temperature": 1, "stream": True}
                async with session.post(url, json=body) as answer:
                    await answer.content.readany()
                return "left early"
            except aiohttp.ClientError:
                return "oversized, refused" if kind == "oversized" else "something else"

        for ended in await asyncio.gather(*(one(number) for number in range(count))):
            found[ended] += 1
    return found


HEADS = {
    "engine": ["", "tokens/s", "/ serial"],
    "gate": ["", "p50 ms", "p99 ms", "over direct p50", "p99", "CPU ms a request", "/ ours", "failed"],
    "crowd": ["", "requests"],
}
TITLES = {"engine": "The embedded engine", "gate": "A gate before another server", "crowd": "A crowd"}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a model folder, such as the demo's")
    parser.add_argument("--parts", nargs="+", choices=tuple(HEADS), default=list(HEADS))
    parser.add_argument("--litellm", help="LiteLLM's command, in an environment of its own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--crowd", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks")
    options = parser.parse_args()
    console = Console()
    lines = [
        "# The server, measured",
        "",
        "Written by `benchmarks/serve.py`, whose first lines say how to read it.",
    ]
    for part in options.parts:
        console.print(f"{part} ...")
        if part == "engine":
            rows, notes = engine_part(options.model, options.rounds)
        elif part == "gate":
            rows, notes = gate_part(options.litellm, options.rate, options.seconds, options.rounds)
        else:
            rows, notes = crowd_part(options.model, options.crowd)
        table = Table(title=TITLES[part])
        for head in HEADS[part]:
            table.add_column(head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        lines += ["", f"## {TITLES[part]}", "", "| " + " | ".join(HEADS[part]) + " |"]
        lines += ["| --- |" + " ---: |" * (len(HEADS[part]) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", *(f"- {note}" for note in notes)]
    lines += ["", f"{machine()}"]
    target = Path("docs/benchmarks" if options.write else "build/benchmarks")
    target.mkdir(parents=True, exist_ok=True)
    (target / "serve.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"written: {(target / 'serve.md').absolute()}")


if __name__ == "__main__":
    main()
