"""Load on an HTTP server: requests at a steady rate whatever it does, and a server that answers at once.

    python benchmarks/serve_load.py upstream PORT     answers every chat with the same completion
    python benchmarks/serve_load.py load URL RATE SECONDS     prints JSON: latencies in ms, failures

An open loop: a request is sent when its time has come, not when the one before it is done, and its latency
counts from then on; a server that stops for a while is not spared what would have come meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

_WORDS = ["The", " answer", " to", " this", " is", " four", ",", " I", " think", "."] * 2
ANSWER = {
    "id": "chatcmpl-x",
    "object": "chat.completion",
    "created": 0,
    "model": "fake",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(_WORDS)},
            "finish_reason": "stop",
            "logprobs": {
                "content": [
                    {"token": word, "bytes": list(word.encode()), "logprob": -0.25, "top_logprobs": []}
                    for word in _WORDS
                ]
            },
        }
    ],
    "usage": {"prompt_tokens": 12, "completion_tokens": len(_WORDS), "total_tokens": 12 + len(_WORDS)},
}
QUESTION = {"model": "fake", "messages": [{"role": "user", "content": "What is two and two? " * 4}]}


async def upstream(port: int) -> None:
    """Answer until killed, with as little work as possible."""
    body = json.dumps(ANSWER).encode()
    models = json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}).encode()

    def response(content: bytes) -> bytes:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode() + content

    chat, listed = response(body), response(models)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lower = head.lower()
                if b"content-length:" in lower:
                    await reader.readexactly(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
                writer.write(listed if head.startswith(b"GET") else chat)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


async def load(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Latencies of requests at a rate."""
    import aiohttp

    latencies: list[float] = []
    failed: list[str] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(at: float) -> None:
            try:
                async with session.post(f"{url}/v1/chat/completions", json=QUESTION) as answer:
                    found = await answer.json()
                    if answer.status != 200 or not found["choices"][0]["message"]["content"]:
                        failed.append(f"{answer.status}: {str(found)[:100]}")
            except (aiohttp.ClientError, ValueError, KeyError) as error:
                failed.append(repr(error))
            latencies.append(1000 * (time.perf_counter() - at))

        tasks = []
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            at = began + number / rate
            if (wait := at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.ensure_future(one(at)))
        await asyncio.gather(*tasks)
    latencies.sort()
    found = {
        f"p{share}": latencies[min(len(latencies) - 1, len(latencies) * share // 100)]
        for share in (50, 95, 99)
    }
    return {**found, "requests": len(latencies), "failed": len(failed), "first_failure": (failed or [""])[0]}


if __name__ == "__main__":
    if sys.argv[1] == "upstream":
        asyncio.run(upstream(int(sys.argv[2])))
    else:
        print(json.dumps(asyncio.run(load(sys.argv[2], float(sys.argv[3]), float(sys.argv[4])))))
