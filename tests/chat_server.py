"""A small OpenAI-compatible server on 127.0.0.1 that answers from a script and keeps what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    body: str = ""
    status: int = 200
    headers: Mapping[str, str] = {}


def completion(text: str) -> Reply:
    return Reply(json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}))


class ChatServer:
    """Gives its replies in turn; the last one again and again."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[ChatServer]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.asked.append({"path": self.path, **body})
                script.keys.append(self.headers["Authorization"])
                reply = script.replies.pop(0) if len(script.replies) > 1 else script.replies[0]
                content = reply.body.encode()
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
