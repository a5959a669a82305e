"""Figures for Prometheus, of one app: requests, times, tokens, what the gate did, how sure answers were."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from gyrocompass.serve.answer import Answered, Judgement

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """Counts and histograms in a registry of their own, so that two apps in one process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        one = self._registry
        self._requests = Counter("gyro_requests", "Requests that ended", ["route", "status"], registry=one)
        self._seconds = Histogram(
            "gyro_request_seconds", "From arrival to the last byte", ["route"], buckets=_SECONDS, registry=one
        )
        self._first = Histogram(
            "gyro_first_token_seconds", "From arrival to the first token", buckets=_SECONDS, registry=one
        )
        self._tokens = Counter("gyro_tokens", "Tokens read and written", ["kind"], registry=one)
        self._gate = Counter("gyro_gate", "What became of answers", ["outcome"], registry=one)
        self._confidence = Histogram(
            "gyro_confidence", "Calibrated probability that an answer is right", buckets=_TENTHS, registry=one
        )
        self._backend = Gauge("gyro_backend", "Gauges of the backend", ["name"], registry=one)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answer(self, answered: Answered, judgement: Judgement | None) -> None:
        """One answer was given."""
        self._first.observe(answered.first_token_s)
        self._tokens.labels("prompt").inc(answered.prompt_tokens)
        self._tokens.labels("completion").inc(len(answered.tokens))
        if judgement is not None:
            self._gate.labels(judgement.outcome).inc()
            if judgement.confidence is not None:
                self._confidence.observe(judgement.confidence.probability)

    def text(self, backend: dict[str, float]) -> bytes:
        """In Prometheus's format, with the backend's gauges as they are now."""
        for name, value in backend.items():
            self._backend.labels(name).set(value)
        return generate_latest(self._registry)
