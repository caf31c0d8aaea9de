"""OpenTelemetry: a span for each request, and the engine told of it, so that its own spans hang below.

Its one rule: without `otlp_endpoint` in the settings nothing of it is imported and a request pays nothing. No prompt, no reply
and no key goes into a span.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gateway import __version__
from gateway.access import TRACEPARENT
from gateway.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Tracer:
    """`begin` and `end` around a request; `close` sends what is left."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("tunegate", __version__)
        self._kind, self._status = SpanKind.SERVER, Status(StatusCode.ERROR)
        self._context = TraceContextTextMapPropagator()

    def begin(self, method: str, resource: str, headers: Iterable[tuple[bytes, bytes]]) -> Any:
        """A span below the client's own, where it told of one; engines that are asked in it are told of it."""
        told = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        parent = self._context.extract(told) if told else None
        span = self._tracer.start_span(f"{method} {resource}", parent, self._kind)
        context = span.get_span_context()
        flags = "01" if context.trace_flags.sampled else "00"
        TRACEPARENT.set(f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags}")
        return span

    def end(
        self, span: Any, method: str, status: int, request_id: bytes, key_id: str | None, project_id: str | None
    ) -> None:
        span.set_attribute("http.request.method", method)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("tunegate.request_id", request_id.decode())
        if key_id is not None:
            span.set_attribute("tunegate.key_id", key_id)
        if project_id is not None:
            span.set_attribute("tunegate.project_id", project_id)
        if status >= 500:
            span.set_status(self._status)
        span.end()

    def close(self) -> None:
        """Blocks until what is left was sent, or could not be."""
        self._provider.shutdown()


def open_tracer(endpoint: str) -> Tracer:
    """Sends to an OTLP collector over HTTP, `http://HOST:4318/v1/traces`. Raises SettingsError without the library."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(
            f"otlp_endpoint needs OpenTelemetry's SDK, which is not installed ({error.name}): pip install 'tunegate[trace]'"
        ) from error
    resource = Resource.create({"service.name": "tunegate", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return Tracer(provider)
