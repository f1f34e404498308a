"""The parts of the SDK's tracing that we use, imported only here.

During import, the SDK reads one variable, for an unused constant, and raises at an unusable value; but no `OTEL_*`
variable may stop mail. `environment` reads that variable too, and reports such a value.
"""

import os
from typing import Final

_READ_AT_IMPORT: Final = "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"

_value = os.environ.pop(_READ_AT_IMPORT, None)
try:
    from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import (
        ALWAYS_OFF,
        ALWAYS_ON,
        DEFAULT_ON,
        Decision,
        ParentBased,
        Sampler,
        TraceIdRatioBased,
    )
finally:
    if _value is not None:
        os.environ[_READ_AT_IMPORT] = _value

__all__: Final = (
    "ALWAYS_OFF",
    "ALWAYS_ON",
    "DEFAULT_ON",
    "Decision",
    "Event",
    "IdGenerator",
    "ParentBased",
    "RandomIdGenerator",
    "ReadableSpan",
    "Sampler",
    "SpanProcessor",
    "TraceIdRatioBased",
)
