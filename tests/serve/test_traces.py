from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio, sys
from pathlib import Path
from asking import answered, asked
from parrot import Parrot
from gyrocompass.serve.answer import Confidence, Judgement
from gyrocompass.serve.backend import Job
from gyrocompass.serve.exchange import Exchange
from gyrocompass.serve.services import Lane, Way
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.traces import write_traces


class Gate:
    async def before(self, asked): return None
    async def after(self, asked, answered, others=()):
        return Judgement("answer", confidence=Confidence(0.9, None, None, "c"))


async def main():
    job = Job.plain([{"role": "user", "content": "hello"}])
    await Exchange(Way(Lane(Parrot(), gate=Gate()))).whole(asked("secret words"), job)
    async for _ in Exchange(Way(Lane(Parrot()))).live(asked("secret words"), job): pass
    try:
        await Exchange(Way(Lane(Parrot(failure=Failure(502, "gone"))))).whole(asked("secret words"), job)
    except Failure: pass

provider = write_traces(Path(sys.argv[1]))
asyncio.run(main())
provider.shutdown()
"""


def test_spans_follow_the_conventions_and_hold_no_text(tmp_path: Path) -> None:
    """In a process of its own: a tracer provider is set once."""
    path = tmp_path / "traces.jsonl"
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{SCRIPT}", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, live, failed = (json.loads(line) for line in path.read_text().splitlines())
    assert whole["name"] == "chat model-1" and whole["kind"] == "SpanKind.SERVER"
    about = whole["attributes"]
    assert about["gen_ai.operation.name"] == "chat" and about["gen_ai.usage.output_tokens"] == 5
    assert about["gyro.gate.outcome"] == ["answer"] and about["gyro.confidence"] == [0.9]
    assert live["attributes"]["gen_ai.usage.output_tokens"] == 5
    assert failed["status"]["status_code"] == "ERROR" and failed["attributes"]["error.type"] == "502"
    assert "secret words" not in path.read_text()
