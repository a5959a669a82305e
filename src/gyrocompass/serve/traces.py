"""A span for each question, by OpenTelemetry's conventions for generative AI.

    <operation> <model>     gen_ai.operation.name, .request.model, .request.max_tokens, .request.temperature,
                            .response.finish_reasons, .usage.input_tokens, .usage.output_tokens
                            and ours: gyro.gate.outcome, gyro.confidence, gyro.engine, gyro.request.id

Texts are in no span. Where nobody has set a tracer provider there are no spans;
`gyro serve --traces FILE` writes them as JSON lines, and a provider that the environment sets up (such as
opentelemetry-instrument does) gets them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opentelemetry import trace

from gyrocompass.serve.answer import Answered, Asked, Judgement
from gyrocompass.serve.backend import Job
from gyrocompass.serve.failures import Failure

_OPERATIONS = {"chat": "chat", "completion": "text_completion", "decision": "decision"}


class Traced:
    """A span that is open."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def ended(self, answers: Sequence[Answered], judgements: Sequence[Judgement | None]) -> None:
        """Say what came of it."""
        if not self._span.is_recording():
            return
        self._span.set_attribute("gen_ai.response.finish_reasons", [answer.finish for answer in answers])
        self._span.set_attribute("gen_ai.usage.input_tokens", answers[0].prompt_tokens if answers else 0)
        self._span.set_attribute("gen_ai.usage.output_tokens", sum(len(one.tokens) for one in answers))
        outcomes = [one.outcome for one in judgements if one is not None]
        if outcomes:
            self._span.set_attribute("gyro.gate.outcome", outcomes)
        sure = [one.confidence.probability for one in judgements if one is not None and one.confidence]
        if sure:
            self._span.set_attribute("gyro.confidence", sure)


@contextmanager
def span(asked: Asked, job: Job, engine: str) -> Iterator[Traced]:
    """The span of one question; a failure on the way is its status. Without a provider it costs nothing."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # nobody has set one
        yield Traced(trace.INVALID_SPAN)
        return
    operation = _OPERATIONS[asked.kind]
    tracer = trace.get_tracer("gyrocompass.serve")
    with tracer.start_as_current_span(
        f"{operation} {asked.model}".strip(), kind=trace.SpanKind.SERVER, record_exception=False
    ) as opened:
        if opened.is_recording():
            opened.set_attribute("gen_ai.operation.name", operation)
            opened.set_attribute("gen_ai.request.model", asked.model)
            opened.set_attribute("gen_ai.request.max_tokens", asked.max_tokens)
            opened.set_attribute("gen_ai.request.temperature", job.decoding.temperature)
            opened.set_attribute("gyro.engine", engine)
            opened.set_attribute("gyro.request.id", asked.id)
        try:
            yield Traced(opened)
        except Failure as failure:
            opened.set_status(trace.StatusCode.ERROR, f"{failure.status}: {failure.message}")
            opened.set_attribute("error.type", str(failure.status))
            raise


def write_traces(path: Path) -> Any:
    """Write every span to a file, a line of JSON each; returns what `shutdown`s it.

    The file is opened for appending; spans are written by a thread of their own.
    """
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": "gyrocompass"}))
    file = path.open("a", encoding="utf-8")
    exporter = ConsoleSpanExporter(out=file, formatter=lambda one: one.to_json(indent=None) + "\n")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider
