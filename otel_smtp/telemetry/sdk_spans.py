"""Passes finished spans to processors of the OpenTelemetry SDK, and through them to any exporter.

The SDK's encoding of these is the reference for our own.
"""

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Status, StatusCode

from otel_smtp.telemetry.attributes import SCHEMA_URL, SCOPE_NAME
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.sampling import sdk_context, sdk_link
from otel_smtp.telemetry.sdk import Event, ReadableSpan, SpanProcessor


class SdkSpans:
    """A sink that passes each span to a `SpanProcessor` as the SDK would."""

    __slots__ = ("_processor", "_resource", "_scope")

    def __init__(self, processor: SpanProcessor, resource: Resource, version: str) -> None:
        self._processor = processor
        self._resource = resource
        self._scope = InstrumentationScope(SCOPE_NAME, version, SCHEMA_URL)

    def take(self, record: SpanRecord) -> None:
        """Take one span."""
        self._processor.on_end(readable_span(record, self._resource, self._scope))


def readable_span(record: SpanRecord, resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    """`record` as the SDK's own value of a finished span."""
    return ReadableSpan(
        record.name,
        sdk_context(record.context),
        None if record.parent is None else sdk_context(record.parent),
        resource,
        record.attributes,
        [Event(event.name, event.attributes, event.time_ns) for event in record.events],
        [sdk_link(link) for link in record.links],
        record.kind,
        status=Status(StatusCode.ERROR, record.description or None) if record.has_failed else Status(),
        start_time=record.start_ns,
        end_time=record.end_ns,
        instrumentation_scope=scope,
    )
