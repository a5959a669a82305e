"""Sizes, ids, leaving early, and every request that a fuzzer can think of."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from parrot import Parrot, alone
from schemathesis.checks import not_a_server_error
from starlette.testclient import TestClient

from gyrocompass.serve.app import make_app
from gyrocompass.serve.services import ServeSettings

Serve = Callable[[Any], str]
SAID = {"messages": [{"role": "user", "content": "hello"}]}

schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(alone(Parrot()), ServeSettings()))


@schema.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_our_fault(case: Any) -> None:
    response = case.call()
    case.validate_response(response, checks=(not_a_server_error,))
    if response.status_code >= 400 and response.status_code != 405:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_request_has_an_id() -> None:
    with TestClient(make_app(alone(Parrot()), ServeSettings())) as client:
        given = client.post("/v1/chat/completions", json=SAID, headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        hostile = client.post("/v1/chat/completions", json=SAID, headers={"x-request-id": "a b\t<c>"})
        assert hostile.headers["x-request-id"] == hostile.json()["id"].removeprefix("chatcmpl-")
        assert hostile.headers["x-content-type-options"] == "nosniff"


def test_what_is_not_there_is_said_in_the_same_shape() -> None:
    with TestClient(make_app(alone(Parrot()), ServeSettings())) as client:
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
            response = client.request(method, path)
            assert response.status_code == status
            assert path in response.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_requests_are_refused(served: Serve, chunked: bool) -> None:
    url = urlsplit(served(make_app(alone(Parrot()), ServeSettings(max_body_bytes=2000))))
    body = json.dumps({"messages": [{"role": "user", "content": "a" * 5000}]}).encode()
    with closing(http.client.HTTPConnection(url.netloc, timeout=20)) as connection:
        parts = (body[place : place + 500] for place in range(0, len(body), 500))
        connection.request(
            "POST", "/v1/chat/completions", parts if chunked else body, encode_chunked=chunked,
            headers={"Transfer-Encoding": "chunked"} if chunked else {},
        )  # fmt: skip
        with closing(connection.getresponse()) as response:
            assert response.status == 413
            assert "larger than 2,000 bytes" in json.loads(response.read())["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_early_stops_the_work(served: Serve, stream: bool) -> None:
    parrot = Parrot(pause_s=0.02)
    url = urlsplit(served(make_app(alone(parrot), ServeSettings())))
    body = json.dumps({"messages": [{"role": "user", "content": "a" * 1000}], "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.hostname or "", url.port or 0)) as connection:
        connection.sendall(head.encode() + body)
        until = time.monotonic() + 10
        while not parrot.jobs and time.monotonic() < until:
            time.sleep(0.01)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    while not parrot.left and time.monotonic() < until:
        time.sleep(0.01)
    assert parrot.left == 1


def test_figures_count_what_happened() -> None:
    with TestClient(make_app(alone(Parrot()), ServeSettings())) as client:
        client.post("/v1/chat/completions", json=SAID)
        client.post("/v1/chat/completions", json={})
        text = client.get("/metrics").text
    assert 'gyro_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'gyro_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'gyro_tokens_total{kind="completion"} 5.0' in text
    assert 'gyro_backend{name="running"} 0.0' in text
