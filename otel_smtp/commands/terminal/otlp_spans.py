"""Makes drawable values from the status port's spans, which are in OTLP's JSON."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

_STATUS_ERROR: Final = 2
_INSTANCE: Final = "service.instance.id"


class SpanId(NamedTuple):
    """A span's ids."""

    trace_id: int
    span_id: int


class OtlpEvent(NamedTuple):
    """An event of a span; its time is nanoseconds since the epoch."""

    name: str
    time_ns: int
    attributes: Mapping[str, Any]


class OtlpLink(NamedTuple):
    """A link to another span."""

    context: SpanId
    attributes: Mapping[str, Any]


class OtlpSpan(NamedTuple):
    """A finished span; times are nanoseconds since the epoch.

    Attributes:
        instance: `service.instance.id` of the gateway that made it; "" where that is not known.
    """

    name: str
    context: SpanId
    parent: SpanId | None
    links: Sequence[OtlpLink]
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    events: Sequence[OtlpEvent]
    has_failed: bool
    instance: str = ""


def spans_of(otlp: Mapping[str, Any]) -> list[OtlpSpan]:
    """The spans of `resourceSpans`, in order of their start.

    Raises:
        ValueError, KeyError, TypeError: it is nothing of the kind.
    """
    spans = [
        _span(span, str(_attributes(resource_spans.get("resource", {}).get("attributes", ())).get(_INSTANCE, "")))
        for resource_spans in otlp["resourceSpans"]
        for scope_spans in resource_spans["scopeSpans"]
        for span in scope_spans["spans"]
    ]
    return sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))


def _span(otlp: Mapping[str, Any], instance: str) -> OtlpSpan:
    trace_id = int(otlp["traceId"], 16)
    parent = otlp.get("parentSpanId")
    return OtlpSpan(
        otlp["name"],
        SpanId(trace_id, int(otlp["spanId"], 16)),
        SpanId(trace_id, int(parent, 16)) if parent else None,
        [
            OtlpLink(SpanId(int(link["traceId"], 16), int(link["spanId"], 16)), _attributes(link.get("attributes", ())))
            for link in otlp.get("links", ())
        ],
        int(otlp["startTimeUnixNano"]),
        int(otlp["endTimeUnixNano"]),
        _attributes(otlp.get("attributes", ())),
        [
            OtlpEvent(event["name"], int(event["timeUnixNano"]), _attributes(event.get("attributes", ())))
            for event in otlp.get("events", ())
        ],
        otlp.get("status", {}).get("code") == _STATUS_ERROR,
        instance,
    )


def _attributes(key_values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {each["key"]: _value(each["value"]) for each in key_values}


def _value(value: Mapping[str, Any]) -> Any:
    [(kind, plain)] = value.items()
    match kind:
        case "intValue":
            return int(plain)
        case "arrayValue":
            return tuple(_value(each) for each in plain.get("values", ()))
        case _:
            return plain
